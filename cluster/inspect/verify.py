"""The audit of a run: is anything lost, doubled or corrupt? From files only, read-only, no torch.

Four things are proven:
- every shard on disk is byte for byte what was committed, and of this run; of one that was deleted
  for room that is its sidecar, and no checkpoint would read it again;
- every checkpoint is byte for byte what its manifest says;
- config.yaml has the settings of run.json, and the checkpoints are those that the events tell of,
  no more and no less: a record that is missing, changed or cut is a finding;
- the trainer consumed exactly the planned sequence. Each window of steps in events.jsonl carries a
  hash of its sample ids; it must equal the hash of what `distill.data.order` plans for those steps,
  and the windows must follow each other without a gap from step 0. Windows that a restart fell back
  behind are checked too and then replaced by their repetition.
"""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rich import console, progress

from cluster.plan.stream import order_of
from cluster.settings.file import is_as_written, load_config
from cluster.state import lock
from cluster.state.evicted import first_shard_read, recorded
from cluster.state.identity import difference, identity_of
from distill.checkpoint import manifest
from distill.config import ConfigError
from distill.data.order import Order
from distill.data.sidecar import CorruptShard, MisplacedShard, ShardSpec, Sidecar
from distill.data.stores.store import open_store, read_sidecar, verify_shard
from distill.run import events, files, identity

LOG = "events.jsonl"


def audit(run: files.RunDir) -> dict[str, Any]:
    """The proof as plain values, ready for JSON.

    ok: nothing is missing, duplicate, corrupt, consumed otherwise than planned, or torn, and the
        records agree.
    shards, samples: those that are sound; `evicted` of the shards are proven by their sidecar and
        the events alone, since their tar was deleted for room.
    missing: shards that the consumed steps needed, or that the events say were made, and that are
        neither on disk nor evicted.
    duplicate: sample ids that stand in two shards.
    corrupt: shards whose bytes or index differ, or that are of another run.
    consumed_steps: steps done, as events.jsonl tells.
    consumed_sha256: of the planned ids of those steps, little-endian int64; equal for two runs that
        read the same samples in the same order.
    consumption: what is wrong with the windows.
    records: where events.jsonl, config.yaml and the checkpoints contradict each other, or were
        changed, in words.
    checkpoints: steps that verify, of those that a run goes on from (verified) and of those kept
        for good (kept), of the run's own teacher (teacher), and the problems of those that do not
        (bad).
    quarantined, orphans, produced_again: for information.
    events: lines of events.jsonl that could not be read, or not whole, and whether config.yaml was
        edited, in words; for information. A newer version may have written such lines.

    Raises:
        ConfigError: there is no run, or run.json is corrupt or of a newer version.
    """
    record = identity.record_of(run)
    stream, order = record.stream, order_of(record.stream)
    is_live = lock.is_live(run)
    before, own = _look_at_saves(run), _look_at_saves(run.teacher)
    origin = {"seed": record.seed, "config_hash": record.hash}
    shards, checkpoints = _audit_shards(run), _audit_checkpoints(run, origin)
    wrong = _audit_config(run, record)
    # After the shards: a live run may have deleted some or set some aside meanwhile.
    said: list[str] = []
    history = events.read_history(run, said.append)
    oldest = min(checkpoints["verified"], default=0)
    first_read = first_shard_read(order, stream.block_shards, oldest)
    _audit_evicted(run, shards, history.evicted, first_read)
    consumed = audit_consumption(history.course, order)
    wrong += _audit_log(run, checkpoints["verified"], consumed.steps)
    wrong += _audit_saves(before, history, is_live)
    if run.teacher.root.is_dir():
        now = events.read_history(run.teacher, lambda words: said.append(f"teacher/{words}"))
        wrong += _audit_log(run.teacher, checkpoints["teacher"], steps_told(now.course))
        wrong += _audit_saves(own, now, is_live)
    if run.config.exists() and not is_as_written(run):
        said.append(f"{run.config.name} was edited since the last start wrote it")
    needed = order.num_blocks(consumed.steps) * stream.block_shards
    per_shard = stream.samples_per_shard
    for shard, sidecar in shards.misplaced.items():
        problem = f"holds the samples of shard {sidecar.shard}"
        shards.corrupt.append({"shard": shard, "problem": problem})
    there = shards.sidecars.keys() | {entry["shard"] for entry in shards.corrupt}
    missing = [
        {"shard": n, "first_id": n * per_shard, "last_id": (n + 1) * per_shard - 1}
        for n in sorted({*range(needed), *(before.told.made & history.made)} - there)
    ]
    foreign = _of_another_run(shards.sidecars, stream, record.teachers)
    found: dict[str, Any] = {
        "ok": True,
        "shards": len(shards.sidecars),
        "samples": sum(len(sidecar.ids) for sidecar in shards.sidecars.values()),
        "evicted": len(shards.evicted),
        "missing": missing,
        "duplicate": _duplicates(shards),
        "corrupt": shards.corrupt + foreign,
        "consumed_steps": consumed.steps,
        "consumed_sha256": planned_sha256(order, 0, consumed.steps),
        "consumption": consumed.problems,
        "records": wrong,
        "checkpoints": checkpoints,
        "quarantined": _quarantined(run),
        "orphans": shards.orphans,
        "produced_again": sorted(history.made_twice),
        "events": said,
    }
    proofs = ("missing", "duplicate", "corrupt", "consumption", "records")
    found["ok"] = not any(found[name] for name in proofs) and not checkpoints["bad"]
    return found


