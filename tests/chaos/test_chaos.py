"""Whatever is killed, and whenever, the run ends with the same data as if nothing had happened.

Each row is a fault; the theorem is `Chaos.check`: `verify` finds nothing missing, nothing twice and
nothing corrupt, the trainer has consumed the planned sequence of (id, pass), and every shard has
the bytes that an undisturbed process gives it, and so has the last checkpoint.
"""

import json
import os
import subprocess
import time

import numpy as np
import pytest

from cluster.inspect.verify import audit
from cluster.plan.stream import stream_plan
from cluster.state.cursor import read_cursor
from distill.checkpoint.manifest import latest_verified
from distill.data.stores.store import committed
from distill.run.measured import last_step

KILL_AT = 12  # steps
BLOCK, AHEAD = 2, 8  # shards
FIT = 16  # shards that fit on disk, of the 120 that are made; the least that is not refused
SAMPLE = 3072  # bytes in the tar: two headers, and the padded contents of two members

# Where a teacher worker is ended, and on which shard: all of them in one run.
WORKER_DIES = {
    "generating": 2,
    "writing": 3,  # a part of the tar is there, under a temporary name
    "named": 4,  # the tar has its name, the sidecar is missing
    "published": 5,  # the sidecar has its name too
    "reporting": 6,  # all is done but the pool does not know
    "no room": 7,  # the tar is larger than the system lets it be; not a death, a failure
}


def cut(path, size):
    """Truncates a file."""
    os.truncate(path, size)


def put(path, at, data):
    """Writes over a part of a file."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def flip(path, at):
    """Changes one bit."""
    put(path, at, bytes([path.read_bytes()[at] ^ 1]))


# What is done to a shard that is committed and not yet read; whether it must be set aside.
DAMAGES = {
    "tar cut at a member boundary": (lambda tar, sidecar: cut(tar, 4 * SAMPLE), True),
    "tar cut in a header": (lambda tar, sidecar: cut(tar, 4 * SAMPLE + 100), True),
    "tar cut in data": (lambda tar, sidecar: cut(tar, 4 * SAMPLE + 1700), True),
    "end of the tar zeroed": (lambda tar, sidecar: put(tar, 8 * SAMPLE, bytes(8 * SAMPLE)), True),
    "bit of the tar flipped": (lambda tar, sidecar: flip(tar, 4 * SAMPLE + 1700), True),
    "bit of the sidecar flipped": (lambda tar, sidecar: flip(sidecar, 40), True),
    "sidecar deleted": (lambda tar, sidecar: sidecar.unlink(), False),
    "tar deleted": (lambda tar, sidecar: tar.unlink(), True),
}


@pytest.mark.timeout(600)  # under a minute on two idle cores
def test_workers_die_at_every_point_then_everything_dies_and_files_are_damaged(chaos, measured):
    """All of it in one run, where read shards must go to make room for new ones as well."""
    case = chaos(f"trajectory.ready_ahead={AHEAD}", "train.max_steps=240")
    case.limit_bytes(FIT * stream_plan(case.config).shard_bytes)
    for point, shard in WORKER_DIES.items():
        case.doom(shard, point)
    case.start()
    case.until_step(KILL_AT)
    (rank,) = case.processes("RayTrainWorker")
    rank.suspend()
    first = (read_cursor(case.run).block + 1) * BLOCK  # nobody has read it, or what comes after it
    case.until(lambda: first + AHEAD - 1 in committed(case.run))
    case.kill_all()
    killed = time.time()
    for shard, (damage, _) in enumerate(DAMAGES.values(), first):
        damage(case.run.tar(shard), case.run.sidecar(shard))

    case.start()
    case.finish()
    case.check()
    assert {int(path.name) for path in case.struck()} == set(WORKER_DIES.values())
    aside = {int(path.name[:8]) for path in case.run.quarantine.iterdir()}
    must = (must for _, must in DAMAGES.values())
    assert aside == {shard for shard, is_bad in enumerate(must, first) if is_bad}
    assert len(committed(case.run)) <= FIT
    kept = {path.name for path in case.run.logs.glob("*/*/*.txt")}  # also of those that were killed
    joined = {event["worker"].partition(":")[2] for event in case.events("worker_join")}
    assert {"rank-00000.txt", *(f"worker-{pid}.txt" for pid in joined)} <= kept

    resumed = [event["step"] for event in case.events("resume")]
    assert resumed[0] == 0 and len(resumed) == 2 and KILL_AT - 10 <= resumed[1] < 240
    for point, shard in WORKER_DIES.items():
        measured(f"worker, {point}: made good after {case.recovery_s(shard, killed):.1f} s")
    measured(f"everything: the next step after {case.next_event_s(killed, 'steps'):.1f} s")
    faults = len(WORKER_DIES) + len(DAMAGES)
    workers = case.config.cluster.teachers.num_workers  # each may have been at work at the end
    measured(case.check_waste(shards=faults + workers))


# -----------------------------------------------------------------------------------------------
# Processes


def kill_trainer(case):
    """A rank of the trainer: the supervisor starts the group again."""
    (rank,) = case.processes("RayTrainWorker")
    rank.kill()


def kill_workers(case):
    """Both teacher workers at once."""
    for worker in case.processes("ray::DoomedWorker"):
        worker.kill()


def kill_supervisor(case):
    """The process that holds the ledger, the run's lock, and Ray's daemons as its children."""
    case.supervisor.kill()


def kill_raylet(case):
    """Ray's daemon of this machine, the parent of all its workers."""
    (raylet,) = case.processes("/raylet/raylet ")
    raylet.kill()


