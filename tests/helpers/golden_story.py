"""One small story through the whole program, by its command line alone, and all that it wrote: for golden files.

`python tests/helpers/golden_story.py FOLDER` lives it in an empty folder, with whatever tinylora is on the path, and
leaves `story.json` there: what each command printed and what each file holds, without what a clock, a machine or a path
says. tests/test_golden.py compares that with tests/golden/, number by number; `bench/trust/house.py` compares two
versions of the program on one machine, bit by bit. The model's weights are NumPy's, as torch's draws depend on the
processor.
"""

import csv
import hashlib
import json
import math
import os
import re
import shutil
import string
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
BEGUN = TESTS / "golden" / "begun-001"
"""A run that commit 266fbff began and did 3 of 6 steps of."""
CLOCK = {"seconds", "rollout_seconds", "tokens_per_second", "cpu_seconds", "seconds_trained", "plan"}
MACHINE = {"account", "speed", "memory", "peak_memory_bytes"}
"""Keys whose values a clock or a machine decides."""

SCORER = '''"""Scores of the story: how many characters have an even code."""


def even(item, text):
    share = sum(ord(character) % 2 == 0 for character in text) / max(1, len(text))
    return {"strict": float(share >= 0.5), "value_only": share}
'''
RECIPE = """
reward = { value_only = 1.0 }
[model]
name = "model"
device = "cpu"
dtype = "float32"
[adapter]
u = 2
n_tie = 8
[task]
name = "jsonl"
path = "words.jsonl"
scorer = "story_scorer:even"
validation_share = 0.25
test_share = 0.35
[prompt]
system = "Say it."
[generation]
max_new_tokens = 8
stop_strings = ["gg"]
[grpo]
prompts_per_step = 3
group_size = 3
truncated = "keep"
[optim]
lr = 0.05
[train]
steps = 6
num_threads = 1
check_memory = false
[eval]
every = 2
num_validation = 5
num_test = 8
random_vectors = 3
[[eval.prompts]]
name = "shout"
template = "{question}!"
[log]
samples_per_step = 2
checkpoint_every = 2
"""
# Name of the run, and what is set beside the recipe: every algorithm, and methods of both kinds.
RUNS: dict[str, tuple[str, ...]] = {
    "story": (),
    "begun": ("eval.num_test=0", "eval.prompts=[]"),
    "kl": (
        "train.steps=3", "eval.num_test=0", "grpo.kl_coef=0.05", "grpo.updates_per_batch=2", "optim.warmup_steps=2",
        "optim.max_grad_norm=0.01", "grpo.refill_factor=2", "grpo.normalisation=sequence",
    ),
    "sft": ("train.steps=3", "eval.num_test=0", "train.algorithm=sft"),
    "rft": ("train.steps=3", "eval.num_test=0", "train.algorithm=rft", "train.keep=last"),
    "lora": ("train.steps=3", "eval.num_test=4", "eval.random_vectors=0", "method.name=lora", "optim.lr=0.01"),
    "lora-xs": ("train.steps=3", "eval.num_test=0", "method.name=lora-xs", "optim.lr=0.01"),
    "adapter": ("train.steps=2", "eval.num_test=0", "method.name=adapter", "optim.lr=0.01"),
    "shuffled": ("train.steps=2", "eval.num_test=0", "train.control=shuffled"),
}  # fmt: skip


def make_model(folder: Path) -> None:
    """A tiny Llama whose weights are NumPy's, with a tokenizer of bytes."""
    import torch
    from tiny_tokenizer import ALPHABET, byte_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.copy_(torch.from_numpy(rng.normal(0.0, 0.3, tuple(parameter.shape)).astype(np.float32)))
        letters = [3 + ALPHABET.index(letter) for letter in string.ascii_lowercase]
        model.lm_head.weight[letters] *= 1.6  # else most replies are no text,
        model.lm_head.weight[2] *= 2.2  # and none ends
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def prepare() -> None:
    """Model, questions, scorer and recipe, in the current folder."""
    make_model(Path("model"))
    animals = ("dog", "cat", "cow", "hen", "fox", "owl")
    words = [f"{a} {b}" for a in ("red", "blue", "old", "new", "big") for b in animals]
    Path("words.jsonl").write_text("".join(json.dumps({"question": w, "answer": w.upper()}) + "\n" for w in words))
    Path("story_scorer.py").write_text(SCORER)
    Path("recipe.toml").write_text(RECIPE)


