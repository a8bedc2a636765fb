"""TensorBoard, W&B and Trackio behind the small interface `Tracker` (log, close). Imported only if asked for."""

import hashlib
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tinylora.errors import UserError
from tinylora.training.metrics import Tracker


def _require(module: str, tracker: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"log.trackers names {tracker!r}, whose package is not installed ({error}); "
            f"install it with: pip install 'tinylora[{tracker}]', or leave it out of log.trackers"
        ) from error


class TensorBoardTracker:
    """Event files in RUN/tensorboard; look at them with: tensorboard --logdir RUN.

    `first_step`: on resume, TensorBoard is told to hide what an earlier process logged at or after this step.
    """

    def __init__(self, run: Path, config: Mapping[str, Any], first_step: int) -> None:
        module = _require("torch.utils.tensorboard", "tensorboard")
        # A fresh run has nothing to hide: None, where 0 would write a purge event.
        self._writer: Any = module.SummaryWriter(str(run / "tensorboard"), purge_step=first_step or None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point on each name's curve, on the disk when this returns."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandbTracker:
    """One W&B run per run folder: a resumed run goes on under the same id. W&B keeps what it saw first of a step."""

    def __init__(self, run: Path, config: Mapping[str, Any], first_step: int) -> None:
        wandb = _require("wandb", "wandb")
        self._run: Any = wandb.init(
            project="tinylora", name=run.name, id=_run_id(run), resume="allow", dir=str(run), config=dict(config)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point on each name's curve."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Mark the run as ended."""
        self._run.finish()


class TrackioTracker:
    """One Trackio run per run folder, kept on this machine; look at it with: trackio show."""

    def __init__(self, run: Path, config: Mapping[str, Any], first_step: int) -> None:
        trackio = _require("trackio", "trackio")
        self._run: Any = trackio.init(project="tinylora", name=_run_id(run), resume="allow", config=dict(config))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One point on each name's curve."""
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        """Mark the run as ended."""
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}


def make_trackers(
    names: Sequence[str], run: Path, config: Mapping[str, Any] | None = None, first_step: int = 0
) -> list[Tracker]:
    """The trackers that `log.trackers` names, for the run in folder `run`; `config` is shown beside its curves.

    Raises: UserError for an unknown name (lists the known ones), or a package that is missing (says what to install).
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"log.trackers must be among {', '.join(TRACKERS)}, got {name!r}")
    return [TRACKERS[name](run, config or {}, first_step) for name in names]


def _run_id(run: Path) -> str:
    """The same for every process that works on this folder, different for another demo-001 elsewhere."""
    digest = hashlib.sha256(str(run.resolve()).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', run.name)}-{digest}"
