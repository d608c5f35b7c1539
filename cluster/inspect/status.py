"""Where a run stands, from its files only, so it works while Ray is down. Needs no torch."""

import shutil
import time
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from cluster.plan.stream import stream_plan
from cluster.settings import file, schema
from cluster.slurm.jobs import SlurmError, last_words, read_ids, read_jobs
from cluster.state import cursor, evicted, lock
from distill.checkpoint.manifest import CheckpointError, committed_steps, read_manifest, verify
from distill.config import ConfigError
from distill.data.sidecar import Reason
from distill.data.stores.store import committed, open_store
from distill.report.cost import goodput
from distill.run import events, files, identity, measured, records

# Checkpoints up to this size are hashed; of larger ones only sizes are compared.
FULL_CHECK_BYTES = 200_000_000
SPEED_WINDOW_S = 60.0  # pairs/s is over the commits of the last minute of production


def training(
    run: files.RunDir, history: events.History, max_steps: int, live: bool
) -> dict[str, Any]:
    """Step, loss and speed of the training in a run directory, from its metrics."""
    metrics = list(measured.read_metrics(run))
    last = metrics[-1] if metrics else measured.Metrics(0)
    goes_on = live and last.step < max_steps
    return {
        "step": last.step,
        "max_steps": max_steps,
        "loss": last.loss,
        "terms": last.terms,
        "lr": last.lr,
        "samples_per_s": last.samples_per_s,
        "step_s": last.step_s,
        "data_wait_fraction": last.data_wait_fraction,
        "phases_s": last.phases_s,
        "flops_per_s": last.flops_per_s,
        "mfu": last.mfu,
        "peak_memory_bytes": last.peak_memory_bytes,
        "goodput": goodput(history, metrics, time.time() if goes_on else None),
        "world_size": last.world_size if metrics else None,
        "seconds_since": round(time.time() - last.time, 1) if metrics else None,
    }


def open_leases(history: events.History, now: float) -> list[dict[str, Any]]:
    """Leases without an end: no commit, failure, expiry, nor a worker that left."""
    return [
        {"shard": shard, "worker": lease.worker, "age_s": round(now - lease.time, 1)}
        for (shard, _), lease in sorted(history.leases.items())
    ]


def pairs_per_s(
    history: events.History, samples_per_shard: int, now: float | None = None
) -> float | None:
    """Speed of production over the last minute, or as far back as the last shard took.

    Up to `now`; by default up to the last commit, when no shard is being made.
    """
    commits = [end for _, end in history.spans]
    if not commits:
        return None
    times = [*commits, *history.joins]
    end = commits[-1] if now is None else now
    before = [t for t in times if t <= end - SPEED_WINDOW_S and t < commits[-1]]
    start = max(before, default=min(times))
    num = sum(1 for t in commits if start < t <= end)
    return round(num * samples_per_shard / (end - start), 2) if end > start else None


def average_pairs_per_s(history: events.History, samples_per_shard: int) -> float | None:
    """Speed of production while a teacher worker was at work, up to the last commit."""
    if not history.spans:
        return None
    end = history.spans[-1][1]
    changes = [*(change for change in history.changes if change[0] < end), (end, 0, 0)]
    at_work_s = sum(max(0.0, b[0] - a[0]) for a, b in pairwise(changes) if a[2] > 0)
    made = len(history.spans) * samples_per_shard
    return round(made / at_work_s, 2) if at_work_s > 0 else None


def seconds_left(stage: str, found: dict[str, Any], samples_per_shard: int) -> float | None:
    """Until the stage at work is done, at the speed of its last minute; None while that is unknown.

    Training ends when its steps are done and the last shard is made.
    """
    stock = found["shards"]
    parts = [training_left_s(found["train"])]
    if stage == "pretrain":
        parts = [training_left_s(found["pretrain"])]
    elif stock["pairs_per_s"]:
        missing = stock["planned"] - stock["committed"]
        parts.append(missing * samples_per_shard / stock["pairs_per_s"])
    known = [seconds for seconds in parts if seconds is not None]
    return round(max(known), 1) if known and stage in ("pretrain", "generate", "train") else None


def training_left_s(found: dict[str, Any]) -> float | None:
    """Seconds of the steps to come; None before the first was timed."""
    steps, step_s = found["max_steps"] - found["step"], found["step_s"]
    return None if step_s is None else float(max(0, steps) * step_s)


def shards(
    run: files.RunDir, config: schema.RunConfig, step: int, history: events.History, live: bool
) -> dict[str, Any]:
    """Committed and planned shards, backlog, leases, quarantines and bytes on disk."""
    plan, trajectory = stream_plan(config), config.trajectory
    found = committed(run)
    gone = evicted.read_evicted(run, found)
    leases = [x for x in open_leases(history, time.time()) if x["shard"] not in found]
    first = plan.order.newest_block(step) * trajectory.block_shards
    unread = [shard for shard in found if shard >= first]
    return {
        "committed": len(found) + len(gone),
        "planned": plan.shards,
        "evicted": len(gone),
        "samples": (len(found) + len(gone)) * trajectory.samples_per_shard,
        "pairs_per_s": pairs_per_s(
            history, trajectory.samples_per_shard, time.time() if live and leases else None
        ),
        "pairs_per_s_average": average_pairs_per_s(history, trajectory.samples_per_shard),
        "backlog": len(unread) if step < config.train.max_steps else 0,
        "ready_ahead": trajectory.ready_ahead,
        "open_leases": leases,
        "quarantined": quarantined(run),
        "bytes": sum(found.values()),
        "max_bytes": trajectory.max_bytes,
    }


