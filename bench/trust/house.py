"""What did rebuilding the package change: its structure, and nothing that a user could see?

An older checkout is held against this one. Structure, by the rules of tests/test_house.py: lines, imports that point
up, circles of files (by imports at the top, and by all), files at the root, long functions, long files. Each older
module is put into today's list of packages as a whole, by where most of it went (`MOVED`). How many files one visits to
follow a setting or a vector through the code is not counted: that was done by hand.

The story: tests/helpers/golden_story.py of this checkout is lived by the code of either, and all that both told is
compared bit for bit. The demo (--demo): two finished runs of `tinylora train demo`, by the older code and by this, on
one machine: v, results, answers and metrics, all but what a clock or the machine says.

    git worktree add ../before 266fbff
    python -m bench.trust.house --before ../before [--demo runs/old/demo-001 runs/demo-001] [--no-story] [--save]
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from bench.common import ROOT, finish

TESTS = ROOT / "tests"
STORY = TESTS / "helpers" / "golden_story.py"
LONG_FUNCTION, LONG_FILE, SHOWN = 80, 350, 10
MOVED = {
    package: old.split()
    for package, old in {
        "cli": "sweeps/child",
        "sweeps": "reporting/dial",
        "training": "reporting/metrics reporting/progress reporting/trackers",
        "evaluation": "landscape tasks/protocol",
        "serving": "chat",
        "planning": "inspection plan timing benchmark roofline memory_check",
        "rollouts": "workbench training/rollouts evaluation/evaluate",
        "learner": "training/learner training/packed training/frozen_ops training/memory",
        "store": "adapters vectors training/run_folder training/adapter_file",
        "config": "training/config training/recipe methods/config",
        "models": "generation/prefill",
        "system": "peak_memory paths models/busy models/memory models/device models/digest models/cache interop/files",
    }.items()
}
"""Today's package of a module of 266fbff that stood in another, or in none."""


def load(path: Path) -> ModuleType:
    """A file of tests/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"house_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass looks for its own module
    spec.loader.exec_module(module)
    return module


# --- structure ---


def placed(imports: list[Any]) -> list[Any]:
    """Imports of an older checkout with every module under the package where it stands today."""
    home = {module: package for package, modules in MOVED.items() for module in modules}

    def place(path: str) -> str:
        return f"{home[path]}/{path.replace('/', '_')}" if path in home else path

    def module(name: str) -> str:
        root, dot, rest = name.partition(".")
        return root + dot + place(rest.replace(".", "/")).replace("/", ".")

    return [replace(one, file=f"{place(one.file[:-3])}.py", module=module(one.module)) for one in imports]


def structure(checkout: Path, law: ModuleType, older: bool) -> dict[str, Any]:
    """Counts of the package `tinylora` in a checkout, and the names behind the small ones."""
    package = checkout / "tinylora"
    lines = {
        str(path.relative_to(package)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted(package.rglob("*.py"))
    }
    imports = law.all_imports(package)
    up = list(dict.fromkeys(law.upward(placed(imports) if older else imports, law.floors())))
    circles = law.circles(imports, package)
    any_circles = law.circles([replace(one, at_top=True) for one in imports], package)
    functions = {name: long for name, long in law.functions(package) if long > LONG_FUNCTION}
    files = {name: long for name, long in lines.items() if long > LONG_FILE}
    return {
        "lines": sum(lines.values()),
        "files": len(lines),
        "imports_up": len(up),
        "circles": len(circles),
        "circles_of_any_imports": len(any_circles),
        "files_at_the_root": sum("/" not in name for name in lines),
        f"functions_over_{LONG_FUNCTION}_lines": len(functions),
        f"files_over_{LONG_FILE}_lines": len(files),
        "which": {"imports_up": up, "circles": any_circles, "functions": functions, "files": files},
    }


# --- what both wrote ---


def differences(before: Any, now: Any, at: str = "") -> Iterator[str]:
    """Where two values from JSON are not the same, in words. A number is the same if all its bits are."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if key not in now or key not in before:
                yield f"{at}/{key} is {'gone' if key in before else 'new'}"
            else:
                yield from differences(before[key], now[key], f"{at}/{key}")
    elif isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now):
            yield f"{at} has {len(now)} entries, before {len(before)}"
        for place, pair in enumerate(zip(before, now, strict=False)):
            yield from differences(*pair, f"{at}/{place}")
    elif json.dumps(before) != json.dumps(now):
        yield f"{at}: {now!r:.200}, before {before!r:.200}"


