"""The randomness of token sampling: one number for each (seed, key, sample, position, token), and nothing else.

Gumbel noise added to log-probabilities makes the largest sum a draw from the distribution. Unlike the inversion of a
cumulative sum, it is steady: rounding of the logits (another batch, another machine) changes the token only with about
the probability by which it changes the distribution. docs/format.md specifies the numbers and has test vectors.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tinylora.adapter.projection import Float64Array, as_unsigned, philox4x32

Uint64Array = NDArray[np.uint64]

_MASK, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def draw_state(seeds: ArrayLike, keys: ArrayLike, samples: ArrayLike, positions: ArrayLike) -> Uint64Array:
    """Four 32-bit words for each place of a token, (n, 4), of integer arrays that broadcast against each other to (n,).

    Raises: ValueError unless seeds and keys are integers at least 0 and below 2^64, samples and positions below 2^32.
    """
    seed, key = as_unsigned("seeds", seeds, 64), as_unsigned("keys", keys, 64)
    sample, position = as_unsigned("samples", samples, 32), as_unsigned("positions", positions, 32)
    words = philox4x32((position, sample, key & _MASK, key >> _SHIFT), (seed & _MASK, seed >> _SHIFT))
    return np.stack(np.broadcast_arrays(*words), axis=-1)


def gumbel_noise(state: Uint64Array, streams: ArrayLike, count: int) -> Float64Array:
    """The first `count` numbers of one stream for each state, -log(-log(u)) of 32-bit uniforms u.

    Shapes: state (n, 4); streams (n,) or one for all, below 2^32: 0 is the noise of the blocks of the vocabulary, 1 + b
    that of the tokens in block b -> (n, count) float64.
    """
    stream = np.broadcast_to(as_unsigned("streams", streams, 32), (len(state),))
    counter = np.arange(-(-count // 4), dtype=np.uint64)
    words = philox4x32(
        (counter, stream[:, None], state[:, 2:3], state[:, 3:4]),
        (state[:, 0:1], state[:, 1:2]),
    )
    shape = (len(state), len(counter))
    integers = np.stack([np.broadcast_to(word, shape) for word in words], axis=-1).reshape(len(state), -1)[:, :count]
    noise: Float64Array = -np.log(-np.log((integers.astype(np.float64) + 0.5) / 2.0**32))
    return noise
