"""What the verbs about adapters share: their arguments, the base, writing and describing."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinylora.errors import UserError
from tinylora.talk import say_to_stderr as say
from tinylora.talk import shell_line

if TYPE_CHECKING:
    from tinylora.adapter.attach import AttachedAdapter
    from tinylora.models.base import BaseModel
    from tinylora.store.adapter import Adapter
    from tinylora.system.outputs import Output


AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="A run folder, an adapter file, or a code.")]
Model = Annotated[str, typer.Option(help="The base model, where it is not known or lies elsewhere.")]


def value_type(dtype: str) -> Any:
    """The name of the numbers' type, from what --dtype says. Raises: UserError for another."""
    known = {"float32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "fp32": "float32"}
    if dtype not in known:
        raise UserError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    return known[dtype]


def open_named(
    reference: str, sections: Sequence[str], model: str, overrides: Sequence[str], *, task: str = "", trust: bool
) -> "Adapter":
    """The adapter that the command line names; the settings in it may choose only what this user's own may.

    sections: those that the verb goes by. Of a stranger's settings, what --model, --task and --set do not say in place
    of it is asked about on a terminal.
    Raises: UserError for an adapter that cannot be read, or is not trusted.
    """
    from tinylora.store.adapter import open_adapter
    from tinylora.store.own import ask_on_terminal, refuse_or_trust, unsettled

    opened = open_adapter(reference)
    if opened.run is None or opened.is_own:
        return opened
    settled = {one.partition("=")[0].strip() for one in overrides}
    settled |= {"model.name", "model.revision"} if model else set()
    settled |= {"task", "prompt"} if task else set()
    left = unsettled(opened.run, sections, settled)
    left.pop("model.trust_remote_code", None)  # is left out; the base is refused if it needs that
    if not (left or trust):
        return opened
    instead = [f"the base with --model {shlex.quote(opened.run.model.name)}"] if "model.name" in left else []
    instead += ["the task or recipe with --task"] if any(key.startswith("task.") for key in left) else []
    refuse_or_trust(
        opened.label, opened.run, left, trust=trust, ask=ask_on_terminal, say=say,
        instead=f"name {' and '.join(instead)} yourself" if instead else "",
    )  # fmt: skip
    return dataclasses.replace(opened, is_own=True)


def load_base(adapter: "Adapter", model: str, dtype: str = "auto") -> "BaseModel":
    """An adapter's base, on the CPU: the one that it names, or `model`. Raises: UserError as `load_base_model` does."""
    from tinylora.models.load import load_base_model

    settings = adapter.settings(model).model
    if adapter.run is not None and adapter.run.model.trust_remote_code and not settings.trust_remote_code:
        raise UserError(
            f"{adapter.label} was not made by you on this machine, and its base brings code of its own; if you trust "
            f"that, say so once: {shell_line('tinylora', 'chat', adapter.label, '--trust')}"
        )
    if settings.quantization != "none" and dtype == "auto":
        dtype = settings.dtype  # a base that was quantised in another one has other values
    return load_base_model(
        settings.name, device="cpu", dtype=dtype, revision=settings.revision,
        trust_remote_code=settings.trust_remote_code, quantization=settings.quantization,
    )  # fmt: skip


def put_on(
    adapter: "Adapter", base: "BaseModel", other_base: bool = False, *, hashed: bool = False
) -> "AttachedAdapter":
    """The adapter on its base; `hashed`: all weights are read, whatever was remembered of their files.

    Raises: UserError for another base, unless `other_base`.
    """
    from tinylora.methods.put_on import put_tinylora_on
    from tinylora.models.bases import remember

    files, identity = () if hashed else base.files, remember(base, hashed=hashed)
    return put_tinylora_on(base.model, adapter, files=files, other_base=other_base, identity=identity)


def complete(adapter: "Adapter", model: str) -> "Adapter":
    """The adapter with fingerprint and check, for which its base is loaded only if it has none."""
    if adapter.explicit is not None or (adapter.fingerprint is not None and adapter.check):
        return adapter
    from tinylora.methods.put_on import completed
    from tinylora.models.bases import remember

    base = load_base(adapter, model)
    return completed(adapter, put_on(adapter, base), remember(base))


def output_at(path: Path | None, force: bool = False) -> "Output | None":
    """Where --out goes, looked at before a model is loaded; None without it. Raises: UserError."""
    from tinylora.system.outputs import Output

    return None if path is None else Output.at(path, force=force)
