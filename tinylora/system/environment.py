"""The machine, the versions and the command line that something was made with, as environment.json keeps them."""

import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tinylora.system.cores import available_threads


def collect_environment() -> dict[str, Any]:
    """Machine, versions and command line, as environment.json keeps them; None where something is not to be had."""
    torch = sys.modules.get("torch")
    versions = {
        name: _version(name) for name in ("torch", "transformers", "safetensors", "tokenizers", "numpy", "tinylora")
    }
    return {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": available_threads(),
        "threads": torch.get_num_threads() if torch else None,
        "cuda": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
        "git_commit": _git_commit(),
        "command": shlex.join(sys.argv),
    }


def today() -> str:
    """The day on this machine's clock, YYYY-MM-DD."""
    return datetime.now().date().isoformat()


def numeric_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two environments and can move a float: on an empty list, resume promises the same bits.

    Threads are not in it: they are resolved into the run's config.
    """
    keys = ("python", "torch", "transformers", "tokenizers", "numpy", "tinylora", "machine", "cpu", "cuda")
    return [f"{k}: {stored.get(k)} then, {current.get(k)} now" for k in keys if stored.get(k) != current.get(k)]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return match[1] if match else platform.processor() or None
    except OSError:  # not Linux
        return platform.processor() or None


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from, with -dirty if changed; None if it is an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):  # git is missing, or there is no commit yet
        return None
