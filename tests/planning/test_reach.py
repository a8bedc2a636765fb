"""Which weights are adapted and which are not: counted by hand from the shapes, for each kind that there is."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import ByteTask, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tinylora.adapter.attach import adapted_paths
from tinylora.adapter.config import AdapterConfig
from tinylora.config.method import MethodConfig
from tinylora.config.run import RunConfig
from tinylora.methods.build import put_method_on
from tinylora.planning.inspection import format_inspection, inspect_model
from tinylora.planning.reach import NotAdapted, reach
from tinylora.training.train import train

SIZES = {
    "vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "eos_token_id": 2, "max_position_embeddings": 128, "bos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def _mixtral(**more: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **SIZES, intermediate_size=48, num_local_experts=4, **more)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _rest(model: PreTrainedModel, **config: Any) -> dict[str, NotAdapted]:
    found = reach(model, adapted_paths(model, AdapterConfig(**config))[1])
    total = sum(parameter.numel() for parameter in model.parameters())
    left = sum(one.weights for one in found.not_adapted)
    assert found.adapted_share == pytest.approx(1 - left / total)
    assert all(one.share == pytest.approx(one.weights / total) for one in found.not_adapted)
    return {one.name: one for one in found.not_adapted}


def test_the_experts_of_a_mixture_are_named_with_their_share() -> None:
    """They are most of the weights, and no nn.Linear: `inspect` said that all but the output head is adapted."""
    model = _mixtral()
    rest = _rest(model)
    gate_up = rest["model.layers.*.mlp.experts.gate_up_proj"]
    assert (gate_up.kind, gate_up.count, gate_up.weights) == ("experts", 2, 2 * 4 * 2 * 48 * 32)
    down = rest["model.layers.*.mlp.experts.down_proj"]
    assert (down.kind, down.weights) == ("experts", 2 * 4 * 48 * 32)
    router = rest["model.layers.*.mlp.gate.weight"]
    assert (router.kind, router.weights) == ("other weights", 2 * 4 * 32)
    assert (rest["lm_head.weight"].kind, rest["lm_head.weight"].weights) == ("output head", 259 * 32)
    assert rest["model.embed_tokens.weight"].kind == "embeddings"
    assert rest["model.norm.weight"].kind == "norms and biases"
    config = RunConfig(adapter=AdapterConfig(n_tie=8))
    text = format_inspection(inspect_model(model, config, "a test"), config.adapter)
    total = sum(parameter.numel() for parameter in model.parameters())
    share = 100 * 2 * (32 * 32 * 2 + 2 * 16 * 32) / total
    experts = 100 * 2 * 4 * 3 * 48 * 32 / total
    assert f"adapted are maps with {share:.1f} % of the weights; not adapted: experts {experts:.1f} % (model." in text


def test_tied_embeddings_count_once_and_biases_are_not_forgotten(tiny_qwen2: PreTrainedModel) -> None:
    rest = _rest(tiny_qwen2)
    (tied,) = [one for one in rest.values() if one.kind == "embeddings and output head"]
    assert (tied.count, tied.weights) == (1, 259 * 32)
    assert rest["model.layers.*.self_attn.q_proj.bias"].weights == 2 * 32
    assert not any(one.kind == "linear maps" for one in rest.values())
    few = _rest(tiny_qwen2, targets=("q_proj",))
    assert (few["model.layers.*.mlp.up_proj.weight"].kind, few["model.layers.*.mlp.up_proj.weight"].count) == (
        "linear maps",
        2,
    )


def test_maps_that_store_their_weight_the_other_way_round_are_maps(tiny_gpt2: PreTrainedModel) -> None:
    assert {one.kind for one in _rest(tiny_gpt2).values()} == {
        "embeddings",
        "embeddings and output head",
        "norms and biases",
    }


def test_convolutions_are_told_apart() -> None:
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **sizes))
    rest = _rest(model)
    assert rest["backbone.layers.*.mixer.conv1d.weight"].kind == "convolutions"
    assert rest["backbone.layers.*.mixer.A_log"].kind == "other weights"


@pytest.mark.parametrize("name", ["tinylora", "lora-xs", "adapter", "lora"])
def test_a_model_that_holds_its_adapter_says_the_same(tiny_llama: PreTrainedModel, name: Any) -> None:
    before = reach(tiny_llama, adapted_paths(tiny_llama, AdapterConfig())[1])
    adapter = put_method_on(tiny_llama, MethodConfig(name=name, rank=2), AdapterConfig())
    with adapter.using(None):
        after = reach(tiny_llama, adapter.paths)
    if name != "adapter":  # its layers stand behind some maps alone
        assert after == before
    assert sum(one.weights for one in after.not_adapted) < sum(p.numel() for p in tiny_llama.parameters())


def test_a_run_says_it_before_it_begins(tmp_path: Path, fresh_cache: Path, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "mixture"
    _mixtral().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    told: list[str] = []
    config = tiny_config(folder, train={"steps": 1})
    train(dataclasses.replace(config), ByteTask(), out=tmp_path / "runs", say=told.append)
    (line,) = [text for text in told if text.startswith("adapted are maps with")]
    assert "not adapted: experts " in line and "experts.gate_up_proj" in line
