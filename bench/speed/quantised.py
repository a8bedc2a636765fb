"""How much memory does training 13 numbers of a quantised model need, next to sampling from it?

Each measurement in a process of its own: load the model (peak apart), put TinyLoRA with 13 numbers on it, sample a
batch; and in another one the same, then a GRPO step on that batch. Peaks are the process's own (VmHWM), counted from
when the model was loaded, Python and its libraries included. `train_to_sample` is the one over the other. A GGUF file
of few bits is dequantised to a bfloat16 folder first, as every load of it does, and that folder is what is quantised.

    python -m bench.speed.quantised [--model NAME ...] [--kinds none bnb-4bit ...] [--threads 1] [--save]
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import RESULTS, ROOT, commit, finish, load, machine, unscored_group

KINDS = ("none", "bnb-4bit", "bnb-8bit", "torchao-int8", "torchao-int4")
PROMPTS = (
    "Write a Python function that returns the sum of the even numbers of a list. Answer with the code alone.",
    "A farmer has 17 sheep and buys 3 lots of 8 more. Then he sells half of them. How many are left? Explain briefly.",
)
SAMPLES = 4
NEW_TOKENS = 16
MICRO_BATCH_TOKENS = 256


def status(name: str) -> int:
    """Bytes of a field of this process's status: VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(model: str, kind: str, what: str, threads: int) -> dict[str, Any]:
    """In a process of its own: what is "basis" (which goes into the cache), "sample" or "train"."""
    import torch

    from tinylora.adapter.config import AdapterConfig
    from tinylora.config.run import ModelConfig, RunConfig
    from tinylora.generation.types import Request, SamplingParams
    from tinylora.learner.learner import Learner
    from tinylora.methods.build import put_method_on
    from tinylora.methods.engine import engine_for
    from tinylora.models.load import encode_prompt, load_base_model
    from tinylora.planning.memory import weight_bytes
    from tinylora.system.memory import reset_peak_memory
    from tinylora.system.paths import cache_dir
    from tinylora.training.grpo import grpo_step
    from tinylora.training.update import make_optimizer

    if kind.startswith("bnb"):
        import bitsandbytes  # noqa: F401
    if kind.startswith("torchao"):
        import torchao  # noqa: F401
    torch.set_num_threads(threads)
    config = RunConfig(model=ModelConfig(name=model, quantization=kind), adapter=AdapterConfig(u=1, num_groups=13))  # type: ignore[arg-type]
    config = replace(
        config, train=replace(config.train, gradient_checkpointing=True, micro_batch_tokens=MICRO_BATCH_TOKENS)
    )
    cpu = torch.device("cpu")
    found: dict[str, Any] = {"libraries": status("VmRSS")}
    reset_peak_memory(cpu)
    base = load_base_model(model, device="cpu", quantization=kind)
    found |= {"loading_peak": status("VmHWM"), "loaded": status("VmRSS"), "dtype": str(base.dtype)[6:]}
    found["weights"] = weight_bytes(base.model, base.dtype.itemsize)
    reset_peak_memory(cpu)
    said: list[str] = []
    adapter = put_method_on(
        base.model, config.method, config.adapter, cache_dir=cache_dir(), source=list(base.files) or None
    )
    found["numbers"] = adapter.num_trained
    if what == "basis":
        return found
    engine = engine_for(
        base.model, adapter, config, context_length=base.context_length, pad_token_id=base.pad_token_id, say=said.append
    )
    params = SamplingParams(max_new_tokens=NEW_TOKENS, stop_token_ids=base.stop_token_ids)
    prompts = [encode_prompt(base, [{"role": "user", "content": text}], base.has_chat_template) for text in PROMPTS]
    v = adapter.zeros()
    requests = [Request(prompt_ids=tuple(ids), params=params, num_samples=SAMPLES, v=v) for ids in prompts]
    started = time.perf_counter()
    completions = engine.generate(requests)
    found |= {"engine": engine.name, "sample_seconds": time.perf_counter() - started, "sample_peak": status("VmHWM")}
    found["said"] = said
    if what == "sample":
        return found
    groups = [
        unscored_group(
            tuple(ids),
            [one for one in completions if one.request_index == index],
            [float(i % 2) for i in range(SAMPLES)],
        )
        for index, ids in enumerate(prompts)
    ]
    v = v.requires_grad_(True)
    learner = Learner(base.model, adapter, pad_token_id=base.pad_token_id, checkpointing=True)
    optimizer = make_optimizer(v, config)
    started = time.perf_counter()
    metrics = grpo_step(learner, groups, v, optimizer, config, 0)
    seconds = time.perf_counter() - started
    tokens = sum(len(one.token_ids) for one in completions)
    found |= {
        "learner": "padded" if learner.padded else "packed",
        "step_seconds": seconds,
        "completion_tokens": tokens,
        "train_peak": status("VmHWM"),
        "grad_norm": metrics["grad_norm"],
        "sampler_gap": metrics.get("sampler_gap"),
    }
    return found


