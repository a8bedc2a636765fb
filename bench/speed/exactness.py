"""Does the native engine compute what transformers computes, and how much of a text hangs on its neighbours?

float32: greedy tokens against transformers.generate, prompt by prompt up to the first difference (a near tie is a
position whose two best reference logits lie within 1e-3); log-probs of sampled completions against one full forward
pass over prompt and completion. bfloat16: the mean gap of the log-probs to that full pass, ours and that of
transformers' own decode with its cache; rounding makes both differ from it. Then the share of sampled texts that change
with the batch: all together, eight at a time, and alone.

The reference's log-softmax is taken in float64: in float32, over the 151,936 entries of Qwen's vocabulary, the
reference itself is off by some 2e-5.

    python -m bench.speed.exactness MODEL [MODEL ...] [--prompts 50] [--rows 64] [--threads 1] [--save]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from bench.common import finish
from tinylora.generation.native.engine import NativeEngine
from tinylora.generation.types import Completion, Request, SamplingParams
from tinylora.models.base import BaseModel
from tinylora.models.load import load_base_model
from tinylora.models.prefill import with_cache

NEAR_TIE = 1e-3
TARGETS = {"float32_mean": 1e-5, "float32_max": 1e-4, "bfloat16_ratio": 1.5}
STARTS = (
    "The capital of {} is", "Q: Tom has 3 apples and {} more. How many are there?\nA:", "def {}(n):\n    ",
    "Once upon a time, in a village called {},", "Write one sentence about {}.",
)  # fmt: skip
WORDS = ("France", "seven", "fibonacci", "Eldham", "rain", "Peru", "12", "is_prime", "Oakton", "the sea")


def prompts_of(base: BaseModel, count: int) -> list[tuple[int, ...]]:
    texts = [start.format(word) for start in STARTS for word in WORDS]
    return [tuple(base.tokenizer(text).input_ids) for text in texts[:count]]


def log_probs(logits: Tensor, ids: Tensor) -> np.ndarray:
    chosen = logits.double().log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return np.asarray(chosen.numpy())


@torch.no_grad()
def full_pass(base: BaseModel, prompt: tuple[int, ...], ids: tuple[int, ...]) -> np.ndarray:
    logits = base.model(torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return log_probs(logits, torch.tensor(ids))


@torch.no_grad()
def cached_decode(base: BaseModel, prompt: tuple[int, ...], ids: tuple[int, ...]) -> np.ndarray:
    cache = DynamicCache(config=base.model.config)
    given = torch.tensor([prompt])
    logits = []
    for token in ids:
        logits.append(base.model(given, **with_cache(base.model, cache)).logits[0, -1])
        given = torch.tensor([[token]])
    return log_probs(torch.stack(logits), torch.tensor(ids))


@torch.no_grad()
def greedy(base: BaseModel, engine: NativeEngine, prompts: list[tuple[int, ...]], tokens: int) -> dict[str, Any]:
    params = SamplingParams(temperature=0.0, max_new_tokens=tokens, stop_token_ids=base.stop_token_ids)
    found = engine.generate([Request(prompt_ids=prompt, params=params) for prompt in prompts])
    compared = differences = near_ties = 0
    for prompt, completion in zip(prompts, found, strict=True):
        reference: Any = base.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=tokens, eos_token_id=list(base.stop_token_ids), pad_token_id=base.pad_token_id,
            output_logits=True, return_dict_in_generate=True, repetition_penalty=1.0,
        )  # fmt: skip
        expected = reference.sequences[0, len(prompt) :].tolist()
        for step, (token, want) in enumerate(zip(completion.token_ids, expected, strict=False)):
            compared += 1
            if token != want:  # from here on the texts differ
                top = reference.logits[step][0].topk(2).values
                differences += 1
                near_ties += int(float(top[0] - top[1]) < NEAR_TIE)
                break
        else:
            assert len(completion.token_ids) == len(expected)
    return {"tokens_compared": compared, "first_differences": differences, "of_them_near_ties": near_ties}


def sampled(prompts: list[tuple[int, ...]], rows: int, tokens: int) -> list[Request]:
    """`rows` requests of one sample each, at temperature 1."""
    params = SamplingParams(max_new_tokens=tokens)
    return [Request(prompt_ids=prompts[i % len(prompts)], params=params, key=i) for i in range(rows)]


def gaps(
    base: BaseModel, engine: NativeEngine, requests: list[Request], *, with_theirs: bool
) -> tuple[np.ndarray, np.ndarray]:
    """|log-prob - that of a full pass|: ours, and transformers' cached decode's."""
    ours, theirs = [], []
    for completion in engine.generate(requests):
        prompt = requests[completion.request_index].prompt_ids
        exact = full_pass(base, prompt, completion.token_ids)
        ours.append(np.abs(exact - np.array(completion.logprobs)))
        if with_theirs:
            theirs.append(np.abs(exact - cached_decode(base, prompt, completion.token_ids)))
    return np.concatenate(ours), np.concatenate(theirs or [np.zeros(0)])


def texts(completions: list[Completion]) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in completions]


def batch_dependence(engine: NativeEngine, requests: list[Request]) -> dict[str, float]:
    """Share of the requests whose text is another one in another batch."""
    together = texts(engine.generate(requests))
    parts = [requests[start : start + 8] for start in range(0, len(requests), 8)]
    eights = [text for part in parts for text in texts(engine.generate(part))]
    alone = [text for request in requests for text in texts(engine.generate([request]))]

    def share(a: list[tuple[int, ...]], b: list[tuple[int, ...]]) -> float:
        return sum(x != y for x, y in zip(a, b, strict=True)) / len(requests)

    return {
        "all_against_eights": share(together, eights),
        "all_against_alone": share(together, alone),
        "eights_against_alone": share(eights, alone),
    }


def one_model(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"model": Path(name).name}
    for dtype in ("float32", "bfloat16"):
        base = load_base_model(name, device="cpu", dtype=dtype)
        engine = NativeEngine(base.model, context_length=base.context_length, pad_token_id=base.pad_token_id)
        prompts = prompts_of(base, arguments.prompts)
        found: dict[str, Any] = {"kernels": engine.kernels.name}
        if dtype == "float32":
            found["greedy"] = greedy(base, engine, prompts, arguments.greedy_tokens)
            print(f"{name} {dtype}: greedy {found['greedy']}", file=sys.stderr)
        requests = sampled(prompts, arguments.gap_rows, arguments.tokens)
        ours, theirs = gaps(base, engine, requests, with_theirs=dtype == "bfloat16")
        found["logprob_gap"] = {"tokens": len(ours), "mean": float(ours.mean()), "max": float(ours.max())}
        if dtype == "bfloat16":
            found["transformers_gap"] = {"mean": float(theirs.mean()), "max": float(theirs.max())}
            found["ratio"] = float(ours.mean() / theirs.mean())
        found["texts_that_differ"] = batch_dependence(engine, sampled(prompts, arguments.rows, arguments.tokens))
        print(f"{name} {dtype}: {found}", file=sys.stderr)
        result[dtype] = found
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names, folders or .gguf files")
    parser.add_argument("--prompts", type=int, default=50, help="prompts decoded greedily, 50 at most")
    parser.add_argument("--greedy-tokens", type=int, default=64)
    parser.add_argument("--gap-rows", type=int, default=16, help="completions whose log-probs are compared")
    parser.add_argument("--rows", type=int, default=64, help="completions sampled in batches of several sizes")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a sampled completion")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/speed/exactness.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    models = [one_model(name, arguments) for name in arguments.models]
    finish("speed/exactness", {"targets": TARGETS, "near_tie": NEAR_TIE, "models": models}, arguments.save)


if __name__ == "__main__":
    main()
