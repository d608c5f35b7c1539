"""Random numbers by position: sample id -> (noise, label), the same on any machine, in any order.

A number is a pure function of (seed, purpose, index, place), in three steps that are written out
here so that no library may change them:

1. key = first 128 bits of sha256("bowstring/1/<seed>/<purpose>"), so purposes are independent.
2. 64-bit words: Philox 4x64 with 10 rounds (Salmon et al., 2011, "Parallel random numbers: as easy
   as 1, 2, 3"), four words a block, counter = index * 2^128 + 1 + floor(place / 4). It is
   counter-based, so id i costs the same as id 0.
3. p = (floor(word / 2^12) + 1/2) / 2^52, which float64 holds exactly and which is never 0 or 1, and
   z = Phi^-1(p) by Wichura's algorithm AS241 (PPND16, 1988), accurate to about 1e-16.

Step 3 uses + - * / sqrt, frexp and ldexp only. IEEE 754 fixes the result of each of these to the
last bit, so noise does not depend on the processor or the mathematics library; a library's log
would. The logarithm that the tails need is therefore our own.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 15  # values worked on at once; they stay in the processor's cache


def sample_noise(seed: int, ids: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise x_0 of the samples `ids`, float32 [N, *shape].

    A row depends on the seed, its id and the number of values only.
    """
    count = int(np.prod(shape, dtype=np.int64))
    out = np.empty((len(ids), count), dtype=np.float32)
    rows = max(1, CHUNK // max(count, 1))
    words = np.empty((rows, count), dtype=np.uint64)
    stream = _Words(seed, "noise")
    for first in range(0, len(ids), rows):
        part = ids[first : first + rows]
        for row, index in enumerate(part.tolist()):
            words[row] = stream.read(index, count)
        for start in range(0, count, CHUNK):
            piece = slice(start, start + CHUNK)
            normals = _inverse_normal(_open_uniform(words[: len(part), piece]))
            out[first : first + len(part), piece] = normals
    return out.reshape(len(ids), *shape)


def sample_labels(
    seed: int, ids: NDArray[np.int64], num_classes: int, counts: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Class of each sample, int64 [N]: uniform over 0 .. num_classes - 1, or as often as `counts`
    [num_classes] says. -1 without classes.
    """
    if num_classes == 0:
        return np.full(len(ids), -1, dtype=np.int64)
    ends = np.cumsum(np.ones(num_classes, dtype=np.int64) if counts is None else counts)
    stream = _Words(seed, "label")
    high = np.array([stream.read(index, 1)[0] >> np.uint64(32) for index in ids.tolist()])
    place = high.astype(np.uint64) * np.uint64(ends[-1]) >> np.uint64(32)
    return np.searchsorted(ends, place.astype(np.int64), side="right")


def uniform(seed: int, purpose: str, index: int, n: int) -> NDArray[np.float64]:
    """`n` uniform numbers in [0, 1), multiples of 2^-53, float64 [n]."""
    words = _Words(seed, purpose).read(index, n)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(seed: int, purpose: str, index: int, n: int) -> NDArray[np.int64]:
    """A random order of 0 .. n - 1, int64 [n]: that in which `n` random words sort."""
    words = _Words(seed, purpose).read(index, n)
    return np.argsort(words, kind="stable").astype(np.int64)


# -----------------------------------------------------------------------------------------------
# Words


class _Words:
    """The words of one (seed, purpose). Setting the counter of one generator is cheaper than
    building one per index.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        digest = hashlib.sha256(f"bowstring/1/{seed}/{purpose}".encode()).digest()
        self._generator = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
        self._counter = np.zeros(4, dtype=np.uint64)
        self._state = self._generator.state
        self._state["state"]["counter"] = self._counter

    def read(self, index: int, n: int) -> NDArray[np.uint64]:
        """The first `n` words at `index`, 0 <= index < 2^64."""
        self._counter[2] = index
        self._generator.state = self._state
        return self._generator.random_raw(n)


# -----------------------------------------------------------------------------------------------
# Normals

# PPND16: z = q A(r) / B(r) for |q| <= 0.425, z = C(r)/D(r) or E(r)/F(r) in the tails.
# Coefficients by rising power.
A = (
    3.3871328727963666080e0,
    1.3314166789178437745e2,
    1.9715909503065514427e3,
    1.3731693765509461125e4,
    4.5921953931549871457e4,
    6.7265770927008700853e4,
    3.3430575583588128105e4,
    2.5090809287301226727e3,
)
B = (
    1.0,
    4.2313330701600911252e1,
    6.8718700749205790830e2,
    5.3941960214247511077e3,
    2.1213794301586595867e4,
    3.9307895800092710610e4,
    2.8729085735721942674e4,
    5.2264952788528545610e3,
)
C = (
    1.42343711074968357734e0,
    4.63033784615654529590e0,
    5.76949722146069140550e0,
    3.64784832476320460504e0,
    1.27045825245236838258e0,
    2.41780725177450611770e-1,
    2.27238449892691845833e-2,
    7.74545014278341407640e-4,
)
D = (
    1.0,
    2.05319162663775882187e0,
    1.67638483018380384940e0,
    6.89767334985100004550e-1,
    1.48103976427480074590e-1,
    1.51986665636164571966e-2,
    5.47593808499534494600e-4,
    1.05075007164441684324e-9,
)
E = (
    6.65790464350110377720e0,
    5.46378491116411436990e0,
    1.78482653991729133580e0,
    2.96560571828504891230e-1,
    2.65321895265761230930e-2,
    1.24266094738807843860e-3,
    2.71155556874348757815e-5,
    2.01033439929228813265e-7,
)
F = (
    1.0,
    5.99832206555887937690e-1,
    1.36929880922735805310e-1,
    1.48753612908506148525e-2,
    7.86869131145613259100e-4,
    1.84631831751005468180e-5,
    1.42151175831644588870e-7,
    2.04426310338993978564e-15,
)
SQRT_HALF = 0.7071067811865476
LN2_HIGH = 0.693147180369123816490  # 33 bits, so that its product with an exponent is exact
LN2_LOW = 1.90821492927058770002e-10  # ln 2 = LN2_HIGH + LN2_LOW
# atanh(f) = f + f^3/3 + f^5/5 + ..; |f| < 0.172, so the rest after f^21 is below 1e-18.
ATANH = tuple(1.0 / (2 * k + 1) for k in range(11))


def _open_uniform(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """p = (floor(word / 2^12) + 1/2) / 2^52, in (0, 1) and symmetric about 1/2."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def _polynomial(coefficients: tuple[float, ...], x: NDArray[np.float64]) -> NDArray[np.float64]:
    """sum_k c_k x^k by Horner's rule, one rounding per operation."""
    value = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value *= x
        value += coefficient
    return value


def _log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """ln x for x > 0, within about 2 units in the last place.

    x = m 2^e with sqrt(1/2) <= m < sqrt(2); ln x = e ln 2 + 2 atanh((m - 1) / (m + 1)).
    """
    mantissa, exponent = np.frexp(x)
    small = mantissa < SQRT_HALF
    mantissa = np.where(small, 2.0 * mantissa, mantissa)
    power = (exponent - small).astype(np.float64)
    f = (mantissa - 1.0) / (mantissa + 1.0)
    return power * LN2_HIGH + (power * LN2_LOW + 2.0 * f * _polynomial(ATANH, f * f))


def _inverse_normal(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """z with Phi(z) = p, for 0 < p < 1 (AS241, PPND16)."""
    q = p - 0.5
    r = 0.180625 - q * q
    z = q * _polynomial(A, r) / _polynomial(B, r)
    tail = np.abs(q) > 0.425
    q_tail, p_tail = q[tail], p[tail]
    r = np.sqrt(-_log(np.where(q_tail < 0, p_tail, 1.0 - p_tail)))
    value = _polynomial(C, r - 1.6) / _polynomial(D, r - 1.6)
    far = r > 5.0
    value[far] = _polynomial(E, r[far] - 5.0) / _polynomial(F, r[far] - 5.0)
    z[tail] = np.where(q_tail < 0, -value, value)
    return z
