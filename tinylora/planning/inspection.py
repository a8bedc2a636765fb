"""The `inspect` workflow: what would be trained, and what it costs in memory and time.

Counts come from shapes alone, so no weight has to be there. Leaves out: speed (timing.py), tokens and hours (plan.py).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tinylora.adapter.attach import adapted_paths, linear_maps, output_head_path
from tinylora.adapter.config import AdapterConfig, count_groups
from tinylora.adapter.grouping import canonical_order, module_type, tie_groups
from tinylora.adapter.quantised import quantisation, quantisation_of, stored_bytes, weight_shape
from tinylora.config.run import ModelConfig, RunConfig
from tinylora.errors import UserError
from tinylora.learner.memory import FALLBACK_MICRO_BATCH_TOKENS, FEWEST_PADDED_TOKENS, activation_bytes
from tinylora.methods.build import lora_xs_config
from tinylora.methods.estimate import file_bytes, padded_bytes_a_token, state_bytes, trained_numbers
from tinylora.methods.one_vector import MethodAdapter
from tinylora.models.architecture import Unsupported, describe
from tinylora.models.quantise import bytes_a_weight, check_quantisation
from tinylora.models.quiet import quiet
from tinylora.planning.plan import Plan, make_plan, prompts_of
from tinylora.planning.speed import Speed, measure_blocks, measure_speed
from tinylora.system.device import resolve_device, resolve_dtype

if TYPE_CHECKING:
    from tinylora.rollouts.runtime import Workbench

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


MAPS_A_BLOCK = 7
"""q, k, v, o, gate, up, down."""

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
    packed_copy: int = 0
    """Of the weights: the rollout engine's copy in its own layout, which it does without where there is no room."""
    state: int = 0
    """The trained numbers and all that goes with them: gradient, Adam's moments, the best ones, a checkpoint."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapter_factors + self.kv_cache + self.activations + self.state

    @property
    def least(self) -> int:
        """All without what can be done without."""
        return self.total - self.packed_copy


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
    `learner/memory.py`; for a model that the packed learner does not cover, per token: per block 12 values of the
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
    copies, is_packed = 1, False
    engine_maps, is_covered = 0, False
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
        is_native, is_covered = config.generation.backend == "native", True
        is_packed = is_native and resolve_device(config.model.device).type == "cpu"
        engine_maps = MAPS_A_BLOCK * len(architecture.layers) if is_native else 0
    method = config.method
    rank, u = config.adapter.rank, config.adapter.u
    if method.name == "lora-xs":
        rank, u = method.rank, method.rank**2
    on_host = resolve_device(config.model.device).type != "cuda"
    factors = factor_bytes(shapes, rank, u, itemsize, on_host=on_host, engine_maps=engine_maps, is_covered=is_covered)
    is_other = method.name not in ("tinylora", "lora-xs")
    if is_other or is_quantised:
        each = padded_bytes_a_token(model, method, shapes, itemsize, checkpointing)
        budget = int(config.train.memory_budget_gib * 2**30)
        tokens = config.train.micro_batch_tokens or max(FEWEST_PADDED_TOKENS, budget // each)
        activations = each * max(tokens, length)
    if is_other:
        factors = 4 * trained if method.name in ("lora", "qlora", "dora", "vera") else 0
        copies += method.name == "full"  # the weights with v in them
    weights = num_parameters(model) * itemsize
    if is_quantised:
        weights = weight_bytes(model, itemsize, config.model.quantization)
    return Memory(
        weights=(copies + is_packed) * weights,
        packed_copy=is_packed * weights,
        adapter_factors=factors,
        kv_cache=rows * length * 2 * layers * kv_heads * head_dim * itemsize,
        activations=activations,
        state=state_bytes(trained) if method.name != "tinylora" else 0,
    )


def factor_bytes(
    shapes: Mapping[str, tuple[int, int]],
    rank: int,
    u: int,
    itemsize: int,
    *,
    on_host: bool,
    engine_maps: int,
    is_covered: bool,
) -> int:
    """Bytes of all copies of U, S, V and P of an attached adapter.

    The adapter holds them in float64, in main memory (which counts with `on_host`), its layers in float32; the native
    engine has A, B and P again, P for each of the `engine_maps` maps that it knows (0 without that engine), and the
    packed learner (`is_covered`) B and P, and A and B in three pieces where the base's numbers are narrower.
    """
    each = 4 + 8 * on_host
    inside = each + 4 * bool(engine_maps) + (3 * itemsize if is_covered and itemsize < 4 else 0)
    outside = inside + 4 * is_covered
    sides = sum(rank * (inside * i + outside * o) for o, i in shapes.values())
    return sides + u * rank**2 * ((each + 4 * is_covered) * len(shapes) + 4 * engine_maps)


# --- the whole workflow ---


def inspect_shapes(config: RunConfig, say: Say) -> tuple[Inspection, Speed, Plan]:
    """Everything that can be said without weights; what `train --dry-run` prints."""
    from tinylora.models.names import resolve_name
    from tinylora.rollouts.runtime import resolve_quantization

    config = resolve_quantization(config, say)
    if config.model.quantization != "none":
        check_quantisation(
            config.model.quantization, resolve_name(config.model.name), resolve_device(config.model.device)
        )
    model, source = shape_model(config.model)
    model.to(resolve_dtype(config.model.dtype, resolve_device(config.model.device)))
    prompts = prompts_of(config)
    found = inspect_model(model, config, source, prompt_tokens=prompts.tokens)
    say("timing small models of this shape here ...")
    speed = measure_blocks(model, config, found.num_trained)
    return found, speed, make_plan(config, speed, prompts)


def inspect_weights(bench: "Workbench", say: Say) -> tuple[Inspection, Speed, Plan]:
    """The same for a model that is loaded: modules without a unique basis are known, and the model itself is timed."""
    config = bench.config
    prompts = prompts_of(config)
    with bench.adapter.using(None):
        other = isinstance(bench.adapter, MethodAdapter)
        found = inspect_model(
            bench.base.model, config, "its weights", None if other else bench.adapter.excluded, prompts.tokens
        )
    say("timing the model here ...")
    speed = measure_speed(bench.base.model, bench.adapter, config, found.num_trained)
    return found, speed, make_plan(config, speed, prompts)


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
        f"{counted}u = {adapter.u}, r = {adapter.rank}, {count_groups(len(found.groups))} over "
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
    copy = f" ({format_bytes(m.packed_copy)} of them a copy for rollouts, if there is room)" if m.packed_copy else ""
    packed = f", linear maps {found.quantization}" if found.quantization != "none" else ""
    lines += [
        "",
        f"memory in training, estimated, on {found.device} in {found.dtype}{packed}: {format_bytes(m.total)} = weights "
        f"{format_bytes(m.weights)}{copy}, adapter factors {format_bytes(m.adapter_factors)}, KV cache "
        f"{format_bytes(m.kv_cache)}, activations and logits {format_bytes(m.activations)}"
        + (f", trained numbers, gradient and optimiser {format_bytes(m.state)}" if m.state else ""),
    ]
    return "\n".join(lines)