def quarantined(run: files.RunDir) -> list[dict[str, Any]]:
    """Shards that were set aside, each with its reason."""
    found = []
    for folder, content in open_store(run).reasons().items():
        try:
            note = records.parse_record(Reason, content)
            found.append({"shard": note.shard, "reason": note.reason})
        except records.RecordError as error:
            reason = f"the reason in quarantine/{folder} {error}"
            found.append({"shard": folder.partition("-")[0], "reason": reason})
    return found


def last_verified(run: files.RunDir) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, how it was checked, and the steps of newer ones that are
    not.
    """
    bad = []
    for step, folder in reversed(committed_steps(run.checkpoints).items()):
        try:
            named = read_manifest(folder).files
            sizes_fit = all((folder / n).stat().st_size == f.bytes for n, f in named.items())
        except (CheckpointError, ConfigError, OSError):
            bad.append(step)
            continue
        small = sizes_fit and sum(entry.bytes for entry in named.values()) <= FULL_CHECK_BYTES
        if not sizes_fit or (small and verify(folder)):
            bad.append(step)
            continue
        return {"step": step, "checked": "sha256" if small else "sizes", "newer_bad": bad}
    return {"step": None, "checked": None, "newer_bad": bad} if bad else None


def waiting_for(run: files.RunDir, at_work: events.History) -> str | None:
    """What the trainer waits for now: nodes, or data in its own words; None when it does not.

    `at_work` is the history of the training at work.
    """
    if at_work.waits_for_nodes:
        return "nodes with room for its ranks"
    return cursor.read_cursor(run).waiting_for or None


def restarts(history: events.History) -> dict[str, int]:
    """How often the trainer group started again, and how many teacher workers were lost."""
    return {"trainer": max(0, len(history.starts) - 1), "teacher_workers": history.lost}


def excluded(history: events.History) -> list[dict[str, str]]:
    """Nodes and GPUs that take no more work, each with its last error."""
    return [
        {"node": event.node, "gpu": event.gpu or "all", "reason": event.reason}
        for event in history.excluded.values()
    ]


def slurm_jobs(run: files.RunDir) -> dict[str, Any] | None:
    """The run's Slurm jobs, or why they cannot be told; None when it was never submitted."""
    said: list[str] = []
    try:
        ids = read_ids(run)
        if not ids:
            return None
        said = last_words(run, ids)
        return {"jobs": [asdict(job) for job in read_jobs(run)], "said": said}
    except (ConfigError, SlurmError) as error:
        return {"jobs": [], "unknown": str(error), "said": said}


def stage_of(run: files.RunDir, config: schema.RunConfig, found: dict[str, Any]) -> str:
    """pretrain, generate, train, evaluate or finished: the first that is not done."""
    step = found["train"]["step"]
    if step >= config.train.max_steps:
        fresh = run.results.exists() and run.results.stat().st_mtime >= run.metrics.stat().st_mtime
        return "finished" if fresh else "evaluate"
    if step > 0:
        return "train"
    own = found["pretrain"]
    if own is not None and own["step"] < own["max_steps"] and not found["shards"]["committed"]:
        return "pretrain"
    return "generate"


def status(run: files.RunDir) -> dict[str, Any]:
    """Everything `bowstring status` says, ready for JSON.

    Raises:
        ConfigError: it is no run, or a newer version wrote it.
    """
    identity.read_record(run)  # a newer version's files are not known here
    config = file.load_config(run)
    history = events.read_history(run)
    live = lock.is_live(run)
    found: dict[str, Any] = {
        "run": config.run.name,
        "dir": str(run.root),
        "objective": config.objective.name,
        "live": live,
        "pretrain": None,
        "train": training(run, history, config.train.max_steps, live),
    }
    pretraining = events.read_history(run.teacher)
    if schema.own_teachers(config):
        steps = config.pretrain.train.max_steps
        found["pretrain"] = training(run.teacher, pretraining, steps, live)
    found["shards"] = shards(run, config, found["train"]["step"], history, live)
    workers = {"target": history.target, "workers": len(history.workers)}
    found["teachers"] = workers if live else None
    found["excluded"] = excluded(history)
    found["checkpoint"] = last_verified(run)
    found["restarts"] = restarts(history)
    found["disk_free_bytes"] = shutil.disk_usage(run.root).free
    found["results"] = run.results.exists()
    found["slurm"] = slurm_jobs(run)
    stage = stage_of(run, config, found)
    at_work = pretraining if stage == "pretrain" else history
    found["waiting_for"] = waiting_for(run, at_work) if live else None
    size = config.trajectory.samples_per_shard
    found["left_s"] = seconds_left(stage, found, size) if live else None
    return {"stage": stage, **found}
