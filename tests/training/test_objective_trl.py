"""One step's gradient equals that of TRL's own GRPOTrainer._compute_loss on the same tensors, to 1e-5.

TRL divides inside the loss of each micro-batch: "dapo" by the trained tokens of the whole step (num_items_in_batch),
"grpo" and "bnpo" by the number of micro-batches. So "dapo" is our "token" for any split; "bnpo" only for one
micro-batch; "grpo" is our "sequence" for equally large micro-batches. The methods called are TRL's private ones, as of
TRL 1.16.
"""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head, nanstd

from tinylora.training.advantages import group_advantages
from tinylora.training.objective import Normalisation, policy_loss

ROWS, PROMPT, TOKENS, VOCAB = 8, 3, 9, 29
CLIP_LOW, CLIP_HIGH, CAP, TEMPERATURE = 0.2, 0.28, 1.5, 0.8


@dataclass
class Step:
    """The tensors of one optimiser step, and a tiny model a few updates away from the one that sampled."""

    model: LlamaForCausalLM
    prompt_ids: Tensor
    completion_ids: Tensor
    mask: Tensor
    old: Tensor
    base: Tensor
    sampler: Tensor
    advantages: Tensor


def completion_logprobs(model: LlamaForCausalLM, step_ids: Tensor, prompt_length: int) -> Tensor:
    logits = model(input_ids=step_ids).logits[:, prompt_length - 1 : -1] / TEMPERATURE
    return torch.log_softmax(logits, dim=-1).gather(-1, step_ids[:, prompt_length:, None]).squeeze(-1)


