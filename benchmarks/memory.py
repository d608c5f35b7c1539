"""Bytes per rank of weights, optimizer and averages at every ZeRO stage, against the formula.

    python benchmarks/memory.py

Each rank takes one optimizer step and calls both averages, then adds up every tensor alive that was
not there before the engine: the state at rest, without activations and gradients. Prints a table in
bytes per trained weight and writes docs/benchmarks/memory.json.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from cluster.netcost import state_bytes  # noqa: E402
from cluster.zero import DeepSpeedEngine  # noqa: E402
from distill.config import DiTConfig, ImageSpec, TrainConfig  # noqa: E402
from distill.networks import build_network  # noqa: E402
from distill.testing import run_ranks  # noqa: E402

IMAGE = ImageSpec(1, 8, 10)
NETWORK = DiTConfig(patch_size=2, width=256, depth=4, num_heads=4)
WORLDS, STAGES, PRECISIONS = (1, 2, 4), (0, 1, 2, 3), ("fp32", "bf16")
BATCH = 4


def live_bytes() -> int:
    """Bytes of all storages that a tensor in this process holds."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def trained_weights() -> int:
    """Weights of the network that are trained."""
    return sum(p.numel() for p in build_network(NETWORK, IMAGE).parameters() if p.requires_grad)


def engine_bytes(stage: int, precision: str, world_size: int) -> int:
    """Bytes that an engine holds after a step."""
    before = live_bytes()
    config = TrainConfig(batch_size=BATCH, zero_stage=stage, precision=precision)
    engine = DeepSpeedEngine(build_network(NETWORK, IMAGE), config, torch.device("cpu"))
    share = BATCH // world_size
    x, t, label = torch.randn(share, *IMAGE.shape), torch.rand(share), torch.zeros(share).long()
    engine.backward((engine.student(x, t, t, label) - x).square().mean(), last=True)
    engine.step(0, 1e-4)
    with torch.no_grad():
        engine.target(x, t, t, label)
        engine.evaluation(x, t, t, label)
    del x, t, label
    return live_bytes() - before


def measure_rank(rank: int, world_size: int) -> list[list[int]]:
    """Bytes by stage and precision, on this rank."""
    return [[engine_bytes(s, p, world_size) for p in PRECISIONS] for s in STAGES]


def main() -> None:
    weights, rows = trained_weights(), []
    print(f"bytes per trained weight ({weights:,} of them), largest rank: measured (formula)\n")
    print("| precision | stage |" + "".join(f" {w} rank(s) |" for w in WORLDS))
    print("|---|---|" + "---|" * len(WORLDS))
    with tempfile.TemporaryDirectory() as folder:
        found = {w: run_ranks(measure_rank, w, Path(folder) / f"{w}") for w in WORLDS}
    for column, precision in enumerate(PRECISIONS):
        for stage in STAGES:
            cells = ""
            for world_size, ranks in found.items():
                measured = max(rank[stage][column] for rank in ranks)
                formula = state_bytes(weights, stage, precision, world_size)
                row = {"precision": precision, "stage": stage, "ranks": world_size}
                rows.append(row | {"bytes": measured, "formula": formula})
                cells += f" {measured / weights:.2f} ({formula / weights:.2f}) |"
            print(f"| {precision} | {stage} |{cells}")
    record = {"trained_weights": weights, "torch": torch.__version__, "rows": rows}
    path = ROOT / "docs" / "benchmarks" / "memory.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
