"""Bases against NumPy's LAPACK in float64, on matrices whose spectrum is known, and the cache under abuse."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tinylora.adapter import basis as basis_module
from tinylora.adapter import svd
from tinylora.adapter.basis import Factors, model_basis, random_factors, sketch_factors, svd_factors
from tinylora.adapter.canonical import canonical_weight
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.projection import uniform_block
from tinylora.errors import UserError


def with_spectrum(out: int, columns: int, sigma: list[float], seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((out, len(sigma))))[0]
    V = np.linalg.qr(rng.standard_normal((columns, len(sigma))))[0]
    return torch.from_numpy((U * sigma) @ V.T).float()


def tail(count: int = 200, top: float = 0.9) -> list[float]:
    return [float(s) for s in np.linspace(top, 0.1, count)]


def lapack_update(W: Tensor, P: np.ndarray, like: Factors) -> np.ndarray:
    """U diag(S) P V^T from NumPy, each pair turned to the side of `like`."""
    rank = len(P)
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    U, V = U[:, :rank], Vh[:rank].T
    signs = np.sign((V * like.V.numpy()).sum(axis=0))
    update: np.ndarray = (U * signs * S[:rank]) @ P @ (V * signs).T
    return update


def update(f: Factors, P: np.ndarray) -> np.ndarray:
    product: np.ndarray = (f.U * f.S).numpy() @ P @ f.V.numpy().T
    return product


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (260, 260), (48, 32), (32, 130)])
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_update_equals_lapack(shape: tuple[int, int], rank: int) -> None:
    W = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    f = svd_factors(W, rank)
    P = np.random.default_rng(2).standard_normal((rank, rank))
    expected = lapack_update(W, P, f)
    assert np.linalg.norm(update(f, P) - expected) < 1e-7 * np.linalg.norm(expected)
    assert f.residual <= 1e-9
    sigma = np.linalg.svd(W.double().numpy(), compute_uv=False)
    assert f.gap == pytest.approx(float(min(-np.diff(sigma[: rank + 1]))) / sigma[0], rel=1e-4)


@pytest.mark.parametrize("close", [1e-3, 1e-5])
def test_close_singular_values_are_resolved(close: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "_lapack", None)  # the iteration itself has to do it
    W = with_spectrum(500, 300, [2.0, 1.0, 1.0 - close, *tail()])
    f = svd_factors(W, 2)
    P = np.array([[0.3, -0.7], [1.1, 0.4]])
    expected = lapack_update(W, P, f)
    assert np.linalg.norm(update(f, P) - expected) < 1e-7 * np.linalg.norm(expected)
    true = W.double().numpy()
    assert np.linalg.norm(true @ f.V.numpy() - (f.U * f.S).numpy(), axis=0).max() < 1e-9 * 2
    assert np.linalg.norm(true.T @ f.U.numpy() - (f.V * f.S).numpy(), axis=0).max() < 1e-9 * 2


@pytest.mark.parametrize("scale", [1e-18, 1e15])
def test_scale_does_not_matter(scale: float) -> None:
    W = with_spectrum(300, 260, [2.0, 1.5, *tail()]) * scale
    f = svd_factors(W, 2)
    assert f.S.tolist() == pytest.approx([2.0 * scale, 1.5 * scale], rel=1e-6)
    assert f.residual <= 1e-9


def test_steep_and_low_rank_spectra_are_right() -> None:
    for sigma in ([1.0, 1e-2, *[5e-3] * 100], [1.0, 1e-5, 1e-6], [1.0, 0.5]):
        f = svd_factors(with_spectrum(300, 250, sigma), 2)
        assert f.S.tolist() == pytest.approx(sigma[:2], rel=1e-2)  # W itself is rounded to float32
        assert f.residual <= 1e-9
        assert torch.allclose(f.U.T @ f.U, torch.eye(2, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(f.V.T @ f.V, torch.eye(2, dtype=torch.float64), atol=1e-12)


def test_signs_follow_the_published_rule() -> None:
    W = torch.randn(220, 300, generator=torch.Generator().manual_seed(3))
    f = svd_factors(W, 3)
    reference = uniform_block("tinylora/sign/1", 300) - 0.5
    assert (reference @ f.V.numpy() >= 1e-4).all()
    flipped = svd_factors(-W, 3)  # (u, v) -> (-u, v): the sign of v decides
    assert torch.allclose(flipped.V, f.V, atol=1e-9) and torch.allclose(flipped.U, -f.U, atol=1e-9)


def test_sign_falls_to_u_where_v_does_not_decide() -> None:
    reference = torch.from_numpy(uniform_block("tinylora/sign/1", 64) - 0.5)
    v = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    v = v - reference * (reference @ v) / (reference @ reference)
    u = -torch.from_numpy(uniform_block("tinylora/sign/1", 40) - 0.5)
    f = svd_factors(torch.outer(u, v).float(), 1)
    assert abs(float(reference @ f.V[:, 0])) < 1e-4
    assert float(f.U[:, 0] @ u) < 0 and f.sign_margin > 0.1


def linear(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return module


def test_modules_without_a_unique_basis_are_left_out() -> None:
    weights: dict[str, nn.Module | Callable[[], Tensor]] = {
        "good": linear(torch.randn(40, 30, generator=torch.Generator().manual_seed(5))),
        "tie": linear(torch.diag(torch.tensor([2.0, 1.0, 1.0, 0.5]))),
        "rank1": linear(torch.ones(8, 6)),
        "zero": linear(torch.zeros(8, 6)),
    }
    factors, excluded = model_basis(weights, AdapterConfig(rank=2), None)
    assert list(factors) == ["good"] and list(excluded) == ["tie", "rank1", "zero"]
    assert "gap" in excluded["tie"] and "gap" in excluded["rank1"] and "zero" in excluded["zero"]


def test_a_weak_sign_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis_module, "MIN_SIGN_MARGIN", 1e3)
    _, excluded = model_basis({"a": linear(torch.randn(9, 8))}, AdapterConfig(rank=1), None)
    assert "sign margin" in excluded["a"]


def test_canonical_weight_is_bf16_nearest_even_and_transposes_conv1d() -> None:
    # 1 + 1/256 lies half way between two bf16 numbers, as does 1 + 3/256: even wins, down and up.
    weight = torch.tensor([[1 + 1 / 256, 1 + 3 / 256], [1 + 1.01 / 256, -3.0]])
    expected = torch.tensor([[1.0, 1 + 4 / 256], [1 + 2 / 256, -3.0]])
    assert torch.equal(canonical_weight(linear(weight)), expected)
    assert torch.equal(canonical_weight(linear(weight).double()), expected)
    conv = Conv1D(2, 2)
    conv.weight = nn.Parameter(weight.T.clone())
    assert torch.equal(canonical_weight(conv), expected)
    assert canonical_weight(conv).dtype == torch.float32


def test_float32_and_bf16_loads_agree_exactly() -> None:
    module = linear(torch.randn(40, 30))
    a = model_basis({"a": module}, AdapterConfig(), None)[0]["a"]
    b = model_basis({"a": linear(module.weight.bfloat16().float()).bfloat16()}, AdapterConfig(), None)[0]["a"]
    assert torch.equal(a.U, b.U) and torch.equal(a.S, b.S) and torch.equal(a.V, b.V)


def test_bad_weights_are_one_clear_sentence() -> None:
    bad = torch.randn(6, 5)
    bad[2, 2] = float("nan")
    with pytest.raises(UserError, match=r"model\.x: .*not finite"):
        model_basis({"model.x": linear(bad)}, AdapterConfig(), None)
    with pytest.raises(UserError, match="packed"):
        model_basis({"x": lambda: torch.zeros(4, 4, dtype=torch.uint8)}, AdapterConfig(), None)
    with pytest.raises(UserError, match="only nn.Linear"):
        canonical_weight(nn.LayerNorm(3))
    with pytest.raises(UserError, match="1 to 5"):
        svd_factors(torch.randn(6, 5), 6)


@pytest.mark.parametrize("kind", ["random", "sketch"])
def test_other_bases_are_orthonormal_scaled_and_keyed(kind: str) -> None:
    W = torch.randn(50, 30, generator=torch.Generator().manual_seed(6)).bfloat16().float()

    def factors(seed: int, path: str) -> Factors:
        config = AdapterConfig(rank=3, basis=kind, seed=seed)  # type: ignore[arg-type]
        return model_basis({path: linear(W)}, config, None)[0][path]

    f = factors(0, "a")
    for vectors in (f.U.numpy(), f.V.numpy()):
        assert np.allclose(vectors.T @ vectors, np.eye(3), atol=1e-14)
    assert f.S.tolist() == pytest.approx([np.sqrt((np.linalg.svd(W.numpy(), compute_uv=False) ** 2).mean())] * 3)
    assert torch.equal(f.U, factors(0, "a").U)
    assert not torch.allclose(f.U, factors(1, "a").U) and not torch.allclose(f.V, factors(0, "b").V)


def test_sketch_lies_in_the_range_of_the_weight() -> None:
    W = with_spectrum(50, 40, [3.0, 2.0, 1.0])
    f = sketch_factors(W, 3, 0, "a")
    U, _, Vh = np.linalg.svd(W.numpy(), full_matrices=False)
    assert np.allclose(np.linalg.svd(U[:, :3].T @ f.U.numpy(), compute_uv=False), 1, atol=1e-5)
    assert np.allclose(np.linalg.svd(Vh[:3] @ f.V.numpy(), compute_uv=False), 1, atol=1e-5)
    _, excluded = model_basis({"a": linear(torch.ones(8, 6))}, AdapterConfig(rank=2, basis="sketch"), None)
    assert "sketch" in excluded["a"]


def test_random_basis_is_householder_free_gram_schmidt_of_the_stream() -> None:
    from tinylora.adapter.projection import standard_block

    stream = standard_block("tinylora/random/out/1\n9\na.b", 7 * 2).reshape(7, 2)
    Q, R = np.linalg.qr(stream)
    assert np.allclose(random_factors((7, 5), 2, 9, "a.b").U.numpy(), Q * np.sign(np.diag(R)), atol=1e-14)


# --- the cache ---


def some_modules(seed: int = 7) -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(seed)
    weights = {f"layers.{i}.q_proj": linear(torch.randn(40, 30, generator=generator)) for i in range(3)}
    return {**weights, "tie": linear(torch.eye(6))}


def forbid(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(f"tinylora.adapter.{name}", refuse)


def same(a: dict[str, Factors], b: dict[str, Factors]) -> bool:
    return list(a) == list(b) and all(
        torch.equal(a[p].U, b[p].U)
        and torch.equal(a[p].S, b[p].S)
        and torch.equal(a[p].V, b[p].V)
        and (a[p].gap, a[p].residual, a[p].sign_margin) == (b[p].gap, b[p].residual, b[p].sign_margin)
        for p in a
    )


def test_second_load_computes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_basis(some_modules(), AdapterConfig(), tmp_path)
    forbid(monkeypatch, "basis._build")
    second = model_basis(some_modules(), AdapterConfig(seed=5), tmp_path)  # the svd does not depend on the seed
    assert same(first[0], second[0]) and first[1] == second[1] and list(first[1]) == ["tie"]


@pytest.mark.parametrize("change", ["weights", "rank", "basis", "paths"])
def test_anything_that_matters_makes_another_entry(tmp_path: Path, change: str) -> None:
    model_basis(some_modules(), AdapterConfig(), tmp_path)
    modules = some_modules(8 if change == "weights" else 7)
    if change == "paths":
        modules = {path + "x": module for path, module in modules.items()}
    config = AdapterConfig(rank=3 if change == "rank" else 2, basis="random" if change == "basis" else "svd")
    assert same(model_basis(modules, config, tmp_path)[0], model_basis(modules, config, None)[0])
    assert len(list((tmp_path / "basis").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_entry_is_rebuilt(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model_basis(some_modules(), AdapterConfig(), tmp_path)
    (entry,) = (tmp_path / "basis").glob("*.safetensors")
    content = bytearray(entry.read_bytes())
    content[-100] ^= 1
    entry.write_bytes({"flip": bytes(content), "cut": bytes(content[:-50]), "empty": b""}[damage])
    assert same(first[0], model_basis(some_modules(), AdapterConfig(), tmp_path)[0])
    forbid(monkeypatch, "basis._build")
    assert same(first[0], model_basis(some_modules(), AdapterConfig(), tmp_path)[0])
    assert not [name for name in os.listdir(tmp_path / "basis") if name.startswith(".")]


def test_an_unchanged_source_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"weights")
    cache = tmp_path / "cache"
    first = model_basis(some_modules(), AdapterConfig(), cache, source)
    with monkeypatch.context() as patch:
        forbid(patch, "basis_cache.rounded_weight")
        assert same(first[0], model_basis(some_modules(), AdapterConfig(), cache, [source])[0])
        os.utime(source, ns=(1, 1))
        with pytest.raises(AssertionError, match="rounded_weight"):
            model_basis(some_modules(), AdapterConfig(), cache, tmp_path)
    # Weights that were changed in memory under the same source are noticed.
    model_basis(some_modules(), AdapterConfig(), cache, source)
    changed = model_basis(some_modules(8), AdapterConfig(), cache, source)
    assert same(changed[0], model_basis(some_modules(8), AdapterConfig(), None)[0])
    for memo in (cache / "basis").glob("weights-*.json"):
        memo.write_text("[1, 2]")
    assert same(changed[0], model_basis(some_modules(8), AdapterConfig(), cache, source)[0])


def _count_builds(
    cache: Path, barrier: "multiprocessing.synchronize.Barrier", builds: "multiprocessing.Queue[int]"
) -> None:
    inner = basis_module._build

    def counting(*args: object) -> object:
        builds.put(os.getpid())
        return inner(*args)  # type: ignore[arg-type]

    basis_module._build = counting  # type: ignore[assignment]
    torch.set_num_threads(1)
    barrier.wait(120)
    model_basis(some_modules(), AdapterConfig(), cache)
    builds.put(0)


def test_two_processes_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, builds = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_count_builds, args=(tmp_path, barrier, builds)) for _ in range(2)]
    for worker in workers:
        worker.start()
    reports = [builds.get(timeout=120) for _ in range(3)]
    for worker in workers:
        worker.join(60)
    assert sum(pid != 0 for pid in reports) == 1
    assert same(
        model_basis(some_modules(), AdapterConfig(), tmp_path)[0], model_basis(some_modules(), AdapterConfig(), None)[0]
    )


def test_a_cache_that_cannot_be_written_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder with TINYLORA_CACHE"):
        model_basis(some_modules(), AdapterConfig(), tmp_path / "file")
