"""The learner against plain transformers forwards, row by row, that know nothing of shared prompts."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinylora.adapter.attach import AttachedAdapter, attach
from tinylora.adapter.config import AdapterConfig
from tinylora.errors import UserError
from tinylora.learner.learner import Learner, Row, micro_batches
from tinylora.learner.packed import lay_out
from tinylora.models.prefill import MIN_SHARED, common_prefix_length

MODELS = ["tiny_llama", "tiny_qwen2", "tiny_gpt2"]
HEAD = tuple(range(40, 40 + MIN_SHARED + 3))
PROMPTS = {
    "apart": [(11, 12, 13), (21, 22, 23, 24, 25, 26), (31,)],
    "common": [(*HEAD, 11), (*HEAD, 21, 22, 23, 24), (*HEAD, 31, 32)],
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return request.getfixturevalue(request.param)


def rows(kind: str) -> list[Row]:
    """Two or three completions a prompt, of 1 to 6 tokens, in mixed order."""
    generator = torch.Generator().manual_seed(3)
    lengths = [(0, 4), (1, 1), (2, 6), (0, 2), (1, 5), (2, 3), (2, 1)]
    draw = lambda n: tuple(torch.randint(3, 259, (n,), generator=generator).tolist())  # noqa: E731
    return [Row(group, PROMPTS[kind][group], draw(length)) for group, length in lengths]


def adapted(model: PreTrainedModel) -> tuple[AttachedAdapter, Tensor]:
    adapter = attach(model, AdapterConfig(u=2, n_tie=5))
    v = 0.3 * torch.randn(adapter.zeros().shape, generator=torch.Generator().manual_seed(1))
    return adapter, v.requires_grad_(True)


def reference(model: PreTrainedModel, adapter: AttachedAdapter, row: Row, v: Tensor | None, T: float) -> Tensor:
    """Log-probs of one row by one unpadded forward without a cache."""
    with adapter.using(v):
        logits = model(torch.tensor([[*row.prompt_ids, *row.token_ids]]), use_cache=False).logits[0]
    logprobs = torch.log_softmax(logits[len(row.prompt_ids) - 1 : -1].double() / T, dim=-1)
    return logprobs[torch.arange(len(row.token_ids)), torch.tensor(row.token_ids)]


def weigh(logprobs: Tensor) -> Tensor:
    """A sum in which every (row, position) has its own weight, so that no mix-up cancels out."""
    weights = torch.linspace(0.5, 1.5, logprobs.numel(), dtype=logprobs.dtype).reshape(logprobs.shape)
    return (weights * logprobs).sum()


@pytest.mark.parametrize("kind", list(PROMPTS))
@pytest.mark.parametrize("options", [{}, {"packed": False}, {"shared_prompts": False}, {"checkpointing": True}])
def test_scores_and_gradient_are_those_of_plain_forwards(
    model: PreTrainedModel, kind: str, options: dict[str, bool]
) -> None:
    adapter, v = adapted(model)
    batch = rows(kind)
    assert (common_prefix_length(PROMPTS[kind]) >= MIN_SHARED) == (kind == "common")
    learner = Learner(model, adapter, temperature=0.7, **options)
    logprobs, mask = learner.logprobs(batch, v)
    assert mask.sum(1).tolist() == [len(row.token_ids) for row in batch]
    assert logprobs.dtype == torch.float32
    assert not logprobs.detach()[~mask].any()
    expected = torch.zeros(mask.shape, dtype=torch.float64)
    for i, row in enumerate(batch):
        expected[i, : len(row.token_ids)] = reference(model, adapter, row, v, 0.7)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    (expected_grad,) = torch.autograd.grad(weigh(expected), v)
    (grad,) = torch.autograd.grad(weigh(logprobs), v)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5 * float(expected_grad.abs().max()))
    assert all(parameter.grad is None for parameter in model.parameters())
    colder = Learner(model, adapter, temperature=1.0, **options).logprobs(batch, v)[0]
    assert not torch.allclose(logprobs, colder, atol=1e-2)  # the temperature is really used


def test_no_vector_is_the_base_model(model: PreTrainedModel) -> None:
    batch = rows("common")
    with torch.no_grad():
        logits = [model(torch.tensor([[*row.prompt_ids, *row.token_ids]])).logits[0].double() for row in batch]
    adapter, v = adapted(model)
    adapter.write(v.detach())  # what stands on the adapter must not matter
    logprobs, mask = Learner(model, adapter).logprobs(batch, None)
    for i, row in enumerate(batch):
        all_scores = torch.log_softmax(logits[i][len(row.prompt_ids) - 1 : -1], dim=-1)
        expected = all_scores[torch.arange(len(row.token_ids)), torch.tensor(row.token_ids)]
        torch.testing.assert_close(logprobs[i, mask[i]].double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(adapter.read(), v.detach())


def test_checkpointing_keeps_less_and_puts_the_layers_back(tiny_llama: PreTrainedModel) -> None:
    """transformers' own switch does nothing in eval mode: the option was once accepted and had no effect."""
    adapter, v = adapted(tiny_llama)
    batch = rows("apart")

    def kept(checkpointing: bool) -> int:
        seen: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.data_ptr()] = tensor.numel()
            return tensor

        learner = Learner(tiny_llama, adapter, shared_prompts=False, checkpointing=checkpointing)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logprobs, _ = learner.logprobs(batch, v)
        logprobs.sum().backward()
        return sum(seen.values())

    assert kept(True) < 0.5 * kept(False)
    assert not any("forward" in vars(module) for module in tiny_llama.modules())


