"""What a job takes of a node, and how many nodes it takes: pure arithmetic. No torch, no ray.

    most = min(ranks that the GPUs of a node take, ranks that its cores take)
    nodes = ceil(ranks / most),  per node = ceil(ranks / nodes)

The same for teacher workers, whose nodes are tasks of an array. A number of the settings has the
last word, and is refused where a node cannot hold it.
"""

import math
import re
from dataclasses import dataclass, replace

from cluster.plan import estimate, memory
from cluster.settings import schema
from distill.config import ConfigError, check
from distill.networks.cost import network_cost

SLACK = 2.0  # a time limit in assumed hours: no more is known of a device before it runs
LEAST_S, ROUND_S, DAY_S = 3600, 1800, 86400
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


# -----------------------------------------------------------------------------------------------
# Slurm's words for numbers


def num_bytes(text: str) -> int | None:
    """Bytes of "60G"; without a unit it is in MiB. None for other words."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)B?", text, re.IGNORECASE)
    return int(float(found[1]) * UNITS[found[2].upper() or "M"]) if found else None


def seconds(text: str) -> int | None:
    """Seconds of a time limit such as 90, 90:00, 2:30:00, 1-12 or 1-00:00:00; None for other
    words.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        return None
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None or third is not None:  # hours first
        return (days or 0) * DAY_S + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    return (first or 0) * 60 + (second or 0)


def limit_words(limit_s: int) -> str:
    """D-HH:MM:SS."""
    hours, rest = divmod(limit_s % DAY_S, 3600)
    return f"{limit_s // DAY_S}-{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"


# -----------------------------------------------------------------------------------------------
# A node


@dataclass(frozen=True)
class Shape:
    """What a node has, as far as that is known.

    Attributes:
        gpus, cpus, memory: how many, and bytes. None: not known.
        limit_s: the longest time limit of its partition; None: not known, or none.
        where: which nodes those are, in words.
    """

    gpus: int | None = None
    cpus: int | None = None
    memory: int | None = None
    limit_s: int | None = None
    where: str = "a node"

    def words(self) -> str:
        """What it has."""
        known = [
            f"{self.gpus} GPUs" if self.gpus is not None else "",
            f"{self.cpus} cores" if self.cpus is not None else "",
            f"{self.memory / 2**30:.4g} GiB" if self.memory is not None else "",
        ]
        return ", ".join(word for word in known if word) or "what is not known"


@dataclass(frozen=True)
class Share:
    """What a job of one kind takes.

    Attributes:
        nodes: at once; of an array those that its throttle lets run.
        most_nodes: that it may grow to.
        per_node: ranks or workers.
        cpus, gpus: of each node.
    """

    nodes: int
    most_nodes: int
    per_node: int
    cpus: int
    gpus: int


