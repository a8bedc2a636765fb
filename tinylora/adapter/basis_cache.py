"""Computed bases on disk: found by a hash of the weights, checked when read, safe with several processes at once."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tinylora.adapter.canonical import Weight, raw_weight, round_to_bf16, rounded_weight
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.factors import ALGORITHM, Factors
from tinylora.errors import UserError
from tinylora.system.digest import file_state
from tinylora.system.files import replace_file
from tinylora.system.paths import ELSEWHERE

Basis = tuple[dict[str, Factors], dict[str, str]]
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
SAMPLED_ROWS = 8


def cached(
    folder: Path,
    weights: Mapping[str, Weight],
    config: AdapterConfig,
    source: Path | Sequence[Path] | None,
    build: Callable[[], Basis],
) -> Basis:
    """The stored basis of these weights, built and stored first if there is none or it is damaged.

    Raises: UserError if the folder cannot be written, or a file of `source` is missing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        entry = folder / f"{_key(_digests(folder, weights, source), config)}.safetensors"
        found = _load(entry)
        if found is None:
            with FileLock(entry.with_suffix(".lock")):
                found = _load(entry)  # another process may have built it in the meantime
                if found is None:
                    found = build()
                    _store(entry, found)
    except OSError as error:
        raise UserError(f"cannot keep the basis in {folder} ({error}); {ELSEWHERE}") from error
    return _in_order(found, weights)


def _in_order(basis: Basis, weights: Mapping[str, Weight]) -> Basis:
    factors, excluded = basis
    return {p: factors[p] for p in weights if p in factors}, {p: excluded[p] for p in weights if p in excluded}


def _key(digests: Mapping[str, str], config: AdapterConfig) -> str:
    parts = {"algorithm": ALGORITHM, "basis": config.basis, "rank": config.rank, "weights": dict(digests)}
    if config.basis != "svd":
        parts["seed"] = config.seed
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path, weights: Mapping[str, Weight], source: Path | Sequence[Path] | None) -> dict[str, str]:
    """Hash of each module's canonical weight, remembered for as long as the source files stay as they are."""
    if source is None:
        return {path: _digest(rounded_weight(weight)) for path, weight in weights.items()}
    files = _stat(source)
    memo = folder / f"weights-{hashlib.sha256(json.dumps([f[0] for f in files]).encode()).hexdigest()}.json"
    known = _read_memo(memo, files)
    digests: dict[str, str] = {}
    changed = False
    for path, weight in weights.items():
        sample = _sample(weight)
        remembered = known.get(path, ("", ""))
        if remembered[0] != sample:
            remembered = (sample, _digest(rounded_weight(weight)))
            known[path], changed = remembered, True
        digests[path] = remembered[1]
    if changed:
        text = json.dumps({"files": files, "modules": known})
        replace_file(memo, lambda scratch: scratch.write_text(text))
    return digests


def _stat(source: Path | Sequence[Path]) -> list[list[str | int]]:
    files: list[Path] = []
    for path in [source] if isinstance(source, Path) else source:
        inside = (file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES) if path.is_dir() else [path]
        files += (file.resolve() for file in inside)
    return [[str(file), *file_state(file)] for file in sorted(set(files))]


def _read_memo(memo: Path, files: list[list[str | int]]) -> dict[str, tuple[str, str]]:
    try:
        content = json.loads(memo.read_text())
        if content["files"] == files:
            return {path: (str(sample), str(digest)) for path, (sample, digest) in content["modules"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no memo, or a damaged one: it is only a saving, so hash again
    return {}


def _digest(rounded: Tensor) -> str:
    digest = hashlib.blake2b(repr(tuple(rounded.shape)).encode(), digest_size=32)
    digest.update(rounded.view(torch.int16).numpy().data)
    return digest.hexdigest()


def _sample(weight: Weight) -> str:
    """Hash of a few rows, so that weights changed in memory after loading are noticed; "-" for a function."""
    if not isinstance(weight, nn.Module):
        return "-"
    raw = raw_weight(weight)
    return f"{tuple(raw.shape)}-{_digest(round_to_bf16(raw[:: max(1, len(raw) // SAMPLED_ROWS)]))}"


def _load(entry: Path) -> Basis | None:
    try:
        with safe_open(entry, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata["checksum"] != _checksum(tensors, metadata["excluded"]):
            return None
        factors = {}
        for name in tensors:
            if name.startswith("U."):
                path = name[2:]
                gap, residual, margin = tensors[f"checks.{path}"].tolist()
                factors[path] = Factors(
                    tensors[name], tensors[f"S.{path}"], tensors[f"V.{path}"], gap, residual, margin
                )
        return factors, json.loads(metadata["excluded"])
    except (FileNotFoundError, SafetensorError, KeyError, ValueError):
        return None  # absent or damaged: the caller builds it


def _store(entry: Path, basis: Basis) -> None:
    factors, excluded = basis
    tensors: dict[str, Tensor] = {}
    for path, f in factors.items():
        tensors |= {f"U.{path}": f.U.contiguous(), f"S.{path}": f.S.contiguous(), f"V.{path}": f.V.contiguous()}
        tensors[f"checks.{path}"] = torch.tensor([f.gap, f.residual, f.sign_margin], dtype=torch.float64)
    text = json.dumps(excluded, sort_keys=True)
    metadata = {"excluded": text, "checksum": _checksum(tensors, text)}
    replace_file(entry, lambda scratch: save_file(tensors, scratch, metadata=metadata))


def _checksum(tensors: Mapping[str, Tensor], excluded: str) -> str:
    digest = hashlib.sha256(excluded.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