def test_a_model_without_layers_to_recompute_is_refused(tiny_gpt2: PreTrainedModel, monkeypatch: Any) -> None:
    adapter, _ = adapted(tiny_gpt2)
    monkeypatch.setattr(Learner, "_layers", lambda self: [])
    with pytest.raises(UserError, match=r"train\.gradient_checkpointing: GPT2LMHeadModel"):
        Learner(tiny_gpt2, adapter, checkpointing=True)


def test_covered_models_are_packed_and_others_padded(tiny_llama: PreTrainedModel, tiny_gpt2: PreTrainedModel) -> None:
    found = {}
    for name, model in (("llama", tiny_llama), ("gpt2", tiny_gpt2)):
        adapter, _ = adapted(model)
        for checkpointing in (False, True):
            learner = Learner(model, adapter, checkpointing=checkpointing)
            found[name, checkpointing] = (learner.padded, learner.shared_prompts)
        assert Learner(model, adapter, shared_prompts=False).padded
    assert found["llama", False] == found["llama", True] == (False, True)
    assert found["gpt2", False] == (True, True)
    assert found["gpt2", True] == (True, False)


def test_a_vector_for_each_row(model: PreTrainedModel) -> None:
    adapter, v = adapted(model)
    batch = rows("apart")
    vectors = torch.stack([v.detach() * (i - 3) for i in range(len(batch))])
    logprobs, mask = Learner(model, adapter).logprobs(batch, vectors)
    for i, row in enumerate(batch):
        expected = reference(model, adapter, row, vectors[i], 1.0)
        torch.testing.assert_close(logprobs[i, mask[i]].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [torch.full((5, 2), float("nan")), torch.zeros(1, 1)])
def test_a_vector_that_does_not_fit_is_refused(tiny_llama: PreTrainedModel, wrong: Tensor) -> None:
    adapter, v = adapted(tiny_llama)
    with pytest.raises(UserError, match="adapter vector"):
        Learner(tiny_llama, adapter).logprobs(rows("apart"), wrong if wrong.numel() == 1 else wrong[: len(v)])


