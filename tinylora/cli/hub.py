"""card, push, pull: model cards, and adapters on the hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinylora.cli.adapters import AdapterArgument, Model, complete, load_base, put_on
from tinylora.cli.common import Json, app, print_json, verb
from tinylora.cli.export import write_export
from tinylora.errors import UserError
from tinylora.store.describe import describe_json, describe_text
from tinylora.talk import shell_line, show

if TYPE_CHECKING:
    from tinylora.store.adapter import Adapter


@app.command()
@verb
def card(
    adapter: AdapterArgument,
    model: Model = "",
    licence: Annotated[str, typer.Option(help="Licence of the base, by its identifier on the hub.")] = "",
) -> None:
    """Print a model card. What was trained, what it changed against which controls, what it cost, how to load it.

    \b
    Examples:
      tinylora card runs/demo-001
    """
    show(_card(adapter, model, licence)[0], end="")


def _card(reference: str, model: str, licence: str) -> tuple[str, "Adapter"]:
    from tinylora.interop.card import model_card
    from tinylora.store.adapter import open_adapter

    opened = open_adapter(reference)
    portable = None
    if opened.method.name == "tinylora":
        opened = complete(opened, model)
        portable = opened.to_portable() if opened.explicit is None else None
    run = opened.folder if opened.label == str(opened.folder) else None
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
    from tinylora.system.folders import check_folder

    if also not in ("", "peft", "lora"):
        raise UserError(f"--also must be peft or lora, got {also!r}")
    if dry_run is not None:
        check_folder(dry_run)
    text, opened = _card(adapter, model, licence)
    with tempfile.TemporaryDirectory() as scratch:
        folder = dry_run if dry_run is not None else Path(scratch) / "adapter"
        _hub_folder(folder, text, opened, model, also)
        address = str(folder) if dry_run is not None else upload(folder, repo, private=private)
    if as_json:
        print_json({"repo": repo, "address": address, "uploaded": dry_run is None})
    else:
        show(f"{'wrote' if dry_run is not None else 'uploaded to'} {address}")


def _hub_folder(folder: Path, text: str, opened: "Adapter", model: str, also: str) -> None:
    from tinylora.adapter.explicit import save_explicit
    from tinylora.system.files import write_atomically
    from tinylora.system.folders import write_folder

    if opened.method.name != "tinylora":
        raise UserError(
            f"{opened.label} holds {opened.method.describe()}, and push is for TinyLoRA's adapters; what PEFT knows "
            "lies as its own adapter in the run's folder peft, which PEFT's push_to_hub takes"
        )
    if also:
        base = load_base(opened, model)
        write_export(also, folder, put_on(opened, base), base, 0, "", public=True)
    else:
        write_folder(folder, {})
    write_atomically(folder / "README.md", text.encode("utf-8", errors="replace"))
    if opened.explicit is not None:
        write_atomically(folder / "adapter.safetensors", save_explicit(opened.explicit))
    else:
        write_atomically(folder / "adapter.tinylora", opened.to_portable().to_bytes())


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
    from tinylora.interop.hub import pull as fetch
    from tinylora.store.adapter import open_adapter

    folder = fetch(repo, out or Path(repo.rsplit("/", 1)[-1]), revision=revision)
    opened = open_adapter(folder)
    if as_json:
        print_json({"folder": str(folder), **describe_json(opened)})
    else:
        show(describe_text(opened))
        show(f"in {folder}; next: {shell_line('tinylora', 'chat', folder)}")
