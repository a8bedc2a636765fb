"""One forward pass over a flat batch of tokens: decode steps and prompts side by side, nothing padded.

The weights are the model's own, in the layout that the matrix products want: q, k, v and gate, up side by side, and
on CPUs packed once (a second copy of the weights), for our own product or for oneDNN's, whichever is faster there. The
adapter is never merged: a new vector costs only its matrices R.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinylora.adapter.layer import AdaptedLinear
from tinylora.adapter.trained import Trained
from tinylora.errors import UserError
from tinylora.generation.native.kernels.native import (
    MAX_FEW_ROWS,
    AdapterFactors,
    Branch,
    FewRows,
    NativeKernels,
    PackedProduct,
)
from tinylora.generation.native.kernels.plan import Plan
from tinylora.generation.native.kv_cache import KVCache
from tinylora.generation.sampler import BlockSums
from tinylora.models.architecture import Architecture, DecoderLayer, Unsupported

PACK_ROWS = 64
"""Rows that the packed layout is chosen for; it serves any number."""


class Kernels(Protocol):
    """What NativeKernels and TorchKernels both are."""

    name: str

    def new_cache(self, num_blocks: int) -> KVCache:
        """Memory for keys and values, in the layout of these kernels."""

    def prepare(self) -> None:
        """Before a series of calls."""

    def add_norm(
        self, x: Tensor, y: Tensor | None, post_weight: Tensor | None, weight: Tensor, out: Tensor,
        branch: Branch | None = None,
    ) -> None:  # fmt: skip
        """See NativeKernels."""

    def store_qkv(
        self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, cache: KVCache,
        layer: int, slots: Tensor, branch: Branch | None = None,
    ) -> None:  # fmt: skip
        """See NativeKernels."""

    def attend(self, qkv: Tensor, out: Tensor, cache: KVCache, layer: int, plan: Plan, window: int) -> None:
        """See NativeKernels."""

    def act_mul(self, gate_up: Tensor, out: Tensor, kind: int, branch: Branch | None = None) -> None:
        """See NativeKernels."""

    def block_sums(self, scores: Tensor, temperature: float) -> BlockSums:
        """See NativeKernels."""


@dataclass(frozen=True, slots=True)
class Around:
    """What a method computes before a map and behind it: functions of (n, in) and (n, out) in the model's dtype."""

    before: Callable[[Tensor], Tensor] | None = None
    after: Callable[[Tensor], Tensor] | None = None


class Product:
    """Linear maps with the same input as one product x W^T + b, with the adapter of each."""

    def __init__(
        self, modules: Sequence[nn.Module], first: int, *, prepack: bool, native: NativeKernels | None
    ) -> None:
        """`first` is the place of the first module among all that may carry an adapter."""
        bases = [cast(nn.Linear, m.base if isinstance(m, AdaptedLinear) else m) for m in modules]
        weights, biases = [b.weight.detach() for b in bases], [cast("Tensor | None", b.bias) for b in bases]
        self.out_features, self.in_features = sum(w.shape[0] for w in weights), weights[0].shape[1]
        bias = None
        if any(b is not None for b in biases):
            parts = zip(weights, biases, strict=True)
            bias = torch.cat([(w.new_zeros(w.shape[0]) if b is None else b).detach() for w, b in parts])
        self.compute = self._choose(weights, biases, bias, prepack, native)
        self._modules, self._bases, self._first = modules, bases, first
        self._before: Callable[[Tensor], Tensor] | None = None
        self._after: list[tuple[int, int, Callable[[Tensor], Tensor]]] = []
        self.read_factors()

    def read_factors(self) -> None:
        """Take the adapter's factors as its modules have them now."""
        self.factors = _factors(self._modules, self._bases, self._first)

    def _choose(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], bias: Tensor | None, prepack: bool,
        native: NativeKernels | None,
    ) -> Callable[[Tensor], Tensor]:  # fmt: skip
        if native is not None and native.has_product and prepack and self.in_features % 2 == 0:
            own = PackedProduct(weights, bias, native)
            return lambda x: native.product(x, own)
        weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
        ops = cast(Any, torch.ops.mkldnn)
        many: Callable[[Tensor], Tensor]
        if prepack:
            packed = ops._reorder_linear_weight(weight, PACK_ROWS)
            many = lambda x: cast(Tensor, ops._linear_pointwise(x, packed, bias, "none", [], ""))  # noqa: E731
        else:
            many = lambda x: F.linear(x, weight, bias)  # noqa: E731
        if native is None:
            return many
        few = FewRows(weights, [None if b is None else b.detach() for b in biases])
        return lambda x: native.few_rows(x, few) if x.shape[0] <= MAX_FEW_ROWS else many(x)

    def put_around(self, around: Mapping[nn.Module, Around]) -> None:
        """Compute these before and behind the maps that they name, and nothing before and behind the others.

        Raises: Unsupported for something before one of several maps, which have one input.
        """
        self._before, self._after, start = None, [], 0
        for base in self._bases:
            found = around.get(base, Around())
            if found.before is not None:
                if len(self._bases) > 1:
                    raise Unsupported("a method scales the input of a map that is computed together with others")
                self._before = found.before
            if found.after is not None:
                self._after.append((start, start + base.out_features, found.after))
            start += base.out_features

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, in) -> (n, out), without the adapter's factors."""
        y = self.compute(x if self._before is None else self._before(x))
        for start, stop, after in self._after:
            y[:, start:stop] = after(y[:, start:stop])
        return y

    def branch(self, x: Tensor, R: Tensor | None, owner: Tensor) -> Branch | None:
        """What the adapter adds to the product with x, if there is something."""
        return None if R is None or self.factors is None else Branch(self.factors, x, R, owner)


