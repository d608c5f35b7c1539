"""Bytes per rank of weights, optimizer and averages at every ZeRO stage, against the formula.

With `train.offload` the formula's two parts, device and host, are added: on a CPU rank both are the
same memory.

    python benchmarks/trainer/memory.py

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
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from cluster.plan.memory import state_bytes
from cluster.trainer.zero import DeepSpeedEngine
from distill.config import OFFLOAD_STAGES, ImageSpec, TrainConfig
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.testing import run_ranks

IMAGE = ImageSpec(1, 8, 10)
NETWORK = DiTConfig(patch_size=2, width=256, depth=4, num_heads=4)
WORLDS, PRECISIONS = (1, 2, 4), ("fp32", "bf16")
PLACES = [(stage, offload) for offload, stages in OFFLOAD_STAGES.items() for stage in stages]
BATCH = 4


def live_bytes() -> int:
    """Bytes of all storages that a tensor in this process holds."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def trained_weights(network: DiTConfig = NETWORK) -> int:
    """Weights of the network that are trained."""
    return sum(p.numel() for p in build_network(network, IMAGE).parameters() if p.requires_grad)


def config_of(stage: int, offload: str, precision: str) -> TrainConfig:
    """The settings of a case."""
    return TrainConfig(batch_size=BATCH, zero_stage=stage, offload=offload, precision=precision)


def engine_bytes(config: TrainConfig, world_size: int, network: DiTConfig) -> int:
    """Bytes that an engine holds after a step."""
    before = live_bytes()
    engine = DeepSpeedEngine(build_network(network, IMAGE), config, torch.device("cpu"))
    share = BATCH // world_size
    x, t, label = torch.randn(share, *IMAGE.shape), torch.rand(share), torch.zeros(share).long()
    engine.backward((engine.student(x, t, t, label) - x).square().mean(), last=True)
    engine.step(0, 1e-4)
    with torch.no_grad():
        engine.target(x, t, t, label)
        engine.evaluation(x, t, t, label)
    del x, t, label
    return live_bytes() - before


def measure_rank(
    rank: int, world_size: int, places: list = PLACES, network: DiTConfig = NETWORK
) -> list[list[int]]:
    """Bytes by place and precision, on this rank."""
    return [
        [engine_bytes(config_of(*at, p), world_size, network) for p in PRECISIONS] for at in places
    ]


def main() -> None:
    weights, rows = trained_weights(), []
    print(f"bytes per trained weight ({weights:,} of them), largest rank: measured (formula)\n")
    print("| precision | stage | offload |" + "".join(f" {w} rank(s) |" for w in WORLDS))
    print("|---|---|---|" + "---|" * len(WORLDS))
    with tempfile.TemporaryDirectory() as folder:
        found = {w: run_ranks(measure_rank, w, Path(folder) / f"{w}") for w in WORLDS}
    for column, precision in enumerate(PRECISIONS):
        for index, (stage, offload) in enumerate(PLACES):
            cells = ""
            for world_size, ranks in found.items():
                measured = max(rank[index][column] for rank in ranks)
                place = config_of(stage, offload, precision)
                formula = sum(state_bytes(weights, place, world_size))
                row = {"precision": precision, "stage": stage, "offload": offload}
                rows.append(row | {"ranks": world_size, "bytes": measured, "formula": formula})
                cells += f" {measured / weights:.2f} ({formula / weights:.2f}) |"
            print(f"| {precision} | {stage} | {offload} |{cells}")
    record = {"trained_weights": weights, "torch": torch.__version__, "rows": rows}
    path = ROOT / "docs" / "benchmarks" / "memory.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
