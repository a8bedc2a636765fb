"""Which quantisations a base can be loaded with, and the settings that transformers takes for each.

transformers quantises each weight as it reads it, so the whole model never lies in memory in full. The output head and
the embeddings are left out, as transformers does it. Leaves out: what quantised weights hold (adapter/quantised.py).
"""

import ctypes
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from tinylora.adapter.quantised import KINDS, quantisation
from tinylora.errors import UserError
from tinylora.models.names import Source

LEAST = {"bitsandbytes": (0, 49), "torchao": (0, 16)}
"""Older ones lack a backward pass on the CPU, or the configs used here."""
INT4_GROUP = 32
"""Weights that share a scale in torchao-int4, along the input."""
LEAST_GGUF_BITS = 8


def _library(kind: str) -> tuple[str, str]:
    """The library of a quantisation, and the extra that installs it."""
    return ("bitsandbytes", "bnb") if kind.startswith("bnb") else ("torchao", "torchao")


def check_quantisation(kind: str, source: Source, device: torch.device) -> None:
    """Raises: UserError, before anything is loaded, if the quantisation does not exist or does not go with the model,
    the device, or what is installed."""
    if kind not in KINDS:
        raise UserError(f"model.quantization must be none, {', '.join(KINDS)}, got {kind!r}")
    if device.type not in ("cpu", "cuda"):
        raise UserError(
            f"model.quantization = {kind} runs on the CPU and on CUDA, not on {device.type}; set model.device to cpu, "
            "or model.quantization to none"
        )
    library, extra = _library(kind)
    install = f"pip install 'tinylora[{extra}]'"
    if importlib.util.find_spec(library) is None:
        raise UserError(f"model.quantization = {kind} needs {library}, which is not installed; run: {install}")
    try:
        found = version(library)
    except PackageNotFoundError:
        found = "0"
    least = LEAST[library]
    if _numbers(found) < least:
        raise UserError(
            f"model.quantization = {kind} needs {library} {'.'.join(map(str, least))} or newer, and {found} is "
            f"installed; run: {install} --upgrade"
        )
    if source.kind in ("gguf", "embedded"):
        _check_gguf(kind, source)


def _numbers(text: str) -> tuple[int, int]:
    parts = [part for part in text.split("+")[0].split(".") if part.isdigit()]
    return int(parts[0]) if parts else 0, int(parts[1]) if len(parts) > 1 else 0


def _check_gguf(kind: str, source: Source) -> None:
    from tinylora.models.embedded import EMBEDDED, embedded_file

    path = embedded_file(source.name) if source.name in EMBEDDED and source.path is None else source.path
    assert path is not None
    import gguf

    try:
        found = {tensor.tensor_type for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1}
    except (ValueError, OSError, KeyError, IndexError):
        return  # a damaged file, of which loading says more
    bits = {one.name: 8 * size / block for one in found for block, size in [gguf.GGML_QUANT_SIZES[one]]}
    if few := sorted(name for name, each in bits.items() if each < LEAST_GGUF_BITS):
        raise UserError(
            f"{source.name} is a GGUF file quantised already ({', '.join(few)}), and model.quantization = {kind} would "
            "quantise what it lost once more; set it to none (the file is dequantised when it is loaded), or give the "
            "original checkpoint, or a GGUF file of 8 bits or more"
        )


def bytes_a_weight(kind: str, itemsize: int) -> float:
    """Bytes that a weight of a quantised map takes, scales of its group included; those of whole rows are left out."""
    return {
        "none": float(itemsize),
        "bnb-4bit": 0.5 + 4 / 64,
        "torchao-int4": 1 + (itemsize + 1) / INT4_GROUP,  # a byte each
    }.get(kind, 1.0)


def transformers_config(kind: str, dtype: torch.dtype) -> Any:
    """The quantization_config of transformers. The library has to be there (`check_quantisation`)."""
    library, _ = _library(kind)
    for name in (library, f"{library}.autograd._functions"):  # talk about kernels, and a line at each 8-bit product
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both warn of their own deprecated calls when they are imported
        if library == "bitsandbytes":
            import bitsandbytes  # noqa: F401
            from transformers import BitsAndBytesConfig

            if kind == "bnb-8bit":
                return BitsAndBytesConfig(load_in_8bit=True)
            return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from transformers import TorchAoConfig

        if kind == "torchao-int8":
            return TorchAoConfig(Int8WeightOnlyConfig())
        # Not torchao's Int4WeightOnlyConfig: its packed formats are for GPUs, and have no backward pass.
        return TorchAoConfig(
            IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(INT4_GROUP))  # type: ignore[attr-defined]
        )


@contextmanager
def own_mappings() -> Iterator[None]:
    """Give each large tensor a mapping of its own for the length of a block, and give back the heap after it.

    Between the float32 copies that quantising makes and frees, glibc's heap is left with holes: the process's peak was
    0.5 GB higher than it had to be with 135 M weights, more than the float32 model has. Does nothing without glibc.
    """
    libc = _glibc()
    if libc is None:
        yield
        return
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # where glibc's own moving threshold ends
        libc.mallopt(M_TRIM_THRESHOLD, 2**26)
        libc.malloc_trim(0)


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def _glibc() -> Any:
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:  # not Linux, or another C library
        return None


def let_go_of_file(model: nn.Module) -> None:
    """Copy what is not quantised: as views of the mapped file, it keeps the pages of all weights in memory."""
    quantised = {id(module.weight) for module in model.modules() if quantisation(module)}
    for parameter in model.parameters():
        if id(parameter) not in quantised:
            parameter.data = parameter.data.clone()


def refuse_broken_rows(model: nn.Module, name: str) -> None:
    """Raises: UserError for 4-bit maps whose rows are no whole blocks of 64: bitsandbytes (0.50) reads them wrongly on
    the CPU (a map of 64 x 96 comes back with an error of 27 %, where NF4 costs 9 %)."""
    for path, module in model.named_modules():
        if quantisation(module) == "bnb-4bit" and int(module.in_features) % 64:
            raise UserError(
                f"{path} of {name} has {module.in_features} inputs, and bitsandbytes reads 4-bit rows that are no "
                "multiple of 64 wrongly on the CPU; take model.quantization = torchao-int8"
            )
