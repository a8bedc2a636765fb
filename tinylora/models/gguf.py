"""GGUF files, unpacked once into plain safetensors.

A GGUF base is defined as its dequantised weights rounded to bf16 (nearest even). The canonical weights are rounded to
bf16 in any case, so this makes a float32 load and a bf16 load one model, and halves the copy on disk. transformers
unpacks the blocks anew at every load (a dozen seconds for 135 M weights); the copy loads in under one.

Where the file stores an output head apart from the embeddings, the two stay apart, even if the publisher's own
checkpoint ties them: quantised at different precision they are different numbers.
"""

import contextlib
import inspect
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tinylora.errors import UserError
from tinylora.models.digest import remembered_sha256, sha256_of
from tinylora.models.quiet import quiet
from tinylora.paths import cache_dir

FORMAT = 1  # raise it when a conversion would give other weights, so that old copies are made again
MARKER = "conversion.json"
WEIGHTS = "model.safetensors"


def converted_folder(gguf: Path, sha256: str) -> Path:
    """A transformers folder with the weights, tokenizer and chat template of a GGUF file, converted unless it is there.

    It lies in the cache under the file's SHA-256. Two processes may ask at once; a copy that is incomplete or whose
    bytes have changed is made again.
    Raises: UserError for a damaged file, an architecture that transformers does not know, and a full disk.
    """
    folder = cache_dir() / "converted" / sha256
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{sha256}.lock"):
            if not _is_complete(folder):
                _convert(gguf, folder)
    except OSError as error:
        raise UserError(
            f"could not write the unpacked copy of {gguf} into {folder.parent}: {error}; "
            f"choose another folder with TINYLORA_CACHE"
        ) from error
    return folder


def _is_complete(folder: Path) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text())
        return bool(marker["format"] == FORMAT and marker["weights_sha256"] == remembered_sha256(folder / WEIGHTS))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    _check_room(gguf, folder.parent)
    print(f"unpacking {gguf.name} into {folder} (once)", file=sys.stderr)
    prefix = f".convert-{folder.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a process that was killed; the lock is ours
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as name:
        scratch = Path(name) / "model"
        model, tokenizer = _read(gguf)
        with quiet():
            _as_plain_bf16(model).save_pretrained(scratch, max_shard_size="1000GB")
            tokenizer.save_pretrained(scratch)
        del model
        marker = {"format": FORMAT, "gguf": gguf.name, "weights_sha256": sha256_of(scratch / WEIGHTS)}
        (scratch / MARKER).write_text(json.dumps(marker))
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)


def _check_room(gguf: Path, folder: Path) -> None:
    # bf16 takes at most 16 / 2 times a 2-bit file; 4 bits are the usual case. A check, not a promise.
    needed, free = 4 * gguf.stat().st_size, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no room to unpack {gguf} into {folder}: {free / 1e6:.0f} MB free, about {needed / 1e6:.0f} MB needed; "
            f"free some, or choose another folder with TINYLORA_CACHE"
        )


def _read(gguf: Path) -> tuple[Any, Any]:
    """The model, dequantised in float32, and the tokenizer of a GGUF file."""
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32}
    config_class = getattr(transformers, "GgufConfig", None)
    if config_class and "dequantize" in inspect.signature(config_class).parameters:
        # With the `kernels` package installed, transformers would keep the weights packed: no nn.Linear to adapt.
        options["quantization_config"] = config_class(gguf_file=gguf.name, dequantize=True)
    try:
        # transformers draws one bar here whatever it is told, hence the redirection
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    except MemoryError:
        raise
    except Exception as error:  # the parsers raise nearly anything on a truncated file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "not supported" in reason or "recogni" in reason:
            raise UserError(
                f"transformers {transformers.__version__} cannot load the GGUF file {gguf}: {reason}; "
                f"give a model folder or another file"
            ) from error
        raise UserError(f"the GGUF file {gguf} is damaged or not well-formed ({reason}); fetch it again") from error
    return model, tokenizer


def _as_plain_bf16(model: Any) -> Any:
    """The same model in bf16 without its quantisation record, under which save_pretrained would refuse it."""
    from transformers import AutoModelForCausalLM

    fields = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config = type(model.config).from_dict(fields)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