def _factors(modules: Sequence[nn.Module], bases: Sequence[nn.Linear], first: int) -> AdapterFactors | None:
    adapted = [m for m in modules if isinstance(m, AdaptedLinear)]
    if not adapted:
        return None
    rank, like = adapted[0].A.shape[0], adapted[0].A
    A, B = [], []
    for module, base in zip(modules, bases, strict=True):
        if isinstance(module, AdaptedLinear):
            A.append(module.A)
            B.append(module.B.T)
        else:  # a map without an adapter among others that have one: factors of 0 leave it as it is
            A.append(like.new_zeros(rank, base.in_features))
            B.append(like.new_zeros(rank, base.out_features))
    bounds = torch.tensor([0, *[b.out_features for b in bases]]).cumsum(0)
    return AdapterFactors(torch.cat(A).contiguous(), torch.cat(B, dim=1).contiguous(), bounds, rank, first)


def can_prepack(architecture: Architecture) -> bool:
    """Whether oneDNN's packed products are there for this device and dtype."""
    return (
        architecture.device.type == "cpu"
        and architecture.dtype in (torch.bfloat16, torch.float32)
        and torch.backends.mkldnn.is_available()
        and (architecture.dtype == torch.float32 or bool(cast(Any, torch.ops.mkldnn)._is_mkldnn_bf16_supported()))
    )


@dataclass(eq=False, slots=True)
class _Layer:
    qkv: Product
    o: Product
    gate_up: Product
    down: Product
    q_norm: Tensor | None
    k_norm: Tensor | None
    attention_out_norm: Tensor | None
    mlp_norm: Tensor
    mlp_out_norm: Tensor | None
    next_norm: Tensor
    """What follows: the next layer's first norm, or the last one."""
    window: int
    rope: str


def _weight(norm: nn.Module) -> Tensor:
    return cast(Tensor, norm.weight).detach()


def _weight_or_none(norm: nn.Module | None) -> Tensor | None:
    return None if norm is None else _weight(norm)


def _activation_kind(layer: DecoderLayer) -> int:
    x = torch.linspace(-8, 8, 257)
    for kind, known in enumerate((F.silu(x), F.gelu(x, approximate="tanh"))):
        if torch.allclose(layer.activation(x), known, rtol=0, atol=1e-6):
            return kind
    raise Unsupported(f"its activation is {type(layer.activation).__name__}; known: SiLU, GELU (tanh)")


