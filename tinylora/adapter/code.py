"""The adapter file as text: to paste in a chat, a URL or a QR code. docs/format.md specifies it.

    TINY-4WX44R0G8...     prefix, how many bits fill up the end, the bytes in base 32, six characters of checksum

The alphabet has no I, L, O and U. The checksum is the BCH code of Bech32m (BIP 350) over prefix and data: it finds
every wrong character and every swap of two, up to three errors in all. Everything behind the prefix has an even number
of characters, so one that is dropped or doubled is found, too. Upper and lower case are the same, but not mixed.
"""

import re
from collections.abc import Iterable, Sequence

from tinylora.adapter.portable import NotAnAdapter
from tinylora.errors import UserError

PREFIX = "TINY-"
ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
CHECKSUM = 6
MAX_SYMBOLS = 1000
"""The checksum finds three errors in words of up to 1,023 symbols; the prefix takes 11."""

_VALUE = {character: value for value, character in enumerate(ALPHABET)}
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_FINAL = 0x2BC830A3
_MISREAD = {"O": "0", "I": "1", "L": "1", "U": "V"}


def to_code(data: bytes) -> str:
    """The code of an adapter file's bytes, in capitals. Raises: UserError if it would be too long."""
    symbols = _symbols(data)
    if not fits_a_code(data):
        raise UserError(
            f"an adapter of {len(data)} bytes is too long for a code (at most {MAX_SYMBOLS - CHECKSUM} characters, "
            "that is some 300 numbers in bfloat16); use the file"
        )
    return PREFIX + "".join(ALPHABET[s] for s in symbols + _checksum(symbols))


def fits_a_code(data: bytes) -> bool:
    """Whether `to_code` takes it."""
    return len(_symbols(data)) + CHECKSUM <= MAX_SYMBOLS


def from_code(text: str) -> bytes:
    """The bytes that a code stands for; spaces and line ends in it do not count, nor do dashes behind the prefix.

    Raises: NotAnAdapter, one sentence, for anything that `to_code` does not write.
    """
    code = _joined(text)
    if not code.isascii():  # before upper(), which turns letters of other alphabets into ours
        place, character = next((i, c) for i, c in enumerate(code, 1) if not c.isascii())
        raise NotAnAdapter(f"character {place} of the code is {character!r}, which no code has")
    if code != code.upper() and code != code.lower():
        raise NotAnAdapter("the code mixes capital and small letters; write it in one of them")
    code = code.upper()
    if not code.startswith(PREFIX):
        raise NotAnAdapter(f"this is no tinylora code: it begins with {code[: len(PREFIX)]!r}, not {PREFIX!r}")
    characters = code[len(PREFIX) :]
    for place, character in enumerate(characters, 1):
        if character not in _VALUE:
            meant = f"; perhaps it is {_MISREAD[character]}" if character in _MISREAD else ""
            raise NotAnAdapter(f"character {place} behind {PREFIX} is {character!r}, which no code has{meant}")
    if len(characters) % 2:
        raise NotAnAdapter(
            f"the code has {len(characters)} characters behind {PREFIX}: one is missing, or one too many"
        )
    if not CHECKSUM < len(characters) <= MAX_SYMBOLS:
        raise NotAnAdapter(f"the code has {len(characters)} characters behind {PREFIX}, and no adapter has so many")
    values = [_VALUE[character] for character in characters]
    symbols = values[:-CHECKSUM]
    if _checksum(symbols) != values[-CHECKSUM:]:
        raise NotAnAdapter("the code has a mistake in it: its checksum does not fit; compare it with the original")
    return _bytes(symbols)


def looks_like_a_code(text: str) -> bool:
    """Whether somebody who wrote this meant a code."""
    begins = _joined(text[:100])[: len(PREFIX)]
    return begins.isascii() and begins.upper() == PREFIX


def _joined(text: str) -> str:
    """A code that was cut in pieces, by spaces, line ends or dashes, as one. A dash is between two characters."""
    one = re.sub(r"\s", "", text)
    return one[: len(PREFIX)] + re.sub(r"(?<=[0-9A-Za-z])-(?=[0-9A-Za-z])", "", one[len(PREFIX) :])


def _symbols(data: bytes) -> list[int]:
    """The number of filling bits (0 to 9), then the bits five by five, the first bit of a byte first, zeros at the end.

    The filling makes the number of symbols even.
    """
    bits = "".join(f"{byte:08b}" for byte in data)
    filling = (5 - len(bits)) % 10
    bits += "0" * filling
    return [filling, *(int(bits[i : i + 5], 2) for i in range(0, len(bits), 5))]


def _bytes(symbols: Sequence[int]) -> bytes:
    filling, bits = symbols[0], "".join(f"{symbol:05b}" for symbol in symbols[1:])
    end = len(bits) - filling
    if filling > 9 or end < 8 or end % 8 or "1" in bits[end:]:
        raise NotAnAdapter("the code is not canonical: what fills up its end is not what fits its length")
    return bytes(int(bits[i : i + 8], 2) for i in range(0, end, 8))


def _polymod(values: Iterable[int]) -> int:
    check = 1
    for value in values:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate(_GENERATOR):
            if top >> bit & 1:
                check ^= generator
    return check


def _checksum(symbols: Sequence[int]) -> list[int]:
    prefix = PREFIX.lower()
    expanded = [*(ord(c) >> 5 for c in prefix), 0, *(ord(c) & 31 for c in prefix)]
    rest = _polymod([*expanded, *symbols, *[0] * CHECKSUM]) ^ _FINAL
    return [rest >> 5 * (CHECKSUM - 1 - i) & 31 for i in range(CHECKSUM)]
