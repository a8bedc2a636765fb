"""Put a method on a model: which layers it needs, which of their parameters are trained, how an engine runs them.

PEFT makes the layers of lora, dora, vera and ia3 (`pip install 'tinylora[peft]'`). lora-xs (Bałazy et al. 2024,
arXiv:2405.17604: W + U_r S_r R V_r^T with R trained, r x r) is TinyLoRA's own layer with the r^2 matrices of one 1 each
as P and nothing shared, so it has that layer's engine and learner; R starts at zero instead of near it.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tinylora.adapter.attach import AttachedAdapter, attach, linear_maps, output_head_path
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.grouping import select_targets
from tinylora.adapter.projection import Float64Array
from tinylora.adapter.quantised import KINDS, keep_differentiable, quantisation_of
from tinylora.config.method import ON_QUANTISED, THROUGH_PEFT, MethodConfig
from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.generation.native.runner import Around
from tinylora.methods.bottleneck import OUTPUTS, BottleneckAdapter
from tinylora.methods.one_vector import Beside, GetBeside, MethodAdapter, Wrapped
from tinylora.talk import Say

FEEDFORWARD = ("down_proj", "fc2", "dense_4h_to_h", "wo", "mlp.c_proj")
"""Ends of paths of the maps that end an MLP: ia3 scales their inputs, and the outputs of all others. Liu et al. 2022
(arXiv:2205.05638) scale keys, values and the input of what ends the MLP; here all maps among adapter.targets.
"""


def put_method_on(
    model: nn.Module,
    method: MethodConfig,
    adapter: AdapterConfig,
    *,
    cache_dir: Path | None = None,
    source: Sequence[Path] | None = None,
) -> AttachedAdapter | MethodAdapter:
    """Freeze the model and put the method on it, at its untrained start.

    Raises: UserError for targets that match nothing, a rank too large, a library that is not there, or a method that
    does not go with a quantised base, or with a plain one.
    """
    check_base(method, quantisation_of(model))
    keep_differentiable(model)
    if adapter.basis == "gradient":  # found by training on a batch, which this stands in for until then
        adapter = replace(adapter, basis="svd")
    if method.name == "tinylora":
        return attach(model, adapter, cache_dir=cache_dir, source=source)
    if method.name == "lora-xs":
        config = lora_xs_config(method, adapter)
        try:
            return attach(model, config, cache_dir=cache_dir, source=source, projections=elementary)
        except UserError as error:  # the key that the user has set is another one
            raise UserError(str(error).replace("adapter.rank", "method.rank")) from error
    if method.name == "full":
        names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
        if not names:
            raise UserError("full fine-tuning needs weights in floating point, and this model has none")
        return MethodAdapter(model, method, names, [], list(linear_maps(model)))
    maps = linear_maps(model)
    paths = select_targets(list(maps), adapter.targets, output_head_path(model))
    if method.name == "adapter":
        return _bottlenecks(model, method, adapter.seed, maps, paths)
    return _through_peft(model, method, adapter.seed, maps, paths)


def check_base(method: MethodConfig, kind: str) -> None:
    """Raises: UserError if the method needs a quantised base (`kind` is ""), or cannot train on one."""
    if method.name == "qlora" and not kind:
        raise UserError(
            "method qlora is lora on a quantised base, and this one is not quantised; set model.quantization to one of "
            f"{', '.join(KINDS)}, or take method lora"
        )
    if kind and method.name not in ON_QUANTISED:
        raise UserError(
            f"method {method.name} needs the base's weights in floating point, and this base is quantised ({kind}); "
            f"take {', '.join(ON_QUANTISED[:-1])} or {ON_QUANTISED[-1]}, or set model.quantization to none"
        )


def lora_xs_config(method: MethodConfig, adapter: AdapterConfig) -> AdapterConfig:
    """The adapter that lora-xs is: rank^2 numbers a module, nothing shared, the top singular directions."""
    rank = method.rank
    return AdapterConfig(
        rank=rank, u=rank * rank, tying="none", targets=adapter.targets, basis=adapter.basis, seed=adapter.seed
    )


def elementary(seed: int, path: str, u: int, rank: int) -> Float64Array:
    """P (u, r, r) of lora-xs: P_i has one 1, so that R is v written in rows."""
    assert u == rank * rank
    return np.eye(u).reshape(u, rank, rank)


def _bottlenecks(
    model: nn.Module, method: MethodConfig, seed: int, maps: Mapping[str, nn.Module], paths: Sequence[str]
) -> MethodAdapter:
    chosen = [path for path in paths if path.rpartition(".")[2] in OUTPUTS]
    if not chosen:
        raise UserError(
            f"adapter layers go behind {', '.join(OUTPUTS)}, and adapter.targets names none of them in this model; "
            "leave adapter.targets at all-linear, or take method lora"
        )
    generator = torch.Generator().manual_seed(seed)
    wrapped = []
    for path in chosen:
        layer = BottleneckAdapter(maps[path], _out_features(maps[path]), method.rank, generator)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
        wrapped.append(Wrapped(path, maps[path], layer))
    names = [
        f"{path}.{name}" for path in chosen for name in ("down_weight", "down_bias", "up_weight", "up_bias")
    ]  # fmt: skip
    return MethodAdapter(model, method, names, wrapped, chosen, beside=bottleneck_beside)


def _out_features(module: nn.Module) -> int:
    weight: Tensor = module.weight  # type: ignore[assignment]
    return int(getattr(module, "out_features", 0)) or int(weight.shape[1 if isinstance(module, Conv1D) else 0])


def _through_peft(
    model: nn.Module, method: MethodConfig, seed: int, maps: Mapping[str, nn.Module], paths: Sequence[str]
) -> MethodAdapter:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"method {method.name} is PEFT's, and PEFT is not installed ({error}); run pip install 'tinylora[peft]'"
        ) from error
    targets = list(paths)
    common: dict[str, Any] = {"target_modules": targets, "task_type": None}
    if method.name in ("lora", "qlora", "dora"):
        config: Any = peft.LoraConfig(
            r=method.rank, lora_alpha=method.alpha, lora_dropout=0.0, use_dora=method.name == "dora", **common
        )
    elif method.name == "vera":
        config = peft.VeraConfig(r=method.rank, projection_prng_key=seed, vera_dropout=0.0, **common)
    else:
        ends = [path for path in targets if f".{path}".endswith(tuple(f".{end}" for end in FEEDFORWARD))]
        config = peft.IA3Config(feedforward_modules=ends, **common)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        peft_model = peft.get_peft_model(model, config)  # changes the model in place, and is a wrapper around it
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    wrapped = [Wrapped(path, maps[path], model.get_submodule(path)) for path in targets]
    for one in wrapped:
        one.layer.eval()
    adapter = MethodAdapter(model, method, names, wrapped, targets, beside=BESIDE[method.name])
    adapter.peft_model = peft_model
    return adapter


def lora_factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A and B of PEFT's LoRA layer, its scaling in B."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight.detach(), layer.scaling[name] * layer.lora_B[name].weight.detach()


def lora_beside(layer: Any) -> Beside:
    """BA of PEFT's LoRA layer."""
    return Beside(lora_factors(layer))


