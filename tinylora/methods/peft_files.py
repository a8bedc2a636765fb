"""A trained method as PEFT's own adapter folder, for those that are PEFT's."""

import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from tinylora.methods.one_vector import MethodAdapter
from tinylora.system.files import write_atomically


def write_peft_adapter(folder: Path, adapter: MethodAdapter, v: Tensor, *, base_name: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json, which PeftModel.from_pretrained reads.

    The file holds the parameters themselves (start + v). Raises: OSError where it cannot be written.
    """
    from peft.utils import get_peft_model_state_dict

    (name,) = adapter.peft_model.peft_config
    config = adapter.peft_model.peft_config[name]
    config.base_model_name_or_path = base_name
    config.inference_mode, config.task_type = True, "CAUSAL_LM"
    with adapter.using(v):
        state = get_peft_model_state_dict(adapter.peft_model, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    write_atomically(folder / "adapter_config.json", (json.dumps(settings, indent=2, default=str) + "\n").encode())
