"""The code: the same bytes as text, and every slip of a hand found."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from portable_adapter import adapter

from tinylora.adapter.code import ALPHABET, MAX_SYMBOLS, PREFIX, from_code, looks_like_a_code, to_code
from tinylora.adapter.portable import NotAnAdapter
from tinylora.errors import UserError

DATA = adapter().to_bytes()
CODE = to_code(DATA)


def test_length_and_alphabet() -> None:
    assert len(CODE) <= 110
    assert CODE.startswith(PREFIX)
    assert set(CODE[len(PREFIX) :]) <= set("0123456789ABCDEFGHJKMNPQRSTVWXYZ")  # no I, L, O, U
    assert all(c in "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ $%*+-./:" for c in CODE)  # a QR code's dense alphabet


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=300))
def test_any_bytes_come_back(data: bytes) -> None:
    code = to_code(data)
    assert from_code(code) == from_code(code.lower()) == data
    assert from_code(f"  {code[:20]}\n {code[20:]} ") == data
    assert (len(code) - len(PREFIX)) % 2 == 0


def refused(text: str) -> None:
    with pytest.raises(NotAnAdapter) as caught:
        from_code(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [DATA, adapter(value_type="float32").to_bytes(), b"\0" * 40, b"\0", b"\xff" * 31])
def test_every_single_slip_is_found(data: bytes) -> None:
    code = to_code(data)
    wrong = sorted({*ALPHABET, *"ILOU-_ 1lé"} - {" "})
    for i, right in enumerate(code):
        for character in wrong:
            if character.upper() != right.upper():
                refused(code[:i] + character + code[i + 1 :])
        refused(code[:i] + code[i + 1 :])  # dropped
        refused(code[:i] + right + code[i:])  # doubled
        if i + 1 < len(code) and code[i + 1] != right:
            refused(code[:i] + code[i + 1] + right + code[i + 2 :])  # swapped


def test_two_and_three_wrong_characters_are_found() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        characters = list(CODE)
        for i in rng.sample(range(len(PREFIX), len(CODE)), rng.choice([2, 3])):
            characters[i] = rng.choice([c for c in ALPHABET if c != CODE[i]])
        refused("".join(characters))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with ''"),
        ("TINY-", "0 characters"),
        ("TINY_" + CODE[5:], "begins with 'TINY_'"),
        ("tiny-" + CODE[5:], "mixes capital and small letters"),
        (CODE[:10] + "O" + CODE[11:], "character 6 behind TINY- is 'O', which no code has; perhaps it is 0"),
        (CODE[:-1], "one is missing, or one too many"),
        (PREFIX + "0" * (MAX_SYMBOLS + 2), "no adapter has so many"),
    ],
)
def test_messages(text: str, message: str) -> None:
    with pytest.raises(NotAnAdapter, match=message):
        from_code(text)


def test_a_filling_that_is_not_zero_or_too_long_is_refused() -> None:
    from tinylora.adapter import code as module

    symbols = module._symbols(DATA)
    for change in (
        lambda s: s.__setitem__(-1, s[-1] | 1),
        lambda s: s.__setitem__(0, s[0] + 5),
        lambda s: s.extend([0, 0]),
    ):
        changed = list(symbols)
        change(changed)
        refused(PREFIX + "".join(ALPHABET[s] for s in changed + module._checksum(changed)))


def test_an_adapter_of_thousands_of_numbers_has_no_code() -> None:
    with pytest.raises(UserError, match="too long for a code .* use the file"):
        to_code(adapter(groups=400).to_bytes())
    assert from_code(to_code(adapter(groups=280).to_bytes())) == adapter(groups=280).to_bytes()


def test_what_looks_like_a_code() -> None:
    assert looks_like_a_code(CODE) and looks_like_a_code(" " + CODE.lower())
    assert not looks_like_a_code("runs/demo-001")


def test_the_checksum_is_that_of_bech32m() -> None:
    """BIP 350's own code, written down once more by its text: generator, constant and the prefix spread out."""

    def verify(hrp: str, data: list[int]) -> int:
        values = [ord(x) >> 5 for x in hrp] + [0] + [ord(x) & 31 for x in hrp] + data
        chk = 1
        for v in values:
            b = chk >> 25
            chk = (chk & 0x1FFFFFF) << 5 ^ v
            for i, g in enumerate([0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3]):
                chk ^= g if (b >> i) & 1 else 0
        return chk

    assert verify("tiny-", [ALPHABET.index(c) for c in CODE[len(PREFIX) :]]) == 0x2BC830A3


@pytest.mark.parametrize("pair", [("s", "\u017f"), ("i", "\u0131"), ("ss", "\u00df"), ("tiny", "t\u0131ny")])
def test_letters_that_capitals_are_made_of_elsewhere(pair: tuple[str, str]) -> None:
    """upper() makes S of a long s and I of a dotless i: such a code once passed."""
    every = (bytes([a, b, 7]) for a in range(256) for b in range(256))
    data = next(data for data in every if pair[0] in to_code(data).lower())
    wrong = to_code(data).lower().replace(pair[0], pair[1], 1)
    assert wrong.upper() == to_code(data) or pair[0] == "tiny"
    refused(wrong)
