"""Which errors of a rank end a run for good, and which let its supervisor start the ranks again."""

import pytest
import torch

from cluster import rank, trainer
from cluster.compose import compose
from cluster.job import TrainJob
from cluster.trainer import final_error, train_rank
from distill.config import ConfigError
from distill.manifest import CheckpointError, SaveError


@pytest.fixture
def fail(tmp_path, monkeypatch):
    """error -> the final one that a rank leaves behind when it raises that."""
    (config,) = compose(["experiment=tiny", f"run.dir={tmp_path}"])
    job = TrainJob("train", config, None, tmp_path)
    monkeypatch.setattr(trainer, "get_device", lambda: torch.device("cpu"))

    def leave(error):
        def raise_it(*args):
            raise error

        monkeypatch.setattr(rank, "run_rank", raise_it)
        with pytest.raises(type(error), match=str(error)):
            train_rank({"job": job})
        return final_error(job)

    return leave


@pytest.mark.parametrize("kind", [ConfigError, CheckpointError])
def test_what_a_restart_would_only_repeat_is_left_behind(fail, kind):
    found = fail(kind("no checkpoint can be opened"))
    assert type(found) is kind and str(found) == "no checkpoint can be opened"


def test_a_save_that_failed_lets_the_ranks_start_again(fail):
    assert fail(SaveError("rank 1 could not write step 4: Input/output error")) is None
