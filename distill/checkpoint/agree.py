"""What the ranks of a training find out together: whether any failed, and what verifies.

Reading a large checkpoint takes minutes for one process, so every rank reads a share of its files.
All calls are collective: every rank makes them, and every rank gets the same answer or error.
"""

from pathlib import Path

import torch

from distill.checkpoint import manifest
from distill.engine.engine import Peers
from distill.run import files

TEXT_BYTES = 1024  # of what one rank tells the others
REASONS = 3  # that an error names; where all ranks fail, they fail alike


def gather_texts(ranks: Peers, text: str) -> list[str]:
    """`text` of all ranks, in rank order, each cut to TEXT_BYTES. Collective."""
    data = text.encode()[:TEXT_BYTES].ljust(TEXT_BYTES, b"\0")
    rows = ranks.gather(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in rows]


def raise_together(ranks: Peers, failure: str, kind: type[Exception]) -> None:
    """Raises `kind` on all ranks, with the reasons of those that failed. Collective.

    `failure` is why this rank failed, "" when it did not.
    """
    if not ranks.any(bool(failure)):
        return
    reasons = list(dict.fromkeys(text for text in gather_texts(ranks, failure) if text))
    more = f"; and {len(reasons) - REASONS} more" if len(reasons) > REASONS else ""
    raise kind("; ".join(reasons[:REASONS]) + more)


def verify_together(folder: Path, ranks: Peers) -> list[str]:
    """Everything wrong with a checkpoint, the same list on every rank. Collective.

    Rank r of W starts at file r + W/2. After a save that is one that another rank wrote, and on
    several nodes of equally many ranks a rank of another node. So the bytes come from the file
    system, not from the memory of the node that wrote them.
    """
    world_size = ranks.world_size
    problems = manifest.verify(folder, (ranks.rank + world_size // 2) % world_size, world_size)
    try:
        content = files.sha256_file(folder / manifest.MANIFEST)
    except OSError:
        content = "none"
    said = gather_texts(ranks, "\n".join([content, *problems]))
    told = [text.splitlines() for text in said]
    found = [problem for _, *theirs in told for problem in theirs]
    if not found and len({seen for seen, *_ in told}) > 1:  # a file system that lags behind
        found = [f"{folder}: ranks see different manifests"]
    return list(dict.fromkeys(found))


def agreed_latest(checkpoints: Path, ranks: Peers) -> int:
    """Step of the newest checkpoint that verifies; 0 when there is none at all. Collective.

    Rank 0 says which ones there are. The world size may be another than the one that wrote them.

    Raises:
        CheckpointError: on every rank: checkpoints exist and none verifies.
    """
    there = list(manifest.committed_steps(checkpoints)) if ranks.rank == 0 else []
    problems: list[str] = []
    while step := _from_first(ranks, there.pop() if there else 0):
        found = verify_together(checkpoints / manifest.step_name(step), ranks)
        if not found:
            return step
        problems += found
    if problems:
        manifest.refuse(problems)
    failure = ""
    if ranks.rank == 0:
        try:
            manifest.check_none_kept(checkpoints)
        except manifest.CheckpointError as error:
            failure = str(error)
    raise_together(ranks, failure, manifest.CheckpointError)
    return 0


def _from_first(ranks: Peers, value: int) -> int:
    """`value` of rank 0. Collective."""
    return int(ranks.gather(torch.tensor(value))[0])
