"""The portable generator against published vectors, a second implementation in plain integers, and its own spec."""

import hashlib
from fractions import Fraction
from math import isqrt

import numpy as np
import pytest
from philox import plain_philox

from tinylora.adapter.projection import (
    philox4x32,
    projection,
    standard_block,
    uniform_block,
)

# Random123's kat_vectors for philox4x32, 10 rounds: counter, key, output.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
PUBLISHED: dict[str, list[str] | str] = {
    "P": ["0x1.561c9b06bdb87p+0", "-0x1.8348440b08f58p-2", "0x1.12b0b574b59b8p-1", "-0x1.aaaea82f2d607p-2"],
    "uniform": ["0x1.02e94ec708461p-1", "0x1.d3fb8c393a478p-4", "0x1.ddfbe161bef21p-1"],
}
PATH = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_published_words(counter: list[int], key: list[int], expected: list[int]) -> None:
    def words(values: list[int]) -> tuple[np.ndarray, ...]:
        return tuple(np.array([value], dtype=np.uint64) for value in values)

    assert [int(word[0]) for word in philox4x32(words(counter), words(key))] == expected


def plain_integers(key: str, count: int) -> list[int]:
    """docs/format.md, word for word."""
    digest = hashlib.sha256(key.encode()).digest()
    k0, k1, c2, c3 = (int.from_bytes(digest[i : i + 4], "little") for i in (0, 4, 8, 12))
    integers: list[int] = []
    for block in range((count + 1) // 2):
        w = plain_philox([block % 2**32, block // 2**32, c2, c3], [k0, k1])
        integers += [(w[0] // 32) * 2**26 + w[1] // 64, (w[2] // 32) * 2**26 + w[3] // 64]
    return integers[:count]


def test_uniform_block_follows_the_specification() -> None:
    assert uniform_block("a key", 7).tolist() == [float(Fraction(n, 2**53)) for n in plain_integers("a key", 7)]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_projection_is_the_centred_sum_of_uniforms(rank: int) -> None:
    u = 2
    integers = plain_integers(f"tinylora/projection/1\n7\n{PATH}", 12 * u * rank * rank)
    P = projection(7, PATH, u, rank).reshape(-1)
    for index, entry in enumerate(P):
        sum_of_12 = Fraction(sum(integers[12 * index : 12 * index + 12]), 2**53)
        centred = sum_of_12 - 6 * (1 - Fraction(1, 2**53))
        root = Fraction(isqrt(rank * 10**60), 10**30)
        assert entry == pytest.approx(float(centred / root), rel=1e-15)
    assert P.dtype == np.float64


def test_projection_matches_the_published_test_vectors() -> None:
    # The table in docs/format.md: exact, in hexadecimal, so that another platform that differs in one bit is seen.
    P = projection(0, PATH, 1, 2).reshape(-1)
    assert [float(x).hex() for x in P] == PUBLISHED["P"]
    assert [float(x).hex() for x in uniform_block("tinylora", 3)] == PUBLISHED["uniform"]


def test_longer_streams_begin_with_shorter_ones_and_other_keys_differ() -> None:
    assert np.array_equal(projection(3, PATH, 5, 2)[:2], projection(3, PATH, 2, 2))
    others = [projection(4, PATH, 1, 4), projection(3, PATH.replace(".0.", ".1."), 1, 4)]
    for other in others:
        assert abs(np.corrcoef(projection(3, PATH, 1, 4).ravel(), other.ravel())[0, 1]) < 0.9
        assert not np.isin(other, projection(3, PATH, 1, 4)).any()


def test_projection_has_mean_zero_and_variance_one_over_rank() -> None:
    rank = 200
    P = projection(1, PATH, 1, rank)
    standard_error = 1 / np.sqrt(P.size)
    assert abs(P.mean() * np.sqrt(rank)) < 4 * standard_error
    assert abs(P.var() * rank - 1) < 4 * np.sqrt(2) * standard_error
    assert np.abs(standard_block("x", 1000)).max() < 6
