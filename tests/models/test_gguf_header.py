"""Headers of GGUF files: read as they are, parts of a split model told apart, and no length believed."""

import resource
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from tinylora.errors import UserError
from tinylora.models.gguf_header import ListOf, read_header, refuse_part


def _write(
    path: Path, *, parts: tuple[int, int] | None = None, endian: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE
) -> Path:
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    writer.add_block_count(3)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list(["a", "bc", "日本"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    if parts:
        writer.add_uint16("split.no", parts[0])
        writer.add_uint16("split.count", parts[1])
        writer.add_int32("split.tensors.count", 27)
    writer.add_tensor("a", np.zeros((2, 3), np.float32))
    writer.add_tensor("b", np.zeros((4, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("endian", list(gguf.GGUFEndian))
def test_it_says_what_the_gguf_package_says(tmp_path: Path, endian: gguf.GGUFEndian) -> None:
    path = _write(tmp_path / "a.gguf", endian=endian)
    header, reader = read_header(path), gguf.GGUFReader(path)
    for key, field in reader.fields.items():
        if key.startswith("GGUF."):
            continue
        found, wanted = header.values[key], field.contents()
        assert found == (
            ListOf(len(wanted))
            if isinstance(wanted, list)
            else pytest.approx(wanted)
            if isinstance(wanted, float)
            else wanted
        )
    assert header.shapes == {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert header.num_weights == 6 + 4 * 32 and header.number("block_count") == 3


def test_the_parts_of_a_split_model_are_told_how_to_become_one(tmp_path: Path) -> None:
    """transformers reads a first part, and makes up all that lies in the others."""
    path = _write(tmp_path / "my model-00001-of-00002.gguf", parts=(0, 2))
    with pytest.raises(UserError) as error:
        refuse_part(path, read_header(path))
    assert "is part 1 of 2 of a model, with 2 of 27 tensors" in str(error.value)
    assert str(error.value).endswith("llama-gguf-split --merge 'my model-00001-of-00002.gguf' 'my model.gguf'")
    path = _write(tmp_path / "big-000003-of-000004.gguf", parts=(2, 4))
    with pytest.raises(UserError, match=r"part 3 of 4 .*--merge big-000001-of-000004\.gguf big\.gguf$"):
        refuse_part(path, read_header(path))
    whole = _write(tmp_path / "one.gguf", parts=(0, 1))
    refuse_part(whole, read_header(whole))


def _edited(path: Path, old: bytes, new: bytes) -> Path:
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    return path


def test_a_length_is_held_against_the_bytes_that_are_there(tmp_path: Path) -> None:
    """The gguf package reads a list of 2^40 entries one by one, past the end of the file."""
    key = b"tokenizer.ggml.scores" + struct.pack("<II", 9, 6)
    two, three = struct.pack("<Q", 2), struct.pack("<Q", 3)
    long = _edited(_write(tmp_path / "a.gguf"), key + two, key + struct.pack("<Q", 2**40))
    with pytest.raises(UserError, match=r"scores is a list of 1,099,511,627,776 entries, and 16,777,216 are allowed"):
        read_header(long)
    long = _edited(_write(tmp_path / "b.gguf"), key + two, key + struct.pack("<Q", 2**20))
    with pytest.raises(UserError, match=r"scores wants 4,194,304 bytes and \d+ are left"):
        read_header(long)
    text = b"general.architecture" + struct.pack("<I", 8)
    five = struct.pack("<Q", 5)
    with pytest.raises(UserError, match=r"general\.architecture wants 4,611,686,018,427,387,904 bytes"):
        read_header(_edited(_write(tmp_path / "c.gguf"), text + five, text + struct.pack("<Q", 2**62)))
    tokens = b"tokenizer.ggml.tokens" + struct.pack("<II", 9, 8)
    with pytest.raises(UserError, match="is damaged or not well-formed"):
        read_header(_edited(_write(tmp_path / "d.gguf"), tokens + three, tokens + struct.pack("<Q", 2**23)))
    with pytest.raises(UserError, match="is a list of 16 entries, and"):  # lists of lists of lists ...
        nested = b"".join(struct.pack("<IQ", 9, 16) for _ in range(40))
        read_header(_edited(_write(tmp_path / "e.gguf"), key[-8:-4] + key[-4:] + two, struct.pack("<I", 9) + nested))


def test_counts_and_shapes_are_held_against_it_too(tmp_path: Path) -> None:
    whole = _write(tmp_path / "a.gguf").read_bytes()
    for at, count, message in ((8, 2**60, "names .* tensors, for which"), (16, 2**60, "names .* fields, and 65,536")):
        path = tmp_path / "b.gguf"
        path.write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
        with pytest.raises(UserError, match=message):
            read_header(path)
    shape = struct.pack("<QIQQ", 1, 2, 3, 2).replace(struct.pack("<Q", 1), struct.pack("<Q", 1) + b"a", 1)
    wide = shape[:-16] + struct.pack("<QQ", 2**40, 2**40)
    with pytest.raises(UserError, match=r"its tensors end at byte [\d,]+, and it is cut off at"):
        read_header(_edited(_write(tmp_path / "c.gguf"), shape, wide))
    for cut in (5, 30, 200, len(whole) - 100):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"b\.gguf is damaged or not well-formed"):
            read_header(path)


def test_no_bytes_make_it_fail_in_another_way_or_take_long(tmp_path: Path) -> None:
    """Each byte of a header changed once, in a child with two gigabytes: a header, or one sentence."""
    path = _write(tmp_path / "a.gguf")
    code = (
        "import pathlib, resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31))\n"
        "from tinylora.errors import UserError\n"
        "from tinylora.models.gguf_header import read_header\n"
        "path = pathlib.Path(sys.argv[1]); whole = path.read_bytes(); refused = 0\n"
        "for at in range(4, len(whole)):\n"
        "    for new in (0, 0x7F, 0xFF):\n"
        "        path.write_bytes(whole[:at] + bytes([new]) + whole[at + 1 :])\n"
        "        try:\n"
        "            read_header(path)\n"
        "        except UserError as error:\n"
        "            refused += 1\n"
        "print(refused)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2**22  # kilobytes
