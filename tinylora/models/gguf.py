"""GGUF files, unpacked once into plain safetensors.

A GGUF base is defined as its dequantised weights rounded to bf16 (nearest even). The canonical weights are rounded to
bf16 in any case, so this makes a float32 load and a bf16 load one model, and halves the copy on disk. transformers
unpacks the blocks anew at every load (a dozen seconds for 135 M weights); the copy loads in under one.

Where the file stores an output head apart from the embeddings, the two stay apart, even if the publisher's own
checkpoint ties them: quantised at different precision they are different numbers.

transformers leaves scaled rotary positions out of account in a GGUF file, and says nothing; such a file is refused.
"""

import contextlib
import inspect
import io
import json
import math
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from tinylora.errors import UserError
from tinylora.models.gguf_header import GgufHeader, read_header, refuse_part
from tinylora.models.loading_report import refuse_missing, some_of
from tinylora.models.names import refuse_adapter
from tinylora.models.quiet import quiet
from tinylora.models.sizes import check_header, larger_than_files
from tinylora.system.digest import remembered_sha256, sha256_of
from tinylora.system.paths import cache_dir
from tinylora.system.progress import Bar
from tinylora.talk import say_to_stderr

FORMAT = 3  # raise it when a conversion would give other weights, or none, so that old copies are made again
MARKER = "conversion.json"
WEIGHTS = "model.safetensors"
UNROTATED = 1e30
"""The factor by which a GGUF file marks a pair of channels that is not rotated at all."""


def converted_folder(gguf: Path, sha256: str) -> Path:
    """A transformers folder with the weights, tokenizer and chat template of a GGUF file, converted unless it is there.

    It lies in the cache under the file's SHA-256. Two processes may ask at once; a copy that is incomplete or whose
    bytes have changed is made again.
    Raises: UserError for a damaged file or a part of one, tensors that are not there, an architecture that transformers
    does not know, scaled rotary positions, a PEFT adapter beside the file, and a full disk.
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
    say_to_stderr(f"unpacking {gguf.name} into {folder} (once)")
    prefix = f".convert-{folder.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a process that was killed; the lock is ours
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as name:
        scratch = Path(name) / "model"
        with Bar(f"unpacking {gguf.name}", None, "tensors") as bar:
            model, tokenizer = _read(gguf, bar)
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


class _Heard(io.StringIO):
    """Takes in the bar that transformers draws, and moves ours by the count in it, such as 34/272."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._bar = bar

    def write(self, text: str) -> int:
        if found := re.search(r"\b(\d+)/(\d+) ", text):
            self._bar.update(int(found[1]), int(found[2]))
        return len(text)


def _read(gguf: Path, bar: Bar) -> tuple[Any, Any]:
    """The model, dequantised in float32, and the tokenizer of a GGUF file; `bar` counts its tensors.

    Raises: UserError for a damaged file or a part of one, tensors that are not there, an architecture that transformers
    does not know, scaled rotary positions, and a PEFT adapter beside the file.
    """
    import transformers

    refuse_adapter(gguf.parent, gguf.name, "move one of them into another folder")
    header = read_header(gguf)
    refuse_part(gguf, header)
    check_header(str(gguf), header)

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.float32, "output_loading_info": True}
    config_class = getattr(transformers, "GgufConfig", None)
    if config_class and "dequantize" in inspect.signature(config_class).parameters:
        # With the `kernels` package installed, transformers would keep the weights packed: no nn.Linear to adapt.
        options["quantization_config"] = config_class(gguf_file=gguf.name, dequantize=True)
    try:
        # transformers draws one bar here whatever it is told, hence the redirection
        with quiet(), contextlib.redirect_stderr(_Heard(bar)):
            _refuse_scaled_positions(gguf)
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            config = transformers.AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
            if reason := larger_than_files(config, 8 * gguf.stat().st_size):
                raise UserError(f"the GGUF file {gguf} {reason}")
            model, report = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, config=config, **options)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # the parsers raise nearly anything on a truncated file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "not supported" in reason or "recogni" in reason:
            raise UserError(
                f"transformers {transformers.__version__} cannot load the GGUF file {gguf}: {reason}; "
                f"give a model folder or another file"
            ) from error
        raise UserError(f"the GGUF file {gguf} is damaged or not well-formed ({reason}); fetch it again") from error
    refuse_missing(str(gguf), report)
    _check_dropped(gguf, header, model)
    return model, tokenizer


