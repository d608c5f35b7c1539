"""Random numbers by position: sample id -> noise and label, (purpose, index) -> uniform numbers.

Bits come from the counter-based generator Philox 4x64 (Salmon et al., 2011), keyed by the seed and
the purpose, at a counter that holds the id. So any worker makes any sample, in any order, and two
workers never share noise.

Bits become normals by the inverse of the normal distribution function (Wichura, 1988, algorithm
AS 241, relative error 1e-16). It is written here with + - * / sqrt and frexp only, which IEEE 754
defines to the last bit; a library's `log`, `cos` or normal sampler may differ between machines and
versions. So noise is the same to the last bit everywhere.
"""

import hashlib

import numpy as np
from jaxtyping import Float, Float32, Int, Int64

_A = [
    3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3,
    1.3731693765509461125e4, 4.5921953931549871457e4, 6.7265770927008700853e4,
    3.3430575583588128105e4, 2.5090809287301226727e3,
]  # fmt: skip
_B = [
    1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4,
    5.2264952788528545610e3,
]  # fmt: skip
_C = [
    1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
    3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
    2.27238449892691845833e-2, 7.74545014278341407640e-4,
]  # fmt: skip
_D = [
    1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
    1.05075007164441684324e-9,
]  # fmt: skip
_E = [
    6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
    2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
    2.71155556874348757815e-5, 2.01033439929228813265e-7,
]  # fmt: skip
_F = [
    1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
    7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
    2.04426310338993978564e-15,
]  # fmt: skip
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476


# -----------------------------------------------------------------------------------------------
# Per sample


def sample_noise(
    seed: int, ids: Int[np.ndarray, "N"], shape: tuple[int, ...]
) -> Float32[np.ndarray, "N *S"]:
    """Standard normal noise x_0 of every sample id, float32."""
    count = int(np.prod(shape))
    bits = np.stack([_philox(seed, "noise", int(i)).random_raw(count) for i in ids])
    return inverse_normal(_open_uniform(bits)).astype(np.float32).reshape(len(ids), *shape)


def sample_labels(seed: int, ids: Int[np.ndarray, "N"], num_classes: int) -> Int64[np.ndarray, "N"]:
    """Uniform class of every sample id; -1 for all when there are no classes."""
    if num_classes == 0:
        return np.full(len(ids), -1, dtype=np.int64)
    bits = np.array([_philox(seed, "label", int(i)).random_raw() for i in ids], dtype=np.uint64)
    return np.floor(_open_uniform(bits) * num_classes).astype(np.int64)


# -----------------------------------------------------------------------------------------------
# Per purpose


def uniform(seed: int, purpose: str, index: int, n: int) -> Float[np.ndarray, "n"]:
    """`n` uniform numbers in (0, 1), float64, a pure function of the arguments."""
    return _open_uniform(_philox(seed, purpose, index).random_raw(n))


def permutation(seed: int, purpose: str, index: int, n: int) -> Int64[np.ndarray, "n"]:
    """A random order of 0 .. n - 1: the stable order of `n` random 64-bit keys."""
    return np.argsort(_philox(seed, purpose, index).random_raw(n), kind="stable").astype(np.int64)


def _philox(seed: int, purpose: str, index: int) -> np.random.Philox:
    """Generator of one (seed, purpose) key whose counter starts at (0, index)."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, index, 0, 0], dtype=np.uint64))


def _open_uniform(bits: np.ndarray) -> np.ndarray:
    """The middle of one of 2^52 cells of (0, 1), from 64 random bits."""
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


# -----------------------------------------------------------------------------------------------
# Normal numbers


def inverse_normal(p: Float[np.ndarray, "*S"]) -> Float[np.ndarray, "*S"]:
    """z with Phi(z) = p, for p in (0, 1), float64 (AS 241, PPND16)."""
    q = p - 0.5
    centre = np.abs(q) <= 0.425
    r = 0.180625 - q * q
    z = q * _polynomial(_A, r) / _polynomial(_B, r)
    tail = np.sqrt(-_log(np.minimum(p, 1.0 - p)[~centre]))
    near = _polynomial(_C, tail - 1.6) / _polynomial(_D, tail - 1.6)
    far = _polynomial(_E, tail - 5.0) / _polynomial(_F, tail - 5.0)
    z[~centre] = np.sign(q[~centre]) * np.where(tail <= 5.0, near, far)
    return z


def _polynomial(coefficients: list[float], x: np.ndarray) -> np.ndarray:
    """Sum of c_k x^k by Horner's rule."""
    value = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def _log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm: x = m 2^e, log m = 2 atanh(z) - ln(2)/2 with z = (m - c) / (m + c)."""
    mantissa, exponent = np.frexp(x)
    z = (mantissa - _SQRT_HALF) / (mantissa + _SQRT_HALF)  # |z| < 0.172
    series = _polynomial([1.0 / (2 * k + 1) for k in range(13)], z * z)
    return (exponent - 0.5) * _LN2 + 2.0 * z * series
