"""Every YAML composes into typed settings, and every mistake is one sentence that names its key."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from cluster.settings import file
from cluster.settings.hydra import compose
from cluster.settings.schema import RunConfig
from distill.config import ConfigError
from distill.networks.config import UNetConfig
from distill.objectives.config import BezierConfig, TraFlowConfig

CONFIGS = Path(__file__).parents[3] / "configs"
OPTIONS = [
    (path.parent.name, path.stem)
    for path in sorted(CONFIGS.glob("*/*.yaml"))
    if path.parent.name != "experiment"
]
# Experiments whose teacher is not of their own pre-training.
FOREIGN = {"flux_latents": "diffusers", "imagenet256_sit": "sit", "imagenet64": "native"}
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def one(*args: str) -> RunConfig:
    (config,) = compose(list(args))
    return config


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_hydra_leaves_no_trace(experiment, in_empty_folder):
    config = one(f"experiment={experiment}")
    assert config.run.name == experiment
    assert config.run.dir == f"runs/{experiment}"
    assert isinstance(config.objective, TraFlowConfig)
    assert list(in_empty_folder.iterdir()) == []


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes(group, option):
    assert isinstance(one("experiment=digits", f"{group}={option}"), RunConfig)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_names_its_schema_first(group, option):
    defaults = yaml.safe_load((CONFIGS / group / f"{option}.yaml").read_text()).get("defaults")
    # The root's schema types a dictionary of teachers, and the cluster, where an experiment comes
    # before the option.
    if group not in ("teacher", "cluster"):
        assert str(defaults[0]).startswith("base_")


SITE = """
defaults: [base_cluster, slurm_gpu, _self_]
trainer: {num_workers: 16}
teachers: {lease_timeout_s: 7}
"""


def test_a_site_has_the_last_word_before_the_command_line(in_empty_folder):
    """An experiment's ranks came after a site's, which then were nobody's."""
    site = in_empty_folder / "sites" / "cluster" / "mine.yaml"
    site.parent.mkdir(parents=True)
    site.write_text(SITE)
    words = ("--config-dir", str(site.parents[1]), "experiment=imagenet64", "cluster=mine")
    cluster = one(*words).cluster
    assert (cluster.trainer.num_workers, cluster.teachers.lease_timeout_s) == (16, 7)
    assert cluster.teachers.num_workers == 64 and cluster.trainer.cpus_per_worker == 8
    assert one(*words, "cluster.trainer.num_workers=4").cluster.trainer.num_workers == 4


def test_an_experiment_that_names_a_cluster_is_told_where_that_goes(in_empty_folder):
    file = in_empty_folder / "mine" / "experiment" / "other.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\ndefaults:\n  - override /cluster: one_gpu\n")
    with pytest.raises(ConfigError, match="write what the experiment needs below cluster:"):
        one("--config-dir", str(file.parents[1]), "experiment=other")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_starts_with_its_command(experiment):
    lines = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1] == f"# bowstring run experiment={experiment}"


@pytest.mark.parametrize("experiment", sorted({*EXPERIMENTS} - FOREIGN.keys()))
def test_an_early_and_a_late_teacher_come_from_one_pre_training(experiment):
    config = one(f"experiment={experiment}", "objective=bezier", "teacher=early_late")
    assert isinstance(config.objective, BezierConfig)
    assert config.run.dir == f"runs/{experiment}-bezier"
    assert list(config.teacher) == ["early", "late"]
    (early,) = config.pretrain.export_steps
    last = config.pretrain.train.max_steps
    assert early < last
    models = f"runs/{experiment}-bezier/teacher/models"
    assert config.teacher["early"].path == f"{models}/step_{early:08d}"
    assert config.teacher["late"].path == f"{models}/step_{last:08d}"


def test_every_objective_has_a_run_of_its_own_also_one_that_is_a_setting_of_another():
    """SCoT is TraFlow with other settings; its run must not land in TraFlow's folder."""
    names = [option for group, option in OPTIONS if group == "objective"]
    runs = {name: one("experiment=tiny", f"objective={name}").run.name for name in names}
    assert runs == {name: "tiny" if name == "traflow" else f"tiny-{name}" for name in names}


