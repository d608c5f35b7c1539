"""Noise is a pure function of (seed, purpose, index); it is standard normal; it never changes."""

import hashlib
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest

from distill.flow.noise import (
    _inverse_normal,
    _Words,
    permutation,
    sample_labels,
    sample_noise,
    uniform,
)

SHAPE = (3, 5, 7)


def philox_block(key: list[int], counter: int) -> list[int]:
    """Philox 4x64-10 as in Salmon et al. (2011), in whole numbers."""
    mask = 2**64 - 1
    x = [counter >> (64 * i) & mask for i in range(4)]
    k = list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * x[2], 2**64)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return x


@pytest.mark.parametrize("index", [0, 1, 2**40 + 3])
def test_words_are_the_formula_in_the_docstring(index):
    digest = hashlib.sha256(b"bowstring/1/7/noise").digest()
    key = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8)]
    expected = [w for block in (1, 2) for w in philox_block(key, (index << 128) + block)]
    assert _Words(7, "noise").read(index, 8).tolist() == expected


def test_golden_values():
    """Data of finished runs would change with these: never refresh them."""
    noise = sample_noise(7, np.array([0, 123456789012]), (4,))
    assert noise.view(np.uint32).tolist() == [
        [1044194334, 3211835014, 3193368035, 3215003436],
        [3224203220, 1065199863, 3215173779, 3218065780],
    ]
    many = sample_noise(1, np.arange(300), (3, 32, 32)).astype("<f4")
    assert (
        hashlib.sha256(many.tobytes()).hexdigest()
        == "6365cc8bf88f6da31fc75cc000bca0a828f7429141004b502b2cfe7dde38ca3e"
    )
    assert sample_labels(7, np.arange(12), 10).tolist() == [1, 2, 2, 2, 8, 8, 1, 4, 3, 5, 9, 6]
    assert permutation(7, "shuffle", 3, 8).tolist() == [7, 4, 1, 2, 6, 5, 0, 3]
    assert uniform(7, "a", 3, 2).tolist() == [0.731040184452835, 0.4149125159362971]


def test_inverse_normal_is_accurate_to_the_last_digits():
    tails = 2.0 ** -np.arange(1.0, 54.0)
    p = np.concatenate([np.linspace(0.001, 0.999, 2001), tails, 1 - tails[:-1]])
    exact = np.array([NormalDist().inv_cdf(value) for value in p])
    np.testing.assert_allclose(_inverse_normal(p), exact, rtol=2e-15, atol=1e-16)


def test_noise_does_not_depend_on_split_or_order():
    ids = np.array([5, 0, 999_999_999_999, 17, 4, 4])
    whole = sample_noise(3, ids, SHAPE)
    for i, sample in enumerate(ids):
        assert np.array_equal(sample_noise(3, np.array([sample]), SHAPE)[0], whole[i])
    assert np.array_equal(sample_noise(3, ids[::-1].copy(), SHAPE), whole[::-1])
    assert np.array_equal(sample_noise(3, ids, (105,)), whole.reshape(-1, 105))


def test_noise_does_not_depend_on_chunks():
    """A sample larger than one chunk equals the beginning of a longer one."""
    long = sample_noise(3, np.array([8]), (100_000,))
    assert np.array_equal(sample_noise(3, np.array([8]), (70_000,))[0], long[0, :70_000])
    assert np.array_equal(sample_noise(3, np.array([8]), (9,))[0], long[0, :9])


def test_noise_is_the_same_in_another_process():
    code = (
        "import sys, numpy as np; from distill.flow.noise import sample_noise;"
        "sys.stdout.buffer.write(sample_noise(3, np.arange(2, 6), (3, 5, 7)).tobytes())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert out == sample_noise(3, np.arange(2, 6), SHAPE).tobytes()


def test_moments_are_those_of_a_standard_normal():
    z = sample_noise(0, np.arange(250), (4000,)).astype(np.float64).reshape(-1)
    n = len(z)  # a million: standard errors 0.001, 0.0014, 0.0024 and 0.0049
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**3).mean()) < 4 * (15 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    inside = (np.abs(z) < 1.959963984540054).mean()
    assert abs(inside - 0.95) < 4 * (0.95 * 0.05 / n) ** 0.5


def test_ids_seeds_and_purposes_are_uncorrelated():
    a = sample_noise(0, np.array([1]), (20_000,))[0]
    others = [sample_noise(0, np.array([2]), (20_000,))[0]]
    others += [sample_noise(1, np.array([1]), (20_000,))[0]]
    for b in others:
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / 20_000**0.5
    u, v = uniform(0, "a", 0, 20_000), uniform(0, "b", 0, 20_000)
    assert abs(np.corrcoef(u, v)[0, 1]) < 4 / 20_000**0.5


def test_labels_are_uniform_and_by_id():
    labels = sample_labels(0, np.arange(20_000), 10)
    counts = np.bincount(labels, minlength=10)
    assert len(counts) == 10 and abs(counts - 2000).max() < 4.5 * 1800**0.5
    assert np.array_equal(sample_labels(0, np.array([19_999, 3]), 10), labels[[19_999, 3]])
    assert sample_labels(0, np.arange(3), 0).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("counts", [[9, 1], [1, 0, 3], [50_000, 5_000, 500]])
def test_labels_are_as_frequent_as_counts_say(counts):
    ids = np.arange(20_000)
    found = np.bincount(sample_labels(3, ids, len(counts), np.array(counts)), minlength=len(counts))
    expected = np.array(counts) / sum(counts) * len(ids)
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected)).all()
    equal = np.full(7, 123)
    assert np.array_equal(sample_labels(3, ids[:500], 7, equal), sample_labels(3, ids[:500], 7))


def test_uniform_and_permutation():
    u = uniform(0, "a", 1, 100_000)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 4 / (12 * 100_000) ** 0.5
    assert np.array_equal(uniform(0, "a", 1, 10), u[:10])
    assert not np.array_equal(uniform(0, "a", 2, 10), u[:10])
    order = permutation(0, "a", 1, 1000)
    assert sorted(order.tolist()) == list(range(1000)) and order.tolist() != list(range(1000))


def test_nothing_at_all():
    assert sample_noise(0, np.arange(0), (3, 2, 2)).shape == (0, 3, 2, 2)
    assert sample_labels(0, np.arange(0), 10).shape == (0,)
    assert permutation(0, "a", 0, 1).tolist() == [0]
