"""The engine's kernels, in C and in torch, against float64 NumPy that shares no code with them; and how C is built."""

import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from compile_in_turn import compile_in_turn
from engine_conformance import CONTEXT, requests_of, sampled, tiny
from torch import Tensor

from tinylora.generation.native.engine import NativeEngine
from tinylora.generation.native.kernels import build
from tinylora.generation.native.kernels.build import NoKernels, compiler, library
from tinylora.generation.native.kernels.native import AdapterFactors, Branch, FewRows, NativeKernels, PackedProduct
from tinylora.generation.native.kernels.plan import Run, make_plan
from tinylora.generation.native.kernels.reference import TorchKernels
from tinylora.generation.native.kv_cache import BLOCK, KVCache, blocks_for
from tinylora.generation.sampler import block_sums
from tinylora.system.device import ISA_VARIABLE

COUNTS = (1, 3, 5, 17)
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
"""Of numbers up to about 1. In bfloat16 one rounding is 2^-9 of a number, and a kernel rounds up to three times."""

every_kind = pytest.mark.parametrize("kind", ["native", "torch"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C compiler here")


def architecture(
    dtype: torch.dtype, heads: int = 4, kv_heads: int = 2, dim: int = 8, adds_one: bool = False, scale: float = 0.25
) -> Any:
    """What kernels and cache read of an Architecture."""
    return SimpleNamespace(
        dtype=dtype, device=torch.device("cpu"), num_heads=heads, num_kv_heads=kv_heads, head_dim=dim,
        norm_eps=1e-5, norm_adds_one=adds_one, scale=scale, layers=(None, None),
    )  # fmt: skip


def kernels(kind: str, described: Any) -> Any:
    if kind == "torch":
        return TorchKernels(described)
    if compiler() is None:
        pytest.skip("there is no C compiler here")
    made = NativeKernels(described)
    made.prepare()
    return made


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32, spread: float = 1.0) -> Tensor:
    """Normal numbers that the dtype can hold."""
    return torch.from_numpy(np.random.default_rng(seed).normal(scale=spread, size=shape)).to(dtype)


def exact(x: Tensor) -> np.ndarray:
    return x.double().numpy()


def close(found: Tensor, expected: np.ndarray, dtype: torch.dtype, times: float = 1.0) -> None:
    tolerance = times * TOLERANCE[dtype]
    np.testing.assert_allclose(exact(found), expected, rtol=tolerance, atol=tolerance)


def rms_norm(x: np.ndarray, weight: np.ndarray, adds_one: bool) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * (weight + adds_one)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


# Norms, activations, products


@every_kind
@every_dtype
@pytest.mark.parametrize("adds_one", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("dim", [8, 20, 64, 100])
def test_add_norm(kind: str, dtype: torch.dtype, adds_one: bool, dim: int) -> None:
    run = kernels(kind, architecture(dtype, adds_one=adds_one))
    weight, post = numbers(1, dim, dtype=dtype), numbers(2, dim, dtype=dtype)
    for n in COUNTS:
        for y, post_weight in (
            (None, None),
            (numbers(3, n, dim, dtype=dtype), None),
            (numbers(3, n, dim, dtype=dtype), post),
        ):
            x, out = numbers(4, n, dim, dtype=dtype), torch.full((n, dim), torch.nan, dtype=dtype)
            total = exact(x)
            if y is not None:
                total = total + (exact(y) if post_weight is None else rms_norm(exact(y), exact(post), adds_one))
            run.add_norm(x, y, post_weight, weight, out)
            close(x, total, dtype, 2)
            close(out, rms_norm(exact(x), exact(weight), adds_one), dtype)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@every_kind
@every_dtype
@pytest.mark.parametrize(("which", "formula"), [(0, silu), (1, gelu_tanh)], ids=["silu", "gelu"])
@pytest.mark.parametrize("dim", [5, 16, 40])
def test_act_mul(
    kind: str, dtype: torch.dtype, which: int, formula: Callable[[np.ndarray], np.ndarray], dim: int
) -> None:
    run = kernels(kind, architecture(dtype))
    for n in COUNTS:
        gate_up, out = numbers(5, n, 2 * dim, dtype=dtype, spread=3), torch.empty(n, dim, dtype=dtype)
        run.act_mul(gate_up, out, which)
        close(out, formula(exact(gate_up[:, :dim])) * exact(gate_up[:, dim:]), dtype, 2)


@every_kind
@every_dtype
@pytest.mark.parametrize(("which", "formula"), [(0, silu), (1, gelu_tanh)], ids=["silu", "gelu"])
@pytest.mark.parametrize("dim", [32, 35], ids=["whole vectors", "with a tail"])
def test_act_mul_at_the_ends_of_the_exponential(
    kind: str, dtype: torch.dtype, which: int, formula: Callable[[np.ndarray], np.ndarray], dim: int
) -> None:
    run = kernels(kind, architecture(dtype))
    ends = [0.0, -0.0, 86, 87, 87.5, 88, 88.5, 89, 103, 104, 1000, 1e10, 3e30, np.inf]
    gate = torch.tensor([*ends, *[-x for x in ends]] + [1.0] * (dim - 28)).to(dtype)
    out = torch.empty(1, dim, dtype=dtype)
    run.act_mul(torch.cat([gate, torch.ones(dim, dtype=dtype)])[None], out, which)
    finite = exact(gate).clip(-1e100, 1e100)
    with np.errstate(over="ignore"):
        expected = formula(finite).clip(-np.finfo(np.float64).max)
    expected[finite <= -80] = 0
    expected[np.isposinf(exact(gate))] = np.inf
    found = exact(out[0])
    at_minus_inf = np.isneginf(exact(gate))  # -inf * 0: NaN in torch too
    np.testing.assert_allclose(found[~at_minus_inf], expected[~at_minus_inf], rtol=TOLERANCE[dtype], atol=1e-30)
    gate[:] = torch.nan
    run.act_mul(torch.cat([gate, torch.ones(dim, dtype=dtype)])[None], out, which)
    assert out.isnan().all()


@needs_compiler
@every_dtype
@pytest.mark.parametrize("width", [8, 20, 64, 75, 132])
@pytest.mark.parametrize("outs", [(5,), (16,), (7, 3, 3), (33, 1, 18)], ids=str)
def test_few_rows(dtype: torch.dtype, width: int, outs: tuple[int, ...]) -> None:
    run = kernels("native", architecture(dtype))
    weights = [numbers(i, out, width, dtype=dtype, spread=width**-0.5) for i, out in enumerate(outs)]
    biases = [numbers(9 + i, out, dtype=dtype) if i != 1 else None for i, out in enumerate(outs)]
    for n in (1, 2, 3, 4):
        x = numbers(7, n, width, dtype=dtype)
        parts = [exact(x) @ exact(w).T + (0 if b is None else exact(b)) for w, b in zip(weights, biases, strict=True)]
        close(run.few_rows(x, FewRows(weights, biases)), np.concatenate(parts, 1), dtype, 2)


@pytest.mark.parametrize("width", [2, 18, 64])
@pytest.mark.parametrize("outs", [(1,), (16,), (5, 40), (64, 33), (48, 48)], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
def test_product(width: int, outs: tuple[int, ...], has_bias: bool, threads: int) -> None:
    run = kernels("native", architecture(torch.bfloat16))
    if not run.paired:
        pytest.skip("the processor has no bfloat16 dot product, and oneDNN does all products")
    weights = [numbers(i, out, width, dtype=torch.bfloat16, spread=width**-0.5) for i, out in enumerate(outs)]
    bias = numbers(9, sum(outs), dtype=torch.bfloat16) if has_bias else None
    packed = PackedProduct(weights, bias, run)
    for n in (1, 2, 7, 8, 9, 33, 70):
        x = numbers(20 + n, n, width, dtype=torch.bfloat16)
        expected = exact(x) @ exact(torch.cat(weights)).T + (0 if bias is None else exact(bias))
        found = run.product(x, packed)
        close(found, expected, torch.bfloat16)
        for i in range(n):  # each row alone gives the same bits
            assert torch.equal(run.product(x[i : i + 1].contiguous(), packed)[0], found[i])


def adapter_case(
    n: int, outs: tuple[int, ...], width: int, rank: int, vectors: int, dtype: torch.dtype
) -> tuple[Tensor, Branch]:
    """An output and what the adapter adds to it."""
    maps, first, modules = len(outs), 2, len(outs) + 3
    factors = AdapterFactors(
        numbers(1, maps * rank, width, spread=width**-0.5), numbers(2, rank, sum(outs)),
        torch.tensor([0, *outs]).cumsum(0), rank, first,
    )  # fmt: skip
    R = numbers(3, vectors, modules, rank, rank)
    owner = torch.from_numpy(np.random.default_rng(4).integers(0, vectors, n))
    return numbers(6, n, sum(outs), dtype=dtype), Branch(factors, numbers(5, n, width, dtype=dtype), R, owner)


def adapted(y: Tensor, branch: Branch) -> np.ndarray:
    """y with the branch added, by the formula of one map and token at a time."""
    expected, factors, rank = exact(y), branch.factors, branch.factors.rank
    for i, owner in enumerate(branch.owner):
        for m in range(factors.num_maps):
            A = exact(factors.A[m * rank : (m + 1) * rank])
            B = exact(factors.B)[:, factors.bounds[m] : factors.bounds[m + 1]]
            mixed = exact(branch.R[owner, factors.first + m]) @ (A @ exact(branch.x[i]))
            expected[i, factors.bounds[m] : factors.bounds[m + 1]] += mixed @ B
    return expected


def slice_of(branch: Branch, rows: slice) -> Branch:
    return Branch(branch.factors, branch.x[rows].contiguous(), branch.R, branch.owner[rows].contiguous())


@every_kind
@every_dtype
@pytest.mark.parametrize("outs", [(5,), (16, 3, 3), (33, 17)], ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3, 8])
@pytest.mark.parametrize("vectors", [1, 3])
def test_the_branch_is_added_before_the_norm(
    kind: str, dtype: torch.dtype, outs: tuple[int, ...], rank: int, vectors: int
) -> None:
    run = kernels(kind, architecture(dtype))
    for n in COUNTS:
        y, branch = adapter_case(n, outs, 21, rank, vectors, dtype)
        expected = adapted(y, branch)
        x, out, weight = torch.zeros_like(y), torch.empty_like(y), numbers(7, sum(outs), dtype=dtype)
        run.add_norm(x, y, None, weight, out, branch)
        tolerance = TOLERANCE[dtype]
        np.testing.assert_allclose(exact(y), expected, rtol=tolerance, atol=10 * TOLERANCE[torch.float32])
        assert torch.equal(x, y)
        close(out, rms_norm(exact(y), exact(weight), False), dtype)


@every_kind
@every_dtype
@pytest.mark.parametrize("vectors", [1, 3])
def test_the_branch_is_added_before_the_activation_and_the_rotation(
    kind: str, dtype: torch.dtype, vectors: int
) -> None:
    """Equal to the same call without a branch, on an output to which it was added before."""
    run = kernels(kind, architecture(dtype))
    for n in COUNTS:
        gate_up, branch = adapter_case(n, (20, 20), 21, 2, vectors, dtype)
        plain, found, expected = gate_up.clone(), *(torch.empty(n, 20, dtype=dtype) for _ in range(2))
        run.act_mul(gate_up, found, 0, branch)
        run.act_mul(torch.from_numpy(adapted(plain, branch)).to(dtype), expected, 0)
        close(found, exact(expected), dtype, 4)

        qkv, branch = adapter_case(n, (32, 16, 16), 21, 2, vectors, dtype)
        plain, slots = qkv.clone(), torch.arange(n)
        cos, sin = numbers(8, n, 8), numbers(9, n, 8)
        caches = [run.new_cache(1), run.new_cache(1)]
        run.store_qkv(qkv, None, None, cos, sin, caches[0], 0, slots, branch)
        before = torch.from_numpy(adapted(plain, branch)).to(dtype)
        run.store_qkv(before, None, None, cos, sin, caches[1], 0, slots)
        close(qkv, exact(before), dtype, 8)
        close(caches[0].values(0)[0, :, :n], exact(caches[1].values(0)[0, :, :n]), dtype, 2)


# Rotation, cache, attention


@every_kind
@every_dtype
@pytest.mark.parametrize("dim", [8, 20, 64, 96])
@pytest.mark.parametrize("normed", [False, True])
def test_store_qkv(kind: str, dtype: torch.dtype, dim: int, normed: bool) -> None:
    heads, kv_heads = 6, 2
    described = architecture(dtype, heads, kv_heads, dim, adds_one=normed)
    run = kernels(kind, described)
    q_weight, k_weight = (numbers(i, dim, dtype=dtype) if normed else None for i in (1, 2))
    for n in COUNTS:
        angles = np.random.default_rng(3).uniform(0, 6, (n, dim))  # the halves differ here, to tell them apart
        cos, sin = (torch.from_numpy(f(angles)).to(dtype).float() for f in (np.cos, np.sin))
        cache = run.new_cache(3)
        cache.memory.fill_(torch.nan)
        slots = torch.tensor([*range(59, 58 + n), 2 * BLOCK + 8])  # a stretch across blocks, and one on its own
        qkv = numbers(5, n, (heads + 2 * kv_heads) * dim, dtype=dtype)
        before = exact(qkv).reshape(n, heads + 2 * kv_heads, dim)
        q, k, v = np.split(before, [heads, heads + kv_heads], axis=1)
        if normed:
            q, k = rms_norm(q, exact(q_weight), True), rms_norm(k, exact(k_weight), True)  # type: ignore[arg-type]

        def turned(x: np.ndarray, cos: Tensor = cos, sin: Tensor = sin) -> np.ndarray:
            half = np.concatenate([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
            return x * exact(cos)[:, None] + half * exact(sin)[:, None]

        run.store_qkv(qkv, q_weight, k_weight, cos, sin, cache, 1, slots)
        after = qkv.view(n, heads + 2 * kv_heads, dim)
        close(after[:, :heads], turned(q), dtype, 4)
        blocks, at = slots // BLOCK, slots % BLOCK
        close(cache.keys(1)[blocks, :, :, at], turned(k), dtype, 4)
        np.testing.assert_array_equal(exact(cache.values(1)[blocks, :, at]), v)
        assert torch.equal(cache.keys(1)[blocks, :, :, at], after[:, heads : heads + kv_heads])
        assert cache.memory[0].isnan().all()  # the other layer, and every other place of this one, is as it was
        others = [i for i in range(3 * BLOCK) if i not in slots]
        elsewhere = (torch.tensor(others) // BLOCK, torch.tensor(others) % BLOCK)
        assert cache.keys(1)[elsewhere[0], :, :, elsewhere[1]].isnan().all()
        left = cache.values(1)[elsewhere[0], :, elsewhere[1]]
        zeroed = [i for i, slot in enumerate(others) if cache.paired and slot % 2 and slot - 1 in slots]
        assert (left[zeroed] == 0).all()
        left[zeroed] = torch.nan
        assert left.isnan().all()


def put(cache: KVCache, block: int, at: int, key: Tensor, value: Tensor) -> None:
    """Write one token's key and value, (kv_heads, dim) each, into layer 1; a token before the one that comes next."""
    heads, dim = key.shape
    keys, values = cache.memory[1, block].split([heads * dim * BLOCK, heads * cache.value_dim * BLOCK])
    if cache.paired:
        keys.view(heads, dim // 2, BLOCK, 2)[:, :, at] = key.view(heads, dim // 2, 2)
        pairs = values.view(heads, BLOCK // 2, cache.value_dim, 2)[:, at // 2, :dim]
        pairs[..., at % 2] = value
        if at % 2 == 0:  # a pair is read whole, so that store_qkv puts a number where the next token will come
            pairs[..., 1] = 0
    else:
        keys.view(heads, dim, BLOCK)[:, :, at] = key
        values.view(heads, BLOCK, cache.value_dim)[:, at, :dim] = value


class AttentionCase:
    """Runs of tokens over a cache whose every number that nobody may see is NaN, and what they should find there."""

    def __init__(
        self, runs: list[tuple[list[int], int, bool]], described: Any, kernels: Any, *, seed: int = 0, spread: float = 1
    ) -> None:
        """A run is its tokens' positions, the number of shared keys, and whether each token has own blocks."""
        self.described, self.kernels = described, kernels
        dtype, kv_heads, dim = described.dtype, described.num_kv_heads, described.head_dim
        rng = np.random.default_rng(seed)
        needed = [
            (blocks_for(shared), [blocks_for(p + 1 - shared) if own else 0 for p in positions])
            for positions, shared, own in runs
        ]
        total = sum(shared + sum(own) for shared, own in needed) + 2
        free = list(rng.permutation(total))
        self.cache: KVCache = kernels.new_cache(total)
        self.cache.memory.fill_(torch.nan)
        self.q = numbers(
            seed + 1, sum(len(p) for p, _, _ in runs), described.num_heads, dim, dtype=dtype, spread=spread
        )
        self.runs: list[Run] = []
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []
        for (positions, shared, own), (num_shared, num_own) in zip(runs, needed, strict=True):
            held = min(shared, max(positions) + 1) if not own else shared
            table = [int(free.pop()) for _ in range(num_shared)]
            keys, values = self._fill(table, held, seed + 2 + len(self.seen), dtype, kv_heads, dim)
            own_tables = []
            for position, count in zip(positions, num_own, strict=True):
                blocks = [int(free.pop()) for _ in range(count)]
                mine = self._fill(blocks, position + 1 - shared if own else 0, len(self.seen), dtype, kv_heads, dim)
                end = position + 1
                self.seen.append((np.concatenate([keys, mine[0]])[:end], np.concatenate([values, mine[1]])[:end]))
                own_tables.append(blocks)
            self.runs.append(Run(positions, table, shared, own_tables))

    def _fill(
        self, table: list[int], count: int, seed: int, dtype: torch.dtype, kv_heads: int, dim: int
    ) -> tuple[np.ndarray, np.ndarray]:
        keys, values = numbers(seed, 2, count, kv_heads, dim, dtype=dtype)
        for i in range(count):
            block, at = table[i // BLOCK], i % BLOCK
            put(self.cache, block, at, keys[i], values[i])
        return exact(keys), exact(values)

    def expected(self, window: int) -> np.ndarray:
        """softmax(q k^T scale) v for each token, (n, heads * dim)."""
        rep = self.described.num_heads // self.described.num_kv_heads
        rows = []
        for q, (keys, values) in zip(exact(self.q), self.seen, strict=True):
            first = max(0, len(keys) - window) if window else 0
            heads = []
            for h in range(self.described.num_heads):
                scores = keys[first:, h // rep] @ q[h] * self.described.scale
                p = np.exp(scores - scores.max())
                heads.append((p / p.sum()) @ values[first:, h // rep])
            rows.append(np.concatenate(heads))
        return np.array(rows)

    def found(self, window: int, rows: slice = slice(None), runs: list[Run] | None = None) -> Tensor:
        n, width = len(self.q[rows]), self.described.num_heads * self.described.head_dim
        rest = 2 * self.described.num_kv_heads * self.described.head_dim
        qkv = torch.cat([self.q[rows].reshape(n, -1), torch.full((n, rest), torch.nan, dtype=self.q.dtype)], 1)
        out = torch.full((n, width), torch.nan, dtype=self.q.dtype)
        self.kernels.attend(qkv, out, self.cache, 1, make_plan(self.runs if runs is None else runs, BLOCK), window)
        return out


MIXED = [
    ([0], 0, True),  # the first token of a sequence
    ([63], 0, True),  # whole blocks, and one more
    ([64], 0, True),
    ([5, 9, 70, 5, 6, 7, 8, 9, 10, 11, 200], 5, True),  # samples of a prompt, more than an item holds
    ([130, 131, 190], 128, True),
    (list(range(13)), 13, False),  # a prompt
    (list(range(60, 77)), 100, False),  # a stretch of one, across blocks and items
    ([129], 129 + 1, False),
    (list(range(40, 60)), 40, True),  # the rest of a prompt behind a prefix
]


@every_kind
@every_dtype
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"),
    [(2, 2, 8), (3, 1, 20), (6, 2, 64), (7, 1, 96), (8, 1, 128), (4, 2, 256), (14, 2, 64)],
    ids=str,
)
def test_attention(kind: str, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> None:
    described = architecture(dtype, heads, kv_heads, dim, scale=dim**-0.5)
    case = AttentionCase(MIXED, described, kernels(kind, described), spread=2.0)
    for window in (0, 1, 8, 64, 100):
        tolerance = 5e-6 if dtype == torch.float32 else 0.025  # weights are rounded before they multiply the values
        np.testing.assert_allclose(exact(case.found(window)), case.expected(window), rtol=0, atol=tolerance)


@every_kind
@every_dtype
def test_attention_with_scores_of_a_thousand(kind: str, dtype: torch.dtype) -> None:
    """The exponential's ends: all but the best keys weigh nothing, wherever the best ones lie."""
    described = architecture(dtype, 4, 2, 16, scale=1.0)
    case = AttentionCase(MIXED, described, kernels(kind, described), spread=100.0)
    scores = [keys[:, h // 2] @ q[h] for q, (keys, _) in zip(exact(case.q), case.seen, strict=True) for h in range(4)]
    assert max(s.max() for s in scores) > 1000
    assert min(s.min() for s in scores) < -1000
    found = exact(case.found(0))
    # Scores of 1000 in float32 are off by some 1e-4, and so are the weights where two are close.
    np.testing.assert_allclose(found, case.expected(0), rtol=0, atol=2e-3 if dtype == torch.float32 else 0.025)


@needs_compiler
@every_dtype
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(6, 2, 64), (7, 1, 20)], ids=str)
def test_attention_does_not_depend_on_threads_and_neighbours(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> None:
    """Bit for bit: each token alone, on one thread, and all together on one thread and on two."""
    described = architecture(dtype, heads, kv_heads, dim, scale=dim**-0.5)
    case = AttentionCase(MIXED, described, kernels("native", described), spread=2.0)
    before = torch.get_num_threads()
    try:
        for window in (0, 8):
            together = []
            for count in (1, 2):
                torch.set_num_threads(count)
                case.kernels.prepare()
                together.append(case.found(window))
            assert torch.equal(*together)
            torch.set_num_threads(1)
            case.kernels.prepare()
            at = 0
            for r in case.runs:
                for i, position in enumerate(r.positions):
                    alone = Run([position], r.shared, r.shared_length, [r.own[i]])
                    assert torch.equal(case.found(window, slice(at, at + 1), [alone])[0], together[0][at])
                    at += 1
    finally:
        torch.set_num_threads(before)


@needs_compiler
@every_dtype
def test_the_other_kernels_do_not_depend_on_threads_and_neighbours(dtype: torch.dtype, threads: int) -> None:
    n, dim, described = 17, 40, architecture(dtype, 4, 2, 20)
    run = kernels("native", described)
    weight, cos = numbers(1, dim, dtype=dtype), numbers(2, n, 20)
    slots = torch.arange(n)
    x = numbers(5, n, dim, dtype=dtype)
    _, branch = adapter_case(n, (16, 24), 21, 2, 3, dtype)
    _, qkv_branch = adapter_case(n, (80, 40, 40), 21, 2, 3, dtype)

    def results(rows: slice) -> list[Tensor]:
        count = len(x[rows])
        h, out, inner = x[rows].clone(), torch.empty(count, dim, dtype=dtype), torch.empty(count, 20, dtype=dtype)
        part = slice_of(branch, rows)
        run.add_norm(h, x[rows].clone(), weight, weight, out, part)
        run.act_mul(x[rows].clone(), inner, 0, part)
        qkv, cache = numbers(3, n, 8 * 20, dtype=dtype)[rows].clone(), run.new_cache(1)
        cache.memory.zero_()
        run.store_qkv(
            qkv, None, None, cos[rows].contiguous(), cos[rows].contiguous(), cache, 0, slots[rows].contiguous(),
            slice_of(qkv_branch, rows),
        )  # fmt: skip
        stored = cache.keys(0)[0, :, :, slots[rows]].permute(2, 0, 1)
        return [h, out, inner, qkv, stored.flatten(1)]

    together = results(slice(None))
    for i in range(n):
        for whole, alone in zip(together, results(slice(i, i + 1)), strict=True):
            assert torch.equal(whole[i], alone[0])


@needs_compiler
@every_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("vocabulary", [5, 256, 259, 1000, 1031])
def test_block_sums(dtype: torch.dtype, temperature: float, vocabulary: int, threads: int) -> None:
    """Against float64 NumPy, and against what the sampler does without C where scores are not finite."""
    run = kernels("native", architecture(dtype))
    for rows in (1, 7):
        scores = numbers(rows, rows, vocabulary, dtype=dtype, spread=6)
        scores[0, -1] = -torch.inf
        found = run.block_sums(scores, temperature)
        x = exact(scores)
        padded = np.pad(x, ((0, 0), (0, -vocabulary % 256)), constant_values=-np.inf).reshape(rows, -1, 256)
        np.testing.assert_array_equal(exact(found.tops), padded.max(-1))
        np.testing.assert_array_equal(exact(found.top), x.max(-1, keepdims=True))
        weights = np.exp((padded - x.max(-1)[:, None, None]) / temperature)
        np.testing.assert_allclose(exact(found.sums), weights.sum(-1), rtol=2e-6, atol=1e-30)
        assert torch.equal(found.argmax(scores), scores.argmax(-1))
        for i in range(rows):  # no row hangs on its neighbours
            assert torch.equal(run.block_sums(scores[i : i + 1].contiguous(), temperature).sums[0], found.sums[i])
    for odd in (torch.nan, torch.inf, -torch.inf):
        for at in (0, vocabulary - 1):
            bad = numbers(3, 2, vocabulary, dtype=dtype)
            bad[1, at] = odd
            c, plain = run.block_sums(bad, temperature), block_sums(bad, temperature)
            assert torch.equal(torch.isfinite(c.top), torch.isfinite(plain.top))
            assert torch.equal(c.tops[0], plain.tops[0])
    other = numbers(4, 2, vocabulary, dtype=torch.float64)
    assert torch.equal(run.block_sums(other, 1.0).sums, block_sums(other, 1.0).sums)


@needs_compiler
@every_dtype
def test_few_rows_does_not_depend_on_threads(dtype: torch.dtype) -> None:
    x, weights = numbers(0, 4, 200, dtype=dtype), [numbers(1, 90, 200, dtype=dtype), numbers(2, 35, 200, dtype=dtype)]
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            run, maps = kernels("native", architecture(dtype)), FewRows(weights, [None, None])
            found.append([run.few_rows(x[:n].contiguous(), maps) for n in (1, 2, 3, 4)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for n in (2, 3):  # and, from two rows on, not on their number
        assert torch.equal(found[0][n - 1], found[0][3][:n])


# Building


@pytest.fixture
def forgetful(empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The kernels' folder in an empty cache, no library held from before, and a compiler that does not optimise."""
    if (real := build.compiler()) is not None:
        monkeypatch.setenv("CC", str(program(tmp_path, "quick-cc", f'exec {real} "$@" -O0')))
    library.cache_clear()
    yield empty_cache / "kernels"
    library.cache_clear()


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def runs_without_c(reason: str) -> None:
    """A NativeEngine says why it has no C kernels, and works."""
    engine = NativeEngine(tiny("llama"), context_length=CONTEXT)
    assert engine.kernels.name == "torch"
    assert engine.note.startswith("the rollout engine runs without its C kernels, and slower: ")
    assert reason in engine.note
    assert len(engine.generate(requests_of(sampled(n=2)))) == 6


@needs_compiler
def test_a_library_is_compiled_once_and_found_again(forgetful: Path) -> None:
    first = library(torch.float32)
    assert first.path.parent == forgetful
    written = first.path.stat().st_mtime_ns
    library.cache_clear()
    assert library(torch.float32).path == first.path
    assert first.path.stat().st_mtime_ns == written
    assert library(torch.bfloat16).path != first.path
    assert len(list(forgetful.iterdir())) == 2  # nothing else is left there


@needs_compiler
def test_a_library_that_another_may_have_put_there_is_not_loaded(
    forgetful: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It ran as the user who loaded it, from a folder that everyone may write. The compiling is said."""
    first = library(torch.float32)
    assert "compiling the rollout kernels" in capfd.readouterr().err
    assert forgetful.stat().st_mode & 0o777 == 0o700 and first.path.stat().st_mode & 0o022 == 0
    key = first.path.stem.partition("-")[0]
    with monkeypatch.context() as as_another:
        of_another_user(first.path, as_another)
        assert build._find(forgetful, key) is None
    first.path.chmod(0o777)
    assert build._find(forgetful, key) is None
    library.cache_clear()
    assert library(torch.float32).path == first.path  # the same bytes, made anew and put in its place
    assert "compiling the rollout kernels" in capfd.readouterr().err
    assert build._find(forgetful, key) == first.path
    of_another_user(forgetful, monkeypatch)
    library.cache_clear()
    with pytest.raises(NoKernels, match=r"belongs to another user .*TINYLORA_CACHE"):
        library(torch.float32)


def of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root gives it away; anybody else becomes another."""
    if os.geteuid() == 0:
        os.chown(path, 54321, 54321)
    else:
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "file"))
    library.cache_clear()
    with pytest.raises(NoKernels, match=r"they could not be compiled into .*file.*TINYLORA_CACHE"):
        library(torch.float32)
    library.cache_clear()


@needs_compiler
def test_a_set_of_instructions_that_onednn_may_not_use_is_not_used_here_either(
    forgetful: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lets one machine test the paths of an older one (tests/test_processors.py)."""
    monkeypatch.delenv(ISA_VARIABLE, raising=False)
    here = library(torch.bfloat16)
    monkeypatch.setenv(ISA_VARIABLE, "AVX2")
    library.cache_clear()
    without = library(torch.bfloat16)
    assert without.path != here.path and not without.functions.paired()
    assert b"zmm" not in disassembled(without.path)
    monkeypatch.delenv(ISA_VARIABLE)
    library.cache_clear()
    assert library(torch.bfloat16).path == here.path


def disassembled(path: Path) -> bytes:
    """The library's instructions in words, or nothing where objdump is not installed."""
    if shutil.which("objdump") is None:
        return b""
    return subprocess.run(["objdump", "-d", str(path)], capture_output=True, check=True, timeout=120).stdout


def test_without_a_compiler_torch_does_the_work(forgetful: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(NoKernels, match="no C compiler .* was found"):
        library(torch.float32)
    runs_without_c("no C compiler (cc, gcc, clang or $CC) was found")


def test_a_compiler_that_is_not_there(forgetful: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    runs_without_c("no C compiler (cc, gcc, clang or $CC) was found")


def test_a_compiler_that_fails(forgetful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(program(tmp_path, "cc", "echo 'kernels.c:1:1: error: I am out of order' >&2; exit 1")))
    runs_without_c("I am out of order")
    assert list(forgetful.iterdir()) == []


def test_a_compiler_that_claims_to_have_worked(
    forgetful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", str(program(tmp_path, "cc", "exit 0")))
    runs_without_c("could not be compiled into")


def test_a_compiler_that_cannot_be_started(forgetful: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = program(tmp_path, "cc", "")
    broken.write_bytes(b"\x7fELF, but not really")
    monkeypatch.setenv("CC", str(broken))
    runs_without_c("cannot be started")


@needs_compiler
def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "file" / "cache"))
    library.cache_clear()
    try:
        runs_without_c("could not be compiled into")
    finally:
        library.cache_clear()


@needs_compiler
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_library_that_is_cut_off_is_compiled_again(forgetful: Path, kept: float) -> None:
    """Loading half of one may kill the process, so that this is tried in another."""
    path = library(torch.float32).path
    whole = path.read_bytes()
    path.unlink()  # and not written over: this process has it mapped
    path.write_bytes(whole[: int(kept * len(whole))])
    code = (
        "import torch; from tinylora.generation.native.kernels.build import library; print(library(torch.float32).path)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == whole


@needs_compiler
def test_processes_that_compile_at_the_same_time(forgetful: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    workers = [
        context.Process(target=compile_in_turn, args=(str(forgetful.parent), barrier, results)) for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=120) for _ in workers] == ["", ""]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert len(list(forgetful.iterdir())) == 1


def test_a_dtype_without_kernels(forgetful: Path) -> None:
    with pytest.raises(NoKernels, match="written for bfloat16 and float32, not float64"):
        library(torch.float64)


@needs_compiler
@every_dtype
def test_block_sums_under_another_default_dtype(dtype: torch.dtype) -> None:
    """The C writes float32: under a default of bfloat16 it wrote past the end, under float64 it left half unwritten."""
    run, scores = kernels("native", architecture(dtype)), numbers(5, 3, 700, dtype=dtype)
    expected = [run.block_sums(scores, 1.0), block_sums(scores, 1.0)]
    for default in (torch.float64, torch.float16):
        torch.set_default_dtype(default)
        try:
            found = [run.block_sums(scores, 1.0), block_sums(scores, 1.0)]
        finally:
            torch.set_default_dtype(torch.float32)
        for a, b in zip(found, expected, strict=True):
            assert (a.tops.dtype, a.top.dtype) == (torch.float32, torch.float32)
            assert torch.equal(a.tops, b.tops) and torch.equal(a.top, b.top) and torch.equal(a.sums, b.sums)
