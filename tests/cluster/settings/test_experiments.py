"""The experiments for real clusters: their headers are true, and each does two steps in small.

Small means fewer and narrower layers, fewer samples and steps. All else is as in the file: data,
kind of teacher, grid, solver, objective, optimiser. Ray and DeepSpeed stay away.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.inspect.verify import audit
from cluster.plan.estimate import show
from cluster.plan.stream import stream_plan
from cluster.pool.worker import TeacherWorker
from cluster.settings.hydra import compose
from cluster.state.done import view_of, with_absolute_paths
from cluster.state.identity import check_or_write
from cluster.state.room import check_room
from cluster.supervisor import runner
from cluster.supervisor.session import open_session
from cluster.supervisor.stages import pretrain, run_spec
from cluster.trainer.job import TrainJob
from cluster.trainer.rank import initial_network, resume
from cluster.trainer.sources import build_source
from distill.config import ConfigError
from distill.engine.engine import TorchEngine
from distill.evaluation.evaluate import evaluate
from distill.networks.build import build_network
from distill.networks.config import DiTConfig, UNetConfig
from distill.networks.files import save_model
from distill.report.sections import write_report
from distill.run.files import read_lines
from distill.run.identity import record_of
from distill.run.records import tree_of

FOLDER = Path(__file__).parents[3] / "configs" / "experiment"
DIT = DiTConfig(patch_size=2, width=16, depth=1, num_heads=2)
UNET = UNetConfig(
    width=8, channel_mults=[1, 2], blocks_per_level=1, attention_sizes=[16], num_heads=2
)
SMALL = [
    "train.max_steps=2",
    "train.batch_size=4",
    "trajectory.samples_per_shard=4",
    "trajectory.block_shards=2",
    "trajectory.passes=1",
    "trajectory.batch_size=2",
    "eval.num_samples=4",
    "eval.batch_size=4",
    "eval.nfe=[1]",
    "eval.teacher_nfe=[2]",
    "eval.euler_nfe=[1]",
    "eval.reference_steps=8",
    "cluster.teachers.num_workers=1",
    "cluster.teachers.gpus_per_worker=0",
    "cluster.trainer.num_workers=1",
    "cluster.trainer.gpus_per_worker=0",
]
SMALL_DIT = ["student.width=16", "student.depth=1", "student.num_heads=2"]
SMALL_UNET = [
    "student.width=8",
    "student.channel_mults=[1,2]",
    "student.blocks_per_level=1",
    "student.attention_sizes=[16]",
    "student.num_heads=2",
]


def images_in(folder, size):
    """An .npz with 16 random pictures of the classes 0 .. 8 and the last."""
    classes = {32: 10, 64: 1000}[size]
    labels = np.append(np.arange(15) % 9, classes - 1)
    images = np.random.default_rng(0).integers(0, 256, (16, size, size, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=labels)
    return f"data.path={folder / 'images.npz'}"


def weights(config, image):
    """A network's weights as after training."""
    torch.manual_seed(0)
    state = build_network(config, image).state_dict()
    fixed = ("s_embedder", "pos_embed")
    return {
        n: v if n.startswith(fixed) else v + 0.1 * torch.randn_like(v) for n, v in state.items()
    }


def own_teacher(folder, image):
    """CIFAR-10's: the run trains it."""
    steps = ["pretrain.train.max_steps=2", "pretrain.train.batch_size=4"]
    return [*SMALL_UNET, images_in(folder, 32), *steps]


def native_teacher(folder, image):
    """A model folder."""
    save_model(folder / "teacher", weights(UNET, image), UNET, image, {"kind": "teacher"})
    teacher = [f"teacher.native.path={folder / 'teacher'}", "teacher.native.steps=8"]
    return [*SMALL_UNET, images_in(folder, 64), *teacher]


def sit_teacher(folder, image):
    """A file as SiT's trainer writes it."""
    state = {n: v for n, v in weights(DIT, image).items() if not n.startswith("s_embedder")}
    torch.save({"model": state, "ema": state}, folder / "sit.pt")
    teacher = [f"teacher.sit.path={folder / 'sit.pt'}", "teacher.sit.steps=8"]
    teacher.append("teacher.sit.trial=false")  # its weights are random
    return [*SMALL_DIT, *teacher, "teacher.sit.num_heads=2"]


def diffusers_teacher(folder, image):
    """A folder as diffusers writes it."""
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=image.channels,
        out_channels=image.channels,
        num_layers=1,
        sample_size=image.size,
        num_embeds_ada_norm=image.num_classes,
    )
    network.save_pretrained(folder / "teacher", safe_serialization=True)
    teacher = [f"teacher.diffusers.path={folder / 'teacher'}", "teacher.diffusers.steps=8"]
    teacher.append("teacher.diffusers.trial=false")  # its weights are random
    return [*SMALL_DIT, *teacher]


