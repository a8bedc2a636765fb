"""encode, decode, verify, export, import, diff, mix, card, push, pull: adapters as files, codes and other formats."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinylora.cli.common import NO_ROOM, Json, OtherBase, app, print_json, say, verb
from tinylora.errors import UserError

if TYPE_CHECKING:
    from tinylora.adapter.attach import AttachedAdapter
    from tinylora.adapters import Adapter
    from tinylora.models.load import BaseModel

AdapterArgument = Annotated[str, typer.Argument(metavar="ADAPTER", help="A run folder, an adapter file, or a code.")]
Model = Annotated[str, typer.Option(help="The base model, where it is not known or lies elsewhere.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or, for gguf, float16.")]


def _value_type(dtype: str) -> Any:
    known = {"float32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "fp32": "float32"}
    if dtype not in known:
        raise UserError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
    return known[dtype]


def _load(adapter: "Adapter", model: str, dtype: str = "auto") -> "BaseModel":
    from tinylora.models.load import load_base_model

    settings = adapter.settings(model).model
    if settings.quantization != "none" and dtype == "auto":
        dtype = settings.dtype  # a base that was quantised in another one has other values
    return load_base_model(
        settings.name, device="cpu", dtype=dtype, revision=settings.revision,
        trust_remote_code=settings.trust_remote_code, quantization=settings.quantization,
    )  # fmt: skip


def _put_on(adapter: "Adapter", base: "BaseModel", other_base: bool = False) -> "AttachedAdapter":
    from tinylora.adapters import put_tinylora_on
    from tinylora.models.bases import remember

    return put_tinylora_on(base.model, adapter, files=base.files, other_base=other_base, identity=remember(base))


def _complete(adapter: "Adapter", model: str) -> "Adapter":
    """The adapter with fingerprint and check, for which its base is loaded only if it has none."""
    if adapter.explicit is not None or (adapter.fingerprint is not None and adapter.check):
        return adapter
    from tinylora.adapters import completed
    from tinylora.models.bases import remember

    base = _load(adapter, model)
    return completed(adapter, _put_on(adapter, base), remember(base))


@app.command()
@verb
def encode(
    adapter: AdapterArgument,
    dtype: Annotated[str, typer.Option(help="Of the numbers: float32 or bfloat16.")] = "float32",
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the file, too.")] = None,
    model: Model = "",
    with_factors: Annotated[
        bool, typer.Option("--with-factors", help="Write the larger file, which brings its factors along.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print an adapter as a code of some hundred characters, and write it as a file of tens of bytes.

    \b
    Examples:
      tinylora encode runs/demo-001
      tinylora encode runs/demo-001 --dtype bfloat16 -o demo.tinylora
    """
    from tinylora.adapters import open_adapter

    opened = open_adapter(adapter)
    if with_factors:
        _encode_factors(opened, model, out, as_json)
        return
    opened = _complete(opened, model)
    portable = opened.to_portable(_value_type(dtype))
    data = portable.to_bytes()
    code = _code(data)
    if code is None and out is None:
        raise UserError(f"{portable.num_numbers} numbers are too many for a code; write the file with --out FILE")
    if out is not None:
        _write(out, data)
    change = (
        float((opened.v - opened.rounded(portable.value_type).v).norm() / opened.v.norm()) if opened.v.any() else 0.0
    )
    if as_json:
        print_json(
            {
                "code": code,
                "code_chars": len(code) if code else None,
                "file_bytes": len(data),
                "file": str(out) if out else None,
                "numbers": portable.num_numbers,
                "dtype": portable.value_type,
                "relative_change": change,
                "fingerprint": portable.fingerprint.hex(),
                "check": portable.check.hex(),
            }
        )
        return
    print(code or "(too long for a code; use the file)")
    rounding = f"; rounding changed the numbers by {100 * change:.2g} %" if portable.value_type == "bfloat16" else ""
    where = f", written to {out}" if out else ""
    characters = f", {len(code)} characters" if code else ""
    sizes = f"{len(data)} bytes{where}{characters}{rounding}"
    say(f"{portable.num_numbers} numbers in {portable.value_type}: {sizes}")


