"""The kernels in C, called on CPU tensors."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora.generation.kernels.build import Library, library
from tinylora.generation.kernels.plan import Plan
from tinylora.generation.kv_cache import KVCache
from tinylora.models.architecture import Architecture

MAX_FEW_ROWS = 4
"""kernels.c keeps the sums of so many rows in registers."""

_P, _I, _F, _B = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "paired": (),
    "set_threads": (_B,),
    "add_norm": (_P, _P, _P, _P, _P, _I, _I, _F, _B),
    "store_qkv": (_P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _F, _B),
    "attend": (*(_P,) * 5, _I, _P, _I, _P, _P, _P, _I, _P, _P, _I, _I, _I, _I, _I, _I, _F),
    "act_mul": (_P, _P, _I, _I, _B),
    "few_rows": (_P, _P, _P, _P, _P, _I, _I, _I, _I),
    "adapt": (_P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _P, _I),
}


@dataclass(frozen=True, eq=False, slots=True)
class AdapterFactors:
    """The adapter on maps that are computed as one product: see `adapt` in kernels.c for the shapes."""

    A: Tensor
    B: Tensor
    bounds: Tensor
    rank: int
    first: int
    """Place of the first map among all modules, which is where its matrices stand in R."""

    @property
    def num_maps(self) -> int:
        """Linear maps side by side."""
        return len(self.bounds) - 1


class FewRows:
    """The weights of maps with the same input, where the model holds them: what `NativeKernels.few_rows` reads."""

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> None:
        """Weights (out, in) and biases (out,), contiguous, all of one dtype."""
        assert all(w.is_contiguous() for w in weights)
        self.held = (*weights, *biases)  # the addresses below stay good
        self.weights = (ctypes.c_void_p * len(weights))(*[w.data_ptr() for w in weights])
        self.biases = (ctypes.c_void_p * len(weights))(*[None if b is None else b.data_ptr() for b in biases])
        self.starts = torch.tensor([0, *[w.shape[0] for w in weights]]).cumsum(0)[:-1].contiguous()
        self.out_features, self.in_features = sum(w.shape[0] for w in weights), weights[0].shape[1]


class NativeKernels:
    """See kernels.c for what each does; all tensors are contiguous, of the model's dtype unless said otherwise."""

    name = "native"

    def __init__(self, architecture: Architecture) -> None:
        """Raises: NoKernels if they cannot be compiled here."""
        loaded: Library = library(architecture.dtype)
        self.path = loaded.path
        self._c = loaded.functions
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = (_B if name == "paired" else None), arguments
        self.eps, self.adds_one = architecture.norm_eps, int(architecture.norm_adds_one)
        self.heads, self.kv_heads, self.dim = architecture.num_heads, architecture.num_kv_heads, architecture.head_dim
        self.scale = architecture.scale
        self._architecture = architecture
        self._paired = bool(self._c.paired())

    def new_cache(self, num_blocks: int) -> KVCache:
        """Memory for keys and values, in the layout of these kernels."""
        return KVCache(self._architecture, num_blocks, paired=self._paired)

    def prepare(self) -> None:
        """Use as many threads as torch does."""
        self._c.set_threads(torch.get_num_threads())

    def add_norm(self, x: Tensor, y: Tensor | None, post_weight: Tensor | None, weight: Tensor, out: Tensor) -> None:
        """x += y, y normalised first where post_weight is given; out = norm(x)."""
        self._c.add_norm(
            x.data_ptr(), None if y is None else y.data_ptr(), None if post_weight is None else post_weight.data_ptr(),
            weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], self.eps, self.adds_one,
        )  # fmt: skip

    def store_qkv(
        self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, cache: KVCache,
        layer: int, slots: Tensor,
    ) -> None:  # fmt: skip
        """Norm and rotation of q and k in place; k and v into the cache."""
        assert cache.paired == self._paired
        self._c.store_qkv(
            qkv.data_ptr(), None if q_weight is None else q_weight.data_ptr(),
            None if k_weight is None else k_weight.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            cache.layers[layer].data_ptr(), slots.data_ptr(), qkv.shape[0], self.heads, self.kv_heads, self.dim,
            cache.value_dim, cache.block_numel, self.eps, self.adds_one,
        )  # fmt: skip

    def attend(self, qkv: Tensor, out: Tensor, cache: KVCache, layer: int, plan: Plan, window: int) -> None:
        """out (n, heads * head_dim) = attention of the batch's queries over the cache."""
        shared_low, own_low = plan.low(window)
        self._c.attend(
            qkv.data_ptr(), out.data_ptr(), cache.layers[layer].data_ptr(), plan.item_first.data_ptr(),
            plan.item_count.data_ptr(), plan.num_items, plan.shared_table.data_ptr(), plan.shared_table.shape[1],
            shared_low.data_ptr(), plan.shared_high.data_ptr(), plan.own_table.data_ptr(), plan.own_table.shape[1],
            own_low.data_ptr(), plan.own_high.data_ptr(), self.heads, self.kv_heads, self.dim, cache.value_dim,
            cache.block_numel, qkv.shape[1], self.scale,
        )  # fmt: skip

    def act_mul(self, gate_up: Tensor, out: Tensor, kind: int) -> None:
        """out = act(gate) * up; kind 0 is SiLU, 1 is GELU in its tanh form."""
        self._c.act_mul(gate_up.data_ptr(), out.data_ptr(), out.shape[0], out.shape[1], kind)

    def few_rows(self, x: Tensor, maps: FewRows) -> Tensor:
        """x (n, in) -> (n, out) for n up to MAX_FEW_ROWS, from weights that are not packed."""
        y = x.new_empty(x.shape[0], maps.out_features)
        self._c.few_rows(
            x.data_ptr(), y.data_ptr(), maps.weights, maps.biases, maps.starts.data_ptr(), len(maps.weights),
            x.shape[0], maps.in_features, maps.out_features,
        )  # fmt: skip
        return y

    def adapt(self, x: Tensor, y: Tensor, factors: AdapterFactors, R: Tensor, owner: Tensor) -> None:
        """y += ((x A^T) R^T) B^T; R (vectors, modules, rank, rank) float32; owner (n,) int64: each token's vector."""
        self._c.adapt(
            x.data_ptr(), y.data_ptr(), factors.A.data_ptr(), R.data_ptr() + 4 * factors.first * R.stride(1),
            factors.B.data_ptr(), factors.bounds.data_ptr(), x.shape[0], x.shape[1], y.shape[1], factors.num_maps,
            factors.rank, owner.data_ptr(), R.stride(0) if R.shape[0] > 1 else 0,
        )  # fmt: skip