TEACHERS = {
    "cifar10": (own_teacher, "teacher.pretrained"),
    "imagenet64": (native_teacher, "teacher.native"),
    "imagenet256_sit": (sit_teacher, "teacher.sit"),
    "flux_latents": (diffusers_teacher, "fresh: teacher.diffusers is of kind diffusers"),
}


def one(*args):
    (config,) = compose(list(args))
    return config


def train_here(job):
    """One process trains to the end; where its first weights came from."""
    network, origin = initial_network(job)
    engine = TorchEngine(network, job.train, torch.device("cpu"))
    source = build_source(job, engine, lambda: False, lambda: None)
    assert resume(job, engine, source, lambda: False) == job.train.max_steps
    return origin


@pytest.mark.parametrize("experiment", TEACHERS)
def test_two_steps_in_small(experiment, tmp_path):
    make_teacher, expected_origin = TEACHERS[experiment]
    image = one(f"experiment={experiment}").data.image
    overrides = [f"run.dir={tmp_path / 'run'}", *SMALL, *make_teacher(tmp_path, image)]
    config = with_absolute_paths(one(f"experiment={experiment}", *overrides))
    run = config.files
    with open_session(config, run) as session:
        view = view_of(config, check_or_write(config, run)[0])
        own = pretrain(session, view).job
        assert (own is not None) == (experiment == "cifar10")
        if own is not None:
            train_here(own)
        spec = run_spec(view)
        worker = TeacherWorker(config, run, spec, "cpu")
        worker.load()
        for shard in range(stream_plan(config).shards):
            worker.produce(shard)
        its_hash = record_of(run).hash
        origin = train_here(TrainJob("train", config, spec, session.scratch, its_hash))
    assert origin == expected_origin
    assert audit(run)["ok"]
    losses = [line["loss"] for line in read_lines(run.metrics)]
    assert losses and all(math.isfinite(loss) for loss in losses)
    if config.data.name == "latents":
        results = evaluate(run, config.data, config.teacher, config.eval, config.objective.name)
        (row,) = results.student
        assert tree_of(row).keys() == {"nfe", "distance_to_teacher", "seconds_per_1000"}
        assert math.isfinite(row.distance_to_teacher)
        assert "unless the run is in latents" in write_report(run, "").read_text()


@pytest.mark.parametrize("experiment", TEACHERS)
def test_the_header_holds_what_estimate_prints(experiment, capsys, monkeypatch):
    """Anew: COLUMNS=100 bowstring estimate experiment=NAME | sed 's/^/#   /; s/ *$//'."""
    monkeypatch.setenv("COLUMNS", "100")
    show(one(f"experiment={experiment}"), None, as_json=False)
    printed = [f"#   {line}".rstrip() for line in capsys.readouterr().out.rstrip().splitlines()]
    header = (FOLDER / f"{experiment}.yaml").read_text().split("\ndefaults:\n")[0]
    assert f"# `bowstring estimate experiment={experiment}`:\n#\n" + "\n".join(printed) in header
    assert "NOT RUN AT SCALE" in header


@pytest.mark.parametrize("experiment", TEACHERS)
def test_a_whole_run_has_room_for_its_shards(experiment, tmp_path):
    config = one(f"experiment={experiment}", f"run.dir={tmp_path}")
    check_room(view_of(config), trainer_reads=True)


def test_the_student_of_a_sit_begins_with_its_velocity(tmp_path):
    image = one("experiment=imagenet256_sit").data.image
    overrides = sit_teacher(tmp_path, image)
    config = one("experiment=imagenet256_sit", f"run.dir={tmp_path / 'run'}", *overrides)
    network, _ = initial_network(TrainJob("train", config, None, tmp_path, "hash"))
    reference = build_network(DIT, image)
    reference.load_state_dict(weights(DIT, image))
    x, t, s = torch.randn(3, *image.shape), torch.rand(3), torch.ones(3)
    label = torch.tensor([0, 999, -1])
    velocity = reference(x, t, t, label)
    assert velocity.abs().mean() > 0.01
    assert torch.equal(network(x, t, t, label), velocity)
    assert torch.equal(network(x, t, s, label), velocity)


def test_latents_train_no_teacher(tmp_path):
    config = one("experiment=imagenet256_sit", "teacher=pretrained", f"run.dir={tmp_path}")
    with (
        open_session(config, config.files) as session,
        pytest.raises(ConfigError, match=r"no images to train a teacher on; .*teacher=sit"),
    ):
        pretrain(session, view_of(config))


def test_an_absent_npz_is_named_before_anything_starts(tmp_path):
    config = one("experiment=imagenet64", "data.path=/nowhere.npz", f"run.dir={tmp_path}")
    for verb in (runner.run, runner.distil):
        with pytest.raises(ConfigError, match=r"data.path=/nowhere.npz is not there; set it to a"):
            verb(config)
    assert not config.files.config.exists()
