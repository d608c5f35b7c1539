"""The supervisor's loop: what ends a run, and how it stops."""

import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec

import pytest

from cluster.cli import main as cli
from cluster.settings.file import load_config, save_config
from cluster.settings.hydra import compose
from cluster.supervisor import group, runner
from cluster.supervisor.group import RunFailed
from cluster.supervisor.runner import Stopped
from cluster.supervisor.stages import Work
from distill.config import ConfigError
from distill.run.events import Init, append
from distill.run.files import RunDir, read_lines
from distill.run.measured import Metrics, append_metrics


class EndlessPool:
    """A pool that is never done, as under back-pressure."""

    closed = False
    coordinator = None
    notes = ()

    def poll(self):
        return False

    def rest(self, seconds):
        time.sleep(seconds)

    def close(self):
        self.closed = True


def test_a_failed_training_is_seen_while_the_pool_is_busy(session, job, trainings, monkeypatch):
    trainings([0, 0, 0])
    monkeypatch.setattr(runner, "_show", lambda *_: None)
    pool = EndlessPool()
    with pytest.raises(RunFailed):
        runner._work(session, Work(pool, job))
    assert pool.closed


def test_a_lost_daemon_of_ray_ends_the_run_and_nothing_is_asked_of_ray(session, job, monkeypatch):
    monkeypatch.setattr(group.fit, "fit", lambda job, ranks, name: threading.Event().wait())
    monkeypatch.setattr(group, "steps_done", lambda run: 0)
    monkeypatch.setattr(runner, "_show", lambda *_: None)
    pool, session.lost = EndlessPool(), "raylet"
    with pytest.raises(RunFailed, match="Ray's raylet has died"):
        runner._work(session, Work(pool, job))
    assert not pool.closed


def test_a_signal_that_ends_ray_too_stops_the_run(session, job, monkeypatch):
    """The supervisor takes SIGTERM to its process group long before a daemon has died of it."""
    monkeypatch.setattr(group.fit, "fit", lambda job, ranks, name: threading.Event().wait())
    monkeypatch.setattr(group, "steps_done", lambda run: 0)
    append_metrics(session.run, Metrics(7))

    def signalled(*_):
        session.stop_signal = signal.SIGTERM

    monkeypatch.setattr(runner, "_show", signalled)
    threading.Timer(0.3, setattr, (session, "lost", "raylet")).start()
    started = time.monotonic()
    with pytest.raises(Stopped):
        runner._work(session, Work(None, job))
    assert time.monotonic() - started < 60  # not `step_timeout_s`, which a save may take
    assert session.unsaved == "Ray's raylet ended before they had"


def test_a_stop_leaves_a_slurm_job_time_to_end_before_its_limit():
    """Slurm queues only those again that have ended by then."""
    settings = ["experiment=tiny", "cluster.trainer.step_timeout_s=700"]
    (here,), (there,) = compose(settings), compose([*settings, "cluster=slurm"])
    assert here.cluster.stop_grace_s == 700 and there.cluster.slurm.save_s == 300
    assert there.cluster.stop_grace_s == 240
    (quick,) = compose([*settings, "cluster=slurm", "cluster.trainer.step_timeout_s=90"])
    assert quick.cluster.stop_grace_s == 90


def test_a_rank_that_stops_on_a_signal_stops_the_run(session, job, monkeypatch):
    monkeypatch.setattr(group.fit, "fit", lambda job, ranks, name: 3)
    monkeypatch.setattr(group, "steps_done", lambda run: 0)
    monkeypatch.setattr(runner, "_show", lambda *_: None)
    with pytest.raises(Stopped):
        runner._work(session, Work(None, job))


def fails_on_disk(job, ranks, name):
    while not job.stop.exists():
        time.sleep(0.01)
    raise RuntimeError("Traceback\nOSError: [Errno 28] No space left on device. In detail: much")


def leaves_a_final_error(job, ranks, name):
    while not job.stop.exists():
        time.sleep(0.01)
    job.final.write_text('{"kind": "TrainingError", "message": "step 7: the loss is not finite"}')
    raise RuntimeError("Traceback")


def never_ends(job, ranks, name):
    threading.Event().wait()