def without_clock(value: Any, root: str) -> Any:
    """The value without what a clock or a machine says, and with paths from `root` on."""
    if isinstance(value, dict):
        return {k: without_clock(v, root) for k, v in value.items() if k not in CLOCK | MACHINE}
    if isinstance(value, (list, tuple)):
        if len(value) > 50 and all(isinstance(one, float) for one in value):  # a method's many numbers
            exact = hashlib.sha256(repr(value).encode()).hexdigest()
            return {"count": len(value), "norm": math.sqrt(sum(one * one for one in value)), "sha256": exact}
        return [without_clock(one, root) for one in value]
    if isinstance(value, str):
        return value.replace(root + os.sep, "").replace(root, ".")
    return value


class Story:
    """The commands in turn; `told` is what is kept."""

    def __init__(self) -> None:
        from typer.testing import CliRunner

        from tinylora.cli import app

        self.app, self.runner, self.root = app, CliRunner(), str(Path.cwd())
        self.told: dict[str, Any] = {}

    def command(self, name: str, *args: str, keep: Callable[[str], Any] = json.loads) -> None:
        """Run a command, which has to succeed, and keep what it printed."""
        result = self.runner.invoke(self.app, list(args))
        if result.exit_code:
            raise SystemExit(f"tinylora {' '.join(args)}: exit {result.exit_code}\n{result.output}\n{result.exception}")
        self.told[name] = without_clock(keep(result.stdout), self.root)

    def lines(self, name: str, path: str) -> None:
        """Keep a JSONL file."""
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        self.told[name] = without_clock(rows, self.root)

    def json(self, name: str, path: str) -> None:
        """Keep a JSON file."""
        self.told[name] = without_clock(json.loads(Path(path).read_text()), self.root)

    def bytes(self, name: str, folder: str) -> None:
        """Keep the names of a folder's files, and (for one machine) their bytes' hashes."""
        files = sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix not in (".pid", ".lock"))
        self.told[name] = without_clock({str(p.relative_to(folder)): _digest(p) for p in files}, self.root)


OF_ONE_MACHINE = {"sha256", "numbers_sha256", "liveness_signal", "liveness_noise", "sampler_gap"}
"""Keys of hashes of floats, and of what is nothing but rounding."""


def portable(told: Any) -> Any:
    """What of the story holds on every machine, up to rounding: without hashes of floats and codes of them."""
    if isinstance(told, dict):
        return {key: portable(value) for key, value in told.items() if key not in OF_ONE_MACHINE}
    if isinstance(told, list):
        return [portable(one) for one in told]
    return re.sub(r"TINY-[0-9A-Z]+", "TINY-...", told) if isinstance(told, str) else told


def _digest(path: Path) -> dict[str, Any]:
    """A file's hash; of a safetensors file its tensors' shapes and metadata, too."""
    data = path.read_bytes()
    told: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest()}
    if path.suffix == ".safetensors":
        start = 8 + int.from_bytes(data[:8], "little")
        told = {"sha256": hashlib.sha256(data[start:]).hexdigest()}  # the order of the metadata is chance
        header = json.loads(data[8:start])
        told["metadata"] = {k: v for k, v in header.pop("__metadata__", {}).items() if k not in ("values", "sha256")}
        told["tensors"] = {name: [one["dtype"], one["shape"]] for name, one in header.items()}
    if path.suffix == ".tinylora":
        told["bytes"] = len(data)
    return told


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def train(story: Story, name: str, *settings: str) -> None:
    """A run of the recipe, and what its folder holds."""
    shutil.copy("recipe.toml", f"{name}.toml")
    sets = [word for one in settings for word in ("--set", one)]
    story.command(f"train {name}", "train", f"{name}.toml", "--out", "runs", *sets, "--json")
    keep_run(story, name, f"runs/{name}-001")


def keep_run(story: Story, name: str, run: str) -> None:
    """What a run's folder holds."""
    story.told[f"{name} config"] = without_clock(Path(run, "config.toml").read_text(), story.root)
    story.lines(f"{name} metrics", f"{run}/metrics.jsonl")
    story.lines(f"{name} samples", f"{run}/samples.jsonl")
    for file in ("result.json",):
        if Path(run, file).is_file():
            story.json(f"{name} {file}", f"{run}/{file}")
    if Path(run, "result_items.jsonl").is_file():
        story.lines(f"{name} items", f"{run}/result_items.jsonl")
    story.bytes(f"{name} files", run)
    for volatile in ("environment.json", "metrics.jsonl", "result.json", "config.toml"):
        story.told[f"{name} files"].pop(volatile, None)


