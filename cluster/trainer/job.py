"""What a trainer group is told, as plain settings that travel to every rank. Needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from cluster.settings.schema import RunConfig
from distill.config import TrainConfig
from distill.data.sidecar import ShardSpec
from distill.run.files import RunDir


@dataclass(frozen=True)
class TrainJob:
    """One training: of the run's own teacher, or of the student.

    Attributes:
        stage: "pretrain" or "train".
        config: the run's configuration, with absolute paths.
        spec: what every shard shares; None for "pretrain".
        scratch: a folder all nodes see, for Ray Train's own files and for `stop` and `final`.
        config_hash: the hash of run.json, for the manifests.
    """

    stage: str
    config: RunConfig
    spec: ShardSpec | None
    scratch: Path
    config_hash: str

    @property
    def run(self) -> RunDir:
        """Where this stage keeps its checkpoints, events and metrics."""
        run = self.config.files
        return run.teacher if self.stage == "pretrain" else run

    @property
    def train(self) -> TrainConfig:
        """How this stage is optimised."""
        return self.config.pretrain.train if self.stage == "pretrain" else self.config.train

    @property
    def exports(self) -> list[int]:
        """Steps after which the weights are exported as a model, in order."""
        if self.stage == "train":
            return []
        extra = [step for step in self.config.pretrain.export_steps if step < self.train.max_steps]
        return sorted({*extra, self.train.max_steps})

    @property
    def stop(self) -> Path:
        """The supervisor makes this file to ask the ranks for a checkpoint and an early end."""
        return stop_file(self.scratch)

    @property
    def final(self) -> Path:
        """A rank writes here, in JSON, an error that a restart would only repeat."""
        return self.scratch / f"{self.stage}-error.json"


def stop_file(scratch: Path) -> Path:
    """The file that asks ranks to save and end."""
    return scratch / "stop"
