"""The kernels in C, called on CPU tensors."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora.generation.native.kernels.build import Library, library
from tinylora.generation.native.kernels.plan import Plan
from tinylora.generation.native.kv_cache import LANES, KVCache
from tinylora.generation.sampler import BLOCK, BlockSums, block_sums
from tinylora.models.architecture import Architecture
from tinylora.system.device import cpu_flags

MAX_FEW_ROWS = 4
"""kernels.c keeps the sums of so many rows in registers."""

_P, _I, _F, _B = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES = {
    "paired": (),
    "set_threads": (_B,),
    "add_norm": (_P, _P, _P, _P, _P, _I, _I, _F, _B, _P),
    "store_qkv": (_P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _F, _B, _P),
    "attend": (*(_P,) * 5, _I, _P, _I, _P, _P, _P, _I, _P, _P, _I, _I, _I, _I, _I, _I, _F),
    "block_sums": (_P, _P, _P, _P, _I, _I, _F),
    "act_mul": (_P, _P, _I, _I, _B, _P),
    "pack_weight": (_P, _P, _I, _I, _I, _I),
    "product": (_P, _P, _P, _P, _I, _I, _I),
    "few_rows": (_P, _P, _P, _P, _P, _I, _I, _I, _I),
}


@dataclass(frozen=True, eq=False, slots=True)
class AdapterFactors:
    """The adapter on maps that are computed as one product: see `branch` in kernels.c for the shapes."""

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


@dataclass(frozen=True, eq=False, slots=True)
class Branch:
    """What the adapter adds to a product's output y: ((x A^T) R^T) B^T. The kernel that reads y next adds it first.

    x (n, in), the product's input; R (vectors, modules, rank, rank) float32; owner (n,) int64: each token's vector.
    """

    factors: AdapterFactors
    x: Tensor
    R: Tensor
    owner: Tensor


class _CBranch(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("x", "A", "R", "B", "bounds", "owner")),
        *((name, _I) for name in ("in_", "out", "maps", "rank", "row_stride")),
    )


def _c_branch(branch: Branch | None) -> _CBranch | None:
    if branch is None:
        return None
    f, R = branch.factors, branch.R
    return _CBranch(
        branch.x.data_ptr(), f.A.data_ptr(), R.data_ptr() + 4 * f.first * R.stride(1), f.B.data_ptr(),
        f.bounds.data_ptr(), branch.owner.data_ptr(), f.A.shape[1], f.B.shape[1], f.num_maps, f.rank,
        R.stride(0) if R.shape[0] > 1 else 0,
    )  # fmt: skip


def _address(branch: _CBranch | None) -> int | None:
    return None if branch is None else ctypes.addressof(branch)


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


class PackedProduct:
    """Maps with the same input side by side, in the layout of `product` in kernels.c: a second copy of the weights."""

    def __init__(self, weights: Sequence[Tensor], bias: Tensor | None, kernels: "NativeKernels") -> None:
        """Weights (out, in), contiguous; bias (out,), of all of them. See `NativeKernels.has_product`."""
        self.out_features, self.in_features = sum(w.shape[0] for w in weights), weights[0].shape[1]
        width = -(-self.out_features // LANES) * LANES
        self.packed = weights[0].new_zeros(width * self.in_features)
        done = 0
        for weight in weights:
            kernels.pack(weight, self.packed, done, self.out_features)
            done += weight.shape[0]
        self.bias = None if bias is None else torch.nn.functional.pad(bias, (0, width - self.out_features))


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
        self.paired = bool(self._c.paired())
        """Whether the processor has a bfloat16 dot product, and the cache its layout."""
        self.has_product = self.paired and "amx_bf16" not in cpu_flags()
        """Whether `product` is to be used: with AMX, oneDNN is several times faster."""

    def new_cache(self, num_blocks: int) -> KVCache:
        """Memory for keys and values, in the layout of these kernels."""
        return KVCache(self._architecture, num_blocks, paired=self.paired)

    def prepare(self) -> None:
        """Use as many threads as torch does."""
        self._c.set_threads(torch.get_num_threads())

    def add_norm(
        self, x: Tensor, y: Tensor | None, post_weight: Tensor | None, weight: Tensor, out: Tensor,
        branch: Branch | None = None,
    ) -> None:  # fmt: skip
        """x += y, y normalised first where post_weight is given; out = norm(x). The branch is y's."""
        adapt = _c_branch(branch)
        self._c.add_norm(
            x.data_ptr(), None if y is None else y.data_ptr(), None if post_weight is None else post_weight.data_ptr(),
            weight.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], self.eps, self.adds_one, _address(adapt),
        )  # fmt: skip

    def store_qkv(
        self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, cache: KVCache,
        layer: int, slots: Tensor, branch: Branch | None = None,
    ) -> None:  # fmt: skip
        """Norm and rotation of q and k in place; k and v into the cache. The branch is that of qkv."""
        assert cache.paired == self.paired
        adapt = _c_branch(branch)
        self._c.store_qkv(
            qkv.data_ptr(), None if q_weight is None else q_weight.data_ptr(),
            None if k_weight is None else k_weight.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            cache.layers[layer].data_ptr(), slots.data_ptr(), qkv.shape[0], self.heads, self.kv_heads, self.dim,
            cache.value_dim, cache.block_numel, self.eps, self.adds_one, _address(adapt),
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

    def act_mul(self, gate_up: Tensor, out: Tensor, kind: int, branch: Branch | None = None) -> None:
        """out = act(gate) * up; kind 0 is SiLU, 1 is GELU in its tanh form. The branch is that of gate_up."""
        adapt = _c_branch(branch)
        self._c.act_mul(gate_up.data_ptr(), out.data_ptr(), out.shape[0], out.shape[1], kind, _address(adapt))

    def pack(self, weight: Tensor, packed: Tensor, first: int, out_features: int) -> None:
        """Put a weight (out, in) into a packed one of so many outputs, from output `first` on."""
        assert weight.is_contiguous() and weight.shape[1] % 2 == 0
        self._c.pack_weight(weight.data_ptr(), packed.data_ptr(), first, weight.shape[0], weight.shape[1], out_features)

    def product(self, x: Tensor, maps: PackedProduct) -> Tensor:
        """x (n, in) -> (n, out). Each row is the same whatever the others are."""
        y = x.new_empty(x.shape[0], maps.out_features)
        self._c.product(
            x.data_ptr(), y.data_ptr(), maps.packed.data_ptr(), None if maps.bias is None else maps.bias.data_ptr(),
            x.shape[0], maps.in_features, maps.out_features,
        )  # fmt: skip
        return y

    def few_rows(self, x: Tensor, maps: FewRows) -> Tensor:
        """x (n, in) -> (n, out) for n up to MAX_FEW_ROWS, from weights that are not packed."""
        y = x.new_empty(x.shape[0], maps.out_features)
        self._c.few_rows(
            x.data_ptr(), y.data_ptr(), maps.weights, maps.biases, maps.starts.data_ptr(), len(maps.weights),
            x.shape[0], maps.in_features, maps.out_features,
        )  # fmt: skip
        return y

    def block_sums(self, scores: Tensor, temperature: float) -> BlockSums:
        """See `sampler.block_sums`, which takes over for other dtypes."""
        if scores.dtype != self._architecture.dtype or not scores.is_contiguous():
            return block_sums(scores, temperature)
        rows, vocabulary = scores.shape
        blocks = -(-vocabulary // BLOCK)
        found = BlockSums(
            torch.empty((rows, blocks), dtype=torch.float32, device="cpu"),
            torch.empty((rows, 1), dtype=torch.float32, device="cpu"),
            torch.empty((rows, blocks), dtype=torch.float64, device="cpu"),
        )
        self._c.block_sums(
            scores.data_ptr(), found.tops.data_ptr(), found.top.data_ptr(), found.sums.data_ptr(), rows, vocabulary,
            temperature,
        )  # fmt: skip
        return found
