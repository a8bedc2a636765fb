"""What test_kernels starts in processes of its own: a module that imports little, because each of them imports it."""

import os
from typing import Any

import torch

from tinylora.generation.native.kernels import build


def compile_in_turn(folder: str, barrier: Any, results: Any) -> None:
    """Compile into that cache folder at the same time as the others; what went wrong, or "", into the queue."""
    os.environ["TINYLORA_CACHE"] = folder
    barrier.wait(120)
    try:
        build.library(torch.float32)
        results.put("")
    except Exception as error:
        results.put(repr(error))
