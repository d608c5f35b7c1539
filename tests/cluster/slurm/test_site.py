"""What jobs ask of nodes: every shipped experiment on five kinds of nodes, what cannot be with the
number that would do, and what `sinfo` says of a site.
"""

import functools
import re
from pathlib import Path

import pytest

from cluster.cli.main import dispatch
from cluster.plan import nodes
from cluster.plan.nodes import Shape
from cluster.settings.hydra import compose
from cluster.slurm import jobs, site
from cluster.slurm.scripts import of_teachers, plan, render
from distill.config import ConfigError
from distill.networks.cost import network_cost
from distill.run.events import Save, append
from distill.run.files import RunDir

EXPERIMENTS = sorted(
    path.stem for path in (Path(__file__).parents[3] / "configs/experiment").glob("*.yaml")
)
GIB = 2**30
UNKNOWN = Shape()
KINDS = ("train", "teachers", "evaluate")
SHAPES = {
    "8 x 80 GB": Shape(8, 64, 1000 * GIB),
    "4 x 64 GB": Shape(4, 32, 500 * GIB),
    "4 x A100": Shape(4, 128, 500 * GIB),
    "1 x 24 GB": Shape(1, 16, 64 * GIB),
    "CPU": Shape(0, 32, 128 * GIB),
}
NEED_GPUS = {"cifar10", "imagenet64", "imagenet256_sit", "flux_latents"}


@functools.cache
def one(*settings):
    (config,) = compose(list(settings))
    return config


def made(*settings, shape=UNKNOWN, chain=1):
    config = one(*settings)
    return plan(config, dict.fromkeys(config.cluster.slurm.kinds, shape), chain)