def test_a_prompt_of_no_token_is_refused(tiny_llama: PreTrainedModel) -> None:
    adapter, v = adapted(tiny_llama)
    with pytest.raises(ValueError, match="at least one token"):
        Learner(tiny_llama, adapter).logprobs([Row(0, (), (5, 6))], v)


@pytest.mark.parametrize(("shared", "padded"), [(True, False), (True, True), (False, None)])
@pytest.mark.parametrize("budget", [1, 20, 60, 10_000])
def test_micro_batches_hold_every_row_once_within_the_budget(budget: int, shared: bool, padded: bool | None) -> None:
    batch = [*rows("apart"), *rows("common")]
    batch = [Row(row.group + 3 * (i >= 7), row.prompt_ids, row.token_ids) for i, row in enumerate(batch)]
    found = list(micro_batches(batch, budget, shared_prompts=shared, padded=padded))
    assert sorted(i for part in found for i in part) == list(range(len(batch)))
    for part in found:
        prompts = len({batch[i].group for i in part}) if shared else len(part)
        width = max(len(batch[i].prompt_ids) for i in part)
        length = max(len(batch[i].token_ids) for i in part)
        tokens = prompts * width + len(part) * length
        if padded is False:
            tokens = sum(map(len, {batch[i].prompt_ids for i in part})) + sum(len(batch[i].token_ids) for i in part)
        assert len(part) == 1 or tokens <= budget
    assert len(found) == {1: len(batch), 10_000: 1}.get(budget, len(found))
    assert found == list(micro_batches(list(batch), budget, shared_prompts=shared, padded=padded))
    other = [Row(row.group, tuple(258 - i for i in row.prompt_ids), row.token_ids[::-1]) for row in batch]
    assert found == list(micro_batches(other, budget, shared_prompts=shared, padded=padded))  # lengths alone decide


def test_real_tokens_fill_a_batch_further_than_padded_ones() -> None:
    batch = rows("apart")  # 10 prompt tokens and 22 of completions; padded 3 x 6 and 7 x 6
    assert list(micro_batches(batch, 32)) == [sorted(range(7), key=lambda i: batch[i].group)]
    assert len(list(micro_batches(batch, 31))) == 2
    assert len(list(micro_batches(batch, 60, padded=True))) == 1
    assert len(list(micro_batches(batch, 59, padded=True))) == 2


def test_no_rows_give_no_batches() -> None:
    assert list(micro_batches([], 100)) == []


def test_what_all_prompts_begin_with_counts_once_where_it_is_computed_once() -> None:
    batch = [Row(i, (*range(20), 30 + i, 1, 2, 3, 4), (7, 8, 9, 7, 8)) for i in range(4)]
    laid = lay_out([row.prompt_ids for row in batch], [row.token_ids for row in batch])
    assert len(laid.token_ids) + len(batch) == 60  # a completion's last token is not on the axis, but is counted
    assert len(list(micro_batches(batch, 60))) == 1
    assert len(list(micro_batches(batch, 59))) == 2
    assert len(list(micro_batches(batch, 4 * 25 + 4 * 5, padded=True))) == 1
    assert len(list(micro_batches(batch, 4 * 25 + 4 * 5 - 1, padded=True))) == 2


def test_the_split_into_micro_batches_does_not_move_the_gradient(tiny_llama: PreTrainedModel) -> None:
    adapter, v = adapted(tiny_llama)
    learner = Learner(tiny_llama, adapter)
    batch = rows("common")

    def gradient(budget: int) -> Tensor:
        total = torch.zeros_like(v)
        for part in micro_batches(batch, budget):
            logprobs, _ = learner.logprobs([batch[i] for i in part], v)
            weights = torch.tensor([1.0 + i for i in part])  # a weight of the row, wherever it stands
            total += torch.autograd.grad((weights * logprobs.sum(1)).sum(), v)[0]
        return total

    whole = gradient(10_000)
    assert float(whole.abs().max()) > 1e-3
    for budget in (1, 30, 60):
        torch.testing.assert_close(gradient(budget), whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
