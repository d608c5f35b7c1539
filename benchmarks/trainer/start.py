"""What it costs to know a teacher, against having it: `describe` and `build_teacher`.

    python benchmarks/trainer/start.py

Makes a teacher of about 131 M weights for every sort of file: a model folder, a SiT's `.pt` and
`.safetensors`, the file of SiT's trainer (weights and average), a diffusers folder where that
package is installed. Each measurement is a process of its own; the two calls take turns. Seconds
are of the wall and of the CPU; MB are the peak of the resident set above that after the imports, in
which pages of a mapped file count too. Writes docs/benchmarks/start.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from safetensors.torch import save_file

from distill.config import ImageSpec
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.networks.files import SECOND_TIME, save_model
from distill.teachers.build import build_teacher, describe
from distill.teachers.config import TEACHERS

IMAGE = ImageSpec(4, 32, 1000)
NETWORK = DiTConfig(patch_size=2, width=768, depth=12, num_heads=12)  # 131,089,936 weights
CALLS = ("describe", "build_teacher")
FIELDS = ("seconds", "cpu_seconds", "megabytes")


def make_files(folder: Path) -> dict[str, tuple[str, str]]:
    """(kind, path) of a teacher by the sort of its file."""
    network = build_network(NETWORK, IMAGE)
    state = network.state_dict()
    save_model(folder / "native", state, NETWORK, IMAGE, {"kind": "teacher"})
    state = {name: value for name, value in state.items() if not name.startswith(SECOND_TIME)}
    torch.save(state, folder / "sit.pt")
    average = {name: value.clone() for name, value in state.items()}
    torch.save({"model": state, "ema": average}, folder / "trainer.pt")
    save_file(state, folder / "sit.safetensors")
    found = {"native": ("native", str(folder / "native"))}
    for name in ("sit.safetensors", "sit.pt", "trainer.pt"):
        found[name] = ("sit", str(folder / name))
    if importlib.util.find_spec("diffusers") is not None:
        import diffusers

        unet = diffusers.UNet2DModel(
            sample_size=32, in_channels=4, out_channels=4, block_out_channels=(256, 512, 512, 512)
        )
        print(f"diffusers: {sum(p.numel() for p in unet.parameters()):,} weights")
        unet.save_pretrained(folder / "diffusers", safe_serialization=True)
        found["diffusers"] = ("diffusers", str(folder / "diffusers"))
    return found


def resident(key: str) -> float:
    """MB of a line of /proc/self/status, such as VmRSS and VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def measure(call: str, kind: str, path: str) -> dict[str, float]:
    """Seconds and MB of one call in this process, which has done nothing before."""
    config = TEACHERS[kind](path=path)
    before = resident("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    if call == "describe":
        describe(config)
    else:
        build_teacher(config, "cpu")
    spent = time.perf_counter() - started, time.process_time() - cpu
    return dict(zip(FIELDS, (*spent, resident("VmHWM") - before), strict=True))


def measure_apart(call: str, kind: str, path: str) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", call, kind, path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> str:
    """The median, and the least and largest value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(Path(folder))
        for _ in range(args.rounds):
            for sort, (kind, path) in files.items():
                for call in CALLS:
                    rows.append({"file": sort, "call": call, **measure_apart(call, kind, path)})
    print(f"\nmedian (least - largest) of {args.rounds} rounds\n")
    print("| file | | `describe` | `build_teacher` | ratio of medians |\n|---|---|---|---|---|")
    for sort in files:
        for field in FIELDS:
            known, built = (
                [row[field] for row in rows if (row["file"], row["call"]) == (sort, call)]
                for call in CALLS
            )
            ratio = statistics.median(built) / max(statistics.median(known), 1e-9)
            print(f"| {sort} | {field} | {spread(known)} | {spread(built)} | {ratio:.1f} |")
    record = {"machine": platform.machine(), "torch": torch.__version__, "rows": rows}
    path = ROOT / "docs" / "benchmarks" / "start.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
