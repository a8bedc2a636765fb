"""The basis from the reward's gradient: against the whole gradient by autograd and LAPACK, and as part of a run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_run import ByteTask, quiet, start, tiny_config
from transformers import PreTrainedModel

from tinylora.adapter.attach import attach, linear_maps
from tinylora.adapter.config import AdapterConfig
from tinylora.errors import UserError
from tinylora.learner.learner import Learner, Row
from tinylora.rollouts.runtime import open_runtime
from tinylora.store.adapter import open_adapter
from tinylora.tasks.base import Item
from tinylora.training.gradient_basis import _orthogonal, gradient_directions
from tinylora.training.train import resume

ROWS = [Row(0, (11, 12, 13), (40, 41, 42)), Row(0, (11, 12, 13), (43,)), Row(1, (7, 9), (50, 51, 52, 53))]
WEIGHTS = [0.5, -1.0, 0.25]


@pytest.mark.parametrize("micro_batch_tokens", [1000, 8])
@pytest.mark.parametrize("model_name", ["tiny_llama", "tiny_gpt2"])
def test_directions_are_the_top_ones_of_the_whole_gradient(
    model_name: str, micro_batch_tokens: int, request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(model_name)
    adapter = attach(model, AdapterConfig(rank=2))
    learner = Learner(model, adapter, temperature=0.7, packed=False)
    found = gradient_directions(learner, adapter.paths, ROWS, WEIGHTS, rank=2, seed=0,
                                micro_batch_tokens=micro_batch_tokens)  # fmt: skip
    assert all(p.grad is None for p in model.parameters())
    adapter.detach()
    model.requires_grad_(True)
    total = torch.zeros(())
    for row, weight in zip(ROWS, WEIGHTS, strict=True):
        ids = torch.tensor([[*row.prompt_ids, *row.token_ids]])
        logprobs = torch.log_softmax(model(ids).logits[0, len(row.prompt_ids) - 1 : -1] / 0.7, dim=-1)
        total = total + weight * logprobs[torch.arange(len(row.token_ids)), torch.tensor(row.token_ids)].sum()
    total.backward()
    for path, one in found.items():
        module = linear_maps(model)[path]
        G = module.weight.grad.double().numpy()
        G = G if isinstance(module, torch.nn.Linear) else G.T
        U, S, Vt = np.linalg.svd(G)
        np.testing.assert_allclose(one.sigma.numpy(), S[:2], rtol=2e-3)
        # The best of rank 2: a pair's sign and, near a tie, its order are free, their sum is not.
        best = U[:, :2] @ np.diag(S[:2]) @ Vt[:2]
        ours = (one.U * one.sigma).numpy() @ one.V.T.numpy()
        assert np.linalg.norm(ours - best) < 0.02 * np.linalg.norm(best), path
        np.testing.assert_allclose((one.U.T @ one.U).numpy(), np.eye(2), atol=1e-6)


def test_a_run_keeps_its_basis_and_resumes(tiny_folder: Path, tmp_path: Path, fresh_cache: Path) -> None:
    adapter = {"basis": "gradient", "u": 2, "n_tie": 8}
    keep = {"keep": "last"}
    whole = start(tiny_folder, tmp_path / "a", adapter=adapter, train={"steps": 4, **keep})
    half = start(tiny_folder, tmp_path / "b", adapter=adapter, train={"steps": 2, **keep})
    assert torch.equal(resume(half.run, ["train.steps=4"], task=ByteTask(), say=quiet).v, whole.v)
    assert whole.v.any() and not (whole.run / "adapter.tinylora").exists()
    opened = open_adapter(whole.run)
    runtime = open_runtime(opened.settings(), task=ByteTask(), say=quiet, on=opened)
    ids = torch.tensor([[11, 12, 13]])
    with torch.no_grad(), runtime.adapter.using(None):
        base = runtime.base.model(ids).logits
    with torch.no_grad(), runtime.adapter.using(opened.v):
        assert (runtime.base.model(ids).logits - base).abs().max() > 1e-3
    with pytest.raises(UserError, match="brings factors of its own"):
        opened.to_portable()
    (whole.run / "basis.safetensors").unlink()
    with pytest.raises(UserError, match="on a basis of its run's own"):
        open_adapter(whole.run)


def test_the_basis_has_the_directions_of_the_runs_own_batch(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path
) -> None:
    done = start(tiny_folder, tmp_path, adapter={"basis": "gradient"}, train={"steps": 1})
    explicit = open_adapter(done.run).explicit
    assert explicit is not None
    svd = open_runtime(tiny_config(tiny_folder), task=ByteTask(), say=quiet).adapter
    for path, module in explicit.modules.items():
        assert torch.equal(module.S, svd.factors[path].S.double())  # type: ignore[attr-defined]
        # The weight's own directions are others.
        assert (module.U.T @ svd.factors[path].U).abs().max() < 0.95  # type: ignore[attr-defined]


def test_without_differences_in_reward_there_is_no_gradient(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path
) -> None:
    class Same(ByteTask):
        def score(self, item: Item, text: str) -> dict[str, float]:
            return {"strict": 1.0, "value_only": 1.0}

    with pytest.raises(UserError, match="needs a batch in which rewards differ"):
        start(tiny_folder, tmp_path, Same(), adapter={"basis": "gradient"})


def test_replies_that_are_cut_off_count_as_they_do_in_training(
    tiny_folder: Path, tmp_path: Path, fresh_cache: Path
) -> None:
    one = {"generation": {"max_new_tokens": 1}, "adapter": {"basis": "gradient"}, "train": {"steps": 1}}
    grpo = {"prompts_per_step": 2, "group_size": 4}
    start(tiny_folder, tmp_path, grpo={**grpo, "truncated": "keep"}, **one)
    with pytest.raises(UserError, match=r"or were cut off under grpo\.truncated = mask"):
        start(tiny_folder, tmp_path, grpo={**grpo, "truncated": "mask"}, **one)


def test_it_is_tinyloras_and_needs_a_run(tiny_folder: Path, tiny_llama: PreTrainedModel, fresh_cache: Path) -> None:
    with pytest.raises(UserError, match="comes from a batch of a task"):
        attach(tiny_llama, AdapterConfig(basis="gradient"))
    with pytest.raises(UserError, match=r"method\.name must be tinylora where adapter\.basis is gradient, got 'lora'"):
        tiny_config(tiny_folder, adapter={"basis": "gradient"}, method={"name": "lora"})


def test_columns_are_made_orthogonal_where_the_device_has_no_float64(
    elsewhere: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    Y = torch.randn(9, 3)
    assert torch.equal(_orthogonal(elsewhere(Y)), _orthogonal(Y))
