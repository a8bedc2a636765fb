"""The command line: parse, call one function, print. Results go to stdout, talk to stderr.

Exit codes: 0 done, 1 failed, 2 misused (one sentence on stderr), 130 interrupted. Torch is imported inside the verbs,
so that `--help` stays fast.
"""

import os
import sys
from typing import Annotated, TextIO

import typer

from tinylora import __version__
from tinylora.cli import (  # noqa: F401 (their verbs)
    bench,
    cache,
    chat,
    encode,
    eval,
    export,
    figure,
    hub,
    inspect,
    mix,
    report,
    settings,
    sweep,
    train,
    verify,
)
from tinylora.cli.codes import with_whole_codes
from tinylora.cli.common import app, last_word, refused_by_the_system
from tinylora.system.interrupts import end_at_next, exit_code, listen
from tinylora.system.streams import let_go, prepare_streams


def main() -> None:
    """Entry point of the `tinylora` command."""
    _set_environment()
    prepare_streams()
    listen()
    sys.argv[1:] = with_whole_codes(sys.argv[1:])
    try:
        code = _run()
        for stream in (sys.stdout, sys.stderr):
            code = _flush(stream, code)
    except KeyboardInterrupt as stop:  # outside of every verb
        last_word("tinylora: interrupted")
        code = exit_code(stop)
    end_at_next()
    sys.exit(code)


def _run() -> int:
    """The exit code of the verb."""
    try:
        app(prog_name="tinylora")
    except SystemExit as end:
        # What typer puts in a stream's place when its help meets a closed pipe; its own code for that is 1.
        is_closed = type(sys.stdout).__name__ == "PacifyFlushWrapper"
        return 141 if is_closed else int(end.code or 0)
    except OSError as error:  # of what no verb has printed, such as help
        return refused_by_the_system(error)
    return 0


def _flush(stream: TextIO, code: int) -> int:
    """Here, as Python can only complain about what it cannot write at its end; the exit code, or that of a failure."""
    try:
        stream.flush()
    except OSError as error:
        let_go(stream)
        return code or refused_by_the_system(error)
    return code


def _set_environment() -> None:
    """What must stand before torch and tokenizers are loaded; whatever the user has set stays."""
    # OpenMP threads that spin at barriers keep their core from the threads they wait for: on a busy machine this made a
    # batch ten times slower. Threads that sleep at once are late on an idle one. A thousand turns cost neither much
    # (bench/speed/spin.py: as fast alone as without any of this, a tenth slower than sleeping beside another process).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    # The tokenizer's own threads are of no use for short prompts, and make it warn when a process is forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tinylora {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fine-tune a language model by training a dozen numbers, and see what that did.

    \b
    Examples:
      tinylora train demo                          train 13 numbers, then measure what they changed
      tinylora train demo --dry-run                what that would take: numbers, tokens, memory, hours
      tinylora eval runs/demo-001                  untrained model and adapter on the same held-out items
      tinylora chat runs/demo-001                  both of them answer what you type
      tinylora report runs/demo-001                one page with everything that was measured
      tinylora inspect Qwen/Qwen2.5-7B-Instruct    what would be trained in another model
      tinylora settings optim                      the settings of the optimiser, each with its default
    """
