"""What nodes the jobs of a run find on a Slurm cluster, by its own words. No torch, no ray.

    sinfo -h -e -o '%D|%c|%m|%G|%l|%f|%P'    12|64|515000|gpu:a100:8(S:0-1)|1-00:00:00|a100|gpu*

A partition may hold several kinds of nodes; the kind that most are of counts, among those that the
job's constraint and `cluster.slurm.node` allow. Any job that fits on these is taken.
"""

import math
import re
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from cluster.plan import memory
from cluster.plan.nodes import Shape, num_bytes, seconds
from cluster.settings.schema import JobConfig, NodeConfig, RunConfig, SlurmConfig
from cluster.slurm import jobs
from distill.config import ConfigError, check
from distill.networks.cost import network_cost
from distill.run import events
from distill.run.files import RunDir

ROW = re.compile(r"(\d+)\|(\d+)\+?\|(\d+)\+?\|([^|]*)\|([^|]*)\|([^|]*)\|([^|]*)")
GPUS = re.compile(r"\bgpu:(?:[^,:()]+:)?(\d+)")


class Nodes(NamedTuple):
    """Nodes of one kind in one partition."""

    num: int
    shape: Shape
    features: frozenset[str]
    partition: str
    is_default: bool


def read_nodes(patiently: bool = True) -> list[Nodes]:
    """All nodes of the cluster, by partition. Lines that are the site's own are read over.

    Raises:
        ConfigError, SlurmError: as `jobs.ask`.
    """
    ask, found = jobs.ask if patiently else jobs.ask_once, []
    for line in ask("sinfo", "-h", "-e", "-o", "%D|%c|%m|%G|%l|%f|%P").splitlines():
        if row := ROW.fullmatch(line.strip()):
            count, cpus, mebibytes, gres, limit, features, partition = row.groups()
            name = partition.rstrip("*")
            gpus = sum(int(number) for number in GPUS.findall(gres))
            where = f"a node of partition {name}"
            shape = Shape(gpus, int(cpus), int(mebibytes) * 2**20, seconds(limit), where)
            words = frozenset(features.split(","))
            found.append(Nodes(int(count), shape, words, name, partition != name))
    return found


def given(slurm: SlurmConfig, job: JobConfig) -> NodeConfig:
    """What the settings say of a node; those of the job's kind first."""
    own, of_all = job.node, slurm.node
    return NodeConfig(
        gpus=of_all.gpus if own.gpus is None else own.gpus,
        cpus=of_all.cpus if own.cpus is None else own.cpus,
        memory=own.memory or of_all.memory,
    )


def shape_for(nodes: list[Nodes], slurm: SlurmConfig, kind: str, on_gpu: bool) -> Shape:
    """The node of a kind of job: what the settings say of it, and for the rest what Slurm does.

    Raises:
        ConfigError: no node of the partition has as much as the settings say.
    """
    job = slurm.job(kind)
    said = given(slurm, job)
    memory = num_bytes(said.memory)
    named = job.partition.split(",")
    there = [n for n in nodes if (n.partition in named if job.partition else n.is_default)]
    if re.fullmatch(r"[\w.-]+(&[\w.-]+)*", job.constraint):
        there = [n for n in there if {*job.constraint.split("&")} <= n.features] or there
    if on_gpu:
        there = [n for n in there if n.shape.gpus] or there
    fit = [n for n in there if _has(n.shape, said, memory, bool(slurm.gpus_by(kind)))]
    kinds = sorted({n.shape.words() for n in there})
    check(
        bool(fit) or not there,
        f"cluster.slurm.node ({Shape(said.gpus, said.cpus, memory).words()}) is no node of "
        f"{job.partition or 'the default partition'}, whose nodes have: {'; '.join(kinds)}",
    )
    counts = Counter[Shape]()
    for one in fit:
        counts[one.shape] += one.num
    shape, _ = max(
        counts.items(), key=lambda each: (each[1], each[0].gpus, each[0].cpus), default=(Shape(), 0)
    )
    return replace(
        shape,
        gpus=shape.gpus if said.gpus is None else said.gpus,
        cpus=shape.cpus if said.cpus is None else said.cpus,
        memory=shape.memory if memory is None else memory,
    )


def _has(shape: Shape, said: NodeConfig, memory: int | None, knows_gpus: bool) -> bool:
    """Whether a node has what the settings say."""
    wanted = [(shape.cpus, said.cpus), (shape.memory, memory)]
    if knows_gpus:  # otherwise Slurm has no word for them
        wanted.append((shape.gpus, said.gpus))
    return all(b is None or (a is not None and a >= b) for a, b in wanted)


# -----------------------------------------------------------------------------------------------
# Time for the last save


def grace_words(config: RunConfig, run: RunDir) -> list[str]:
    """What a run should know before it starts of the time for its last save: in words, why it is
    too short, by the last save, or by the bytes of one. Nothing where it suffices, and of what
    Slurm does not tell.
    """
    slurm = config.cluster.slurm
    if slurm is None:
        return []
    took_s = events.read_history(run).save_s
    how = "the last one took"
    if not took_s:
        weights = network_cost(config.student, config.data.image).parameters
        took_s = memory.save_seconds(weights, config.cluster.trainer.min_workers)
        how = f"one of {memory.CHECKPOINT_BYTES * weights:,} bytes takes about"
    found, cost = [], "the steps since the last save are then taken again (train.save_every)"
    if took_s > config.cluster.stop_grace_s:
        found.append(
            f"cluster.slurm.save_s={slurm.save_s} leaves {config.cluster.stop_grace_s:g} s for a "
            f"step and its save, and {how} {took_s:.0f} s: {cost}; set "
            f"cluster.slurm.save_s={math.ceil(2 * took_s)}"
        )
    for name in filter(None, slurm.train.partition.split(",")):
        with suppress(ConfigError, jobs.SlurmError):
            said = jobs.ask_once("scontrol", "show", "partition", name)
            given = re.search(r"GraceTime=(\d+)", said)
            if given and "PreemptMode=OFF" not in said and took_s > float(given[1]):
                found.append(
                    f"partition {name} leaves {given[1]} s before it takes a node away, and {how} "
                    f"{took_s:.0f} s: {cost}"
                )
    return found
