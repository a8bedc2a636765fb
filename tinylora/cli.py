"""The command line: parse, call one function, print. Results go to stdout, talk to stderr.

Exit codes: 0 done, 1 failed, 2 misused (one sentence on stderr), 130 interrupted. Torch is imported inside the verbs,
so that `--help` stays fast.
"""

import dataclasses
import errno
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TypeVar

import typer

from tinylora.errors import UserError

if TYPE_CHECKING:
    from tinylora.inspection import Inspection, Plan, Speed
    from tinylora.training.config import RunConfig
    from tinylora.training.train import TrainResult

P = ParamSpec("P")
T = TypeVar("T")

app = typer.Typer(
    name="tinylora",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: examples keep their lines, and so does a pipe
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one setting; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def main() -> None:
    """Entry point of the `tinylora` command."""
    _set_environment()
    app(prog_name="tinylora")


def _set_environment() -> None:
    """What must stand before torch and tokenizers are loaded; whatever the user has set stays."""
    # OpenMP threads that spin at barriers keep their core from the threads they wait for: on a busy machine this made a
    # batch ten times slower. Passive ones sleep, which costs nothing that can be measured on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    # The tokenizer's own threads are of no use for short prompts, and make it warn when a process is forked.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def say(text: str) -> None:
    """Talk: stderr."""
    print(text, file=sys.stderr, flush=True)


def verb(command: Callable[P, T]) -> Callable[P, T]:
    """Turn a user's mistake, a full disk, Ctrl-C and a closed pipe into one sentence or none, and an exit code."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            result = command(*args, **kwargs)
            sys.stdout.flush()  # here, so that a closed pipe shows up here
            return result
        except UserError as error:
            say(f"tinylora: {error}")
            raise typer.Exit(2) from None
        except BrokenPipeError:
            # The reader (head, less) has what it wanted. Python would complain once more when it flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(141) from None
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = f" at {error.filename}" if error.filename else ""
            say(f"tinylora: the disk is full{where}; free some space (tinylora cache shows what can go) and try again")
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            say("tinylora: interrupted")
            raise typer.Exit(130) from None

    return guarded


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))


@app.callback()
def _top() -> None:
    """Fine-tune a language model by training a dozen numbers, and see what that did.

    \b
    Examples:
      tinylora train demo                          train 13 numbers, then measure what they changed
      tinylora train demo --dry-run                what that would take: numbers, tokens, memory, hours
      tinylora eval runs/demo-001                  untrained model and adapter on the same held-out items
      tinylora chat runs/demo-001                  both of them answer what you type
      tinylora inspect Qwen/Qwen2.5-7B-Instruct    what would be trained in another model
    """


# --- train ---


@app.command()
@verb
def train(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="A recipe's name, or a .toml file.")] = None,
    set_: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print counts, tokens, memory and hours; load no weights, train nothing.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Go on with a run; train.steps and log.* may change.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for run folders.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """Train the numbers of an adapter by reinforcement learning.

    \b
    Examples:
      tinylora train demo
      tinylora train demo --set optim.lr=0.005 --set train.seed=1
      tinylora train my.toml --dry-run
      tinylora train --resume runs/demo-001 --set train.steps=200
    """
    if resume is not None:
        if recipe is not None or dry_run:
            raise UserError("--resume goes on with a run as it is: give no recipe and no --dry-run with it")
        from tinylora.training.train import resume as resume_run

        with _resumable(lambda: resume):
            result = resume_run(resume, set_ or [], say=say)
    else:
        if recipe is None:
            raise UserError("name a recipe, such as: tinylora train demo (tinylora recipes lists them)")
        from tinylora.training.recipe import load_recipe

        config = load_recipe(recipe, set_ or [])
        if dry_run:
            from tinylora.inspection import inspect_shapes

            _print_inspection(config, *inspect_shapes(config, say), as_json=as_json)
            return
        from tinylora.training.train import train as train_run

        name = Path(recipe).stem
        before = _runs(out, name)
        with _resumable(lambda: next(iter(_runs(out, name) - before), None)):
            result = train_run(config, out=out, name=name, say=say)
    _print_run(result, as_json)


def _runs(out: Path, name: str) -> set[Path]:
    return set(out.glob(f"{name}-[0-9]*")) if out.is_dir() else set()


@contextmanager
def _resumable(run: Callable[[], Path | None]) -> Iterator[None]:
    """On Ctrl-C, say how to go on with `run()`."""
    try:
        yield
    except KeyboardInterrupt:
        if (folder := run()) is None:
            say("tinylora: interrupted before the run began; nothing was written")
        else:
            say(f"tinylora: interrupted; go on with: tinylora train --resume {folder}")
        raise typer.Exit(130) from None


def _print_run(done: "TrainResult", as_json: bool) -> None:
    numbers = [float(number) for number in done.v.flatten()]
    if as_json:
        facts = {"run": str(done.run), "steps": done.steps, "seconds": done.seconds}
        _print_json({**facts, "v": numbers, "result": done.result})
        return
    if done.result is not None:
        from tinylora.evaluation.final import format_result

        print(format_result(done.result))
        return
    print(f"saved {len(numbers)} numbers in {done.run}; next: tinylora eval {done.run}, tinylora chat {done.run}")


# --- eval ---


@app.command("eval")
@verb
def eval_(
    adapter: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run folder, or an adapter file.")],
    task: Annotated[
        str, typer.Option(help="gsm8k, jsonl, reasoning_gym:NAME, or a recipe; without it, the task of training.")
    ] = "",
    model: Annotated[str, typer.Option(help="Another base model than the one of training.")] = "",
    num_items: Annotated[int, typer.Option(metavar="N", help="Test items; 0 takes the recipe's eval.num_test.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Compare the untrained model and an adapter on the same held-out items.

    \b
    Examples:
      tinylora eval runs/demo-001
      tinylora eval runs/demo-001 --task gsm8k --num-items 200 --set generation.max_new_tokens=400
      tinylora eval runs/demo-001/adapter.safetensors --task jsonl --set task.path=mine.jsonl --json
    """
    from tinylora.evaluation.compare import check_base_kept, compare, settings_for_eval
    from tinylora.training.adapter_file import load_vector
    from tinylora.workbench import open_workbench

    v, trained = load_vector(adapter)
    config = settings_for_eval(trained, task, model, set_ or [])
    check_base_kept(trained, config)
    bench = open_workbench(config, say=say)
    compared = compare(bench, v, label=adapter, num_items=num_items, temperature=temperature, seed=seed, say=say)
    if as_json:
        _print_json({"model": config.model.name, "adapter": str(adapter), **compared.to_json()})
    else:
        print(compared.text())


# --- chat ---


@app.command()
@verb
def chat(
    adapter: Annotated[Path, typer.Argument(metavar="RUN|ADAPTER", help="A run folder, or an adapter file.")],
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Answer this and end; may be repeated.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(help="Token budget of an answer.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    plain: Annotated[
        bool, typer.Option("--plain", help="Send the line alone, without the recipe's system prompt and examples.")
    ] = False,
    set_: Overrides = None,
    as_json: Json = False,
) -> None:
    """Answer each typed line with the untrained model and the adapted one, side by side. Lines stand alone.

    \b
    Examples:
      tinylora chat runs/demo-001
      tinylora chat runs/demo-001 --prompt "12 + 30 =" --temperature 0.7
      cat questions.txt | tinylora chat runs/demo-001 --plain --json
    """
    from tinylora.chat import format_pair, reply_pair
    from tinylora.evaluation.compare import check_base_kept, settings_for_eval
    from tinylora.training.adapter_file import load_vector
    from tinylora.workbench import open_workbench

    v, trained = load_vector(adapter)
    config = settings_for_eval(trained, overrides=set_ or [])
    check_base_kept(trained, config)
    bench = open_workbench(config, task=False, say=say)
    bench.adapter.write(v)  # a wrong shape shows here, before anyone types
    bench.adapter.write(None)
    pairs = []
    for line in prompt if prompt is not None else _typed_lines():
        pair = reply_pair(
            bench, v, line, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, plain=plain
        )
        pairs.append(dataclasses.asdict(pair))
        if not as_json:
            print(format_pair(pair) + "\n", flush=True)
    if as_json:
        _print_json({"model": config.model.name, "adapter": str(adapter), "replies": pairs})


def _typed_lines() -> Iterator[str]:
    """Lines of stdin that are not empty; on a terminal, with a prompt on stderr."""
    terminal = sys.stdin.isatty()
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


# --- inspect ---


@app.command()
@verb
def inspect(
    model: Annotated[str, typer.Argument(help="The embedded model, a folder, a .gguf file, or a hub id.")],
    set_: Overrides = None,
    recipe: Annotated[str, typer.Option(help="Recipe for all other settings; --landscape takes demo.")] = "",
    weights: Annotated[
        bool | None,
        typer.Option(
            "--weights/--shapes", help="Load the weights or not; without either, only what is on this machine."
        ),
    ] = None,
    landscape: Annotated[
        bool, typer.Option("--landscape", help="Accuracy and KL to the base against the norm of random vectors.")
    ] = False,
    norms: Annotated[str, typer.Option(help="Norms, separated by commas (--landscape).")] = "0.1,0.2,0.5,1",
    vectors: Annotated[int, typer.Option(help="Random vectors for each norm (--landscape).")] = 3,
    items: Annotated[int, typer.Option(help="Validation items (--landscape).")] = 64,
    seed: Annotated[int, typer.Option(help="Of the random vectors (--landscape).")] = 0,
    as_json: Json = False,
) -> None:
    """Show what would be trained: modules, tie groups, counts, bytes, memory and time.

    \b
    Examples:
      tinylora inspect smollm2-135m-instruct --set adapter.n_tie=17
      tinylora inspect Qwen/Qwen2.5-7B-Instruct
      tinylora inspect smollm2-135m-instruct --landscape --norms 0.1,0.5 --vectors 5 --items 128
    """
    from tinylora.inspection import inspect_shapes, inspect_weights
    from tinylora.landscape import format_landscape
    from tinylora.landscape import landscape as scan
    from tinylora.models.names import resolve_name
    from tinylora.training.config import RunConfig
    from tinylora.training.recipe import apply_overrides, load_recipe
    from tinylora.workbench import open_workbench

    if landscape and weights is False:
        raise UserError("--landscape needs the weights; leave --shapes out")
    name = recipe or ("demo" if landscape else "")
    config = load_recipe(name) if name else RunConfig()
    config = apply_overrides(
        dataclasses.replace(config, model=dataclasses.replace(config.model, name=model)), set_ or []
    )
    if weights is None:
        weights = landscape or resolve_name(config.model.name).kind != "hub"
    if not weights:
        _print_inspection(config, *inspect_shapes(config, say), as_json=as_json)
        return
    bench = open_workbench(config, task=landscape, say=say)
    if landscape:
        rows = scan(bench, _numbers(norms), vectors, items, seed, say)
        if as_json:
            _print_json({"model": model, "recipe": name, "rows": [dataclasses.asdict(row) for row in rows]})
        else:
            print(format_landscape(rows))
        return
    _print_inspection(bench.config, *inspect_weights(bench, say), as_json=as_json)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"--norms must be numbers separated by commas, such as 0.1,0.5, got {text!r}") from None


