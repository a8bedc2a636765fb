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
from tinylora.store.adapter_file import BEST, LAST
from tinylora.store.checkpoint import CHECKPOINT_NAME, Checkpoint, Corrupt, number_of, pack, unpack
from tinylora.system.failures import NO_ROOM, cannot_write, reason, writing
from tinylora.system.files import cut, flush, replace_file, write_atomically
from tinylora.system.folders import check_name
from tinylora.system.jsonl import GO_ON, read_jsonl

logger = logging.getLogger("tinylora")

SKIPPED = "skipped.jsonl"
"""Items that task.skip leaves out, and why."""
_LOGS = ("metrics.jsonl", "samples.jsonl")
CHOOSE = "choose another folder"


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
        with writing(root, CHOOSE):
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
            with writing(path, CHOOSE):
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
        from tinylora.config.recipe import read_settings

        return read_settings(self.config_path)

    def write_config(self, config: RunConfig) -> None:
        """Replace config.toml, atomically."""
        from tinylora.config.schema import dump_config

        write_atomically(self.config_path, dump_config(config).encode(), again=GO_ON)

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
            if error.errno in NO_ROOM:
                raise cannot_write(error, self.path, again=GO_ON) from error
            raise UserError(
                f"run folder {self.path} cannot be locked ({reason(error)}); "
                "it must be writable, on a file system that has locks"
            ) from error
        try:
            with writing(pid_path, CHOOSE, GO_ON):  # of no use after a power cut, so it is not flushed
                replace_file(pid_path, lambda scratch: scratch.write_text(f"{os.getpid()}\n"))
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
        with writing(self.checkpoint_dir, CHOOSE, GO_ON):
            for log in logs:
                flush(log)  # else a power cut could leave a checkpoint that counts lines which the disk never got
            log_bytes = {log.name: log.stat().st_size if log.exists() else 0 for log in logs}
            data = pack(state, log_bytes)
            files = self._checkpoints()
            # That before the first step has the number 0.
            number = number_of(files[0]) + 1 if files else int(state.get("step") != 0)
            path = self.checkpoint_dir / f"state-{number:08d}.safetensors"
            write_atomically(path, data, again=GO_ON)
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

    def has_checkpoint(self) -> bool:
        """Whether there is one, whole or not."""
        return bool(self._checkpoints())

    def resume(self) -> Checkpoint | None:
        """`load_checkpoint`, `check_logs`, then `cut_back`: the folder as it was at the checkpoint that it gives."""
        checkpoint = self.load_checkpoint()
        self.check_logs(checkpoint)
        self.cut_back(checkpoint)
        return checkpoint

    def check_logs(self, checkpoint: Checkpoint | None) -> None:
        """That the folder's other files agree with the newest whole checkpoint (None: there is none). Changes nothing.

        Raises: UserError if there are steps and no checkpoint, which is saved before the first one; if lines were
        removed from a JSONL file, or changed.
        """
        if checkpoint is None:
            self._check_nothing_was_done()
            return
        for name, length in checkpoint.log_bytes.items():
            size = log.stat().st_size if (log := self.path / name).exists() else 0
            if size < length:
                raise UserError(
                    f"{log} holds {size} bytes but had {length} at the last checkpoint; "
                    "bring back its lines, or start a new run"
                )
            if length and _byte_at(log, length - 1) != b"\n":
                raise UserError(
                    f"{log} is not as it was at the last checkpoint, when a line ended at byte {length}; "
                    "bring back its lines, or start a new run"
                )

    def _check_nothing_was_done(self) -> None:
        told = [row.get("step") for row in read_jsonl(self.metrics_path)]
        steps = max((step for step in told if isinstance(step, int)), default=0)
        made = next((name for name in (BEST, LAST) if (self.path / name).exists()), "")
        if steps or made:
            has = f"{steps} steps in {self.metrics_path.name}" if steps else f"a trained {made}"
            raise UserError(
                f"{self.path} has {has} and no checkpoint to go on from: bring back {self.checkpoint_dir}/state-*, or "
                "start a new run"
            )

    def cut_back(self, checkpoint: Checkpoint | None) -> None:
        """Put the folder in the state of a checkpoint that `check_logs` agreed to: its JSONL files are cut back.

        Corrupt newer checkpoints are renamed to *.corrupt, with a warning in the log. Where more steps would be cut
        than a kill explains, the file is kept as *.old, and a warning says so. None (no step was done) empties them.
        """
        self._require_lock()
        lengths = checkpoint.log_bytes if checkpoint else dict.fromkeys(_LOGS, 0)
        if checkpoint and checkpoint.warning:
            logger.warning("%s: %s", self.path, checkpoint.warning)
        with writing(self.path, CHOOSE, GO_ON):
            self.checkpoint_dir.mkdir(exist_ok=True)
            for path in self._checkpoints():
                if checkpoint is None or path == checkpoint.path:
                    break
                # else it would count as the newest of two later
                os.replace(path, path.with_name(path.name + ".corrupt"))
            ahead = self._steps_ahead(lengths.get(self.metrics_path.name, 0)) if checkpoint else 0
            if ahead > 2 and ahead > 2 * self._steps_between():  # the settings are read where they could matter
                self._keep_as_old()
            for name, length in lengths.items():
                if (log := self.path / name).exists():
                    cut(log, length)

    def _steps_ahead(self, length: int) -> int:
        """Steps in metrics.jsonl beyond its first so many bytes: a line is one."""
        return self.metrics_path.read_bytes().count(b"\n", length) if self.metrics_path.exists() else 0

    def _steps_between(self) -> int:
        """Two checkpoints are this far apart, and two are kept: a kill and a damaged file explain twice as many."""
        return self.read_config().log.checkpoint_every

    def _keep_as_old(self) -> None:
        for name in _LOGS:
            if (log := self.path / name).exists():
                old = log.with_name(name + ".old")
                write_atomically(old, log.read_bytes(), again=GO_ON)
                logger.warning("%s goes on far beyond the checkpoint; it is cut back, and kept as %s", log, old.name)

    def _checkpoints(self) -> list[Path]:
        """Checkpoint files, newest first."""
        if not self.checkpoint_dir.is_dir():
            return []
        found = [p for p in self.checkpoint_dir.iterdir() if CHECKPOINT_NAME.fullmatch(p.name)]
        return sorted(found, key=number_of, reverse=True)


def _byte_at(path: Path, place: int) -> bytes:
    with path.open("rb") as file:
        file.seek(place)
        return file.read(1)