def compared(before: Any, now: Any) -> dict[str, Any]:
    found = list(differences(before, now))
    return {"differences": len(found), "first": found[:SHOWN]}


def live(checkout: Path, folder: Path, script: Path = STORY) -> Any:
    """The story as the code of a checkout lives it. It starts in an empty folder, lest it find the code there."""
    folder.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}

    def python(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)} with the code of {checkout} failed:\n{done.stderr[-3000:]}")
        return done.stdout.strip()

    home = Path(python("-c", "import tinylora; print(tinylora.__file__)"))
    if home.parent.resolve() != (checkout / "tinylora").resolve():
        raise SystemExit(f"the story would be lived by {home.parent}, not by the code of {checkout}")
    python(str(script), str(folder / "story"))
    return json.loads((folder / "story" / "story.json").read_text(encoding="utf-8"))


def timeless(value: Any, left_out: set[str]) -> Any:
    """The value without what a clock or the machine says, and without the folder's own name."""
    if isinstance(value, dict):
        kept = {key: one for key, one in value.items() if key not in left_out and not key.startswith("seconds")}
        return {key: timeless(one, left_out) for key, one in kept.items()}
    return [timeless(one, left_out) for one in value] if isinstance(value, list) else value


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_tensors(before: Path, now: Path) -> bool:
    """Whether two safetensors files hold the same tensors, bit for bit."""
    from safetensors.numpy import load_file

    tensors = [
        {name: (one.dtype, one.shape, one.tobytes()) for name, one in load_file(path).items()} for path in (before, now)
    ]
    return tensors[0] == tensors[1]


def demo(before: Path, now: Path) -> dict[str, Any]:
    """Two runs of one recipe and seed, file by file."""
    story = load(STORY)
    left_out = story.CLOCK | story.MACHINE | {"run"}
    found: dict[str, Any] = {}
    for name in ("adapter.safetensors", "last.safetensors"):
        found[name] = {"equal": same_tensors(before / name, now / name)}
    for name in ("result.json", "result_items.jsonl", "metrics.jsonl"):
        read = lines_of if name.endswith("l") else lambda path: json.loads(path.read_text(encoding="utf-8"))
        told = compared(*(timeless(read(run / name), left_out) for run in (before, now)))
        found[name] = {"equal": not told["differences"], **told}
    primary = {}
    for name, run in (("before", before), ("now", now)):
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        primary[name] = {**result["primary"], "seconds": result["seconds"]}
    return {"equal": all(one["equal"] for one in found.values()), "primary": primary, **found}


def head(checkout: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a folder with an older checkout")
    parser.add_argument("--demo", type=Path, nargs=2, metavar=("OLD", "NEW"), help="two finished runs of the demo")
    parser.add_argument("--no-story", action="store_true", help="structure, and perhaps the demo, alone")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/trust/house.json")
    args = parser.parse_args()
    law = load(TESTS / "test_house.py")
    result: dict[str, Any] = {
        "before_commit": head(args.before),
        "before": structure(args.before, law, older=True),
        "now": structure(ROOT, law, older=False),
    }
    for name, count in result["before"].items():
        if name != "which":
            print(f"{name.replace('_', ' ')}: {count:,} -> {result['now'][name]:,}", file=sys.stderr)
    if not args.no_story:
        with tempfile.TemporaryDirectory() as temporary:
            told = [live(code, Path(temporary) / name) for name, code in (("before", args.before), ("now", ROOT))]
        names = "public names"  # more may come, and none may go
        told[1][names] = [name for name in told[1][names] if name in told[0][names]]
        result["story"] = {"chapters": len(told[0]), **compared(*told)}
        print(f"story: {result['story']['differences']} differences", file=sys.stderr)
    if args.demo:
        result["demo"] = demo(*args.demo)
        print(f"demo: {'equal' if result['demo']['equal'] else 'not equal'}", file=sys.stderr)
    finish("trust/house", result, args.save)


if __name__ == "__main__":
    main()