def _print_inspection(config: "RunConfig", found: "Inspection", speed: "Speed", plan: "Plan", *, as_json: bool) -> None:
    from tinylora.inspection import format_inspection, format_plan

    if as_json:
        inspected = dataclasses.asdict(found)
        inspected["memory"]["total"] = found.memory.total
        _print_json({**inspected, "speed": dataclasses.asdict(speed), "plan": dataclasses.asdict(plan)})
    else:
        print(format_inspection(found, config.adapter))
        print(format_plan(speed, plan))


# --- bench ---


@app.command()
@verb
def bench(
    model: Annotated[str, typer.Argument(help="The embedded model, a folder, a .gguf file, or a hub id.")],
    batch: Annotated[str, typer.Option(help="Rows at once, separated by commas; each is measured.")] = "1,8,64",
    prompt: Annotated[int, typer.Option(help="Tokens of each row's prompt.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens generated on each row.")] = 64,
    threads: Annotated[int, typer.Option(help="0 takes the cores really available.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    backend: Annotated[str, typer.Option(help="native or transformers.")] = "native",
    as_json: Json = False,
) -> None:
    """Measure how fast a model generates here, and how near that is to what this machine can do.

    The roofline: a decode step takes at least, for every linear map, the larger of 2 x rows x in x out / product rate
    and its bytes / memory bandwidth, and the bytes of the keys and values it reads / memory bandwidth; rate and
    bandwidth are measured first. The share is that bound divided by the measured time.

    \b
    Examples:
      tinylora bench smollm2-135m-instruct
      tinylora bench Qwen/Qwen2.5-0.5B-Instruct --batch 1,32 --prompt 256 --new 128
      tinylora bench smollm2-135m-instruct --backend transformers --threads 1 --json
    """
    from tinylora.benchmark import BenchSettings, format_bench, run_bench

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
        _print_json(dataclasses.asdict(result))
    else:
        print(format_bench(result))


def _batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"--batch must be whole numbers separated by commas, such as 1,8,64, got {text!r}") from None


# --- cache and recipes ---


@app.command()
@verb
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it; it comes back when it is needed.")] = False,
    as_json: Json = False,
) -> None:
    """Show what is cached, where and how large, or delete it.

    \b
    Examples:
      tinylora cache
      tinylora cache --clear
    """
    from tinylora.models.cache import cache_report, clear_cache
    from tinylora.paths import cache_dir

    if clear:
        freed = clear_cache()
        if as_json:
            _print_json({"folder": str(cache_dir()), "freed_bytes": freed})
        else:
            print(f"freed {freed / 1e6:,.1f} MB in {cache_dir()}")
        return
    entries = cache_report()
    if as_json:
        _print_json({"folder": str(cache_dir()), "entries": [dataclasses.asdict(entry) for entry in entries]})
        return
    print(f"{cache_dir()} ($TINYLORA_CACHE moves it)")
    for entry in entries:
        print(f"  {entry.kind:<12} {entry.total_bytes / 1e6:>9,.1f} MB  {entry.num_files:>4} files  {entry.about}")
    print(f"  {'total':<12} {sum(entry.total_bytes for entry in entries) / 1e6:>9,.1f} MB")


@app.command()
@verb
def recipes(as_json: Json = False) -> None:
    """List the recipes that come with tinylora.

    \b
    Examples:
      tinylora recipes
      tinylora train demo --dry-run
    """
    from tinylora.paths import recipes_dir

    found = {path.stem: _first_comment(path) for path in sorted(recipes_dir().glob("*.toml"))}
    if as_json:
        _print_json({"folder": str(recipes_dir()), "recipes": found})
        return
    width = max((len(name) for name in found), default=0)
    for name, about in found.items():
        print(f"{name:<{width}}  {about}")


def _first_comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


if __name__ == "__main__":
    main()
