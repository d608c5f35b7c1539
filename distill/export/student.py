"""Export: a model folder from the evaluation average of a run's last verified checkpoint.

model.safetensors   every weight, float32
model.json          network, image, and where the model comes from

Nothing is lost on the way: before the folder has its name it is opened again, and is to give the
output of the trained network bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from distill.checkpoint import commit, manifest
from distill.config import ConfigError, ImageSpec, LossyExport, check
from distill.flow import noise, paths
from distill.networks import build, files, layers
from distill.networks.config import NetworkConfig, network_config
from distill.objectives.config import OBJECTIVES, name_now
from distill.run.files import RunDir
from distill.run.identity import RunRecord, record_of
from distill.teachers.build import start_of
from distill.teachers.config import SiTConfig

# Files that say of a folder that it was exported, by any format but FastGen's.
MARKS = (files.DESCRIPTION, "model_index.json", "graph.json")


@dataclass(frozen=True)
class TrainedStudent:
    """The student of a checkpoint.

    Attributes:
        network: with the weights of the evaluation average, frozen, on the CPU.
        meta: where they come from.
    """

    network: layers.AbstractNetwork
    meta: dict[str, Any]

    @property
    def middle(self) -> float:
        """Where the second of two jumps begins (`distill.flow.times`)."""
        return float(self.meta["middle"])


def trained_network(
    checkpoint: Path,
    network: NetworkConfig,
    image: ImageSpec,
    fixed: dict[str, torch.Tensor] | None = None,
) -> layers.AbstractNetwork:
    """The evaluation average of a verified checkpoint, with all that was fixed in training.

    `fixed` stands in for what a checkpoint of an older version does not hold. Without it those
    tensors are the constructor's.

    Raises:
        ConfigError: the checkpoint is of another network.
    """
    module = build.empty_network(network, image)
    average = commit.read_average(checkpoint, "evaluation")
    stored = commit.read_fixed(checkpoint)
    state = average | (stored if stored is not None else fixed or {})
    parameters = dict(module.named_parameters())
    check(
        average.keys() <= parameters.keys() <= state.keys()
        and all(value.shape == state[name].shape for name, value in parameters.items()),
        f"{checkpoint} is of another network than {type(network).__name__} in the configuration",
    )
    return files.load_weights(module, state, checkpoint).eval().requires_grad_(False)


def save_trained(
    out: Path,
    network: layers.AbstractNetwork,
    meta: dict[str, Any],
    finish: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """`out`, now a model folder that gives what `network` gives. `finish` adds to it.

    Raises:
        LossyExport: it would not.
    """

    def inspect(folder: Path) -> None:
        found, _ = files.load_model(folder, "cpu")
        for name, value in found.state_dict().items():
            if not torch.equal(value, state[name]):
                raise LossyExport(f"{folder}: {name} is not as it was trained; nothing was written")
        check_same(found, network, folder)
        finish(folder)

    state, config, image = network.state_dict(), network.config, network.image
    files.save_model(out, state, config, image, meta, inspect)
    return out


@torch.no_grad()
def check_same(found: paths.MeanVelocity, trained: layers.AbstractNetwork, what: object) -> None:
    """Compares two networks on a fixed batch, a label and "none", a jump from 0 and one from 3/4.

    Raises:
        LossyExport: they differ in a bit.
    """
    x = torch.from_numpy(noise.sample_noise(0, np.arange(2), trained.image.shape))
    t, s = torch.tensor([0.0, 0.75]), torch.tensor([0.75, 1.0])
    label = torch.tensor([trained.image.num_classes - 1, -1])
    expected, got = trained(x, t, s, label), found(x, t, s, label)
    if not torch.equal(got, expected):
        worst = float((got - expected).abs().max() / expected.abs().max())
        raise LossyExport(
            f"{what} gives another output than the trained network, off by {worst:.1e} of the "
            "largest value; nothing was written"
        )


def check_place(out: Path, overwrite: bool) -> None:
    """Raises ConfigError unless an export may take the name of the folder `out`.

    What is replaced is an export at most: nobody loses a folder of another kind by a slip.
    """
    if not out.exists():
        return
    check(
        overwrite,
        f"{out} is there already; replace it with --overwrite, or name another folder with --out",
    )
    is_export = out.is_dir() and any((out / name).is_file() for name in MARKS)
    check(is_export, f"{out} is no export, and --overwrite replaces nothing else; move it away")


def read_student(run: RunDir) -> TrainedStudent:
    """The student of the run's last verified checkpoint. A newer one that is damaged is named.

    Raises:
        ConfigError: the run has no checkpoint yet.
        CheckpointError: it has some and none verifies.
    """
    found = manifest.latest_verified(run.checkpoints)
    if found is None:
        raise ConfigError(f"{run.root} has no checkpoint yet; train it first")
    step, folder = found
    for newer, damaged in manifest.committed_steps(run.checkpoints).items():
        if newer > step:
            Console(stderr=True).print(
                f"{damaged} is damaged; step {step} is taken, the newest that verifies",
                highlight=False,
                soft_wrap=True,
            )
    record = record_of(run)
    data, name = record.identity["data"], name_now(record.identity["objective"])
    image = ImageSpec(data["channels"], data["size"], data["num_classes"])
    fixed = _fixed_at_start(record) if manifest.read_manifest(folder).fixed is None else None
    network = trained_network(folder, network_config(record.identity["student"]), image, fixed)
    meta = {
        "kind": "student",
        "objective": name,
        "middle": OBJECTIVES[name].middle,
        "step": step,
        "run": run.root.name,
        "config_sha256": record.hash,
        "teachers": record.teachers,
    }
    return TrainedStudent(network, meta)


def _fixed_at_start(record: RunRecord) -> dict[str, torch.Tensor]:
    """The tensors that a student took over from a SiT and that are not trained, else none.

    A SiT for a higher resolution has other positions than the constructor's.

    Raises:
        ConfigError: its file is not there any more.
    """
    teacher = list(record.identity.get("teacher", {"": {}}).values())[-1]
    if teacher.get("kind") != "sit":
        return {}
    try:
        network = start_of(SiTConfig(path=teacher["path"], num_heads=teacher["num_heads"]))
    except ConfigError as error:
        raise ConfigError(
            f"the checkpoint is of a version that did not save fixed tensors, and the teacher that "
            f"they come from cannot be opened ({error}); put it back, or train a step further"
        ) from error
    if network is None or network.config != network_config(record.identity["student"]):
        return {}
    return files.fixed_tensors(network.requires_grad_(True))


def export_checkpoint(
    checkpoint: Path, out: Path, network: NetworkConfig, image: ImageSpec, meta: dict[str, Any]
) -> Path:
    """`out`, now a model folder with the evaluation average of a verified checkpoint.

    Raises:
        ConfigError: the checkpoint is of another network.
    """
    return save_trained(out, trained_network(checkpoint, network, image), meta)


def export_run(run: RunDir, out: Path) -> Path:
    """`out`, now a folder with the run's student; `distill.sample.load_student` opens it.

    Raises as `read_student`.
    """
    student = read_student(run)
    return save_trained(out, student.network, student.meta)


def latest_student(run: RunDir) -> Path:
    """Model folder of the run's last verified checkpoint, exported now unless it was before."""
    found = manifest.latest_verified(run.checkpoints)
    if found is None:
        raise ConfigError(f"{run.root} has no checkpoint yet; train it first")
    out = run.model(found[0])
    description = out / files.DESCRIPTION
    # What does not say its version may have lost what was fixed.
    if description.is_file() and "bowstring" in files.read_description(description):
        return out
    return export_run(run, out)
