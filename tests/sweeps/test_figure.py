"""The figure of a sweep: what its table holds, what is said of cells that were not run, files that are no results."""

import csv
import json
import os
import threading
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing
from typer.testing import CliRunner

from tinylora.cli import app
from tinylora.config.method import MethodName
from tinylora.config.run import TrainConfig
from tinylora.evaluation.statistics.paired import wilson_interval
from tinylora.reporting import figures
from tinylora.reporting.figures import WIDTH
from tinylora.sweeps import figure as dial


def figure_(*args: str) -> Any:
    return CliRunner().invoke(app, ["figure", *args])


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def cell(name: str, numbers: int, corrects: list[int | None], algorithm: str = "grpo", method: str = "tinylora") -> Any:
    """A cell with one run a count of right items of 200; None was not run."""
    runs = []
    for seed, correct in enumerate(corrects):
        run = {"cell": name, "seed": seed, "projection_seed": 0, "chosen": {"optim.lr": 0.1}, "path": name}
        run |= {"state": "not run"} if correct is None else {
            "state": "done", "trained_numbers": numbers, "untrained": "key",
            "strict": {"tuned": {"correct": correct, "total": 200}},
            "value_only": {"tuned": {"correct": correct + 20, "total": 200}},
        }  # fmt: skip
        runs.append(run)
    done = any(correct is not None for correct in corrects)
    return {
        "name": name, "method": method, "label": method, "algorithm": algorithm, "runs": runs,
        "trained_numbers": numbers if done else None,
    }  # fmt: skip


def results_file(folder: Path, *cells: Any, name: str = "results.json") -> Path:
    share = {"correct": 60, "total": 200, "interval": list(wilson_interval(60, 200))}
    path = folder / name
    untrained = {"key": {"model": "m", "task": "t", "strict": share, "value_only": share}}
    path.write_text(json.dumps({"version": 1, "untrained": untrained, "cells": list(cells)}))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return results_file(
        tmp_path,
        cell("one", 1, [70, 74, 66]),
        cell("thirteen", 13, [90, None, 100]),
        cell("sft-one", 1, [50, 52], "sft"),
        cell("full", 134_515_008, [None], method="full"),
        cell("lora", 300_000, [120], "sft", method="lora"),
    )


def test_png_svg_and_csv_lie_beside_each_other(results: Path) -> None:
    done = figure_(str(results), "--json")
    assert done.exit_code == 0, done.output
    files = [Path(name) for name in json.loads(done.stdout)["files"]]
    assert [path.name for path in files] == ["figure.png", "figure.svg", "figure.csv"]
    assert {path.parent for path in files} == {results.parent}
    assert files[0].read_bytes().startswith(b"\x89PNG")
    width = int.from_bytes(files[0].read_bytes()[16:20])
    assert 800 <= width <= 1600
    svg = ET.fromstring(files[1].read_text())
    assert svg.tag == "{http://www.w3.org/2000/svg}svg" and "var(--" not in files[1].read_text()
    words = {"".join(text.itertext()).strip() for text in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"RL (grpo)", "SFT", "TinyLoRA", "LoRA", "untrained, 95 % interval", "trained numbers"} <= words


def test_the_csv_has_every_run_and_what_was_not_run(results: Path) -> None:
    figure_(str(results))
    rows = table(results.with_name("figure.csv"))
    assert [(row["cell"], row["seed"], row["strict_correct"]) for row in rows] == [
        ("one", "0", "70"), ("one", "1", "74"), ("one", "2", "66"), ("thirteen", "0", "90"), ("thirteen", "1", ""),
        ("thirteen", "2", "100"), ("sft-one", "0", "50"), ("sft-one", "1", "52"), ("full", "0", ""),
        ("lora", "0", "120"),
    ]  # fmt: skip
    assert [row["state"] for row in rows if not row["strict_correct"]] == ["not run", "not run"]
    done = figure_(str(results), "--json")
    said = json.loads(done.stdout)
    assert said["not_run"] == ["thirteen seed 1", "full"]
    assert "Not run: thirteen seed 1, full." in said["caption"]
    assert "Not run: thirteen seed 1, full" in results.with_name("figure.svg").read_text()


