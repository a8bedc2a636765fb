"""How much faster than the padded forward is the packed one, in how much memory, and how far is either from float32?

One micro-batch of a GRPO step, log-probs and the gradient of v: random tokens, completions of lengths drawn uniformly
with a seed. Padded: transformers' own forward, prompts computed once and padded, completions padded. In turn, several
rounds, in one process. `products_share`: the least there is to compute (weights x real tokens, forward and back), at
the rate that this machine reaches on a product of MLP shape in the same round, over the CPU time taken. Memory: peak of
the process above what it held before (Linux), of one micro-batch; `estimated` is what the memory budget reckons with.

    python -m bench.speed.learner [--model NAME] [--prompts 4] [--completions 8] [--rounds 3] [--threads 1] [--save]
"""

import argparse
import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.common import finish
from tinylora.adapter.attach import attach
from tinylora.adapter.config import AdapterConfig
from tinylora.learner.learner import Learner, Row
from tinylora.learner.memory import activation_bytes
from tinylora.learner.packed import lay_out
from tinylora.models.architecture import Architecture, describe
from tinylora.models.load import load_base_model


def draw_rows(arguments: argparse.Namespace, vocab_size: int) -> list[Row]:
    source = random.Random(arguments.seed)
    low, high = (int(part) for part in arguments.lengths.split("-"))
    rows = []
    for group in range(arguments.prompts):
        length = arguments.prompt_tokens + source.randint(-8, 8)
        prompt = tuple(source.randrange(3, vocab_size) for _ in range(length))
        for _ in range(arguments.completions):
            tokens = tuple(source.randrange(3, vocab_size) for _ in range(source.randint(low, high)))
            rows.append(Row(group, prompt, tokens))
    return rows


def run(learner: Learner, rows: list[Row], v: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of real tokens and the gradient of a weighted sum of them."""
    logprobs, mask = learner.logprobs(rows, v)
    weights = torch.linspace(-0.5, 1.5, len(rows)).unsqueeze(1)
    (grad,) = torch.autograd.grad((weights * logprobs).sum(), v)
    return logprobs.detach()[mask], grad


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """Most memory that the process holds during one call above what it held before; None where Linux does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None

    def field(name: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(name))

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset.write_text("5")
    before = field("VmRSS")
    work()
    return field("VmHWM") - before


def product_flops(architecture: Architecture, rows: list[Row]) -> float:
    """Forward and backward products of the weights with real tokens, 2 x 2 x weights x tokens."""
    tokens = len(lay_out([row.prompt_ids for row in rows], [row.token_ids for row in rows]).token_ids)
    scored = sum(len(row.token_ids) for row in rows)
    weights = sum(parameter.numel() for name, parameter in architecture.model.named_parameters() if ".layers." in name)
    return 4.0 * (weights * tokens + architecture.head.weight.numel() * scored)


def product_rate(architecture: Architecture) -> float:
    """Operations a second of one product of MLP shape, 1024 rows."""
    hidden = architecture.hidden_size
    x = torch.randn(1024, hidden).to(architecture.dtype)
    weight = torch.randn(8 * hidden, hidden).to(architecture.dtype)
    work = lambda: torch.nn.functional.linear(x, weight)  # noqa: E731
    work()
    return 2.0 * 1024 * weight.numel() / min(seconds(work)[1] for _ in range(5)) * torch.get_num_threads()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, folder or .gguf file")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=8, help="of each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=110)
    parser.add_argument("--lengths", default="10-40", help="of completions, drawn uniformly")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-reference", action="store_true", help="leave the comparison with float32 out")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/speed/learner.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    base = load_base_model(arguments.model, device="cpu", dtype=arguments.dtype)
    adapter = attach(base.model, AdapterConfig(u=13, n_tie=10**6))
    v = 0.01 * torch.randn(adapter.zeros().shape, generator=torch.Generator().manual_seed(0))
    v.requires_grad_(True)
    architecture = describe(base.model)
    rows = draw_rows(arguments, architecture.vocab_size)
    learners = {
        name: Learner(base.model, adapter, packed=name == "packed", checkpointing=arguments.checkpointing)
        for name in ("packed", "padded")
    }
    found = {name: run(learner, rows, v) for name, learner in learners.items()}  # also loads the libraries
    peaks = {name: peak_bytes(partial(run, learner, rows, v)) for name, learner in learners.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in learners}
    rates = []
    for number in range(arguments.rounds):
        rates.append(product_rate(architecture))
        for name in ("packed", "padded") if number % 2 == 0 else ("padded", "packed"):
            times[name].append(seconds(partial(run, learners[name], rows, v)))
            print(f"round {number + 1}: {name} {times[name][-1][0]:.2f} s", file=sys.stderr)
    wall, cpu = ([b[i] / a[i] for a, b in zip(times["packed"], times["padded"], strict=True)] for i in (0, 1))
    flops = product_flops(architecture, rows)
    need = activation_bytes(architecture, arguments.checkpointing)
    tokens = sum(map(len, {row.prompt_ids for row in rows})) + sum(len(row.token_ids) for row in rows)
    result: dict[str, Any] = {
        "model": Path(arguments.model).name,
        "dtype": arguments.dtype,
        "checkpointing": arguments.checkpointing,
        "rows": len(rows),
        "tokens": tokens,
        "speedup_vs_padded": round(statistics.median(wall), 2),
        "cpu_speedup_vs_padded": round(statistics.median(cpu), 2),
        "seconds": {name: [round(one[0], 3) for one in spent] for name, spent in times.items()},
        "cpu_seconds": {name: [round(one[1], 3) for one in spent] for name, spent in times.items()},
        "products_share": round(
            statistics.median(
                flops / rate * torch.get_num_threads() / one[1]
                for rate, one in zip(rates, times["packed"], strict=True)
            ),
            3,
        ),
        "peak_mib": {name: None if peak is None else round(peak / 2**20) for name, peak in peaks.items()},
        "estimated_mib": round((need.fixed + need.a_token * tokens) / 2**20),
    }
    if not arguments.no_reference:
        del learners
        exact_base = load_base_model(arguments.model, device="cpu", dtype="float32")
        exact_adapter = attach(exact_base.model, AdapterConfig(u=13, n_tie=10**6))
        exact, exact_grad = run(Learner(exact_base.model, exact_adapter, shared_prompts=False), rows, v)
        result["from_float32"] = {
            name: {
                "mean_logprob": float((logprobs - exact).abs().mean()),
                "max_logprob": float((logprobs - exact).abs().max()),
                "gradient": float((grad - exact_grad).norm() / exact_grad.norm()),
            }
            for name, (logprobs, grad) in found.items()
        }
    finish("speed/learner", result, arguments.save)


if __name__ == "__main__":
    main()