@pytest.mark.parametrize(("experiment", "teacher"), FOREIGN.items())
def test_a_teacher_from_elsewhere_stays_with_any_objective(experiment, teacher):
    config = one(f"experiment={experiment}", "objective=bezier")
    assert isinstance(config.objective, BezierConfig)
    assert config.run.dir == f"runs/{experiment}-bezier"
    assert list(config.teacher) == [teacher]


def test_a_table_of_weights_survives_the_file_of_the_run(in_empty_folder):
    table = "[1,1,1,1,1,0,0,0,0,0]"
    config = one(
        "experiment=tiny", "objective=bezier", "teacher=two", f"teacher.first.weight={table}"
    )
    file.save_config(config.files, config)
    again = file.load_config(config.files)
    assert again.teacher["first"].weight == [1] * 5 + [0] * 5
    assert again.teacher["second"].weight == 1.0


def test_a_chosen_name_moves_the_run_and_its_own_teacher():
    config = one("experiment=digits", "run.name=other")
    assert config.run.dir == "runs/other"
    last = config.pretrain.train.max_steps
    assert config.teacher["pretrained"].path == f"runs/other/teacher/models/step_{last:08d}"


def test_one_override_scales_the_whole_fashion_run():
    config = one("experiment=fashion", "train.max_steps=10", "student=unet")
    assert config.pretrain.train.max_steps == 20
    assert config.pretrain.export_steps == [5]
    assert isinstance(config.student, UNetConfig)


def test_a_sweep_gives_every_job_its_own_folder(in_empty_folder):
    configs = compose(["--multirun", "experiment=tiny", "seed=0,1", "objective=traflow,endpoint"])
    assert [config.run.dir for config in configs] == [
        "runs/tiny-seed=0",
        "runs/tiny-endpoint-seed=0",
        "runs/tiny-seed=1",
        "runs/tiny-endpoint-seed=1",
    ]
    assert [config.seed for config in configs] == [0, 0, 1, 1]


