"""The pool against a Ray of one process: workers that die, hang, fail or hold other weights."""

import dataclasses
import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    NodeDiedError,
    OutOfMemoryError,
    OwnerDiedError,
    RayTaskError,
)

from cluster.inspect.status import quarantined, restarts, status
from cluster.pool import pool as pool_module
from cluster.pool.member import Member
from cluster.pool.messages import (
    Asked,
    Excluded,
    Expired,
    Joined,
    Leased,
    Place,
    Quarantined,
    Released,
    Superseded,
)
from cluster.pool.pool import PoolError, TeacherPool
from cluster.pool.preflight import Introduction, UnfitPlace
from cluster.settings.file import save_config
from cluster.settings.hydra import compose
from cluster.state import done
from cluster.state.cursor import Position, write_cursor
from cluster.state.done import view_of
from cluster.state.workers import read_target, sick_nodes, write_target
from distill.config import ConfigError
from distill.data.sidecar import shard_spec
from distill.run import files
from distill.run.events import read_history
from distill.run.files import RunDir, read_lines, write_json
from distill.testing import tiny_spec, write_tiny_record, write_tiny_shards


@dataclass(eq=False)
class Task:
    """A call of an actor: its value, its error, or "never"."""

    value: object


class Method:
    def __init__(self, call):
        self.remote = lambda *args: Task(call(*args))


class Actor:
    """A worker that answers at once. `behaviour(shard)` is its answer to a shard."""

    def __init__(self, ray):
        ray.actors.append(self)
        name, self.made = f"w{len(ray.actors)}", 0
        self.introduce = Method(lambda _: ray.introduce(name) if ray.has_node else "never")
        self.load = Method(lambda: ray.load(name))
        self.produce = Method(lambda shard: ray.behaviour(name, shard))
        self.dropped = []
        self.drop = Method(self.dropped.append)
        self.progress = Method(lambda: (name, 0) if ray.has_node else "never")


class OneProcessRay:
    """The few functions of ray that the pool uses."""

    def __init__(self):
        self.actors, self.killed = [], []
        self.fingerprints = {"only": "f" * 64}
        self.place = lambda name: ("here", "")  # node and GPU
        self.load = lambda name: {
            "worker": name,
            "fingerprints": dict(self.fingerprints),
            "trials": {},
        }
        self.has_node = True
        self.behaviour = lambda name, shard: {"bytes": 100, "seconds": 0.0}

    def introduce(self, name):
        return Introduction(name, *self.place(name), "cpu", "birth")

    def remote(self, cls):
        return self

    def options(self, **_):
        actor_class = type("ActorClass", (), {})()
        actor_class.remote = lambda *args: Actor(self)
        return actor_class

    def wait(self, tasks, num_returns=1, timeout=0):
        ready = [task for task in tasks if task.value != "never"]
        return ready, [task for task in tasks if task not in ready]

    def get(self, task):
        if isinstance(task.value, Exception):
            raise task.value
        return task.value

    def kill(self, actor):
        self.killed.append(actor)


@pytest.fixture
def ray(monkeypatch):
    fake = OneProcessRay()
    monkeypatch.setattr(pool_module, "ray", fake)
    monkeypatch.setattr(pool_module, "SCAN_PERIOD_S", 1e9)  # no shard is really written here
    return fake


def make_config(folder, address="", max_steps=6, **teachers):
    (config,) = compose(
        [
            "experiment=tiny",
            f"run.dir={folder}",
            "~teacher",
            "+teacher={only: {kind: analytic, path: ring8, steps: 8}}",
            f"cluster.address={address}",
            f"train.max_steps={max_steps}",
            *(f"cluster.teachers.{key}={value}" for key, value in teachers.items()),
        ]
    )
    return config


def make_pool(folder, trainer_reads=False, **settings):
    config = make_config(folder, **settings)
    spec = shard_spec(
        config.seed, config.data.image, config.trajectory, config.teacher, {"only": "f" * 64}
    )
    if not config.files.identity.exists():
        write_tiny_record(config.files, {})
    return TeacherPool(view_of(config), spec, trainer_reads)


