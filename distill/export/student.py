"""Export: a model folder from the evaluation average of a run's last verified checkpoint.

model.safetensors   every weight, float32
model.json          network, image, and where the model comes from
"""

from pathlib import Path
from typing import Any

from distill.checkpoint import commit, manifest
from distill.config import ConfigError, ImageSpec, check
from distill.networks.build import empty_network
from distill.networks.config import NetworkConfig, network_config
from distill.networks.files import DESCRIPTION, load_weights, save_model
from distill.objectives.config import OBJECTIVES, name_now
from distill.run import files, identity


def export_checkpoint(
    checkpoint: Path, out: Path, network: NetworkConfig, image: ImageSpec, meta: dict[str, Any]
) -> Path:
    """`out`, now a model folder with the evaluation average of a verified checkpoint.

    A checkpoint holds trained parameters only; fixed ones (position tables) are made again by the
    network.

    Raises:
        ConfigError: the checkpoint is of another network.
    """
    module = empty_network(network, image)
    average = commit.read_average(checkpoint, "evaluation")
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    check(
        set(average) == trained
        and all(shapes[name] == tuple(average[name].shape) for name in trained),
        f"{checkpoint} is of another network than {type(network).__name__} in the configuration",
    )
    load_weights(module, average, checkpoint)
    save_model(out, module.state_dict(), network, image, meta)
    return out


def export_run(run: files.RunDir, out: Path) -> Path:
    """`out`, now a folder with the run's student; `distill.sample.load_student` opens it.

    Raises:
        ConfigError: the run has no checkpoint yet.
        CheckpointError: it has some and none verifies.
    """
    found = manifest.latest_verified(run.checkpoints)
    if found is None:
        raise ConfigError(f"{run.root} has no checkpoint yet; train it first")
    step, folder = found
    record = identity.record_of(run)
    settings = record.identity
    data, name = settings["data"], name_now(settings["objective"])
    meta = {
        "kind": "student",
        "objective": name,
        "middle": OBJECTIVES[name].middle,
        "step": step,
        "run": run.root.name,
        "config_sha256": record.hash,
        "teachers": record.teachers,
    }
    image = ImageSpec(data["channels"], data["size"], data["num_classes"])
    return export_checkpoint(folder, out, network_config(settings["student"]), image, meta)


def latest_student(run: files.RunDir) -> Path:
    """Model folder of the run's last verified checkpoint, exported now unless it was before."""
    found = manifest.latest_verified(run.checkpoints)
    if found is None:
        raise ConfigError(f"{run.root} has no checkpoint yet; train it first")
    out = run.model(found[0])
    return out if (out / DESCRIPTION).is_file() else export_run(run, out)
