"""bench/trust/house.py: two checkouts held against each other see what differs, and nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").exists(), reason="bench/ comes with the repository alone")


def write(package: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)


def test_older_modules_count_where_they_stand_today(tmp_path: Path) -> None:
    """`inspection` is of planning now, `training/run_folder` of store below it: one import points up, one down."""
    from bench.trust import house

    law = house.load(house.TESTS / "test_house.py")
    long = "def f():\n" + "    pass\n" * 80
    write(
        tmp_path / "tinylora",
        {
            "__init__.py": "",
            "inspection.py": "from tinylora.training.run_folder import RunFolder",
            "training/__init__.py": "",
            "training/run_folder.py": "def f():\n    from tinylora.inspection import g",
            "training/long.py": long + "x = 1\n" * 300,
        },
    )
    found = house.structure(tmp_path, law, older=True)
    assert found["which"]["imports_up"] == ["store/training_run_folder.py:2 takes tinylora.planning.inspection"]
    assert (found["circles"], found["circles_of_any_imports"]) == (0, 1)
    assert (found["files_at_the_root"], found["files"], found["lines"]) == (2, 5, 384)
    assert found["which"]["functions"] == {"training/long.py:f": 81}
    assert found["which"]["files"] == {"training/long.py": 381}


def test_moves_lead_to_packages_that_there_are() -> None:
    from bench.trust import house

    law = house.load(house.TESTS / "test_house.py")
    assert house.MOVED.keys() <= set(law.floors())
    now = house.structure(ROOT, law, older=False)
    assert now["imports_up"] == now["circles"] == 0


def test_a_bit_is_a_difference() -> None:
    from bench.trust.house import compared

    told = {"a": [1.0, 0.1], "b": {"c": "x", "d": None}}
    assert compared(told, json.loads(json.dumps(told))) == {"differences": 0, "first": []}
    other = {"a": [1, 0.1, 2.0], "b": {"c": "y", "e": None}}
    assert compared(told, other)["first"] == [
        "/a has 3 entries, before 2",
        "/a/0: 1, before 1.0",
        "/b/c: 'y', before 'x'",
        "/b/d is gone",
        "/b/e is new",
    ]
    assert compared({"a": 0.1}, {"a": float(np.nextafter(0.1, 1.0))})["differences"] == 1


def test_the_story_is_lived_by_the_code_of_the_checkout(tmp_path: Path) -> None:
    """And not by the package that is installed beside it."""
    from bench.trust import house

    write(tmp_path / "old" / "tinylora", {"__init__.py": "YEAR = 1999"})
    script = tmp_path / "story.py"
    script.write_text(
        "import json, os, pathlib, sys, tinylora\nos.makedirs(sys.argv[1])\n"
        "pathlib.Path(sys.argv[1], 'story.json').write_text(json.dumps(tinylora.YEAR))\n"
    )
    assert house.live(tmp_path / "old", tmp_path / "told", script) == 1999
    with pytest.raises(SystemExit, match="not by the code of"):
        house.live(tmp_path / "nowhere", tmp_path / "none", script)


def run_folder(folder: Path, last_number: float) -> Path:
    folder.mkdir()
    primary = {"base": {"correct": 1, "total": 2}, "text": "50 %"}
    result: dict[str, Any] = {"run": str(folder), "seconds": len(folder.name), "v_norm": 1.0, "primary": primary}
    for name in ("adapter", "last"):
        save_file({"v": np.array([[1.0, last_number]], np.float32)}, folder / f"{name}.safetensors")
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "result_items.jsonl").write_text('{"text": "4"}\n')
    metrics = {"step": 1, "reward": 0.5, "seconds": len(folder.name), "peak_memory_bytes": len(folder.name)}
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n")
    return folder


def test_two_runs_of_the_demo(tmp_path: Path) -> None:
    from bench.trust import house

    before, now = run_folder(tmp_path / "before", 2.0), run_folder(tmp_path / "now", 2.0)
    found = house.demo(before, now)
    assert found["equal"] is True
    assert found["primary"]["now"] == {"base": {"correct": 1, "total": 2}, "text": "50 %", "seconds": 3}
    shutil.rmtree(now)
    run_folder(now, float(np.nextafter(np.float32(2), np.float32(3))))
    (now / "metrics.jsonl").write_text('{"step": 1, "reward": 0.25}\n')
    found = house.demo(before, now)
    assert found["equal"] is found["last.safetensors"]["equal"] is found["metrics.jsonl"]["equal"] is False
    assert found["metrics.jsonl"]["first"] == ["/0/reward: 0.25, before 0.5"]
    assert found["result.json"]["equal"] is found["result_items.jsonl"]["equal"] is True
