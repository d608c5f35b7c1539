"""The verbs that work on a run. What they need is heavy, and imported when one is called."""

from __future__ import annotations

from cluster.settings.schema import RunConfig

PIPELINE = ("run", "pretrain", "generate", "train")
DISTIL = "distil"  # `run --no-evaluation`


def work(stage: str, config: RunConfig) -> int:
    """Exit code of a verb of PIPELINE, or of DISTIL."""
    from cluster.supervisor import runner

    stages = (runner.run, runner.pretrain, runner.generate, runner.train, runner.distil)
    return dict(zip((*PIPELINE, DISTIL), stages, strict=True))[stage](config)
