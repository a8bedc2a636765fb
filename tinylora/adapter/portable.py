"""The adapter file: v and what gives it meaning, in tens of bytes. docs/format.md specifies every bit.

A file is canonical: an adapter has one encoding and no other, and what is not that encoding is refused. Nothing is
allocated before the lengths agree with the bytes that are there.
Leaves out: adapters whose factors come from data or another program (explicit.py); the same bytes as text (code.py).
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tinylora.adapter.config import MAX_NUMBERS, AdapterConfig, BasisKind
from tinylora.errors import UserError

Float32Array = NDArray[np.float32]
ValueType = Literal["bfloat16", "float32"]

MAGIC = b"\xe7TL"
VERSION = 1
FINGERPRINT_BYTES = 12
CHECK_BYTES = 4
CRC_BYTES = 4
DEFAULT_N_TIE = 16
"""What AdapterConfig says where no n_tie is meant."""
MAX_TARGETS, MAX_TARGET_BYTES = 1024, 256

TARGET_SETS: dict[int, frozenset[str]] = {
    1: frozenset({"all-linear"}),
    2: frozenset({"q_proj", "k_proj", "v_proj", "o_proj"}),
    3: frozenset({"gate_proj", "up_proj", "down_proj"}),
    4: frozenset({"q_proj", "v_proj"}),
    5: frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
}
"""Target sets that cost one byte; 0 stands for a list."""
_TYINGS = ("tiled", "even", "structured", "all", "none")
"""As AdapterConfig.tying, with `even` for tiled tying by num_groups."""
_BASES: tuple[BasisKind, ...] = ("svd", "random", "sketch")
_VALUE_TYPES: tuple[ValueType, ...] = get_args(ValueType)


class NotAnAdapter(UserError):
    """The bytes are no adapter file, or not a whole and unchanged one."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class PortableAdapter:
    """What an adapter file holds."""

    config: AdapterConfig
    fingerprint: bytes
    """Of the base model, 12 bytes (models/fingerprint.py)."""
    check: bytes
    """Of the basis and P, 4 bytes (check.py)."""
    values: Float32Array
    """v, (groups, u)."""
    value_type: ValueType = "float32"

    @property
    def num_numbers(self) -> int:
        """Trained numbers."""
        return int(self.values.size)

    def rounded(self, value_type: ValueType) -> "PortableAdapter":
        """The same adapter with its numbers rounded to a type. Raises: UserError if one becomes infinite."""
        values = round_values(self.values, value_type)
        return replace(self, values=values, value_type=value_type)

    def to_bytes(self) -> bytes:
        """The file. Raises: UserError for numbers that are not finite or do not fit the config."""
        config, (groups, u) = self.config, self.values.shape
        _check_values(self.values)
        _check_counts(config, groups, u)
        if len(self.fingerprint) != FINGERPRINT_BYTES or len(self.check) != CHECK_BYTES:
            raise ValueError("a fingerprint has 12 bytes and a check 4")
        targets = frozenset(config.targets)
        number = next((n for n, known in TARGET_SETS.items() if known == targets), 0)
        tying = "even" if config.num_groups else config.tying
        kinds = _TYINGS.index(tying) | _BASES.index(config.basis) << 3 | _VALUE_TYPES.index(self.value_type) << 5
        parts = [MAGIC, bytes([VERSION, kinds, number]), _varint(config.rank), _varint(u)]
        if tying in ("tiled", "structured"):
            parts.append(_varint(config.n_tie))
        parts += [_varint(config.seed), _varint(groups)]
        if not number:
            parts.append(_listed(sorted(targets)))
        body = b"".join([*parts, self.fingerprint, self.check, _value_bytes(self.values, self.value_type)])
        return body + zlib.crc32(body).to_bytes(CRC_BYTES, "little")