def vera_beside(layer: Any) -> Beside:
    """BA of PEFT's VeRA layer: its shared matrices, cut to the module's size, times the trained scales."""
    (name,) = layer.active_adapters
    d, b = layer.vera_lambda_d[name].detach(), layer.vera_lambda_b[name].detach()
    A = layer.vera_A[name][:, : layer.in_features].to(d)
    B = layer.vera_B[name][: layer.out_features].to(b)
    return Beside((d.unsqueeze(1) * A, b.unsqueeze(1) * B))


def dora_beside(layer: Any) -> Beside:
    """m * (W + BA) x + b of PEFT's DoRA layer, b the map's bias: m scales B, and behind the map its output less b.

    m (out,) is the trained magnitude over the norm of each row of W + BA, in float32.
    """
    (name,) = layer.active_adapters
    A, B = lora_factors(layer)
    base = layer.get_base_layer()
    weight = base.weight.detach()
    weight = weight.T if isinstance(base, Conv1D) else weight
    magnitude = layer.lora_magnitude_vector[name].weight.detach().float()
    m, bias = magnitude / torch.linalg.norm(weight.float() + B @ A, dim=1), base.bias

    def scaled(y: Tensor) -> Tensor:
        if bias is None:
            return (y.float() * m).to(y.dtype)
        return ((y.float() - bias) * m + bias).to(y.dtype)

    return Beside((A, m.unsqueeze(1) * B), Around(after=scaled))


def bottleneck_beside(layer: Any) -> Beside:
    """What a BottleneckAdapter computes behind its map."""
    return Beside(around=Around(after=layer.behind()))


def ia3_beside(layer: Any) -> Beside:
    """The trained scale of PEFT's IA3 layer, on the inputs of a map that ends an MLP, else on the outputs."""
    (name,) = layer.active_adapters
    scale = layer.ia3_l[name].detach().flatten()
    scaled = lambda x: (x * scale).to(x.dtype)  # noqa: E731
    return Beside(around=Around(before=scaled) if layer.is_feedforward else Around(after=scaled))


BESIDE: dict[str, GetBeside] = {
    "lora": lora_beside,
    "qlora": lora_beside,
    "dora": dora_beside,
    "vera": vera_beside,
    "ia3": ia3_beside,
}
"""Of the methods that are PEFT's."""


__all__ = ["THROUGH_PEFT", "elementary", "lora_xs_config", "put_method_on"]


def resolve_quantization(config: RunConfig, say: Say) -> RunConfig:
    """The config with the base of method qlora quantised, if nothing else is asked for.

    Raises: UserError, before anything is loaded, for a method that does not go with a quantised base.
    """
    if config.method.name == "qlora" and config.model.quantization == "none":
        say("method qlora takes a quantised base, so model.quantization is bnb-4bit; set it to choose another")
        config = replace(config, model=replace(config.model, quantization="bnb-4bit"))
    check_base(config.method, "" if config.model.quantization == "none" else config.model.quantization)
    return config
