"""export, import: adapters of other tools."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinylora.cli.adapters import AdapterArgument, Model, load_base, output_at, put_on
from tinylora.cli.common import Force, Json, OtherBase, app, print_json, verb
from tinylora.errors import UserError
from tinylora.talk import say_to_stderr as say
from tinylora.talk import show

if TYPE_CHECKING:
    from tinylora.adapter.attach import AttachedAdapter
    from tinylora.models.base import BaseModel
    from tinylora.system.outputs import Output

Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or, for gguf, float16.")]


@app.command()
@verb
def export(
    adapter: AdapterArgument,
    to: Annotated[str, typer.Option("--to", help="peft, lora, gguf or merged.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="PATH", help="A new folder; for gguf a new file.")],
    model: Model = "",
    other_base: OtherBase = False,
    rank: Annotated[
        int, typer.Option(help="Of lora and gguf; 0 is the adapter's own, more is filled up, fewer is cut.")
    ] = 0,
    dtype: Dtype = "",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write an adapter for PEFT, vLLM, SGLang or llama.cpp, or merged. PEFT takes TinyLoRA or LoRA.

    \b
    Examples:
      tinylora export runs/demo-001 --to lora -o demo-lora
      tinylora export TINY-... --to gguf -o demo.gguf
      tinylora export runs/demo-001 --to merged --dtype float32 -o demo-merged
    """
    from tinylora.store.adapter import open_adapter
    from tinylora.system.folders import check_folder

    kinds = ("peft", "lora", "gguf", "merged")
    if to not in kinds:
        raise UserError(f"--to must be one of {', '.join(kinds)}, got {to!r}")
    if rank and to not in ("lora", "gguf"):
        raise UserError(f"--rank is for lora and gguf, not for {to}")
    if dtype and dtype not in {"peft": (), "lora": _DTYPES, "gguf": ("float32", "float16"), "merged": _DTYPES[:2]}[to]:
        raise UserError(f"--dtype {dtype!r} cannot be written as {to}; leave it out for the usual one")
    output = output_at(out, force) if to == "gguf" else None
    if output is None:
        check_folder(out)
    opened = open_adapter(adapter)
    base = load_base(opened, model, dtype if to == "merged" and dtype else "auto")
    attached = put_on(opened, base, other_base)
    facts = write_export(to, out, attached, base, rank, dtype, output=output)
    if as_json:
        print_json({"adapter": opened.label, "to": to, "out": str(out), **facts})
        return
    show(facts["text"])


_DTYPES = ("float32", "bfloat16", "float16")


def write_export(
    to: str,
    out: Path,
    attached: "AttachedAdapter",
    base: "BaseModel",
    rank: int,
    dtype: str,
    *,
    public: bool = False,
    output: "Output | None" = None,
) -> dict[str, Any]:
    """Write an adapter as `to` says; what is in it, as data and, under "text", in words.

    public: of a base that lies here, its name alone is written, and not where it lies. output: where a gguf file goes.
    """
    import torch

    from tinylora.interop.merged import ENOUGH, write_merged
    from tinylora.interop.peft_tinylora import write_peft

    chosen = {"": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if to == "merged":
        report = write_merged(out, attached, base.tokenizer)
        worst = min(report.shares, key=lambda path: report.shares[path])
        if not report.is_whole:
            say(
                f"warning: only {100 * report.total:.0f} % of the update survived the rounding to {base.dtype} (least "
                f"in {worst}: {100 * report.shares[worst]:.0f} %; {100 * ENOUGH:.0f} % would be enough); merge in "
                "float32, or use lora"
            )
        text = (
            f"merged model in {out}: {100 * report.total:.1f} % of the update arrived, error "
            f"{100 * report.error:.2g} % of it"
        )
        facts = {"share": report.total, "error": report.error, "shares": dict(report.shares)}
        return {**facts, "text": text}
    is_local = base.kind not in ("hub", "embedded")
    names = {"base_name": Path(base.name).name if public and is_local else base.name, "revision": base.revision}
    if to == "peft":
        write_peft(out, attached, **names)
        size = _bytes_of(out)
        return {
            "bytes": size,
            "text": f"PEFT TinyLoRA in {out}: {attached.num_trained} trained numbers, {size:,} bytes",
        }
    if to == "lora":
        from tinylora.interop.lora import write_lora

        factors = write_lora(out, attached, rank=rank, dtype=chosen, **names)
    else:
        from tinylora.interop.gguf_lora import write_gguf

        factors = write_gguf(output or out, attached, rank=rank, dtype=chosen)
    told = _bytes_of(out) if out.is_file() or out.is_dir() else None  # a device or FIFO has none
    lost = f"; {100 * (1 - factors.kept):.2g} % of the squared update was cut off" if factors.kept < 1 else ""
    return {
        "rank": factors.rank, "kept": factors.kept, "bytes": told,
        "text": f"{to} of rank {factors.rank} in {out}{f': {told:,} bytes' if told else ''}{lost}",
    }  # fmt: skip


def _bytes_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir() if f.is_file())


@app.command("import")
@verb
def import_(
    folder: Annotated[Path, typer.Argument(metavar="PEFT_FOLDER", help="A checkpoint of PEFT's TinyLoRA.")],
    model: Annotated[str, typer.Option(help="The base it was trained on; without it, the one that it names.")] = "",
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="The file to write.")] = Path(
        "imported.safetensors"
    ),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Read a TinyLoRA of PEFT into a file. Of PEFT 0.20 or 0.21; the file brings its factors along.

    \b
    Examples:
      tinylora import peft-checkpoint --model Qwen/Qwen2.5-0.5B -o mine.safetensors
      tinylora chat mine.safetensors
    """

    from tinylora.adapter.explicit import save_explicit
    from tinylora.interop.peft_tinylora import read_peft
    from tinylora.models.bases import has_been_seen, read_name, remember, written_name
    from tinylora.models.embedded import EMBEDDED
    from tinylora.models.load import load_base_model
    from tinylora.system.outputs import Output
    from tinylora.system.strict_json import read_json

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder of a PEFT checkpoint")
    output = Output.at(out, force=force)
    name, revision, quantization = read_name(model)
    if not name and (folder / "adapter_config.json").is_file():
        told = read_json(folder / "adapter_config.json", "save the adapter again with PEFT")
        if isinstance(told, dict):  # else read_peft says what is wrong with it
            name, revision = (str(told.get(key) or "") for key in ("base_model_name_or_path", "revision"))
        if name and name not in EMBEDDED and not has_been_seen(name, revision):
            raise UserError(
                f"{folder} names the base {name!a}, which has not been loaded here before, and a file does not choose "
                "what is loaded; if it is the right one, name it with --model "
                + shlex.quote(written_name(name, revision, "none"))
            )
    if not name:
        raise UserError(f"{folder} does not name its base model; name it with --model")
    base = load_base_model(name, device="cpu", revision=revision, quantization=quantization)
    imported = read_peft(folder, base.model)
    explicit = dataclasses.replace(imported.explicit, fingerprint=remember(base).fingerprint.hex())
    data = save_explicit(explicit)
    out = output.write(data)
    if imported.note:
        say(f"note: {imported.note}")
    facts = {
        "file": str(out), "file_bytes": len(data), "numbers": explicit.v.numel(), "modules": len(explicit.modules),
        "rank": explicit.rank, "note": imported.note or None,
    }  # fmt: skip
    if as_json:
        print_json(facts)
    else:
        show(
            f"{explicit.v.numel()} numbers with the factors of {len(explicit.modules)} modules, rank {explicit.rank}: "
            f"{len(data):,} bytes in {out}"
        )
