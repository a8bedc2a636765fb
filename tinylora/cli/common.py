"""What all verbs share: the app, their guard, options that many have."""

import functools
import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
import typer.core

from tinylora.errors import UserError, is_text
from tinylora.system.failures import NO_ROOM, OF_THE_MACHINE, reason
from tinylora.system.interrupts import exit_code
from tinylora.system.progress import bars
from tinylora.system.streams import can_show, let_go
from tinylora.talk import harmless
from tinylora.talk import say_to_stderr as say

P = ParamSpec("P")
T = TypeVar("T")


class _InOrderOfUse(typer.core.TyperGroup):
    """The verbs in the order in which a user meets them."""

    ORDER = (
        "train", "eval", "report", "chat", "sweep", "figure", "inspect", "bench", "encode", "decode", "verify",
        "export", "import", "diff", "mix", "card", "push", "pull", "recipes", "settings",
        "cache",
    )  # fmt: skip

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=self.ORDER.index)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """All words of all verbs come by here. Those that are no text could be neither kept nor printed later."""
        for word in args:
            if not is_text(word):
                say(
                    f"tinylora: the word {word!a} is not {sys.getfilesystemencoding().upper()} text; write it in "
                    "that encoding, or rename the file or folder"
                )
                raise typer.Exit(2)
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="tinylora",
    cls=_InOrderOfUse,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: examples keep their lines, and so does a pipe
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated.")
]
OtherBase = Annotated[
    bool, typer.Option("--other-base", help="Go on though the base is not the one that the adapter was made for.")
]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Take what the settings in there run, read and load for yours, now and later."),
]
Force = Annotated[bool, typer.Option("--force", help="Write over a file that is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def verb(command: Callable[P, T]) -> Callable[P, T]:
    """Turn a user's mistake, a place that is none, a full disk, Ctrl-C or a closed pipe into a sentence and a code.

    On a terminal, and without --json, long work shows bars meanwhile.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            with bars(wanted=not kwargs.get("as_json")):
                result = command(*args, **kwargs)
            sys.stdout.flush()  # here, so that a closed pipe shows up here
            return result
        except UserError as error:
            last_word(f"tinylora: {error}")
            raise typer.Exit(2) from None
        except OSError as error:
            raise typer.Exit(refused_by_the_system(error)) from None
        except KeyboardInterrupt as stop:
            last_word("tinylora: interrupted")
            raise typer.Exit(exit_code(stop)) from None

    return guarded


def refused_by_the_system(error: OSError) -> int:
    """Say what the system refused, and give the exit code. Raises: the error itself, if it is a mistake of ours."""
    if isinstance(error, BrokenPipeError):  # the reader (head, less) has what it wanted
        let_go(sys.stdout)
        return 141
    if error.errno not in OF_THE_MACHINE:
        raise error
    last_word(f"tinylora: {_in_words(error)}")
    return 2


def last_word(text: str) -> None:
    """What is said at an end, to whoever still listens."""
    with suppress(OSError, ValueError):
        say(text)


def _in_words(error: OSError) -> str:
    """What the system refused, where no verb has said it better."""
    if error.errno in NO_ROOM:
        where = f" at {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space (tinylora cache shows what can go) and try again"
    if error.filename:
        return f"{error.filename}: {reason(error).lower()}; name another place"
    return f"the system refused to read or write ({reason(error)}); see to the disk, and try again"


def print_json(value: Any) -> None:
    """One JSON object on stdout; what would do something to a terminal stands in it as an escape, of the same value.

    So does what stdout's encoding cannot show: its own escapes are no JSON.
    """
    text = json.dumps(_plain(value), ensure_ascii=False, default=str)
    if not can_show(text):
        text = json.dumps(_plain(value), default=str)
    print("".join(one if harmless(one) == one else _escaped(one) for one in text) if harmless(text) != text else text)


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1] if ord(character) > 0x7F else f"\\u{ord(character):04x}"


def _plain(value: Any) -> Any:
    """NaN and infinities, for which JSON has no word, as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value