def finish(pool, rounds=60):
    for _ in range(rounds):
        pool.poll()
    return [event["kind"] for event in read_lines(pool.run.events)]


def test_every_shard_is_leased_and_committed_once(ray, tmp_path):
    pool = make_pool(tmp_path)
    kinds = finish(pool)
    assert pool.is_done
    assert kinds.count("lease") == kinds.count("commit") == pool.plan.shards
    assert kinds.count("worker_join") == kinds.count("worker_leave") == len(ray.killed) == 2


def test_shards_are_leased_as_soon_as_the_trainer_moves_on(ray, tmp_path):
    """Between two scans of the directory, which never come here."""
    pool = make_pool(tmp_path, trainer_reads=True, max_steps=40)
    for block in range(4):
        write_json(pool.run.cursor, {"block": block, "waiting_for": ""})
        finish(pool)
        assert len(pool.coordinator.committed) == 2 * (block + 1) + 4  # two a block, four ahead


@pytest.mark.parametrize(
    "death",
    [
        ActorDiedError(),
        ActorUnschedulableError("no node has a place"),
        NodeDiedError("its node was taken"),
        OutOfMemoryError("the node ran low on memory"),
        OwnerDiedError("00", "00", "its result is lost"),
    ],
    ids=lambda death: type(death).__name__,
)
def test_a_worker_that_dies_is_replaced_and_its_shard_made_again(ray, tmp_path, death):
    deaths = []

    def behaviour(name, shard):
        if shard == 1 and not deaths:
            deaths.append(name)
            return death
        return {"bytes": 100, "seconds": 0.0}

    ray.behaviour = behaviour
    pool = make_pool(tmp_path)
    kinds = finish(pool)
    assert pool.is_done and len(deaths) == 1
    assert len(ray.actors) == 3
    assert kinds.count("lease") == pool.plan.shards + 1


@pytest.mark.parametrize(("error", "is_said"), [(2e-3, True), (2e-6, False)])
def test_a_grid_that_is_too_coarse_for_the_curve_is_said_once(ray, tmp_path, error, is_said):
    facts = {"bytes": 100, "seconds": 0.0}
    ray.behaviour = lambda name, shard: facts | ({} if shard else {"curve_error": error})
    pool = make_pool(tmp_path)
    finish(pool)
    assert len(pool.notes) == is_said
    for words in ("trajectory.grid=8 is coarse", "about 0.002 ", "raise trajectory.grid"):
        assert not is_said or words in pool.notes[0]
    (first,) = (e for e in read_lines(pool.run.events) if e["kind"] == "commit" and not e["shard"])
    assert first["curve_error"] == error


def test_workers_that_keep_dying_stop_the_pool(ray, tmp_path):
    ray.behaviour = lambda name, shard: ActorDiedError()
    with pytest.raises(PoolError, match="6 failures, the last: a teacher worker died: The actor"):
        finish(make_pool(tmp_path))


def test_a_shard_that_keeps_failing_is_quarantined_and_stops_the_pool(ray, tmp_path):
    disk_full = OSError("No space left on device")
    failed = []

    def behaviour(name, shard):
        if shard != 1:
            return {"bytes": 100, "seconds": 0.0}
        failed.append(name)
        return RayTaskError("produce", "the traceback", disk_full)

    ray.behaviour = behaviour
    pool = make_pool(tmp_path)
    with pytest.raises(PoolError, match=r"shard 1 was given up after 3 failures(.|\n)*traceback"):
        finish(pool)
    assert len(set(failed)) == len(failed) == 3  # every attempt is on another worker
    (path,) = pool.run.quarantine.glob("00000001-*/00000001.reason.json")
    note = json.loads(path.read_text())
    assert (note["shard"], note["reason"]) == (1, "could not be made: 3 failures")
    assert "the traceback" in note["traceback"]
    assert quarantined(pool.run) == [{"shard": 1, "reason": note["reason"]}]


