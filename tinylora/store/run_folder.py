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

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.store.checkpoint import CHECKPOINT_NAME, Checkpoint, Corrupt, number_of, pack, unpack
from tinylora.system.files import disk_in_words, flush, no_room_is_a_user_error, write_atomically
from tinylora.system.folders import check_name

logger = logging.getLogger("tinylora")

SKIPPED = "skipped.jsonl"
"""Items that task.skip leaves out, and why."""
_LOGS = ("metrics.jsonl", "samples.jsonl")


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
        check_name(name, "a run's name")
        with disk_in_words(root):
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
            with disk_in_words(path):
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
        from tinylora.config.schema import dump_config

        with disk_in_words(self.path):
            write_atomically(self.config_path, dump_config(config).encode())

    def read_environment(self) -> dict[str, Any] | None:
        """Machine and versions that the run was started with; None where the file is not there or cannot be read."""
        try:
            environment = json.loads(self.environment_path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return environment if isinstance(environment, dict) else None

    def day_of_start(self) -> str:
        """The day on which environment.json was written, YYYY-MM-DD; empty where it is not there."""
        try:
            return datetime.fromtimestamp(self.environment_path.stat().st_mtime).date().isoformat()
        except OSError:
            return ""

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
            with disk_in_words(self.path):
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
        with disk_in_words(self.checkpoint_dir):
            for log in logs:
                flush(log)  # else a power cut could leave a checkpoint that counts lines which the disk never got
            log_bytes = {log.name: log.stat().st_size if log.exists() else 0 for log in logs}
            data = pack(state, log_bytes)
            files = self._checkpoints()
            number = number_of(files[0]) + 1 if files else 1
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
                state, log_bytes = unpack(path)
            except Corrupt as problem:
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
                flush(log)
        return checkpoint

    def _checkpoints(self) -> list[Path]:
        """Checkpoint files, newest first."""
        if not self.checkpoint_dir.is_dir():
            return []
        found = [p for p in self.checkpoint_dir.iterdir() if CHECKPOINT_NAME.fullmatch(p.name)]
        return sorted(found, key=number_of, reverse=True)


# --- one checkpoint file ---


# --- disk ---


# --- what may change on resume, and where ---
