"""An adapter in any form, put on a base: the right one, exactly as it was, or an error in words."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

import tinylora
from tinylora.adapter import check as check_module
from tinylora.adapter.attach import AttachedAdapter, attach
from tinylora.adapter.check import agrees, basis_check
from tinylora.adapter.code import to_code
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.factors import Factors
from tinylora.config.run import ModelConfig, RunConfig
from tinylora.errors import UserError
from tinylora.methods.put_on import completed, put_on
from tinylora.models.bases import remember
from tinylora.models.fingerprint import identify
from tinylora.models.load import load_base_model
from tinylora.store.adapter import Adapter, is_adapter, open_adapter
from tinylora.store.adapter_file import BEST, save_vector
from tinylora.store.arithmetic import difference, mix

IDS = torch.arange(3, 27).reshape(2, 12)
pytestmark = pytest.mark.usefixtures("fresh_cache")


def portable(model: PreTrainedModel, seed: int = 0, **config: object) -> tuple[Adapter, torch.Tensor]:
    """An adapter made on this model, complete, and the logits under it."""
    settings = AdapterConfig(**config)  # type: ignore[arg-type]
    attached = attach(model, settings)
    v = 0.4 * torch.randn(attached.num_groups, settings.u, generator=torch.Generator().manual_seed(seed))
    attached.write(v)
    with torch.no_grad():
        logits = model(IDS).logits
    made = completed(Adapter(label="made", v=v, config=settings), attached, identify(model))
    attached.detach()
    return made, logits


def code_of(adapter: Adapter) -> str:
    return to_code(adapter.to_portable().to_bytes())


@pytest.mark.parametrize(
    "config", [{"num_groups": 3}, {"tying": "structured", "n_tie": 2}, {"basis": "random"}, {"basis": "sketch", "u": 2}]
)
def test_a_code_gives_the_same_model(tiny_llama: PreTrainedModel, config: dict[str, object]) -> None:
    made, logits = portable(tiny_llama, **config)
    attached = tinylora.load_adapter(tiny_llama, code_of(made))
    with torch.no_grad():
        assert torch.equal(tiny_llama(IDS).logits, logits)
    attached.detach()


def test_a_float32_and_a_bfloat16_load_of_one_checkpoint_take_the_same_code(tiny_llama: PreTrainedModel) -> None:
    tiny_llama.to(torch.bfloat16)
    made, _ = portable(tiny_llama)
    attached = tinylora.load_adapter(tiny_llama, code_of(made))
    low = {path: attached.delta(path) for path in attached.paths}
    attached.detach()
    attached = tinylora.load_adapter(tiny_llama.float(), code_of(made))
    for path, delta in low.items():
        torch.testing.assert_close(attached.delta(path), delta, rtol=1e-12, atol=0)


def test_another_base_is_refused_and_the_flag_overrides(
    tiny_llama: PreTrainedModel, tiny_qwen2: PreTrainedModel
) -> None:
    made, _ = portable(tiny_llama, n_tie=100)
    with torch.no_grad():
        tiny_llama.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    for model, words in (
        (tiny_llama, "the same architecture and shapes, but other weights"),
        (tiny_qwen2, "another architecture"),
    ):
        with pytest.raises(UserError, match=f"was made for another base than this one: {words}.* or --other-base"):
            put_on(model, made)
        assert not any("AdaptedLinear" in type(m).__name__ for m in model.modules())
    assert torch.equal(put_on(tiny_llama, made, other_base=True).read(), made.v)
    assert torch.equal(tinylora.load_adapter(tiny_qwen2, code_of(made), other_base=True).read(), made.v)


def test_a_basis_that_came_out_differently_is_an_error(
    tiny_llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sign rule gone wrong in one module: the numbers would mean something else."""
    made, _ = portable(tiny_llama)
    from tinylora.adapter import basis

    real = basis.svd_factors
    calls = []

    def flipped(weight: torch.Tensor, rank: int) -> Factors:
        f = real(weight, rank)
        calls.append(1)
        if len(calls) != 4:
            return f
        return dataclasses.replace(f, U=f.U * torch.tensor([1.0, -1.0]), V=f.V * torch.tensor([1.0, -1.0]))

    monkeypatch.setattr(basis, "svd_factors", flipped)
    with pytest.raises(UserError, match="is not what it was trained from .*check disagrees"):
        put_on(tiny_llama, made)
    assert not any("AdaptedLinear" in type(m).__name__ for m in tiny_llama.modules())