def kill_gcs(case):
    """Ray's book-keeper."""
    (server,) = case.processes("gcs_server ")
    server.kill()


LONG = ["train.max_steps=400", "train.save_every=20"]  # ranks outlive their raylet by seconds
# What is struck, whether the run goes on by itself or by the same command, and its settings.
STRIKES = {
    "nothing": (lambda case: None, True, []),
    "trainer": (kill_trainer, True, []),
    "teacher workers": (kill_workers, True, []),
    "supervisor": (kill_supervisor, False, []),
    "raylet": (kill_raylet, False, LONG),
    "GCS": (kill_gcs, False, LONG),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", STRIKES)
def test_a_process_dies_and_the_run_or_the_same_command_goes_on(name, chaos, measured):
    strike, goes_on, settings = STRIKES[name]
    case = chaos(*settings)
    case.start()
    case.until_step(KILL_AT)
    strike(case)
    struck = time.time()
    code = case.supervisor.wait(timeout=300)
    ended = time.time()
    assert (code == 0) == goes_on, case.log
    if name in ("raylet", "GCS"):
        (ray,) = case.run.logs.glob("*/*/ray")
        assert f"Ray's own words are in {ray}" in case.log and (ray / "raylet.out").exists()
    if not goes_on:
        case.start()  # at once: nothing that is left of the first start is in the way
        case.finish()
    case.check()
    since = struck if goes_on else ended
    measured(
        f"exit code {code} {ended - struck:.1f} s after it; "
        f"next shard after {case.next_event_s(since, 'commit'):.1f} s, "
        f"next training after {case.next_event_s(since, 'resume'):.1f} s, "
        f"{case.check_waste(shards=2)}"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_single_rank_that_is_frozen_whole_is_given_up_and_the_run_goes_on(chaos, measured):
    """Nothing in it can notice that, and no other rank waits for it."""
    case = chaos("cluster.trainer.step_timeout_s=60")
    case.start()
    case.until_step(KILL_AT)
    (rank,) = case.processes("RayTrainWorker")
    rank.suspend()
    frozen = time.time()
    case.until(lambda: case.events("restart"))
    case.finish()
    assert not rank.is_running()
    (restart,) = case.events("restart")
    assert restart["error"].startswith("a rank answered nothing for more than 60 s")
    case.check()
    measured(
        f"given up after {case.next_event_s(frozen, 'restart'):.1f} s, "
        f"next training after {case.next_event_s(frozen, 'resume'):.1f} s"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_start_beside_a_live_one_is_refused_and_disturbs_nothing(chaos, measured):
    """The lock of one that died is free: the row "supervisor" starts again at once."""
    case = chaos()
    case.start()
    case.until_step(KILL_AT)
    (rank,) = case.processes("RayTrainWorker")
    rank.suspend()  # so that the first is there all the time
    second = subprocess.run(case.command(), capture_output=True, text=True, env=case.env)
    assert second.returncode == 2 and "is being worked on by another process" in second.stderr
    assert str(case.supervisor.pid) in second.stderr
    rank.resume()
    case.finish()
    case.check()
    measured(case.check_waste(shards=0))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_stopped_from_another_shell_has_saved_its_last_step(chaos):
    case = chaos()
    case.start()
    case.until_step(KILL_AT)
    (rank,) = case.processes("RayTrainWorker")
    rank.suspend()  # so that the run is there when it is asked
    asked = subprocess.run(case.command("stop"), capture_output=True, text=True, env=case.env)
    rank.resume()
    assert asked.stdout == f"process {case.supervisor.pid}: saves, then ends\n", asked.stderr
    case.finish()  # exit code 0
    done = last_step(case.run.metrics)
    assert KILL_AT <= done < case.config.train.max_steps
    assert latest_verified(case.run.checkpoints)[0] == done
    case.start()
    case.finish()
    assert [event["step"] for event in case.events("resume")] == [0, done]
    case.check()


# -----------------------------------------------------------------------------------------------
# Disk


@pytest.fixture
def small_disk(tmp_path):
    """The folder of the run, on a file system of its own of 24 MB."""
    folder = tmp_path / "run"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here; 'no room' above limits the size of a file")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_disk_ends_the_run_and_the_same_command_goes_on_once_there_is_room(
    small_disk, chaos, measured
):
    case = chaos()
    case.start()
    case.until_step(KILL_AT)
    filled, ballast = time.time(), small_disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        while case.supervisor.poll() is None:  # what a deleted checkpoint frees is taken too
            assert time.time() < filled + 300, case.log
            try:
                file.write(bytes(65536))
            except OSError:
                time.sleep(0.01)
    ended_s = time.time() - filled
    assert case.supervisor.wait() == 1
    assert "error: " in case.log and "No space left on device" in case.log
    assert "Traceback" not in case.log
    ballast.unlink()
    restarted = time.time()
    case.start()
    case.finish()
    case.check()
    measured(
        f"exit code 1 after {ended_s:.1f} s, "
        f"next training {case.next_event_s(restarted, 'resume'):.1f} s after the restart, "
        f"{case.check_waste(shards=2)}"
    )


# -----------------------------------------------------------------------------------------------
# Workers that are not alike


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_workers_with_more_and_less_memory_make_the_same_samples(tmp_path, chaos, measured):
    """A velocity of a whole batch takes several arrays of 67 MB; one worker has 100 MB for them."""
    samples, components = 64, 4096
    draw = np.random.Generator(np.random.Philox(key=[1, 2]))
    means = draw.standard_normal((components, 64)).round(3).tolist()
    mixture = {"shape": [1, 8, 8], "means": means, "stds": [0.3] * components}
    (tmp_path / "large.json").write_text(json.dumps(mixture))
    case = chaos(
        f"teacher.mixture.path={tmp_path / 'large.json'}",
        f"trajectory.samples_per_shard={samples}",
        f"trajectory.batch_size={samples}",
        "trajectory.dtype=float32",
        "train.max_steps=64",
    )
    case.doom(0, "little memory")
    case.start("generate")
    case.finish()
    assert len(case.struck()) == 1
    report = audit(case.run)
    assert report["ok"] and report["shards"] == len(case.all_shards()) == 8
    limited = case.read(case.run, 0)[0].producer
    told = [event for event in case.events("commit") if "batch_size" in event]
    assert {event["worker"] for event in told} == {limited} and told[0]["shard"] == 0
    said = {event["shard"]: event["batch_size"] for event in told}
    assert list(said.values()) == sorted(set(said.values()), reverse=True)  # less each time
    batches, limited_batch = set(), samples
    for shard in case.all_shards():  # a worker's shards rise
        ours, theirs = (case.read(run, shard) for run in (case.run, case.alone))
        limited_batch = said.get(shard, limited_batch)
        batch = limited_batch if ours[0].producer == limited else samples
        batches.add(batch)
        assert ours[0].batch_size == batch and theirs[0].batch_size == samples
        assert (ours[0].ids, ours[0].labels) == (theirs[0].ids, theirs[0].labels)
        assert (ours[0].nfe, ours[0].forwards) == (theirs[0].nfe, theirs[0].forwards)
        assert (ours[1][:, :, 0] == theirs[1][:, :, 0]).all()  # the noise
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-4)
        if batch == samples:
            assert ours[0].sha256 == theirs[0].sha256
    assert samples in batches and min(batches) < samples
    measured(f"batches of {sorted(batches)} samples")