class Runner:
    """A model's forward pass over flat batches."""

    def __init__(
        self,
        architecture: Architecture,
        kernels: Kernels,
        adapter: Trained | None,
        context_length: int,
        *,
        prepack: bool,
    ) -> None:
        """Raises: Unsupported for an activation that the kernels do not have."""
        self.prepack = prepack
        self.architecture = architecture
        self.kernels = kernels
        self.adapter = adapter
        self.activation = _activation_kind(architecture.layers[0])
        native = kernels if isinstance(kernels, NativeKernels) else None
        self.layers: list[_Layer] = []
        slots: list[AdaptedLinear | None] = []
        followers = [*[layer.input_norm for layer in architecture.layers[1:]], architecture.norm]
        for layer, follower in zip(architecture.layers, followers, strict=True):
            qkv, o, gate_up, down = (
                self._make_product(modules, slots, native)
                for modules in ((layer.q, layer.k, layer.v), (layer.o,), (layer.gate, layer.up), (layer.down,))
            )
            self.layers.append(
                _Layer(
                    qkv=qkv,
                    o=o,
                    gate_up=gate_up,
                    down=down,
                    q_norm=_weight_or_none(layer.q_norm),
                    k_norm=_weight_or_none(layer.k_norm),
                    attention_out_norm=_weight_or_none(layer.attention_out_norm),
                    mlp_norm=_weight(layer.mlp_norm),
                    mlp_out_norm=_weight_or_none(layer.mlp_out_norm),
                    next_norm=_weight(follower),
                    window=layer.window,
                    rope=layer.rope,
                )
            )
        self._first_norm = _weight(architecture.layers[0].input_norm)
        self.head = Product((architecture.head,), 0, prepack=prepack, native=native)
        positions = torch.arange(context_length, device=architecture.device)
        self._ropes = {
            name: (cos.float(), sin.float()) for name, (cos, sin) in architecture.rope_tables(positions).items()
        }
        self._set_up_matrices(slots)

    def _make_product(
        self, modules: Sequence[nn.Module], slots: list[AdaptedLinear | None], native: NativeKernels | None
    ) -> Product:
        product = Product(modules, len(slots), prepack=self.prepack, native=native)
        slots.extend(m if isinstance(m, AdaptedLinear) else None for m in modules)
        return product

    def _set_up_matrices(self, slots: Sequence[AdaptedLinear | None]) -> None:
        adapted = [s for s in slots if s is not None]
        if not adapted:
            return
        wide = torch.float64 if self.architecture.dtype == torch.float64 else torch.float32
        for factor in (adapted[0].A, adapted[0].B, adapted[0].P):
            if factor.dtype != wide:  # the kernels in C would read other bits
                found, expected = (str(dtype).removeprefix("torch.") for dtype in (factor.dtype, wide))
                raise UserError(
                    f"the adapter's factors are {found}, not {expected}: the model was converted after the adapter was "
                    "put on it; detach it, and attach it again"
                )
        u, rank, _ = adapted[0].P.shape
        self._P = adapted[0].P.new_zeros(len(slots), u, rank * rank)
        for i, slot in enumerate(slots):
            if slot is not None:
                self._P[i] = slot.P.reshape(u, -1)
        device = self._P.device
        self._group = torch.tensor([0 if s is None else s.tie_group for s in slots], device=device)
        self._rank = rank

    def read_factors(self) -> None:
        """Take the factors of all adapted modules as they are now; the weights stay as they were packed."""
        for layer in self.layers:
            for product in (layer.qkv, layer.o, layer.gate_up, layer.down):
                product.read_factors()

    def put_around(self, around: Mapping[nn.Module, Around]) -> None:
        """See `Product.put_around`, for all maps but the output head."""
        for layer in self.layers:
            for product in (layer.qkv, layer.o, layer.gate_up, layer.down):
                product.put_around(around)

    def matrices(self, vectors: Sequence[Tensor | None]) -> Tensor | None:
        """R of every module under each vector, (vectors, modules, rank, rank) float32; None if all vectors are 0."""
        if self.adapter is None or not any(v is not None and bool(v.any()) for v in vectors):
            return None
        zeros = self.adapter.zeros()
        v = torch.stack([zeros if one is None else one.to(zeros) for one in vectors])
        R = torch.einsum("nmu,muk->nmk", v[:, self._group], self._P)
        return R.reshape(len(vectors), len(self._group), self._rank, self._rank).contiguous()

    def forward(
        self, token_ids: Tensor, plan: Plan, cache: KVCache, R: Tensor | None, owner: Tensor, keep: Tensor
    ) -> Tensor:
        """Logits of the tokens `keep`, (len(keep), vocabulary), in the model's dtype.

        token_ids and owner (each token's vector) are (n,) int64; the keys and values of all n tokens go into the cache.
        """
        kernels = self.kernels
        x = self.architecture.embed(token_ids)
        h = torch.empty_like(x)
        kernels.add_norm(x, None, None, self._first_norm, h)
        ropes = {name: (cos[plan.positions], sin[plan.positions]) for name, (cos, sin) in self._ropes.items()}
        n = x.shape[0]
        attended = x.new_empty(n, self.architecture.num_heads * self.architecture.head_dim)
        inner = x.new_empty(n, self.layers[0].down.in_features)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(h)
            cos, sin = ropes[layer.rope]
            kernels.store_qkv(
                qkv, layer.q_norm, layer.k_norm, cos, sin, cache, i, plan.slots, layer.qkv.branch(h, R, owner)
            )
            kernels.attend(qkv, attended, cache, i, plan, layer.window)
            branch = layer.o.branch(attended, R, owner)
            kernels.add_norm(x, layer.o(attended), layer.attention_out_norm, layer.mlp_norm, h, branch)
            kernels.act_mul(layer.gate_up(h), inner, self.activation, layer.gate_up.branch(h, R, owner))
            branch = layer.down.branch(inner, R, owner)
            kernels.add_norm(x, layer.down(inner), layer.mlp_out_norm, layer.next_norm, h, branch)
        return self.head(h if len(keep) == n else h[keep])