def make_step(seed: int, dtype: torch.dtype) -> Step:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.4, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.to(dtype=dtype)
    # TRL's log-probs come from its own fused head, ours from the model's plain logits: the patch leaves those alone.
    add_fused_lm_head(model, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    prompt_ids = torch.randint(1, VOCAB, (ROWS, PROMPT))
    completion_ids = torch.randint(1, VOCAB, (ROWS, TOKENS))
    lengths = torch.tensor([9, 2, 5, 7, 1, 9, 4, 0])  # the last one is masked as a whole: a truncated completion
    mask = torch.arange(TOKENS) < lengths[:, None]
    with torch.no_grad():
        now = completion_logprobs(model, torch.cat([prompt_ids, completion_ids], dim=1), PROMPT)
    return Step(
        model=model,
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        mask=mask,
        old=now + 0.3 * torch.randn_like(now),
        base=now + 0.3 * torch.randn_like(now),
        sampler=now + 0.5 * torch.randn_like(now),
        advantages=group_advantages(torch.rand(2, 4, dtype=dtype), "group").flatten(),
    )


class TrlTrainer(SimpleNamespace):
    """What TRL's two methods read of a trainer, so that they run without a dataset, a tokenizer or a network."""

    _get_per_token_logps_and_entropies: Any = GRPOTrainer._get_per_token_logps_and_entropies
    _compute_loss: Any = GRPOTrainer._compute_loss


def trl_trainer(step: Step, loss_type: str, beta: float, importance: bool, micro_batches: int) -> TrlTrainer:
    accelerator = SimpleNamespace(
        num_processes=1,
        is_main_process=True,
        autocast=lambda: torch.autocast("cpu", enabled=False),
        gather=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    return TrlTrainer(
        model=step.model.train(),
        accelerator=accelerator,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=micro_batches),
        current_gradient_accumulation_steps=micro_batches,
        loss_type=loss_type,
        beta=beta,
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        importance_sampling_level="token",
        use_vllm=importance,
        vllm_importance_sampling_correction=importance,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        max_completion_length=TOKENS,
        _metrics={"train": defaultdict(list)},
    )


def trl_gradient(step: Step, loss_type: str, beta: float, importance: bool, micro_batches: int) -> tuple[float, Tensor]:
    trainer = trl_trainer(step, loss_type, beta, importance, micro_batches)
    step.model.zero_grad()
    total = 0.0
    for rows in torch.arange(ROWS).chunk(micro_batches):
        inputs: dict[str, Any] = {
            "prompt_ids": step.prompt_ids[rows],
            "prompt_mask": torch.ones_like(step.prompt_ids[rows]),
            "completion_ids": step.completion_ids[rows],
            "completion_mask": step.mask[rows].long(),
            "advantages": step.advantages[rows],
            "old_per_token_logps": step.old[rows],
            "ref_per_token_logps": step.base[rows],
            "num_items_in_batch": step.mask.sum(),
        }
        if importance:  # token_truncate, as in GRPOTrainer._generate_and_score_completions
            difference = (step.old[rows] - step.sampler[rows]) * step.mask[rows]
            inputs["importance_sampling_ratio"] = torch.clamp(torch.exp(difference), min=None, max=CAP)
        loss = trainer._compute_loss(step.model, inputs)
        loss.backward()
        total += loss.item()
    assert trainer._metrics["train"]["clip_ratio/low_mean"][0] > 0  # clipping is active on both sides
    assert trainer._metrics["train"]["clip_ratio/high_mean"][0] > 0
    return total, flat_gradient(step)


def our_gradient(
    step: Step, normalisation: Normalisation, kl_coef: float, importance: bool, micro_batches: int
) -> tuple[float, Tensor]:
    step.model.zero_grad()
    total = 0.0
    for rows in torch.arange(ROWS).tensor_split(micro_batches):
        ids = torch.cat([step.prompt_ids[rows], step.completion_ids[rows]], dim=1)
        loss, _ = policy_loss(
            completion_logprobs(step.model, ids, PROMPT),
            step.old[rows],
            step.advantages[rows],
            step.mask[rows],
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            normalisation=normalisation,
            total_tokens=int(step.mask.sum()),
            total_completions=ROWS,
            sampler_logprobs=step.sampler[rows] if importance else None,
            importance_cap=CAP if importance else None,
            base_logprobs=step.base[rows] if kl_coef else None,
            kl_coef=kl_coef,
        )
        loss.backward()
        total += loss.item()
    return total, flat_gradient(step)


def flat_gradient(step: Step) -> Tensor:
    grads = [p.grad.flatten() for p in step.model.parameters() if p.grad is not None]
    return torch.cat(grads).clone()


def relative_gap(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("importance", [False, True], ids=["plain", "tis"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize(("loss_type", "normalisation"), [("dapo", "token"), ("bnpo", "token"), ("grpo", "sequence")])
def test_gradient_is_trls(
    loss_type: str, normalisation: Normalisation, micro_batches: int, beta: float, importance: bool
) -> None:
    step = make_step(0, torch.float32)
    trl_micro_batches = 1 if loss_type == "bnpo" else micro_batches
    want_loss, want = trl_gradient(step, loss_type, beta, importance, trl_micro_batches)
    got_loss, got = our_gradient(step, normalisation, beta, importance, micro_batches)
    assert relative_gap(got, want) < 1e-5
    assert got_loss == pytest.approx(want_loss, rel=1e-5, abs=1e-6)

    # The comparison can fail: every option turned to its other value is far from TRL.
    for other in (
        our_gradient(step, "token" if normalisation == "sequence" else "sequence", beta, importance, micro_batches),
        our_gradient(step, normalisation, 0.04 - beta, importance, micro_batches),
        our_gradient(step, normalisation, beta, not importance, micro_batches),
    ):
        assert relative_gap(other[1], want) > 1e-3


def test_unequal_micro_batches_give_trls_step_in_float64() -> None:
    step = make_step(1, torch.float64)
    _, want = trl_gradient(step, "dapo", 0.04, True, 2)
    for micro_batches in (1, 3, 8):
        # not to 1e-12: TRL's fused head makes float32 log-probs of a float64 model
        assert relative_gap(our_gradient(step, "token", 0.04, True, micro_batches)[1], want) < 1e-6


def test_bnpo_in_two_micro_batches_is_not_ours() -> None:
    # Why "bnpo" is compared in one micro-batch only: TRL then averages the micro-batches' own token means.
    step = make_step(2, torch.float32)
    _, want = trl_gradient(step, "bnpo", 0.0, False, 2)
    assert relative_gap(our_gradient(step, "token", 0.0, False, 2)[1], want) > 1e-2


def test_advantages_are_trls() -> None:
    # TRL inlines its formula in a method that also generates; its std is this function, its eps 1e-4.
    rewards = torch.rand(6, 8, dtype=torch.float64)
    want = (rewards - rewards.mean(dim=1, keepdim=True)) / (nanstd(rewards, dim=1)[:, None] + 1e-4)
    np.testing.assert_allclose(group_advantages(rewards, "group"), want, rtol=1e-6)  # nanstd's correction is float32