def test_the_check_sees_what_matters_and_nothing_else(tiny_llama: PreTrainedModel) -> None:
    attached = attach(tiny_llama, AdapterConfig(rank=3))
    paths, factors, P, groups = attached.paths, attached.factors, attached.projections, attached.groups
    check = basis_check(paths, factors, P, groups)
    assert len(check) == 4

    def with_factor(path: str, **changes: torch.Tensor) -> dict[str, Factors]:
        return {**factors, path: dataclasses.replace(factors[path], **changes)}

    generator = torch.Generator().manual_seed(0)
    noisy = {
        p: dataclasses.replace(
            f, U=f.U + 2e-8 * torch.randn(f.U.shape, generator=generator),
            V=f.V + 2e-8 * torch.randn(f.V.shape, generator=generator),
            S=f.S * (1 + 1e-9),
        )
        for p, f in factors.items()
    }  # fmt: skip
    assert agrees(check, paths, noisy, P, groups)
    for path in paths:
        f = factors[path]
        assert not agrees(check, paths, with_factor(path, U=-f.U, V=-f.V), P, groups)
        assert not agrees(check, paths, with_factor(path, V=f.V[:, [0, 2, 1]], U=f.U[:, [0, 2, 1]]), P, groups)
        assert not agrees(check, paths, with_factor(path, S=f.S * 1.1), P, groups)
        assert not agrees(check, paths, factors, {**P, path: np.nextafter(P[path], 9)}, groups)
    assert not agrees(check, paths[1:], factors, P, groups[1:])
    assert not agrees(check, paths, factors, P, [0, *groups[1:-1], 7])
    assert check_module._margin(check_module._forms(paths, factors), check[0] >> 4) > 1e-6


def test_forms_of_an_adapter(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    made, _ = portable(tiny_llama)
    data = made.to_portable().to_bytes()
    (tmp_path / "a.tinylora").write_bytes(data)
    (tmp_path / "other.name").write_bytes(data)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "adapter.tinylora").write_bytes(data)
    run = RunConfig(model=ModelConfig(name="somewhere"))
    (tmp_path / "run").mkdir()
    assert made.fingerprint is not None
    facts = {"fingerprint": made.fingerprint.hex(), "basis_check": made.check.hex()}
    save_vector(tmp_path / "run" / BEST, made.v, run, facts)
    references = [
        code_of(made),
        code_of(made).lower(),
        *(str(tmp_path / n) for n in ("a.tinylora", "other.name", "hub", "run", f"run/{BEST}")),
    ]
    for reference in references:
        opened = open_adapter(reference)
        assert torch.equal(opened.v, made.v)
        assert opened.config == made.config and opened.fingerprint == made.fingerprint and opened.check == made.check
        assert len(opened.label) < 300
        assert is_adapter(reference) or reference.endswith("other.name")
    assert open_adapter(references[0]).label == f"{references[0][:12]}...{references[0][-6:]}"
    assert open_adapter(str(tmp_path / "run")).base_name == "somewhere"
    assert not is_adapter("smollm2-135m-instruct") and not is_adapter(str(tmp_path.parent))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "there is no adapter"),
        ("a.tinylora", b"", "is no tinylora adapter file"),
        ("a.safetensors", b"", "is damaged or no adapter file"),
        ("a.safetensors", b"\xff" * 64, "is damaged or no adapter file"),
        ("a.bin", b"\x80\x04pickle", "is damaged or no adapter file"),
        ("TINY-123", None, "one is missing|no adapter has so many"),
    ],
)
def test_what_is_no_adapter_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_adapter(name if name.startswith("TINY") else str(tmp_path / name))


def test_folders_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no adapter"):
        open_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a PEFT adapter; import it first"):
        open_adapter(tmp_path)


def test_the_base_of_a_code_is_found_again(tiny_folder: Path) -> None:
    base = load_base_model(str(tiny_folder), device="cpu", dtype="float32")
    made, _ = portable(base.model)  # type: ignore[arg-type]
    opened = open_adapter(code_of(made))
    assert opened.base_name == ""
    with pytest.raises(UserError, match="has not been seen on this machine; name it with --model"):
        opened.settings()
    remember(base)
    assert opened.base_name == str(tiny_folder.resolve())
    settings = opened.settings()
    assert (settings.model.name, settings.adapter) == (str(tiny_folder.resolve()), made.config)
    assert opened.settings("elsewhere").model.name == "elsewhere"


