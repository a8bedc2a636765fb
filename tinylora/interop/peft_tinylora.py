"""PEFT's TinyLoRA, read and written: checkpoints of PEFT 0.20 and 0.21.

PEFT has dW = B (sum_i v_i P_i) A with A = sqrt(S) V^T and B = U sqrt(S), stored in the file. A module's P is stored,
too, unless save_projection is off: then it is drawn again from torch's generator, seeded by projection_seed plus the
module's place among the targets. Its tie groups are chunks of equal size, the last of which takes the remainder.

PEFT cannot express our tie groups, so what is written is tied fully: one vector that holds all groups' numbers, and a P
that is zero where they are those of another group. That trains the same count of numbers, and gives the same dW.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from tinylora.adapter.attach import AttachedAdapter, linear_maps
from tinylora.adapter.explicit import ExplicitFactors, ExplicitModule
from tinylora.adapter.grouping import canonical_order
from tinylora.errors import UserError
from tinylora.interop.lora import CONFIG, WEIGHTS, has_conv1d, target_names
from tinylora.system.folders import write_folder
from tinylora.system.strict_json import read_json

KEY = "base_model.model."
VECTOR = "base_model.tinylora_v."


@dataclass(frozen=True, eq=False, slots=True)
class Imported:
    """What was read, and what the reader should know."""

    explicit: ExplicitFactors
    note: str
    """Empty if the file alone said everything."""


def read_peft(folder: Path, model: nn.Module) -> Imported:
    """A PEFT TinyLoRA checkpoint as explicit factors, for the base `model`, which must be without an adapter.

    Raises: UserError, naming it, for what is not covered: another method, embeddings, biases, modules_to_save, files of
    PEFT before 0.20 without their projections, pickled weights, and anything inconsistent.
    """
    config = _config(folder)
    tensors = _tensors(folder)
    paths = _paths(tensors, model)
    order = [path for path in linear_maps(model) if path in paths]  # PEFT counts in the order of named_modules
    vectors = _vectors(tensors)
    u, groups = len(vectors[0]), len(vectors)
    size = max(1, len(order) // groups)
    tying, seed = _numbers(folder, config)
    meant = _num_groups(len(order), tying)
    if groups != meant:
        raise UserError(
            f"{folder} has {groups} vectors, and weight_tying {config.get('weight_tying')} over {len(order)} modules "
            f"makes {meant}; is the base the right one?"
        )
    note = ""
    drawn = [path for path in order if f"{KEY}{path}.tinylora_P" not in tensors]
    if drawn:
        _check_redrawable(folder, config, drawn, order)
        note = (
            f"the projections are not in the file and were drawn again with torch {torch.__version__}, from seed "
            f"{seed} plus the place of each module: right if that torch draws as the one "
            "that trained the adapter did, and if no other adapter was on the model before it"
        )
    read: list[tuple[str, Tensor, Tensor, Tensor]] = []
    for index, path in enumerate(order):
        A, B = (tensors[f"{KEY}{path}.tinylora_{name}"].float() for name in "AB")
        P = tensors.get(f"{KEY}{path}.tinylora_P")
        if P is None:
            if A.dim() != 2 or not A.shape[0]:
                raise UserError(f"the adapter's factors of {path} have shape {tuple(A.shape)}, which no map has")
            P = _draw(seed + index, u, A)
        _check_shapes(path, A, B, P, u, model)
        read.append((path, A, B, P.float()))
    rank = max(A.shape[0] for _, A, _, _ in read)  # PEFT caps the rank of a small map; zeros fill it up exactly
    modules = {}
    for index, (path, A, B, P) in enumerate(read):
        missing = rank - A.shape[0]
        A, B, P = pad(A, (0, 0, 0, missing)), pad(B, (0, missing)), pad(P, (0, missing, 0, missing))
        modules[path] = ExplicitModule.from_split(B, A, P, min(index // size, groups - 1))
    ordered = {path: modules[path] for path in canonical_order(modules)}
    explicit = ExplicitFactors(torch.stack(vectors).float(), ordered, f"PEFT TinyLoRA, {folder.name}")
    return Imported(explicit, note)


def _num_groups(count: int, weight_tying: float) -> int:
    return max(1, round(count * (1 - weight_tying)))


def _numbers(folder: Path, config: dict[str, Any]) -> tuple[float, int]:
    """weight_tying and projection_seed."""
    tying, seed = config.get("weight_tying", 0.0), config.get("projection_seed", 42)
    if isinstance(tying, bool) or not isinstance(tying, (int, float)) or not 0 <= tying <= 1:
        raise UserError(f"{folder / CONFIG}: weight_tying must be a number from 0 to 1, got {tying!r}")
    if type(seed) is not int or not 0 <= seed < 2**62:
        raise UserError(f"{folder / CONFIG}: projection_seed must be a whole number of 0 or more, got {seed!r}")
    return float(tying), seed


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).exists():
        raise UserError(f"{folder} has no {CONFIG}, so it is no PEFT adapter")
    config = read_json(folder / CONFIG, "save the adapter again with PEFT")
    if not isinstance(config, dict) or config.get("peft_type") != "TINYLORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{folder} is a PEFT adapter of type {kind}; only TINYLORA can be imported")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{folder} was trained with bias={config['bias']!r}; only adapters without biases can be imported"
        )
    if config.get("modules_to_save"):
        raise UserError(
            f"{folder} brings whole modules (modules_to_save {config['modules_to_save']}); they cannot be imported"
        )
    return config


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        why = "its weights are pickled, which could run code" if pickled else f"it has no {WEIGHTS}"
        raise UserError(f"{folder} cannot be imported: {why}; save it again with safe_serialization")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); get it again") from error


def _paths(tensors: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Paths of the adapted maps. Raises: UserError for anything else in the file."""
    maps = linear_maps(model)
    paths = {key[len(KEY) :].removesuffix(".tinylora_A") for key in tensors if key.endswith(".tinylora_A")}
    known = {f"{KEY}{path}.tinylora_{name}" for path in paths for name in "ABP"}
    for key in tensors:
        if "embed" in key and (key not in known or key[len(KEY) :].rpartition(".")[0] not in maps):
            raise UserError(f"the adapter holds an embedding ({key}); only linear maps can be imported")
        if key not in known and not key.startswith(VECTOR):
            raise UserError(
                f"the adapter holds {key}, which is no part of a TinyLoRA on linear maps; it cannot be imported"
            )
    for path in sorted(paths):
        if path not in maps:
            raise UserError(f"the adapter is for {path}, which the base does not have; give the base it was trained on")
        if f"{KEY}{path}.tinylora_B" not in tensors:
            raise UserError(f"the adapter lacks tinylora_B of {path}; the file is not whole")
    if not paths:
        raise UserError("the adapter file holds no TinyLoRA factors")
    return paths


