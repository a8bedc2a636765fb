"""The header of a GGUF file, read within bounds: settings, and where each tensor lies, before any library opens it.

The gguf package believes what a header says: a list of 2^40 entries is read entry by entry past the file's end. Here
each length is held against the bytes that are there.
Leaves out: the tensors' values, and what is inside of lists, whose length alone is kept.
"""

import mmap
import re
import shlex
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tinylora.errors import UserError

MAGIC = b"GGUF"
MOST_ELEMENTS = 2**24
"""Of all lists together: a vocabulary of 262,144 with its scores, types and merges has some 1.3 million."""
MOST_FIELDS = 2**16
MOST_DIMENSIONS = 8
DEEPEST_LIST = 4
_SCALARS = "BbHhIif?__QqdT"
"""struct's letter of each type by its number; 8 is a text and 9 a list."""
_TEXT, _LIST = 8, 9
_PART = re.compile(r"-(\d+)-of-(\d+)\.gguf$")
"""How llama.cpp names the parts of a split file: NAME-00001-of-00003.gguf."""


@dataclass(frozen=True, slots=True)
class ListOf:
    """Stands for a list in the settings."""

    length: int


Value = int | float | bool | str | ListOf


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a file says of itself."""

    values: Mapping[str, Value]
    shapes: Mapping[str, tuple[int, ...]]
    """Of the tensors, by name."""
    num_weights: int

    @property
    def architecture(self) -> str:
        """Such as qwen2; empty where it is not said, as in all but the first part of a split file."""
        return str(self.values.get("general.architecture", ""))

    def number(self, key: str) -> int:
        """A whole number of the architecture, such as block_count; 0 where it is not said."""
        value = self.values.get(f"{self.architecture}.{key}", 0)
        return value if isinstance(value, int) else 0


def read_header(path: Path) -> GgufHeader:
    """The header of a GGUF file.

    Raises: UserError for a header that contradicts itself, and for tensors that lie behind the file's end.
    """
    try:
        with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the GGUF file {path} cannot be read ({error}); fetch it again") from error


class _Reader:
    """Takes a header apart, front to back."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.at = len(MAGIC)
        self.elements = 0
        self.order = "<"

    def wrong(self, reason: str) -> NoReturn:
        raise UserError(f"the GGUF file {self.path} is damaged or not well-formed ({reason}); fetch it again")

    def take(self, count: int, what: str) -> int:
        """Step over that many bytes, and say where they begin."""
        if count > len(self.data) - self.at:
            self.wrong(f"{what} wants {count:,} bytes and {len(self.data) - self.at:,} are left")
        self.at += count
        return self.at - count

    def scalar(self, letter: str, what: str) -> int:
        size = struct.calcsize(letter)
        value = struct.unpack_from(self.order + letter, self.data, self.take(size, what))[0]
        return value

    def text(self, what: str) -> str:
        length = self.scalar("Q", what)
        start = self.take(length, what)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self, kind: int, what: str, depth: int = 0) -> Value:
        if kind == _TEXT:
            return self.text(what)
        if kind == _LIST:
            return self.list_of(what, depth)
        if not 0 <= kind < len(_SCALARS) - 1:
            self.wrong(f"{what} has a type {kind} that there is not")
        return self.scalar(_SCALARS[kind], what)

    def list_of(self, what: str, depth: int) -> ListOf:
        kind, length = self.scalar("I", what), self.scalar("Q", what)
        self.elements += length
        if self.elements > MOST_ELEMENTS or depth >= DEEPEST_LIST:
            self.wrong(f"{what} is a list of {length:,} entries, and {MOST_ELEMENTS:,} are allowed in all")
        if kind in (_TEXT, _LIST):
            for _ in range(length):
                self.value(kind, what, depth + 1)
        elif 0 <= kind < len(_SCALARS) - 1:
            self.take(length * struct.calcsize(_SCALARS[kind]), what)
        else:
            self.wrong(f"{what} has entries of a type {kind} that there is not")
        return ListOf(length)

    def header(self) -> GgufHeader:
        if self.data[: len(MAGIC)] != MAGIC:
            self.wrong("it does not begin with GGUF")
        version = self.scalar("I", "the version")
        if not version & 0xFFFF:  # of a machine with the other order of bytes
            self.order = ">"
        num_tensors, num_fields = self.scalar("Q", "the count of tensors"), self.scalar("Q", "the count of fields")
        if num_fields > MOST_FIELDS:
            self.wrong(f"it names {num_fields:,} fields, and {MOST_FIELDS:,} are allowed")
        values: dict[str, Value] = {}
        for _ in range(num_fields):
            key = self.text("the name of a field")
            values[key] = self.value(self.scalar("I", key[:80]), key[:80])
        if num_tensors > (len(self.data) - self.at) // 24:  # the least that one takes
            self.wrong(f"it names {num_tensors:,} tensors, for which it is too short")
        shapes: dict[str, tuple[int, ...]] = {}
        ends = [self.tensor(shapes) for _ in range(num_tensors)]
        align = values.get("general.alignment", 32)
        if not isinstance(align, int) or not 0 < align <= 2**20:
            self.wrong(f"its alignment is {align!r}")
        start = -(-self.at // align) * align
        if ends and start + max(ends) > len(self.data):
            self.wrong(f"its tensors end at byte {start + max(ends):,}, and it is cut off at {len(self.data):,}")
        return GgufHeader(values, shapes, sum(map(_count, shapes.values())))

    def tensor(self, shapes: dict[str, tuple[int, ...]]) -> int:
        """Note the shape of the next tensor, and say where it ends, counted from the first one's begin."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.text("the name of a tensor")
        dimensions = self.scalar("I", name[:80])
        if dimensions > MOST_DIMENSIONS:
            self.wrong(f"the tensor {name[:80]!r} has {dimensions:,} dimensions")
        shape = tuple(self.scalar("Q", name[:80]) for _ in range(dimensions))
        kind, offset = self.scalar("I", name[:80]), self.scalar("Q", name[:80])
        if name in shapes:
            self.wrong(f"it has two tensors {name[:80]!r}")
        shapes[name] = shape
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            self.wrong(f"the tensor {name[:80]!r} has a type {kind} that this gguf package does not know")
        return offset + _count(shape) * size // block


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def refuse_part(path: Path, header: GgufHeader) -> None:
    """Raises: UserError for one file of several that a model was split into; transformers would fill in the rest."""
    count, number = header.values.get("split.count", 0), header.values.get("split.no", 0)
    if not (isinstance(count, int) and isinstance(number, int)) or count <= 1:
        return
    first = _PART.sub(lambda found: f"-{1:0{len(found[1])}}-of-{found[2]}.gguf", path.name)
    whole = _PART.sub("", path.name).removesuffix(".gguf") + ".gguf"
    total = header.values.get("split.tensors.count", 0)
    of = f" of {total}" if total else ""
    raise UserError(
        f"{path} is part {number + 1} of {count} of a model, with {len(header.shapes)}{of} tensors, and tinylora reads "
        f"whole files; put all parts into one folder and merge them with llama.cpp: "
        f"llama-gguf-split --merge {shlex.quote(first)} {shlex.quote(whole)}"
    )
