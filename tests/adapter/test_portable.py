"""The adapter file: exact both ways, one encoding only, and everything else refused in one sentence."""

import dataclasses
import re
import struct
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from portable_adapter import CHECK, FINGERPRINT, adapter

from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.portable import MAGIC, NotAnAdapter, PortableAdapter, parse_adapter, round_values
from tinylora.errors import UserError


def crc(body: bytes) -> bytes:
    return body + zlib.crc32(body).to_bytes(4, "little")


def same(a: PortableAdapter, b: PortableAdapter) -> None:
    assert (a.config, a.fingerprint, a.check, a.value_type) == (b.config, b.fingerprint, b.check, b.value_type)
    np.testing.assert_array_equal(a.values, b.values)


def test_the_sizes_that_are_promised() -> None:
    for more in ({}, {"num_groups": 0, "n_tie": 16}, {"targets": ("q_proj", "v_proj")}, {"seed": 127}):
        assert len(adapter(value_type="bfloat16", **more).to_bytes()) <= 64
        assert len(adapter(value_type="float32", **more).to_bytes()) <= 90
    assert len(adapter().to_bytes()) == 56


def test_the_vectors_of_format_md() -> None:
    from pathlib import Path

    from tinylora.adapter.code import from_code, to_code

    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    section = text[text.index("<!-- vectors -->") : text.index("<!-- /vectors -->")]
    lines = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    codes = [line for line in lines if line.startswith("TINY-")]
    assert len(codes) == 2
    for value_type, code in zip(("bfloat16", "float32"), codes, strict=True):
        values = (np.arange(-6, 7) / 8).astype(np.float32).reshape(13, 1)
        made = PortableAdapter(
            config=AdapterConfig(num_groups=13), fingerprint=FINGERPRINT, check=CHECK, values=values,
            value_type=value_type,
        )  # fmt: skip
        assert to_code(made.to_bytes()) == code
        assert from_code(code).hex() in "".join(lines)


def test_the_layout_byte_by_byte() -> None:
    """Taken apart by hand, with no code of ours."""
    made = adapter(groups=3, value_type="float32", num_groups=0, tying="structured", n_tie=300, u=2, rank=4, seed=5)
    data = made.to_bytes()
    assert data[:6] == b"\xe7TL\x01" + bytes([2 | 0 << 3 | 1 << 5, 1])
    assert data[6:12] == bytes([4, 2, 300 & 0x7F | 0x80, 300 >> 7, 5, 3])
    assert data[12:28] == FINGERPRINT + CHECK
    assert struct.unpack("<6f", data[28:52]) == tuple(made.values.flatten().tolist())
    assert struct.unpack("<I", data[52:]) == (zlib.crc32(data[:52]),)
    listed = adapter(targets=("v_proj", "mlp.*", "é"), tying="none", num_groups=0, groups=1).to_bytes()
    assert listed[5] == 0
    assert listed[10 : 10 + 18] == b"\x03\x05mlp.*\x06v_proj\x02\xc3\xa9" + FINGERPRINT[:1]


def test_a_short_file_asks_for_no_gigabytes() -> None:
    """u r^2 numbers of P for each map: 300 numbers could ask for gigabytes of them."""
    largest = adapter(tying="all", num_groups=0, groups=1, u=2, rank=256)
    same(parse_adapter(largest.to_bytes()), largest)
    with pytest.raises(UserError, match=r"u = 2 and rank 257 give every map 132,098 numbers of P; at most 131,072 are"):
        adapter(tying="all", num_groups=0, groups=1, u=2, rank=257).to_bytes()
    data = largest.to_bytes()
    assert data[6:8] == bytes([0x80, 2])  # rank 256
    body = data[:6] + bytes([0x81, 2]) + data[8:-4]
    with pytest.raises(NotAnAdapter, match="give every map 132,098 numbers of P"):
        parse_adapter(body + zlib.crc32(body).to_bytes(4, "little"))


