"""An opened adapter on a base: fingerprint, basis and check agree, or the user is told what differs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from tinylora.adapter.attach import AttachedAdapter, attach_explicit, linear_maps, map_shapes, output_head_path
from tinylora.adapter.grouping import select_targets
from tinylora.adapter.trained import Trained
from tinylora.errors import UserError
from tinylora.methods.build import put_method_on
from tinylora.methods.estimate import trained_numbers
from tinylora.methods.one_vector import MethodAdapter
from tinylora.models.bases import explain_difference
from tinylora.models.fingerprint import Identity, identify
from tinylora.store.adapter import (
    Adapter,
    open_adapter,
)
from tinylora.system.paths import cache_dir


def put_on(
    model: nn.Module,
    adapter: Adapter,
    *,
    files: Sequence[Path] = (),
    other_base: bool = False,
    identity: Identity | None = None,
) -> AttachedAdapter | MethodAdapter:
    """Put an adapter on a model, v included, and check that both belong together.

    files: the weight files that the model still agrees with, so that neither fingerprint nor basis is computed again.
    other_base: go on where the base is not the adapter's; its numbers then steer the other base's own directions.
    Raises: UserError for another base (in words), a basis that came out differently, or a v that does not fit.
    """
    if adapter.fingerprint is not None and not other_base:
        found = identity or identify(model, files)
        if found.fingerprint != adapter.fingerprint:
            raise UserError(
                f"{adapter.label} was made for another base than this one: "
                f"{explain_difference(adapter.fingerprint, found)}; give its own base, or --other-base to go on"
            )
    if adapter.explicit is not None:
        attached: AttachedAdapter | MethodAdapter = attach_explicit(model, adapter.explicit)
    else:
        assert adapter.config is not None
        _check_count(model, adapter)
        attached = put_method_on(
            model, adapter.method, adapter.config, cache_dir=cache_dir(), source=list(files) or None
        )
    try:
        check_basis(adapter, attached, other_base=other_base)
        attached.write(adapter.v)
    except UserError:
        attached.detach()
        raise
    return attached


def _check_count(model: nn.Module, adapter: Adapter) -> None:
    """Raises: UserError for other numbers than the method trains on this model, before its layers are made."""
    if adapter.method.name in ("tinylora", "lora-xs"):
        return  # u is held against v where the file is read, and P against the memory where it is made
    assert adapter.config is not None
    parameters = sum(weight.numel() for weight in model.parameters() if weight.is_floating_point())
    paths = select_targets(list(linear_maps(model)), adapter.config.targets, output_head_path(model))
    wanted = trained_numbers(adapter.method, map_shapes(model, paths), parameters)
    if adapter.v.numel() != wanted:
        raise UserError(
            f"{adapter.label} holds {adapter.v.numel():,} numbers, and {adapter.method.describe()} has {wanted:,} on "
            "this base; give its own base, or restore the file"
        )


def put_tinylora_on(
    model: nn.Module, adapter: Adapter, *, files: Sequence[Path] = (), other_base: bool = False,
    identity: Identity | None = None,
) -> AttachedAdapter:  # fmt: skip
    """`put_on`, for what only TinyLoRA's layers can do (export, merge). Raises: UserError for methods without them."""
    if adapter.method.name not in ("tinylora", "lora-xs"):
        raise UserError(
            f"{adapter.label} holds {adapter.method.describe()}, and this is for TinyLoRA's adapters; tinylora eval "
            "and chat take it, and what PEFT knows lies as its own adapter in the run's folder peft"
        )
    attached = put_on(model, adapter, files=files, other_base=other_base, identity=identity)
    assert isinstance(attached, AttachedAdapter)
    return attached


def check_basis(adapter: Adapter, attached: Trained, *, other_base: bool = False) -> None:
    """Raises: UserError if the basis rebuilt here is not the one that the adapter was trained on."""
    if adapter.check and not other_base and not attached.agrees_with(adapter.check):
        raise UserError(
            f"what was rebuilt here for {adapter.label} is not what it was trained from (its check disagrees), so its "
            "numbers would mean something else; clear the cache (tinylora cache --clear), and report this if it stays"
        )


def completed(adapter: Adapter, attached: Trained, identity: Identity) -> Adapter:
    """The adapter with the fingerprint and the basis check of the base that it is on."""
    return replace(adapter, fingerprint=identity.fingerprint, check=attached.check())


def load_adapter(model: nn.Module, reference: str | Path, *, other_base: bool = False) -> AttachedAdapter:
    """Put an adapter (a code, a file, a run folder of TinyLoRA's) on a transformers model of yours, and switch it on.

    The weights are hashed, so that another base is noticed; the basis comes from the cache, or is computed once.
    `attached.detach()` takes it off again.
    Raises: UserError for an adapter that cannot be read, another base, or a basis that came out differently.
    """
    return put_tinylora_on(model, open_adapter(reference), other_base=other_base)
