"""Counts, memory and plans by hand; log-probs and KL against a loop over single rows in NumPy float64."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tinylora.adapter.attach import AttachedAdapter, attach
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.factors import Factors
from tinylora.adapter.layer import AdaptedLinear
from tinylora.config.method import MethodConfig
from tinylora.config.run import EvalConfig, GenerationConfig, GrpoConfig, ModelConfig, RunConfig, TrainConfig
from tinylora.errors import UserError
from tinylora.evaluation.landscape import format_landscape, landscape, random_vector
from tinylora.evaluation.logprobs import completion_logprobs, divergence, in_parts
from tinylora.generation.engine import make_engine
from tinylora.generation.native.engine import NativeEngine
from tinylora.generation.native.kernels.native import AdapterFactors
from tinylora.learner.frozen_ops import FrozenLinear
from tinylora.learner.learner import Learner
from tinylora.learner.memory import activation_bytes
from tinylora.methods.build import put_method_on
from tinylora.models.architecture import describe
from tinylora.planning.inspection import format_inspection, inspect_model, inspect_shapes, inspect_weights
from tinylora.planning.memory import memory_estimate, num_parameters
from tinylora.planning.plan import Prompts, format_plan, make_plan, prompts_of
from tinylora.planning.shapes import shape_model
from tinylora.planning.speed import Speed
from tinylora.rollouts.prompts import prompt_candidates
from tinylora.rollouts.runtime import Runtime, open_runtime
from tinylora.talk import format_bytes
from tinylora.tasks.config import TaskConfig


def quiet(text: str) -> None:
    pass


def jsonl_config(folder: Path, tmp_path: Path) -> RunConfig:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(f'{{"question": "{a} + {b}", "answer": "{a + b}"}}\n' for a in range(8) for b in range(8)))
    return RunConfig(
        model=ModelConfig(name=str(folder), device="cpu", dtype="float32"),
        adapter=AdapterConfig(n_tie=8),
        task=TaskConfig(name="jsonl", path=str(file)),
        generation=GenerationConfig(max_new_tokens=6),
        train=TrainConfig(num_threads=1),
        eval=EvalConfig(num_validation=4, num_test=8),
    )


@pytest.fixture
def runtime(tiny_folder: Path, fresh_cache: Path, tmp_path: Path) -> Runtime:
    return open_runtime(jsonl_config(tiny_folder, tmp_path), say=quiet)


@pytest.mark.parametrize(
    ("name", "n_tie", "modules", "numbers", "parameters"),
    [  # the paper's counts, and the publishers' parameter totals
        ("smollm2-135m-instruct", 17, 210, 13, 134_515_008),
        ("Qwen/Qwen2.5-0.5B-Instruct", 16, 168, 11, 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 16, 196, 13, 1_543_714_304),
        ("Qwen/Qwen2.5-3B-Instruct", 16, 252, 16, 3_085_938_688),
        ("Qwen/Qwen2.5-7B-Instruct", 16, 196, 13, 7_615_616_512),
        ("meta-llama/Llama-3.2-1B-Instruct", 16, 112, 7, 1_235_814_400),
        ("meta-llama/Llama-3.2-3B-Instruct", 16, 196, 13, 3_212_749_824),
        ("meta-llama/Llama-3.1-8B-Instruct", 16, 224, 14, 8_030_261_248),
    ],
)
def test_known_shapes_need_no_files_and_give_the_published_counts(
    name: str, n_tie: int, modules: int, numbers: int, parameters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = RunConfig(model=ModelConfig(name=name, device="cpu"), adapter=AdapterConfig(n_tie=n_tie))
    model, source = shape_model(config.model)
    assert next(model.parameters()).is_meta and "known" in source
    found = inspect_model(model, config, source)
    assert (found.num_modules, found.num_trained, num_parameters(model)) == (modules, numbers, parameters)
    assert (found.bytes_float32, found.bytes_bfloat16) == (4 * numbers, 2 * numbers)
    assert sum(t.count for t in found.types) == sum(g.count for g in found.groups) == modules
    assert [g.count for g in found.groups[:-1]] == [n_tie] * (numbers - 1)
    assert found.left_out == {"lm_head": "the output head, which all-linear leaves out"}
    assert not found.gaps_checked


def test_shapes_are_out_by_in_and_what_no_target_names_is_listed(tiny_gpt2: PreTrainedModel) -> None:
    config = RunConfig(adapter=AdapterConfig(targets=("c_fc",), tying="all"))
    found = inspect_model(tiny_gpt2, config, "a test")
    (only,) = found.types
    assert (only.type, only.count, only.out_features, only.in_features) == (
        "c_fc",
        2,
        128,
        32,
    )  # Conv1D holds (in, out)
    assert found.left_out["transformer.h.0.attn.c_attn"] == "no target names it"
    assert found.num_trained == 1
    text = format_inspection(found, config.adapter)
    assert "would train 1 numbers (4 bytes in float32, 2 in bf16)" in text
    assert "shows only with the weights" in text


def test_memory_by_hand(tiny_llama: PreTrainedModel) -> None:
    config = RunConfig(
        adapter=AdapterConfig(rank=2, u=3),
        grpo=GrpoConfig(prompts_per_step=2, group_size=4),
        generation=GenerationConfig(max_new_tokens=10),
        train=TrainConfig(micro_batch_tokens=64),
    )
    memory = memory_estimate(tiny_llama, config, {"a": (32, 32), "b": (48, 32)}, itemsize=2, prompt_tokens=5)
    parameters = sum(p.numel() for p in tiny_llama.parameters())
    assert memory.weights == 2 * 2 * parameters  # bytes; the engine's packed copy
    plain = replace(config, generation=replace(config.generation, backend="transformers"))
    assert memory_estimate(tiny_llama, plain, {}, 2, 5).weights == 2 * parameters
    # U, S, V: float64, the layer's, the engine's and (B) the learner's float32, its three pieces in 2 bytes
    sides = sum(2 * (32 * (8 + 4 + 4 + 3 * 2) + out * (8 + 4 + 4 + 4 + 3 * 2)) for out in (32, 48))
    assert memory.adapter_factors == sides + 3 * 2 * 2 * ((8 + 4 + 4) * 2 + 4 * 7 * 3)  # P; the engine's of all maps
    assert memory.kv_cache == 8 * 15 * 2 * 3 * 2 * 8 * 2  # rows, length, K and V, layers, heads, head_dim, bytes
    need = activation_bytes(describe(tiny_llama), checkpointing=False)  # checked against a measured peak in test_packed
    assert memory.activations == need.fixed + 64 * need.a_token
    by_budget = replace(config, train=replace(config.train, micro_batch_tokens=0, memory_budget_gib=0.5))
    assert 0.99 * 2**29 < memory_estimate(tiny_llama, by_budget, {}, 2, 5).activations <= 2**29
    assert memory.total == memory.weights + memory.adapter_factors + memory.kv_cache + memory.activations
    less = replace(config, train=replace(config.train, gradient_checkpointing=True))
    assert memory_estimate(tiny_llama, less, {}, 2, 5).activations < memory.activations


def held(*things: Any) -> int:
    """Bytes of the tensors and arrays among these and below, each storage once."""
    found: dict[int, int] = {}

    def look(thing: Any) -> None:
        if isinstance(thing, torch.Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, np.ndarray):
            found[thing.ctypes.data] = thing.nbytes
        elif isinstance(thing, dict | list | tuple):
            for one in thing.values() if isinstance(thing, dict) else thing:
                look(one)
        elif isinstance(thing, Factors):
            look([thing.U, thing.S, thing.V])
        elif isinstance(thing, AdaptedLinear):
            look([thing.A, thing.B, thing.P])
        elif isinstance(thing, AdapterFactors):
            look([thing.A, thing.B])
        elif isinstance(thing, FrozenLinear):
            look([thing.A, thing.Bt, thing.A_pieces, thing.B_pieces])

    look(things)
    return sum(found.values())


@pytest.mark.parametrize("backend", ["native", "transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "method", [MethodConfig(name="lora-xs", rank=12), MethodConfig(name="lora-xs", rank=3), MethodConfig()], ids=str
)
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "k_proj")])
def test_all_copies_of_the_factors_count(
    tiny_llama: PreTrainedModel, method: MethodConfig, dtype: torch.dtype, backend: Any, targets: tuple[str, ...]
) -> None:
    """P of lora-xs has rank^4 numbers a module. It was counted once, in float32, and is held about four times."""
    model = tiny_llama.to(dtype)
    config = RunConfig(
        model=ModelConfig(device="cpu"), adapter=AdapterConfig(u=4, targets=targets), method=method,
        generation=GenerationConfig(backend=backend), train=TrainConfig(micro_batch_tokens=64),
    )  # fmt: skip
    adapter = put_method_on(model, method, config.adapter)
    assert isinstance(adapter, AttachedAdapter)
    engine = make_engine(model, backend=backend, context_length=128, adapter=adapter, say=quiet)
    learner = Learner(model, adapter)
    assert learner.packed is not None
    things: list[Any] = [
        adapter.factors,
        adapter.projections,
        adapter.layers,
        learner.packed.adapted,
        learner.packed.P,
    ]
    if backend == "native":
        assert isinstance(engine, NativeEngine)
        runner = engine._runner
        things += [runner._P, [p.factors for one in runner.layers for p in (one.qkv, one.o, one.gate_up, one.down)]]
    shapes = {path: tuple(adapter.base_weight(path).shape) for path in adapter.paths}
    said = memory_estimate(model, config, shapes, dtype.itemsize, 5, adapter.num_trained).adapter_factors  # type: ignore[arg-type]
    assert 0.75 < said / held(*things) < 1.1


def test_plan_by_hand() -> None:
    config = RunConfig(
        grpo=GrpoConfig(prompts_per_step=2, group_size=4, refill_factor=3.0),
        generation=GenerationConfig(max_new_tokens=10),
        train=TrainConfig(steps=100),
        eval=EvalConfig(every=50, num_validation=5, num_test=0),
    )
    speed = Speed(
        forward_tokens_per_second=10.0, learner_tokens_per_second=5.0, decode_tokens_per_second=4.0, decode_rows=8,
        threads=1, measured_on="paper", vector_seconds=0.5,
    )  # fmt: skip
    prompts = Prompts(tokens=20, shared=12, source="by hand")
    plan = make_plan(config, speed, prompts)
    assert plan.sampled_tokens == 100 * 8 * 10 and plan.sampled_tokens_with_all_refills == 3 * plan.sampled_tokens
    assert plan.learner_tokens == 100 * (12 + 2 * 8 + 8 * 10) == 10_800
    assert plan.evaluation_tokens == 3 * 5 * 10
    validation = 150 / 4 + (3 * 12 + 3 * 5 * 8) / 10
    sampling = 80 / 4 + 28 / 10
    seconds = 100 * (sampling + 108 / 5 + 0.5) + validation
    assert plan.hours == pytest.approx(seconds / 3600, rel=1e-12)
    assert plan.step_seconds == pytest.approx(sampling + 108 / 5 + 0.5)
    assert plan.step_seconds_at_half == pytest.approx(40 / 4 + 28 / 10 + (12 + 8 + 20) / 5 + 0.5)
    assert plan.hours_with_all_refills == pytest.approx((seconds + 2 * 100 * sampling) / 3600, rel=1e-12)
    final = make_plan(replace(config, eval=replace(config.eval, num_test=7, random_vectors=5)), speed, prompts)
    candidates = len(prompt_candidates(config))
    tokens = 150 + 10 * (7 * (2 + 2 + 4 + 1 + 5) + candidates * 5)
    assert final.evaluation_tokens == tokens
    replies = 15 + 7 * (2 + 2 + 1 + 1 + 5) + candidates * 5
    evaluation = tokens / 4 + ((3 + 11 + candidates) * 12 + replies * 8) / 10
    assert (final.hours - plan.hours) * 3600 == pytest.approx(evaluation - validation)
    kl = make_plan(replace(config, grpo=replace(config.grpo, kl_coef=0.1)), speed, prompts)
    assert kl.hours - plan.hours == pytest.approx(10_800 / 10 / 3600)  # one more forward pass
    assert "8,000 sampled (up to 24,000" in format_plan(speed, plan)
    scored = replace(config, train=replace(config.train, algorithm="npg"))
    few, many = (make_plan(scored, speed, prompts, numbers) for numbers in (13, 210))
    assert few.learner_tokens == 100 * (math.ceil(14 * 28 / 3) + 80)  # a forward tangent a number: 28 tokens in all
    assert many.learner_tokens == 100 * (8 * 20 + 80)  # or a prompt for each reply
    sft = make_plan(replace(config, train=replace(config.train, algorithm="sft")), speed, prompts)
    assert sft.sampled_tokens == sft.sampled_tokens_with_all_refills == 0
    assert sft.learner_tokens == 100 * (12 + 8 * 8 + 8 * 10)  # every reply has its own question
    assert sft.step_seconds == pytest.approx(156 / 5 + 0.5)
    assert sft.step_seconds_at_half == pytest.approx(116 / 5 + 0.5)
    assert "reference replies" in format_plan(speed, sft) and "refill" not in format_plan(speed, sft)


def test_prompts_that_begin_alike_are_said_to(tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(f'{{"question": "{a} + 1", "answer": "{a + 1}"}}\n' for a in range(1000, 1100)))
    config = RunConfig(task=TaskConfig(name="jsonl", path=str(file)))
    config = replace(config, prompt=replace(config.prompt, system="x" * 400, template="{question}", chat=False))
    prompts = prompts_of(config)
    assert prompts.shared == 100 + 2  # 400 characters, and the digits 10 of every question
    assert prompts.tokens == 106  # five digits and the three characters of " + "
    assert prompts.together(3) == 102 + 3 * 4


def test_shapes_and_weights_agree(runtime: Runtime) -> None:
    by_weights, speed, plan = inspect_weights(runtime, quiet)
    by_shapes, block_speed, block_plan = inspect_shapes(runtime.config, quiet)
    assert by_weights.gaps_checked and not by_shapes.gaps_checked
    for name in ("num_parameters", "num_modules", "types", "groups", "num_trained", "left_out"):
        assert getattr(by_weights, name) == getattr(by_shapes, name), name
    # The loaded model has its adapter on, whose few numbers a token are kept for the backward pass, too.
    assert by_shapes.memory.activations == pytest.approx(by_weights.memory.activations, rel=0.05)
    assert replace(by_shapes.memory, activations=0) == replace(by_weights.memory, activations=0)
    assert by_weights.num_modules == 21 and by_weights.num_trained == 3
    assert plan.sampled_tokens == block_plan.sampled_tokens
    assert min(speed.forward_tokens_per_second, block_speed.decode_tokens_per_second) > 0


def test_an_unknown_model_is_one_sentence() -> None:
    with pytest.raises(UserError, match="no model is named 'nonsense'"):
        shape_model(ModelConfig(name="nonsense"))


def test_bytes_in_words() -> None:
    assert [format_bytes(n) for n in (52, 1500, 269_030_016)] == ["52 bytes", "1.5 kB", "269.0 MB"]


def _numpy_log_softmax(logits: Any) -> Any:
    z = np.asarray(logits, dtype=np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_completion_logprobs_equal_single_rows(tiny_llama: PreTrainedModel) -> None:
    adapter = attach(tiny_llama, AdapterConfig(n_tie=8))
    v = random_vector(adapter.num_groups, 1, 0.7, seed=3)
    pairs = [([5, 6, 7], [8, 9]), ([11], [12, 13, 14, 15]), ([20, 21, 22, 23, 24], [2])]
    with torch.inference_mode():
        got = completion_logprobs(tiny_llama, adapter, pairs, v)
        expected = []
        for prompt, completion in pairs:
            with adapter.using(v):
                logits = tiny_llama(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
            expected.append(_numpy_log_softmax(logits)[len(prompt) - 1 : -1])
    np.testing.assert_allclose(got.numpy(), np.concatenate(expected), atol=2e-5)
    with torch.inference_mode():
        base = completion_logprobs(tiny_llama, adapter, pairs, None)
    assert not np.allclose(base.numpy(), got.numpy(), atol=1e-2)  # the vector does something here


def test_pairs_come_in_parts_whose_padded_logits_fit() -> None:
    lengths = [3, 3, 3, 9, 1, 40, 2, 2]
    pairs = [([0], [0] * (length - 1)) for length in lengths]
    parts = list(in_parts(pairs, 100, logit_bytes=4 * 100 * 10))  # ten tokens
    assert [[len(p) + len(c) for p, c in part] for part in parts] == [[3, 3, 3], [9], [1], [40], [2, 2]]
    assert [pair for part in parts for pair in part] == pairs
    assert list(in_parts([], 100)) == []


def test_divergence_is_the_sum_over_rows_by_numpy() -> None:
    base, tuned = (torch.randn(150, 7, generator=torch.Generator().manual_seed(i)).log_softmax(-1) for i in (0, 1))
    p, q = base.double().numpy(), tuned.double().numpy()
    assert divergence(base, tuned) == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=1e-6)
    assert divergence(base, base) == 0


def test_random_vectors_have_their_norm_and_one_direction_a_seed() -> None:
    short, long = random_vector(13, 2, 0.1, 7), random_vector(13, 2, 1.0, 7)
    assert short.shape == (13, 2) and short.dtype == torch.float32
    assert float(short.norm()) == pytest.approx(0.1, rel=1e-6)
    assert torch.allclose(10 * short, long, atol=1e-6)
    assert not torch.allclose(random_vector(13, 2, 0.1, 8), short, atol=1e-3)


def test_landscape_rows(runtime: Runtime) -> None:
    rows = landscape(runtime, [1e-4, 0.5], num_vectors=2, num_items=4, seed=0, say=quiet)
    assert [(r.norm, r.vector) for r in rows] == [(0.0, 0), (1e-4, 0), (1e-4, 1), (0.5, 0), (0.5, 1)]
    assert rows[0].kl == 0.0
    assert max(r.kl for r in rows[1:3]) < 1e-3 * min(r.kl for r in rows[3:])  # KL grows with the square of the norm
    assert all(0 <= r.strict <= r.value_only <= 1 and r.num_items == 4 for r in rows)
    lines = format_landscape(rows).splitlines()
    assert len(lines) == 2 + len(rows) and "base" in lines[2]


@pytest.mark.parametrize("norms", [[], [0.0], [float("nan")], [-1.0]])
def test_landscape_refuses_norms(runtime: Runtime, norms: list[float]) -> None:
    with pytest.raises(UserError, match="--norms must be finite numbers above 0"):
        landscape(runtime, norms, 1, 1, 0, quiet)
