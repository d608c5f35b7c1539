"""A run of the product in a process of its own: `python stream_run.py RUN STAGE [SECONDS]`.

The stage is one of `cluster.supervisor.stages`. With SECONDS every evaluation of a teacher's
velocity takes so long and nearly no computer: the teacher stands for one on a device of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch

from cluster.plan.stream import stream_plan
from cluster.pool import pool
from cluster.pool.worker import TeacherWorker
from cluster.settings.file import load_config, save_config
from cluster.settings.hydra import compose
from cluster.supervisor import runner, stages
from distill.config import ImageSpec
from distill.networks.build import build_network
from distill.networks.files import save_model
from distill.run.events import History, read_history
from distill.run.files import RunDir
from distill.run.measured import read_metrics

DEADLINE_S = 900.0


class RemoteWorker(TeacherWorker):
    """A teacher worker whose evaluations take time elsewhere."""

    seconds = 0.0

    def _beat(self) -> None:
        super()._beat()
        time.sleep(self.seconds)


class Run:
    """A run of `experiment=digits` with other settings, and what its files tell of it."""

    def __init__(self, folder: Path, settings: list[str]) -> None:
        self.files = RunDir(folder)
        folder.mkdir(parents=True)
        (self.config,) = compose(["experiment=digits", f"run.dir={folder}", *settings])
        save_config(self.files, self.config)
        self._began = 0.0

    @property
    def blocks(self) -> int:
        """Blocks of the stream."""
        return stream_plan(self.config).blocks

    def start(self, stage: str, seconds: float = 0.0) -> subprocess.Popen[bytes]:
        """Starts the supervisor of a stage."""
        command = [sys.executable, __file__, str(self.files.root), stage, str(seconds)]
        self._began = self._began or time.time()
        with (self.files.root / "log.txt").open("a") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """Waits for the end, which must be a good one."""
        if process.wait(DEADLINE_S) != 0:
            raise RuntimeError((self.files.root / "log.txt").read_text())

    def first_gradient_s(self) -> float:
        """Seconds from the first start to the first logged step."""
        return next(read_metrics(self.files)).time - self._began

    def history(self) -> History:
        """Teacher workers and shards over time."""
        return read_history(self.files)


def mixture(path: Path, components: int = 10) -> list[str]:
    """Settings of a closed-form teacher of digits' shape, whose file is written."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(components, 64, generator=generator).clamp(-1, 1).tolist()
    content = {"shape": [1, 8, 8], "means": means, "stds": [0.3] * components}
    path.write_text(json.dumps(content))
    return [
        "data.num_classes=0",
        "~teacher",
        "+teacher={only: {kind: analytic, path: " + str(path) + ", steps: 8}}",
    ]


def network(path: Path) -> list[str]:
    """Settings of a teacher of `experiment=digits`, as trained there but for its weights.

    They are random and small: what a step costs does not depend on them.
    """
    image = ImageSpec(1, 8, 10)
    (config,) = compose(["experiment=digits"])
    model = build_network(config.student, image, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("s_embedder"):
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    save_model(path, model.state_dict(), config.student, image, {"kind": "teacher"})
    teacher = f"{{kind: native, path: {path}, steps: 16, guidance: 1.5}}"
    return ["~teacher", "+teacher={only: " + teacher + "}"]


if __name__ == "__main__":
    RemoteWorker.seconds = float(sys.argv[3])
    if RemoteWorker.seconds:
        pool.TeacherWorker = RemoteWorker  # type: ignore[misc]
    config = load_config(RunDir(Path(sys.argv[1])))
    sys.exit(runner.supervise(config, vars(stages)[sys.argv[2]]))