def _encode_factors(opened: "Adapter", model: str, out: Path | None, as_json: bool) -> None:
    from tinylora.adapter.explicit import ExplicitFactors, ExplicitModule, save_explicit

    if out is None:
        raise UserError("--with-factors makes a file, not a code: say where with --out FILE.safetensors")
    if opened.explicit is None:
        import torch

        from tinylora.models.bases import remember

        base = _load(opened, model)
        attached = _put_on(opened, base)
        modules = {
            path: ExplicitModule(f.U, f.S, f.V, torch.from_numpy(attached.projections[path]), group)
            for (path, f), group in zip(
                ((p, attached.factors[p]) for p in attached.paths), attached.groups, strict=True
            )
        }
        explicit = ExplicitFactors(opened.v, modules, opened.label, remember(base).fingerprint.hex())
    else:
        explicit = opened.explicit
    data = save_explicit(explicit)
    _write(out, data)
    facts = {"file": str(out), "file_bytes": len(data), "numbers": explicit.v.numel(), "modules": len(explicit.modules)}
    if as_json:
        print_json(facts)
    else:
        print(
            f"{explicit.v.numel()} numbers with the factors of {len(explicit.modules)} modules: {len(data):,} bytes "
            f"in {out}"
        )


def _write(path: Path, data: bytes) -> None:
    from tinylora.training.run_folder import write_atomically

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


def _code(data: bytes) -> str | None:
    """The code, or None where it would be too long to be one."""
    from tinylora.adapter.code import fits_a_code, to_code

    return to_code(data) if fits_a_code(data) else None


@app.command()
@verb
def decode(
    adapter: AdapterArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write it as a file.")] = None,
    as_json: Json = False,
) -> None:
    """Print what a code or a file says, number by number. Needs no model.

    \b
    Examples:
      tinylora decode TINY-...
      tinylora decode TINY-... -o demo.tinylora
    """
    from tinylora.adapters import open_adapter

    opened = open_adapter(adapter)
    if out is not None:
        _write(out, opened.to_portable(opened.value_type).to_bytes() if opened.check else _no_short_form(opened))
    if as_json:
        print_json(describe_json(opened))
    else:
        print(describe_text(opened))


def _no_short_form(opened: "Adapter") -> bytes:
    raise UserError(
        f"{opened.label} does not say what its base is; write it with: tinylora encode {opened.label} -o FILE"
    )


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
    groups, u = opened.v.shape
    is_tinylora = opened.method.name == "tinylora"
    what = f"({groups} tie groups x {u})" if is_tinylora else f"of {opened.method.describe()}"
    lines = [f"{opened.v.numel():,} numbers {what} in {opened.value_type}, |v| = {float(opened.v.norm()):.4g}"]
    if not is_tinylora:
        lines.append("each is how far training moved a parameter of the method from its start")
    elif opened.config is not None:
        c = opened.config
        tie = (
            "one group"
            if c.tying == "all"
            else "no tying"
            if c.tying == "none"
            else f"{c.tying} tying, n_tie {c.n_tie}"
        )
        tie = f"{c.num_groups} even chunks" if c.num_groups else tie
        lines.append(
            f"rank {c.rank}, u = {c.u}, {tie}, targets {', '.join(c.targets)}, basis {c.basis}, seed {c.seed}: "
            "the factors are rebuilt from the base"
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


@dataclasses.dataclass(frozen=True, slots=True)
class _Change:
    module: str
    tie_group: int
    change: float
    """|dW|."""
    weight: float
    """|W|."""


def _change(attached: "AttachedAdapter", path: str, group: int) -> _Change:
    left, right = attached.delta_factors(path)
    change = float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())
    return _Change(path, group, change, float(attached.base_weight(path).float().norm()))


