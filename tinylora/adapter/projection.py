"""P and every other fixed random number, from a counter-based generator that any platform reproduces bit for bit.

The generator is Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). docs/format.md
specifies how it is keyed and gives test vectors. Only integer operations and correctly rounded float64 division and
square root are used: no log, no cos, no sum whose order is left open.
"""

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float64Array = NDArray[np.float64]
Uint64Array = NDArray[np.uint64]

_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
_UNIFORMS_PER_ENTRY = 12  # a sum of 12 has variance exactly 12 * 1/12 = 1


def philox4x32(counter: tuple[Uint64Array, ...], key: tuple[Uint64Array, ...]) -> tuple[Uint64Array, ...]:
    """Ten rounds of Philox4x32: 4 counter words and 2 key words, 32 bits each, to 4 random words (held in uint64)."""
    mask, shift = np.uint64(_MASK), np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product_0 = np.uint64(_MULTIPLIER_0) * c0
        product_1 = np.uint64(_MULTIPLIER_1) * c2
        c0, c1, c2, c3 = (
            (product_1 >> shift) ^ c1 ^ k0,
            product_1 & mask,
            (product_0 >> shift) ^ c3 ^ k1,
            product_0 & mask,
        )
        k0, k1 = (k0 + np.uint64(_WEYL_0)) & mask, (k1 + np.uint64(_WEYL_1)) & mask
    return c0, c1, c2, c3


def uniform_integers(key: str | bytes, count: int) -> Uint64Array:
    """The first `count` 53-bit integers of the stream named `key`; a longer stream begins with a shorter one.

    SHA-256 of the key (text as UTF-8) gives the Philox key (its bytes 0 to 7 as two little-endian words) and the high
    counter words (bytes 8 to 15); the low counter words are the block number. Words w0 to w3 of a block make two
    integers, (w0 >> 5) 2^26 + (w1 >> 6) and the same of w2, w3.
    """
    digest = hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()
    k0, k1, c2, c3 = np.frombuffer(digest[:16], dtype="<u4").astype(np.uint64).reshape(4, 1)
    block = np.arange((count + 1) // 2, dtype=np.uint64)
    words = philox4x32((block & np.uint64(_MASK), block >> np.uint64(32), c2, c3), (k0, k1))
    pairs = np.stack([_join(words[0], words[1]), _join(words[2], words[3])], axis=1)
    return pairs.reshape(-1)[:count]


def uniform_block(key: str | bytes, count: int) -> Float64Array:
    """The first `count` numbers in [0, 1) of the stream named `key`, as multiples of 2^-53."""
    return uniform_integers(key, count).astype(np.float64) / 2.0**53


def standard_block(key: str | bytes, count: int) -> Float64Array:
    """The first `count` numbers of mean 0 and variance 1 of the stream `key`: centred sums of 12 uniforms each.

    The sum is taken over integers, so it is exact in any order; the law is Irwin-Hall, within 6 standard deviations.
    """
    integers = uniform_integers(key, _UNIFORMS_PER_ENTRY * count).reshape(count, _UNIFORMS_PER_ENTRY)
    centre = np.int64(_UNIFORMS_PER_ENTRY // 2 * (2**53 - 1))
    sums: NDArray[np.int64] = integers.astype(np.int64).sum(axis=1) - centre
    return sums.astype(np.float64) / 2.0**53


def projection(seed: int, path: str, u: int, rank: int) -> Float64Array:
    """P of one module: (u, r, r), independent entries of mean 0 and variance 1/r.

    Keyed by seed and canonical module path, so every module has its own P whatever else is adapted. The paper leaves
    the law of P open (Morris et al. 2026, section 4, "fixed random"); variance 1/r is the choice of PEFT's TinyLoRA,
    and a centred sum of 12 uniforms stands for its Gaussian, because log and cos are not correctly rounded everywhere.
    """
    entries = standard_block(f"tinylora/projection/1\n{seed}\n{path}", u * rank * rank)
    scaled: Float64Array = entries / np.sqrt(np.float64(rank))
    return scaled.reshape(u, rank, rank)


def _join(high: Uint64Array, low: Uint64Array) -> Uint64Array:
    """53 bits of two 32-bit words."""
    return ((high >> np.uint64(5)) << np.uint64(26)) + (low >> np.uint64(6))


def as_unsigned(name: str, values: ArrayLike, bits: int) -> Uint64Array:
    """Integers as uint64. Raises: ValueError if one is no integer, below 0, or not below 2^bits."""
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(np.uint64)
    elif array.dtype.kind == "f" and not isinstance(values, np.ndarray):
        array = np.asarray(values, dtype=object)  # NumPy makes floats of Python integers that mix int64 and uint64
    if array.dtype.kind not in "iuO" or not all(isinstance(x, int) for x in array.flat if array.dtype.kind == "O"):
        raise ValueError(f"{name} must be integers, got {values!r}")
    if array.size and (int(array.min()) < 0 or int(array.max()) >= 2**bits):
        raise ValueError(f"{name} must be at least 0 and below 2**{bits}")
    return array.astype(np.uint64)
