"""The `inspect` workflow: what would be trained, and what it costs in memory and time.

Counts come from shapes alone, so no weight has to be there. Time comes from a short measurement on this machine: of the
model itself where it is loaded, else of two small ones of its shape with random weights. Leaves out: training itself.
"""

import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tinylora.adapter.attach import adapted_paths, linear_maps, output_head_path
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.grouping import canonical_order, module_type, tie_groups
from tinylora.adapter.quantised import quantisation, quantisation_of, stored_bytes, weight_shape
from tinylora.errors import UserError
from tinylora.generation.engine import make_engine
from tinylora.generation.types import Request, SamplingParams
from tinylora.methods.attached import MethodAdapter
from tinylora.methods.build import lora_xs_config, put_method_on
from tinylora.methods.engine import engine_for
from tinylora.methods.estimate import file_bytes, padded_bytes_a_token, state_bytes, trained_numbers
from tinylora.models.architecture import Unsupported, describe
from tinylora.models.device import available_threads, resolve_device, resolve_dtype
from tinylora.models.quantise import bytes_a_weight, check_quantisation
from tinylora.models.quiet import quiet
from tinylora.reporting.progress import format_duration
from tinylora.training.config import ModelConfig, RunConfig
from tinylora.training.learner import Learner, Row
from tinylora.training.memory import FALLBACK_MICRO_BATCH_TOKENS, FEWEST_PADDED_TOKENS, activation_bytes

if TYPE_CHECKING:
    from tinylora.workbench import Workbench

Say = Callable[[str], None]


def _dims(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


# Dimensions from the publishers' config.json, so that their recipes can be planned without network.
KNOWN_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m-instruct": ("llama", _dims(49152, 576, 1536, 30, 9, 3, True)),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", _dims(151936, 896, 4864, 24, 14, 2, True)),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", _dims(151936, 1536, 8960, 28, 12, 2, True)),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", _dims(151936, 2048, 11008, 36, 16, 2, True)),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", _dims(152064, 3584, 18944, 28, 28, 4, False)),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", _dims(128256, 2048, 8192, 16, 32, 8, True)),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", _dims(128256, 3072, 8192, 28, 24, 8, True)),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", _dims(128256, 4096, 14336, 32, 32, 8, False)),
}

ASSUMED_PROMPT_TOKENS = 200
CHARACTERS_PER_TOKEN = 4.0
CALIBRATION_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class ModuleType:
    """Adapted modules of one type and shape."""

    type: str
    count: int
    out_features: int
    in_features: int


@dataclass(frozen=True, kw_only=True)
class TieGroup:
    """Modules that share one vector."""

    index: int
    count: int
    first: str
    last: str


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Estimated bytes while training; the activations are a rough count for a usual decoder block."""

    weights: int
    adapter_factors: int
    kv_cache: int
    activations: int
    state: int = 0
    """The trained numbers and all that goes with them: gradient, Adam's moments, the best ones, a checkpoint."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter_factors + self.kv_cache + self.activations + self.state


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What an adapter config means on one model. `source` says what it was read from."""

    model: str
    source: str
    num_parameters: int
    dtype: str
    device: str
    num_modules: int
    types: tuple[ModuleType, ...]
    groups: tuple[TieGroup, ...]
    num_trained: int
    bytes_float32: int
    bytes_bfloat16: int
    left_out: Mapping[str, str]
    gaps_checked: bool
    """Whether modules without a unique basis could be looked for: that needs the weights."""
    memory: Memory
    method: str = "tinylora"
    quantization: str = "none"
    """Of the linear maps, as in model.quantization."""
    file_bytes: int = 0
    """Of adapter.safetensors in the run's folder."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Measured tokens a second of the whole model with its adapter, on this machine, as busy as it is now."""

    forward_tokens_per_second: float
    decode_tokens_per_second: float
    decode_rows: int
    threads: int
    measured_on: str
    learner_tokens_per_second: float = 0.0
    """Forward and backward through the method's layers; 0 where it was not measured apart."""
    vector_seconds: float = 0.0
    """To make the engine ready for new numbers, and to take the optimiser's step on them."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tokens and hours of a run if every completion fills its budget: upper bounds but for refilled groups."""

    steps: int
    completions_per_step: int
    prompt_tokens: int
    prompt_tokens_from: str
    sampled_tokens: int
    sampled_tokens_with_all_refills: int
    learner_tokens: int
    evaluation_tokens: int
    hours: float
    """No group refilled."""
    hours_with_all_refills: float
    step_seconds: float = 0.0
    """One step, no group refilled, validation left out."""