# -----------------------------------------------------------------------------------------------
# Shards


@dataclass
class _Shards:
    """What lies where the shards do."""

    sidecars: dict[int, Sidecar] = field(default_factory=dict)  # of the sound ones
    misplaced: dict[int, Sidecar] = field(default_factory=dict)  # under another shard's name
    evicted: set[int] = field(default_factory=set)  # sound ones without their tar
    corrupt: list[dict[str, Any]] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)  # a file of theirs cannot be opened
    orphans: list[str] = field(default_factory=list)  # a tar that is not committed


def _audit_shards(run: files.RunDir) -> _Shards:
    """Checks every byte. Several threads, since hashing releases the interpreter."""
    found, listing = _Shards(), open_store(run).listing()
    whole = listing.committed
    found.orphans.extend(listing.orphans)
    found.lost = {n: f"{files.shard_name(n)}.json has no tar" for n in listing.without_tar}

    def check(shard: int) -> Sidecar | CorruptShard | OSError:
        try:
            return verify_shard(run, shard)
        except (CorruptShard, OSError) as error:
            return error

    screen = console.Console(stderr=True)
    with (
        progress.Progress(console=screen, disable=not screen.is_terminal) as bar,
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
    ):
        results = bar.track(pool.map(check, whole), len(whole), description="shards")
        for shard, result in zip(whole, results, strict=True):
            if isinstance(result, Sidecar):
                found.sidecars[shard] = result
            elif isinstance(result, MisplacedShard):
                found.misplaced[shard] = result.sidecar
            elif isinstance(result, OSError):
                found.lost[shard] = str(result)
            else:
                found.corrupt.append({"shard": shard, "problem": str(result)})
    return found


def _audit_evicted(run: files.RunDir, found: _Shards, told: set[int], first_read: int) -> None:
    """Tells the shards that were deleted for room from those that are lost.

    No checkpoint reads a shard below `first_read`. `told` are those that the events tell of. Record
    and events are read after the shards.
    """
    named = recorded(run)
    for shard, problem in sorted(found.lost.items()):
        if shard in named & told and shard < first_read:
            try:
                found.sidecars[shard] = read_sidecar(run, shard)
                found.evicted.add(shard)
                continue
            except (CorruptShard, OSError) as error:
                problem = str(error)
        elif shard in named:
            problem += ", and it was deleted though " + (
                "a checkpoint reads it" if shard in told else "no event says so"
            )
        found.corrupt.append({"shard": shard, "problem": problem})


def _of_another_run(
    sidecars: dict[int, Sidecar], stream: identity.StreamRecord, fingerprints: dict[str, str]
) -> list[dict[str, Any]]:
    """Sound shards that were not made for this run: other seed, size, teachers or grid."""
    specs = Counter(sidecar.spec for sidecar in sidecars.values())
    usual = max(
        specs, key=lambda spec: (_fits(spec, stream, fingerprints), specs[spec]), default=None
    )
    found = []
    for shard, sidecar in sidecars.items():
        spec = sidecar.spec
        if usual is not None and (spec != usual or not _fits(spec, stream, fingerprints)):
            differs = usual.difference(spec) or "seed, samples_per_shard or teachers of run.json"
            found.append({"shard": shard, "problem": f"made for another run: {differs}"})
    return found


def _fits(spec: ShardSpec, stream: identity.StreamRecord, fingerprints: dict[str, str]) -> bool:
    """Whether a spec agrees with run.json. Fingerprints stand there once teachers are known."""
    teachers = {teacher.name: teacher.fingerprint for teacher in spec.teachers}
    return (
        spec.seed == stream.seed
        and spec.samples_per_shard == stream.samples_per_shard
        and (not fingerprints or teachers == fingerprints)
    )


def _duplicates(shards: _Shards) -> list[dict[str, Any]]:
    """Sample ids that stand in two shards, as ranges."""
    found = []
    named = [*shards.sidecars.items(), *shards.misplaced.items()]
    by_first = sorted(named, key=lambda item: (item[1].ids[0], item[0]))
    for (one, left), (other, right) in pairwise(by_first):
        if right.ids[0] <= left.ids[-1]:
            last = min(left.ids[-1], right.ids[-1])
            found.append({"shards": [one, other], "first_id": right.ids[0], "last_id": last})
    return found


def _quarantined(run: files.RunDir) -> list[str]:
    return list(open_store(run).reasons())


# -----------------------------------------------------------------------------------------------
# Checkpoints


