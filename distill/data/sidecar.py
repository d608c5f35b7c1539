"""The ledger of trajectory shards is the set of their sidecars. No torch, no webdataset.

    00000017.tar    the samples          published first, complete and flushed to disk
    00000017.json   its sidecar          published second: now the shard is committed

A shard is committed when the sidecar and the tar that it means exist. The sidecar holds the size
and sha256 of the tar and of itself, so every byte of both can be proven. What a sidecar says stands
here; `distill.data.stores.store` lists, reads and changes those of a run.
"""

import json
import re
from dataclasses import asdict, dataclass, field

from distill.config import ConfigError, ImageSpec
from distill.data.config import TrajectoryConfig
from distill.run import files, records
from distill.teachers.config import TeacherConfig

FORMAT = 1
OPTIONAL = {"tar": "", "batch_size": 0}  # keys of a sidecar that are left out at this value
SHARD_NAME = re.compile(r"\d{8,}")
TAR_NAME = re.compile(r"(?P<shard>\d{8,})\.(?:[0-9a-f]{16}\.)?tar")  # the middle: of one producer


class CorruptShard(RuntimeError):
    """A shard whose bytes are not those that were committed. The message says which and how."""


class MisplacedShard(CorruptShard):
    """A sound sidecar under the name of another shard."""

    def __init__(self, message: str, sidecar: "Sidecar") -> None:
        super().__init__(message)
        self.sidecar = sidecar


class ForeignShard(ConfigError):
    """A sound shard of another grid, teacher or seed. It is refused, not set aside."""