def _check_dropped(gguf: Path, header: GgufHeader, model: Any) -> None:
    """Tensors that transformers has no place for and leaves out without a word: a renamed head, or biases, say.

    Raises: UserError where the model computes something else without them; of others it is said.
    """
    dropped = _dropped(header, model)
    head = header.shapes.get("token_embd.weight")
    vital = [name for name in dropped if name.endswith(".bias") or header.shapes[name] == head]
    if vital:
        raise UserError(
            f"transformers has no place for {len(vital)} tensors of the GGUF file {gguf} ({some_of(vital)}), and would "
            "load another model without them; give the folder or hub id with the model's safetensors instead"
        )
    if dropped:
        say_to_stderr(f"transformers leaves out {len(dropped)} tensors of {gguf.name} ({some_of(dropped)})")


def _dropped(header: GgufHeader, model: Any) -> list[str]:
    own = [name for name in header.shapes if "rope_freqs" not in name and "rope_factors" not in name]
    taken = {value.data_ptr(): value.numel() for value in model.state_dict().values()}
    if sum(math.prod(header.shapes[name]) for name in own) <= sum(taken.values()):
        return []
    from transformers import modeling_gguf_pytorch_utils as reading

    make = reading.TENSOR_PROCESSORS.get(header.architecture, reading.TensorProcessor)
    try:
        known = reading.get_gguf_hf_weights_map(model, make(config=model.config.to_dict()))
    except (AttributeError, TypeError, ValueError, KeyError, NotImplementedError):
        return []  # names that only transformers knows; none of them lacked
    return [name for name in own if name not in known]


def _refuse_scaled_positions(gguf: Path) -> None:
    """Raises: UserError if the file scales its rotary positions. Weights are not read."""
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    values = {key: field.contents() for key, field in reader.fields.items() if ".rope.scal" in key}
    found = _scaled_by_metadata(values) or _scaled_by_tensors(reader)
    if found:
        raise UserError(
            f"the GGUF file {gguf} scales its rotary positions ({found}), and transformers reads a GGUF file without "
            f"that, which is another model; give the folder or hub id with the model's safetensors instead"
        )


def _scaled_by_metadata(values: dict[str, Any]) -> str:
    """What scales the positions, by the keys *.rope.scaling.* and *.rope.scale_linear; empty if nothing does.

    As llama.cpp reads them: no type means linear, a factor of 0 stands for none, and the type none turns the rest off.
    """
    by_name = {key.split(".rope.", 1)[1]: (key, value) for key, value in values.items()}
    key, kind = by_name.get("scaling.type", ("", "linear"))
    if kind == "none":
        return ""
    stated = [by_name[name] for name in ("scaling.factor", "scale_linear", "scaling.attn_factor") if name in by_name]
    told = ", ".join(f"{one} = {value}" for one, value in ([(key, kind)] if key else []) + stated)
    unscaled = all(value in (0, 1) for _, value in stated) and (stated or kind == "linear")
    return "" if unscaled else told


def _scaled_by_tensors(reader: Any) -> str:
    """The tensor with factors of the frequencies that are not all 1; empty if there is none."""
    from gguf import dequantize

    architecture = reader.fields.get("general.architecture")
    for tensor in reader.tensors:
        if "rope_freqs" not in tensor.name and "rope_factors" not in tensor.name:
            continue
        factors = dequantize(tensor.data, tensor.tensor_type).ravel()
        if architecture and architecture.contents() == "gemma4":
            # Its first quarter is rotated and the rest is not, which transformers assumes of every Gemma 4.
            rotated = len(factors) // 4
            if (factors[rotated:] >= UNROTATED / 2).all():
                factors = factors[:rotated]
        if not (factors == 1).all():
            return f"the tensor {tensor.name}, factors from {factors.min():g} to {factors.max():g}"
    return ""


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
