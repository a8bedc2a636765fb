"""An opened adapter on a base: fingerprint, basis and check agree, or the user is told what differs."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from tinylora.adapter.attach import AttachedAdapter, attach_explicit
from tinylora.adapter.trained import Trained
from tinylora.errors import UserError
from tinylora.methods.build import put_method_on
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