# -----------------------------------------------------------------------------------------------
# What shards say of themselves


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher and how its ODE was solved."""

    name: str
    fingerprint: str  # sha256 of the weights
    solver: str
    steps: int
    guidance: float


@dataclass(frozen=True)
class ShardSpec:
    """What every shard of a run has in common; with the shard's number it determines its content.

    Attributes:
        seed: the run's seed.
        times: of the stored states, from 0 to 1.
        dtype: "float16", "bfloat16" or "float32", as stored (`distill.data.layout`).
        store_noise: whether state 0 is stored. If not, the reader makes it from the sample id, in
            float32, so without the rounding of the stored dtype.
        image: (C, H, W).
        samples_per_shard: number of consecutive ids in a shard.
        teachers: weakest first.
        store_velocity: whether the velocities follow the states, at all of `times`.
    """

    seed: int
    times: tuple[float, ...]
    dtype: str
    store_noise: bool
    image: tuple[int, int, int]
    samples_per_shard: int
    teachers: tuple[TeacherSpec, ...]
    store_velocity: bool = False

    @property
    def num_states(self) -> int:
        """Stored states of a trajectory: the noise only if it is stored."""
        return len(self.times) - (0 if self.store_noise else 1)

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """Shape of what is stored of a sample: (M, states and then velocities, C, H, W)."""
        velocities = len(self.times) if self.store_velocity else 0
        return (len(self.teachers), self.num_states + velocities, *self.image)

    def ids(self, shard: int) -> range:
        """The sample ids of a shard."""
        return range(shard * self.samples_per_shard, (shard + 1) * self.samples_per_shard)

    def difference(self, other: "ShardSpec") -> str:
        """How `other` differs from this: "times: [0.0, 1.0] instead of [0.0, 0.5, 1.0], .."."""
        ours, theirs = asdict(self), asdict(other)
        return ", ".join(
            f"{name}: {json.dumps(theirs[name])} instead of {json.dumps(ours[name])}"
            for name in ours
            if ours[name] != theirs[name]
        )


def shard_spec(
    seed: int,
    image: ImageSpec,
    trajectory: TrajectoryConfig,
    teachers: dict[str, TeacherConfig],
    fingerprints: dict[str, str],
) -> ShardSpec:
    """The spec of a run's shards. `fingerprints` holds the sha256 of every teacher's weights."""
    return ShardSpec(
        seed=seed,
        times=tuple(k / trajectory.grid for k in trajectory.points),
        dtype=trajectory.dtype,
        store_noise=trajectory.store_noise,
        store_velocity=trajectory.store_velocity,
        image=image.shape,
        samples_per_shard=trajectory.samples_per_shard,
        teachers=tuple(
            TeacherSpec(name, fingerprints[name], t.solver, t.steps, t.guidance)
            for name, t in teachers.items()
        ),
    )


@dataclass(frozen=True)
class Sidecar:
    """The record of one shard.

    Attributes:
        shard: its number; it holds the ids of `spec.ids(shard)`, in order.
        spec: what it shares with the other shards of the run.
        num_bytes, sha256: of the tar.
        labels: class of each sample, -1 for "none".
        offsets: where the content of each sample's states.npy starts in the tar.
        member_bytes: its length, the same for every sample.
        nfe: evaluations of the guided velocity, summed over samples and teachers.
        forwards: samples that went through a network.
        seconds: time it took to make.
        producer: who made it.
        tar: name of the tar next to the sidecar; "" is the shard's number.
        batch_size: samples that were integrated at once; 0 in a shard from before it was noted.
    """

    shard: int
    spec: ShardSpec
    num_bytes: int
    sha256: str
    labels: tuple[int, ...]
    offsets: tuple[int, ...]
    member_bytes: int
    nfe: int
    forwards: int
    seconds: float
    producer: str
    tar: str = ""
    batch_size: int = 0

    @property
    def ids(self) -> range:
        """Sample ids."""
        return self.spec.ids(self.shard)

    @property
    def tar_name(self) -> str:
        """Name of the tar."""
        return self.tar or f"{files.shard_name(self.shard)}.tar"

    def to_bytes(self) -> bytes:
        """The file's content: one JSON object, its own sha256 included."""
        tree = {"format": FORMAT, **asdict(self)}
        tree["bytes"] = tree.pop("num_bytes")
        for key in [key for key in OPTIONAL if not tree[key]]:
            del tree[key]
        if not tree["spec"]["store_velocity"]:
            del tree["spec"]["store_velocity"]
        tree |= {"count": len(self.ids), "first_id": self.ids[0], "last_id": self.ids[-1]}
        tree["sidecar_sha256"] = records.tree_sha256(tree)
        return (json.dumps(tree) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes) -> "Sidecar":
        """The sidecar in a file's content.

        Raises:
            ValueError, KeyError, TypeError: it is none, or not one byte for byte.
        """
        tree = json.loads(data)
        if tree.pop("sidecar_sha256") != records.tree_sha256(tree):
            raise ValueError("its own sha256 does not match")
        if tree["format"] != FORMAT:
            raise ValueError(f"format {tree['format']} is not known")
        tree["num_bytes"] = tree["bytes"]
        tree["spec"] = records.known_part(ShardSpec, tree["spec"])
        found = records.record_of(Sidecar, records.known_part(Sidecar, tree))
        ends = [offset + found.member_bytes for offset in found.offsets]
        if not len(found.ids) == len(found.labels) == len(ends) or max(ends) > found.num_bytes:
            raise ValueError("its index does not fit its size and count")
        if not TAR_NAME.fullmatch(found.tar_name):
            raise ValueError(f"{found.tar_name!r} is no name of a tar")
        return found

    @staticmethod
    def parse(place: str, shard: int, data: bytes) -> "Sidecar":
        """The sidecar of a shard from its bytes. `place` names it in messages, here and below.

        Raises:
            CorruptShard: it is not what was written, or of another shard.
        """
        try:
            found = Sidecar.from_bytes(data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptShard(f"sidecar of {place}: {error}") from error
        if found.shard != shard:
            raise MisplacedShard(f"{place}: its sidecar is of shard {found.shard}", found)
        return found

    def check_size(self, place: str, num_bytes: int) -> None:
        """Raises CorruptShard unless `num_bytes` is the size the tar was committed with."""
        if num_bytes != self.num_bytes:
            raise CorruptShard(f"{place}: {num_bytes} bytes instead of {self.num_bytes}")

    def check_sha256(self, place: str, sha256: str) -> None:
        """Raises CorruptShard unless `sha256` is that of the tar that was committed."""
        if sha256 != self.sha256:
            raise CorruptShard(f"{place}: sha256 differs from the sidecar")

    def check_spec(self, place: str, spec: ShardSpec) -> None:
        """Raises ForeignShard unless the shard was made for `spec`."""
        if self.spec != spec:
            raise ForeignShard(
                f"{place} was made for another run "
                f"({spec.difference(self.spec)}); it is left as it is and not trained on. Move "
                "foreign shards out of the folder, or take another run.name"
            )


@dataclass(frozen=True)
class Reason:
    """Why a shard lies in quarantine/, as its reason.json says."""

    shard: int
    reason: str
    traceback: str | None = None  # of a worker, where the shard cannot be made
    time: float = field(default_factory=records.now)  # Unix time in seconds


@dataclass(frozen=True)
class Listing:
    """What lies where the shards of a run lie.

    Attributes:
        committed: bytes of the tar of every committed shard, by number.
        orphans: names of tars without a sidecar that means them: in the making, or of a producer
            that was killed.
        without_tar: shards with a sidecar whose tar is missing: evicted, or lost.
    """

    committed: dict[int, int]
    orphans: tuple[str, ...]
    without_tar: tuple[int, ...]