@app.command()
@verb
def verify(
    adapter: AdapterArgument,
    model: Model = "",
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Check that an adapter is intact and fits a base, and print what it would change, module by module.

    \b
    Examples:
      tinylora verify demo.tinylora
      tinylora verify TINY-... --model ./my-copy-of-the-model
    """
    from tinylora.adapters import open_adapter

    opened = open_adapter(adapter)
    base = _load(opened, model)
    attached = _put_on(opened, base, other_base)
    rows = [_change(attached, path, group) for path, group in zip(attached.paths, attached.groups, strict=True)]
    total, weights = (sum(getattr(row, name) ** 2 for row in rows) ** 0.5 for name in ("change", "weight"))
    stated = (
        "is taken to be"
        if other_base
        else "is"
        if opened.fingerprint
        else "is not stated in it, so it could not be compared; this one is"
    )
    verdict = (
        f"intact; its base {stated} {base.name}"
        + ("" if not other_base else " by --other-base, and was not compared")
        + (", and its basis came out the same" if opened.check and not other_base else "")
    )
    if as_json:
        print_json(
            {
                **describe_json(opened),
                "verdict": verdict,
                "modules": [dataclasses.asdict(row) for row in rows],
                "change": total,
                "weight": weights,
            }
        )
        return
    print(describe_text(opened))
    print(verdict)
    print(f"{'module':<44} {'group':>5} {'|dW|':>10} {'|dW|/|W|':>10}")
    for row in rows:
        relative = row.change / row.weight if row.weight else float("nan")
        print(f"{row.module:<44} {row.tie_group:>5} {row.change:>10.4g} {relative:>10.2e}")
    print(
        f"{f'all {len(rows)} modules':<44} {'':>5} {total:>10.4g} {total / weights if weights else float('nan'):>10.2e}"
    )


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
    as_json: Json = False,
) -> None:
    """Write an adapter for another tool: PEFT's TinyLoRA, LoRA (PEFT, vLLM, SGLang), llama.cpp, or merged weights.

    \b
    Examples:
      tinylora export runs/demo-001 --to lora -o demo-lora
      tinylora export TINY-... --to gguf -o demo.gguf
      tinylora export runs/demo-001 --to merged --dtype float32 -o demo-merged
    """
    from tinylora.adapters import open_adapter

    kinds = ("peft", "lora", "gguf", "merged")
    if to not in kinds:
        raise UserError(f"--to must be one of {', '.join(kinds)}, got {to!r}")
    if rank and to not in ("lora", "gguf"):
        raise UserError(f"--rank is for lora and gguf, not for {to}")
    if dtype and dtype not in {"peft": (), "lora": _DTYPES, "gguf": ("float32", "float16"), "merged": _DTYPES[:2]}[to]:
        raise UserError(f"--dtype {dtype!r} cannot be written as {to}; leave it out for the usual one")
    opened = open_adapter(adapter)
    base = _load(opened, model, dtype if to == "merged" and dtype else "auto")
    attached = _put_on(opened, base, other_base)
    facts = _export(to, out, attached, base, rank, dtype)
    if as_json:
        print_json({"adapter": opened.label, "to": to, "out": str(out), **facts})
        return
    print(facts["text"])


_DTYPES = ("float32", "bfloat16", "float16")


def _export(
    to: str, out: Path, attached: "AttachedAdapter", base: "BaseModel", rank: int, dtype: str
) -> dict[str, Any]:
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
    names = {"base_name": base.name, "revision": base.revision}
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

        factors = write_gguf(out, attached, rank=rank, dtype=chosen)
    size = _bytes_of(out)
    lost = f"; {100 * (1 - factors.kept):.2g} % of the squared update was cut off" if factors.kept < 1 else ""
    return {
        "rank": factors.rank, "kept": factors.kept, "bytes": size,
        "text": f"{to} of rank {factors.rank} in {out}: {size:,} bytes{lost}",
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
    as_json: Json = False,
) -> None:
    """Read a TinyLoRA of PEFT 0.20 or 0.21 into a file that brings its factors along.

    \b
    Examples:
      tinylora import peft-checkpoint --model Qwen/Qwen2.5-0.5B -o mine.safetensors
      tinylora chat mine.safetensors
    """
    import json

    from tinylora.adapter.explicit import save_explicit
    from tinylora.interop.peft_tinylora import read_peft
    from tinylora.models.bases import remember
    from tinylora.models.load import load_base_model

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give the folder of a PEFT checkpoint")
    name = model
    if not name and (folder / "adapter_config.json").is_file():
        try:
            name = str(json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path") or "")
        except (OSError, ValueError, AttributeError):
            name = ""  # read_peft says what is wrong with it
    if not name:
        raise UserError(f"{folder} does not name its base model; name it with --model")
    base = load_base_model(name, device="cpu")
    imported = read_peft(folder, base.model)
    explicit = dataclasses.replace(imported.explicit, fingerprint=remember(base).fingerprint.hex())
    data = save_explicit(explicit)
    _write(out, data)
    if imported.note:
        say(f"note: {imported.note}")
    facts = {
        "file": str(out), "file_bytes": len(data), "numbers": explicit.v.numel(), "modules": len(explicit.modules),
        "rank": explicit.rank, "note": imported.note or None,
    }  # fmt: skip
    if as_json:
        print_json(facts)
    else:
        print(
            f"{explicit.v.numel()} numbers with the factors of {len(explicit.modules)} modules, rank {explicit.rank}: "
            f"{len(data):,} bytes in {out}"
        )


@app.command()
@verb
def diff(a: AdapterArgument, b: AdapterArgument, as_json: Json = False) -> None:
    """Compare the numbers of two adapters on one basis.

    \b
    Examples:
      tinylora diff runs/demo-001 runs/demo-002
    """
    from tinylora.adapters import open_adapter
    from tinylora.vectors import difference

    one, two = open_adapter(a), open_adapter(b)
    if one.fingerprint or two.fingerprint:
        one, two = _complete(one, ""), _complete(two, "")
    found = difference(one, two)
    if as_json:
        print_json({"a": one.label, "b": two.label, **dataclasses.asdict(found)})
        return
    group, place, x, y = found.largest
    print(
        f"|a| = {found.norm_a:.4g}, |b| = {found.norm_b:.4g}, |a - b| = {found.distance:.4g}, cosine {found.cosine:.4f}"
    )
    print(f"largest difference: tie group {group}, number {place}: {x:+.5g} and {y:+.5g}")


@app.command()
@verb
def mix(
    adapters: Annotated[list[str], typer.Argument(metavar="ADAPTER...", help="Two or more, on one basis.")],
    weights: Annotated[str, typer.Option(help="One for each, separated by commas; without it, the mean.")] = "",
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write the file, too.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the numbers: float32 or bfloat16.")] = "float32",
    model: Model = "",
    as_json: Json = False,
) -> None:
    """Average or interpolate adapters: a weighted sum of their numbers.

    \b
    Examples:
      tinylora mix runs/demo-001 runs/demo-002
      tinylora mix runs/demo-001 TINY-... --weights 0.7,0.3 -o mixed.tinylora
    """
    from tinylora.adapters import open_adapter
    from tinylora.vectors import mix as mixed_of

    try:
        numbers = [float(part) for part in weights.split(",")] if weights else [1 / len(adapters)] * len(adapters)
    except ValueError:
        raise UserError(f"--weights must be numbers separated by commas, such as 0.7,0.3, got {weights!r}") from None
    opened = [open_adapter(one) for one in adapters]
    if any(one.fingerprint for one in opened):  # else all of them are completed at once, as one
        opened = [_complete(one, model) for one in opened]
    mixed = _complete(mixed_of(opened, numbers), model)
    data = mixed.to_portable(_value_type(dtype)).to_bytes()
    if out is not None:
        _write(out, data)
    if as_json:
        print_json({**describe_json(mixed), "code": _code(data), "file": str(out) if out else None})
        return
    print(_code(data) or "(too long for a code; use the file)")
    say(
        f"{mixed.label}: {mixed.v.numel()} numbers, |v| = {float(mixed.v.norm()):.4g}"
        + (f", written to {out}" if out else "")
    )


@app.command()
@verb
def card(
    adapter: AdapterArgument,
    model: Model = "",
    licence: Annotated[str, typer.Option(help="Licence of the base, by its identifier on the hub.")] = "",
) -> None:
    """Print a model card: what was trained, what it changed against which controls, what it cost, how to load it.

    \b
    Examples:
      tinylora card runs/demo-001
    """
    print(_card(adapter, model, licence)[0], end="")


def _card(reference: str, model: str, licence: str) -> tuple[str, "Adapter"]:
    from tinylora.adapters import open_adapter
    from tinylora.interop.card import model_card

    opened = _complete(open_adapter(reference), model)
    folder = Path(reference)
    run = folder if folder.is_dir() else None
    portable = opened.to_portable() if opened.explicit is None else None
    name = model or opened.base_name or "unknown"
    return model_card(opened, portable, base_name=name, licence=licence or _licence(name), run=run), opened


def _licence(name: str) -> str:
    from tinylora.models.embedded import EMBEDDED

    return EMBEDDED[name].licence if name in EMBEDDED else ""


@app.command()
@verb
def push(
    adapter: AdapterArgument,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    also: Annotated[str, typer.Option(help="peft or lora: the same adapter for other tools, in the same folder.")] = "",
    model: Model = "",
    licence: Annotated[str, typer.Option(help="Licence of the base, by its identifier on the hub.")] = "",
    dry_run: Annotated[
        Path | None, typer.Option("--dry-run", metavar="FOLDER", help="Write the folder here and upload nothing.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Upload an adapter with its model card to the Hugging Face hub.

    \b
    Examples:
      tinylora push runs/demo-001 me/demo --also lora
      tinylora push runs/demo-001 me/demo --dry-run folder
    """
    import tempfile

    from tinylora.interop.hub import push as upload

    if also not in ("", "peft", "lora"):
        raise UserError(f"--also must be peft or lora, got {also!r}")
    text, opened = _card(adapter, model, licence)
    with tempfile.TemporaryDirectory() as scratch:
        folder = dry_run if dry_run is not None else Path(scratch) / "adapter"
        _hub_folder(folder, text, opened, model, also)
        address = str(folder) if dry_run is not None else upload(folder, repo, private=private)
    if as_json:
        print_json({"repo": repo, "address": address, "uploaded": dry_run is None})
    else:
        print(f"{'wrote' if dry_run is not None else 'uploaded to'} {address}")


def _hub_folder(folder: Path, text: str, opened: "Adapter", model: str, also: str) -> None:
    from tinylora.adapter.explicit import save_explicit
    from tinylora.interop.files import check_folder, write_folder

    check_folder(folder)
    if also:
        base = _load(opened, model)
        _export(also, folder, _put_on(opened, base), base, 0, "")
    else:
        write_folder(folder, {})
    (folder / "README.md").write_text(text, encoding="utf-8")
    if opened.explicit is not None:
        _write(folder / "adapter.safetensors", save_explicit(opened.explicit))
    else:
        _write(folder / "adapter.tinylora", opened.to_portable().to_bytes())


@app.command()
@verb
def pull(
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the hub.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Where to put it.")] = None,
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "",
    as_json: Json = False,
) -> None:
    """Fetch an adapter from the Hugging Face hub.

    \b
    Examples:
      tinylora pull me/demo
      tinylora chat demo
    """
    from tinylora.adapters import open_adapter
    from tinylora.interop.hub import pull as fetch

    folder = fetch(repo, out or Path(repo.rsplit("/", 1)[-1]), revision=revision)
    opened = open_adapter(folder)
    if as_json:
        print_json({"folder": str(folder), **describe_json(opened)})
    else:
        print(describe_text(opened))
        print(f"in {folder}; next: tinylora chat {folder}")