# --- shapes ---


def shape_model(config: ModelConfig) -> tuple[nn.Module, str]:
    """The model on the meta device (shapes, no weights) and what it was read from.

    A model of KNOWN_SHAPES needs neither files nor network. Other hub ids fetch config.json only; a GGUF file is
    unpacked once. Raises: UserError for a model that is missing or not known.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from tinylora.models.hub import hub_folder
    from tinylora.models.load import _explain, _local_folder
    from tinylora.models.names import resolve_name

    source = resolve_name(config.name)
    if source.path is None and config.name in KNOWN_SHAPES:
        kind, dims = KNOWN_SHAPES[config.name]
        model_config, origin = AutoConfig.for_model(kind, **dims), "its known dimensions, nothing was loaded"
    else:
        try:
            with quiet():
                if source.kind == "hub":
                    model_config = AutoConfig.from_pretrained(
                        source.name, revision=config.revision or None, trust_remote_code=config.trust_remote_code
                    )
                else:
                    folder, _, _ = _local_folder(source, config.revision, config.trust_remote_code)
                    model_config = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        except (OSError, ValueError, LookupError) as error:
            if isinstance(error, UserError):
                raise
            if source.kind == "hub":  # says in its own words that the hub cannot be reached, or has no such model
                hub_folder(source.name, config.revision, config.trust_remote_code)
            _explain(source, error)
        origin = "its config.json"
    try:
        with torch.device("meta"), quiet():
            return AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code), origin
    except (ValueError, KeyError) as error:
        raise UserError(f"{config.name} is not a causal language model that transformers knows ({error})") from error


def inspect_model(
    model: nn.Module,
    config: RunConfig,
    source: str,
    excluded: Mapping[str, str] | None = None,
    prompt_tokens: int = 200,
) -> Inspection:
    """Counts, groups, bytes and memory. `excluded`: modules left out for their basis, or None if that is not known.

    Tie groups are TinyLoRA's; other methods have none.
    Raises: UserError for targets that match nothing or a rank above the smallest dimension.
    """
    if excluded is None:
        maps, paths = adapted_paths(model, lora_xs_config(config.method, config.adapter)
                                    if config.method.name == "lora-xs" else config.adapter)  # fmt: skip
    else:  # the model already holds its adapter; targets were checked when it was attached
        maps = linear_maps(model)
        paths = canonical_order(p for p in _attached_paths(model) if p not in excluded)
    members: dict[int, list[str]] = {}
    if config.method.name == "tinylora":
        for path, group in zip(paths, tie_groups(paths, config.adapter), strict=True):
            members.setdefault(group, []).append(path)
    counts = Counter((module_type(path), *weight_shape(maps[path])) for path in paths)
    left_out = dict(excluded or {})
    head = output_head_path(model)
    for path in maps:
        if path not in paths and path not in left_out:
            left_out[path] = "the output head, which all-linear leaves out" if path == head else "no target names it"
    shapes = {path: weight_shape(maps[path]) for path in paths}
    trained = len(members) * config.adapter.u
    if config.method.name != "tinylora":
        trained = trained_numbers(config.method, shapes, num_parameters(model))
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    return Inspection(
        model=config.model.name,
        source=source,
        num_parameters=num_parameters(model),
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        num_modules=len(paths),
        types=tuple(ModuleType(type=t, count=n, out_features=o, in_features=i) for (t, o, i), n in counts.items()),
        groups=tuple(TieGroup(index=g, count=len(m), first=m[0], last=m[-1]) for g, m in sorted(members.items())),
        num_trained=trained,
        bytes_float32=4 * trained,
        bytes_bfloat16=2 * trained,
        left_out=left_out,
        gaps_checked=excluded is not None,
        memory=memory_estimate(model, config, shapes, dtype.itemsize, prompt_tokens, trained),
        method=config.method.describe() if config.method.name != "tinylora" else "tinylora",
        quantization=config.model.quantization,
        file_bytes=file_bytes(trained),
    )


def _attached_paths(model: nn.Module) -> list[str]:
    from tinylora.adapter.layer import AdaptedLinear

    return [path for path, module in model.named_modules() if isinstance(module, AdaptedLinear)]


def num_parameters(model: nn.Module) -> int:
    """Parameters of the base, tied ones once; packed ones by what they stand for."""
    packed = {id(m.weight): math.prod(weight_shape(m)) for m in model.modules() if quantisation(m)}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def weight_bytes(model: nn.Module, itemsize: int, kind: str = "none") -> int:
    """Bytes of the base's weights; `kind`: how a model that is not loaded would be quantised."""
    if quantisation_of(model):
        return sum(stored_bytes(parameter) for parameter in model.parameters())
    head, each = output_head_path(model), bytes_a_weight(kind, itemsize)
    inside = sum(math.prod(weight_shape(module)) for path, module in linear_maps(model).items() if path != head)
    return int((num_parameters(model) - inside) * itemsize + inside * each)


