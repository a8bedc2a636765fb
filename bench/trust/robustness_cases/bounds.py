"""Numbers that no machine has the memory, the threads or the time for (attack: memory, no end, smaller)."""

import json
import shutil
import struct
import time
from pathlib import Path
from typing import Any

from bench.trust.robustness_cases.inputs import Trial, Words, tried

LEAN = {"memory_bytes": 14 * 2**30, "limit_seconds": 60.0}


def setting(text: str, *says: Words, gb: float = 3.0, verb: str = "train") -> None:
    @tried(f"27 bounds: {verb} --set {text}", "refused in one sentence, in little memory")
    def _(t: Trial) -> None:
        t.recipe()
        dry = ["--dry-run"] if verb == "dry run" else []
        t.refused(t.run("train", "t.toml", *dry, "--set", text, **LEAN), *says, within_gb=gb)


setting("adapter.u=10000000", "u")
setting("adapter.u=1000000000000", "u")
setting("grpo.group_size=100000000", ("group_size", "memory", "completions"))
setting("grpo.prompts_per_step=100000000", ("prompts_per_step", "memory", "completions"))
setting("train.num_threads=100000", "num_threads")
setting("train.num_threads=-1", "num_threads")
setting("generation.kv_budget_gib=1e300", "kv_budget_gib")
setting("generation.kv_budget_gib=nan", "kv_budget_gib")
setting("generation.max_new_tokens=1000000000", ("max_new_tokens", "context", "memory"))
setting("adapter.rank=1000000000", "rank")
setting("train.memory_budget_gib=1e300", "memory_budget_gib")
setting("train.micro_batch_tokens=-5", "micro_batch_tokens")
setting("optim.lr=-1", "lr")
setting("optim.lr=1e400", "lr")
setting("generation.temperature=-1", "temperature")
setting("generation.temperature=nan", "temperature")
setting("adapter.u=0", "u")
setting("reward.strict=nan", "reward")
setting('method={name="lora", rank=100000000}', ("rank", "memory"))


@tried("27 bounds: dry run --set grpo.group_size=100000000", "refused, or told with its memory")
def _(t: Trial) -> None:
    t.recipe()
    came = t.run("train", "t.toml", "--dry-run", "--set", "grpo.group_size=100000000", **LEAN)
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")
    t.says(came, ("memory", "group_size"))


def lying_adapter(t: Trial, u: int, shape: tuple[int, ...] | None = None) -> Path:
    """A file of 2 KB whose settings say u."""
    import re

    path = t.folder / "big.safetensors"
    shutil.copy(t.world.first_run / "adapter.safetensors", path)
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    text = header["__metadata__"]["config"]
    header["__metadata__"]["config"] = re.sub(r"\nu = \d+", f"\nu = {u}", text, count=1)
    if shape is not None:
        count = 1
        for one in shape:
            count *= one
        header["v"].update(shape=list(shape), data_offsets=[0, 4 * count])
    packed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(packed)) + packed + data[8 + size :])
    return path


for verb in ("verify", "eval", "decode", "inspect", "encode", "export"):

    @tried(f"27 bounds: an adapter file of 2 KB with u = 3,000,000, {verb}", "refused in one sentence, in under 3 GB")
    def _(t: Trial, verb: str = verb) -> None:
        more = {"eval": ["--num-items", "1"], "export": ["--to", "lora", "-o", "x"]}.get(verb, [])
        t.refused(t.run(verb, lying_adapter(t, 3_000_000), *more, **LEAN), within_gb=3)


@tried("27 bounds: an adapter file whose header promises 2^40 numbers", "refused in one sentence")
def _(t: Trial) -> None:
    t.refused(t.run("verify", lying_adapter(t, 2, (2**20, 2**20)), **LEAN), within_gb=3)


def model_says(name: str, **changes: Any) -> None:
    for verb, arguments in (
        ("train", ("train", "t.toml")),
        ("inspect --shapes", ("inspect", "model", "--shapes")),
        ("dry run", ("train", "t.toml", "--dry-run")),
    ):

        @tried(f"30 no end: a model with {name}, {verb}", "refused in one sentence, within 60 s and 3 GB")
        def _(t: Trial, arguments: tuple[str, ...] = arguments) -> None:
            shutil.copytree(t.world.model("llama"), t.folder / "model")
            path = t.folder / "model" / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
            t.recipe(model="model")
            t.refused(t.run(*arguments, memory_bytes=14 * 2**30, limit_seconds=60), within_gb=3)


model_says("10^9 layers", num_hidden_layers=10**9, layer_types=None)
model_says("a width of 10^9", hidden_size=10**9)
model_says("a vocabulary of 10^12", vocab_size=10**12)


def gguf_with(name: str, key: bytes, value: bytes) -> None:
    @tried(f"30 no end: a GGUF with {name}", "refused in one sentence, within 60 s and 3 GB")
    def _(t: Trial) -> None:
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 2)
        text = b"general.architecture"
        architecture = struct.pack("<Q", len(text)) + text + struct.pack("<I", 8) + struct.pack("<Q", 5) + b"llama"
        t.recipe(model=t.write("m.gguf", head + architecture + struct.pack("<Q", len(key)) + key + value + bytes(64)))
        t.refused(t.run("train", "t.toml", memory_bytes=14 * 2**30, limit_seconds=60), "m.gguf", within_gb=3)