def options(found, kind):
    """Options of sbatch, by name."""
    text = render(found, Path("/runs/a"))[kind]
    pairs = re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", text, re.MULTILINE)
    return dict(pairs) | {"script": text}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_shipped_experiment_fits_every_kind_of_node_or_is_refused(experiment, shape):
    """imagenet64 asked for 64 GPUs and 513 cores of a node."""
    node = SHAPES[shape]
    words = (f"experiment={experiment}", f"cluster=slurm{'_gpu' if node.gpus else ''}")
    if experiment in NEED_GPUS and not node.gpus:
        with pytest.raises(ConfigError, match=r"has no GPU .* set cluster.trainer.gpus_per_work"):
            made(*words, shape=node)
        return
    found = made(*words, shape=node)
    cluster = found.config.cluster
    for kind, workers in (("train", cluster.trainer), ("teachers", cluster.teachers)):
        asked, share = options(found, kind), found.shares[kind]
        assert share.per_node * workers.cpus_per_worker <= int(asked["cpus-per-task"]) <= node.cpus
        gpus = int(asked.get("gpus-per-node", 0))
        assert gpus == share.per_node * workers.gpus_per_worker and gpus <= node.gpus
    ranks, per_node = cluster.trainer.max_workers, found.shares["train"].per_node
    train, teachers = options(found, "train"), options(found, "teachers")
    assert int(train["nodes"]) * per_node == ranks
    if node.gpus and ranks >= node.gpus:
        assert per_node == node.gpus  # no node of it with GPUs that nobody uses
    first, last, at_once = re.fullmatch(r"(\d+)-(\d+)%(\d+)", teachers["array"]).groups()
    per_task, tasks = of_teachers(teachers["script"])
    assert first == "0" and tasks == int(last) + 1 >= int(at_once)
    wanted = cluster.teachers.num_workers
    assert (int(at_once) - 1) * per_task < wanted <= int(at_once) * per_task


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        (["cluster.slurm.train.nodes=2"], SHAPES["8 x 80 GB"], r"16 on a node .*nodes=4 would do"),
        (["cluster.slurm.train.nodes=8"], SHAPES["1 x 24 GB"], r"holds 1 .*nodes=32 would do"),
        (
            ["cluster.slurm.teachers.workers_per_node=9"],
            SHAPES["8 x 80 GB"],
            "workers_per_node=8 would do",
        ),
        (["cluster.slurm.teachers.max_nodes=7"], SHAPES["8 x 80 GB"], "max_nodes=8 would do"),
        (["cluster.trainer.cpus_per_worker=9"], SHAPES["8 x 80 GB"], "cpus_per_worker=8 would do"),
        (["cluster.trainer.cpus_per_worker=99"], SHAPES["8 x 80 GB"], "more than a node has, 64"),
        (["cluster.trainer.gpus_per_worker=2"], SHAPES["1 x 24 GB"], "more than a node has, 1"),
        ([], Shape(), r"how many GPUs .* is not known .* cluster.slurm.node.gpus=8"),
        (["cluster.slurm.train.nodes=5"], SHAPES["8 x 80 GB"], "must be a multiple of"),
        (["cluster.trainer.num_workers=30"], SHAPES["8 x 80 GB"], "train.batch_size"),
        (["cluster.slurm.train.memory=2T"], SHAPES["8 x 80 GB"], "1024000M in all, would do"),
        (["cluster.slurm.train.memory_per_cpu=17G"], SHAPES["8 x 80 GB"], "16000M a core"),
        (
            ["cluster.slurm.train={memory: 9G, memory_per_cpu: 1G}"],
            SHAPES["8 x 80 GB"],
            "leave one out",
        ),
        (
            ["train.offload=optimizer", "train.zero_stage=1", "cluster.slurm.train.memory=1G"],
            SHAPES["8 x 80 GB"],
            r"8 ranks offload .* cluster.slurm.train.nodes=\d+, or",
        ),
        (
            ["cluster.slurm.save_s=600", "cluster.slurm.train.time='10:00'"],
            SHAPES["8 x 80 GB"],
            "begins before a job of cluster.slurm.train.time=10:00 has started",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_number_that_would_do(settings, shape, message):
    ranks = "cluster.trainer.num_workers=32"
    words = ["experiment=imagenet64", "cluster=slurm_gpu", ranks, *settings]
    with pytest.raises(ConfigError, match=message):
        made(*words, shape=shape)
    if found := re.search(r"(\w+=\d+) would do", message):
        key, _, _ = words.pop().rpartition(".")
        made(*words, f"{key}.{found[1]}", shape=shape)


def test_two_workers_share_a_gpu_and_ranks_that_share_no_number_are_spread():
    half = ["cluster.teachers.gpus_per_worker=0.5", "cluster.teachers.cpus_per_worker=2"]
    found = made(
        "experiment=imagenet64", "cluster=slurm_gpu", *half, shape=SHAPES["4 x 64 GB"]
    ).shares["teachers"]
    assert (found.nodes, found.per_node, found.gpus, found.cpus) == (8, 8, 4, 16)
    found = made(
        "experiment=digits", "train.batch_size=120", "cluster=slurm_gpu",
        "cluster.trainer.num_workers=[3,10]", shape=SHAPES["4 x 64 GB"],
    )  # fmt: skip
    assert options(found, "train")["nodes"] == "1-3"  # 4 ranks each, of which 10 are used


def test_a_node_of_few_cores_takes_what_leaves_some_of_its_gpus_free():
    """Eight ranks on it would need 64 cores; two do not, nor one, nor six that are asked for."""
    few = Shape(8, 48)
    found = made("experiment=digits", "cluster=slurm_gpu", shape=few).shares
    assert [found[kind].cpus for kind in KINDS] == [17, 16, 8]
    six = ("cluster.trainer.num_workers=12", "train.batch_size=120", "cluster.slurm.train.nodes=2")
    found = made("experiment=digits", "cluster=slurm_gpu", *six, shape=few).shares["train"]
    assert (found.per_node, found.gpus, found.cpus) == (6, 6, 48)
    with pytest.raises(ConfigError, match=r"8 of them fit by its GPUs; .*cpus_per_worker=6 would"):
        made("experiment=digits", "cluster=slurm_gpu", *six[:2], shape=few)


def test_a_site_without_gpu_resources_says_how_many_and_takes_whole_nodes():
    words = ("experiment=imagenet64", "cluster=slurm_gpu", "cluster.slurm.gpu_option=''")
    for kind in KINDS:
        text = render(made(*words, shape=SHAPES["4 x A100"]), Path("/runs/a"))[kind]
        assert "\n#SBATCH --exclusive\n" in text and "gpus-per-node" not in text
        assert ("\nexport BOWSTRING_GPUS=4\n" in text) == (kind != "evaluate")


def test_memory_may_be_asked_for_by_core():
    words = ("experiment=tiny", "cluster=slurm", "cluster.slurm.teachers.memory_per_cpu=4G")
    assert options(made(*words), "teachers")["mem-per-cpu"] == "4G"


# -----------------------------------------------------------------------------------------------
# Time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:00", 5400), ("2:30:00", 9000), ("1-12", 129600), ("1-00:30:05", 88205)],
)
def test_a_time_limit_is_read_as_slurm_does(text, seconds):
    assert nodes.seconds(text) == seconds
    assert nodes.seconds(nodes.limit_words(seconds)) == seconds
    assert nodes.seconds("infinite") is None


