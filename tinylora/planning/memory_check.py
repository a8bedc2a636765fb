"""Is there memory enough for a run? Asked before the model is loaded, from shapes alone."""

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.methods.build import resolve_quantization
from tinylora.planning.inspection import inspect_model
from tinylora.planning.plan import ASSUMED_PROMPT_TOKENS
from tinylora.planning.shapes import shape_model
from tinylora.system.device import resolve_device
from tinylora.system.memory import device_memory
from tinylora.talk import Say, format_bytes


def check_memory(config: RunConfig, say: Say, *, refuse: bool = True) -> None:
    """Hold the estimate of `train --dry-run` against the memory of the device.

    Says so where it is more than is free now. Raises: UserError, with `refuse` and train.check_memory, where it is more
    than the device has. A model whose shape cannot be told is left to the loading.
    """
    config = resolve_quantization(config, lambda text: None)
    try:
        model, source = shape_model(config.model)
    except UserError:
        return
    found = inspect_model(model, config, source, prompt_tokens=ASSUMED_PROMPT_TOKENS)
    device = resolve_device(config.model.device)
    have, need = device_memory(device), found.memory
    parts = {
        "weights": need.weights - need.packed_copy,
        "activations": need.activations,
        "trained numbers, gradient and optimiser": need.state,
        "KV cache": need.kv_cache,
        "adapter factors": need.adapter_factors,
    }
    largest = max(parts, key=lambda name: parts[name])
    sentence = (
        f"this run needs some {format_bytes(need.least)} of memory by estimate, most of it {largest} "
        f"({format_bytes(parts[largest])})"
    )
    if need.least > have.total and config.train.check_memory and refuse:
        raise UserError(
            f"{sentence}, and {'the GPU' if device.type == 'cuda' else 'this machine'} has {format_bytes(have.total)}; "
            "take a smaller model, model.quantization, another method, train.gradient_checkpointing or a smaller "
            "train.memory_budget_gib (tinylora train RECIPE --dry-run shows what each does), or try it all the same "
            "with train.check_memory = false"
        )
    if need.least > have.available:
        say(f"{sentence}, and {format_bytes(have.available)} are free")