def stopped_run(session, job, fit, monkeypatch):
    """Exit code of a run that is told to stop in its first round."""
    monkeypatch.setattr(group.fit, "fit", fit)
    monkeypatch.setattr(group, "steps_done", lambda run: 0)
    monkeypatch.setattr(runner, "_show", lambda *_: setattr(session, "stop_signal", signal.SIGTERM))
    monkeypatch.setattr(runner, "open_session", lambda config, run: nullcontext(session))
    monkeypatch.setattr(runner.identity, "check_or_write", lambda config, run: (None, []))
    monkeypatch.setattr(session, "stopping_at_once", nullcontext, raising=False)
    settings = replace(session.config.cluster.trainer, step_timeout_s=2.0)
    cluster = replace(session.config.cluster, trainer=settings)
    session.config = replace(session.config, cluster=cluster)
    try:
        return runner.supervise(session.config, lambda session, view: Work(None, job))
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize(
    ("fit", "why"),
    [
        (fails_on_disk, "OSError: [Errno 28] No space left on device"),
        (never_ends, "they had not after 2 s"),
        (lambda job, ranks, name: 3, ""),  # saved
    ],
)
def test_a_stop_without_a_save_is_not_called_one(fit, why, session, job, monkeypatch):
    """It ends with 75, which a Slurm job takes for "again", as it does 0, and says why."""
    append_metrics(session.run, Metrics(7))
    assert stopped_run(session, job, fit, monkeypatch) == (75 if why else 0)
    said = [line for line in session.bars.lines if "did not save" in line]
    assert said == ([f"the ranks did not save: {why}"] if why else [])
    errors = [e["error"] for e in read_lines(session.run.events) if e["kind"] == "unsaved"]
    assert errors == ([why] if why else [])
    assert not job.stop.exists()


def test_a_stop_loses_nothing_that_a_checkpoint_has(session, job, write_checkpoint, monkeypatch):
    """Ray ended between the save and the ranks' end."""
    append_metrics(session.run, Metrics(7))
    write_checkpoint(session.run, 7)
    assert stopped_run(session, job, fails_on_disk, monkeypatch) == 0


def test_an_error_that_would_only_repeat_is_a_failure_at_a_stop_too(session, job, monkeypatch):
    assert stopped_run(session, job, leaves_a_final_error, monkeypatch) == 1
    assert "error: step 7: the loss is not finite" in session.bars.lines
    assert not job.stop.exists()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)]
)
def test_a_signal_stops_an_evaluation_at_once(number, code, tmp_path, capsys, monkeypatch):
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path / 'run'}"])
    reached = []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.shutdown", lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))

    def evaluation(session, view):
        session.stop_ray()
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        time.sleep(60)
        reached.append("end of the evaluation")

    def next_stage(session, view):
        reached.append("next stage")

    before, started = signal.getsignal(number), time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        runner.supervise(config, evaluation, next_stage)
    assert stopped.value.code == code
    assert time.monotonic() - started < 10 and reached == []
    assert f"stopped; the same command goes on with {config.run.dir}" in capsys.readouterr().err
    assert signal.getsignal(number) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_signal_that_python_dropped_counts_after_the_stage(tmp_path):
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path / 'run'}"])

    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)  # an exception raised here is ignored by Python

    with pytest.raises(SystemExit) as stopped:
        runner.supervise(config, lambda session, view: Finalised() and Work(), pytest.fail)
    assert stopped.value.code == 0


def test_a_signal_ends_a_command_of_several_runs(tmp_path, monkeypatch):
    begun = []

    def train(config):
        begun.append(config.seed)
        return runner.supervise(config, lambda session, view: os.kill(os.getpid(), signal.SIGTERM))

    monkeypatch.setattr(runner, "train", train)
    with pytest.raises(SystemExit) as stopped:
        cli.dispatch(
            ["train", "-m", "experiment=tiny", f"run.dir={tmp_path}/${{seed}}", "seed=0,1"]
        )
    assert (stopped.value.code, begun) == (0, [0])


@pytest.mark.parametrize("teacher", ["the run's own", "another one"])
def test_absent_images_are_named_before_anything_starts(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "cluster.supervisor.session.Session.start_ray", lambda session: pytest.fail()
    )
    overrides = ["experiment=fashion", f"run.dir={tmp_path / 'run'}", f"data.path={tmp_path}"]
    if teacher == "another one":
        overrides.append("teacher.pretrained.path=elsewhere")
    (config,) = compose(overrides)
    with pytest.raises(ConfigError, match="apt-get install dataset-fashion-mnist"):
        runner.run(config)


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
@pytest.mark.parametrize("key", ["train.wandb", "pretrain.train.wandb"])
def test_wandb_without_its_package_is_refused_before_anything_is_made(tmp_path, key):
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path / 'run'}", f"{key}=project"])
    for verb in (runner.run, runner.distil, runner.pretrain, runner.train):
        with pytest.raises(ConfigError, match=r"pip install 'bowstring\[wandb\]'"):
            verb(config)
    assert not (tmp_path / "run").exists()


def test_settings_of_a_refused_evaluation_are_not_kept(tmp_path):
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path / 'run'}"])
    run = RunDir(tmp_path / "run")
    save_config(run, config)
    before = run.config.read_bytes()
    wrong = ["eval.extractor.name=inception", f"eval.extractor.weights={tmp_path / 'FILE'}"]
    for verb in (runner.evaluate, runner.run):
        with pytest.raises(ConfigError, match="FILE is not there; it must be weights-inception"):
            verb(load_config(run, wrong))
        assert run.config.read_bytes() == before


def test_a_full_disk_is_told_in_a_sentence(tmp_path, capsys):
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path / 'run'}"])
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    run.events.symlink_to("/dev/full")
    assert runner.supervise(config, lambda session, view: append(run, Init("fresh"))) == 1
    assert "error: [Errno 28] No space left on device" in capsys.readouterr().err
