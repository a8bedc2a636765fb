"""The adapter merged into a copy of the base, for tools that know no adapters; and how much of it survived that.

W + dW is computed from the pristine weight in float64 and cast once. In bfloat16 a small dW disappears below the
spacing of W: near |v| = 1e-3 most of it is lost. So what was applied is compared with what was meant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tinylora.adapter.attach import AttachedAdapter, output_head_path
from tinylora.errors import UserError
from tinylora.system.folders import folder_beside

ENOUGH = 0.9
"""Below this share of the update, a merge is not the adapter any more."""


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What became of the update."""

    shares: Mapping[str, float]
    """By module: <applied, dW> / |dW|^2, 1 if all of it arrived; 1 where dW is zero."""
    total: float
    """The same over all modules."""
    error: float
    """|applied - dW| / |dW| over all modules: also what rounding added in other directions."""

    @property
    def is_whole(self) -> bool:
        """Whether at least 90 % of the update arrived, in every module and in all."""
        return min(self.total, *self.shares.values()) >= ENOUGH


def merge_report(attached: AttachedAdapter, merged: Mapping[str, Any]) -> MergeReport:
    """Compare merged weights with the pristine ones and the update that was meant."""
    shares, inner, squares, missed = {}, 0.0, 0.0, 0.0
    for path in attached.paths:
        applied = merged[path].detach().cpu().double() - attached.base_weight(path).cpu().double()
        meant = attached.delta(path).T if attached.is_transposed(path) else attached.delta(path)
        products, square = float((applied * meant).sum()), float(meant.square().sum())
        shares[path] = products / square if square else 1.0
        inner, squares, missed = inner + products, squares + square, missed + float((applied - meant).square().sum())
    total = inner / squares if squares else 1.0
    return MergeReport(shares, total, (missed / squares) ** 0.5 if squares else 0.0)


def _gigabytes(tensors: Mapping[str, Any]) -> str:
    return (
        f"{sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 1e9:.1f} GB of merged weights"
    )


def write_merged(folder: Path, attached: AttachedAdapter, tokenizer: Any = None) -> MergeReport:
    """Write a transformers folder of the base with the current v merged in; the model itself is not touched.

    Raises: UserError for a folder in use.
    """
    model: Any = attached.model
    tied = model.config.tie_word_embeddings
    with folder_beside(folder) as made:
        merged = attached.merged_weights()
        report = merge_report(attached, merged)
        try:
            with attached.lifted():
                state = {**model.state_dict(), **{f"{path}.weight": weight for path, weight in merged.items()}}
                if output_head_path(model) in merged:
                    model.config.tie_word_embeddings = False  # the head is not the embeddings any more
                model.save_pretrained(made, state_dict=state)
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise UserError(
                f"cannot write {folder} ({error}); is there room for {_gigabytes(merged)} and the rest?"
            ) from error
        finally:
            model.config.tie_word_embeddings = tied
    return report
