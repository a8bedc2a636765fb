"""chat: both models answer what is typed."""

import io
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from tinylora.cli.adapters import open_named
from tinylora.cli.common import Json, OtherBase, Overrides, Trust, app, print_json, verb
from tinylora.errors import UserError
from tinylora.talk import say_to_stderr as say
from tinylora.talk import show


@app.command()
@verb
def chat(
    run: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="A run folder, an adapter file, or a code.")] = "",
    adapter: Annotated[str, typer.Option(metavar="ADAPTER", help="The same as an option.")] = "",
    model: Annotated[
        str, typer.Option(help="The base model, where it is not the one of training or is not known.")
    ] = "",
    other_base: OtherBase = False,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Answer this and end; may be repeated.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Token budget of an answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    plain: Annotated[
        bool, typer.Option("--plain", help="Send the line alone, without the recipe's system prompt and examples.")
    ] = False,
    trust: Trust = False,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Answer typed lines with both models, side by side. Each line stands alone.

    \b
    Examples:
      tinylora chat runs/demo-001
      tinylora chat runs/demo-001 --prompt "12 + 30 =" --temperature 0.7
      cat questions.txt | tinylora chat runs/demo-001 --plain --json
      tinylora chat --adapter TINY-...
    """
    if prompt is None and sys.stdin is None:
        raise UserError("standard input is closed, so no line can be typed; ask with --prompt TEXT")
    from tinylora.evaluation.settings import check_base_kept, settings_for_eval
    from tinylora.generation.types import SamplingParams
    from tinylora.rollouts.runtime import open_runtime
    from tinylora.serving.chat import format_pair, reply_pair

    if bool(run) == bool(adapter):
        raise UserError("name one adapter, such as: tinylora chat runs/demo-001, or tinylora chat --adapter TINY-...")
    opened = open_named(run or adapter, ("model", "prompt"), model, set_ or [], trust=trust)
    trained = opened.settings(model)
    config = settings_for_eval(trained, overrides=set_ or [], is_own=opened.is_own)
    check_base_kept(trained, config)
    runtime = open_runtime(config, task=False, say=say, on=opened, other_base=other_base)
    v = opened.v
    SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)  # refuses what no line can take
    pairs: list[dict[str, Any]] = []
    failed = False
    try:
        for line in prompt if prompt is not None else _typed_lines():
            try:
                pair = reply_pair(
                    runtime, v, line, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, plain=plain
                )
            except UserError as error:  # this line cannot be asked; the others can
                say(f"tinylora: {error}")
                pairs.append({"prompt": line, "error": str(error)})
                failed = True
                continue
            pairs.append(pair.to_json())
            if not as_json:
                show(format_pair(pair) + "\n", flush=True)
    finally:  # also for Ctrl-C
        if as_json:
            print_json({"model": config.model.name, "adapter": opened.label, "replies": pairs})
    if failed:
        raise typer.Exit(2)


def _typed_lines() -> Iterator[str]:
    """Lines of stdin that are not empty; on a terminal, with a prompt on stderr."""
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes of another encoding, one line of which would end it all
    if terminal:
        say("type a line; end with Ctrl-D")
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()
