"""The files of a run: one place that knows their names. Standard library only.

A run directory is the whole truth about a run; every process can be killed and the run goes on
from its files.
"""

from dataclasses import dataclass
from pathlib import Path


def shard_name(shard: int) -> str:
    """What the names of a shard's files begin with."""
    return f"{shard:08d}"


@dataclass(frozen=True)
class RunDir:
    """Paths of a run below `root` (docs/formats.md).

    Attributes:
        root: the run's folder.
        location: where its shards lie: a folder, a URL, or "" for `shards` below `root`
            (`distill.data.stores.store`).
    """

    root: Path
    location: str = ""

    @property
    def identity(self) -> Path:
        """run.json: what determines data and weights."""
        return self.root / "run.json"

    @property
    def config(self) -> Path:
        """config.yaml: the composed configuration of the last start."""
        return self.root / "config.yaml"

    @property
    def shards(self) -> Path:
        """Committed trajectory shards and their sidecars, where they lie in a folder."""
        return Path(self.location) if self.location else self.root / "shards"

    def tar(self, shard: int) -> Path:
        """The tar of a shard in a local folder."""
        return self.shards / f"{shard_name(shard)}.tar"

    def sidecar(self, shard: int) -> Path:
        """The sidecar of a shard in a local folder."""
        return self.shards / f"{shard_name(shard)}.json"

    @property
    def cache(self) -> Path:
        """Copies of shards that lie in an object store."""
        return self.root / "cache"

    @property
    def evicted(self) -> Path:
        """evicted.json: shards that were deleted for room."""
        return self.root / "evicted.json"

    @property
    def quarantine(self) -> Path:
        """Bad shards, each with its reason."""
        return self.root / "quarantine"

    @property
    def checkpoints(self) -> Path:
        """Committed checkpoints and the `latest` pointer."""
        return self.root / "checkpoints"

    @property
    def events(self) -> Path:
        """events.jsonl: what happened."""
        return self.root / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl: loss terms and speed by step."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files of TensorBoard, a copy of the metrics."""
        return self.root / "tensorboard"

    @property
    def wandb(self) -> Path:
        """W&B's own files, and the run's id there."""
        return self.root / "wandb"

    @property
    def profile(self) -> Path:
        """Traces of a few steps by torch.profiler."""
        return self.root / "profile"

    @property
    def hangs(self) -> Path:
        """Where the ranks stood that took no step for too long."""
        return self.root / "hangs"

    @property
    def cursor(self) -> Path:
        """cursor.json: the block the trainer reads."""
        return self.root / "cursor.json"

    @property
    def target(self) -> Path:
        """target.json: how many teacher workers a live run shall have."""
        return self.root / "target.json"

    @property
    def results(self) -> Path:
        """results.json: the evaluation."""
        return self.root / "results.json"

    @property
    def report(self) -> Path:
        """report.html."""
        return self.root / "report.html"

    @property
    def samples(self) -> Path:
        """PNG grids and npz files of samples."""
        return self.root / "samples"

    @property
    def slurm(self) -> Path:
        """What `bowstring submit` writes: scripts, logs and ids of the Slurm jobs."""
        return self.root / "slurm"

    @property
    def lock(self) -> Path:
        """Held by the supervisor of a live run."""
        return self.root / "run.lock"

    @property
    def trainer_lock(self) -> Path:
        """Held by rank 0 of a live trainer group."""
        return self.root / "trainer.lock"

    @property
    def teacher(self) -> "RunDir":
        """The pre-training of a teacher is a run of its own, inside."""
        return RunDir(self.root / "teacher")

    def model(self, step: int) -> Path:
        """Folder of the model exported at `step`."""
        return self.root / "models" / f"step_{step:08d}"
