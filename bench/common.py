"""What every benchmark reports beside its numbers, and where `--save` puts them."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinylora.generation.types import Completion
    from tinylora.rollouts.groups import Group

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("torch", "numpy", "transformers", "peft")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system, and the GPU if torch sees one."""
    import torch

    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": cores,
        "memory_gb": round(memory / 2**30, 1),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def load() -> list[float]:
    """Load averages over 1, 5 and 15 minutes: how busy the machine was besides."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def commit() -> str:
    """The commit of the checkout, with -dirty behind it if files differ from it; "none" outside of git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    return (head + ("-dirty" if git("status", "--porcelain") else "")) if head else "none"


def unscored_group(
    prompt_ids: tuple[int, ...], completions: "Sequence[Completion]", rewards: Sequence[float]
) -> "Group":
    """A group for a GRPO step that is only timed: replies nobody scored, under rewards that are given."""
    from tinylora.rollouts.groups import Group
    from tinylora.rollouts.replies import Reply
    from tinylora.tasks.base import Item

    replies = [
        Reply(
            item_id="", question="", answer="", text="", strict=0.0, value_only=0.0, scores={},
            stopped=one.finish_reason == "stop", num_tokens=len(one.token_ids), token_ids=one.token_ids,
            logprobs=one.logprobs, prompt_tokens=len(prompt_ids),
        )
        for one in completions
    ]  # fmt: skip
    return Group(Item(id="", question="", answer=""), prompt_ids, replies, list(rewards))


def finish(name: str, result: Mapping[str, Any], save: bool, packages: Sequence[str] = PACKAGES) -> None:
    """Print the result, with machine, versions, load and commit, as the last line; keep it in results/ if asked to.

    `name` begins with the script's own folder, as in `speed/rollout`: a result lies where its script does.
    """
    full = {**result, "machine": machine(), "versions": versions(packages), "load": load(), "commit": commit()}
    if save:
        path = RESULTS / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(full, indent=2) + "\n")
    print(json.dumps(full))
