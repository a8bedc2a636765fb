"""What depends on the processor, on older ones than this: oneDNN, torch's operators and our kernels pretend."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
OLDER = [("AVX2", "avx2"), ("AVX512_CORE", "avx512"), ("AVX2", "default")]
"""Newest instruction set for oneDNN and our kernels (see `ISA_VARIABLE`), and for torch's operators."""
if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
    OLDER.remove(("AVX512_CORE", "avx512"))  # torch takes the word for it, and the processor ends the process


@pytest.mark.slow
@pytest.mark.parametrize(("onednn", "aten"), OLDER)
def test_bfloat16_is_as_good_on_older_processors(onednn: str, aten: str) -> None:
    """Once a bound held on one processor alone. `make test-processors` runs all that computes in this way."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "bfloat16_is_as_close"]
    done = subprocess.run(
        [*command, "tests/generation/test_engine_conformance.py"],
        cwd=ROOT,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": onednn, "ATEN_CPU_CAPABILITY": aten},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "10 passed" in done.stdout
