"""The peer of bench/trust/interop.py that runs llama.cpp, through its Python package: plain data in, plain data out.

python llama_cpp_peer.py JOB.json        (an interpreter with llama-cpp-python; see README.md)
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def load(job: dict[str, Any], lora: str | None) -> Any:
    from llama_cpp import Llama

    return Llama(
        model_path=job["model"], lora_path=lora, n_ctx=512, n_batch=512, n_threads=2, logits_all=True, verbose=False,
        type_k=0, type_v=0, flash_attn=False, use_mmap=False,
    )  # fmt: skip


def greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    """Greedy tokens, and the gap of the two best logits at each."""
    model.reset()
    model.eval(prompt)
    tokens, gaps = [], []
    for _ in range(count):
        logits = np.array(model.scores[model.n_tokens - 1], dtype=np.float64)
        best = int(logits.argmax())
        top = np.partition(logits, -2)[-2:]
        tokens.append(best)
        gaps.append(float(top[1] - top[0]))
        model.eval([best])
    return tokens, gaps


def log_probs(model: Any, ids: list[int]) -> np.ndarray:
    model.reset()
    model.eval(ids)
    logits = np.array(model.scores[: len(ids)], dtype=np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    result: dict[str, Any] = {}
    if job["what"] == "tokens":
        model = load(job, job["lora"])
        found = [greedy(model, prompt, job["count"]) for prompt in job["prompts"]]
        result = {"tokens": [t for t, _ in found], "gaps": [g for _, g in found]}
    else:  # KL(base || adapted) of each position, on fixed tokens
        base = load(job, None)
        plain = [log_probs(base, ids) for ids in job["prompts"]]
        del base
        adapted = load(job, job["lora"])
        kl = []
        for ids, p in zip(job["prompts"], plain, strict=True):
            q = log_probs(adapted, ids)
            kl.append((np.exp(p) * (p - q)).sum(-1).tolist())
        result = {"kl": kl}
    import llama_cpp

    print(json.dumps({**result, "version": llama_cpp.__version__}))


if __name__ == "__main__":
    main()
