"""Does attention over long contexts read the cache at the speed of memory?

One layer's attention of a decode step, by the engine's kernel, over a cache much larger than the processor's own: rows
x context tokens of keys and values in bfloat16, at the head counts of SmolLM2-135M (9 and 3 of 64) and a 0.5B Qwen2.5
(14 and 2 of 64). The bandwidth it is compared with is that of summing a large float32 tensor, measured in turn with it.
`attention_bandwidth_share` is bytes of keys and values over time over that bandwidth; the aim is 0.5.

    python -m bench.speed.attention [--threads N] [--rounds 7] [--save]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common import finish
from tinylora.generation.native.kernels.native import NativeKernels
from tinylora.generation.native.kernels.plan import Run, make_plan
from tinylora.generation.native.kv_cache import BLOCK
from tinylora.models.architecture import describe
from tinylora.system.cores import available_threads

SHAPES = {"smollm2-135m": (9, 3, 64), "qwen2.5-0.5b": (14, 2, 64)}
CASES = ((1, 8192), (16, 4096), (64, 1024))


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(shape: tuple[int, int, int], rows: int, context: int, rounds: int) -> dict[str, float]:
    """Median GB/s of attention and of the sum, taken in turn."""
    heads, kv_heads, dim = shape
    config = LlamaConfig(
        vocab_size=64, hidden_size=heads * dim, intermediate_size=64, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=dim,
    )  # fmt: skip
    architecture = describe(LlamaForCausalLM(config).to(torch.bfloat16).eval())
    kernels = NativeKernels(architecture)
    kernels.prepare()
    blocks = context // BLOCK
    # At least 256 MB in all, so that no round finds the last one's keys in the processor's cache.
    block_bytes = kv_heads * BLOCK * 2 * dim * 2
    copies = max(1, -(-(256 << 20) // (rows * blocks * block_bytes)))
    cache = kernels.new_cache(rows * blocks * copies)
    cache.memory.fill_(0.01)
    plans = []
    for start in range(0, rows * blocks * copies, rows * blocks):
        tables = [range(first, first + blocks) for first in range(start, start + rows * blocks, blocks)]
        plans.append(make_plan([Run([context - 1] * rows, [], 0, tables)], BLOCK))
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * dim).bfloat16()
    out = torch.empty(rows, heads * dim, dtype=torch.bfloat16)
    large = torch.ones(64 << 20)

    def attend() -> None:
        for plan in plans:
            kernels.attend(qkv, out, cache, 0, plan, 0)

    attend()
    times = [(seconds(attend), seconds(large.sum)) for _ in range(rounds)]
    attention = rows * context * kv_heads * dim * 2 * 2 * copies / statistics.median(t for t, _ in times) / 1e9
    memory = large.numel() * 4 / statistics.median(t for _, t in times) / 1e9
    return {"gb_per_s": round(attention, 2), "memory_gb_per_s": round(memory, 2), "share": round(attention / memory, 3)}


def main() -> None:
    """Measure every case and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or available_threads())
    cases = {
        f"{name}, {rows} x {context}": measure(shape, rows, context, arguments.rounds)
        for name, shape in SHAPES.items()
        for rows, context in CASES
    }
    result = {
        "attention_bandwidth_share": min(case["share"] for case in cases.values()),
        "threads": torch.get_num_threads(),
        "cases": cases,
    }
    finish("speed/attention", result, save=arguments.save)


if __name__ == "__main__":
    main()