def test_time_limits_follow_from_the_estimate_and_stay_below_the_partitions():
    """cifar10: 1.33 h of pre-training, 1.76 h of training, 1.15 h of evaluation."""
    limits = {
        shape_limit: [
            options(
                made(
                    "experiment=cifar10",
                    "cluster=slurm_gpu",
                    shape=Shape(8, 64, limit_s=shape_limit),
                ),
                kind,
            )["time"]
            for kind in KINDS
        ]
        for shape_limit in (None, 7200)
    }
    assert limits[None] == ["0-06:30:00", "0-06:30:00", "0-02:30:00"]
    assert limits[7200] == ["0-02:00:00"] * 3
    slow = made("experiment=imagenet64", "cluster=slurm_gpu", shape=Shape(8, 64))
    assert options(slow, "train")["time"] == "1-00:00:00"  # it is queued again


# -----------------------------------------------------------------------------------------------
# What Slurm says

SINFO = """Welcome to the machine | all is well
10|64|515000|gpu:a100:8(S:0-1)|1-00:00:00|a100,ib|gpu*
2|32|256000|gpu:v100:2,gpu:t4:1|1-00:00:00|v100|gpu*
3|128|512000|(null)|infinite|genoa|cpu
1|16|64000|gpu:4|12:00:00|(null)|small
"""


@pytest.fixture
def sinfo(monkeypatch):
    monkeypatch.setattr(jobs, "ask", lambda *words: {"sinfo": SINFO}[words[0]])


def shape_of(kind, *settings, on_gpu=True):
    config = one("experiment=tiny", "cluster=slurm", *settings)
    return site.shape_for(site.read_nodes(), config.cluster.slurm, kind, on_gpu)


def test_nodes_are_those_of_the_partition_of_each_kind(sinfo):
    here = [f"cluster.slurm.{kind}.partition={name}" for kind, name in
            (("teachers", "small"), ("evaluate", "cpu"))]  # fmt: skip
    shape = shape_of("train", *here)
    assert (shape.gpus, shape.cpus, shape.memory, shape.limit_s) == (8, 64, 515000 * 2**20, 86400)
    assert "partition gpu" in shape.where
    shape = shape_of("teachers", *here)
    assert (shape.gpus, shape.cpus, shape.limit_s) == (4, 16, 43200)
    assert shape_of("evaluate", *here).gpus == 0 and shape_of("evaluate", *here).limit_s is None
    assert shape_of("train", "cluster.slurm.train.constraint=v100").gpus == 3
    assert shape_of("train", "cluster.slurm.train.partition='cpu,small'").cpus == 16
    assert shape_of("train", "cluster.slurm.train.partition='cpu,small'", on_gpu=False).cpus == 128


def test_settings_say_more_than_slurm_and_no_more_than_its_nodes_have(sinfo):
    assert shape_of("train", "cluster.slurm.node.gpus=4") == shape_of(
        "train", "cluster.slurm.train.node={gpus: 4}", "cluster.slurm.node.gpus=6"
    )
    assert shape_of("train", "cluster.slurm.node.gpus=4").cpus == 64
    for node in ("{gpus: 16}", "{cpus: 256}", "{memory: 900G}"):
        with pytest.raises(
            ConfigError, match=r"no node of the default partition.*8 GPUs, 64 cores"
        ):
            shape_of("train", f"cluster.slurm.node={node}")
    blind = ("cluster.slurm.train.partition=cpu", "cluster.slurm.gpu_option=''")
    assert shape_of("train", *blind, "cluster.slurm.node.gpus=8").gpus == 8


def test_a_dry_run_needs_no_slurm_and_a_node_in_the_settings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["submit", "experiment=imagenet64", "cluster=slurm_gpu", "--dry-run"]
    with pytest.raises(ConfigError, match="how many GPUs a node has is not known here"):
        dispatch(words)
    assert dispatch([*words, "cluster.slurm.node={gpus: 8, cpus: 64}"]) == 0
    assert "#SBATCH --gpus-per-node=8\n" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="sinfo is not here"):
        dispatch([word for word in words if word != "--dry-run"])


# -----------------------------------------------------------------------------------------------
# Chains, and dependencies of one's own