def test_marks_stand_where_the_numbers_say(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Means and runs read back from the drawing, and no two texts of it overlap."""
    kept: list[Drawing] = []

    def drawing(*args: Any, **kwargs: Any) -> Drawing:
        kept.append(Drawing(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(figures, "Drawing", drawing)
    figure_(str(results))
    (made,) = kept
    strict, value_only = made.axes
    assert strict.get_xscale() == "log" == value_only.get_xscale()
    for axes, more in ((strict, 0), (value_only, 10)):  # 20 of 200 items more
        means = [line for line in axes.lines if line.get_linestyle() != "None" and line.get_marker() == "o"]
        (rl, sft) = (list(map(float, line.get_ydata())) for line in means if len(line.get_xdata()))
        assert rl == pytest.approx([35 + more, 47.5 + more]) and sft == pytest.approx([25.5 + more])
        runs = [line for line in axes.lines if line.get_linestyle() == "None" and len(line.get_xdata()) > 1]
        assert sorted(float(y) for y in runs[0].get_ydata()) == pytest.approx([33 + more, 35 + more, 37 + more])
        lora = next(line for line in axes.lines if line.get_marker() == "^" and len(line.get_xdata()))
        assert float(lora.get_ydata()[0]) == pytest.approx(60 + more)
        assert 300_000 / 1.2 < float(lora.get_xdata()[0]) < 300_000 * 1.2
        untrained = [line for line in axes.lines if len(set(line.get_ydata())) == 1 and len(line.get_xdata()) == 2]
        assert any(float(line.get_ydata()[0]) == pytest.approx(30) for line in untrained)
        low, high = wilson_interval(60, 200)
        (band,) = axes.patches
        assert (band.get_y(), band.get_height()) == pytest.approx((100 * low, 100 * (high - low)))

    assert not overlaps(made)
    strict.text(0.5, 0.5, "a", transform=strict.transAxes)
    strict.text(0.5, 0.5, "b", transform=strict.transAxes)
    assert overlaps(made)  # it can fail


def overlaps(made: Drawing) -> list[tuple[str, str]]:
    FigureCanvasAgg(made).draw()
    texts = [text for axes in made.axes for text in [axes.xaxis.label, axes.yaxis.label, *axes.texts]]
    texts += [tick for axes in made.axes for tick in axes.get_yticklabels() if on(axes, tick, 1)]
    texts += [tick for tick in made.axes[-1].get_xticklabels() if on(made.axes[-1], tick, 0)]
    texts += [text for legend in made.legends for text in legend.get_texts()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    return [(a[0], b[0]) for a, b in pairs if a[1].overlaps(b[1])]


def on(axes: Any, tick: Any, which: int) -> bool:
    """Whether a tick's label stands within the axis: others are not drawn."""
    low, high = sorted(axes.get_ylim() if which else axes.get_xlim())
    return bool(low <= tick.get_position()[which] <= high)


def test_two_results_are_drawn_together(tmp_path: Path) -> None:
    paths = []
    for name, algorithm in (("rl", "grpo"), ("sft", "sft")):
        (tmp_path / name).mkdir()
        paths.append(str(results_file(tmp_path / name, cell("one", 1, [70], algorithm))))
    assert figure_(*paths, "--out", str(tmp_path / "new" / "both.svg")).exit_code == 0
    rows = table(tmp_path / "new" / "both.csv")
    assert [(row["results"], row["algorithm"]) for row in rows] == [("rl", "grpo"), ("sft", "sft")]


def test_a_run_of_two_files_is_taken_from_the_first(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = results_file(tmp_path / "a", cell("one", 1, [70, None]))
    second = results_file(tmp_path / "b", cell("one", 1, [90, 80]), cell("two", 2, [75]))
    assert figure_(str(first), str(second)).exit_code == 0
    rows = table(tmp_path / "a" / "figure.csv")
    assert [(row["cell"], row["seed"], row["strict_correct"]) for row in rows if row["state"] == "done"] == [
        ("one", "0", "70"), ("one", "1", "80"), ("two", "0", "75"),
    ]  # fmt: skip


def test_a_cell_is_what_has_one_name_and_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one file or several, chosen or set; not another learning rate, and not another untrained model."""
    means: list[tuple[str, list[float]]] = []
    plot = Axes.plot

    def noted(self: Axes, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("zorder") == 4 and "markersize" in kwargs:
            means.append((str(kwargs.get("linestyle")), [float(y) for y in np.atleast_1d(args[1])]))
        return plot(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", noted)
    one, two, three = (cell("one", 1, [None] * seed + [60 + 20 * seed]) for seed in range(3))
    two["runs"][1]["chosen"], two["set"] = None, ["optim.lr = 1e-1"]  # the same, written otherwise
    three["runs"][2]["chosen"] = {"optim.lr": 0.2}
    other = cell("one", 1, [None] * 3 + [180])
    other["runs"][3]["untrained"] = "another machine"
    paths = [results_file(tmp_path, one, name="a.json")]
    paths += [results_file(tmp_path, made, name=f"{i}.json") for i, made in enumerate((two, three, other))]
    done = figure_(*map(str, paths), "--json")
    assert done.exit_code == 0, done.output
    strict = means[: len(means) // 2]
    assert sorted(y for _, ys in strict for y in ys) == pytest.approx([35, 50, 90])
    assert json.loads(done.stdout)["not_run"] == []
    rows = table(tmp_path / "figure.csv")
    assert [(row["seed"], row["state"]) for row in rows] == [(str(seed), "done") for seed in range(4)]
    assert {row["settings"] for row in rows} == {"optim.lr=0.1", "optim.lr=0.2"}


def test_every_method_has_a_shape_and_a_name() -> None:
    assert set(dial.SHAPES) == set(dial.NAMES) == set(get_args(MethodName))
    assert len(set(dial.SHAPES.values())) == len(dial.SHAPES)
    assert set(dial.ALGORITHMS) == set(get_args(get_type_hints(TrainConfig)["algorithm"]))


def test_refused(tmp_path: Path) -> None:
    assert "there is no file" in figure_(str(tmp_path / "none.json")).stderr
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert "is no results.json of a sweep" in figure_(str(other)).stderr
    other.write_text("no json")
    assert "is not JSON" in figure_(str(other)).stderr
    nothing = figure_(str(results_file(tmp_path, cell("one", 1, [None]))))
    assert nothing.exit_code == 2 and "nothing has been evaluated yet" in nothing.stderr
    damaged = cell("one", 1, [70])
    del damaged["runs"][0]["strict"]["tuned"]
    refused = figure_(str(results_file(tmp_path, damaged)))
    assert refused.exit_code == 2 and "results.json lacks 'tuned': it is damaged, or of another" in refused.stderr


def test_the_pages_figures_kept_their_width() -> None:
    """The report's phones: panels and width were added for this figure alone."""
    assert WIDTH == 3.9
    assert dial.PANELS[0][0] == "strict"


@pytest.mark.skipif(os.name == "nt", reason="FIFOs are POSIX")
def test_the_figure_replaces_its_own_files_and_no_others(results: Path, tmp_path: Path) -> None:
    for _ in range(2):  # beside the results, where it is drawn anew each time
        assert figure_(str(results)).exit_code == 0
    mine = tmp_path / "mine.csv"
    mine.write_text("mine")
    refused = figure_(str(results), "--out", str(tmp_path / "mine.png"))
    assert refused.exit_code == 2 and "mine.csv exists; choose another file" in refused.stderr
    assert mine.read_text() == "mine" and not (tmp_path / "mine.png").exists()
    assert figure_(str(results), "--out", str(tmp_path / "mine.png"), "--force").exit_code == 0
    assert mine.read_text() != "mine"
    for name, begins in (("fifo", b"\x89PNG"), ("fifo.svg", b"<"), ("fifo.csv", b"results,cell")):
        os.mkfifo(tmp_path / name)
        read: list[bytes] = []
        reader = threading.Thread(target=lambda n=name, r=read: r.append((tmp_path / n).read_bytes()), daemon=True)
        reader.start()
        assert json.loads(figure_(str(results), "--out", str(tmp_path / name), "--json").stdout)["files"] == [
            str(tmp_path / name)
        ]
        reader.join(timeout=60)
        assert read[0].startswith(begins) and (tmp_path / name).is_fifo()
