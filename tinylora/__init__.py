"""tinylora: fine-tune a language model by training 1 to a few hundred numbers, and prove what that did."""

from typing import TYPE_CHECKING, Any

from tinylora.system import noise

if TYPE_CHECKING:
    from tinylora.adapter.attach import attach
    from tinylora.adapter.config import AdapterConfig
    from tinylora.config.recipe import load_recipe
    from tinylora.errors import UserError
    from tinylora.methods.put_on import load_adapter
    from tinylora.models.load import load_base_model
    from tinylora.store.adapter import open_adapter
    from tinylora.store.adapter_file import load_vector
    from tinylora.tasks import build_task
    from tinylora.tasks.config import PromptConfig, TaskConfig
    from tinylora.training.train import resume, train

noise.drop()
__version__ = "0.1.0"
__all__ = [
    "AdapterConfig",
    "PromptConfig",
    "TaskConfig",
    "UserError",
    "attach",
    "build_task",
    "load_adapter",
    "load_base_model",
    "load_recipe",
    "load_vector",
    "open_adapter",
    "resume",
    "train",
]

_HOMES = {
    "AdapterConfig": "tinylora.adapter.config",
    "PromptConfig": "tinylora.tasks.config",
    "TaskConfig": "tinylora.tasks.config",
    "UserError": "tinylora.errors",
    "attach": "tinylora.adapter.attach",
    "build_task": "tinylora.tasks",
    "load_adapter": "tinylora.methods.put_on",
    "load_base_model": "tinylora.models.load",
    "load_recipe": "tinylora.config.recipe",
    "load_vector": "tinylora.store.adapter_file",
    "open_adapter": "tinylora.store.adapter",
    "resume": "tinylora.training.train",
    "train": "tinylora.training.train",
}


def __getattr__(name: str) -> Any:
    # Looked up on first use: importing tinylora, as every `tinylora --help` does, must not import torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'tinylora' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
