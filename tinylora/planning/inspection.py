"""The `inspect` workflow: what would be trained, and what it costs in memory and time.

Counts come from shapes alone, so no weight has to be there. Leaves out: speed (timing.py), tokens and hours (plan.py).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from tinylora.adapter.attach import adapted_paths, linear_maps, output_head_path
from tinylora.adapter.config import AdapterConfig, count_groups
from tinylora.adapter.grouping import canonical_order, module_type, tie_groups
from tinylora.adapter.quantised import weight_shape
from tinylora.config.run import RunConfig
from tinylora.methods.build import lora_xs_config
from tinylora.methods.estimate import file_bytes, trained_numbers
from tinylora.methods.one_vector import MethodAdapter
from tinylora.models.quantise import check_quantisation
from tinylora.planning.memory import Memory, memory_estimate, num_parameters
from tinylora.planning.plan import Plan, make_plan, prompts_of
from tinylora.planning.reach import Reach, reach
from tinylora.planning.shapes import shape_model
from tinylora.planning.speed import Speed, measure_blocks, measure_speed
from tinylora.system.device import resolve_device, resolve_dtype
from tinylora.talk import Say, format_bytes

if TYPE_CHECKING:
    from tinylora.rollouts.runtime import Runtime


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
    reach: Reach
    """Which share of the weights is adapted, and what is not."""


# --- shapes ---


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
        reach=reach(model, list(maps) if config.method.name == "full" else paths),
    )


def _attached_paths(model: nn.Module) -> list[str]:
    from tinylora.adapter.layer import AdaptedLinear

    return [path for path, module in model.named_modules() if isinstance(module, AdaptedLinear)]


# --- the whole workflow ---


def inspect_shapes(config: RunConfig, say: Say) -> tuple[Inspection, Speed, Plan]:
    """Everything that can be said without weights; what `train --dry-run` prints."""
    from tinylora.methods.build import resolve_quantization
    from tinylora.models.names import resolve_name

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
    return found, speed, make_plan(config, speed, prompts, found.num_trained)


def inspect_weights(runtime: "Runtime", say: Say) -> tuple[Inspection, Speed, Plan]:
    """The same for a model that is loaded: modules without a unique basis are known, and the model itself is timed."""
    config = runtime.config
    prompts = prompts_of(config)
    with runtime.adapter.using(None):
        other = isinstance(runtime.adapter, MethodAdapter)
        found = inspect_model(
            runtime.base.model, config, "its weights", None if other else runtime.adapter.excluded, prompts.tokens
        )
    say("timing the model here ...")
    speed = measure_speed(runtime.base.model, runtime.adapter, config, found.num_trained)
    return found, speed, make_plan(config, speed, prompts, found.num_trained)


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
    if found.method != "full":
        lines += [found.reach.in_words()]
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