# --- arithmetic ---


def test_difference_and_mix(tiny_llama: PreTrainedModel, tiny_qwen2: PreTrainedModel) -> None:
    (a, _), (b, _) = portable(tiny_llama, seed=1), portable(tiny_llama, seed=2)
    x, y = a.v.double().numpy(), b.v.double().numpy()
    found = difference(a, b)
    assert found.distance == pytest.approx(np.linalg.norm(x - y))
    assert found.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    group, place, p, q = found.largest
    assert (p, q) == (x[group, place], y[group, place]) and abs(p - q) == np.abs(x - y).max()
    mixed = mix([a, b], [0.25, 2.0])
    np.testing.assert_allclose(mixed.v.numpy(), 0.25 * x + 2 * y, rtol=1e-6)
    assert torch.equal(put_on(tiny_llama, mixed).read(), mixed.v)  # fingerprint and check came along
    for other in (portable(tiny_qwen2)[0], dataclasses.replace(b, config=AdapterConfig(seed=1))):
        with pytest.raises(UserError, match="different bases of update|different base models"):
            mix([a, other], [0.5, 0.5])
    for weights in ([1.0], [float("nan"), 1.0]):
        with pytest.raises(UserError, match="one weight for each|must be finite"):
            mix([a, b], weights)
    with pytest.raises(UserError, match="too large"):
        mix([a, b], [1e39, 1e39])


# --- inside other training loops ---


def test_v_as_a_parameter(tiny_llama: PreTrainedModel) -> None:
    attached = attach(tiny_llama, AdapterConfig(num_groups=3))
    parameter = attached.as_parameter()
    assert [n for n, p in tiny_llama.named_parameters() if p.requires_grad] == ["tinylora_v"]
    assert attached.as_parameter() is parameter
    attached.write(torch.ones(3, 1))
    assert torch.equal(parameter.data, torch.ones(3, 1))
    with attached.using(None):
        assert not attached.read().any()
        assert torch.equal(parameter.data, torch.ones(3, 1))
    assert attached.vector.value is parameter
    loss = tiny_llama(IDS, labels=IDS).loss
    loss.backward()
    assert parameter.grad is not None and parameter.grad.abs().min() > 0
    with attached.lifted() as bare:
        assert not any("tinylora" in n or ".base." in n for n, _ in bare.named_parameters())
    assert dict(tiny_llama.named_parameters())["tinylora_v"] is parameter
    attached.detach()
    assert "tinylora_v" not in dict(tiny_llama.named_parameters())


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(3 + i % 4, 15 + i % 4)
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def frozen(model: PreTrainedModel, attached: AttachedAdapter) -> list[torch.Tensor]:
    return [attached.base_weight(path).clone() for path in attached.paths]


def test_transformers_trainer_trains_v_alone(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    attached = attach(tiny_llama, AdapterConfig(num_groups=3))
    before, parameter = frozen(tiny_llama, attached), attached.as_parameter()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=40, learning_rate=0.2, per_device_train_batch_size=4, report_to=[], save_strategy="no",
        use_cpu=True, logging_steps=4, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(model=tiny_llama, args=arguments, train_dataset=Rows())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    assert parameter.abs().min() > 0 and attached.vector.value is parameter
    assert all(torch.equal(a, b) for a, b in zip(before, frozen(tiny_llama, attached), strict=True))


def test_trl_grpo_trains_v_alone(tiny_llama: PreTrainedModel, tiny_tokenizer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    import warnings

    from datasets import Dataset

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own, about versions and experimental parts
        from trl import GRPOConfig, GRPOTrainer

        attached = attach(tiny_llama, AdapterConfig(num_groups=3))
        before, parameter = frozen(tiny_llama, attached), attached.as_parameter()
        tiny_tokenizer.pad_token = tiny_tokenizer.pad_token or tiny_tokenizer.eos_token
        arguments = GRPOConfig(
            str(tmp_path), max_steps=2, learning_rate=0.05, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=6, report_to=[], save_strategy="no", use_cpu=True, bf16=False, beta=0.0,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=tiny_llama, args=arguments, processing_class=tiny_tokenizer,
            reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
            train_dataset=Dataset.from_dict({"prompt": ["one", "two", "three", "four"]}),
        )  # fmt: skip
        trainer.train()
    assert parameter.abs().max() > 0 and attached.vector.value is parameter
    assert all(torch.equal(a, b) for a, b in zip(before, frozen(tiny_llama, attached), strict=True))
