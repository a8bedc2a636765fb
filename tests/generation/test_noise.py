"""The noise of token sampling: the published numbers, an independent generator, its law, bad arguments."""

import math

import numpy as np
import pytest
from philox import plain_philox
from scipy.stats import gumbel_r, kstest

from tinylora.generation.noise import draw_state, gumbel_noise


def plain_noise(place: tuple[int, int, int, int], stream: int, j: int) -> float:
    """As docs/format.md says it, with Python's integers."""
    seed, key, sample, position = place
    w = plain_philox([position, sample, key % 2**32, key >> 32], [seed % 2**32, seed >> 32])
    word = plain_philox([j // 4, stream, w[2], w[3]], [w[0], w[1]])[j % 4]
    return -math.log(-math.log((word + 0.5) / 2**32))


def test_the_published_vectors() -> None:
    state = draw_state([1], [2], [3], [4])
    assert [hex(int(word)) for word in state[0]] == ["0xa6d33d94", "0xb508562e", "0xa4230308", "0x66a63f1d"]
    assert gumbel_noise(state, 0, 6)[0, 5] == pytest.approx(-0.745085019393, abs=1e-11)
    assert gumbel_noise(state, [8], 256)[0, 5] == pytest.approx(1.753310370123, abs=1e-11)


def test_noise_is_the_generator_at_its_arguments() -> None:
    rng = np.random.default_rng(0)
    seeds, keys = rng.integers(0, 2**64, 20, dtype=np.uint64), rng.integers(0, 2**64, 20, dtype=np.uint64)
    samples, positions, streams = (rng.integers(0, 2**32, 20) for _ in range(3))
    noise = gumbel_noise(draw_state(seeds, keys, samples, positions), streams, 11)
    for i in range(20):
        place = (int(seeds[i]), int(keys[i]), int(samples[i]), int(positions[i]))
        wanted = [plain_noise(place, int(streams[i]), j) for j in range(11)]
        np.testing.assert_allclose(noise[i], wanted, rtol=1e-14)
    assert draw_state(5, [1, 2**63 + 1], 0, [7, 8]).shape == (2, 4)
    assert gumbel_noise(draw_state([1], [2], [3], [4]), 0, 1).shape == (1, 1)


def test_noise_has_the_gumbel_law() -> None:
    noise = gumbel_noise(draw_state(0, np.arange(100), 1, 0), 3, 1000)
    assert kstest(noise.ravel(), gumbel_r.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(noise[0], noise[1])[0, 1]) < 0.15


@pytest.mark.parametrize(
    "arguments", [(-1, 0, 0, 0), (2**64, 0, 0, 0), (0, 2**64, 0, 0), (0, 0, 2**32, 0), (0, 0, 0, -1)]
)
def test_places_out_of_range_are_refused(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        draw_state(*arguments)
    with pytest.raises(ValueError, match="integers"):
        draw_state(0.5, 0, 0, 0)
