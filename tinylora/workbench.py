"""What train, eval, chat and inspect all need, opened once: model, adapter at v = 0, engine, task."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from tinylora.adapter.attach import AttachedAdapter, attach
from tinylora.generation.transformers_backend import TransformersEngine
from tinylora.models.device import available_threads
from tinylora.models.load import BaseModel, load_base_model
from tinylora.paths import cache_dir
from tinylora.tasks.base import Task
from tinylora.tasks.build import build_task
from tinylora.training.config import RunConfig

Say = Callable[[str], None]


def say_to_stderr(text: str) -> None:
    """Talk goes to stderr, results to stdout."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Workbench:
    """Everything that is open, under a resolved config."""

    config: RunConfig
    base: BaseModel
    adapter: AttachedAdapter
    engine: TransformersEngine
    task: Task | None


def set_threads(num_threads: int) -> int:
    """Set torch's threads (0: the cores really available) and return the count."""
    threads = num_threads or available_threads()
    torch.set_num_threads(threads)
    return threads


def open_workbench(
    config: RunConfig, *, task: bool | Task = True, say: Say = say_to_stderr, base: BaseModel | None = None
) -> Workbench:
    """Load the model, set the threads, attach v = 0 with the cached basis, build the task and the engine.

    Whatever "auto" stood for (device, dtype, threads, revision) is resolved in the returned config.
    """
    threads = set_threads(config.train.num_threads)
    built = build_task(config.task, config.prompt) if task is True else (task or None)
    if base is None:
        model = config.model
        base = load_base_model(
            model.name,
            device=model.device,
            dtype=model.dtype,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
        )
    adapter = attach(base.model, config.adapter, cache_dir=cache_dir(), source=list(base.files) or None)
    if adapter.excluded:
        say(
            f"{len(adapter.excluded)} modules left out: " + "; ".join(f"{k} ({v})" for k, v in adapter.excluded.items())
        )
    engine = TransformersEngine(
        base.model,
        context_length=base.context_length,
        pad_token_id=base.pad_token_id,
        adapter=adapter,
        max_batch_rows=config.generation.max_batch_rows,
    )
    resolved = replace(
        config,
        model=replace(
            config.model,
            device=base.device.type,  # type: ignore[arg-type]
            dtype="bfloat16" if base.dtype == torch.bfloat16 else "float32",
            revision=base.revision or config.model.revision,
        ),
        train=replace(config.train, num_threads=threads),
    )
    return Workbench(resolved, base, adapter, engine, built)
