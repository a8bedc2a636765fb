"""What this machine can do, measured now, and the time below which no decode step of a model can come.

A decode step of `rows` rows passes every linear map once and reads the keys and values kept so far:

    seconds >= sum over linear maps of max(2 rows in out / rate(rows), bytes of the weight / bandwidth)
               + bytes of keys and values / bandwidth

`rate(rows)` is the fastest product measured for that many rows, over the shapes of the model's own maps and over the
ways torch has to compute it (weights packed in advance among them), with weights that stay in the cache. `bandwidth` is
that of summing a buffer much larger than the caches. Both take torch's current threads. The share of the roofline is
that bound divided by the measured time.

Leaves out, so that the bound stays one: embeddings, norms, activation functions, the adapter, drawing tokens, softmax,
and experts whose weights are not plain linear maps. Where all weights fit into the caches (tiny models), they are not
read from memory, and the share can exceed 1.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinylora.adapter.attach import Shape, linear_shapes

BUFFER_BYTES = 2**29
"""Summed for the bandwidth; the caches of server processors reach tens of megabytes a socket's core complex."""
IN_CACHE_BYTES = 2**22
"""Weights timed for the product rate are cut to this, along the outputs."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was measured."""

    threads: int
    device: str
    dtype: str
    bandwidth: float
    """Bytes a second, read."""
    rates: Mapping[int, float]
    """Multiply-adds counted as two operations, a second, by rows."""


def kv_bytes(model: nn.Module, lengths: Sequence[float]) -> float:
    """Bytes of keys and values that a step reads whose rows see stretches of `lengths` cached tokens.

    A prompt that several rows share is one stretch, read once. Layers with a sliding window read no more than that.
    """
    base: Any = model
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None) or math.inf
    # Without a list of layers (Mistral), a window holds for all of them.
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    limits = [window if kind == "sliding_attention" else math.inf for kind in kinds]
    tokens = sum(min(length, limit) for limit in limits for length in lengths)
    return tokens * 2 * heads * head_dim * _itemsize(model)


def _itemsize(model: nn.Module) -> int:
    return next(model.parameters()).dtype.itemsize


def step_seconds(
    shapes: Mapping[Shape, int], rows: int, itemsize: int, kv_read: float, *, rate: float, bandwidth: float
) -> float:
    """The bound above. `shapes`: count by (out, in); `itemsize`: bytes of a weight; `kv_read`: bytes."""
    maps = sum(
        count * max(2 * rows * out * inner / rate, itemsize * out * inner / bandwidth)
        for (out, inner), count in shapes.items()
    )
    return maps + kv_read / bandwidth


def decode_bound(model: nn.Module, machine: Machine, rows: int, lengths: Sequence[float]) -> float:
    """Seconds that a decode step of `rows` rows over cached stretches of `lengths` tokens takes at least."""
    return step_seconds(
        linear_shapes(model),
        rows,
        _itemsize(model),
        kv_bytes(model, lengths),
        rate=machine.rates[rows],
        bandwidth=machine.bandwidth,
    )


# --- measuring ---


def measure_machine(
    model: nn.Module, rows: Sequence[int], *, seconds: float = 0.1, buffer_bytes: int = BUFFER_BYTES
) -> Machine:
    """Bandwidth, and product rates at each of `rows`, in the model's dtype and on its device.

    Each single measurement goes on for `seconds`, and its fastest pass counts.
    """
    weight = next(model.parameters())
    shapes = list(linear_shapes(model))
    return Machine(
        threads=torch.get_num_threads(),
        device=weight.device.type,
        dtype=str(weight.dtype).removeprefix("torch."),
        bandwidth=measure_bandwidth(weight.device, seconds=5 * seconds, buffer_bytes=buffer_bytes),
        rates={n: measure_rate(shapes, n, weight.dtype, weight.device, seconds=seconds) for n in dict.fromkeys(rows)},
    )


def measure_bandwidth(device: torch.device, *, seconds: float = 0.5, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Bytes a second at which a buffer of `buffer_bytes` is summed."""
    buffer = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    return buffer.nbytes / _fastest(buffer.sum, device, seconds)


def measure_rate(
    shapes: Sequence[Shape], rows: int, dtype: torch.dtype, device: torch.device, *, seconds: float = 0.1
) -> float:
    """Operations a second of the fastest product (rows, in) x (in, out) over `shapes` of (out, in)."""
    return max(rate for shape in shapes for rate in _rates(shape, rows, dtype, device, seconds))


def _rates(shape: Shape, rows: int, dtype: torch.dtype, device: torch.device, seconds: float) -> list[float]:
    inner = shape[1]
    out = max(1, min(shape[0], IN_CACHE_BYTES // (inner * dtype.itemsize)))
    weight = torch.randn(out, inner, device=device).to(dtype)
    x = torch.randn(rows, inner, device=device).to(dtype)
    transposed = weight.T.contiguous()
    ways: list[Callable[[], Tensor]] = [lambda: F.linear(x, weight), lambda: x @ transposed]
    packed = _packed_product(x, weight)
    if packed is not None:
        ways.append(packed)
    with torch.no_grad():
        return [2 * rows * inner * out / _fastest(way, device, seconds) for way in ways]


def _packed_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor] | None:
    """The product with the weight in the order that oneDNN likes best for x; None where there is no such thing."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return None
    operators: Any = torch.ops.mkldnn
    try:
        order = operators._reorder_linear_weight(weight, x.shape[0])
        operators._linear_pointwise(x, order, None, "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError):
        return None  # a build or a processor without it: the plain products are then what there is
    return lambda: operators._linear_pointwise(x, order, None, "none", [], "")


def _fastest(action: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest call while `seconds` pass, after one to warm up, at least three."""
    action()
    best, calls, end = math.inf, 0, time.perf_counter() + seconds
    while calls < 3 or time.perf_counter() < end:
        _synchronise(device)
        start = time.perf_counter()
        action()
        _synchronise(device)
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