def round_values(values: Float32Array, value_type: ValueType) -> Float32Array:
    """float32 numbers rounded to nearest, ties to even. Raises: UserError if one becomes infinite."""
    if value_type == "float32":
        return values
    words = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded = (words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    result = rounded.view("<f4").astype(np.float32)
    if not np.isfinite(result[np.isfinite(values)]).all():
        raise UserError("a number of the adapter is too large for bfloat16; encode it with --dtype float32")
    return result


def parse_adapter(data: bytes) -> PortableAdapter:
    """The adapter in a file's bytes.

    Raises: NotAnAdapter, one sentence, for anything that is not exactly what `to_bytes` writes: other magic or version,
    reserved bits, lengths that do not agree, a wrong checksum, numbers that are not finite.
    """
    if data[:3] != MAGIC:
        raise NotAnAdapter(f"this is no tinylora adapter file: it begins with {data[:3]!r}, not {MAGIC!r}")
    if len(data) > 3 and data[3] != VERSION:
        raise NotAnAdapter(f"the adapter file has format version {data[3]} and this tinylora reads version {VERSION}")
    if len(data) < len(MAGIC) + 1 + CRC_BYTES:
        raise NotAnAdapter(f"the adapter file is cut off after {len(data)} bytes")
    body, crc = data[:-CRC_BYTES], data[-CRC_BYTES:]
    if zlib.crc32(body).to_bytes(CRC_BYTES, "little") != crc:
        raise NotAnAdapter("the adapter file is damaged: its checksum is not that of its bytes; get it again")
    return _Reader(body).adapter()


class _Reader:
    """Takes a body apart, front to back."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.at = len(MAGIC) + 1

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.body) - self.at:
            raise NotAnAdapter(
                f"the adapter file is inconsistent: {what} needs {count} bytes and {len(self.body) - self.at} are left"
            )
        self.at += count
        return self.body[self.at - count : self.at]

    def varint(self, what: str) -> int:
        value = shift = 0
        while True:
            byte = self.take(1, what)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if shift and not byte:
                    raise NotAnAdapter(f"the adapter file is not canonical: {what} has a leading zero")
                if value >= 2**63:
                    raise NotAnAdapter(
                        f"the adapter file is inconsistent: {what} is {value}, and below 2^63 is allowed"
                    )
                return value
            shift += 7
            if shift > 56:
                raise NotAnAdapter(f"the adapter file is inconsistent: {what} has more than nine bytes")

    def adapter(self) -> PortableAdapter:
        kinds, number = self.take(2, "the header")
        tying, basis, value_type, law = kinds & 7, kinds >> 3 & 3, kinds >> 5 & 1, kinds >> 6
        for name, found, allowed in (
            ("tying", tying, len(_TYINGS)),
            ("basis", basis, len(_BASES)),
            ("law of P", law, 1),
        ):
            if found >= allowed:
                raise NotAnAdapter(
                    f"the adapter file has {name} number {found}, which format version 1 does not define"
                )
        if number and number not in TARGET_SETS:
            raise NotAnAdapter(f"the adapter file has target set {number}, which format version 1 does not define")
        rank, u = self.varint("rank"), self.varint("u")
        n_tie = self.varint("n_tie") if _TYINGS[tying] in ("tiled", "structured") else DEFAULT_N_TIE
        seed, groups = self.varint("the seed"), self.varint("the number of tie groups")
        targets = tuple(sorted(TARGET_SETS[number])) if number else self.targets()
        config = _config(rank, u, _TYINGS[tying], n_tie, groups, targets, _BASES[basis], seed)
        fingerprint, check = self.take(FINGERPRINT_BYTES, "the fingerprint"), self.take(CHECK_BYTES, "the basis check")
        size = 4 if _VALUE_TYPES[value_type] == "float32" else 2
        raw = self.take(groups * u * size, f"{groups} x {u} numbers")
        if self.at != len(self.body):
            raise NotAnAdapter(f"the adapter file is inconsistent: {len(self.body) - self.at} bytes are left over")
        values = _values(raw, _VALUE_TYPES[value_type]).reshape(groups, u)
        if not np.isfinite(values).all():
            raise NotAnAdapter("the adapter file holds a number that is not finite")
        return PortableAdapter(
            config=config, fingerprint=fingerprint, check=check, values=values, value_type=_VALUE_TYPES[value_type]
        )

    def targets(self) -> tuple[str, ...]:
        count = self.varint("the number of targets")
        if not 1 <= count <= MAX_TARGETS:
            raise NotAnAdapter(f"the adapter file lists {count} targets; 1 to {MAX_TARGETS} are allowed")
        found = []
        for _ in range(count):
            length = self.varint("the length of a target")
            if not 1 <= length <= MAX_TARGET_BYTES:
                raise NotAnAdapter(
                    f"a target of the adapter file has {length} bytes; 1 to {MAX_TARGET_BYTES} are allowed"
                )
            try:
                found.append(self.take(length, "a target").decode())
            except UnicodeDecodeError:
                raise NotAnAdapter("a target of the adapter file is not UTF-8") from None
        if found != sorted(set(found)) or frozenset(found) in TARGET_SETS.values():
            raise NotAnAdapter(
                "the adapter file is not canonical: its targets are not sorted, or have a number of their own"
            )
        if not all(target.isprintable() for target in found):
            raise NotAnAdapter("a target of the adapter file holds a control character")
        return tuple(found)


def _config(
    rank: int, u: int, tying: str, n_tie: int, groups: int, targets: tuple[str, ...], basis: BasisKind, seed: int
) -> AdapterConfig:
    even = tying == "even"
    try:
        config = AdapterConfig(
            rank=rank, u=u, tying="tiled" if even else tying, n_tie=n_tie, num_groups=groups if even else 0,  # type: ignore[arg-type]
            targets=targets, basis=basis, seed=seed,
        )  # fmt: skip
        if even and not groups:
            raise UserError("the number of tie groups is 0")
        _check_counts(config, groups, u)
    except UserError as error:
        raise NotAnAdapter(f"the adapter file is inconsistent: {error}") from None
    return config


def _check_counts(config: AdapterConfig, groups: int, u: int) -> None:
    if u != config.u:
        raise UserError(f"v has {u} numbers in a tie group and adapter.u is {config.u}")
    expected = config.num_groups or (1 if config.tying == "all" else groups)
    if groups != expected or groups < 1:
        raise UserError(f"v has {groups} tie groups and the settings make {max(1, expected)}")
    if groups * u > MAX_NUMBERS:
        raise UserError(f"v has {groups * u} numbers; at most {MAX_NUMBERS} are allowed in an adapter file")
    config.check_projection()


def _check_values(values: Float32Array) -> None:
    if not np.isfinite(values).all():
        raise UserError("the adapter holds a number that is not finite")


def _listed(targets: Sequence[str]) -> bytes:
    encoded = [target.encode() for target in targets]
    if len(encoded) > MAX_TARGETS or any(len(one) > MAX_TARGET_BYTES for one in encoded):
        raise UserError(
            "adapter.targets are too many or too long for an adapter file: at most "
            f"{MAX_TARGETS} of {MAX_TARGET_BYTES} bytes; use globs"
        )
    if not all(target.isprintable() for target in targets):
        raise UserError("adapter.targets hold a control character")
    return _varint(len(encoded)) + b"".join(_varint(len(one)) + one for one in encoded)


def _varint(value: int) -> bytes:
    """LEB128: seven bits a byte, lowest first, the top bit set on all but the last."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _value_bytes(values: Float32Array, value_type: ValueType) -> bytes:
    words = np.ascontiguousarray(round_values(values, value_type), dtype="<f4").view("<u4")
    return words.tobytes() if value_type == "float32" else (words >> np.uint32(16)).astype("<u2").tobytes()


def _values(raw: bytes, value_type: ValueType) -> Float32Array:
    if value_type == "float32":
        return np.frombuffer(raw, dtype="<f4").astype(np.float32)
    words = np.frombuffer(raw, dtype="<u2").astype("<u4") << np.uint32(16)
    return words.view("<f4").astype(np.float32)
