"""The basis of a whole model: factors of every module, from the cache or computed, and what is left out by rule."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from tinylora.adapter.basis_cache import cached
from tinylora.adapter.canonical import Weight, finite_float32, rounded_weight
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.factors import (
    MIN_SIGN_MARGIN,
    Factors,
    random_factors,
    root_mean_square_sigma,
    sketch_factors,
    svd_factors,
)
from tinylora.errors import UserError
from tinylora.system.progress import Bar

__all__ = ["Factors", "model_basis", "random_factors", "sketch_factors", "svd_factors"]

MIN_GAP = 1e-6
"""A module with a smaller gap is left out: two machines would not find the same vectors."""


def model_basis(
    weights: Mapping[str, Weight],
    config: AdapterConfig,
    cache_dir: Path | None,
    source: Path | Sequence[Path] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Factors], dict[str, str]]:
    """Factors by module path, and the reason for each module that is left out by rule.

    weights: by canonical path, a module, or a function that gives its weight (out, in). cache_dir: the cache folder
    (entries lie in its `basis` subfolder); None computes anew. source: the model's files (or their folder), unchanged
    since the weights were loaded from them; while their path and state (system/digest.py) stay the same, weights
    are not hashed again, only a few rows of each module are. on_progress(done, total) is called meanwhile.
    Raises: UserError for a rank too large, a packed weight, a value that is not finite, or a cache that cannot be
    written.
    """

    def build() -> tuple[dict[str, Factors], dict[str, str]]:
        return _build(weights, config, on_progress)

    return build() if cache_dir is None else cached(cache_dir / "basis", weights, config, source, build)


def _build(
    weights: Mapping[str, Weight], config: AdapterConfig, on_progress: Callable[[int, int], None] | None
) -> tuple[dict[str, Factors], dict[str, str]]:
    factors: dict[str, Factors] = {}
    excluded: dict[str, str] = {}
    with Bar("basis", len(weights), "modules") as bar:
        for done, (path, entry) in enumerate(weights.items()):
            bar.update(done)
            if on_progress:
                on_progress(done, len(weights))
            try:
                weight = finite_float32(rounded_weight(entry))
                found = _factors(weight, config, path)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            if reason := _reason_to_leave_out(found, config):
                excluded[path] = reason
            else:
                factors[path] = found
    if on_progress:
        on_progress(len(weights), len(weights))
    return factors, excluded


def _factors(weight: Tensor, config: AdapterConfig, path: str) -> Factors:
    if config.basis == "gradient":
        raise UserError("a gradient's basis comes from a batch of a task: tinylora train finds and keeps it")
    if config.basis == "svd":
        return svd_factors(weight, config.rank)
    if config.basis == "sketch":
        return sketch_factors(weight, config.rank, config.seed, path)
    shape = (weight.shape[0], weight.shape[1])
    return random_factors(shape, config.rank, config.seed, path, root_mean_square_sigma(weight))


def _reason_to_leave_out(found: Factors, config: AdapterConfig) -> str | None:
    if not float(found.S[0]) > 0:
        return "the weight is zero, so it has no directions"
    if found.gap < MIN_GAP:
        what = "singular vectors are" if config.basis == "svd" else "sketch is"
        return f"gap {found.gap:.1e} is below {MIN_GAP:.0e} of the largest singular value, so the {what} not unique"
    if found.sign_margin < MIN_SIGN_MARGIN:
        return f"sign margin {found.sign_margin:.1e} is below {MIN_SIGN_MARGIN:.0e}, so a sign is not certain"
    return None
