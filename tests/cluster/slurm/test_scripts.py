"""Batch scripts: shellcheck, what rendering adds, and what needs no Slurm."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.parameter import RayParams

from cluster.cli.main import dispatch
from cluster.plan.nodes import Shape
from cluster.settings.hydra import compose
from cluster.slurm.scripts import plan, render, set_up
from distill.config import ConfigError

FIELDS = {"dashboard-agent-grpc": "metrics_agent_port"}  # names of `ray start` and of its settings
SHELLCHECK = Path(sys.executable).with_name("shellcheck")
SCRIPTS = Path(__file__).parents[3] / "slurm"
UNKNOWN = Shape()
KINDS = ("train", "teachers", "evaluate")
SITE = [
    "cluster=slurm_gpu",
    "cluster.trainer.num_workers=8",
    "cluster.slurm.train.nodes=2",
    "cluster.slurm.train.memory=60G",
    "cluster.slurm.teachers.partition=spot",
    "cluster.slurm.teachers.workers_per_node=2",
    "cluster.teachers.num_workers=4",
    "cluster.teachers.max_workers=32",
    "cluster.slurm.teachers.options=['--comment=\"two words\"']",
    "cluster.slurm.gpu_option='--gres=gpu:a100:{gpus}'",
    "cluster.slurm.launch='apptainer exec --nv image.sif'",
    "cluster.slurm.setup=['module load cuda']",
]


def scripts(*settings, root="/runs/a b", shape=UNKNOWN, chain=1):
    (config,) = compose(["experiment=tiny", "train.batch_size=16", *settings])
    return render(plan(config, dict.fromkeys(KINDS, shape), chain), Path(root))


def options(script):
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH " in line]


def test_scripts_are_clean_as_installed_and_as_rendered(tmp_path):
    files = [SCRIPTS / f"{kind}.sbatch" for kind in KINDS]
    for kind, text in scripts(*SITE).items():
        files.append(tmp_path / f"{kind}.sbatch")
        files[-1].write_text(text)
    files += (SCRIPTS.parent / "tests/slurm").glob("*.sh")
    done = subprocess.run([SHELLCHECK, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_site_is_in_the_settings_and_each_job_asks_for_its_own():
    made = scripts(*SITE)
    train, teachers, evaluate = (options(made[kind]) for kind in KINDS)
    assert {"--nodes=2", "--gres=gpu:a100:4", "--cpus-per-task=33", "--mem=60G"} <= set(train)
    assert {"--partition=spot", "--gres=gpu:a100:2", "--array=0-15%2"} <= set(teachers)
    assert '--comment="two words"' in teachers
    assert {"--gres=gpu:a100:1", "--cpus-per-task=8"} <= set(evaluate)
    assert not any("partition" in option for option in train + evaluate)
    for kind, text in made.items():
        assert "export BOWSTRING_LAUNCH='apptainer exec --nv image.sif'\n" in text
        setup, body = text.index("\nmodule load cuda\n"), text.index("\nset -u\n")
        assert text.index("export BOWSTRING_LAUNCH") < setup < body or kind == "evaluate"
    assert "export BOWSTRING_RANKS=4\n" in made["train"]
    assert "export BOWSTRING_WORKERS=2\n" in made["teachers"]


@pytest.mark.parametrize(("ranks", "nodes"), [("[2,8]", "1-2"), ("[5,8]", "2"), ("8", "2")])
def test_a_trainer_of_fewer_ranks_asks_for_fewer_nodes(ranks, nodes):
    """Four ranks on each of two nodes."""
    train = scripts(*SITE, f"cluster.trainer.num_workers={ranks}")["train"]
    assert f"--nodes={nodes}" in options(train)
    assert "export BOWSTRING_RANKS=4\n" in train and "--cpus-per-task=33" in options(train)


@pytest.mark.parametrize("kind", ["train", "teachers"])
def test_no_job_number_makes_two_parts_of_ray_share_a_port(kind):
    """`ray start` checks the ports of a node that it will not open there too (RayParams)."""
    text = (SCRIPTS / f"{kind}.sbatch").read_text()
    text = text[text.index("options=(" if kind == "train" else "start_ray()") :]
    named = re.findall(
        r"--([a-z-]+)-port=\$\(\(port \+ (\d+)\)\)", text[: text.index("max-worker")]
    )
    ports = {FIELDS.get(name, name.replace("-", "_") + "_port"): int(n) for name, n in named}
    assert {"node_manager_port", "min_worker_port"} <= ports.keys()
    for block in range(10000, 10000 + 110 * 200, 200):
        mine = {name: block + n for name, n in ports.items()} | {"max_worker_port": block + 199}
        default = {"ray_client_server_port": 10001}  # of `ray start`
        RayParams(**default | mine).update_pre_selected_port()


def test_without_settings_a_script_is_as_installed_but_for_names_and_cores():
    for kind, text in scripts("cluster=slurm").items():
        installed = (SCRIPTS / f"{kind}.sbatch").read_text().splitlines()
        added = [line for line in text.splitlines() if line not in installed]
        assert all(line.startswith(("#SBATCH --", "export BOWSTRING_")) for line in added)
        assert '#SBATCH --output="/runs/a b/slurm/logs/' in text
        assert "partition" not in "".join(added) and "account" not in "".join(added)


def test_runs_of_one_name_in_two_folders_do_not_wait_for_each_other():
    here, there = (options(scripts("cluster=slurm", root=root)["train"]) for root in ("/a", "/b"))
    assert {o for o in here if "job-name" in o} != {o for o in there if "job-name" in o}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster.slurm.train.nodes=3", "must be a multiple of"),
        ("cluster.slurm.teachers={nodes: 2, max_nodes: 1}", "is less than"),
        ("cluster.slurm.scratch=/a/very/long/folder/name", "at most 20 characters"),
        ("cluster.slurm.train.options=[exclusive]", "is no option of sbatch"),
        ("cluster.slurm.gpu_option='--gpus={gpus}\nid'", "is no option of sbatch"),
        ("cluster.slurm.teachers.partition='spot --uid=0'", "must be one word"),
        ("cluster.slurm.train.account='a\nid'", "must be one word"),
        ("cluster.slurm.train.memory='1G\"'", "must be one word"),
        ("cluster.slurm.train.time=7200", "is no time such as"),
        ("+cluster.slurm.train.tme=1", "did you mean cluster.slurm.train.time"),
    ],
)
def test_a_setting_that_cannot_work_is_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        scripts("cluster=slurm", setting)


@pytest.mark.parametrize("name", ['a"b', "a\nid", "a\\b", "%j"])
def test_a_folder_that_sbatch_would_read_otherwise_is_refused(name):
    with pytest.raises(ConfigError, match="cannot stand in a batch script"):
        scripts("cluster=slurm", root=f"/runs/{name}")


def test_what_a_setting_says_is_not_run_by_the_shell():
    words = "apptainer exec --env A='$(id)' `id`; id"
    (config,) = compose(["experiment=tiny", "cluster=slurm"])
    config.cluster.slurm.launch = words
    for text in render(plan(config, {}), Path("/runs/a")).values():
        (line,) = [line for line in text.splitlines() if "BOWSTRING_LAUNCH=" in line]
        shown = subprocess.run(
            ["bash", "-c", f"{line}\nprintenv BOWSTRING_LAUNCH"], capture_output=True
        )
        assert shown.stdout.decode() == words + "\n"


def test_a_dry_run_prints_all_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert dispatch(["submit", "experiment=tiny", "cluster=slurm", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{tmp_path}/runs/tiny/slurm/{kind}.sbatch" in printed for kind in KINDS)
    assert list(tmp_path.iterdir()) == []


# -----------------------------------------------------------------------------------------------
# Functions of the scripts, with stand-ins for what they ask


def functions(kind: str, *names: str) -> str:
    """Some functions of a script."""
    text = (SCRIPTS / f"{kind}.sbatch").read_text()
    return "".join(
        re.search(rf"^{name}\(\) {{.*?^}}\n", text, re.MULTILINE | re.DOTALL)[0] for name in names
    )


def bash(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", text], capture_output=True, text=True, cwd=folder)


ASKS = """
state=$PWD id=7.0 SLURM_JOB_ID=7 SLURM_RESTART_COUNT=0
say() {{ echo "said: $*"; }}
nap() {{ echo . >>naps; }}
timeout() {{ shift; "$@"; }}
squeue() {{
  n=$(cat calls 2>/dev/null || echo 0); echo $((n + 1)) >calls
  {answers}
}}
{functions}
if is_running; then echo yes; else echo no; fi
"""
AWAY = 'echo "slurm_load_jobs error: Unable to contact slurm controller" >&2; return 1'


@pytest.mark.parametrize(
    ("answers", "found", "naps"),
    [
        ("echo RUNNING 0", "yes", 0),
        ("echo COMPLETING 0", "no", 0),
        ("echo RUNNING 1", "no", 0),  # it runs elsewhere, started once more
        ("echo; echo 'Welcome to the machine'; echo 'RUNNING   0'; echo bye", "yes", 0),
        (f"if ((n < 5)); then {AWAY}; fi; echo RUNNING 0", "yes", 5),
        (f"if ((n < 5)); then {AWAY}; fi; echo COMPLETING 0", "no", 5),
        (AWAY, "yes", 40),  # what nobody knows is not "no"
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; return 1", "yes", 0),
    ],
)
def test_a_job_asks_again_whether_it_is_running(tmp_path, answers, found, naps):
    """A controller that was away for 25 s at the time limit made a saved run FAILED."""
    asked = functions("train", "patiently", "is_running")
    done = bash(ASKS.format(answers=answers, functions=asked), tmp_path)
    assert done.stdout.splitlines()[-1] == found
    there = tmp_path / "naps"
    assert (len(there.read_text().split()) if there.exists() else 0) == naps
    assert not list(tmp_path.glob(".asked*"))


ADDRESS = """
hostname() {{ if [ "${{1:-}}" = -I ]; then echo "{words}"; else echo node1; fi; }}
getent() {{ {named}; }}
ip() {{ {devices}; }}
{functions}
address
"""


@pytest.mark.parametrize("kind", ["train", "teachers"])
@pytest.mark.parametrize(
    ("named", "words", "devices", "found"),
    [
        ("echo 10.1.0.4", "172.17.0.1 10.1.0.4", "true", "10.1.0.4"),
        ("echo 127.0.1.1", "172.17.0.1 10.77.1.1", "true", "10.77.1.1"),
        ("echo 127.0.1.1", "2001:db8::7 fe80::1", "true", "2001:db8::7"),
        ("true", "169.254.3.1 192.168.122.1 10.0.0.9", "true", "10.0.0.9"),
        (
            "true",
            "10.88.0.1 10.0.0.9",
            "echo '3: cni-podman0 inet 10.88.0.1/16 brd'; echo '2: eth0 inet 10.0.0.9/8 brd'",
            "10.0.0.9",
        ),
        ("true", "172.17.0.1", "true", ""),
    ],
)
def test_a_node_is_known_by_an_address_that_others_reach(
    tmp_path, kind, named, words, devices, found
):
    text = ADDRESS.format(
        words=words, named=named, devices=devices, functions=functions(kind, "address")
    )
    assert bash(text, tmp_path).stdout.strip() == found


@pytest.mark.parametrize("kind", ["train", "teachers"])
@pytest.mark.parametrize(
    ("interface", "asked"), [("ib0", "dev ib0"), ("10.1.0.0/16", "to 10.1.0.0/16")]
)
def test_a_site_names_the_network_of_its_nodes(tmp_path, kind, interface, asked):
    devices = (
        f"[ \"$*\" = '-o addr show {asked}' ] && echo '3: ib0 inet6 fe80::1/64' && "
        "echo '3: ib0 inet6 2001:db8::7/64'"
    )
    text = ADDRESS.format(
        words="10.9.9.9",
        named="echo 10.8.8.8",
        devices=devices,
        functions=functions(kind, "address"),
    )
    found = bash(f"BOWSTRING_INTERFACE={interface}\n{text}", tmp_path)
    assert found.stdout.strip() == "2001:db8::7"


@pytest.mark.parametrize("kind", KINDS)
def test_variables_of_a_node_stand_in_its_words_and_nothing_else_is_run(tmp_path, kind):
    """Quotes keep a word together; a variable that is not set ends the job with its name."""
    text = (SCRIPTS / f"{kind}.sbatch").read_text()
    lines = text[text.index("export USER=") : text.index("here=(")]
    head = 'set -u\nfail() { echo "failed: $*"; exit 1; }\n' + functions(kind, "expand")
    show = 'printf \'<%s>\' "${launch[@]}" -- "${box[@]}"'
    launch = "apptainer exec --nv --bind '/my data:/d' $WHERE/x.sif ${WHERE}y $(id)"
    given = (
        f"WHERE=/w BOWSTRING_LAUNCH={shlex.quote(launch)} BOWSTRING_CONTAINER='--a=$WHERE --b'\n"
    )
    words = ["apptainer", "exec", "--nv", "--bind", "/my data:/d", "/w/x.sif", "/wy", "$(id)"]
    shown = "".join(f"<{word}>" for word in [*words, "--", "--a=/w", "--b"])
    assert bash(given + head + lines + show, tmp_path).stdout == shown
    assert bash(head + lines + show, tmp_path).stdout == "<-->"
    done = bash(f"BOWSTRING_LAUNCH='run $NOT_SET'\n{head}{lines}", tmp_path)
    assert done.returncode == 1 and "NOT_SET is not set on" in done.stderr
    assert done.stdout == "failed: cluster.slurm.launch: run $NOT_SET\n"


@pytest.mark.parametrize(
    ("lines", "said", "code"),
    [
        (["module load cuda/99", "echo on"], "setup failed: module load cuda/99", 1),
        (["export A=1 && . ./activate", "echo on"], "on", 0),
        (["printenv NOT_THERE >/dev/null && export A=1", "echo on"], "on", 0),
        (["if true; then", "  false || true", "fi", "f() { false; true; }; f", "echo on"], "on", 0),
        ([". ./missing", "echo on"], "setup failed: . ./missing", 1),
        ([], "", 0),
    ],
)
def test_a_line_of_the_site_that_fails_ends_the_job_with_its_text(tmp_path, lines, said, code):
    (tmp_path / "activate").write_text("false\ntrue\n")
    script = tmp_path / "job"
    script.write_text("\n".join([*set_up(lines), '[ -z "$(trap -p ERR)" ]']))
    done = subprocess.run(["bash", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code and done.stdout.strip().endswith(said)


def test_a_container_is_a_step_of_srun_that_sees_the_run():
    made = scripts(
        "cluster=slurm",
        "cluster.slurm.container.image=/images/bow.sqsh",
        "cluster.slurm.container.mounts=[/data:/data]",
        "cluster.slurm.scratch=$SLURM_TMPDIR",
        root="/runs/a",
    )
    words = (
        "--container-image=/images/bow.sqsh --container-mounts=/runs/a:/runs/a,"
        "$SLURM_TMPDIR:$SLURM_TMPDIR,/data:/data"
    )
    for text in made.values():
        assert f"export BOWSTRING_CONTAINER='{words}'\n" in text


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("cluster.slurm.launch='run $(id)'", r"launch: '\$\(id\)' is not expanded there"),
        ("cluster.slurm.launch='run `id`'", "launch: '`id`' is not expanded there"),
        ("cluster.slurm.scratch='${A:-/tmp}'", "is not expanded there; \\$NAME"),
        ("cluster.slurm.container.image='a b'", "must be one word"),
        ("cluster.slurm.container.mounts=[/a:/a]", "need cluster.slurm.container.image"),
        ("cluster.slurm.interface='eth0; id'", "is no name of an interface"),
    ],
)
def test_words_that_a_job_cannot_take_are_refused_before_it_starts(setting, message):
    with pytest.raises(ConfigError, match=message):
        scripts("cluster=slurm", setting)