def without_dtype(printed: str) -> dict[str, Any]:
    """What inspect said; the dtype is the machine's choice."""
    return {key: value for key, value in json.loads(printed).items() if key != "dtype"}


def without_size(printed: str) -> dict[str, Any]:
    """What an export said; how many bytes it has hangs on the length of the model's path."""
    said = {key: value for key, value in json.loads(printed).items() if key != "bytes"}
    return {**said, "text": re.sub(r"[\d,]+ bytes", "... bytes", said["text"])}


def begin() -> None:
    """A run of three steps, which a later version is to go on with: `golden/begun-001` was made by this at 266fbff."""
    prepare()
    train(Story(), "begun", *RUNS["begun"], "train.steps=3")


def live() -> dict[str, Any]:
    """The story, in the current folder, which is empty."""
    import tinylora

    prepare()
    story = Story()
    story.told["public names"] = sorted(tinylora.__all__)
    for name, settings in RUNS.items():
        train(story, name, *settings)
    shutil.copytree(BEGUN, "runs/begun-002")
    # It was begun on another machine and names a scorer; versions that ask whose it is are told.
    asks = "--trust" in story.runner.invoke(story.app, ["train", "--help"]).stdout
    trust = ("--trust",) if asks else ()
    story.command("resume", "train", "--resume", "runs/begun-002", "--set", "train.steps=6", *trust, "--json")
    keep_run(story, "resumed", "runs/begun-002")
    run = "runs/story-001"
    story.command("dry run", "train", "recipe.toml", "--dry-run", "--json")
    story.command("inspect", "inspect", "model", "--json", keep=without_dtype)
    story.command("eval", "eval", run, "--items", "i.jsonl", "--untrained", "u.jsonl", "--json")
    story.lines("eval items", "i.jsonl")
    story.lines("untrained items", "u.jsonl")
    story.command("eval in words", "eval", run, "--untrained", "u.jsonl", keep=str)
    story.command("eval sampled", "eval", run, "--samples", "4", "--num-items", "5", "--json")
    story.command("eval rounded", "eval", run, "--rounded", "--json")
    story.command("eval lora", "eval", "runs/lora-001", "--json")
    story.command("controls", "eval", run, "--controls", "--trained-control", "runs/shuffled-001", "--json")
    story.lines("controls items", f"{run}/evidence_items.jsonl")
    story.json("controls plan", f"{run}/evidence_plan.json")
    story.command("report", "report", run, keep=str)
    numbers = Path(run, "report_files", "numbers.csv").read_text().splitlines()
    story.told["report numbers"] = {
        key: _number(value) for _, key, value, *_ in csv.reader(numbers[1:]) if not key.startswith("account.")
    }
    story.command("chat", "chat", run, "--prompt", "red dog", "--prompt", "?", "--json")
    story.command("verify", "verify", run, "--json")
    story.command("encode", "encode", run, "--json")
    story.command("decode", "decode", run, "--json")
    story.command("diff", "diff", run, "runs/begun-001", "--json")
    story.command("mix", "mix", run, "runs/begun-001", "--weights", "0.7,0.3", "-o", "mixed.tinylora", "--json")
    for kind in ("peft", "lora", "gguf", "merged"):
        place = f"out/{kind}.gguf" if kind == "gguf" else f"out/{kind}"
        Path("out").mkdir(exist_ok=True)
        dtype = ("--dtype", "float32") if kind == "merged" else ()
        story.command(f"export {kind}", "export", run, "--to", kind, "-o", place, *dtype, "--json", keep=without_size)
    story.bytes("exported", "out")
    story.command("card", "card", run, keep=lambda text: re.sub(r"(?m)^- (on|.*minutes).*\n", "", text))
    return story.told


def main(folder: Path, what: str = "live") -> None:
    """Live the story there, or begin the run of it that a later version goes on with."""
    folder.mkdir(parents=True)
    os.chdir(folder)
    os.environ["COLUMNS"] = "80"
    os.environ["TINYLORA_CACHE"] = str(folder.resolve() / "cache")
    os.environ["TINYLORA_DATA"] = str(folder.resolve() / "data")
    began = time.time()
    if what == "begin":
        begin()
        return
    Path("story.json").write_text(json.dumps(live(), indent=1, ensure_ascii=False) + "\n")
    print(f"{time.time() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())
    main(Path(sys.argv[1]), *sys.argv[2:])