gguf_with("an array of length 2^40", b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 4, 2**40))
gguf_with("an array of texts of length 2^40", b"tokenizer.ggml.tokens", struct.pack("<IIQ", 9, 8, 2**40))
gguf_with("a text of length 2^62", b"general.name", struct.pack("<IQ", 8, 2**62))
gguf_with("2^30 blocks", b"llama.block_count", struct.pack("<II", 4, 2**30))


@tried("30 no end: a GGUF that says it has 2^50 tensors", "refused in one sentence, within 60 s and 3 GB")
def _(t: Trial) -> None:
    t.recipe(model=t.write("m.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**50, 0) + bytes(64)))
    t.refused(t.run("train", "t.toml", memory_bytes=14 * 2**30, limit_seconds=60), "m.gguf", within_gb=3)


@tried("30 no end: a sweep's child that prints for ever", "its log stays under 64 MB")
def _(t: Trial) -> None:
    t.recipe(task={"scorer": "loud:even"})
    t.write("loud.py", "def even(item, text):\n    while True:\n        print('x' * 4000)\n")
    t.write("s.toml", 'recipe = "t.toml"\nseeds = [0]\n[[cell]]\nname = "one"\n[evaluate]\nnum_items = 1\n')

    def meanwhile(pid: int, out: Path, err: Path) -> None:
        import os
        import signal

        until = time.monotonic() + 60
        while time.monotonic() < until and not any(p.stat().st_size > 10**5 for p in (t.folder / "swept").rglob("*")):
            time.sleep(0.2)
        time.sleep(5)  # at full speed that was 160 MB
        for number in (signal.SIGINT, signal.SIGINT):
            try:
                os.killpg(pid, number)
            except ProcessLookupError:
                return
            time.sleep(1)

    came = t.run("sweep", "s.toml", "--out", "swept", meanwhile=meanwhile, limit_seconds=140, may_fail=True)
    largest = max((path.stat().st_size for path in t.folder.rglob("*") if path.is_file()), default=0)
    t.check(largest < 64e6, f"a file of {largest / 1e6:.0f} MB")
    t.check("Traceback" not in came.err, f"a traceback: {came.err[-300:]}")


def sweep_says(name: str, text: str, *says: Words) -> None:
    @tried(f"29 sweep: {name}", "refused in one sentence")
    def _(t: Trial) -> None:
        t.recipe()
        t.write("s.toml", text)
        t.refused(t.run("sweep", "s.toml", "--dry-run", **LEAN), *says, within_gb=3)


HEAD, ITEMS = 'recipe = "t.toml"\n', "[evaluate]\nnum_items = 1\n"
sweep_says(
    "a cell's name of 300 characters",
    f'{HEAD}seeds = [0]\n{ITEMS}[[cell]]\nname = "{"n" * 300}"\n',
    ("name", "characters"),
)
sweep_says("a cell called ../x", f'{HEAD}seeds = [0]\n{ITEMS}[[cell]]\nname = "../x"\n', "name")
sweep_says("two cells of one name", f'{HEAD}seeds = [0]\n{ITEMS}[[cell]]\nname = "a"\n[[cell]]\nname = "a"\n', "a")
sweep_says("a cell's name that is 100 emoji", f'{HEAD}seeds = [0]\n{ITEMS}[[cell]]\nname = "{"😀" * 100}"\n', "name")
sweep_says("a negative seed", f'{HEAD}seeds = [-1]\n{ITEMS}[[cell]]\nname = "a"\n', "seed")
sweep_says("no cells", f"{HEAD}seeds = [0]\n{ITEMS}", "cell")


def chat_with(*arguments: str) -> None:
    @tried(f"29 chat {' '.join(arguments)}", "refused in one sentence, or exit 0")
    def _(t: Trial) -> None:
        came = t.run("chat", t.world.first_run, "--prompt", "hi", *arguments, **LEAN)
        t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


chat_with("--max-new-tokens", "1000000000")
chat_with("--temperature", "nan", "--max-new-tokens", "4")
chat_with("--temperature", "-1", "--max-new-tokens", "4")
chat_with("--set", "generation.kv_budget_gib=1e300", "--max-new-tokens", "4")


@tried("29 chat: a prompt beyond the context", "refused in one sentence")
def _(t: Trial) -> None:
    t.refused(t.run("chat", t.world.first_run, "--prompt", "x" * 5000, **LEAN), ("tokens", "context"))


@tried("29 eval --num-items of 23 digits", "all items there are, or refused")
def _(t: Trial) -> None:
    came = t.run("eval", t.world.first_run, "--num-items", "1" + "0" * 22, **LEAN)
    t.check(came.code in (0, 2), f"exit code {came.code}: {came.err[-300:]}")


@tried("29 eval --num-items -1", "refused in one sentence")
def _(t: Trial) -> None:
    t.refused(t.run("eval", t.world.first_run, "--num-items", "-1", **LEAN))