configs = st.builds(
    dict,
    rank=st.integers(1, 64),
    u=st.integers(1, 5),
    basis=st.sampled_from(["svd", "random", "sketch"]),
    seed=st.integers(0, 2**63 - 1),
    targets=st.one_of(
        st.just(("all-linear",)),
        st.just(("q_proj", "v_proj")),
        st.lists(st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=20), min_size=1, max_size=4)
        .map(set).map(sorted).map(tuple),
    ),
)  # fmt: skip
tyings = st.sampled_from(["tiled", "even", "structured", "all", "none"])


@settings(deadline=None, max_examples=300)
@given(
    configs,
    tyings,
    st.integers(1, 300),
    st.integers(1, 7),
    st.sampled_from(["bfloat16", "float32"]),
    st.integers(0, 2**32),
)
def test_every_adapter_comes_back_exactly(
    config: dict[str, Any], tying: str, n_tie: int, groups: int, value_type: Any, seed: int
) -> None:
    groups = 1 if tying == "all" else groups
    more = {"num_groups": groups} if tying == "even" else {"tying": tying}
    if tying in ("tiled", "structured"):
        more["n_tie"] = n_tie
    rng = np.random.default_rng(seed)
    values = rng.normal(size=groups * config["u"]) * 10.0 ** rng.integers(-30, 30, groups * config["u"])
    made = PortableAdapter(
        config=AdapterConfig(**config, **more), fingerprint=FINGERPRINT, check=CHECK,
        values=values.astype(np.float32).reshape(groups, config["u"]),
    ).rounded(value_type)  # fmt: skip
    back = parse_adapter(made.to_bytes())
    made = dataclasses.replace(
        made, config=dataclasses.replace(made.config, targets=tuple(sorted(made.config.targets)))
    )
    same(made, back)
    assert back.to_bytes() == made.to_bytes()


def test_rounding_is_to_nearest_even_as_in_torch() -> None:
    import torch

    values = np.random.default_rng(1).normal(size=20_000).astype(np.float32) * np.float32(
        10.0
    ) ** np.random.default_rng(2).integers(-20, 20, 20_000).astype(np.float32)
    ties = (np.arange(0x3F800000, 0x3F800000 + 2**20, 0x8000, dtype=np.uint32)).view(np.float32)
    for one in (values, ties):
        np.testing.assert_array_equal(round_values(one, "bfloat16"), torch.from_numpy(one).bfloat16().float().numpy())
    with pytest.raises(UserError, match="too large for bfloat16"):
        round_values(np.array([3.4e38], np.float32), "bfloat16")


