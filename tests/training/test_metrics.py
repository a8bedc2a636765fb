"""Metrics, trackers and the progress line: what is written is what was measured, in the shape that was promised."""

import io
import json
import logging
import math
import struct
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tinylora.errors import UserError
from tinylora.system.jsonl import JsonlWriter, read_jsonl
from tinylora.talk import format_duration
from tinylora.training.metrics import Means, MetricsWriter
from tinylora.training.progress import Progress, StepReport, format_step
from tinylora.training.trackers import make_trackers


class Recorder:
    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.closed = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, dict(metrics)))

    def close(self) -> None:
        self.closed += 1


class Broken(Recorder):
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError("server away")


# --- metrics ---


def test_each_step_is_one_strict_json_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.log(1, {"reward": 0.1 + 0.2, "loss": math.nan, "gap": -math.inf, "note": "ü\n"})
        assert path.read_bytes().count(b"\n") == 1  # there before the next step, and before close
        writer.log(2, {"v": [1.0, math.inf], "t": torch.tensor(0.5), "n": np.int64(3), "f": np.float32(0.1)})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    first, second = (json.loads(line, parse_constant=refuse) for line in path.read_text("utf-8").splitlines())
    assert first == {"step": 1, "reward": 0.1 + 0.2, "loss": None, "gap": None, "note": "ü\n"}
    assert second == {"step": 2, "v": [1.0, None], "t": 0.5, "n": 3, "f": float(np.float32(0.1))}
    assert read_jsonl(path) == [first, second]


def test_what_json_has_no_word_for_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    with JsonlWriter(tmp_path / "a.jsonl") as writer:
        with pytest.raises(TypeError, match="object does not fit"):
            writer.append({"x": object()})
        with pytest.raises((RuntimeError, ValueError)):
            writer.append({"x": torch.ones(2)})
        writer.append({"x": "\ud83d"})  # half of an emoji, as a byte-level tokenizer may give
    assert read_jsonl(tmp_path / "a.jsonl") == [{"x": "?"}]


