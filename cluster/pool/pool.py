"""The teacher pool: Ray actors that make shards, and the side that feeds them leases.

An actor holds its teachers and nothing else. It takes a shard number, samples the trajectories and
commits the file; whatever happens to it, at most the shard in its hands is made again. All that is
decided is decided in `cluster.pool.coordinator`; here it is carried out.

A node or GPU that is excluded is not left free, or Ray would start the next actor there: one that
finds itself there is parked, and holds the place without work.
"""

import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from math import inf
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.plan.placement import Device, gpus_of_worker, most_workers
from cluster.pool import coordinator, messages
from cluster.pool.health import Error
from cluster.pool.member import Member, Pace, choose_leaving
from cluster.pool.preflight import Introduction, UnfitPlace
from cluster.pool.worker import TeacherWorker
from cluster.settings.schema import TeacherPoolConfig
from cluster.state import cursor, done, evicted, identity, workers
from distill.config import ConfigError, check
from distill.data.sidecar import Reason, ShardSpec
from distill.data.stores.store import committed, is_committed
from distill.run import events, files, logs, records
from distill.teachers.trial import Trial

LOOK_PERIOD_S = 1.0  # between two looks at target and checkpoints
SCAN_PERIOD_S = 1.0  # at least, between two listings of the shards
PAUSE_PER_ROUND = 20  # times as long as the round took a core
COARSE = 1e-4  # error of a curve that is said: a tenth of what is left of a good student's
# Ray takes up to 15 s to see that a node is lost. Whose node is there after that died by itself.
JUDGED_S = 30.0


class PoolError(RuntimeError):
    """The pool cannot go on. The message says why, with the worker's traceback."""


def node_of_ray() -> str:
    """The node of Ray that the calling process belongs to."""
    return str(ray.get_runtime_context().get_node_id())