def child(model: str, kind: str, what: str, threads: int) -> dict[str, Any]:
    """`measure` in a fresh process; `failed` and the last line of what it said, where it did not get to the end."""
    command = [sys.executable, "-m", "bench.speed.quantised", "--child", json.dumps([model, kind, what, threads])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    before = load()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["nothing was said"])[-1][:300]}
    return {**json.loads(done.stdout.strip().splitlines()[-1]), "load": before}


def folder_of(model: str) -> str:
    """The model itself, or the bfloat16 folder of a GGUF file."""
    from tinylora.models.load import _local_folder
    from tinylora.models.names import resolve_name

    source = resolve_name(model)
    return str(_local_folder(source, "", False)[0]) if source.kind in ("embedded", "gguf") else model


def measure_model(model: str, kinds: list[str], threads: int) -> dict[str, Any]:
    folder = folder_of(model)
    rows: dict[str, Any] = {}
    for kind in kinds:
        first = child(folder, kind, "basis", threads)
        if "failed" in first:
            rows[kind] = first
            continue
        sample, train = child(folder, kind, "sample", threads), child(folder, kind, "train", threads)
        if "failed" in train or "failed" in sample:
            rows[kind] = train if "failed" in train else sample
            continue
        libraries = sample["libraries"]
        rows[kind] = {
            "weights": train["weights"],
            "libraries": libraries,
            "loading_peak": sample["loading_peak"],
            "loaded": sample["loaded"],
            "sample_peak": sample["sample_peak"],
            "train_peak": train["train_peak"],
            "train_to_sample": round(train["train_peak"] / sample["sample_peak"], 3),
            "train_to_sample_without_libraries": round(
                (train["train_peak"] - libraries) / (sample["sample_peak"] - libraries), 3
            ),
            "sample_seconds": round(sample["sample_seconds"], 1),
            "step_seconds": round(train["step_seconds"], 1),
            **{k: train[k] for k in ("numbers", "dtype", "engine", "learner", "completion_tokens", "grad_norm",
                                     "sampler_gap", "load")},
        }  # fmt: skip
        print(model, kind, json.dumps(rows[kind]), file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["smollm2-135m-instruct"], help="names, folders or GGUF files")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/speed/NAME.json")
    parser.add_argument("--name", default="quantised", help="of the file that --save adds models to")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(*json.loads(args.child))
        print(json.dumps(found))
        return
    path = RESULTS / "speed" / f"{args.name}.json"
    models = json.loads(path.read_text())["models"] if path.exists() else {}  # a model at a time: it takes long
    for name in args.model:
        rows = measure_model(name, args.kinds, args.threads)
        models[Path(name).stem] = {"commit": commit(), "machine": machine(), **rows}
    result = {
        "batch": {
            "prompts": len(PROMPTS), "samples": SAMPLES, "max_new_tokens": NEW_TOKENS,
            "micro_batch_tokens": MICRO_BATCH_TOKENS, "gradient_checkpointing": True, "threads": args.threads,
        },
        "models": models,
    }  # fmt: skip
    finish(
        f"speed/{args.name}", result, args.save, packages=("torch", "transformers", "bitsandbytes", "torchao", "peft")
    )


if __name__ == "__main__":
    main()
