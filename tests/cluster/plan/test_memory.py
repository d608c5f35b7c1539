"""What a rank holds at rest is what `estimate` says."""

import pytest

from benchmarks.trainer.memory import IMAGE, PRECISIONS, config_of, measure_rank, trained_weights
from cluster.plan.memory import state_bytes
from distill.networks.build import build_network
from distill.networks.config import DiTConfig
from distill.networks.files import fixed_tensors
from distill.testing import run_ranks

STAGES, RANKS = range(4), 2
PLACES = [(stage, "none") for stage in STAGES]
SMALL = DiTConfig(patch_size=2, width=128, depth=2, num_heads=2)
TOLERANCE = 0.05  # bytes per weight: weights that are not trained, padding, counters


@pytest.fixture(scope="module")
def measured_bytes(tmp_path_factory) -> list[list[list[int]]]:
    """By rank, stage and precision: all tensors alive after a step that were not before."""
    return run_ranks(
        measure_rank, RANKS, tmp_path_factory.mktemp("memory") / "ranks", PLACES, SMALL
    )


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_rank_holds_the_bytes_of_the_formula(measured_bytes, precision, stage):
    weights, column = trained_weights(SMALL), PRECISIONS.index(precision)
    formula, offloaded = state_bytes(weights, config_of(stage, "none", precision), RANKS)
    fixed = fixed_tensors(build_network(SMALL, IMAGE, 0))  # in host memory, which is this one here
    formula += sum(value.nbytes for value in fixed.values())
    assert offloaded == 0
    for of_rank in measured_bytes:
        assert of_rank[stage][column] == pytest.approx(formula, abs=TOLERANCE * weights)