@dataclass
class TeacherPool:
    """The pool of one run. `poll` does whatever can be done now and never blocks; `rest` waits.

    It starts from what `view` says of the shards, and follows their folder from there on.
    """

    view: done.RunView
    spec: ShardSpec
    trainer_reads: bool  # whether a trainer moves the cursor; without one all shards are made
    members: list[Member] = field(default_factory=list)
    deaths: list[tuple[float, messages.Unfit]] = field(default_factory=list)  # to judge, and when
    notes: list[str] = field(default_factory=list)  # what the user should hear; who says it clears

    def __post_init__(self) -> None:
        view = self.view
        self.config, self.run, self.plan = view.config, view.run, view.plan
        self._position = cursor.START
        limits = production_limits(view, self.trainer_reads)
        before = events.read_history(self.run).excluded
        self.coordinator = coordinator.Coordinator(
            limits,
            view.shards,
            view.evicted,
            cursor=self._cursor(),
            excluded={messages.Place(*key): event.reason for key, event in before.items()},
        )
        self._says_sick = True
        self._oldest = evicted.OldestCheckpoint(self.run)
        self._next_look_s = self._next_ping_s = self._round_core_s = 0.0
        self._scans, self._log, self._now_s = Pace(), events.EventLog(self.run), time.monotonic()
        self._wanted: dict[Device, int] = {}
        self.target = self.config.cluster.teachers.num_workers
        self.run.target.unlink(missing_ok=True)
        self._log.add(events.Pool(self.target, most_workers(self.config.cluster)))
        self._log.flush()  # `bowstring scale` asks for it

    @property
    def is_done(self) -> bool:
        """Whether every shard of the run was made."""
        return self.coordinator.is_done

    def poll(self) -> bool:
        """One round: workers, results, the directory, heartbeats, leases. Whether all is made.

        Raises:
            ConfigError: most nodes have other teachers than the run, or cannot load them.
            PoolError: a shard was given up, or most nodes can make none.
        """
        before, self._now_s, core = self._now_s, time.monotonic(), time.thread_time()
        self._excuse_silence(self._now_s - before)
        if self._now_s >= self._next_look_s:
            with files.next_time():
                self._look()
            self._next_look_s = self._now_s + LOOK_PERIOD_S
        if self._scans.is_due(self._now_s):
            with files.next_time():
                self._scan()
            self._scans.done(SCAN_PERIOD_S)
        if self.is_done:
            self.close()  # a shard that is quarantined later brings new workers
        else:
            self._staff()
        self._collect()
        self._ping()
        self._handle(messages.CursorMoved(self._cursor()))  # a trainer may read far in a second
        self._handle(messages.Tick())
        self._log.flush()
        if self._says_sick:
            self._says_sick = False
            workers.write_sick(self.run)
        self._round_core_s = time.thread_time() - core
        return self.is_done

    def rest(self, seconds: float) -> None:
        """Sleeps so long, or until a worker has a result. Costly rounds are followed by a pause."""
        pause = min(seconds, PAUSE_PER_ROUND * self._round_core_s)
        time.sleep(pause)
        tasks = [member.task for member in self.members if member.task is not None]
        if tasks:
            ray.wait(tasks, timeout=seconds - pause)
        else:
            time.sleep(seconds - pause)

    def close(self) -> None:
        """Ends all workers. A shard in the making leaves no trace."""
        members, self.members = self.members, []
        for member in members:
            ray.kill(member.actor)
            if member.name:
                # What it frees would go to the others, and they end too: no action is carried out.
                left = messages.Left(member.name, events.END_OF_PRODUCTION)
                self.coordinator.handle(left, self._now_s)
                self._log.add(events.WorkerLeave(member.name, events.END_OF_PRODUCTION))
        self._log.flush()

    # ---------------------------------------------------------------------------------------
    # One round

    def _staff(self) -> None:
        """Starts the workers that are missing. Those that are too many finish their shard."""
        missing = choose_leaving(self.members, self._wanted)
        for member in [m for m in self.members if m.leaves and m.shard is None]:
            self._part(member, events.SCALED_DOWN)
        for device in missing:
            options = actor_options(self.config.cluster.teachers, device)
            actor_class = ray.remote(TeacherWorker).options(**options)
            actor = actor_class.remote(self.config, self.run, self.spec, device)
            task, ping = actor.introduce.remote(node_of_ray), actor.progress.remote()
            self.members.append(Member(actor, device, task, ping))
        all_there = all(member.place is not None for member in self.members)
        self._handle(messages.Staffed(all_there or not self.config.cluster.address))

    def _look(self) -> None:
        """Takes over what small files tell: the target, and where the oldest checkpoint stands."""
        self._follow()
        if self.coordinator.needs_room:
            step, block_shards = self._oldest.look(), self.config.trajectory.block_shards
            first = evicted.first_shard_read(self.plan.order, block_shards, step)
            self._handle(messages.Released(first))

    def _scan(self) -> None:
        """Takes over what others changed among the shards."""
        found, known = committed(self.run), self.coordinator.committed
        held = {member.shard for member in self.members}  # their own report is about to come
        # Both before any is told: what follows from one changes what is known.
        gone, new = known.keys() - found.keys(), found.keys() - known.keys() - held
        for shard in sorted(gone):
            if not is_committed(self.run, shard):  # a network file system lists it late
                self._log.add(events.Quarantine(shard))
                self._handle(messages.Quarantined(shard))
        for shard in sorted(new):
            self._handle(messages.Committed(shard, found[shard]))

    def _follow(self) -> None:
        """Sets the target to what was asked for, and to what fits on the nodes there are now."""
        nodes = ray.nodes() if self.config.cluster.address else []
        if self.config.cluster.address:
            self._bid_farewell({node["NodeID"] for node in nodes if node["Alive"]})
        self._judge_deaths()
        parked = Counter(member.device for member in self.members if member.is_parked)
        self._wanted = workers.wanted_workers(self.config.cluster, self.run, nodes, parked)
        wanted = sum(self._wanted.values())
        if wanted != self.target:
            self.target = wanted
            self._log.add(events.Scale(wanted))

    def _cursor(self) -> int:
        """First shard of the newest block the trainer reads."""
        self._position = cursor.read_cursor(self.run, self._position)
        return self._position.block * self.config.trajectory.block_shards

    def _collect(self) -> None:
        """Takes the results that are there."""
        tasks = {member.task: member for member in self.members if member.task is not None}
        if not tasks:
            return
        ready, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=0)
        for task in ready:
            member = tasks[task]
            if member not in self.members:  # ended by what came before it in this round
                continue
            member.task = None
            try:
                result = ray.get(task)
            except RayTaskError as error:
                self._failed(member, error)
            except RayError as error:  # killed, out of memory, its node or its result lost
                if member.shard is not None and is_committed(self.run, member.shard):
                    # It died between its commit and its report.
                    size = self.plan.shard_bytes
                    self._handle(messages.Committed(member.shard, size, member.name))
                self._died(member, str(error).strip().splitlines()[0])
            else:
                self._finished(member, result)

    def _finished(self, member: Member, result: Any) -> None:
        if member.place is None:
            self._introduced(member, result)
            return
        is_beaten = member.shard is not None and member.expires_s < inf
        member.expires_s = inf
        if is_beaten or result is None:  # what another worker made first is kept
            member.shard = None
        elif member.shard is None:
            try:
                check_fingerprints(self.spec, result["worker"], result["fingerprints"])
            except ConfigError as wrong:
                self._unfit(member, str(wrong), is_final=True, is_refusal=True)
                return
            for name, found in identity.record_trials(self.run, result.pop("trials")).items():
                self.notes.append(f"teacher.{name}: {records.record_of(Trial, found).words}")
            self._log.add(events.WorkerJoin(**result, device=member.device))
            self._handle(messages.Joined(member.name))
        else:
            shard, member.shard = member.shard, None
            self._log.add(events.Commit(shard, member.name, **result))
            if (error := result.get("curve_error", 0.0)) > COARSE:
                self.notes.append(
                    f"trajectory.grid={self.config.trajectory.grid} is coarse: between its stored "
                    f"states the curve of a trajectory is off by about {error:.1g} (relative "
                    "squared distance), and a student cannot be nearer to its teacher; raise "
                    "trajectory.grid, or set trajectory.store_velocity=true"
                )
            self._handle(messages.Committed(shard, result["bytes"], member.name))
        if not member.leaves and member in self.members:
            self._handle(messages.Asked(member.name))

    def _introduced(self, member: Member, found: Introduction) -> None:
        """It has a process. Now it loads, unless nothing is to be made there."""
        member.name, member.birth = found.worker, found.birth
        member.place = messages.Place(found.node, found.gpu)
        member.expires_s = self._now_s + self.config.cluster.teachers.lease_timeout_s
        self._handle(messages.Arrived(member.name, member.place, found.model, found.birth))
        if self.coordinator.health.takes_work(member.place):
            member.task = member.actor.load.remote()
        else:
            member.is_parked = True
            self._follow()  # a place less

    def _failed(self, member: Member, error: RayTaskError) -> None:
        """Another worker takes its place: what failed may lie in this process or on its device."""
        is_refusal, is_final = (isinstance(error.cause, x) for x in (ConfigError, UnfitPlace))
        text = str(error.cause) if is_refusal or is_final else str(error)
        if member.shard is None:
            self._unfit(member, text, is_final or is_refusal, is_refusal)
            return
        shard, last_line = member.shard, Error(text).last_line
        self._log.add(events.Fail(shard, member.name, last_line))
        ray.kill(member.actor)
        self.members.remove(member)
        self._log.add(events.WorkerLeave(member.name, f"failed on shard {shard}"))
        self._handle(messages.Failed(member.name, text, is_refusal, is_final))
        self._handle(messages.Left(member.name, last_line))

    def _unfit(self, member: Member, text: str, is_final: bool, is_refusal: bool) -> None:
        """It cannot load its teachers where it is."""
        ray.kill(member.actor)
        self.members.remove(member)
        why = f"could not load its teachers: {Error(text).last_line}"
        self._log.add(events.WorkerLeave(member.name or "unknown", why))
        place = member.place or messages.Place("unknown")
        if not is_refusal:
            text = f"a teacher worker could not load its teachers:\n{text}"
        self._handle(messages.Unfit(place, member.birth, text, is_final, is_refusal))
        self._handle(messages.Left(member.name, why))

    def _died(self, member: Member, reason: str) -> None:
        """It is lost; whether with its node, or by itself, shows later."""
        if member in self.members and member.place is not None:
            text = f"a teacher worker died: {reason}"
            late_s = JUDGED_S if self.config.cluster.address else 0.0
            death = messages.Unfit(member.place, member.birth, text)
            self.deaths.append((self._now_s + late_s, death))
        self._bury(member, reason)

    def _bid_farewell(self, alive: set[str]) -> None:
        """Takes over which nodes are gone. Who died with its node did not fail."""
        for birth in self.coordinator.health.births - alive:
            self._handle(messages.Gone(birth))
        self.deaths = [death for death in self.deaths if death[1].birth in alive]

    def _judge_deaths(self) -> None:
        """Counts deaths against their places, once their node would be known to be gone."""
        due = [death for due_s, death in self.deaths if due_s <= self._now_s]
        self.deaths = [death for death in self.deaths if death[0] > self._now_s]
        for death in due:
            self._handle(death)

    def _bury(self, member: Member, reason: str) -> None:
        """Forgets a worker that is lost; `_staff` starts another."""
        if member not in self.members:  # its place was excluded meanwhile
            return
        ray.kill(member.actor)  # what is left of it
        self.members.remove(member)
        self._follow()  # its node may be gone with it
        self._gone(member, reason)

    def _part(self, member: Member, reason: str, is_alone: bool = True) -> None:
        """Ends a worker."""
        if member not in self.members:
            return
        ray.kill(member.actor)
        self.members.remove(member)
        self._gone(member, reason, is_alone)

    def _gone(self, member: Member, reason: str, is_alone: bool = True) -> None:
        self._log.add(events.WorkerLeave(member.name or "unknown", reason))
        if member.name:
            self._handle(messages.Left(member.name, reason, is_alone))

    def _ping(self) -> None:
        """Hears how far workers are; ends dead idle ones and those whose teachers do not load."""
        limit = self.config.cluster.teachers.lease_timeout_s
        for member in [m for m in self.members if m.ping is not None]:
            if member in self.members and ray.wait([member.ping], timeout=0)[0]:
                self._take_ping(member, self._now_s + limit)
        if self._now_s >= self._next_ping_s:
            self._next_ping_s = self._now_s + limit / 4
            for member in [m for m in self.members if m.ping is None]:
                member.ping = member.actor.progress.remote()
                if member.shard is not None and member.expires_s < inf:  # the first may have come
                    member.actor.drop.remote(member.shard)  # before its work had begun
        late = [m for m in self.members if m.task is not None and self._now_s >= m.expires_s]
        for member in late:
            what = "teachers were not loaded" if member.is_loading else "shard was not dropped"
            reason = f"its {what} within {limit:g} s"
            self._log.add(events.Expire(None, member.name, reason))
            self._died(member, reason)

    def _take_ping(self, member: Member, load_until_s: float) -> None:
        ping, member.ping = member.ping, None
        try:
            name, samples = ray.get(ping)
        except RayError as error:
            if member.task is None:  # otherwise its task tells the same, and is dealt with there
                self._died(member, str(error).strip().splitlines()[0])
            return
        if member.hear(name, samples, load_until_s):
            self._handle(messages.Heartbeat(name))

    def _excuse_silence(self, slept_s: float) -> None:
        """What stood still heard nothing. A round has one time, so all of it shows here."""
        if slept_s > self.config.cluster.teachers.lease_timeout_s / 2:
            self._handle(messages.Slept(slept_s))
            for member in self.members:
                member.expires_s += slept_s

    # ---------------------------------------------------------------------------------------
    # The coordinator

    def _handle(self, event: messages.Event) -> None:
        for action in self.coordinator.handle(event, self._now_s):
            self._carry_out(action)

    def _carry_out(self, action: messages.Action) -> None:
        match action:
            case messages.Leased(worker, shard) if member := self._member(worker):
                member.shard, member.samples = shard, -1
                member.task = member.actor.produce.remote(shard)
                self._log.add(events.Lease(shard, worker))
            case messages.Superseded(worker, shard) if member := self._member(worker):
                member.actor.drop.remote(shard)
                member.expires_s = self._now_s + self.config.cluster.teachers.lease_timeout_s
            case messages.Expired(worker, _) if member := self._member(worker):
                self._log.add(events.Expire(member.shard, worker, "no progress"))
                self._bury(member, "no progress")
            case messages.Evicted(shards):
                evicted.evict(self.run, shards, self._oldest.step)
            case messages.Excluded(place, reason):
                self._log.add(events.Exclude(place.node, place.gpu, reason))
                self._says_sick = True
                for member in [m for m in self.members if m.is_at(place) and not m.is_parked]:
                    self._part(member, f"{place} takes no more work", is_alone=False)
            case messages.Readmitted(place):
                self._log.add(events.Readmit(place.node, place.gpu))
                self._says_sick = True
            case messages.Hopeless(reason, is_refusal):
                raise (
                    ConfigError(reason) if is_refusal else PoolError(reason + logs.words(self.run))
                )
            case messages.GivenUp(shard, reason, error, is_refusal):
                self._log.add(events.GiveUp(shard, reason))
                if is_refusal:
                    raise ConfigError(error)
                raise PoolError(set_request_aside(self.run, shard, reason, error))

    def _member(self, name: str) -> Member | None:
        """None where an action before this one has ended it: its place was excluded."""
        return next((member for member in self.members if member.name == name), None)


