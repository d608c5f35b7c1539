"""What `bowstring status` and `bowstring verify` print."""

import json
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

from rich import console, live, table
from rich.text import Text

from cluster.inspect.status import status
from cluster.state.identity import flatten
from distill.config import ConfigError
from distill.run.files import RunDir


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:,.4g}{unit}"


def render(found: dict[str, Any]) -> console.Group:
    """The status as tables for a terminal."""
    stock, slurm = found["shards"], found["slurm"]
    parts = [_summary(found)]
    if stock["open_leases"]:
        parts.append(_table("open leases", stock["open_leases"]))
    if found["excluded"]:
        parts.append(_table("excluded", found["excluded"]))
    if stock["quarantined"]:
        parts.append(_table("quarantined", stock["quarantined"]))
    if slurm is not None and slurm["jobs"]:
        parts.append(_table("Slurm jobs", [_job(job) for job in slurm["jobs"]]))
    return console.Group(*parts)


def _summary(found: dict[str, Any]) -> table.Table:
    train, stock, checkpoint = found["train"], found["shards"], found["checkpoint"]
    state = "running" if found["live"] else "not running"
    head = table.Table(
        title=f"{found['run']}: {found['stage']}, {state}", title_justify="left", show_header=False
    )
    if found["pretrain"] is not None:
        own = found["pretrain"]
        head.add_row(
            "teacher", f"step {own['step']:,} of {own['max_steps']:,}, loss {_number(own['loss'])}"
        )
    for name, value in _training(train):
        head.add_row(name, value)
    if found["waiting_for"]:
        head.add_row("waits for", found["waiting_for"])
    good = train["goodput"]
    head.add_row("goodput", "-" if good is None else f"{good:.1%} of the training's wall time")
    gone = f", {stock['evicted']:,} of them deleted for room" if stock["evicted"] else ""
    head.add_row(
        "shards",
        f"{stock['committed']:,} of {stock['planned']:,}{gone}, {stock['bytes']:,} bytes on disk",
    )
    head.add_row(
        "production",
        f"{_number(stock['pairs_per_s'])} pairs/s, {_number(stock['pairs_per_s_average'])} on "
        f"average, backlog {stock['backlog']} shards",
    )
    if found["teachers"] is not None and found["teachers"]["target"] is not None:
        teachers = found["teachers"]
        head.add_row("teacher workers", f"{teachers['workers']} of {teachers['target']} wanted")
    if found["left_s"] is not None:
        left = timedelta(seconds=round(found["left_s"]))
        head.add_row(
            "estimated finish",
            f"of {found['stage']}: {datetime.now() + left:%d %b %H:%M}, in {left}",
        )
    head.add_row("last checkpoint", _checkpoint(checkpoint))
    again = found["restarts"]
    head.add_row(
        "restarts", f"trainer {again['trainer']}, teacher workers lost {again['teacher_workers']}"
    )
    head.add_row("disk free", f"{found['disk_free_bytes'] / 1e9:,.1f} GB")
    if found["slurm"] is not None and not found["slurm"]["jobs"]:
        head.add_row("Slurm jobs", found["slurm"].get("unknown", "none left"))
    if found["slurm"] is not None and found["slurm"].get("said"):
        head.add_row("their last error", Text("\n".join(found["slurm"]["said"])))
    return head


def _training(train: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of the student's training, up to where its time goes."""
    step, of, loss = f"{train['step']:,}", f"{train['max_steps']:,}", _number(train["loss"])
    yield "student", f"step {step} of {of}, loss {loss}"
    if train["terms"]:
        yield "loss terms", ", ".join(f"{name} {_number(v)}" for name, v in train["terms"].items())
    ranks = f"{_number(train['world_size'])} ranks"
    yield "training", f"{_number(train['samples_per_s'])} samples/s, {ranks}"
    if train["phases_s"]:
        phases = train["phases_s"].items()
        yield "a step", ", ".join(f"{name} {_number(s * 1e3, ' ms')}" for name, s in phases)
    if train["flops_per_s"] is not None:
        share = "" if train["mfu"] is None else f", {train['mfu']:.1%} of the peak of the devices"
        yield "work", f"{_number(train['flops_per_s'])} FLOP/s by formula{share}"
    if train["peak_memory_bytes"] is not None:
        yield "peak memory", f"{train['peak_memory_bytes']:,} bytes, of the largest rank"
    wait = train["data_wait_fraction"]
    yield "waited for data", "-" if wait is None else f"{wait:.1%} of the time"


def _job(job: dict[str, Any]) -> dict[str, Any]:
    """A job in few columns. It is on nodes, or waits for a reason."""
    shown = {name: job[name] for name in ("kind", "id", "state", "restarts")}
    return {**shown, "left": job["time_left"], "on": job["node_list"] or f"({job['reason']})"}


def _checkpoint(checkpoint: dict[str, Any] | None) -> str:
    if checkpoint is None:
        return "none yet"
    text = (
        f"step {checkpoint['step']}, {checkpoint['checked']} checked"
        if checkpoint["checked"]
        else "none is whole"
    )
    return text + (f"; damaged: {checkpoint['newer_bad']}" if checkpoint["newer_bad"] else "")


def _table(title: str, rows: list[dict[str, Any]]) -> table.Table:
    grid = table.Table(*rows[0], title=title, title_justify="left")
    for row in rows:
        grid.add_row(*(str(value) for value in row.values()))
    return grid


def show(run: RunDir, as_json: bool, every_s: float | None) -> None:
    """Prints the status once, or again every `every_s` seconds until interrupted."""
    if every_s is None:
        found = status(run)
        print(json.dumps(found, indent=1)) if as_json else console.Console().print(render(found))
        return
    if every_s <= 0:
        raise ConfigError(f"--watch {every_s} must be above 0 seconds")
    if as_json:
        while True:
            print(json.dumps(status(run)), flush=True)
            time.sleep(every_s)
    with live.Live(render(status(run)), auto_refresh=False) as screen:
        while True:
            time.sleep(every_s)
            screen.update(render(status(run)), refresh=True)


def _plain(values: list[Any]) -> str:
    """A list without Python's or JSON's signs: findings in lines of their own, numbers in one."""
    if not isinstance(next(iter(values), None), dict):
        return ", ".join(map(str, values)) or "none"
    return "\n".join(", ".join(f"{key} {value[key]}" for key in value) for value in values)


def show_audit(found: dict[str, Any], as_json: bool) -> int:
    """Prints the result of `cluster.inspect.verify.audit`; 1 when anything is lost, doubled or
    corrupt.
    """
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        rows = table.Table(
            show_header=False, title="whole" if found["ok"] else "NOT WHOLE", title_justify="left"
        )
        rows.add_column()
        rows.add_column(overflow="fold")  # a hash is to be copied
        for name, value in flatten(found).items():
            rows.add_row(name, _plain(value) if isinstance(value, list) else str(value))
        console.Console().print(rows)
    return 0 if found["ok"] else 1