def test_a_file_of_the_user_is_an_experiment(in_empty_folder):
    (in_empty_folder / "experiment").mkdir()
    (in_empty_folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nrun: {name: mine}\ntrain: {max_steps: 3}\n"
    )
    config = one("--config-dir", str(in_empty_folder), "experiment=mine")
    assert (config.run.name, config.train.max_steps) == ("mine", 3)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], f"experiment=NAME, with NAME one of: {', '.join(EXPERIMENTS)}"),
        (["experiment=nope"], f"experiment/nope.*{', '.join(EXPERIMENTS)}"),
        (
            ["objective=nope", "experiment=tiny"],
            "objective/nope.*options: .*bezier, bezier_guides, ",
        ),
        (["experiment=tiny", "train.max_step=3"], "no setting train.max_step; .*train.max_steps"),
        (["experiment=tiny", "trian.lr=3"], "no setting trian; did you mean train"),
        (["experiment=tiny", "+train.foo=3"], "no setting train.foo; train has: max_steps"),
        (["experiment=tiny", "teacher.pretrained.step=4"], "teacher.pretrained.steps"),
        (["experiment=tiny", "objective.degree=2"], "no setting objective.degree"),
        (["experiment=tiny", "train.max_steps=many"], "train.max_steps: Value 'many'"),
        (["experiment=tiny", "train.lr=-1"], "train.lr=-1.0 must be above 0"),
        (["experiment=tiny", "teacher.pretrained.steps=7"], "teacher.pretrained.steps=7 must be"),
        (
            ["experiment=tiny", "train.batch_size=15"],
            "cannot share train.batch_size=15 evenly; 1 can",
        ),
        (
            ["experiment=tiny", "objective=meanflow", "train.precision=bf16"],
            "train.precision=bf16 is too coarse .* set objective.derivative=jvp",
        ),
        (
            ["experiment=tiny", "objective=bezier_guides", "train.precision=fp16"],
            "train.precision=fp16 is too coarse .* set objective.derivative=jvp",
        ),
        (["experiment=tiny", "train.zero_stage=4"], "train.zero_stage=4 must be 0, 1, 2 or 3"),
        (
            ["experiment=tiny", "train.offload=cpu"],
            "train.offload=cpu is not known; choose one of: none, optimizer, ",
        ),
        (
            ["experiment=tiny", "train.zero_stage=0", "train.offload=optimizer"],
            "train.offload=optimizer does not work with train.zero_stage=0; set "
            "train.zero_stage=1 or 2 or 3, or train.offload=none",
        ),
        (
            ["experiment=tiny", "train.zero_stage=2", "train.offload=optimizer_and_parameters"],
            "train.offload=optimizer_and_parameters does not .*; set train.zero_stage=3, or",
        ),
        (
            ["experiment=tiny", "objective=scot", "objective.derivative=double_backward"],
            "objective.derivative=double_backward, which is no more since bowstring 0.2: .* a new",
        ),
        (
            ["experiment=tiny", "train.compile=true", "train.zero_stage=3"],
            "train.compile=true does not work with train.zero_stage=3, .*; set train.zero_stage=2",
        ),
        (
            [
                "experiment=tiny",
                "objective=bezier_guides",
                "objective.degree=2",
                "trajectory.store_points=[0,8]",
            ],
            "objective.degree=2 of a path needs 1 stored states between the ends, not 0",
        ),
        (
            ["experiment=tiny", "objective=traflow_summed", "trajectory.store_points=[0,4,8]"],
            "2 jumps go through t = .*, and not all of these states are stored",
        ),
        (
            ["experiment=tiny", "objective=traflow_summed", "objective.weight_velocity=-1"],
            "weight_velocity=-1.0 must not be below 0",
        ),
        (
            [
                "experiment=tiny",
                "objective=bezier_guides",
                "objective.weight_map=0",
                "objective.weight_end=0",
            ],
            "all weights of the objective are 0: drift, map, end",
        ),
        (
            ["experiment=tiny", "objective.share_output=0.9"],
            "share_output=0.9 .* are more than 1, the whole batch",
        ),
        (
            [
                "experiment=tiny",
                "objective=bezier",
                "teacher=early_late",
                "teacher.early.weight=[1,0]",
            ],
            "teacher.early.weight=.*1, 0.* must have one number for each of the 10 classes",
        ),
        (
            [
                "experiment=tiny",
                "teacher=student",
                "teacher.student.path=runs/x",
                "teacher.student.solver=jumps",
                "teacher.student.steps=8",
                "trajectory.store_velocity=true",
            ],
            "a student that jumps has no velocity; set trajectory.store_velocity=false",
        ),
        (["experiment=tiny", "foo"], "'foo'"),
    ],
)
def test_a_mistake_is_one_sentence(args, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose(args)
    assert "\n" not in str(caught.value)


def test_a_mistyped_key_in_a_file_fails_at_composition(in_empty_folder):
    (in_empty_folder / "experiment").mkdir()
    (in_empty_folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nrun: {name: mine}\ntrain: {max_stepz: 3}\n"
    )
    with pytest.raises(ConfigError, match="max_stepz"):
        compose(["--config-dir", str(in_empty_folder), "experiment=mine"])


@pytest.mark.parametrize(
    ("overrides", "precision"),
    [
        (["experiment=imagenet256_sit"], "bf16"),
        (["experiment=imagenet256_sit", "teacher.sit.precision=tf32"], "tf32"),
        (["experiment=imagenet256_sit", "cluster.teachers.gpus_per_worker=0"], "fp32"),
        (["experiment=tiny"], "fp32"),
        (["experiment=tiny", "cluster.teachers.gpus_per_worker=0.5"], "bf16"),
    ],
)
def test_teachers_compute_in_bf16_where_they_have_gpus(overrides, precision, tmp_path):
    (config,) = compose([*overrides, f"run.dir={tmp_path / 'run'}"])
    assert {teacher.precision for teacher in config.teacher.values()} == {precision}
    file.save_config(config.files, config)  # and a resume elsewhere does not change what the run is
    found = file.load_config(config.files, ["cluster.teachers.gpus_per_worker=0"])
    assert {teacher.precision for teacher in found.teacher.values()} == {precision}


# -----------------------------------------------------------------------------------------------
# What a shell and Hydra make of a word


@pytest.mark.parametrize(
    "value",
    [
        "ckpt/epoch=999-step=87999.ckpt",
        "/data/50%#x.npz",
        "/data/a(b)",
        "/data/@home{x}",
        "s3://bucket/run?x=1",
        "~/data.npz",
        'a "word"',
        "a, b",
    ],
)
def test_a_word_that_hydra_cannot_read_is_shown_as_it_must_be_written(value):
    with pytest.raises(ConfigError) as caught:
        one("experiment=tiny", f"data.path={value}")
    said = str(caught.value)
    assert said.startswith(f"data.path={value} ")
    (written,) = shlex.split(re.search(r"write ('.*?')(,|$)", said)[1])
    assert one("experiment=tiny", written).data.path == value


@pytest.mark.parametrize(
    ("word", "list_of"),
    [
        (
            "cluster.slurm.train.options=[--mail-user=a@b.c,--x={y}]",
            ["--mail-user=a@b.c", "--x={y}"],
        ),
        ("cluster.slurm.train.options=[--comment=50%]", ["--comment=50%"]),
    ],
)
def test_in_a_list_each_text_is_quoted(word, list_of):
    with pytest.raises(ConfigError) as caught:
        one("experiment=tiny", "cluster=slurm", word)
    (written,) = shlex.split(str(caught.value).split(" write ")[1])
    assert one("experiment=tiny", "cluster=slurm", written).cluster.slurm.train.options == list_of


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.lr", "'train.lr' has no value; write train.lr=VALUE"),
        ("=3", "=3 names no setting"),
        ("cluster.slurm.save_s=3", "cluster.slurm.save_s=3: these settings name no Slurm cluster"),
    ],
)
def test_a_word_that_says_nothing_is_named(word, message):
    with pytest.raises(ConfigError, match=message):
        one("experiment=tiny", word)


