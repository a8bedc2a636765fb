"""What the verbs about adapters share: their arguments, the base, writing and describing."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinylora.errors import UserError
from tinylora.system.files import NO_ROOM

if TYPE_CHECKING:
    from tinylora.adapter.attach import AttachedAdapter
    from tinylora.models.base import BaseModel
    from tinylora.store.adapter import Adapter


AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="A run folder, an adapter file, or a code.")]
Model = Annotated[str, typer.Option(help="The base model, where it is not known or lies elsewhere.")]


def value_type(dtype: str) -> Any:
    """The name of the numbers' type, from what --dtype says. Raises: UserError for another."""
    known = {"float32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "fp32": "float32"}
    if dtype not in known:
        raise UserError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    return known[dtype]


def load_base(adapter: "Adapter", model: str, dtype: str = "auto") -> "BaseModel":
    """An adapter's base, on the CPU: the one that it names, or `model`. Raises: UserError as `load_base_model` does."""
    from tinylora.models.load import load_base_model

    settings = adapter.settings(model).model
    if settings.quantization != "none" and dtype == "auto":
        dtype = settings.dtype  # a base that was quantised in another one has other values
    return load_base_model(
        settings.name, device="cpu", dtype=dtype, revision=settings.revision,
        trust_remote_code=settings.trust_remote_code, quantization=settings.quantization,
    )  # fmt: skip


def put_on(adapter: "Adapter", base: "BaseModel", other_base: bool = False) -> "AttachedAdapter":
    """The adapter on its base. Raises: UserError for another base, unless `other_base`."""
    from tinylora.methods.put_on import put_tinylora_on
    from tinylora.models.bases import remember

    return put_tinylora_on(base.model, adapter, files=base.files, other_base=other_base, identity=remember(base))


def complete(adapter: "Adapter", model: str) -> "Adapter":
    """The adapter with fingerprint and check, for which its base is loaded only if it has none."""
    if adapter.explicit is not None or (adapter.fingerprint is not None and adapter.check):
        return adapter
    from tinylora.methods.put_on import completed
    from tinylora.models.bases import remember

    base = load_base(adapter, model)
    return completed(adapter, put_on(adapter, base), remember(base))


def write_new(path: Path, data: bytes) -> None:
    """Write a file that is not there yet, whole or not at all. Raises: UserError."""
    from tinylora.system.files import write_atomically

    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a file")
        if path.exists():
            raise UserError(f"{path} exists; choose another file, or delete it")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise UserError(f"cannot write {path} ({error.strerror or error}); choose another place") from error
