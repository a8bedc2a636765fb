"""Base models: any causal language model of transformers, frozen, from a name.

The name is an existing path, an embedded model, or a hub id (`names.py`). What comes back is the same thing in all
cases: a model in eval mode that nothing trains, its tokenizer, and the facts about them that the rest of the package
needs.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from tinylora.adapter.quantised import keep_differentiable
from tinylora.errors import UserError
from tinylora.models.base import BaseModel
from tinylora.models.damage import explain, refuse_damaged
from tinylora.models.embedded import EMBEDDED, embedded_file
from tinylora.models.gguf import converted_folder
from tinylora.models.hub import hub_folder
from tinylora.models.loading_report import heard_misfits, refuse_missing, say_unexpected
from tinylora.models.names import Source, refuse_adapter, resolve_name, weight_files
from tinylora.models.prompt import encode_prompt
from tinylora.models.quantise import (
    check_quantisation,
    let_go_of_file,
    own_mappings,
    refuse_broken_rows,
    transformers_config,
)
from tinylora.models.quiet import quiet
from tinylora.models.shards import check_shards
from tinylora.models.sizes import bits_of, check_sizes, larger_than_files
from tinylora.system.device import resolve_device, resolve_dtype
from tinylora.system.digest import remembered_sha256

__all__ = ["BaseModel", "encode_prompt", "load_base_model"]

# Tokens that end an answer beside the tokenizer's own eos: chat models end a turn with one token and a document with
# another, generation configs often name both, and a GGUF file only ever names one.
ALSO_STOPS = {
    "<|im_end|>": ("<|endoftext|>",),
    "<|eot_id|>": ("<|end_of_text|>", "<|eom_id|>"),
    "<end_of_turn>": ("<eos>",),
}
NO_LIMIT = 2**31 - 1
"""Context length of a model that states none."""


def load_base_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str = "",
    trust_remote_code: bool = False,
    quantization: str = "none",
) -> BaseModel:
    """Load a model by name, in eval mode and with no gradients; its linear maps quantised on the way (quantise.py).

    Raises: UserError, one sentence, for a missing or damaged model, an unknown architecture, a model that is no causal
    language model, a wrong checksum, a PEFT adapter beside the model, a hub that cannot be reached, a device that is
    not there, or a quantisation that does not go with it.
    """
    source = resolve_name(name)
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    if revision and source.kind != "hub":
        raise UserError(
            f"model.revision is {revision!r}, but only hub models have revisions and {name} is {source.kind}"
        )

    if quantization != "none":
        check_quantisation(quantization, source, torch_device)
    folder, commit, sha256 = _local_folder(source, revision, trust_remote_code)
    model, tokenizer = _load(source, folder, torch_dtype, trust_remote_code, quantization, torch_device)
    if quantization == "none":  # quantised ones were put there, and some of them cannot be moved
        model.to(torch_device)
    elif torch_device.type == "cpu":
        let_go_of_file(model)
    if torch_device.type == "cpu":
        refuse_broken_rows(model, name)  # of a checkpoint that was quantised already, too
    model.eval().requires_grad_(False)
    keep_differentiable(model)
    stops = _stop_token_ids(model, tokenizer)
    return BaseModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        kind=source.kind,
        files=weight_files(folder),
        revision=commit,
        sha256=sha256,
        device=torch_device,
        dtype=torch_dtype,
        context_length=_context_length(model, tokenizer),
        stop_token_ids=stops,
        pad_token_id=next(iter(_ids(tokenizer.pad_token_id) + stops), 0),
        has_chat_template=bool(tokenizer.chat_template),
        quantization=quantization,
    )


def _local_folder(source: Source, revision: str, trust_remote_code: bool) -> tuple[Path, str, str]:
    """The transformers folder of any kind of model, its commit on the hub, and the SHA-256 of its GGUF file."""
    if source.kind == "hub":
        return *hub_folder(source.name, revision, trust_remote_code), ""
    if source.kind == "embedded":
        gguf, sha256 = embedded_file(source.name), EMBEDDED[source.name].sha256
        return converted_folder(gguf, sha256), "", sha256
    assert source.path is not None
    if source.kind == "gguf":
        sha256 = remembered_sha256(source.path)
        return converted_folder(source.path, sha256), "", sha256
    refuse_adapter(
        source.path, source.name, "move its adapter_* files into another folder, or merge it and give the merged model"
    )
    return source.path, "", ""


def _load(
    source: Source, folder: Path, dtype: torch.dtype, trust_remote_code: bool, quantization: str, device: torch.device
) -> tuple[Any, Any]:
    """Model and tokenizer of a transformers folder; a quantised model is on its device already."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

    code = {"trust_remote_code": trust_remote_code}
    packed: dict[str, Any] = {}
    if quantization != "none":
        packed = {"quantization_config": transformers_config(quantization, dtype), "device_map": {"": device}}
    misfits: list[str] = []
    try:
        with quiet(), heard_misfits(misfits), own_mappings() if packed else nullcontext():
            refuse_damaged(source, folder, "generation_config.json")  # which transformers would pass over
            check_shards(source.name, folder)
            check_sizes(source.name, PreTrainedConfig.get_config_dict(folder)[0])
            config = AutoConfig.from_pretrained(folder, **code)
            _check_causal(source, config, trust_remote_code)
            if packed and getattr(config, "quantization_config", None):
                raise UserError(
                    f"{source.name} is quantised already, and model.quantization = {quantization} would quantise it "
                    "again; set it to none (and method qlora to lora, which is the same on such a base), or give the "
                    "checkpoint that it was made from"
                )
            tokenizer = AutoTokenizer.from_pretrained(folder, **code)
            checked = bool(weight_files(folder)) and not trust_remote_code
            if checked and (reason := larger_than_files(config, bits_of(folder))):
                refuse_damaged(source, folder)
                raise UserError(f"the model {source.name} {reason}")
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, **code, **packed
            )
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise nearly anything on a damaged file
        explain(source, error, folder, misfits)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            f"transformers has put a PEFT adapter on {source.name}, which was to be the base alone; give the model "
            "without its adapter"
        )
    refuse_missing(source.name, report)
    say_unexpected(source.name, report)
    return model, tokenizer


def _check_causal(source: Source, config: Any, trust_remote_code: bool) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    known = config.model_type in CAUSAL
    causal = set(CAUSAL.values())
    stated = getattr(config, "architectures", None) or []
    if trust_remote_code and not known:
        return
    # The auto class would give BERT a new, untrained head; what the checkpoint says of itself decides.
    if not known or (stated and not any(name in causal or name.endswith("ForCausalLM") for name in stated)):
        raise UserError(
            f"{source.name} is not a causal language model (model type {config.model_type}, "
            f"{', '.join(stated) or 'no architecture named'}); give a model that generates text"
        )


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


def _stop_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    stops = _ids(tokenizer.eos_token_id) + _ids(getattr(model.generation_config, "eos_token_id", None))
    vocabulary = tokenizer.get_vocab()
    # From the vocabulary itself: convert_tokens_to_ids answers with the unknown token for a word it does not have.
    extra = tuple(vocabulary[t] for t in ALSO_STOPS.get(str(tokenizer.eos_token), ()) if t in vocabulary)
    return tuple(dict.fromkeys(stops + extra))


def _context_length(model: Any, tokenizer: Any) -> int:
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # A tokenizer without a limit states 1e30; a model with relative positions may state none.
    return int(stated) if stated else int(min(tokenizer.model_max_length, NO_LIMIT))
