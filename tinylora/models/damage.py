"""What is wrong with a model that does not load: one sentence, and the file that is to blame where one is.

Libraries raise nearly anything on a damaged file, and seldom name it. So the files are looked at once it has failed.
"""

import json
import pickle
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tinylora.errors import UserError
from tinylora.models.loading_report import some_of
from tinylora.models.names import Source, weight_files

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "*.index.json",
)
AGAIN = "fetch it again"
LFS = b"version https://git-lfs"


def explain(source: Source, error: Exception, folder: Path | None = None, misfits: Sequence[str] = ()) -> NoReturn:
    """Raise one sentence for what a library raised.

    `folder`: where the model's files lie; `misfits`: tensors that do not fit, where transformers named some.
    """
    import transformers

    text = " ".join(str(error).split())
    short = text if len(text) <= 240 else f"{text[:240]}…"
    harmed = _damaged(folder) if folder is not None else ""
    if misfits:
        advice = (
            f"has weights that are not those of its config.json ({some_of(misfits)} of other shapes, or not complete); "
            "fetch it again, whole"
        )
    elif harmed:
        advice = harmed
    elif "trust_remote_code" in text:
        advice = "brings code of its own; set model.trust_remote_code=true if you trust that repository"
    elif "does not recognize this architecture" in text or "Unrecognized model" in text or isinstance(error, KeyError):
        advice = f"has an architecture that transformers {transformers.__version__} does not know ({short})"
    elif type(error).__name__ == "SafetensorError":
        advice = f"has a damaged weight file ({short}); {AGAIN}"
    elif "no file named" in text:
        advice = f"has no weight file ({short})"
    elif folder is not None and not _has_tokenizer(folder):
        advice = f"has no tokenizer ({folder} lacks tokenizer.json); {AGAIN}, whole"
    else:
        advice = f"could not be loaded ({type(error).__name__}: {short or 'no reason given'})"
    raise UserError(f"the model {source.name} {advice}") from error


def refuse_damaged(source: Source, folder: Path, *names: str) -> None:
    """Raises: UserError that names the first of a folder's files that cannot be read; `names`: of those JSON files."""
    if reason := _damaged(folder, names):
        raise UserError(f"the model {source.name} {reason}")


def _has_tokenizer(folder: Path) -> bool:
    return any(any(folder.glob(name)) for name in ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "spiece*"))


def _damaged(folder: Path, names: Sequence[str] = ()) -> str:
    """The first file of a model's folder (or of those JSON files) that cannot be read, and why; empty if all can."""
    for pattern in names or JSON_FILES:
        for file in sorted(folder.glob(pattern)):
            if reason := _reason(_read_json, file):
                return f"has a damaged {file.name} ({reason}); {AGAIN}"
    if names:
        return ""
    if reason := _reason(_read_tokenizer, folder / "tokenizer.json"):
        return f"has a damaged tokenizer.json ({reason}); {AGAIN}"
    for file in weight_files(folder):
        if reason := _reason(_read_weights, file):
            return f"has a damaged weight file ({file.name}: {reason}); {AGAIN}"
        if file.suffix == ".bin" and (reason := _reason(_read_pickled, file)):
            return reason
    return ""


def _reason(read: Callable[[Path], str], file: Path) -> str:
    try:
        return read(file)
    except Exception as error:  # whatever it is, it is what we came to tell
        return " ".join(str(error).split())[:160] or type(error).__name__


def _read_json(file: Path) -> str:
    if not file.stat().st_size:
        return "it is empty"
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return f"it holds {type(content).__name__} where an object is wanted"
    if file.name == "config.json" and not isinstance(content.get("model_type"), str) and "auto_map" not in content:
        return "it names no model_type"
    return ""


def _read_tokenizer(file: Path) -> str:
    from tokenizers import Tokenizer

    if file.is_file():
        Tokenizer.from_file(str(file))
    return ""


def _read_weights(file: Path) -> str:
    from safetensors import safe_open

    if not file.stat().st_size:
        return "it is empty"
    with file.open("rb") as handle:
        if handle.read(len(LFS)) == LFS:
            return "it is a pointer of git-lfs and not the file itself; in the clone run git lfs pull"
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):
            pass
    return ""


def _is_zip(file: Path) -> bool:
    with file.open("rb") as handle:
        return handle.read(2) == b"PK"


def _read_pickled(file: Path) -> str:
    """What torch says of a pickled file, whose code it does not run."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that it then refuses
            found = torch.load(file, map_location="meta", weights_only=True, mmap=_is_zip(file))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named[1]})" if named else ""
        return (
            f"has {file.name}, a pickled file that holds more than weights{what} or is damaged, and torch refuses to "
            "run its code; give the model's safetensors, or convert the file where you trust it"
        )
    except Exception as error:
        short = " ".join(str(error).split())[:160] or type(error).__name__
        return f"has a damaged weight file ({file.name}: {short}); {AGAIN}"
    if not isinstance(found, dict):
        return f"has a weight file ({file.name}) that holds {type(found).__name__} and no weights; {AGAIN}"
    return ""
