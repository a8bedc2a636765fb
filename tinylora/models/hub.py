"""Models on the hub: one commit of a repository, downloaded whole and then loaded like any other folder.

transformers would resolve each file's revision on its own and does not always say to what. Downloading the snapshot
first settles the commit once, so that config, tokenizer and weights belong together and the run can record it.
"""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinylora.errors import UserError
from tinylora.models.embedded import EMBEDDED
from tinylora.models.names import refuse_adapter, weight_files
from tinylora.system.progress import Bar

WEIGHTS = "*.safetensors"
PICKLED_WEIGHTS = "*.bin"
REST = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
CODE = "*.py"
# Other formats and copies of the same weights
NEVER = ["*/*", "consolidated*", "training_args.bin", "optimizer.bin", "adapter_model*"]


def hub_folder(name: str, revision: str, trust_remote_code: bool) -> tuple[Path, str]:
    """The local folder of one commit of a hub model, downloaded unless it is in the hub's cache, and that commit.

    Offline, what the cache holds of that revision is used. Pickled weights are only fetched if there are no
    safetensors, and code only if it is trusted.
    Raises: UserError if it does not exist, may not be read, cannot be reached, or holds a PEFT adapter, too.
    """
    patterns = [WEIGHTS, *REST, *([CODE] if trust_remote_code else [])]
    folder = _download(name, revision, patterns)
    if not any(file.match(WEIGHTS) for file in weight_files(folder)):
        folder = _download(name, revision, [PICKLED_WEIGHTS, *patterns])
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} on the hub has no config.json; give a model in transformers' format")
    command = f"hf download {name}{f' --revision {revision}' if revision else ''}"
    refuse_adapter(
        folder, name, f"fetch it without ({command} --exclude 'adapter_*' --local-dir FOLDER) and give that folder"
    )
    return folder, folder.name  # the hub's cache names a snapshot's folder by its commit


def _download(name: str, revision: str, patterns: list[str]) -> Path:
    from huggingface_hub import errors, snapshot_download

    options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": NEVER}
    try:
        with Bar(f"fetching {name}", 0, "files") as bar, _no_bars_of_the_hub():
            return Path(snapshot_download(name, revision=revision or None, tqdm_class=_reports_to(bar), **options))
    except errors.GatedRepoError as error:
        advice = "is gated on the hub; accept its terms on its page there and log in with: hf auth login"
        raise UserError(f"the model {name} {advice}") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"the model {name} has no revision {revision!r} on the hub; check model.revision") from error
    except errors.RepositoryNotFoundError as error:
        advice = "is neither a folder here nor a model on the hub that you may read; check the name, or log in with:"
        raise UserError(f"the model {name} {advice} hf auth login") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise UserError(
            f"the model {name}{at} is no folder here and not in the hub's cache on this machine, and the hub cannot be "
            f"reached; run again online, or use {' or '.join(EMBEDDED)}"
        ) from error
    except OSError as error:
        raise UserError(f"the model {name} could not be downloaded from the hub: {error}") from error


@contextmanager
def _no_bars_of_the_hub() -> Iterator[None]:
    """Versions of its library that ask `tqdm_class` for the bar of the whole alone draw one for each file besides."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or are_progress_bars_disabled():
        yield  # as the user wants it
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _reports_to(bar: Bar) -> type:
    """What the hub's library takes for a class of bars: moves ours, by bytes where they are counted, else by files."""
    from tqdm import tqdm

    class Reports(tqdm):
        """Draws nothing."""

        monitor_interval = 0  # no thread that looks after it

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"file": io.StringIO(), "disable": not bar.is_on})

        def display(self, *_: Any, **__: Any) -> None:
            if self.unit == "B":
                bar.unit = "bytes"
            # Of several that count bytes (received, written) the one that is ahead.
            if bar.unit == ("bytes" if self.unit == "B" else "files") and self.n >= bar.done:
                bar.update(int(self.n), int(self.total or 0))

    Reports.set_lock(threading.RLock())  # tqdm's own would start a process
    return Reports
