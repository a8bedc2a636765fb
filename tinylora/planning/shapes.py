"""A model as shapes without weights: known ones need neither files nor network."""

from typing import Any

import torch
from torch import nn

from tinylora.config.run import ModelConfig
from tinylora.errors import UserError
from tinylora.models.quiet import quiet
from tinylora.models.sizes import check_sizes


def _dims(
    vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool
) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
    }


# Dimensions from the publishers' config.json, so that their recipes can be planned without network.
KNOWN_SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m-instruct": ("llama", _dims(49152, 576, 1536, 30, 9, 3, True)),
    "Qwen/Qwen2.5-0.5B-Instruct": ("qwen2", _dims(151936, 896, 4864, 24, 14, 2, True)),
    "Qwen/Qwen2.5-1.5B-Instruct": ("qwen2", _dims(151936, 1536, 8960, 28, 12, 2, True)),
    "Qwen/Qwen2.5-3B-Instruct": ("qwen2", _dims(151936, 2048, 11008, 36, 16, 2, True)),
    "Qwen/Qwen2.5-7B-Instruct": ("qwen2", _dims(152064, 3584, 18944, 28, 28, 4, False)),
    "meta-llama/Llama-3.2-1B-Instruct": ("llama", _dims(128256, 2048, 8192, 16, 32, 8, True)),
    "meta-llama/Llama-3.2-3B-Instruct": ("llama", _dims(128256, 3072, 8192, 28, 24, 8, True)),
    "meta-llama/Llama-3.1-8B-Instruct": ("llama", _dims(128256, 4096, 14336, 32, 32, 8, False)),
}


def shape_model(config: ModelConfig) -> tuple[nn.Module, str]:
    """The model on the meta device (shapes, no weights) and what it was read from.

    A model of KNOWN_SHAPES needs neither files nor network. Other hub ids fetch config.json only; a GGUF file is
    unpacked once. Raises: UserError for a model that is missing or not known.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

    from tinylora.models.damage import explain
    from tinylora.models.hub import hub_folder
    from tinylora.models.load import _local_folder
    from tinylora.models.names import resolve_name

    source = resolve_name(config.name)
    if source.path is None and config.name in KNOWN_SHAPES:
        kind, dims = KNOWN_SHAPES[config.name]
        model_config, origin = AutoConfig.for_model(kind, **dims), "its known dimensions, nothing was loaded"
    else:
        folder = None
        try:
            with quiet():
                where: dict[str, Any] = {"revision": config.revision or None} if source.kind == "hub" else {}
                if source.kind != "hub":
                    folder, _, _ = _local_folder(source, config.revision, config.trust_remote_code)
                found = folder or source.name
                check_sizes(source.name, PreTrainedConfig.get_config_dict(found, **where)[0])
                model_config = AutoConfig.from_pretrained(found, trust_remote_code=config.trust_remote_code, **where)
        except (UserError, MemoryError):
            raise
        except Exception as error:  # libraries raise nearly anything on a damaged file
            if source.kind == "hub":  # says in its own words that the hub cannot be reached, or has no such model
                folder, _ = hub_folder(source.name, config.revision, config.trust_remote_code)
            explain(source, error, folder)
        origin = "its config.json"
    try:
        with torch.device("meta"), quiet():
            return AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.trust_remote_code), origin
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{config.name} is not a causal language model that transformers knows ({reason})") from error