def test_a_worker_that_failed_is_replaced_and_counted(ray, tmp_path):
    failed = []

    def behaviour(name, shard):
        if shard == 2 and not failed:
            failed.append(name)
            return RayTaskError("produce", "the traceback", RuntimeError("out of memory"))
        return {"bytes": 100, "seconds": 0.0}

    ray.behaviour = behaviour
    pool = make_pool(tmp_path)
    kinds = finish(pool)
    assert pool.is_done and len(ray.actors) == 3 and kinds.count("fail") == 1
    assert restarts(read_history(pool.run))["teacher_workers"] == 1
    left = [e for e in read_lines(pool.run.events) if e["kind"] == "worker_leave"]
    assert [e["reason"] for e in left if e["worker"] == failed[0]] == ["failed on shard 2"]


def test_a_wrong_setting_found_by_a_worker_is_told_as_such(ray, tmp_path):
    wrong = ConfigError("teacher.guidance=1.5 needs a teacher with classes")
    ray.behaviour = lambda name, shard: RayTaskError("produce", "the traceback", wrong)
    with pytest.raises(ConfigError, match=r"teacher\.guidance"):
        finish(make_pool(tmp_path))


def test_a_worker_with_other_weights_is_refused(ray, tmp_path):
    ray.fingerprints = {"only": "0" * 64}
    with pytest.raises(ConfigError, match=r"worker w1 has other weights for teacher\.only"):
        finish(make_pool(tmp_path))


def test_one_worker_with_other_weights_among_good_ones_is_refused(ray, tmp_path):
    """Another file under the same name on one node: no shard of it is kept."""
    load = ray.load
    ray.load = lambda name: (
        load(name) if name == "w1" else {**load(name), "fingerprints": {"only": "0"}}
    )
    pool = make_pool(tmp_path)
    with pytest.raises(ConfigError, match=r"worker w2 has other weights for teacher\.only"):
        finish(pool)
    leases = {e["worker"] for e in read_lines(pool.run.events) if e["kind"] == "lease"}
    assert leases <= {"w1"}


def poll_by_the_second(pool, rounds, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now[0])
    for _ in range(rounds):
        pool.poll()
        now[0] += 1.0


def test_a_worker_that_hangs_is_ended_and_its_shard_made_again(ray, tmp_path, monkeypatch):
    ray.behaviour = lambda name, shard: "never" if name == "w1" else {"bytes": 100, "seconds": 0.0}
    pool = make_pool(tmp_path, lease_timeout_s=10)
    poll_by_the_second(pool, 60, monkeypatch)
    assert pool.is_done and ray.killed[0] is ray.actors[0]
    assert [e["shard"] for e in read_lines(pool.run.events) if e["kind"] == "expire"] == [0]


def test_a_worker_that_hangs_while_it_loads_is_ended_and_replaced(ray, tmp_path, monkeypatch):
    load = ray.load
    ray.load = lambda name: "never" if name == "w1" else load(name)
    ray.behaviour = lambda name, shard: "never" if name == "w2" else {"bytes": 100, "seconds": 0.0}
    pool = make_pool(tmp_path, lease_timeout_s=10)
    poll_by_the_second(pool, 60, monkeypatch)
    assert pool.is_done and len(ray.actors) == 4
    expired = {e["worker"]: e for e in read_lines(pool.run.events) if e["kind"] == "expire"}
    assert expired["w1"]["shard"] is None and expired["w2"]["shard"] == 0
    assert expired["w1"]["reason"] == "its teachers were not loaded within 10 s"
    left = {e["worker"]: e for e in read_lines(pool.run.events) if e["kind"] == "worker_leave"}
    assert left["w1"]["reason"] == expired["w1"]["reason"]


def test_a_pool_that_stood_still_itself_ends_no_worker(ray, tmp_path, monkeypatch):
    """A file server that hangs for minutes holds the pool up, not the workers."""
    ray.behaviour = lambda name, shard: "never"
    pool, now = make_pool(tmp_path, lease_timeout_s=10), [0.0]
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now[0])
    for gap in (1.0, 1.0, 1.0, 130.0, 1.0, 1.0, 1.0, 130.0, 1.0, 1.0):
        pool.poll()
        now[0] += gap
    kinds = [event["kind"] for event in read_lines(pool.run.events)]
    assert kinds.count("lease") == 2 and "expire" not in kinds and pool.deaths == []
    for _ in range(4):  # 8 s were heard in before
        now[0] += 1.0
        pool.poll()
    kinds = [event["kind"] for event in read_lines(pool.run.events)]
    assert kinds.count("expire") == 2


