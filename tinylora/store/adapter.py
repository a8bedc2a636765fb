"""An adapter in whatever form somebody has it: a run, a file, a code. Opened here, put on a base, or made portable.

Leaves out: foreign formats (interop/), which are imported into one of these forms first.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinylora.adapter.code import from_code, looks_like_a_code
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.explicit import FILE as EXPLICIT_FILE
from tinylora.adapter.explicit import FORMAT as EXPLICIT_FORMAT
from tinylora.adapter.explicit import ExplicitFactors, load_explicit
from tinylora.adapter.portable import MAGIC, PortableAdapter, ValueType, parse_adapter, round_values
from tinylora.config.method import MethodConfig
from tinylora.config.run import ModelConfig, RunConfig
from tinylora.config.strangers import as_a_stranger_says
from tinylora.errors import UserError
from tinylora.models.bases import lookup, read_name
from tinylora.models.fingerprint import Fingerprint
from tinylora.store.adapter_file import BEST, load_facts, load_vector
from tinylora.store.own import is_own, unsettled
from tinylora.talk import shell_line

SUFFIX = ".tinylora"
MOST_FILE_BYTES = 2**27
"""A portable file is never larger: 2^24 numbers in float32, and a header."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """v and what gives it meaning."""

    label: str
    """As it was given; a long code is cut short."""
    v: Tensor
    """(groups, u) float32."""
    config: AdapterConfig | None
    """None where the factors are explicit."""
    explicit: ExplicitFactors | None = None
    fingerprint: Fingerprint | None = None
    """Of the base; None where the file does not say."""
    check: bytes = b""
    """Of the basis; empty where the file does not say."""
    run: RunConfig | None = None
    """The settings of training, where the file has them."""
    value_type: ValueType = "float32"
    is_own: bool = False
    """Whether its settings are this user's own (store/own.py); a stranger's choose no code and no file."""
    in_run: bool = False
    """Whether a run folder was named, into which what belongs to the run is written."""
    folder: Path | None = None
    """The folder that was named, or the run that the file lies in, whose metrics tell what training drew; else None."""

    @property
    def method(self) -> MethodConfig:
        """What was trained: TinyLoRA's v, unless the run says otherwise."""
        return self.run.method if self.run is not None else MethodConfig()

    @property
    def base_name(self) -> str:
        """A name under which the base can be loaded here; empty if none is known."""
        if self.run is not None:
            return self.run.model.name
        known = lookup(self.fingerprint) if self.fingerprint else None
        return next((name for name in known.names if not _is_gone(name)), known.names[0]) if known else ""

    def settings(self, model: str = "") -> RunConfig:
        """Settings to run it with: those of training where they are known, defaults otherwise.

        model: the base to load, instead of the one that is known. Of a stranger's settings, what chooses code, files or
        the network is left out, and a base is taken that is embedded, or was loaded on this machine before.
        Raises: UserError if there is none.
        """
        name = model or self.base_name
        if not name:
            assert self.fingerprint is None or isinstance(self.fingerprint, Fingerprint)
            which = f" (fingerprint {self.fingerprint.hex()})" if self.fingerprint else ""
            raise UserError(f"the base of {self.label}{which} has not been seen on this machine; name it with --model")
        config = self.run or RunConfig()
        if self.run is not None and not self.is_own:
            if not model:
                self._check_base_is_known(self.run.model)
            config = as_a_stranger_says(config, kept=("model.name", "model.revision"))
        if model or self.run is None:
            name, revision, quantization = read_name(name)
            if model:  # another copy of the base, quantised as the one that is known
                quantization = config.model.quantization if self.run is not None else read_name(self.base_name)[2]
            config = replace(config, model=ModelConfig(name=name, revision=revision, quantization=quantization))  # type: ignore[arg-type]
        return replace(config, adapter=self.config) if self.config is not None else config

    def _check_base_is_known(self, model: ModelConfig) -> None:
        """Raises: UserError for a base that a stranger's file alone names: it does not choose what is loaded here."""
        if "model.name" in unsettled(RunConfig(model=model), ("model",)):
            raise UserError(
                f"{self.label} was not made by you on this machine, its base {model.name!a} has not been loaded "
                "here before, and a file does not choose what is loaded; if it is the right one, name it with --model"
            )

    def to_portable(self, value_type: ValueType = "float32") -> PortableAdapter:
        """The adapter as a file of tens of bytes.

        Raises: UserError for explicit factors, or where base and basis are not known yet (`completed` finds them).
        """
        if self.method.name != "tinylora":
            raise UserError(
                f"{self.label} holds {self.method.describe()}, {self.v.numel():,} numbers; only TinyLoRA's have a "
                "short form. What PEFT knows lies as its own adapter in the run's folder peft"
            )
        if self.explicit is not None or self.config is None:
            raise UserError(
                f"{self.label} brings factors of its own ({self.explicit.origin if self.explicit else ''}), which no "
                "base and seed give back, so it has no short form; keep the file with its factors, or export it"
            )
        if self.fingerprint is None or not self.check:
            raise ValueError("fingerprint and check are not known")
        portable = PortableAdapter(
            config=self.config, fingerprint=bytes(self.fingerprint), check=self.check, values=self.v.numpy(),
        )  # fmt: skip
        return portable.rounded(value_type)

    def rounded(self, value_type: ValueType) -> "Adapter":
        """The same adapter with its numbers rounded. Raises: UserError if one becomes infinite."""
        return replace(self, v=torch.from_numpy(round_values(self.v.numpy(), value_type).copy()), value_type=value_type)


