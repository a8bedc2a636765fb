"""Compile kernels.c once a machine, and load it. Without a C compiler the torch kernels do the same, only slower."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from tinylora.system.device import cpu_flags, withheld_flags
from tinylora.system.paths import ELSEWHERE, cache_dir
from tinylora.system.private import NotPrivate, is_private, make_private
from tinylora.talk import say_to_stderr

SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi")
# The first that the compiler takes: Apple's clang has neither -fopenmp nor, on ARM of old, -march=native.
_VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())


class NoKernels(Exception):
    """The C kernels cannot be had here; the message says why."""


@dataclass(frozen=True, slots=True)
class Library:
    """The compiled kernels for one dtype."""

    path: Path
    functions: ctypes.CDLL


def compiler() -> str | None:
    """The C compiler: $CC, else the first of cc, gcc and clang on the PATH."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next((found for name in names if (found := shutil.which(name))), None)


@functools.cache
def library(dtype: torch.dtype) -> Library:
    """The kernels for bfloat16 or float32, from the cache folder, compiled there first if need be, which is said.

    Raises: NoKernels if there is no compiler, it fails, the dtype has no kernels, or other users may write where they
    lie: a library runs as who loads it.
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise NoKernels(f"they are written for bfloat16 and float32, not {str(dtype).removeprefix('torch.')}")
    cc = compiler()
    if cc is None:
        raise NoKernels("no C compiler (cc, gcc, clang or $CC) was found")
    try:
        version = subprocess.run([cc, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise NoKernels(f"the C compiler {cc} cannot be started ({error})") from error
    withheld = _compiler_flags()
    machine = " ".join([platform.machine(), platform.processor(), platform.system(), *sorted(cpu_flags())])
    key = hashlib.sha256("\n".join([SOURCE.read_text(), version, machine, *withheld, str(dtype)]).encode()).hexdigest()[
        :16
    ]
    folder = cache_dir() / "kernels"
    try:
        make_private(folder)
    except OSError as error:
        raise NoKernels(f"they could not be compiled into {folder} ({error.strerror or error}); {ELSEWHERE}") from error
    except NotPrivate as error:
        raise NoKernels(str(error)) from error
    path = _find(folder, key) or _compile(cc, folder, key, withheld, bf16=dtype == torch.bfloat16)
    try:
        return Library(path, ctypes.CDLL(str(path)))
    except OSError as error:
        raise NoKernels(f"{path} does not load ({error}); delete it and try again") from error


def _compiler_flags() -> tuple[str, ...]:
    """What keeps the compiler from the instruction sets that cpu_flags leaves out."""
    if "avx512" in withheld_flags():
        return ("-mno-avx512f",)  # and with it all that begins with avx512
    return ("-mno-avx512bf16",) if "avx512_bf16" in withheld_flags() else ()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _find(folder: Path, key: str) -> Path | None:
    """The compiled library, whole: its name ends in its digest, because loading one cut off kills the process.

    One that belongs to another user, or that others may write, is passed over, and compiled anew.
    """
    try:
        own = [path for path in folder.glob(f"{key}-*.so") if is_private(path)]
        return next((path for path in own if path.stem == f"{key}-{_digest(path)}"), None)
    except OSError:
        return None


def _compile(cc: str, folder: Path, key: str, withheld: tuple[str, ...], *, bf16: bool) -> Path:
    try:
        say_to_stderr(f"compiling the rollout kernels for this processor into {folder} (once, some seconds) ...")
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = Path(temporary) / "kernels.so"
            for variant in _VARIANTS:
                command = [cc, *_FLAGS, *variant, *withheld, f"-DBF16={int(bf16)}", str(SOURCE), "-o", str(made), "-lm"]
                run = subprocess.run(command, capture_output=True, text=True)
                if run.returncode == 0:
                    made.chmod(0o700)
                    # Another process may do the same at the same time: the last one wins, whole.
                    return made.replace(folder / f"{key}-{_digest(made)}.so")
    except OSError as error:
        raise NoKernels(f"they could not be compiled into {folder} ({error}); {ELSEWHERE}") from error
    reason = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip()[:200])
    raise NoKernels(f"{cc} failed on {SOURCE.name}: {reason}")