def memory_estimate(
    model: nn.Module,
    config: RunConfig,
    shapes: Mapping[str, tuple[int, int]],
    itemsize: int,
    prompt_tokens: int,
    trained: int = 0,
) -> Memory:
    """Bytes for training with this config. `shapes`: (out, in) of every adapted module by path; `itemsize`: of the
    weights; `trained`: numbers.

    Weights count twice where the native engine packs a copy of them. Activations are those of one micro-batch, by
    `training/memory.py`; for a model that the packed learner does not cover, per token: per block 12 values of the
    hidden size and 4 of the MLP's (once per model plus one per block with gradient checkpointing), and logits three
    times in float32 (logits, log-probs, gradient).
    """
    base: Any = model
    text: Any = base.config.get_text_config()
    layers, hidden, heads = text.num_hidden_layers, text.hidden_size, text.num_attention_heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    rows = min(config.generation.max_batch_rows, config.grpo.prompts_per_step * config.grpo.group_size)
    length = prompt_tokens + config.generation.max_new_tokens
    block = 12 * hidden + 4 * inner
    kept = block + layers * hidden if config.train.gradient_checkpointing else layers * block
    checkpointing = config.train.gradient_checkpointing
    copies = 1
    is_quantised = config.model.quantization != "none" or bool(quantisation_of(model))
    try:
        if is_quantised:
            raise Unsupported("its weights are quantised")
        architecture = describe(base)
    except Unsupported:
        tokens = max(config.train.micro_batch_tokens or FALLBACK_MICRO_BATCH_TOKENS, length)
        activations = tokens * (kept * itemsize + 3 * 4 * text.vocab_size)
    else:
        need = activation_bytes(architecture, checkpointing, resolve_device(config.model.device).type)
        budget = int(config.train.memory_budget_gib * 2**30)
        tokens = config.train.micro_batch_tokens or max(0, budget - need.fixed) // need.a_token
        activations = need.fixed + need.a_token * max(tokens, length)
        copies += config.generation.backend == "native" and resolve_device(config.model.device).type == "cpu"
    method = config.method
    rank, u = config.adapter.rank, config.adapter.u
    if method.name == "lora-xs":
        rank, u = method.rank, method.rank**2
    factors = sum(4 * (rank * (o + i) + u * rank * rank) for o, i in shapes.values())
    is_other = method.name not in ("tinylora", "lora-xs")
    if is_other or is_quantised:
        each = padded_bytes_a_token(model, method, shapes, itemsize, checkpointing)
        budget = int(config.train.memory_budget_gib * 2**30)
        tokens = config.train.micro_batch_tokens or max(FEWEST_PADDED_TOKENS, budget // each)
        activations = each * max(tokens, length)
    if is_other:
        factors = 4 * trained if method.name in ("lora", "qlora", "vera") else 0
        if method.name == "full" or (method.name in ("dora", "ia3") and itemsize == 4):
            copies += 1  # the merged weights
        elif method.name in ("dora", "ia3", "adapter"):
            copies = 1  # transformers samples
    weights = num_parameters(model) * itemsize
    if is_quantised:
        weights = weight_bytes(model, itemsize, config.model.quantization)
    return Memory(
        weights=copies * weights,
        adapter_factors=factors,
        kv_cache=rows * length * 2 * layers * kv_heads * head_dim * itemsize,
        activations=activations,
        state=state_bytes(trained) if method.name != "tinylora" else 0,
    )


# --- time ---


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
    """LEARNER_TOKENS tokens forward and backward; 0 for TinyLoRA's own layers, whose cost follows from `forward`."""
    vector: float
    """To make the engine ready for new numbers."""

    def with_blocks(self, more: "_Seconds", blocks: int) -> "_Seconds":
        """Of a model of `blocks` blocks, if this is one of 1 block and `more` one of BLOCKS_TIMED."""
        each = lambda a, b: a + max(0.0, b - a) / (BLOCKS_TIMED - 1) * (blocks - 1)  # noqa: E731
        pairs = zip((self.forward, self.decode, self.learner, self.vector),
                    (more.forward, more.decode, more.learner, more.vector), strict=True)  # fmt: skip
        return _Seconds(*(each(a, b) for a, b in pairs))

    def speed(self, rows: int, trained: int, measured_on: str) -> Speed:
        """As rates. `trained`: numbers, each of which a step reads and writes some times."""
        state = STATE_PASSES * 4 * trained / _copy_rate() if self.learner else 0.0
        return Speed(
            forward_tokens_per_second=CALIBRATION_TOKENS / self.forward,
            decode_tokens_per_second=rows / self.decode,
            decode_rows=rows,
            threads=torch.get_num_threads(),
            measured_on=measured_on,
            learner_tokens_per_second=LEARNER_TOKENS / self.learner if self.learner else 0.0,
            vector_seconds=self.vector + state,
        )


def _measure(model: Any, adapter: Any, config: RunConfig) -> _Seconds:
    """Time a forward pass, a decoding step of the engine that would sample, and for methods other than TinyLoRA the
    learner's passes and new numbers. The cost of long contexts is left out."""
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
    if not is_other:
        return _Seconds(forward, step, 0.0, 0.0)
    fresh = _timed(lambda: engine.generate([request(few, 1e-3 * torch.rand_like(adapter.zeros()))]), device, 2)
    return _Seconds(forward, step, _learner_seconds(model, adapter, config, vocabulary), max(0.0, fresh - shortest))


def measure_speed(model: Any, adapter: Any, config: RunConfig, trained: int) -> Speed:
    """Speed of a model that is loaded, with its adapter on it."""
    return _measure(model, adapter, config).speed(_rows(config), trained, "the model itself")


STATE_PASSES = 20
"""Times that a step reads or writes an array of all trained numbers, its checkpoint included."""
LEARNER_TOKENS = 4 * 48 + 16 * 16
"""4 prompts of 48 tokens with 4 completions of 16 each."""
BLOCKS_TIMED = 3
"""Blocks of the larger of the two models that are timed in the place of one that is not loaded."""


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
    """Speed of a model that is not loaded: two small ones of its shape, vocabulary included, with random weights and
    the method on them are timed, of 1 and of BLOCKS_TIMED blocks; what a block adds counts for all the others."""
    torch.set_num_threads(config.train.num_threads or available_threads())
    shape: Any = model
    blocks = int(shape.config.get_text_config().num_hidden_layers)
    found = [_measure_small(shape, config, count) for count in (1, BLOCKS_TIMED)]
    of_all = found[0].with_blocks(found[1], blocks)
    plain = ", not quantised" if config.model.quantization != "none" else ""
    measured_on = f"models of 1 and {BLOCKS_TIMED} blocks of this shape, random weights{plain}"
    return of_all.speed(_rows(config), trained, measured_on)


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


def prompt_length(config: RunConfig) -> tuple[int, str]:
    """Mean prompt tokens and how they were found: from a few of the task's questions at four characters a token where
    those can be had without network, else an assumption."""
    from tinylora.tasks.build import build_task
    from tinylora.tasks.public_sets import PUBLIC

    task = config.task
    if task.name in PUBLIC and not task.path:
        return ASSUMED_PROMPT_TOKENS, "assumed: the questions are on the hub"
    if task.name.startswith("reasoning_gym:"):
        task = replace(task, num_items=min(task.num_items, 512))
    built = build_task(task, config.prompt)
    items = built.items("train")[:64]
    characters = sum(len(m["content"]) for item in items for m in built.prompt(item)) / max(1, len(items))
    template = 30 if config.prompt.chat else 0  # role marks, and the system turn that many templates bring
    return round(characters / CHARACTERS_PER_TOKEN) + template, "from questions of the task at 4 characters a token"


def make_plan(config: RunConfig, speed: Speed, prompt_tokens: int, prompt_tokens_from: str) -> Plan:
    """Tokens and hours of the run.

    A learner's token costs a forward pass and a backward pass, which costs another one (nothing but 13 numbers gets a
    weight gradient); one more each with gradient checkpointing and with a KL term. The final evaluation counts, for a
    test item, greedy and sampled answers of both models, one of a larger budget, one under another prompt and
    one for each random vector; and each candidate prompt on the validation items.
    """
    from tinylora.evaluation.final import BUDGET_FACTOR, prompt_candidates

    grpo, budget = config.grpo, config.generation.max_new_tokens
    completions = grpo.prompts_per_step * grpo.group_size
    sampled = config.train.steps * completions * budget
    refilled = math.ceil(sampled * grpo.refill_factor)
    per_step = grpo.prompts_per_step * prompt_tokens + completions * budget  # a group's prompt is computed once
    learner = config.train.steps * per_step * grpo.updates_per_batch
    passes = 2 + config.train.gradient_checkpointing + (grpo.kl_coef > 0)
    learner_seconds = learner * passes / speed.forward_tokens_per_second
    if speed.learner_tokens_per_second:
        kl_seconds = (grpo.kl_coef > 0) * learner / speed.forward_tokens_per_second
        learner_seconds = learner / speed.learner_tokens_per_second + kl_seconds
    learner_seconds += config.train.steps * speed.vector_seconds
    validations = 1 + (config.train.steps // config.eval.every if config.eval.every else 1)
    evaluation = validations * config.eval.num_validation * budget
    if config.eval.num_test:
        each = 4 + BUDGET_FACTOR + 1 + config.eval.random_vectors
        prompts_tried = len(prompt_candidates(config)) * config.eval.num_validation
        evaluation += (each * config.eval.num_test + prompts_tried) * budget
    fixed = learner_seconds + evaluation / speed.decode_tokens_per_second
    prompts = config.train.steps * grpo.prompts_per_step * prompt_tokens / speed.forward_tokens_per_second

    def hours(tokens: int, factor: float) -> float:
        return (fixed + prompts * factor + tokens / speed.decode_tokens_per_second) / 3600

    return Plan(
        steps=config.train.steps,
        completions_per_step=completions,
        prompt_tokens=prompt_tokens,
        prompt_tokens_from=prompt_tokens_from,
        sampled_tokens=sampled,
        sampled_tokens_with_all_refills=refilled,
        learner_tokens=learner,
        evaluation_tokens=evaluation,
        hours=hours(sampled, 1.0),
        hours_with_all_refills=hours(refilled, grpo.refill_factor),
        step_seconds=(learner_seconds + prompts + sampled / speed.decode_tokens_per_second) / config.train.steps,
    )


# --- the whole workflow ---


def inspect_shapes(config: RunConfig, say: Say) -> tuple[Inspection, Speed, Plan]:
    """Everything that can be said without weights; what `train --dry-run` prints."""
    from tinylora.models.names import resolve_name
    from tinylora.workbench import resolve_quantization

    config = resolve_quantization(config, say)
    if config.model.quantization != "none":
        check_quantisation(
            config.model.quantization, resolve_name(config.model.name), resolve_device(config.model.device)
        )
    model, source = shape_model(config.model)
    model.to(resolve_dtype(config.model.dtype, resolve_device(config.model.device)))
    prompt_tokens, how = prompt_length(config)
    found = inspect_model(model, config, source, prompt_tokens=prompt_tokens)
    say("timing small models of this shape here ...")
    speed = measure_blocks(model, config, found.num_trained)
    return found, speed, make_plan(config, speed, prompt_tokens, how)


def inspect_weights(bench: "Workbench", say: Say) -> tuple[Inspection, Speed, Plan]:
    """The same for a model that is loaded: modules without a unique basis are known, and the model itself is timed."""
    config = bench.config
    prompt_tokens, how = prompt_length(config)
    with bench.adapter.using(None):
        other = isinstance(bench.adapter, MethodAdapter)
        found = inspect_model(
            bench.base.model, config, "its weights", None if other else bench.adapter.excluded, prompt_tokens
        )
    say("timing the model here ...")
    speed = measure_speed(bench.base.model, bench.adapter, config, found.num_trained)
    return found, speed, make_plan(config, speed, prompt_tokens, how)


def format_bytes(count: int) -> str:
    """A number of bytes as a person says it, in powers of 1000."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:,.0f} {units[0]}" if units[0] == "bytes" else f"{value:,.1f} {units[0]}"


def format_inspection(found: Inspection, adapter: AdapterConfig) -> str:
    """Lines for people: what would be trained first, then modules, groups, what is left out, and memory."""
    sizes = Counter(group.count for group in found.groups)
    tying = ", ".join(f"{n} of {size} modules" for size, n in sorted(sizes.items(), reverse=True))
    counted = (
        f"would train {found.num_trained:,} numbers ({found.bytes_float32:,} bytes in float32, "
        f"{found.bytes_bfloat16:,} in bf16): "
    )
    is_tinylora = found.method == "tinylora"
    lines = [
        f"{found.model}: {found.num_parameters:,} parameters, read from {found.source}",
        f"{counted}u = {adapter.u}, r = {adapter.rank}, {len(found.groups)} tie groups over "
        f"{found.num_modules} modules; the base stays frozen"
        if is_tinylora
        else f"{counted}{found.method}; the adapter's file has some {format_bytes(found.file_bytes)}",
        "",
        f"{'modules by type':<16} {'count':>5}  shape (out x in)",
        *(f"{t.type:<16} {t.count:>5}  {t.out_features} x {t.in_features}" for t in found.types),
        *(["", f"tie groups ({adapter.tying}): {tying}"] if is_tinylora else []),
        *(f"  {g.index:>3}  {g.count:>3} modules  {g.first} to {g.last}" for g in found.groups[:20]),
    ]
    if len(found.groups) > 20:
        lines.append(f"  ... and {len(found.groups) - 20} more (all of them with --json)")
    lines += ["", "left out:" if found.left_out else "left out: nothing"]
    shown = list(found.left_out.items())
    lines += [f"  {path}: {reason}" for path, reason in shown[:10]]
    if len(shown) > 10:
        lines.append(f"  ... and {len(shown) - 10} more (all of them with --json)")
    if not found.gaps_checked:
        lines.append("  (modules whose basis is not unique are left out too; that shows only with the weights)")
    m = found.memory
    packed = f", linear maps {found.quantization}" if found.quantization != "none" else ""
    lines += [
        "",
        f"memory in training, estimated, on {found.device} in {found.dtype}{packed}: {format_bytes(m.total)} = weights "
        f"{format_bytes(m.weights)}, adapter factors {format_bytes(m.adapter_factors)}, KV cache "
        f"{format_bytes(m.kv_cache)}, activations and logits {format_bytes(m.activations)}"
        + (f", trained numbers, gradient and optimiser {format_bytes(m.state)}" if m.state else ""),
    ]
    return "\n".join(lines)


def format_plan(speed: Speed, plan: Plan) -> str:
    """Lines for people: speed, tokens, hours."""
    return "\n".join(
        [
            f"speed here now, measured on {speed.measured_on}: {speed.forward_tokens_per_second:,.0f} tok/s forward, "
            f"{speed.decode_tokens_per_second:,.0f} tok/s decoding {speed.decode_rows} rows, {speed.threads} threads",
            f"run: {plan.steps} steps of {plan.completions_per_step} completions; prompts of {plan.prompt_tokens} "
            f"tokens ({plan.prompt_tokens_from})",
            f"tokens, if every completion fills its budget: {plan.sampled_tokens:,} sampled "
            f"(up to {plan.sampled_tokens_with_all_refills:,} if groups are refilled to the cap), "
            f"{plan.learner_tokens:,} through the learner, {plan.evaluation_tokens:,} for evaluation",
            f"time, at most: {plan.hours:,.1f} hours ({format_duration(3600 * plan.hours)}); "
            f"{plan.hours_with_all_refills:,.1f} hours with every refill"
            + (f"; a step {format_duration(plan.step_seconds)}" if plan.step_seconds else ""),
        ]
    )
