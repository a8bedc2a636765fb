"""The kernels in torch: any device, any floating dtype; what kernels.c is tested against."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from tinylora.generation.native.kernels.native import Branch
from tinylora.generation.native.kernels.plan import Plan
from tinylora.generation.native.kv_cache import BLOCK, KVCache
from tinylora.generation.sampler import BlockSums, block_sums
from tinylora.models.architecture import Architecture

GATHER_NUMEL = 2**25
"""Keys and values are copied out of their blocks for so many numbers at a time: a bound on memory."""


class TorchKernels:
    """The same calls as NativeKernels; see there."""

    name = "torch"

    def __init__(self, architecture: Architecture, *, sdpa: bool | None = None) -> None:
        """sdpa: attention by torch's scaled_dot_product_attention, in the model's dtype; by default on CUDA alone."""
        self.sdpa = architecture.device.type == "cuda" if sdpa is None else sdpa
        self.heads, self.kv_heads, self.dim = architecture.num_heads, architecture.num_kv_heads, architecture.head_dim
        self.eps, self.adds_one, self.scale = architecture.norm_eps, architecture.norm_adds_one, architecture.scale
        self.wide = torch.float64 if architecture.dtype == torch.float64 else torch.float32

        self._architecture = architecture

    def new_cache(self, num_blocks: int) -> KVCache:
        """Memory for keys and values, in the layout of these kernels."""
        return KVCache(self._architecture, num_blocks)

    def prepare(self) -> None:
        """Nothing to do: torch has its own threads."""

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.to(self.wide)
        normalised = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.adds_one:
            return (normalised * (1.0 + weight.to(self.wide))).to(x.dtype)
        return weight * normalised.to(x.dtype)

    def add_norm(
        self, x: Tensor, y: Tensor | None, post_weight: Tensor | None, weight: Tensor, out: Tensor,
        branch: Branch | None = None,
    ) -> None:  # fmt: skip
        """x += y, y normalised first where post_weight is given; out = norm(x). The branch is y's."""
        if y is not None:
            self._adapt(y, branch)
            x += y if post_weight is None else self._norm(y, post_weight)
        out.copy_(self._norm(x, weight))

    def store_qkv(
        self, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, cache: KVCache,
        layer: int, slots: Tensor, branch: Branch | None = None,
    ) -> None:  # fmt: skip
        """Norm and rotation of q and k in place; k and v into the cache. The branch is that of qkv."""
        assert not cache.paired
        self._adapt(qkv, branch)
        heads = qkv.view(qkv.shape[0], self.heads + 2 * self.kv_heads, self.dim)
        q, k, v = heads.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        cos, sin = cos.to(qkv.dtype).unsqueeze(1), sin.to(qkv.dtype).unsqueeze(1)
        for part, weight in ((q, q_weight), (k, k_weight)):
            normed = part if weight is None else self._norm(part, weight)
            first, second = normed.chunk(2, dim=-1)
            part.copy_(normed * cos + torch.cat([-second, first], dim=-1) * sin)
        cache.keys(layer)[slots // BLOCK, :, :, slots % BLOCK] = k
        cache.values(layer)[slots // BLOCK, :, slots % BLOCK] = v

    def attend(self, qkv: Tensor, out: Tensor, cache: KVCache, layer: int, plan: Plan, window: int) -> None:
        """out (n, heads * head_dim) = attention of the batch's queries over the cache."""
        n = qkv.shape[0]
        q = qkv[:, : self.heads * self.dim].to(self.wide) * self.scale
        q = q.view(n, self.kv_heads, self.heads // self.kv_heads, self.dim)
        result = out.view(n, self.kv_heads, self.heads // self.kv_heads, self.dim)
        shared_low, own_low = plan.low(window)
        shared_of = plan.shared_table.long()
        if plan.num_items != n:
            shared_of = torch.repeat_interleave(shared_of, plan.item_count, dim=0, output_size=n)
        table = torch.cat([shared_of, plan.own_table.long()], dim=1)
        width = shared_of.shape[1] * BLOCK
        per_token = max(1, table.shape[1] * BLOCK * self.kv_heads * self.dim)
        step = max(1, GATHER_NUMEL // per_token)
        for start in range(0, n, step):
            part = slice(start, start + step)
            keys = cache.keys(layer)[table[part]].movedim(1, 3).flatten(3)  # (tokens, kv_heads, dim, keys)
            values = cache.values(layer)[table[part]].transpose(1, 2).flatten(2, 3)  # (tokens, kv_heads, keys, dim)
            place = torch.arange(table.shape[1] * BLOCK, device=qkv.device)
            seen = torch.where(
                place < width,
                (place >= shared_low[part, None]) & (place < plan.shared_high[part, None]),
                (place - width >= own_low[part, None]) & (place - width < plan.own_high[part, None]),
            )
            if self.sdpa:
                # The heads of one key-value head are so many queries of it. What is not seen may be anything, the NaN
                # of another request included, and both 0 times NaN and NaN plus -inf are NaN.
                keys = keys.masked_fill(~seen[:, None, None, :], 0.0)
                values = values.masked_fill(~seen[:, None, :, None], 0.0)
                queries = qkv[part, : self.heads * self.dim].view(-1, self.kv_heads, *q.shape[2:])
                result[part] = F.scaled_dot_product_attention(
                    queries, keys.transpose(2, 3), values, attn_mask=seen[:, None, None], scale=self.scale
                )
                continue
            scores = torch.matmul(q[part], keys.to(self.wide)).masked_fill(~seen[:, None, None], -torch.inf)
            # torch's own SDPA rounds the weights of the values, not their sum, to the model's dtype.
            weights = torch.exp(scores - scores.amax(-1, keepdim=True))
            total = weights.sum(-1, keepdim=True)
            weights = weights.to(out.dtype).to(self.wide)
            # What is not seen may be anything, NaN included, and 0 times NaN is NaN.
            values = values.to(self.wide).masked_fill(~seen[:, None, :, None], 0.0)
            result[part] = (torch.matmul(weights, values) / total).to(out.dtype)

    def act_mul(self, gate_up: Tensor, out: Tensor, kind: int, branch: Branch | None = None) -> None:
        """out = act(gate) * up; kind 0 is SiLU, 1 is GELU in its tanh form. The branch is that of gate_up."""
        self._adapt(gate_up, branch)
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.gelu(gate, approximate="tanh") if kind else F.silu(gate)
        torch.mul(activated, up, out=out)

    def block_sums(self, scores: Tensor, temperature: float) -> BlockSums:
        """See `sampler.block_sums`."""
        return block_sums(scores, temperature)

    def _adapt(self, y: Tensor, branch: Branch | None) -> None:
        """y += ((x A^T) R^T) B^T, for each of the maps side by side in y."""
        if branch is None:
            return
        factors, R = branch.factors, branch.R
        maps, rank = factors.num_maps, factors.rank
        h = F.linear(branch.x.to(factors.A.dtype), factors.A).view(-1, maps, rank)
        matrices = R[:, factors.first : factors.first + maps]
        chosen = matrices[0].unsqueeze(0) if len(R) == 1 else matrices[branch.owner]
        h = torch.matmul(chosen, h.unsqueeze(-1)).squeeze(-1)
        bounds = factors.bounds.tolist()
        for i, (begin, end) in enumerate(pairwise(bounds)):
            y[:, begin:end] += (h[:, i] @ factors.B[:, begin:end]).to(torch.promote_types(y.dtype, self.wide))