def test_a_pool_that_stood_still_in_the_middle_of_a_round_ends_no_worker(
    ray, tmp_path, monkeypatch
):
    ray.behaviour = lambda name, shard: "never"
    pool, now = make_pool(tmp_path, lease_timeout_s=10), [0.0]
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now[0])
    pool.poll()
    pool.poll()

    def hangs(run, known):
        now[0] += 130.0
        return Position(0, "")

    monkeypatch.setattr(pool_module.cursor, "read_cursor", hangs)
    for _ in range(3):
        pool.poll()
    kinds = [event["kind"] for event in read_lines(pool.run.events)]
    assert kinds.count("lease") == 2 and "expire" not in kinds and pool.deaths == []


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_file_server_that_answers_badly_for_a_while_ends_no_pool(
    ray, tmp_path, monkeypatch, number
):
    """Nor does it take what it does not say for "none": cursor, target and shards stay known."""
    pool = make_pool(tmp_path, trainer_reads=True)
    write_cursor(pool.run, 1, "")
    write_target(pool.run, 1)
    monkeypatch.setattr(pool_module, "LOOK_PERIOD_S", 0.0)
    pool.poll()
    before = (pool.target, pool.coordinator.cursor)
    assert before == (1, pool.config.trajectory.block_shards)
    monkeypatch.setattr(files, "PAUSES_S", ())

    def away(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", away)
    monkeypatch.setattr(os, "scandir", away)
    for _ in range(3):
        pool.poll()
        assert (pool.target, pool.coordinator.cursor) == before


def test_a_shard_that_a_listing_lacks_is_looked_for_by_name(ray, tmp_path, monkeypatch):
    """The listing of a network file system may be a minute old."""
    write_tiny_shards(RunDir(tmp_path), tiny_spec(), [0])
    pool = make_pool(tmp_path)
    assert list(pool.coordinator.committed) == [0]
    monkeypatch.setattr(pool_module, "committed", lambda run: {})
    pool._scan()
    assert list(pool.coordinator.committed) == [0]
    pool.run.sidecar(0).unlink()
    pool._scan()
    assert list(pool.coordinator.committed) == []


def test_workers_that_never_load_stop_the_pool(ray, tmp_path, monkeypatch):
    ray.load = lambda name: "never"
    with pytest.raises(PoolError, match=r"6 failures, the last: .* its teachers were not"):
        poll_by_the_second(make_pool(tmp_path, lease_timeout_s=10), 60, monkeypatch)


def test_a_worker_that_waits_for_a_node_is_let_wait(ray, tmp_path, monkeypatch):
    ray.load, ray.has_node = lambda name: "never", False
    pool = make_pool(tmp_path, lease_timeout_s=10)
    poll_by_the_second(pool, 60, monkeypatch)
    assert len(ray.actors) == 2 and ray.killed == []


def test_a_shard_quarantined_after_the_end_brings_workers_back(ray, tmp_path):
    pool = make_pool(tmp_path)
    finish(pool)
    assert pool.members == []
    pool._handle(Quarantined(2))
    assert not pool.is_done
    finish(pool)
    assert pool.is_done and len(ray.actors) == 4


def take_for_committed(pool, monkeypatch):
    """Lets the pool scan: what it knows is what is on disk."""
    known = pool.coordinator.committed
    monkeypatch.setattr(pool_module, "committed", lambda run: dict(known))


def test_what_is_evicted_while_the_directory_is_read_does_not_come_back(ray, tmp_path, monkeypatch):
    """The listing is older than the eviction that a quarantined shard leads to."""
    listing = dict.fromkeys(range(4), 100)
    for module in (done, pool_module):  # a start and a scan
        monkeypatch.setattr(module, "committed", lambda run: dict(listing))
    pool = make_pool(tmp_path)
    state = pool.coordinator
    # One shard to come and one of those there fit, no more: what was there is 100 bytes each.
    state.limits = dataclasses.replace(state.limits, max_bytes=pool.plan.shard_bytes + 150)
    pool.members.append(Member(Actor(ray), "cpu", None, None, name="w"))
    for event in (Released(2), Joined("w"), Asked("w")):
        pool._handle(event)
    del listing[3]
    pool._scan()
    assert state.lease_of("w") == 3 and state.evicted == {0, 1} and set(state.committed) == {2}


def ask_for(pool, workers):
    """`bowstring scale`, and the pool's next look at the directory."""
    write_target(pool.run, workers)
    pool._next_look_s = 0.0
    pool.poll()


def at_work(pool):
    return read_history(pool.run)


def test_the_pool_follows_the_target_up_and_down(ray, tmp_path, monkeypatch):
    ray.behaviour = lambda name, shard: "never"
    pool = make_pool(tmp_path, num_workers=1)
    take_for_committed(pool, monkeypatch)
    pool.poll()
    ask_for(pool, 3)
    pool.poll()
    assert len(pool.members) == 3 and at_work(pool).target == 3
    assert at_work(pool).workers == {"w1", "w2", "w3"}
    ask_for(pool, 1)
    # All are in the middle of a shard: none is ended before it is done.
    assert ray.killed == [] and [member.leaves for member in pool.members].count(True) == 2
    for member in pool.members:
        member.task.value = {"bytes": 100, "seconds": 0.0}
    for _ in range(3):
        pool.poll()
    assert len(pool.members) == 1 and len(ray.killed) == 2
    events = list(read_lines(pool.run.events))
    assert [e["workers"] for e in events if e["kind"] == "scale"] == [3, 1]
    assert [e["reason"] for e in events if e["kind"] == "worker_leave"] == ["scaled down"] * 2
    assert restarts(read_history(pool.run))["teacher_workers"] == 0
    assert sorted(pool.coordinator.committed) == [0, 1, 2]


def test_a_worker_asked_to_leave_stays_when_it_is_wanted_again(ray, tmp_path, monkeypatch):
    ray.behaviour = lambda name, shard: "never"
    pool = make_pool(tmp_path, num_workers=2)
    take_for_committed(pool, monkeypatch)
    pool.poll()
    pool.poll()
    ask_for(pool, 0)
    assert all(member.leaves for member in pool.members)
    ask_for(pool, 2)
    assert len(ray.actors) == 2 and not any(member.leaves for member in pool.members)
    ray.behaviour = lambda name, shard: {"bytes": 100, "seconds": 0.0}
    for member in pool.members:
        member.task.value = {"bytes": 100, "seconds": 0.0}
    finish(pool)
    assert pool.is_done


def test_no_workers_pause_the_production(ray, tmp_path, monkeypatch):
    pool = make_pool(tmp_path)
    take_for_committed(pool, monkeypatch)
    ask_for(pool, 0)
    finish(pool)
    assert pool.members == [] and not pool.is_done
    ask_for(pool, 1)
    finish(pool)
    assert pool.is_done


def test_a_pool_that_starts_takes_its_settings_not_an_old_target(ray, tmp_path):
    pool = make_pool(tmp_path)
    write_target(pool.run, 1)
    assert make_pool(tmp_path).target == 2 and read_target(pool.run) is None


def test_a_number_of_workers_that_cannot_be_is_refused(ray, tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(ConfigError, match="no teacher workers yet"):
        write_target(run, 1)
    most = read_history(make_pool(tmp_path).run).most
    for workers, message in ((-1, "-1 teacher workers cannot be"), (most + 1, f"than the {most}")):
        with pytest.raises(ConfigError, match=message):
            write_target(run, workers)
    write_target(run, most)
    run.target.write_text("3 workers")
    with pytest.raises(ConfigError, match=r"target\.json is no JSON .*; write it again"):
        read_target(run)
    run.target.write_text('{"wokers": 3}')
    with pytest.raises(ConfigError, match=r"target\.json lacks the field 'workers'; write it"):
        read_target(run)


# -----------------------------------------------------------------------------------------------
# On a cluster


def test_a_node_that_takes_most_workers_with_it_does_not_stop_the_pool(ray, tmp_path, monkeypatch):
    """8 of 9 workers die with their node, and 1 is wanted after that: no crash loop."""
    there = [
        {"Alive": True, "NodeID": f"{n}", "Resources": {"CPU": n, "teacher": n}} for n in (1.0, 8.0)
    ]
    ray.nodes = lambda: there
    ray.behaviour = lambda name, shard: "never"
    pool = make_pool(tmp_path, num_workers=1, address="there", max_steps=40)
    take_for_committed(pool, monkeypatch)
    for _ in range(3):
        pool._next_look_s = 0.0
        pool.poll()
    assert [member.shard for member in pool.members] == list(range(9))
    del there[1]
    for member in pool.members[1:]:
        member.task.value = ActorDiedError()
    pool.poll()
    assert pool.target == 1 and at_work(pool).workers == {"w1"}
    ray.behaviour = lambda name, shard: {"bytes": 100, "seconds": 0.0}
    pool.members[0].task.value = {"bytes": 100, "seconds": 0.0}
    finish(pool)
    assert pool.is_done and len(ray.actors) == 9


def test_an_idle_worker_that_dies_is_found_and_replaced(ray, tmp_path, monkeypatch):
    ray.behaviour = lambda name, shard: "never"
    pool = make_pool(tmp_path, num_workers=5, lease_timeout_s=10)  # of a run of fewer shards
    poll_by_the_second(pool, 4, monkeypatch)
    (idle,) = [member for member in pool.members if member.shard is None]
    idle.actor.progress = Method(lambda: ActorDiedError())
    poll_by_the_second(pool, 14, monkeypatch)
    assert idle.name not in at_work(pool).workers and len(at_work(pool).workers) == 5


def test_a_shard_whose_producer_died_before_its_report_is_not_made_again(
    ray, tmp_path, monkeypatch
):
    """The pool looks at this shard alone: what else lies there it learns from its next listing."""

    def behaviour(name, shard):
        if shard != 1:
            return {"bytes": 100, "seconds": 0.0}
        write_tiny_shards(pool.run, tiny_spec(), [1])
        return ActorDiedError()

    ray.behaviour = behaviour
    pool = make_pool(tmp_path)
    pool.poll()
    monkeypatch.setattr(pool_module, "committed", None)
    finish(pool)
    assert pool.is_done and pool.coordinator.committed[1] == pool.plan.shard_bytes
    leased = [e["shard"] for e in read_lines(pool.run.events) if e["kind"] == "lease"]
    assert leased.count(1) == 1


# -----------------------------------------------------------------------------------------------
# Sick devices


def start_sick_cluster(ray, folder, nodes=3, gpus=1, **settings):
    """A pool on nodes of Ray, whose actors land where there is room, a GPU each."""
    there = [
        {"Alive": True, "NodeID": f"n{n}", "Resources": {"CPU": gpus, "GPU": gpus, "teacher": gpus}}
        for n in range(nodes)
    ]
    ray.nodes = lambda: there
    taken = {}

    def land(name):
        """The first place that no living actor holds."""
        living = {at for actor, at in taken.items() if actor not in ray.killed}
        places = [(f"n{n}", f"{gpu}") for n in range(nodes) for gpu in range(gpus)]
        actor = ray.actors[-1]
        if actor not in taken:
            free = [at for at in places if at not in living]
            if not free:
                return "never"
            taken[actor] = free[0]
        ray.where[name] = taken[actor]
        return Introduction(name, *taken[actor], "gpu", taken[actor][0])

    ray.where, ray.introduce = {}, land
    return make_pool(folder, address="there", num_workers=1, gpus_per_worker=1, **settings)


def places_of(pool, parked):
    return sorted(str(member.place) for member in pool.members if member.is_parked == parked)


def test_a_gpu_that_fails_is_parked_and_the_others_make_its_shards(ray, tmp_path, monkeypatch):
    def behaviour(name, shard):
        if ray.where[name] == ("n1", "0"):
            return RayTaskError("produce", "the traceback\nRuntimeError: CUDA", RuntimeError())
        return {"bytes": 100, "seconds": 0.0}

    ray.behaviour = behaviour
    pool = start_sick_cluster(ray, tmp_path, gpus=2, max_steps=200)
    take_for_committed(pool, monkeypatch)
    for _ in range(20):
        pool._next_look_s = 0.0
        pool.poll()
    assert places_of(pool, parked=True) == ["n1, GPU 0"] and pool.target == 5
    assert sorted(at_work(pool).excluded) == [("n1", "0")]
    assert status_of(pool)["excluded"] == [
        {"node": "n1", "gpu": "0", "reason": "RuntimeError: CUDA"}
    ]
    assert sick_nodes(pool.run) == {}  # Slurm excludes nodes, and this one has another GPU
    finish(pool, 100)
    kinds = [event["kind"] for event in read_lines(pool.run.events)]
    assert pool.is_done and kinds.count("fail") == 3 and "give_up" not in kinds


def status_of(pool):
    save_config(pool.run, pool.config)
    return status(pool.run)


def test_a_node_whose_teachers_do_not_load_is_left_out_and_named_for_slurm(
    ray, tmp_path, monkeypatch
):
    load = ray.load
    stale = RayTaskError("load", "the traceback\nOSError: Stale file handle", OSError())
    ray.load = lambda name: stale if ray.where[name][0] == "n0" else load(name)
    pool = start_sick_cluster(ray, tmp_path, gpus=2, max_steps=200)
    take_for_committed(pool, monkeypatch)
    finish(pool)
    assert pool.is_done
    assert sick_nodes(pool.run) == {"n0": "OSError: Stale file handle"}
    ray.load = load  # it is mended, and a new start tries it
    again = start_sick_cluster(ray, tmp_path, gpus=2, max_steps=200)
    assert Place("n0") in again.coordinator.health.out
    take_for_committed(again, monkeypatch)
    ray.where.clear()
    finish(again)
    assert again.is_done and sick_nodes(pool.run) == {}


@pytest.mark.parametrize("act", [Expired, Leased, Superseded])
def test_what_follows_for_a_worker_that_went_with_its_place_is_nothing(ray, tmp_path, act):
    """One round may exclude a place, and then come to others that were there."""
    pool = start_sick_cluster(ray, tmp_path, max_steps=200)
    for _ in range(3):
        pool._next_look_s = 0.0
        pool.poll()
    there = next(member for member in pool.members if member.place.node == "n0")
    pool._carry_out(Excluded(there.place, "sick"))
    assert there not in pool.members
    before = list(pool.members)
    pool._carry_out(act(there.name, 7))
    pool._died(there, "late")
    pool._part(there, "late")
    assert pool.members == before and pool.deaths == []


def test_all_nodes_sick_end_the_run_with_what_they_share(ray, tmp_path):
    unfit = RayTaskError("load", "the traceback", UnfitPlace("its device does not compute: no"))
    ray.load = lambda name: unfit
    pool = start_sick_cluster(ray, tmp_path)
    words = r"2 of 3 nodes can make no shards \(n0, n1\); all of them say: .*does not compute: no"
    with pytest.raises(PoolError, match=words.replace(": .*", ":(.|\n)*")):
        finish(pool)


def test_one_node_with_other_weights_is_left_out(ray, tmp_path, monkeypatch):
    load = ray.load
    ray.load = lambda name: (
        {**load(name), "fingerprints": {"only": "0"}} if ray.where[name][0] == "n2" else load(name)
    )
    pool = start_sick_cluster(ray, tmp_path)
    take_for_committed(pool, monkeypatch)
    finish(pool)
    assert pool.is_done and "has other weights" in sick_nodes(pool.run)["n2"]


def test_values_that_are_not_finite_are_made_again_on_another_node(ray, tmp_path, monkeypatch):
    wrong = ConfigError("teacher only gives values that are not finite")

    def behaviour(name, shard):
        if ray.where[name][0] == "n1":
            return RayTaskError("produce", "the traceback", wrong)
        return {"bytes": 100, "seconds": 0.0}

    ray.behaviour = behaviour
    pool = start_sick_cluster(ray, tmp_path)
    take_for_committed(pool, monkeypatch)
    finish(pool)
    assert pool.is_done and pool.coordinator.suspects == {}


def test_values_that_are_not_finite_anywhere_are_the_teachers(ray, tmp_path):
    wrong = ConfigError("teacher only gives values that are not finite")
    ray.behaviour = lambda name, shard: RayTaskError("produce", "the traceback", wrong)
    with pytest.raises(ConfigError, match="not finite"):
        finish(start_sick_cluster(ray, tmp_path))


def test_workers_that_go_with_their_node_count_against_nobody(ray, tmp_path, monkeypatch):
    """Ray knows of a dead worker before it knows of its node."""
    ray.behaviour = lambda name, shard: "never"
    now = [0.0]
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now[0])
    pool = start_sick_cluster(ray, tmp_path, nodes=2, max_steps=40)
    take_for_committed(pool, monkeypatch)
    for _ in range(6):
        pool.poll()
        now[0] += 1.0
    lost, stays = pool.members
    lost.task.value = ActorDiedError()
    pool.poll()
    assert len(pool.deaths) == 1
    ray.nodes()[int(lost.birth[1:])]["Alive"] = False
    now[0] += pool_module.JUDGED_S
    pool.poll()
    assert pool.deaths == [] and pool.coordinator.health.failures == {}
    stays.task.value = ActorDiedError()
    pool.poll()
    now[0] += pool_module.JUDGED_S
    pool.poll()
    assert pool.coordinator.health.failures == {stays.place: 1}


def lease_last_shard_twice(ray, folder, monkeypatch):
    """A pool whose last shard two workers have in hand, and these, the first one first."""
    now = [0.0]
    monkeypatch.setattr(pool_module.time, "monotonic", lambda: now[0])
    hung = []

    def behaviour(name, shard):
        is_last = shard == pool.plan.shards - 1
        if is_last:
            hung.append(name)
        return "never" if is_last else {"bytes": 100, "seconds": 0.0}

    ray.behaviour = behaviour
    pool = make_pool(folder, max_steps=40)
    for _ in range(60):
        pool.poll()
        now[0] += 1.0
    first, second = (next(m for m in pool.members if m.name == name) for name in hung)
    assert first.shard == second.shard == pool.plan.shards - 1
    return pool, first, second, now


def test_whoever_is_slower_is_told_to_drop_the_shard(ray, tmp_path, monkeypatch):
    pool, first, second, _ = lease_last_shard_twice(ray, tmp_path, monkeypatch)
    second.task.value = {"bytes": 100, "seconds": 0.0}
    pool.poll()
    assert set(first.actor.dropped) == {pool.plan.shards - 1} and second.actor.dropped == []
    assert first in pool.members and pool.coordinator.is_done
    pool._handle(Quarantined(3))
    first.task.value = None  # it was dropped, and asks
    for _ in range(3):
        pool.poll()
    assert pool.is_done and len(ray.actors) == 2


def test_a_worker_that_does_not_even_drop_its_shard_is_ended(ray, tmp_path, monkeypatch):
    pool, first, second, now = lease_last_shard_twice(ray, tmp_path, monkeypatch)
    second.task.value = {"bytes": 100, "seconds": 0.0}
    pool._collect()
    now[0] += pool.config.cluster.teachers.lease_timeout_s + 1
    pool._now_s = now[0]
    pool._ping()
    assert first not in pool.members
    (late,) = [e for e in read_lines_after_flush(pool) if e["kind"] == "expire"]
    assert late["worker"] == first.name and "its shard was not dropped within" in late["reason"]


def read_lines_after_flush(pool):
    pool._log.flush()
    return list(read_lines(pool.run.events))
