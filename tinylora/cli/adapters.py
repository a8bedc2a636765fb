"""What the verbs about adapters share: their arguments, the base, writing and describing."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinylora.errors import UserError
from tinylora.system.files import NO_ROOM

if TYPE_CHECKING:
    from tinylora.adapter.attach import AttachedAdapter
    from tinylora.models.load import BaseModel
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
    from tinylora.models.bases import remember
    from tinylora.store.adapter import put_tinylora_on

    return put_tinylora_on(base.model, adapter, files=base.files, other_base=other_base, identity=remember(base))


def complete(adapter: "Adapter", model: str) -> "Adapter":
    """The adapter with fingerprint and check, for which its base is loaded only if it has none."""
    if adapter.explicit is not None or (adapter.fingerprint is not None and adapter.check):
        return adapter
    from tinylora.models.bases import remember
    from tinylora.store.adapter import completed

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


def code_of(data: bytes) -> str | None:
    """The code, or None where it would be too long to be one."""
    from tinylora.adapter.code import fits_a_code, to_code

    return to_code(data) if fits_a_code(data) else None


def describe_json(opened: "Adapter") -> dict[str, Any]:
    """An adapter as plain data."""
    return {
        "adapter": opened.label,
        "numbers": opened.v.flatten().tolist(),
        "shape": list(opened.v.shape),
        "dtype": opened.value_type,
        "norm": float(opened.v.norm()),
        "config": dataclasses.asdict(opened.config) if opened.config else None,
        "fingerprint": opened.fingerprint.hex() if opened.fingerprint else None,
        "check": opened.check.hex() or None,
        "base": opened.base_name or None,
        "origin": opened.explicit.origin if opened.explicit else None,
    }


def describe_text(opened: "Adapter") -> str:
    """An adapter in words."""
    from tinylora.adapter.config import count_groups

    groups, u = opened.v.shape
    is_tinylora = opened.method.name == "tinylora"
    what = f"({count_groups(groups)} x {u})" if is_tinylora else f"of {opened.method.describe()}"
    lines = [f"{opened.v.numel():,} numbers {what} in {opened.value_type}, |v| = {float(opened.v.norm()):.4g}"]
    if not is_tinylora:
        lines.append("each is how far training moved a parameter of the method from its start")
    elif opened.config is not None:
        c = opened.config
        lines.append(
            f"rank {c.rank}, u = {c.u}, {c.sharing(groups)}, targets {', '.join(c.targets)}, basis {c.basis}, "
            f"seed {c.seed}: the factors are rebuilt from the base"
        )
    else:
        assert opened.explicit is not None
        lines.append(f"brings the factors of {len(opened.explicit.modules)} modules along ({opened.explicit.origin})")
    known = f" ({opened.base_name})" if opened.base_name else ""
    if opened.fingerprint:
        lines.append(f"base {opened.fingerprint.hex()}{known or ', not seen on this machine'}")
    else:
        lines.append(f"base{known or ' not stated'}")
    most = 200 if is_tinylora else 20
    shown = " ".join(f"{x:+.5g}" for x in opened.v.flatten()[:most].tolist())
    count = opened.v.numel()
    lines.append(shown + (f" ... ({count - most:,} more; --json has all)" if count > most else ""))
    return "\n".join(lines)