def production_limits(view: done.RunView, trainer_reads: bool) -> coordinator.Limits:
    """The coordinator's limits. Without a trainer that reads, all shards are made at once."""
    pool, trajectory, plan = view.config.cluster.teachers, view.config.trajectory, view.plan
    return coordinator.Limits(
        num_shards=plan.shards,
        block_shards=trajectory.block_shards,
        ready_ahead=trajectory.ready_ahead if trainer_reads else plan.shards,
        max_bytes=trajectory.max_bytes,
        shard_bytes=plan.shard_bytes,
        lease_timeout_s=pool.lease_timeout_s,
        max_attempts=pool.max_attempts,
    )


def actor_options(pool: TeacherPoolConfig, device: Device) -> dict[str, Any]:
    """Options of a worker's Ray actor. Nobody but the pool starts one again.

    Ray puts an actor that asks for no GPU on a node without one, as long as there is room.
    """
    return {
        "num_cpus": pool.cpus_per_worker,
        "num_gpus": gpus_of_worker(pool, device),
        "resources": {"teacher": 1.0},
        "max_concurrency": 2,
        "max_restarts": 0,
    }


def check_fingerprints(spec: ShardSpec, worker: str, fingerprints: dict[str, Any]) -> None:
    """Raises ConfigError unless a worker holds the teachers of the run, weight for weight."""
    for teacher in spec.teachers:
        theirs = fingerprints[teacher.name]
        check(
            theirs == teacher.fingerprint,
            f"worker {worker} has other weights for teacher.{teacher.name} ({theirs[:12]}) than "
            f"the run ({teacher.fingerprint[:12]}); give every node the same file",
        )


def set_request_aside(run: files.RunDir, shard: int, reason: str, traceback: str) -> str:
    """What to tell the user of a shard that cannot be made; `quarantine/` gets a file with it."""
    path = run.quarantine / f"{shard:08d}-{uuid.uuid4().hex[:8]}" / f"{shard:08d}.reason.json"
    why = Reason(shard, f"could not be made: {reason}", traceback=traceback)
    files.write_json(path, records.tree_of(why))
    return (
        f"shard {shard} was given up after {reason}; see {path}. Mend the cause and give the same "
        f"command again. The last:\n{traceback}"
    )
