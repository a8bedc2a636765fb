"""Which device and dtype a run uses, and how many cores it really has. Nothing here changes a setting."""

import os
from pathlib import Path

import torch
from torch import Tensor

from tinylora.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NO_FLOAT64 = frozenset({"mps"})
"""Devices without numbers in float64: torch refuses them there."""


def resolve_device(name: str = "auto") -> torch.device:
    """The torch device for a config value; auto takes CUDA, then Apple's mps, then the CPU.

    Raises: UserError for an unknown name, or a device that this machine does not have.
    """
    if name not in DEVICES:
        raise UserError(f"model.device must be one of {', '.join(DEVICES)}, got {name!r}")
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if present[kind]))
    if not present[name]:
        here = ", ".join(kind for kind in DEVICES if present.get(kind))
        raise UserError(
            f"model.device is {name!r}, but torch {torch.__version__} finds no such device here; "
            f"available: {here}; set model.device to one of them or to auto"
        )
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen weights for a config value; auto takes bfloat16 only where the hardware has it.

    Raises: UserError for an unknown name.
    """
    if name == "auto":
        return torch.bfloat16 if has_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise UserError(f"model.dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def for_float64(x: Tensor) -> Tensor:
    """x where float64 can be computed with it: itself, or its copy on the CPU where its device has none (mps)."""
    return x.cpu() if x.device.type in NO_FLOAT64 else x


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 itself; emulation is slower than float32 and does not count."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)  # compute capability 8.0 and up, and ROCm
    if device.type == "mps":
        return _mps_multiplies_bfloat16()
    return bool({"avx512_bf16", "amx_bf16"} & cpu_flags())


def _mps_multiplies_bfloat16() -> bool:
    """bfloat16 on mps depends on the version of macOS, and asking for it there is the only test torch offers."""
    try:
        ones = torch.ones(2, 2, dtype=torch.bfloat16, device="mps")
        return bool((ones @ ones)[0, 0].item() == 2)
    except (RuntimeError, TypeError):
        return False


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets of the first core as the Linux kernel names them, without those that `withheld_flags` names;
    empty on other systems.

    ARM's plain `bf16` flag is left out of `has_bfloat16` on purpose: torch's CPU kernels there are not known to be
    faster than float32.
    """
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            withheld = withheld_flags()
            return frozenset(flag for flag in value.split() if not flag.startswith(withheld))
    return frozenset()


ISA_VARIABLE = "ONEDNN_MAX_CPU_ISA"
"""oneDNN's own variable: the newest x86 instruction set it may use. What is ours obeys it, too, so that one variable
(beside ATEN_CPU_CAPABILITY for torch's operators) makes a new processor behave as an older one."""
_WITHHELD = {
    "AVX2": ("avx512", "amx_"),
    "AVX512_CORE": ("avx512_bf16", "avx512_fp16", "amx_"),
    "AVX512_CORE_VNNI": ("avx512_bf16", "avx512_fp16", "amx_"),
    "AVX512_CORE_BF16": ("avx512_fp16", "amx_"),
}


def withheld_flags() -> tuple[str, ...]:
    """Beginnings of the flags that $ONEDNN_MAX_CPU_ISA takes away; none without it, or where it names another set."""
    return _WITHHELD.get(os.environ.get(ISA_VARIABLE, "").upper(), ())
