"""Runs of npg on a tiny model: what they keep to, what they keep, what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import ByteTask, metrics_of, quiet, start

import tinylora.training.natural as natural_module
from tinylora.adapter.attach import attach
from tinylora.adapter.projection import projection
from tinylora.errors import UserError
from tinylora.store.adapter_file import load_vector
from tinylora.store.run_folder import RunFolder
from tinylora.training.train import TrainResult, resume

pytestmark = pytest.mark.usefixtures("fresh_cache")
GRPO = {"prompts_per_step": 4, "group_size": 4}


def npg(
    model: Path, out: Path, *, optim: dict[str, Any] | None = None, grpo: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None, **sections: Any,
) -> TrainResult:  # fmt: skip
    settings = {"algorithm": "npg", "steps": 6, **(train or {})}
    return start(model, out, train=settings, optim=optim or {}, grpo={**GRPO, **(grpo or {})}, **sections)


def same(a: TrainResult, b: TrainResult) -> None:
    assert torch.equal(a.v, b.v)
    assert torch.equal(load_vector(a.run / "last.safetensors")[0], load_vector(b.run / "last.safetensors")[0])
    assert metrics_of(a.run) == metrics_of(b.run)


@pytest.mark.parametrize("direction", ["natural", "adam"])
def test_every_step_costs_its_nats_and_says_whether_it_is_noise(
    tiny_folder: Path, tmp_path: Path, direction: str
) -> None:
    result = npg(tiny_folder, tmp_path, optim={"kl_step": 0.02, "direction": direction})
    steps = metrics_of(result.run)[1:]
    assert len(steps) == 6
    for row in steps:
        assert row["kl_step"] == pytest.approx(0.02, rel=1e-6) or row["grad_norm"] == 0
        assert 0 < row["signal_p"] <= 1 and row["kl_base"] >= 0 and row["curvature_replies"] > 0
    assert any(row["kl_step"] > 0 for row in steps)


def test_equal_seeds_give_equal_bits(tiny_folder: Path, tmp_path: Path) -> None:
    same(npg(tiny_folder, tmp_path / "a"), npg(tiny_folder, tmp_path / "b"))


def test_resume_is_as_if_nothing_had_happened(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = npg(tiny_folder, tmp_path / "whole")
    original, calls = natural_module.along, 0

    def crashing(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(natural_module, "along", crashing)
        with pytest.raises(KeyboardInterrupt):
            npg(tiny_folder, tmp_path / "ended")
    (run,) = (tmp_path / "ended").iterdir()
    same(resume(run, task=ByteTask(), say=quiet), whole)


def test_v_stays_within_its_nats_of_the_base(tiny_folder: Path, tmp_path: Path) -> None:
    result = npg(tiny_folder, tmp_path, optim={"kl_step": 0.1, "kl_total": 0.15, "curvature_decay": 0.0})
    for row in metrics_of(result.run)[1:]:
        # each step is measured by its own F: a step may end outside by that of the next, and then only comes back
        assert row["kl_step"] <= 0.1 * (1 + 1e-6)
        assert row["kl_base"] <= 0.15 * (1 + 1e-6) or row["kl_step"] < 0.1 * (1 - 1e-6) or row["kl_base"] > 0.15


def test_a_step_samples_on_until_it_is_no_noise(tiny_folder: Path, tmp_path: Path) -> None:
    once = npg(tiny_folder, tmp_path / "a", train={"steps": 2})
    more = npg(tiny_folder, tmp_path / "b", train={"steps": 2}, grpo={"until_signal": True, "signal_batches": 3})
    first, other = metrics_of(once.run)[1], metrics_of(more.run)[1]
    assert first["signal_p"] >= 0.05  # 16 replies of a random model; else the test asks nothing
    assert other["prompts_sampled"] > first["prompts_sampled"]
    assert other["prompts_sampled"] <= 3 * 3 * 4
    assert other["tokens_trained"] > first["tokens_trained"]


def test_what_npg_cannot_train_is_refused_before_a_run(tiny_folder: Path, tmp_path: Path) -> None:
    for sections, said in [
        ({"grpo": {"kl_coef": 0.1}}, "optim.kl_total"),
        ({"grpo": {"updates_per_batch": 2}}, "updates_per_batch must be 1"),
        ({"adapter": {"u": 100, "n_tie": 1}, "optim": {"curvature_decay": 0.0}}, "at most 8 numbers"),
    ]:
        with pytest.raises(UserError, match=said):
            npg(tiny_folder, tmp_path / "runs", **sections)
    for kl in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match=r"optim\.kl_step must be above 0 and at most 1"):
            npg(tiny_folder, tmp_path / "runs", optim={"kl_step": kl})
    with pytest.raises(UserError, match=r"method\.name = lora has none"):
        npg(tiny_folder, tmp_path / "runs", method={"name": "lora"})
    assert not (tmp_path / "runs").exists()


def test_a_number_that_moves_nothing_is_named_and_v_is_kept(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = natural_module.Curvature.update

    def without_second(self: natural_module.Curvature, scores: torch.Tensor) -> None:
        scores = scores.clone()
        scores[:, 1] = 0.0
        original(self, scores)

    monkeypatch.setattr(natural_module.Curvature, "update", without_second)
    with pytest.raises(UserError, match="number 1 of v moves no reply"):
        npg(tiny_folder, tmp_path / "runs")
    (run,) = (tmp_path / "runs").iterdir()
    assert len(metrics_of(run)) == 1 and RunFolder.open(run).read_config().train.algorithm == "npg"


def test_the_update_is_the_same_in_every_parameterisation(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P replaced by B P trains v' with B^T v' = v: the same R, the same weights, the same replies."""
    settings = {"train": {"steps": 3}, "adapter": {"u": 2, "n_tie": 100}, "grpo": {"group_size": 6}}
    plain = npg(tiny_folder, tmp_path / "a", **settings)
    B = np.array([[3.0, 1.0], [-0.5, 0.2]])
    mixed = lambda *where: np.einsum("ij,jkl->ikl", B, projection(*where))  # noqa: E731
    monkeypatch.setitem(attach.__kwdefaults__, "projections", mixed)
    other = npg(tiny_folder, tmp_path / "b", **settings)
    assert not torch.allclose(other.v, plain.v)
    torch.testing.assert_close(other.v @ torch.from_numpy(B).float(), plain.v, rtol=1e-4, atol=1e-6)