def test_only_a_torn_last_line_is_forgiven(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    whole = '{"a": 1}\n{"a": "ü"}\n'.encode()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert read_jsonl(path) == [{"a": 1}, {"a": "ü"}][: whole[:cut].count(b"\n")]
    path.write_bytes(b'{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 is not JSON"):
        read_jsonl(path)
    path.write_bytes(b"[1]\n")
    with pytest.raises(UserError, match="line 1 must be a JSON object, got list"):
        read_jsonl(path)


def test_means_are_sums_divided_by_counts() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=100)
    means = Means()
    for part in np.split(values, [3, 4, 60]):  # micro-batches of unequal size
        means.add("x", float(part.sum()), len(part))
    means.add("nothing", 0.0, 0)
    result = means.result()
    assert result["x"] == pytest.approx(float(values.mean()), rel=1e-12)
    mean_of_means = np.mean([part.mean() for part in np.split(values, [3, 4, 60])])
    assert abs(result["x"] - mean_of_means) > 1e-3  # the mistake this class is there to prevent
    assert math.isnan(result["nothing"])


def test_trackers_get_numbers_only_and_a_broken_one_is_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, broken = Recorder(), Broken()
    with caplog.at_level(logging.WARNING), MetricsWriter(tmp_path / "m.jsonl", [broken, good]) as writer:
        for step in (1, 2):
            writer.log(step, {"reward": torch.tensor(0.5), "n": 3, "text": "no", "v": [1.0], "missing": None})
    assert good.rows == [(1, {"reward": 0.5, "n": 3.0}), (2, {"reward": 0.5, "n": 3.0})]
    assert good.closed == 1
    assert caplog.text.count("Broken could not log step 1 (ConnectionError: server away)") == 1
    assert "log step 2" not in caplog.text
    assert len(read_jsonl(tmp_path / "m.jsonl")) == 2


# --- trackers ---


def test_unknown_or_missing_tracker_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="must be among tensorboard, wandb, trackio, got 'mlflow'"):
        make_trackers(["mlflow"], tmp_path)
    for module in ("torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(UserError, match=rf"pip install 'tinylora\[{name}\]'"):
            make_trackers([name], tmp_path)


def read_scalars(path: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of an event file, by TFRecord framing and protobuf wire format; no TensorBoard code."""

    def fields(data: bytes) -> list[tuple[int, Any]]:
        found, at = [], 0

        def varint() -> int:
            nonlocal at
            value = shift = 0
            while True:
                byte = data[at]
                at += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    return value

        while at < len(data):
            key = varint()
            if key & 7 == 0:
                found.append((key >> 3, varint()))
                continue
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            found.append((key >> 3, data[at : at + size]))
            at += size
        return found

    rows, data = [], path.read_bytes()
    while data:
        size = struct.unpack("<Q", data[:8])[0]
        event, data = dict(fields(data[12 : 12 + size])), data[16 + size :]
        for _, value in fields(event[5]) if 5 in event else []:
            entry = dict(fields(value))
            rows.append((event.get(2, 0), entry[1].decode(), struct.unpack("<f", entry[2])[0]))
    return rows


def test_tensorboard_files_hold_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tracker,) = make_trackers(["tensorboard"], tmp_path)
    tracker.log(1, {"reward": 0.5, "length": 12.0})
    tracker.log(2, {"reward": 0.75})
    (path,) = (tmp_path / "tensorboard").iterdir()
    before = read_scalars(path)  # flushed each step: a kill after a step loses nothing of it
    tracker.close()
    assert before == read_scalars(path) == [(1, "reward", 0.5), (1, "length", 12.0), (2, "reward", 0.75)]


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_hosted_trackers_resume_one_run_per_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    """A stand-in with the package's documented calls: init(...) -> run, run.log(dict, step=), run.finish()."""
    calls: list[Any] = []

    class Run:
        def log(self, metrics: dict[str, float], step: int | None = None) -> None:
            calls.append((step, metrics))

        def finish(self) -> None:
            calls.append("finish")

    def init(**kwargs: Any) -> Run:
        calls.append(kwargs)
        return Run()

    module: Any = types.ModuleType(package)
    module.init = init
    monkeypatch.setitem(sys.modules, package, module)
    key = "id" if package == "wandb" else "name"
    for run in (tmp_path / "demo-001", tmp_path / "demo-001", tmp_path / "other" / "demo-001"):
        (tracker,) = make_trackers([package], run, {"optim": {"lr": 0.1}}, first_step=3)
        tracker.log(4, {"reward": 0.5})
        tracker.close()
    inits = [call for call in calls if isinstance(call, dict)]
    assert inits[0] == inits[1]
    assert inits[0][key] != inits[2][key]
    assert (inits[0]["resume"], inits[0]["config"]) == ("allow", {"optim": {"lr": 0.1}})
    assert calls[1:3] == [(4, {"reward": 0.5}), "finish"]


# --- progress ---

REPORT = StepReport(
    step=10,
    reward=0.62,
    length_tokens=214.3,
    tokens_per_second=1840.2,
    v_norm=0.0312,
    grad_norm=0.0312,
    step_seconds=12.4,
)


def test_line_has_the_promised_shape() -> None:
    assert format_step(REPORT, 200, 190 * 12.4) == (
        "step  10/200 | reward 0.62 | length 214 tok | 1,840 tok/s | |v| 0.031 | grad norm 3.1e-02 | "
        "12.4 s/step | 39 min left"
    )


def test_line_copes_with_small_and_missing_numbers() -> None:
    report = StepReport(
        step=1,
        reward=math.nan,
        length_tokens=math.nan,
        tokens_per_second=math.inf,
        v_norm=4e-5,
        grad_norm=0.0,
        step_seconds=0.04,
    )
    assert format_step(report, 5, math.nan) == (
        "step 1/5 | reward n/a | length n/a tok | n/a tok/s | |v| 4.0e-05 | grad norm 0.0e+00 | "
        "0.0 s/step | unknown left"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (119.4, "119 s"), (119.6, "2 min"), (2356, "39 min"),
     (7169, "119 min"), (7171, "2 h 0 min"), (18600, "5 h 10 min"), (172799, "2 d 0 h"),
     (273600, "3 d 4 h"), (-1, "unknown")],
)  # fmt: skip
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_time_left_follows_the_clock_on_a_terminal_and_off_it(stream: type[io.StringIO]) -> None:
    """Steps take 10 s of which step_seconds shows 4: validation counts too. Resumed at step 100 of 130."""
    out, now = stream(), [1000.0]
    progress = Progress(130, done_steps=100, stream=out, clock=lambda: now[0])
    for step in (101, 102):
        now[0] += 10.0
        progress.step(
            StepReport(step=step, reward=1, length_tokens=1, tokens_per_second=1, v_norm=1, grad_norm=1, step_seconds=4)
        )
    for step in range(103, 131):  # then faster: the last ten steps count
        now[0] += 1.0
        progress.step(
            StepReport(step=step, reward=1, length_tokens=1, tokens_per_second=1, v_norm=1, grad_norm=1, step_seconds=4)
        )
    lines = out.getvalue().splitlines()
    assert [line.split(" | ")[-1] for line in (lines[0], lines[1], lines[19], lines[-1])] == [
        "5 min left", "5 min left", "10 s left", "0.0 s left",
    ]  # fmt: skip
    assert len(lines) == 30
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_talk_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    Progress(5).say("hello")
    assert capsys.readouterr() == ("", "hello\n")