def _audit_checkpoints(run: files.RunDir, origin: dict[str, Any]) -> dict[str, Any]:
    """Those that verify and are of this run, and the others."""
    found: dict[str, Any] = {"verified": [], "kept": [], "teacher": [], "bad": []}
    own = run.teacher.checkpoints
    folders = {"verified": run.checkpoints, "kept": run.checkpoints / manifest.KEPT, "teacher": own}
    for name, parent in folders.items():
        for step, folder in manifest.committed_steps(parent).items():
            problems = manifest.verify(folder)
            if not problems and (
                problem := manifest.foreign(manifest.read_manifest(folder), origin)
            ):
                problems = [f"{folder}: {problem}"]
            if problems and not folder.exists():  # a live run has deleted or moved it
                continue
            if problems:
                found["bad"].append({"step": step, "problems": problems})
            else:
                found[name].append(step)
    return found


# -----------------------------------------------------------------------------------------------
# Records


def _audit_config(run: files.RunDir, record: identity.RunRecord) -> list[str]:
    """Whether config.yaml can be read, and has the settings of run.json."""
    if not run.config.exists():  # a run that no command line has made
        return []
    try:
        config = load_config(run)
        lines = difference(record.identity, identity_of(config), config)
    except ConfigError as error:
        return [str(error)]
    return [f"{run.config.name} differs from {run.identity.name}: {line}" for line in lines]


@dataclass
class _Saves:
    """The checkpoints that are there, and what the events told before that."""

    run: files.RunDir
    told: events.History
    there: list[int]


def _look_at_saves(run: files.RunDir) -> _Saves:
    told = events.read_history(run)
    return _Saves(run, told, manifest.all_steps(run.checkpoints))


def _audit_saves(before: _Saves, told: events.History, is_live: bool) -> list[str]:
    """Whether the checkpoints are those that the events tell of. `told` is newer than that look.

    A live run takes older ones away, then tells so by its newest save.
    """
    name, newest = f"{before.run.root.name}/{LOG}", max(told.told, default=0)
    gone = before.told.checkpoints & told.checkpoints - {*before.there}
    untold = [step for step in before.there if step not in told.told]
    if is_live and any(step > newest for step in untold):
        gone, untold = set(), [step for step in untold if step < newest]
    problems = [
        f"{name} tells of a checkpoint of step {step}, which is not there" for step in sorted(gone)
    ]
    if untold:
        steps = ", ".join(map(str, untold))
        problems.append(
            f"{name} does not tell of the checkpoints of steps {steps}: lines are missing or cut ("
            "a kill between a save and its line is made good by the next start)"
        )
    return problems


def _audit_log(run: files.RunDir, verified: list[int], told: int) -> list[str]:
    """Whether lines were changed, and whether the log is as long as the training that it tells of.

    A checkpoint is written after the lines of its steps.
    """
    name = f"{run.root.name}/{LOG}"
    problems = [
        f"{name} line {number} was changed: it is whole, and no JSON object"
        for number in events.changed_lines(run)
    ]
    if verified and max(verified) > told:
        problems.append(
            f"there is a checkpoint of step {max(verified)}, and {name} tells of {told} steps: "
            "records are missing or cut"
        )
    return problems


# -----------------------------------------------------------------------------------------------
# Consumption

HASH_STEPS = 4096  # steps whose ids are in memory at once


@dataclass
class Consumption:
    """Steps that stand, and what is wrong with how they came."""

    steps: int = 0
    problems: list[str] = field(default_factory=list)


def audit_consumption(course: list[events.Resume | events.Steps], order: Order) -> Consumption:
    """Follows the windows of steps, and restarts that fell back."""
    found = Consumption()
    checked: dict[tuple[int, int], str] = {}
    for event in course:
        if isinstance(event, events.Resume):
            step = event.step
            if step > found.steps:
                found.problems.append(f"resumed at step {step} after only {found.steps} steps")
            found.steps = step
            continue
        first, last = event.first, event.last
        if first != found.steps:
            found.problems.append(f"steps {first}-{last} came after {found.steps} steps")
        if (first, last) not in checked:
            checked[first, last] = planned_sha256(order, first, last + 1)
        if event.ids_sha256 != checked[first, last]:
            found.problems.append(f"steps {first}-{last} read other samples than planned")
        found.steps = last + 1
    return found


def steps_told(course: list[events.Resume | events.Steps]) -> int:
    """Steps done, as the windows say, whatever they hold."""
    last = course[-1] if course else None
    return last.last + 1 if isinstance(last, events.Steps) else last.step if last else 0


def planned_sha256(order: Order, first: int, end: int) -> str:
    """Hexadecimal sha256 of the planned ids of steps first .. end - 1, little-endian int64."""
    digest = hashlib.sha256()
    for start in range(first, end, HASH_STEPS):
        stop = min(end, start + HASH_STEPS)
        ids, _ = order.entries_between(start * order.batch_size, stop * order.batch_size)
        digest.update(ids.astype("<i8").tobytes())
    return digest.hexdigest()
