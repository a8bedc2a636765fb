"""The folder of one run: what is in it, who may write to it, and checkpoints that survive a kill at any instant.

    runs/demo-001/
      config.toml        every setting, resolved
      environment.json   machine and versions it was started with
      metrics.jsonl      one object a step
      samples.jsonl      some completions of every step
      checkpoint/        state-00000012.safetensors, the newest, and the one before it
      .lock .lock.pid    held while a process trains here

A checkpoint is one safetensors file: tensors as they are, everything else as JSON in the header, a SHA-256 over both.
It is written beside its final name, flushed to the disk, then renamed, so that a name always means a whole file. It
records how long the two JSONL files were, too; `RunFolder.resume` cuts them back to that, and so the steps that are run
again leave the same lines as if nothing had happened. Torch is imported only where tensors are.
"""

import hashlib
import json
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.training.metrics import no_room_is_a_user_error, read_jsonl, write_all

__all__ = [
    "Checkpoint", "RunFolder", "collect_environment", "numeric_differences", "read_jsonl", "resume_config",
]  # fmt: skip

logger = logging.getLogger("tinylora")

MAY_CHANGE = ("train.steps", "generation.kv_budget_gib")
"""Beside log.*: settings that a resumed run may change. The budget is memory alone, though it decides which sequences
are computed together, and with that perhaps a last digit."""
_FORMAT = "tinylora-checkpoint-1"
_LOGS = ("metrics.jsonl", "samples.jsonl")
_CHECKPOINT_NAME = re.compile(r"state-(\d{8})\.safetensors")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `RunFolder.load_checkpoint` found."""

    state: dict[str, Any]
    """As given to save_checkpoint: tensors (on the CPU) bit for bit, other values through JSON."""
    log_bytes: dict[str, int]
    """Length of each JSONL file at that moment."""
    path: Path
    warning: str
    """Why this is not the newest checkpoint; empty if it is."""


class RunFolder:
    """A run's folder on disk. Make one with `create` or `open`; hold `lock()` while writing to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_path = path / "config.toml"
        self.environment_path = path / "environment.json"
        self.metrics_path = path / "metrics.jsonl"
        self.samples_path = path / "samples.jsonl"
        self.checkpoint_dir = path / "checkpoint"
        self._lock: FileLock | None = None

    @classmethod
    def create(cls, root: Path, name: str, config: RunConfig, environment: Mapping[str, Any]) -> Self:
        """Make root/name-001 (or the first number above all that are there) and write config and environment into it.

        Two processes at once get two folders: the file system decides who made which.
        Raises: UserError for a name that is no folder name, a root that cannot be written to, or a full disk (no
        half-made folder is left).
        """
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise UserError(f"a run's name must be letters, digits, '.', '_' or '-', got {name!r}")
        with _disk(root):
            root.mkdir(parents=True, exist_ok=True)
            pattern = re.compile(re.escape(name) + r"-(\d+)")
            number = max((int(m[1]) for p in root.iterdir() if (m := pattern.fullmatch(p.name))), default=0)
            while True:
                number += 1
                path = root / f"{name}-{number:03d}"
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    continue
        folder = cls(path)
        try:
            with _disk(path):
                folder.checkpoint_dir.mkdir()
                write_atomically(folder.environment_path, (json.dumps(environment, indent=2) + "\n").encode())
            folder.write_config(config)  # last: a folder with a config is a whole one
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        return folder

    @classmethod
    def open(cls, path: Path) -> Self:
        """An existing run. Raises: UserError if `path` is none."""
        if not (path / "config.toml").is_file():
            raise UserError(f"{path} is no run folder (it has no config.toml); runs are folders such as runs/demo-001")
        return cls(path)

    def read_config(self) -> RunConfig:
        """The run's resolved settings."""
        from tinylora.config.recipe import load_recipe

        return load_recipe(str(self.config_path))

    def write_config(self, config: RunConfig) -> None:
        """Replace config.toml, atomically."""
        from tinylora.config.recipe import dump_config

        with _disk(self.path):
            write_atomically(self.config_path, dump_config(config).encode())

    def read_environment(self) -> dict[str, Any]:
        """Machine and versions that the run was started with."""
        environment: dict[str, Any] = json.loads(self.environment_path.read_text(encoding="utf-8"))
        return environment

    # --- lock ---

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process. The operating system lets go of it when the process ends, however it ends.

        Raises: UserError if another process (or another part of this one) holds it, naming that process's id.
        """
        # A soft lock (mere existence of a file) would outlive a kill -9, so a file system without flock is an error.
        lock = FileLock(self.path / ".lock", fallback_to_soft=False)
        pid_path = self.path / ".lock.pid"
        try:
            with no_room_is_a_user_error(self.path):
                lock.acquire(blocking=False)
        except Timeout:
            try:
                holder = f"process {int(pid_path.read_text())}"
            except (OSError, ValueError):  # it has only just taken the lock
                holder = "another process"
            raise UserError(
                f"run folder {self.path} is in use by {holder}; wait for it to end, or start a new run"
            ) from None
        except OSError as error:
            raise UserError(
                f"run folder {self.path} cannot be locked ({error.strerror}); "
                "it must be writable, on a file system that has locks"
            ) from error
        try:
            with _disk(self.path):
                pid_path.write_text(f"{os.getpid()}\n")
            self._lock = lock
            yield
        finally:
            self._lock = None
            pid_path.unlink(missing_ok=True)
            lock.release()

    def _require_lock(self) -> None:
        if self._lock is None:
            raise RuntimeError(f"{self.path}: hold RunFolder.lock() while writing to the run folder")

    # --- checkpoints ---

    def save_checkpoint(self, state: Mapping[str, Any]) -> Path:
        """Keep `state` (tensors, or what JSON holds) as the newest checkpoint; the previous one stays, older ones go.

        Call it after the step's lines were appended to the JSONL files: their lengths are recorded with it.
        Raises: UserError if there is no room (the earlier checkpoints stay); TypeError for a value that would not come
        back as it is.
        """
        self._require_lock()
        logs = [self.path / name for name in _LOGS]
        with _disk(self.checkpoint_dir):
            for log in logs:
                _sync(log)  # else a power cut could leave a checkpoint that counts lines which the disk never got
            log_bytes = {log.name: log.stat().st_size if log.exists() else 0 for log in logs}
            data = _pack(state, log_bytes)
            files = self._checkpoints()
            number = _number(files[0]) + 1 if files else 1
            path = self.checkpoint_dir / f"state-{number:08d}.safetensors"
            write_atomically(path, data)
            for old in files[1:]:
                old.unlink(missing_ok=True)
            for leftover in self.checkpoint_dir.glob("*.tmp"):
                leftover.unlink(
                    missing_ok=True
                )  # of a process killed while it wrote; the lock says that none writes now
        return path

    def load_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None if the run was stopped before its first. Changes nothing on the disk.

        Raises: UserError if there are checkpoints and none is whole.
        """
        problems: list[str] = []
        for path in self._checkpoints():
            try:
                state, log_bytes = _unpack(path)
            except _Corrupt as problem:
                problems.append(f"checkpoint {path.name} is corrupt ({problem})")
                continue
            warning = f"{'; '.join(problems)}; going on from the one before it, {path.name}" if problems else ""
            return Checkpoint(state, log_bytes, path, warning)
        if problems:
            raise UserError(f"{self.checkpoint_dir}: {'; '.join(problems)}; none is left, so start a new run")
        return None

    def resume(self) -> Checkpoint | None:
        """`load_checkpoint`, then put the folder in the state of that moment: the JSONL files are cut back to it.

        Corrupt newer checkpoints are renamed to *.corrupt, with a warning in the log. None (no checkpoint yet) empties
        the JSONL files: the run starts again at its first step.
        Raises: UserError if a JSONL file is shorter than the checkpoint says, that is, if lines were removed from it.
        """
        self._require_lock()
        checkpoint = self.load_checkpoint()
        lengths = checkpoint.log_bytes if checkpoint else dict.fromkeys(_LOGS, 0)
        for name, length in lengths.items():
            size = log.stat().st_size if (log := self.path / name).exists() else 0
            if size < length:
                raise UserError(
                    f"{log} holds {size} bytes but had {length} at the last checkpoint; "
                    "bring back its lines, or start a new run"
                )
        if checkpoint and checkpoint.warning:
            logger.warning("%s: %s", self.path, checkpoint.warning)
        for path in self._checkpoints():
            if checkpoint is None or path == checkpoint.path:
                break
            os.replace(path, path.with_name(path.name + ".corrupt"))  # else it would count as the newest of two later
        for name, length in lengths.items():
            if (log := self.path / name).exists():
                os.truncate(log, length)
                _sync(log)
        return checkpoint

    def _checkpoints(self) -> list[Path]:
        """Checkpoint files, newest first."""
        if not self.checkpoint_dir.is_dir():
            return []
        found = [p for p in self.checkpoint_dir.iterdir() if _CHECKPOINT_NAME.fullmatch(p.name)]
        return sorted(found, key=_number, reverse=True)


