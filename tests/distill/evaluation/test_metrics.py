"""Distances: closed forms, zero for equal sets, names that claim no more than they should."""

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from distill.config import ConfigError
from distill.evaluation import inception
from distill.evaluation.config import ExtractorConfig
from distill.evaluation.metrics import (
    FeatureDistance,
    distance_name,
    frechet,
    kernel_distance,
    relative_distance,
)
from distill.run.files import sha256_file

CPU = torch.device("cpu")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_distance_is_zero_for_the_end_point_one_for_the_noise_and_a_ratio_of_sums():
    noise, end = normal(50, 3), 2 + normal(50, 3, seed=1)
    assert relative_distance(end, end, noise) == 0
    assert relative_distance(noise, end, noise) == 1
    assert relative_distance((noise + end) / 2, end, noise) == pytest.approx(0.25)
    # one long and one short way: the mean of the two ratios would be 0.5
    noise, end = torch.tensor([[0.0], [0.0]]), torch.tensor([[3.0], [1.0]])
    assert relative_distance(torch.tensor([[3.0], [0.0]]), end, noise) == pytest.approx(0.1)


def test_frechet_equals_the_closed_form_of_commuting_gaussians():
    a, b = np.array([1.0, 4.0, 0.25]), np.array([9.0, 1.0, 0.25])
    rotation, _ = np.linalg.qr(normal(3, 3).numpy())
    moments = [
        {"mu": mean, "sigma": rotation @ np.diag(values) @ rotation.T}
        for mean, values in ((np.zeros(3), a), (np.array([1.0, 2.0, 0.0]), b))
    ]
    expected = 5 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet(*moments) == pytest.approx(expected, rel=1e-10)


def test_frechet_of_a_set_to_itself_is_zero_and_to_a_shifted_one_the_shift():
    real = torch.randint(20, 200, (400, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    real = real.to(torch.uint8)
    distance = FeatureDistance(ExtractorConfig(name="pixels"), [real], CPU)
    assert abs(distance.compare(real)["frechet"]) < 1e-9
    assert distance.compare(real + 51)["frechet"] == pytest.approx(16 * 0.2**2, rel=1e-9)
    assert distance.description["feature_dtype"] == "float64"
    assert distance.compare(real + 51) == distance.compare(real + 51)


def test_kernel_distance_is_zero_on_average_for_one_distribution_and_positive_for_two():
    x, y, shifted = normal(2000, 4), normal(2000, 4, seed=1), normal(2000, 4, seed=2) + 0.5
    same = kernel_distance(x, y, subsets=10, subset_size=500)
    other = kernel_distance(x, shifted, subsets=10, subset_size=500)
    assert abs(same["kid"]) < 0.01
    assert other["kid"] > 0.1


def test_only_inception_is_called_fid_and_only_50k_fid_50k():
    assert "FID" not in distance_name("pixels", 50_000)
    assert distance_name("inception", 2000) == "FID (n = 2,000)"
    assert distance_name("inception", 50_000) == "FID-50k"


def test_inception_without_or_with_other_weights_is_refused_with_the_way_out(tmp_path):
    real = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    wrong = tmp_path / "weights.pth"
    wrong.write_bytes(b"other")
    for weights, words in (("", "eval.extractor.weights"), (str(wrong), "6726825d")):
        with pytest.raises(ConfigError, match=words):
            FeatureDistance(ExtractorConfig(name="inception", weights=weights), [real], CPU)


def test_inception_opens_the_users_file(tmp_path, monkeypatch):
    """A substitute of the right architecture stands for the published weights."""
    path = tmp_path / "substitute.pth"
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        torch.save({}, path)
        network = FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path=path)
    torch.save(network.state_dict(), path)
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256_file(path)[:8])
    grey = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    config = ExtractorConfig(name="inception", weights=str(path))
    description = FeatureDistance(config, [grey], CPU).description
    assert (description["features"], description["feature_dtype"]) == (2048, "float32")
    assert description["sha256"] == sha256_file(path)
