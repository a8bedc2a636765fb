"""encode, decode: adapters as codes and as files of tens of bytes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinylora.cli.adapters import AdapterArgument, Model, complete, load_base, output_at, put_on, value_type
from tinylora.cli.common import Force, Json, app, print_json, verb
from tinylora.errors import UserError
from tinylora.store.describe import code_of, describe_json, describe_text
from tinylora.talk import say_to_stderr as say
from tinylora.talk import shell_line, show

if TYPE_CHECKING:
    from tinylora.store.adapter import Adapter
    from tinylora.system.outputs import Output


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
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Print an adapter as a code of some hundred characters. With --out, write it as a file of tens of bytes, too.

    \b
    Examples:
      tinylora encode runs/demo-001
      tinylora encode runs/demo-001 --dtype bfloat16 -o demo.tinylora
    """
    from tinylora.store.adapter import open_adapter

    output = output_at(out, force)
    opened = open_adapter(adapter)
    if with_factors:
        _encode_factors(opened, model, output, as_json)
        return
    opened = complete(opened, model)
    portable = opened.to_portable(value_type(dtype))
    data = portable.to_bytes()
    code = code_of(data)
    if code is None and out is None:
        raise UserError(f"{portable.num_numbers} numbers are too many for a code; write the file with --out FILE")
    out = output.write(data) if output is not None else None
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
    show(code or "(too long for a code; use the file)")
    rounding = f"; rounding changed the numbers by {100 * change:.2g} %" if portable.value_type == "bfloat16" else ""
    where = f", written to {out}" if out else ""
    characters = f", {len(code)} characters" if code else ""
    sizes = f"{len(data)} bytes{where}{characters}{rounding}"
    say(f"{portable.num_numbers} numbers in {portable.value_type}: {sizes}")


def _encode_factors(opened: "Adapter", model: str, output: "Output | None", as_json: bool) -> None:
    from tinylora.adapter.explicit import ExplicitFactors, ExplicitModule, save_explicit

    if output is None:
        raise UserError("--with-factors makes a file, not a code: say where with --out FILE.safetensors")
    if opened.explicit is None:
        import torch

        from tinylora.models.bases import remember

        base = load_base(opened, model)
        attached = put_on(opened, base)
        modules = {
            path: ExplicitModule(f.U, f.S, f.V, torch.from_numpy(attached.projections[path]), group)
            for (path, f), group in zip(
                ((p, attached.factors[p]) for p in attached.paths), attached.groups, strict=True
            )
        }
        explicit = ExplicitFactors(opened.v, modules, Path(opened.label).name, remember(base).fingerprint.hex())
    else:
        explicit = opened.explicit
    data = save_explicit(explicit)
    out = output.write(data)
    facts = {"file": str(out), "file_bytes": len(data), "numbers": explicit.v.numel(), "modules": len(explicit.modules)}
    if as_json:
        print_json(facts)
    else:
        show(
            f"{explicit.v.numel()} numbers with the factors of {len(explicit.modules)} modules: {len(data):,} bytes "
            f"in {out}"
        )


@app.command()
@verb
def decode(
    adapter: AdapterArgument,
    out: Annotated[Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write it as a file.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Print what a code or a file says, number by number. Needs no model.

    \b
    Examples:
      tinylora decode TINY-...
      tinylora decode TINY-... -o demo.tinylora
    """
    from tinylora.store.adapter import open_adapter

    output = output_at(out, force)
    opened = open_adapter(adapter)
    if output is not None:
        is_short = opened.check or opened.explicit is not None
        output.write(opened.to_portable(opened.value_type).to_bytes() if is_short else _no_short_form(opened))
    if as_json:
        print_json(describe_json(opened))
    else:
        show(describe_text(opened))


def _no_short_form(opened: "Adapter") -> bytes:
    raise UserError(
        f"{opened.label} does not say what its base is; write it with: "
        + shell_line("tinylora", "encode", opened.label, "-o", "FILE")
    )