def gpus_of(workers: schema.WorkersConfig, count: int) -> int:
    """GPUs that hold `count` workers. Ray splits no worker's share between two."""
    each = workers.gpus_per_worker
    return math.ceil(count * each) if each >= 1 or each == 0 else -(-count // int(1 / each + 1e-9))


def most_on(workers: schema.WorkersConfig, wanted: int, shape: Shape, key: str) -> int | None:
    """Workers that a node takes at most; None where that is not known.

    Raises:
        ConfigError: none; or fewer than are `wanted` there and its GPUs take, for want of cores.
    """
    gpus, cpus = workers.gpus_per_worker, workers.cpus_per_worker
    by_cores = None
    if shape.cpus is not None and cpus > 0:
        by_cores = math.floor(shape.cpus / cpus + 1e-9)
        check(
            by_cores > 0,
            f"{key}.cpus_per_worker={cpus:g} is more than {shape.where} has, {shape.cpus} cores",
        )
    if not gpus or shape.gpus is None:
        return None if gpus else by_cores
    by_gpus = shape.gpus // math.ceil(gpus) if gpus >= 1 else shape.gpus * int(1 / gpus + 1e-9)
    check(
        shape.gpus > 0,
        f"{key}.gpus_per_worker={gpus:g}, and {shape.where} has no GPU that Slurm knows of; set "
        f"{key}.gpus_per_worker=0, name a partition with GPUs, or say how many there are: "
        "cluster.slurm.node.gpus=8 cluster.slurm.gpu_option=''",
    )
    check(
        by_gpus > 0,
        f"{key}.gpus_per_worker={gpus:g} is more than {shape.where} has, {shape.gpus} GPUs",
    )
    filled = min(by_gpus, wanted)
    check(
        by_cores is None or by_cores >= filled,
        f"{key}.cpus_per_worker={cpus:g} is too much for {shape.where} with {shape.words()}: "
        f"{filled} of them fit by its GPUs; {key}.cpus_per_worker="
        f"{math.floor((shape.cpus or 0) / filled)} would do",
    )
    return by_gpus if by_cores is None else min(by_gpus, by_cores)


def share(config: schema.RunConfig, kind: str, shape: Shape) -> Share:
    """What the job of a kind takes of nodes of a shape.

    Raises:
        ConfigError: a node cannot hold it; the message has the number that would do.
    """
    slurm, teachers, ranks = config.cluster.slurm, config.cluster.teachers, config.cluster.trainer
    assert slurm is not None
    if kind == "train":
        return _share(slurm, ranks, ranks.max_workers, slurm.train.nodes, 0, kind, shape)
    if kind == "evaluate":  # one process, on the device of a rank
        return _share(slurm, ranks, 1, 1, 0, kind, shape)
    job, wanted = slurm.array(kind), slurm.array(kind).num_workers or teachers.num_workers
    found = _share(slurm, teachers, wanted, job.nodes, job.workers_per_node, kind, shape)
    room = -(-teachers.max_workers // found.per_node) if job is slurm.teachers else 0
    most = job.max_nodes or max(found.nodes, room or 2 * found.nodes)
    check(
        most * found.per_node >= wanted,
        f"{slurm.key(kind)}.max_nodes={most} nodes of {found.per_node} workers can never hold "
        f"num_workers={wanted}; {slurm.key(kind)}.max_nodes={-(-wanted // found.per_node)} would "
        "do",
    )
    return replace(found, most_nodes=most)


def _share(
    slurm: schema.SlurmConfig,
    workers: schema.WorkersConfig,
    count: int,
    nodes: int,
    per_node: int,
    kind: str,
    shape: Shape,
) -> Share:
    """`nodes` and `per_node` are 0 where they follow."""
    is_array, job = kind.startswith("teachers"), slurm.key(kind)
    key = "cluster.teachers" if is_array else "cluster.trainer"
    wanted = per_node or -(-count // (nodes or 1))
    most = most_on(workers, wanted, shape, key)
    if not nodes and not per_node:
        check(
            most is not None or gpus_of(workers, count) <= 1,
            f"how many GPUs a node has is not known here, and {key}.num_workers={count} ask for "
            f"{gpus_of(workers, count)}; say cluster.slurm.node.gpus=8 (and cpus), or give the "
            "command where Slurm answers",
        )
        nodes = -(-count // min(count, most or count))
    per_node = per_node or -(-count // nodes)
    if most is not None and per_node > most:
        way = f"nodes={-(-count // most)}" if not is_array else f"workers_per_node={most}"
        raise ConfigError(
            f"{job} puts {per_node} on a node with {shape.words()}, which holds "
            f"{most} that ask for {workers.gpus_per_worker:g} GPUs and {workers.cpus_per_worker:g} "
            f"cores each; {job}.{way} would do"
        )
    cpus = max(1, math.ceil(per_node * workers.cpus_per_worker))
    if kind == "train":  # one more for the supervisor and the head, where there is one
        cpus = min(cpus + 1, shape.cpus or cpus + 1)
    nodes = nodes or -(-count // per_node)
    return Share(nodes, nodes, per_node, cpus, gpus_of(workers, per_node))


def check_memory(
    config: schema.RunConfig, kind: str, job: schema.JobConfig, found: Share, shape: Shape
) -> None:
    """Raises ConfigError when a job asks for more memory than a node has, or its ranks need more
    than that.
    """
    assert config.cluster.slurm is not None
    name = config.cluster.slurm.key(kind)
    asked, key = num_bytes(job.memory), f"{name}.memory={job.memory}"
    if job.memory_per_cpu:
        check(
            not job.memory,
            f"{name} has both memory={job.memory} and "
            f"memory_per_cpu={job.memory_per_cpu}, of which Slurm takes one; leave one out",
        )
        each, key = num_bytes(job.memory_per_cpu), f"{name}.memory_per_cpu"
        key += f"={job.memory_per_cpu} on {found.cpus} cores"
        asked = each * found.cpus if each is not None else None
    has = shape.memory
    if has is not None and asked is not None:
        check(
            asked <= has,
            f"{key} is more than {shape.where} has; {has // 2**20 // found.cpus}M a core, "
            f"{has // 2**20}M in all, would do",
        )
    room = min((x for x in (has, asked or None) if x is not None), default=None)
    if kind == "train" and room is not None:
        weights = network_cost(config.student, config.data.image).parameters
        ranks = config.cluster.trainer.min_workers
        _, offloaded = memory.state_bytes(weights, config.train, ranks)
        needed = found.per_node * offloaded + config.cluster.object_store_bytes
        fit = (room - config.cluster.object_store_bytes) // max(1, offloaded)
        more = -(-config.cluster.trainer.max_workers // fit) if fit > 0 else 0
        check(
            needed <= room,
            f"{found.per_node} ranks offload {found.per_node * offloaded:,} bytes to a node that "
            f"gives {room:,}; "
            + (f"more nodes, cluster.slurm.train.nodes={more}, or " if more else "")
            + "train.offload=none, or more ranks at a higher train.zero_stage",
        )


# -----------------------------------------------------------------------------------------------
# Time


def time_limit_s(config: schema.RunConfig, kind: str, shape: Shape) -> int:
    """Seconds of the time limit of a job whose settings give none: SLACK times what its work is
    assumed to take, in half hours, an hour at least.

    A trainer and a task of the teachers are queued again at their limit, so a day is enough for
    any; an evaluation begins anew. None is longer than its partition lets it be.
    """
    work = estimate.stages(config, config.cluster.device_flops)
    hours = {name: stage.hours for name, stage in work.items()}
    if kind == "evaluate":
        assumed = hours["evaluate"]
    else:
        assumed = hours.get("pretrain", 0.0) + max(hours["generate"], hours["train"])
    limit_s = max(LEAST_S, math.ceil(SLACK * assumed * 3600 / ROUND_S) * ROUND_S)
    if kind != "evaluate":
        limit_s = min(limit_s, DAY_S)
    return min(limit_s, shape.limit_s or limit_s)
