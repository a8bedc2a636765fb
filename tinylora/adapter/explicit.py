"""Adapters that bring their factors along: what data or another program made cannot be rebuilt from the base.

The larger form of the adapter file: safetensors with v, and for each module U, S, V, P in float64 and its tie group, so
that dW = U diag(S) (sum_i v_i P_i) V^T as everywhere (docs/format.md).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tinylora.errors import UserError

FORMAT = "tinylora-factors-1"
FILE = "basis.safetensors"
"""In the folder of a run whose basis nobody can rebuild (adapter.basis = gradient)."""


@dataclass(frozen=True, eq=False, slots=True)
class ExplicitModule:
    """One module's factors in float64: U (out, r), S (r,), V (in, r), P (u, r, r)."""

    U: Tensor
    S: Tensor
    V: Tensor
    P: Tensor
    tie_group: int

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the map."""
        return self.U.shape[0], self.V.shape[0]

    @classmethod
    def from_split(cls, left: Tensor, right: Tensor, P: Tensor, tie_group: int) -> "ExplicitModule":
        """Of dW = left (sum_i v_i P_i) right, left (out, r) and right (r, in), as PEFT's TinyLoRA has them.

        The columns of left and the rows of right are brought to length 1; what they were goes into S and P:
        P'[i, j] = P[i, j] |left_i| |right_j| / s_i with s_i = |left_i| |right_i|. For left = U sqrt(S) and
        right = sqrt(S) V^T that is P'[i, j] = P[i, j] sqrt(s_j / s_i).
        """
        left, right, P = left.double(), right.double(), P.double()
        a, b = left.norm(dim=0), right.norm(dim=1)
        S = torch.where(a * b > 0, a * b, 1.0)
        U, V = left / torch.where(a > 0, a, 1.0), (right / torch.where(b > 0, b, 1.0)[:, None]).T
        return cls(U.contiguous(), S, V.contiguous(), P * a[:, None] * b[None, :] / S[:, None], tie_group)


@dataclass(frozen=True, eq=False, slots=True)
class ExplicitFactors:
    """An adapter with its factors."""

    v: Tensor
    """(groups, u) float32."""
    modules: Mapping[str, ExplicitModule]
    """By canonical path, in canonical order."""
    origin: str
    """Where it came from, in words."""
    fingerprint: str = ""
    """Of the base, 24 hex digits; empty where it is not known."""

    @property
    def rank(self) -> int:
        """r, the same for all modules."""
        return len(next(iter(self.modules.values())).S)

    @property
    def u(self) -> int:
        """Numbers of a tie group."""
        return int(self.v.shape[1])


def save_explicit(explicit: ExplicitFactors) -> bytes:
    """The bytes of the file."""
    tensors: dict[str, Tensor] = {"v": explicit.v.detach().to("cpu", torch.float32).contiguous()}
    for path, module in explicit.modules.items():
        for name in ("U", "S", "V", "P"):
            tensors[f"{name}.{path}"] = getattr(module, name).contiguous()
    groups = {path: module.tie_group for path, module in explicit.modules.items()}
    metadata = {
        "format": FORMAT, "origin": explicit.origin, "fingerprint": explicit.fingerprint,
        "groups": json.dumps(groups),
    }  # fmt: skip
    return bytes(save(tensors, metadata))


def load_explicit(path: Path) -> ExplicitFactors:
    """The adapter in a file. Raises: UserError, one sentence, for one that is damaged, of another kind, or hostile."""
    try:
        with safe_open(path, framework="pt") as handle:
            metadata = handle.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path} is no adapter with factors (format {metadata.get('format')!r})")
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        groups = json.loads(metadata["groups"])
        v = tensors.pop("v")
        if not isinstance(groups, dict) or not groups or {f"{n}.{p}" for p in groups for n in "USVP"} != set(tensors):
            raise UserError(f"{path} is inconsistent: its tensors are not those of the modules it names")
        modules = {
            str(p): ExplicitModule(
                U=tensors[f"U.{p}"].double(),
                S=tensors[f"S.{p}"].double(),
                V=tensors[f"V.{p}"].double(),
                P=tensors[f"P.{p}"].double(),
                tie_group=_index(group),
            )
            for p, group in groups.items()
        }
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is damaged or no adapter file ({error}); get it again") from error
    explicit = ExplicitFactors(v, modules, metadata.get("origin", ""), metadata.get("fingerprint", ""))
    _check(explicit, path)
    return explicit


def _index(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"a tie group is a whole number, got {value!r}")
    return value


def _check(explicit: ExplicitFactors, path: Path) -> None:
    v = explicit.v
    if v.dtype != torch.float32 or v.dim() != 2 or not v.numel():
        raise UserError(
            f"{path} is inconsistent: v has shape {tuple(v.shape)} in {v.dtype}, not (groups, u) in float32"
        )
    for name, module in explicit.modules.items():
        r = module.S.numel()
        shapes = (tuple(module.U.shape[1:]), tuple(module.V.shape[1:]), tuple(module.P.shape), tuple(module.S.shape))
        if shapes != ((r,), (r,), (v.shape[1], r, r), (r,)) or r != explicit.rank or not r:
            raise UserError(f"{path} is inconsistent: the factors of {name} do not fit each other or v")
        if not 0 <= module.tie_group < v.shape[0]:
            raise UserError(f"{path} is inconsistent: {name} is in tie group {module.tie_group} of {v.shape[0]}")
        if not all(torch.isfinite(getattr(module, n)).all() for n in "USVP"):
            raise UserError(f"{path} holds a number that is not finite in the factors of {name}")
        if not (module.S > 0).all():
            raise UserError(f"{path} is inconsistent: S of {name} must be above 0")
    if not torch.isfinite(v).all():
        raise UserError(f"{path} holds a number that is not finite")