def _is_gone(name: str) -> bool:
    """Whether this is a path that is no longer there; names of the hub never are."""
    return name.startswith(("/", ".", "~")) and not _exists(_expanded(read_name(name)[0]))


def open_adapter(reference: str | Path) -> Adapter:
    """The adapter that a run folder, a file or a code holds.

    Raises: UserError, one sentence, for anything else.
    """
    opened = _open(reference)
    path = _expanded(str(reference))
    if not _exists(path):
        return opened
    if path.is_dir():
        return replace(opened, folder=path)
    return replace(opened, folder=path.parent if (path.parent / "metrics.jsonl").is_file() else None)


def _open(reference: str | Path) -> Adapter:
    text = str(reference)
    if not text.strip():
        raise UserError("the adapter's name is empty; give a run folder, an adapter file, or a code")
    if looks_like_a_code(text) and not _exists(Path(text)):
        code = "".join(text.split())
        label = code if len(code) <= 24 else f"{code[:12]}...{code[-6:]}"
        return _from_portable(parse_adapter(from_code(code)), label)
    path = _expanded(text)
    if _exists(path) and path.is_dir():
        return _open_folder(path)
    if not _exists(path) or not path.is_file():
        raise UserError(
            f"there is no adapter {text!r}: give a run folder, an adapter file, or a code that begins with TINY-"
        )
    try:
        with path.open("rb") as handle:
            begins = handle.read(len(MAGIC))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend its permissions, or get it again") from error
    if begins == MAGIC or path.suffix == SUFFIX:
        if path.stat().st_size > MOST_FILE_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; no adapter file has so many")
        return _from_portable(parse_adapter(path.read_bytes()), str(path))
    if _safetensors_format(path) == EXPLICIT_FORMAT:
        explicit = load_explicit(path)
        known = _fingerprint(explicit.fingerprint, path)
        return Adapter(label=text, v=explicit.v, config=None, explicit=explicit, fingerprint=known)
    return _from_run(path, text)


def is_adapter(reference: str) -> bool:
    """Whether this names an adapter rather than a model, for verbs that take both."""
    path = _expanded(reference)
    if not _exists(path):
        return looks_like_a_code(reference)
    if path.is_dir():
        return (path / BEST).is_file() or (not (path / "config.json").exists() and any(path.glob(f"*{SUFFIX}")))
    return looks_like_a_code(reference) or (path.is_file() and path.suffix in (SUFFIX, ".safetensors"))


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~somebody who is not there
        return Path(text)


def _exists(path: Path) -> bool:
    """Whether there is such a path; a text that is too long to be one is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _fingerprint(text: str, path: Path) -> Fingerprint | None:
    try:
        return Fingerprint.of(bytes.fromhex(text)) if text else None
    except (ValueError, AssertionError) as error:
        raise UserError(f"{path} is inconsistent: {text[:40]!r} is no fingerprint; get it again") from error


def _open_folder(path: Path) -> Adapter:
    if (path / BEST).is_file():
        return replace(open_adapter(path / BEST), label=str(path), in_run=(path / "config.toml").is_file())
    if found := sorted(path.glob(f"*{SUFFIX}")):
        if len(found) > 1:
            raise UserError(f"{path} holds several adapters ({', '.join(f.name for f in found[:5])}); name one of them")
        return open_adapter(found[0])
    if (path / "adapter_config.json").is_file():
        first = shell_line("tinylora", "import", path, "--model", "BASE", "-o", "FILE")
        raise UserError(f"{path} holds a PEFT adapter; import it first: {first}")
    raise UserError(f"{path} holds no adapter (looked for {BEST} and *{SUFFIX}); train one with: tinylora train demo")


def _safetensors_format(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as handle:
            return str((handle.metadata() or {}).get("format", ""))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no adapter file ({error}); get it again") from error


def _from_run(path: Path, label: str) -> Adapter:
    v, run = load_vector(path)
    facts = load_facts(path)
    fingerprint = _fingerprint(str(facts.get("fingerprint") or ""), path)
    try:
        check = bytes.fromhex(str(facts.get("basis_check") or ""))
    except ValueError as error:
        raise UserError(f"{path} is inconsistent: its basis check is no hex text; get it again") from error
    if fingerprint is None:
        check = b""  # without a base it says nothing
    explicit = None
    if run.adapter.basis == "gradient":
        factors = path.parent / EXPLICIT_FILE
        if not factors.is_file():
            raise UserError(
                f"{label} is on a basis of its run's own, and {factors} is not there; give the run's folder as it was"
            )
        explicit = replace(load_explicit(factors), v=v)
    return Adapter(
        label=label, v=v, config=None if explicit else run.adapter, explicit=explicit, run=run,
        fingerprint=fingerprint, check=check, is_own=is_own(run),
    )  # fmt: skip


def _from_portable(portable: PortableAdapter, label: str) -> Adapter:
    return Adapter(
        label=label, v=torch.from_numpy(portable.values.copy()), config=portable.config,
        fingerprint=Fingerprint.of(portable.fingerprint), check=portable.check, value_type=portable.value_type,
    )  # fmt: skip
