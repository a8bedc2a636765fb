"""Recipes and sweeps as they come from editors and from Windows: a mark is taken, the rest is told in a sentence."""

import os

import pytest

from tinylora.config.recipe import apply_overrides, load_recipe
from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.sweeps.plan import load_sweep

RECIPE = "# é\r\n[optim]\r\nlr = 0.5\r\n"
SWEEP = 'recipe = "demo"\n[[cell]]\nname = "a"\n'


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    path = tmp_path / "mark.toml"
    path.write_bytes(b"\xef\xbb\xbf" + RECIPE.encode())
    assert load_recipe(str(path)).optim.lr == 0.5
    path.write_bytes(b"\xef\xbb\xbf" + SWEEP.encode())
    assert load_sweep(path).cells[0].name == "a"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_other_encodings_are_told(tmp_path, encoding):
    path = tmp_path / "my recipe.toml"
    for load, text in [(lambda: load_recipe(str(path)), RECIPE[4:]), (lambda: load_sweep(path), SWEEP)]:
        path.write_bytes(text.encode(encoding))
        with pytest.raises(UserError, match="is UTF-16 text.*save it as UTF-8, such as by: iconv .*'"):
            load()


@pytest.mark.parametrize("kind", ["recipe", "sweep"])
def test_what_is_no_file_is_told(tmp_path, kind):
    load = (lambda path: load_recipe(str(path))) if kind == "recipe" else load_sweep
    path = tmp_path / "a.toml"
    path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=f"it is a device, not a file; give the path of a {kind}"):
        load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="it is a pipe, not a file"):
        load(path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match=r"a\.toml has more than 16\.8 MB"):
        load(path)


@pytest.mark.parametrize("value", [r'"C:\Users\me\mine.jsonl"', r'"D:\mine.jsonl"', r'"C:\new\mine.jsonl"'])
def test_a_windows_path(tmp_path, value):
    """The third is good TOML: its backslash and n are a line's end, and no file has such a name."""
    path = tmp_path / "a.toml"
    for key in ("task.path", "model.name"):
        section, _, name = key.partition(".")
        path.write_text(f"[{section}]\n{name} = {value}\n")
        with pytest.raises(UserError, match="single quotes .* or with forward slashes"):
            load_recipe(str(path))
        with pytest.raises(UserError, match="single quotes .* or with forward slashes"):
            apply_overrides(RunConfig(), [f"{key}={value}"])
    path.write_text(f"[task]\npath = '{value[1:-1]}'\n")
    assert load_recipe(str(path)).task.path == value[1:-1]
    assert apply_overrides(RunConfig(), [f"task.path={value[1:-1]}"]).task.path == value[1:-1]


def test_numbers_too_long_to_read(tmp_path):
    (tmp_path / "a.toml").write_text("[train]\nseed = " + "9" * 5000 + "\n")
    with pytest.raises(UserError, match="is not TOML"):
        load_recipe(str(tmp_path / "a.toml"))
    with pytest.raises(UserError, match=r"train\.seed"):
        apply_overrides(RunConfig(), ["train.seed=" + "9" * 5000])