def _vectors(tensors: dict[str, Tensor]) -> list[Tensor]:
    found = {key[len(VECTOR) :]: value for key, value in tensors.items() if key.startswith(VECTOR)}
    try:
        vectors = [found[str(i)] for i in range(len(found))]
    except KeyError:
        raise UserError(f"the adapter's vectors are numbered {', '.join(sorted(found))}, not 0, 1, 2, ...") from None
    if not vectors or len({tuple(v.shape) for v in vectors}) > 1 or vectors[0].dim() != 1 or not vectors[0].numel():
        raise UserError("the adapter's vectors are missing or of different lengths")
    if not all(v.is_floating_point() and torch.isfinite(v).all() for v in vectors):
        raise UserError("the adapter's vectors hold a number that is not finite")
    return vectors


def _check_redrawable(folder: Path, config: dict[str, Any], drawn: list[str], order: list[str]) -> None:
    if drawn != order:
        raise UserError(f"{folder} has the projections of some modules and not of others; the file is not whole")
    version = str(config.get("peft_version") or "")
    numbers = [int(part) for part in version.split(".")[:2] if part.isdigit()]
    if len(numbers) < 2 or numbers < [0, 20]:
        raise UserError(
            f"{folder} was written by PEFT {version or 'of an unknown version'} without its projections "
            "(save_projection off); before 0.20 these changed with every Python process and are lost"
        )


def _draw(seed: int, u: int, A: Tensor) -> Tensor:
    """P as PEFT draws it. On a base in a narrow dtype it was rounded to that; its A, saved in float32, then is, too."""
    rank = A.shape[0]
    generator = torch.Generator(device="cpu").manual_seed(seed)
    P = torch.normal(0.0, 1.0 / rank**0.5, (u, rank, rank), generator=generator)
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(A, A.to(dtype).float()):
            return P.to(dtype).float()
    return P


def _check_shapes(path: str, A: Tensor, B: Tensor, P: Tensor, u: int, model: nn.Module) -> None:
    base: Any = linear_maps(model)[path]
    shape = tuple(base.weight.T.shape if isinstance(base, Conv1D) else base.weight.shape)
    rank = A.shape[0] if A.dim() else 0
    if (
        (A.dim(), B.dim()) != (2, 2)
        or not rank
        or (B.shape[0], A.shape[1]) != shape
        or B.shape[1] != rank
        or P.shape != (u, rank, rank)
    ):
        raise UserError(
            f"the adapter's factors of {path} have shapes {tuple(A.shape)}, {tuple(B.shape)} and {tuple(P.shape)}, "
            f"which do not fit a map of {shape} and vectors of {u}"
        )
    if not all(torch.isfinite(t).all() for t in (A, B, P)):
        raise UserError(f"the adapter's factors of {path} hold a number that is not finite")


def write_peft(folder: Path, attached: AttachedAdapter, *, base_name: str, revision: str = "") -> None:
    """Write a checkpoint that PEFT's TinyLoRA loads, with the current v.

    Raises: UserError for a folder in use, or a quantised base.
    """
    attached.refuse_quantised("PEFT's TinyLoRA goes on plain maps only")
    u, num = attached.config.u, attached.num_trained
    tensors: dict[str, Tensor] = {f"{VECTOR}0": attached.read().float().cpu().reshape(-1).contiguous()}
    for path, group in zip(attached.paths, attached.groups, strict=True):
        f = attached.factors[path]
        root = f.S.sqrt()
        P = torch.zeros(num, attached.config.rank, attached.config.rank, dtype=torch.float64)
        P[group * u : (group + 1) * u] = torch.from_numpy(attached.projections[path]) * (root[:, None] / root[None, :])
        for name, values in (("A", (f.V * root).T), ("B", f.U * root), ("P", P)):
            tensors[f"{KEY}{path}.tinylora_{name}"] = values.float().contiguous()
    config = {
        "peft_type": "TINYLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision or None,
        "inference_mode": True,
        "r": attached.config.rank,
        "u": num,
        "weight_tying": 1.0,
        "projection_seed": 42,
        "save_projection": True,
        "init_weights": True,
        "init_v_bound": 0.02,
        "tinylora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": has_conv1d(attached),
        "target_modules": target_names(attached),
        "modules_to_save": None,
    }
    write_folder(folder, {CONFIG: json.dumps(config, indent=2) + "\n", WEIGHTS: save(tensors, {"format": "pt"})})
