"""bench: how fast a model generates here."""

import dataclasses
from typing import Annotated

import typer

from tinylora.cli.common import Json, app, print_json, verb
from tinylora.errors import UserError
from tinylora.talk import say_to_stderr as say
from tinylora.talk import show


@app.command()
@verb
def bench(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The embedded model, a folder, a .gguf file, or a hub id.")
    ],
    batch: Annotated[str, typer.Option(help="Rows at once, separated by commas; each is measured.")] = "1,8,64",
    prompt: Annotated[int, typer.Option(help="Tokens of each row's prompt.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens generated on each row.")] = 64,
    threads: Annotated[int, typer.Option(help="0 takes OMP_NUM_THREADS, else the cores really available.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    backend: Annotated[str, typer.Option(help="native or transformers.")] = "native",
    as_json: Json = False,
) -> None:
    """Measure how fast a model generates here. Says how near that is to what this machine can do.

    The roofline: a decode step takes at least, for every linear map, the larger of 2 x rows x in x out / product rate
    and its bytes / memory bandwidth, and the bytes of the keys and values it reads / memory bandwidth; rate and
    bandwidth are measured first. The share is that bound divided by the measured time.

    \b
    Examples:
      tinylora bench smollm2-135m-instruct
      tinylora bench Qwen/Qwen2.5-0.5B-Instruct --batch 1,32 --prompt 256 --new 128
      tinylora bench smollm2-135m-instruct --backend transformers --threads 1 --json
    """
    from tinylora.planning.generation_speed import BenchSettings, format_bench, run_bench

    result = run_bench(
        model,
        BenchSettings(
            batches=_batches(batch),
            prompt=prompt,
            new=new,
            threads=threads,
            device=device,
            dtype=dtype,
            backend=backend,  # type: ignore[arg-type]
        ),
        say,
    )
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        show(format_bench(result))


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"--batch must be whole numbers separated by commas, such as 1,8,64, got {text!r}") from None