def test_a_dependency_of_ones_own_is_added_to_ours():
    own = "cluster.slurm.train.options=['--dependency=afterok:7', --exclusive]"
    text = options(made("experiment=tiny", "cluster=slurm", own), "train")
    assert text["dependency"] == "singleton,afterok:7"
    assert text["script"].count("--dependency=") == 1
    for form in ("-d afterok:7", "-dafterok:7"):
        own = f"cluster.slurm.train.options=['{form}']"
        text = options(made("experiment=tiny", "cluster=slurm", own), "train")
        assert text["dependency"] == "singleton,afterok:7"
    own = "cluster.slurm.train.options=['--dependency=afterok:7?afterok:8']"
    with pytest.raises(ConfigError, match="cannot be joined with the run's own, singleton"):
        options(made("experiment=tiny", "cluster=slurm", own), "train")


def test_jobs_of_a_chain_are_not_queued_again_and_teachers_come_after_teachers():
    found = made("experiment=tiny", "cluster=slurm", chain=3)
    train, teachers = options(found, "train"), options(found, "teachers")
    lines = train["script"].splitlines()
    assert lines.index("#SBATCH --no-requeue") > lines.index("#SBATCH --requeue")
    assert "export BOWSTRING_CHAIN=3" in lines and "BOWSTRING_CHAIN=" not in teachers["script"]
    assert teachers["array"] == "0-5%1"


# -----------------------------------------------------------------------------------------------
# Teachers in several places

MORE = """
defaults: [slurm_gpu, _self_]
slurm:
  teachers: {partition: a100}
  more_teachers:
    spot:
      partition: spot
      account: b
      num_workers: 6
      gpu_option: --gres=gpu:v100:{gpus}
"""


def test_arrays_of_teachers_each_have_their_own_place_and_number(tmp_path):
    (tmp_path / "cluster").mkdir()
    for name, text in (("more", MORE), ("bad", MORE.replace("    spot:", "    s.t:"))):
        (tmp_path / f"cluster/{name}.yaml").write_text(text)
    site = ("--config-dir", str(tmp_path))
    words = ("experiment=cifar10", "cluster=more")
    shapes = [SHAPES[name] for name in ("8 x 80 GB", "4 x A100", "4 x 64 GB")]
    kinds = ("train", "teachers", "teachers.spot")
    found = plan(one(*words, *site), dict(zip(kinds, shapes, strict=True)))
    assert list(found.shares) == [*kinds, "evaluate"]
    first, spot = options(found, "teachers"), options(found, "teachers.spot")
    assert (first["partition"], first["array"], first["gpus-per-node"]) == ("a100", "0-5%3", "4")
    assert (spot["partition"], spot["account"], spot["array"]) == ("spot", "b", "0-3%2")
    assert spot["gres"] == "gpu:v100:3" and of_teachers(spot["script"]) == (3, 4)
    assert spot["output"] == '"/runs/a/slurm/logs/teachers.spot-%A_%a.log"'
    assert first["job-name"] + ".spot" == spot["job-name"]
    five = "cluster.slurm.more_teachers.spot.workers_per_node=5"
    with pytest.raises(ConfigError, match=r"more_teachers.spot.workers_per_node=4 would do"):
        made(*words, five, *site, shape=SHAPES["4 x A100"])
    with pytest.raises(ConfigError, match="a name is a letter"):
        one("experiment=cifar10", "cluster=bad", *site)


def test_time_that_is_too_short_for_a_save_is_said_beforehand(tmp_path, monkeypatch):
    """By the last save where there was one, otherwise by the bytes of one."""
    run = RunDir(tmp_path)
    config = one("experiment=imagenet256_sit", "cluster=slurm", "cluster.slurm.save_s=1")
    weights = network_cost(config.student, config.data.image).parameters
    (words,) = site.grace_words(config, run)
    seconds = 20 * weights * 2.6e-9 / config.cluster.trainer.num_workers
    assert f"one of {20 * weights:,} bytes takes about {seconds:.0f} s" in words
    config = one("experiment=tiny", "cluster=slurm", "cluster.slurm.train.partition=spot")
    monkeypatch.setattr(jobs, "ask_once", lambda *_: "GraceTime=30 PreemptMode=REQUEUE State=UP")
    assert site.grace_words(config, run) == []
    append(run, Save(5, 1000, seconds=90.0))
    assert site.grace_words(config, run) == [
        "partition spot leaves 30 s before it takes a node away, and the last one took 90 s: the "
        "steps since the last save are then taken again (train.save_every)"
    ]
    append(run, Save(10, 1000, seconds=250.0))
    monkeypatch.setattr(jobs, "ask_once", lambda *_: "GraceTime=0 PreemptMode=OFF State=UP")
    (words,) = site.grace_words(config, run)
    assert words.startswith("cluster.slurm.save_s=300 leaves 240 s for a step and its save, and")
    assert words.endswith("set cluster.slurm.save_s=500")
    assert site.grace_words(one("experiment=tiny"), run) == []