BODY = adapter().to_bytes()[:-4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no tinylora adapter file"),
        (b"PK\x03\x04rest", "is no tinylora adapter file"),
        (MAGIC, "cut off after 3 bytes"),
        (MAGIC + b"\x01abc", "cut off after 7 bytes"),
        (MAGIC + b"\x02" + BODY[4:], "format version 2 and this tinylora reads version 1"),
        (adapter().to_bytes()[:-1], "its checksum is not that of its bytes"),
        (adapter().to_bytes() + b"\0", "its checksum is not that of its bytes"),
        (crc(BODY + b"\0"), "1 bytes are left over"),
        (crc(BODY[:-1]), "13 x 1 numbers needs 26 bytes and 25 are left"),
        (crc(BODY[:4] + b"\x05" + BODY[5:]), "tying number 5"),
        (crc(BODY[:4] + b"\x19" + BODY[5:]), "basis number 3"),
        (crc(BODY[:4] + b"\x41" + BODY[5:]), "law of P number 1"),
        (crc(BODY[:5] + b"\x06" + BODY[6:]), "target set 6"),
        (crc(BODY[:6] + b"\x82\x00" + BODY[7:]), "rank has a leading zero"),
        (crc(BODY[:6] + b"\x00" + BODY[7:]), r"adapter\.rank must be at least 1, got 0"),
        (crc(BODY[:6] + b"\xff" * 12 + BODY[7:]), "rank has more than nine bytes"),
        (crc(BODY[:7] + b"\x80\xa0\x94\xa5\x8d\x1d" + BODY[8:]), "at most 16777216 are allowed"),
        (crc(BODY[:9] + b"\x80\xa0\x94\xa5\x8d\x1d" + BODY[10:]), "at most 16777216 are allowed"),
        (crc(BODY[:9] + b"\x00" + BODY[10:]), "number of tie groups is 0"),
        (crc(BODY[:-2] + b"\x80\x7f"), "not finite"),
        (crc(BODY[:-2] + b"\xc0\x7f"), "not finite"),
        (crc(BODY[:4] + b"\x03" + BODY[5:]), "13 tie groups and the settings make 1"),
        (crc(BODY[:5] + b"\0" + BODY[6:10] + b"\x00" + BODY[10:]), "lists 0 targets"),
        (crc(BODY[:5] + b"\0" + BODY[6:10] + b"\x01\x00" + BODY[10:]), "a target of the adapter file has 0 bytes"),
        (crc(BODY[:5] + b"\0" + BODY[6:10] + b"\x01\x02\xff\xff" + BODY[10:]), "is not UTF-8"),
        (crc(BODY[:5] + b"\0" + BODY[6:10] + b"\x01\x02a\x07" + BODY[10:]), "control character"),
        (crc(BODY[:5] + b"\0" + BODY[6:10] + b"\x02\x01b\x01a" + BODY[10:]), "not sorted"),
        (crc(BODY[:5] + b"\0" + BODY[6:10] + b"\x01\x0aall-linear" + BODY[10:]), "a number of their own"),
    ],
)
def test_what_is_not_that_encoding_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(NotAnAdapter, match=message) as caught:
        parse_adapter(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_cannot_be_encoded_is_refused() -> None:
    bad = dataclasses.replace(adapter(), values=np.full((13, 1), np.nan, np.float32))
    with pytest.raises(UserError, match="not finite"):
        bad.to_bytes()
    with pytest.raises(UserError, match="12 tie groups and the settings make 13"):
        dataclasses.replace(adapter(), values=np.zeros((12, 1), np.float32)).to_bytes()
    with pytest.raises(UserError, match="2 numbers in a tie group and adapter.u is 1"):
        dataclasses.replace(adapter(), values=np.zeros((13, 2), np.float32)).to_bytes()
    with pytest.raises(UserError, match="too many or too long"):
        adapter(targets=("x" * 257,)).to_bytes()


@settings(deadline=None, max_examples=1500)
@given(st.data())
def test_mutated_files_are_refused_or_mean_what_they_say(data: Any) -> None:
    """bench/trust/fuzz_format.py runs many more."""
    original = bytearray(adapter(value_type=data.draw(st.sampled_from(["bfloat16", "float32"]))).to_bytes())
    mutated = bytearray(original[:-4])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        kind = data.draw(st.sampled_from(["set", "delete", "insert"]))
        if kind == "set":
            mutated[at] = data.draw(st.integers(0, 255))
        elif kind == "delete" and len(mutated) > 1:
            del mutated[at]
        else:
            mutated.insert(at, data.draw(st.integers(0, 255)))
    whole = crc(bytes(mutated)) if data.draw(st.booleans()) else bytes(mutated) + bytes(original[-4:])
    try:
        parsed = parse_adapter(whole)
    except NotAnAdapter:
        return
    assert parsed.to_bytes() == whole  # accepted: then it is the one encoding of what it says


def test_the_unicode_version_that_format_md_names_is_the_least_that_is_read() -> None:
    """`isprintable` goes by the tables of the Python that runs it: what 14.0 has, every later one has too."""
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
    named = re.search(r"categories C and Z of Unicode (\d+)\.(\d+)", text)
    assert named is not None and (int(named[1]), int(named[2])) == (14, 0)  # of Python 3.11, the least that is allowed
    assert tuple(map(int, unicodedata.unidata_version.split(".")))[:2] >= (14, 0)
    for code in range(0x110000):
        is_out = unicodedata.category(chr(code))[0] in "CZ" and code != 0x20
        assert chr(code).isprintable() is not is_out, hex(code)