def _number(path: Path) -> int:
    match = _CHECKPOINT_NAME.fullmatch(path.name)
    assert match
    return int(match[1])


# --- one checkpoint file ---


class _Corrupt(Exception):
    """A checkpoint file that is not what was written."""


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported torch
    return torch is not None and isinstance(value, torch.Tensor)


def _is_json(value: Any) -> bool:
    """Whether JSON gives it back unchanged: no tuples (lists afterwards), no keys but text."""
    if isinstance(value, list):
        return all(map(_is_json, value))
    if isinstance(value, dict):
        return all(type(k) is str and _is_json(v) for k, v in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _digest(values: str, tensors: Mapping[str, Any]) -> str:
    import torch

    digest = hashlib.sha256(values.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def _pack(state: Mapping[str, Any], log_bytes: Mapping[str, int]) -> bytes:
    from safetensors.torch import save

    # contiguous().clone(): two names may share memory, which safetensors refuses
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items() if _is_tensor(v)}
    rest = {k: v for k, v in state.items() if k not in tensors}
    for name, value in rest.items():
        if not _is_json(value):
            raise TypeError(f"checkpoint state {name!r} must be a tensor or JSON (no tuples), got {value!r}")
    values = json.dumps({"state": rest, "log_bytes": dict(log_bytes), "order": list(state)})
    return save(tensors, {"format": _FORMAT, "values": values, "sha256": _digest(values, tensors)})


def _unpack(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header["__metadata__"]
        values, stored, kind = metadata["values"], metadata["sha256"], metadata["format"]
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _Corrupt(str(error) or type(error).__name__) from error
    if kind != _FORMAT:
        raise _Corrupt(f"its format is {kind!r}, this version reads {_FORMAT!r}")
    if _digest(values, tensors) != stored:
        raise _Corrupt("its checksum does not match")
    fields = json.loads(values)
    state = {name: tensors[name] if name in tensors else fields["state"][name] for name in fields["order"]}
    return state, fields["log_bytes"]


# --- disk ---


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """One sentence for a full disk, and for a place where this user may not write."""
    with no_room_is_a_user_error(path):
        try:
            yield
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"cannot write in {path} ({error.strerror}); choose another folder") from error


def write_atomically(path: Path, data: bytes) -> None:
    """After a kill or a power cut at any instant `path` holds the old bytes or the new ones, never a part of either."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # gives a full disk its room back
        raise
    _sync(path.parent)  # the rename itself


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk. A missing file is fine; Windows cannot flush a folder."""
    if not path.exists() or (os.name == "nt" and path.is_dir()):
        return
    fd = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- what may change on resume, and where ---


def resume_config(stored: RunConfig, changes: Sequence[str]) -> RunConfig:
    """The stored config with `--set` changes. Only train.steps, log.* and generation.kv_budget_gib may change: the rest
    would be another run.

    Raises: UserError that lists every other key that would change, with both values.
    """
    from tinylora.config.recipe import apply_overrides, diff_configs

    config = apply_overrides(stored, changes)
    refused = [d for d in diff_configs(stored, config) if d[0] not in MAY_CHANGE and not d[0].startswith("log.")]
    if refused:
        listed = ", ".join(f"{key} ({old!r} to {new!r})" for key, old, new in refused)
        raise UserError(
            f"only train.steps, log.* and generation.kv_budget_gib may change on resume, got {listed}; start a new run "
            "for that"
        )
    return config


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
        "cores": available_cores(),
        "threads": torch.get_num_threads() if torch else None,
        "cuda": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
        "git_commit": _git_commit(),
        "command": shlex.join(sys.argv),
    }


def numeric_differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """What differs between two environments and can move a float: on an empty list, resume promises the same bits.

    Threads are not in it: they are resolved into the run's config.
    """
    keys = ("python", "torch", "transformers", "tokenizers", "numpy", "tinylora", "machine", "cpu", "cuda")
    return [f"{k}: {stored.get(k)} then, {current.get(k)} now" for k in keys if stored.get(k) != current.get(k)]


def available_cores() -> int:
    """Cores that this process may really use: its affinity mask, cut by the cgroup's CPU quota (containers)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


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