BASH = [
    ". ${HOME}/bowstring/.venv/bin/activate",
    "export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}",
    "export NAME=${SLURMD_NODENAME%%.*} ALL=${LIST[@]} N=$((1 + 2)) M=$(hostname)",
    "export NCCL_IB_HCA=mlx5_0:1,mlx5_3:1",
]


def test_braces_in_the_lines_of_a_site_are_for_bash(in_empty_folder):
    """In a site's file, on the command line of a new run and of one that is there, and kept."""
    (in_empty_folder / "cluster").mkdir()
    site = {"defaults": ["slurm", "_self_"], "slurm": {"setup": BASH, "launch": "run ${HOME}/x"}}
    (in_empty_folder / "cluster" / "mine.yaml").write_text(yaml.safe_dump(site))
    words = ("--config-dir", str(in_empty_folder), "experiment=tiny")
    config = one(*words, "cluster=mine")
    assert config.cluster.slurm.setup == BASH and config.cluster.slurm.launch == "run ${HOME}/x"
    quoted = "cluster.slurm.setup=" + str(BASH)
    assert one("experiment=tiny", "cluster=slurm", quoted).cluster.slurm.setup == BASH
    plain = one("experiment=tiny", "cluster=slurm", f"cluster.slurm.setup=[{BASH[0]}]")
    assert plain.cluster.slurm.setup == BASH[:1]
    file.save_config(config.files, config)
    assert file.load_config(config.files).cluster.slurm == config.cluster.slurm
    again = file.load_config(config.files, [quoted])
    assert again.cluster.slurm.setup == BASH
