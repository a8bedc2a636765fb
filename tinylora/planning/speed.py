"""How fast a run would be here, measured: the model itself where it is loaded, else two small ones of its shape.

Leaves out: what the tokens of a run add up to (plan.py), and the cost of long contexts.
"""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tinylora.adapter.attach import linear_maps, output_head_path
from tinylora.adapter.quantised import weight_shape
from tinylora.config.run import RunConfig
from tinylora.generation.engine import make_engine
from tinylora.generation.types import Request, SamplingParams
from tinylora.learner.learner import Learner, Row
from tinylora.methods.build import put_method_on
from tinylora.methods.engine import engine_for
from tinylora.methods.one_vector import MethodAdapter
from tinylora.models.quiet import quiet
from tinylora.system.cores import default_threads
from tinylora.system.device import resolve_device, resolve_dtype

CALIBRATION_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measured tokens a second of the whole model with its adapter, on this machine, as busy as it is now."""

    forward_tokens_per_second: float
    decode_tokens_per_second: float
    decode_rows: int
    threads: int
    measured_on: str
    learner_tokens_per_second: float
    """Forward and backward through the method's layers, as the learner of the run does it."""
    vector_seconds: float = 0.0
    """To make the engine ready for new numbers, and to take the optimiser's step on them."""


def _timed(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one to warm up."""
    best = math.inf
    for attempt in range(repeats + 1):
        _synchronise(device)
        start = time.perf_counter()
        action()
        _synchronise(device)
        if attempt:
            best = min(best, time.perf_counter() - start)
    return best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


@dataclass(frozen=True, slots=True)
class _Seconds:
    """What a model of some blocks takes for each thing, at one length and one batch."""

    forward: float
    """CALIBRATION_TOKENS tokens without a gradient."""
    decode: float
    """One step of all rows."""
    learner: float
    """LEARNER_TOKENS tokens forward and backward."""
    vector: float
    """To make the engine ready for new numbers."""

    def with_blocks(self, more: "_Seconds", timed: int, blocks: int) -> "_Seconds":
        """Of a model of `blocks` blocks, if this is one of 1 block and `more` one of `timed`."""
        each = lambda a, b: a + max(0.0, b - a) / (timed - 1) * (blocks - 1)  # noqa: E731
        pairs = zip((self.forward, self.decode, self.learner, self.vector),
                    (more.forward, more.decode, more.learner, more.vector), strict=True)  # fmt: skip
        return _Seconds(*(each(a, b) for a, b in pairs))

    def speed(self, rows: int, trained: int, measured_on: str) -> Speed:
        """As rates. `trained`: numbers, each of which a step reads and writes some times."""
        state = STATE_PASSES * 4 * trained / _copy_rate()
        return Speed(
            forward_tokens_per_second=CALIBRATION_TOKENS / self.forward,
            decode_tokens_per_second=rows / self.decode,
            decode_rows=rows,
            threads=torch.get_num_threads(),
            measured_on=measured_on,
            learner_tokens_per_second=LEARNER_TOKENS / self.learner,
            vector_seconds=self.vector + state,
        )


def _measure(model: Any, adapter: Any, config: RunConfig) -> _Seconds:
    """Time a forward pass, a decoding step of the engine that would sample, the learner's passes, and new numbers."""
    rows = _rows(config)
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(CALIBRATION_TOKENS, device=device) % vocabulary
    is_other = isinstance(adapter, MethodAdapter)
    v = adapter.zeros() if is_other else None
    engine: Any = (
        engine_for(model, adapter, config, context_length=CALIBRATION_TOKENS, pad_token_id=0, say=lambda text: None)
        if is_other
        else make_engine(
            model, backend=config.generation.backend, context_length=CALIBRATION_TOKENS, max_batch_rows=rows,
            say=lambda text: None,
        )
    )  # fmt: skip

    def request(new_tokens: int, v: Tensor | None) -> Request:
        params = SamplingParams(max_new_tokens=new_tokens)
        return Request(prompt_ids=tuple(ids[:8].tolist()), params=params, num_samples=rows, v=v)

    def decode(new_tokens: int) -> float:
        return _timed(lambda: engine.generate([request(new_tokens, v)]), device, 3)

    with torch.inference_mode():
        forward = _timed(lambda: model(input_ids=ids.unsqueeze(0), use_cache=False), device, 2)
    few, many = 2, 10
    shortest = decode(few)
    step = max(decode(many) - shortest, 1e-9) / (many - few)
    learner = _learner_seconds(model, adapter, config, vocabulary)
    if not is_other:  # its engine takes a v with every request
        return _Seconds(forward, step, learner, 0.0)
    fresh = _timed(lambda: engine.generate([request(few, 1e-3 * torch.rand_like(adapter.zeros()))]), device, 2)
    return _Seconds(forward, step, learner, max(0.0, fresh - shortest))


def measure_speed(model: Any, adapter: Any, config: RunConfig, trained: int) -> Speed:
    """Speed of a model that is loaded, with its adapter on it."""
    return _measure(model, adapter, config).speed(_rows(config), trained, "the model itself")


STATE_PASSES = 20
"""Times that a step reads or writes an array of all trained numbers, its checkpoint included."""
LEARNER_TOKENS = 4 * 48 + 16 * 16
"""4 prompts of 48 tokens with 4 completions of 16 each."""
FEWEST_BLOCKS = 3
"""Blocks of the larger of the two models that are timed in the place of one that is not loaded."""
TIMED_BYTES = 2**27
"""It has more blocks where they are small: weights that fit in a processor's cache would be too fast."""


def _copy_rate() -> float:
    """Bytes a second of a copy in memory, read and written."""
    source = torch.zeros(2**24)
    return 2 * 4 * source.numel() / _timed(lambda: source.clone(), torch.device("cpu"), 3)


def _learner_seconds(model: Any, adapter: Any, config: RunConfig, vocabulary: int) -> float:
    """Of forward and backward passes over LEARNER_TOKENS tokens."""
    learner = Learner(model, adapter, temperature=config.generation.temperature,
                      checkpointing=config.train.gradient_checkpointing)  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    tokens = lambda n: tuple(torch.randint(0, vocabulary, (n,), generator=draw).tolist())  # noqa: E731
    prompts = [tokens(48) for _ in range(4)]
    rows = [Row(group, prompt, tokens(16)) for group, prompt in enumerate(prompts) for _ in range(4)]
    v = adapter.zeros().requires_grad_()

    def passes() -> None:
        v.grad = None
        logprobs, mask = learner.logprobs(rows, v)
        logprobs[mask].sum().backward()

    return _timed(passes, v.device, 2)


def measure_blocks(model: nn.Module, config: RunConfig, trained: int) -> Speed:
    """Speed of a model that is not loaded: two smaller ones of its shape, vocabulary included, with random weights and
    the method on them are timed, one of 1 block and one of some; what a block adds counts for all the others."""
    torch.set_num_threads(config.train.num_threads or default_threads())
    shape: Any = model
    blocks = int(shape.config.get_text_config().num_hidden_layers)
    timed = _blocks_to_time(shape, config, blocks)
    found = [_measure_small(shape, config, count) for count in (1, timed)]
    of_all = found[0].with_blocks(found[1], timed, blocks)
    plain = ", not quantised" if config.model.quantization != "none" else ""
    measured_on = f"models of 1 and {timed} blocks of this shape, random weights{plain}"
    return of_all.speed(_rows(config), trained, measured_on)


def _blocks_to_time(model: Any, config: RunConfig, blocks: int) -> int:
    head = output_head_path(model)
    weights = sum(math.prod(weight_shape(module)) for path, module in linear_maps(model).items() if path != head)
    itemsize = resolve_dtype(config.model.dtype, resolve_device(config.model.device)).itemsize
    return max(FEWEST_BLOCKS, min(blocks, TIMED_BYTES * blocks // (weights * itemsize)))


def _measure_small(model: Any, config: RunConfig, blocks: int) -> _Seconds:
    from transformers import AutoModelForCausalLM

    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    small = model.config.__class__.from_dict(model.config.to_dict())
    small.num_hidden_layers = blocks
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(small, name, None)
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:blocks]
    with quiet():
        part = AutoModelForCausalLM.from_config(small).to(device=device, dtype=dtype).eval()
    settings = replace(config.adapter, basis="random", tying="all", num_groups=0, targets=("all-linear",))
    method = replace(config.method, name="lora") if config.method.name == "qlora" else config.method
    adapter = put_method_on(part, method, settings)
    try:
        return _measure(part, adapter, config)
    finally:
        del part, adapter
        gc.collect()


def _rows(config: RunConfig) -> int:
    return min(config.generation.max_batch_rows, config.grpo.prompts_per_step * config.grpo.group_size)
