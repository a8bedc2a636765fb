"""The training loop end to end on a tiny model: equal seeds, crashes, real kills, what is refused, what is kept."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pseudo_terminal import bars_of
from scipy.stats import binomtest
from tiny_run import STEPS, ByteTask, metrics_of, quiet, start, tiny_config
from transformers import PreTrainedModel

import tinylora.training.grpo as grpo_module
import tinylora.training.loop as loop_module
import tinylora.training.train as train_module
from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.evaluation import final
from tinylora.evaluation.conditions import Conditions, random_vectors
from tinylora.evaluation.lengths import random_label, randoms_in_words
from tinylora.evaluation.verdict import format_result, verdict
from tinylora.generation.native.engine import NativeEngine
from tinylora.models.bases import remember
from tinylora.rollouts.prompts import prompt_candidates
from tinylora.store.adapter_file import load_vector
from tinylora.store.run_folder import RunFolder
from tinylora.system.jsonl import read_jsonl
from tinylora.tasks.base import Item, Split
from tinylora.tasks.config import TaskConfig
from tinylora.training.metrics import MetricsWriter
from tinylora.training.train import TrainResult, resume, train

answer = Conditions._answer
PROGRAM = Path(__file__).parents[1] / "helpers" / "tiny_run.py"
pytestmark = pytest.mark.usefixtures("fresh_cache")


def same(a: TrainResult, b: TrainResult) -> None:
    """Equal to the last bit: v, both adapter files, metrics and samples."""
    assert torch.equal(a.v, b.v)
    assert torch.equal(load_vector(a.run / "last.safetensors")[0], load_vector(b.run / "last.safetensors")[0])
    assert metrics_of(a.run) == metrics_of(b.run)
    assert list(read_jsonl(a.run / "samples.jsonl")) == list(read_jsonl(b.run / "samples.jsonl"))


class Crash(Exception):
    """Stands for whatever ends a run."""


def crash_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Raise Crash in place of the given call (counted from 1)."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def crashing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, crashing)


def only_run(out: Path) -> Path:
    (run,) = out.iterdir()
    return run


def test_equal_seeds_give_equal_bits_and_another_seed_does_not(tiny_folder: Path, tmp_path: Path) -> None:
    first, second = start(tiny_folder, tmp_path / "a"), start(tiny_folder, tmp_path / "a")
    assert (first.run.name, second.run.name) == ("run-001", "run-002")
    same(first, second)
    rows = metrics_of(first.run)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["step"] for row in rows if "validation_reward" in row] == [0, 3, 6, 9, 10]
    assert [row["step"] for row in rows if "liveness_slope" in row] == [1, 5, 9]
    assert rows[-1]["v_norm"] > 0.01
    assert load_vector(first.run / "last.safetensors")[0].flatten().tolist() == rows[-1]["v"]
    other = start(tiny_folder, tmp_path / "a", train={"seed": 1})
    assert not torch.equal(other.v, first.v)


@pytest.mark.parametrize(
    ("owner", "name", "call", "checkpoint_every"),
    [
        (grpo_module, "grpo_step", 2, 3),  # before the first checkpoint
        (MetricsWriter, "log", 5, 1),
        (grpo_module, "sample_step", 1, 1),
        (grpo_module, "grpo_step", 5, 3),
        (loop_module, "_log_samples", 4, 1),
        (loop_module, "_validate", 3, 3),
        (MetricsWriter, "log", 9, 3),
        (RunFolder, "save_checkpoint", 3, 3),  # the step's lines are written, its checkpoint is not
        (train_module, "save_vector", 1, 3),  # all steps are done
    ],
)
def test_resume_after_a_crash_is_as_if_nothing_had_happened(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    checkpoint_every: int,
) -> None:
    log = {"checkpoint_every": checkpoint_every}
    whole = start(tiny_folder, tmp_path / "whole", log=log)
    with monkeypatch.context() as patch:
        crash_at(patch, owner, name, call)
        with pytest.raises(Crash):
            start(tiny_folder, tmp_path / "crashed", log=log)
    same(resume(only_run(tmp_path / "crashed"), task=ByteTask(), say=quiet), whole)


def test_more_steps_go_on_where_the_run_ended(tiny_folder: Path, tmp_path: Path) -> None:
    short = start(tiny_folder, tmp_path / "short", train={"steps": 6})
    whole = start(tiny_folder, tmp_path / "whole", train={"steps": 9})
    longer = resume(short.run, ["train.steps=9"], task=ByteTask(), say=quiet)
    same(longer, whole)
    assert RunFolder.open(short.run).read_config().train.steps == 9


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_kill_9_at_any_instant_loses_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    """At least 20 real kills, some of them while a checkpoint is being written, and the same run."""
    steps = 40
    whole = start(tiny_folder, tmp_path / "whole", train={"steps": steps})
    slowest = 1.5 * max(0.2, whole.seconds / 4)
    out = tmp_path / "killed"
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tiny_folder), str(out), str(steps), "20", str(slowest)],
        env={**os.environ, "PYTHONPATH": str(PROGRAM.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    kills, torn = (int(word) for word in done.stdout.split())
    configs = list(out.glob("*/*/config.toml"))
    assert len(configs) == len(list(out.iterdir())) > 0
    for config in configs:
        v, _ = load_vector(config.parent)
        same(TrainResult(config.parent, v, steps, 0.0, None), whole)
        assert not list(config.parent.glob("checkpoint/*.tmp"))
    print(f"{kills} kills, {torn} inside a checkpoint write")
    assert kills >= 20
    assert torn >= 1


def test_a_changed_setting_is_refused_on_resume(tiny_folder: Path, tmp_path: Path) -> None:
    run = start(tiny_folder, tmp_path, train={"steps": 1}).run
    before = (run / "config.toml").read_bytes()
    with pytest.raises(UserError, match=r"only train\.steps, log\.\*, .* may change on resume, got optim\.lr"):
        resume(run, ["optim.lr=0.1"], task=ByteTask(), say=quiet)
    with pytest.raises(UserError, match="the questions of task bytes are not those"):
        resume(run, task=ByteTask(size=6), say=quiet)
    assert (run / "config.toml").read_bytes() == before


def test_nothing_is_cut_before_a_resume_is_certain(tiny_folder: Path, tmp_path: Path) -> None:
    """Once the logs were cut back to the checkpoint, and the questions looked at afterwards."""
    run = start(tiny_folder, tmp_path, train={"steps": 2}).run
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3}\n')
    before = {path.name: path.read_bytes() for path in run.glob("*.jsonl")}
    with pytest.raises(UserError, match="the questions of task bytes are not those"):
        resume(run, task=ByteTask(size=6), say=quiet)
    for path in (run / "checkpoint").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"has 3 steps in metrics\.jsonl and no checkpoint to go on from"):
        resume(run, task=ByteTask(), say=quiet)
    assert {path.name: path.read_bytes() for path in run.glob("*.jsonl")} == before


def test_fewer_steps_than_are_done_are_refused_on_resume(tiny_folder: Path, tmp_path: Path) -> None:
    """Once accepted: config.toml then said 3 of an adapter that had learned for 4."""
    whole = start(tiny_folder, tmp_path, train={"steps": 4})
    before = (whole.run / "config.toml").read_bytes()
    with pytest.raises(
        UserError, match=r"train\.steps is 3, but the run .* has done 4 steps already; set .* at least 4"
    ):
        resume(whole.run, ["train.steps=3"], task=ByteTask(), say=quiet)
    assert (whole.run / "config.toml").read_bytes() == before
    assert torch.equal(resume(whole.run, ["train.steps=4"], task=ByteTask(), say=quiet).v, whole.v)


def test_fewer_steps_than_planned_end_a_run_early(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, grpo_module, "grpo_step", 4)
        with pytest.raises(Crash):
            start(tiny_folder, tmp_path / "runs", train={"steps": 9})
    short = resume(only_run(tmp_path / "runs"), ["train.steps=3"], task=ByteTask(), say=quiet)
    assert (short.steps, RunFolder.open(short.run).read_config().train.steps) == (3, 3)


def test_another_base_under_the_same_name_is_refused_on_resume(
    tiny_folder: Path, tiny_llama: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = start(tiny_folder, tmp_path / "runs", train={"steps": 2}).run
    before = (run / "config.toml").read_bytes()
    (found,) = tiny_folder.glob("*.safetensors")
    weights = found.read_bytes()
    with torch.no_grad():
        tiny_llama.lm_head.weight.mul_(1.5)
    tiny_llama.save_pretrained(tiny_folder)
    with pytest.raises(UserError, match=r"is not the base model that the run .* began with: .*weights differ by"):
        resume(run, ["train.steps=3"], task=ByteTask(), say=quiet)
    assert (run / "config.toml").read_bytes() == before
    found.write_bytes(weights)
    identified = []
    monkeypatch.setattr(train_module, "remember", lambda base: identified.append(base) or remember(base))
    assert resume(run, ["train.steps=4"], task=ByteTask(), say=quiet).steps == 4
    assert len(identified) == 1  # once a run, not once a step


def scored_by_a_file(folder: Path, model: Path) -> RunConfig:
    """A tiny run over a file, scored by `mine.py`; both stand in `folder`, which is the current one."""
    rows = [{"question": f"{a} + {b}", "answer": str(a + b), "level": a} for a in range(6) for b in range(6)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_train_scorer.py").write_text("def score(item, text):\n    return len(text) % 2\n")
    task = TaskConfig(name="jsonl", path=str(folder / "data.jsonl"), scorer="my_train_scorer:score")
    return replace(tiny_config(model, train={"steps": 3}), task=task)


def test_a_changed_scorer_is_noticed_on_resume(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other code is said, as a run that its fault had stopped must go on; other fields of the items are refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = scored_by_a_file(tmp_path, tiny_folder)
    run = train(config, out=tmp_path / "runs", say=quiet).run
    said: list[str] = []
    resume(run, ["train.steps=4"], say=said.append)
    assert not [line for line in said if "the code of the scorer" in line]
    (tmp_path / "my_train_scorer.py").write_text("def score(item, text):\n    return 1.0\n")
    resume(run, ["train.steps=5"], say=said.append)
    assert [line for line in said if "my_train_scorer:score has changed" in line]
    data = (tmp_path / "data.jsonl").read_text()
    (tmp_path / "data.jsonl").write_text(data.replace('"level": 3', '"level": 4'))
    with pytest.raises(UserError, match=r"what the scorer \S*my_train_scorer:score reads of the questions beside"):
        resume(run, ["train.steps=6"], say=said.append)


def test_an_engine_that_computes_otherwise_says_that_the_bits_differ(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the weights are packed hangs on the memory that is free at the start, and moves last digits."""
    run = start(tiny_folder, tmp_path, train={"steps": 2}).run

    def said(steps: int) -> list[str]:
        texts: list[str] = []
        resume(run, [f"train.steps={steps}"], task=ByteTask(), say=texts.append)
        return [text for text in texts if "not bit for bit" in text]

    assert not said(3)
    monkeypatch.setattr(NativeEngine, "_has_room_to_prepack", lambda engine: False)
    (text,) = said(4)
    assert "weights as they are, and had" in text and "weights packed, so" in text
    assert not said(5)  # of the step before, this is the same


def test_a_checkpoint_without_the_base_s_fingerprint_goes_on(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As all were before it was kept."""
    with monkeypatch.context() as patch:
        save = RunFolder.save_checkpoint
        patch.setattr(
            RunFolder, "save_checkpoint", lambda folder, state: save(folder, {
                key: value for key, value in state.items() if key not in ("base_fingerprint", "engine_arithmetic")
            }),
        )  # fmt: skip
        run = start(tiny_folder, tmp_path / "runs", train={"steps": 2}).run
    checkpoint = RunFolder.open(run).load_checkpoint()
    assert checkpoint is not None and "base_fingerprint" not in checkpoint.state
    assert resume(run, ["train.steps=3"], task=ByteTask(), say=quiet).steps == 3


def test_the_cache_may_be_another_on_resume(tiny_folder: Path, tmp_path: Path) -> None:
    """The engine advises to raise it, and the advice was refused on resume."""
    run = start(tiny_folder, tmp_path / "runs", train={"steps": 2}).run
    texts: list[str] = []
    found = resume(run, ["train.steps=3", "generation.kv_budget_gib=1.5"], task=ByteTask(), say=texts.append)
    assert found.steps == 3
    assert any("perhaps not bit for bit" in text for text in texts)
    assert RunFolder.open(run).read_config().generation.kv_budget_gib == 1.5


def test_a_run_in_use_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    run = start(tiny_folder, tmp_path, train={"steps": 1}).run
    with RunFolder.open(run).lock(), pytest.raises(UserError, match=rf"in use by process {os.getpid()}"):
        resume(run, task=ByteTask(), say=quiet)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        resume(tmp_path, say=quiet)


@pytest.mark.parametrize("offset", [0.0, -3.0])
def test_keep_best_and_keep_last(tiny_folder: Path, tmp_path: Path, offset: float) -> None:
    """With rewards below 0, too: the best one was once looked for above -1."""
    reward = {"value_only": 1.0, "one": offset}

    def run(keep: str) -> TrainResult:
        config = replace(tiny_config(tiny_folder, train={"keep": keep}, eval={"every": 1}), reward=reward)
        return train(config, ByteTask(), out=tmp_path, say=quiet)

    best, last = run("best"), run("last")
    rows = metrics_of(best.run)
    assert metrics_of(last.run) == rows
    scores = [row["validation_reward"] for row in rows]
    chosen = rows[1 + int(np.argmax(scores[1:]))]  # the first of equals; step 0, the untrained model, is never kept
    assert best.v.flatten().tolist() == chosen["v"]
    assert last.v.flatten().tolist() == rows[-1]["v"]
    assert torch.equal(load_vector(best.run)[0], best.v)
    assert torch.equal(load_vector(best.run / "last.safetensors")[0], last.v)
    assert (max(scores) < -1) == (offset < 0)


def test_a_run_that_never_beat_the_untrained_model_says_so(tiny_folder: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def run(reward: dict[str, float]) -> list[float]:
        said.clear()
        config = tiny_config(tiny_folder, eval={"every": 1}, optim={"lr": 0.5})
        found = train(replace(config, reward=reward), ByteTask(), out=tmp_path, say=said.append)
        return [row["validation_reward"] for row in metrics_of(found.run)]

    scores = run({"one": 1.0})
    assert set(scores) == {1.0}
    (text,) = [text for text in said if "at no validation was it better than the untrained model" in text]
    assert "(mean reward 1.000 at best, untrained 1.000); which is the whole reward: there was nothing to gain" in text
    run({"one": -1.0})  # always -1, of 0 at most
    assert any("at no validation was it better" in text and "try another optim.lr, here 0.5" in text for text in said)
    scores = run({"value_only": 1.0})
    assert max(scores[1:]) > scores[0]
    assert not any("at no validation" in text for text in said)


def test_gradient_checkpointing_trains_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    plain = start(tiny_folder, tmp_path, train={"steps": 3})
    saving = start(tiny_folder, tmp_path, train={"steps": 3, "gradient_checkpointing": True})
    torch.testing.assert_close(saving.v, plain.v, rtol=1e-2, atol=1e-4)


def test_settings_that_cannot_work_leave_no_run_behind(tiny_folder: Path, tmp_path: Path) -> None:
    long = ByteTask(prefix="long question " * 20)
    with pytest.raises(UserError, match="context"):
        start(tiny_folder, tmp_path / "runs", task=long)
    alternative = {"num_test": 1, "prompts": ({"name": "cut", "pattern": "qva([0-3])"},)}  # item 4 does not match
    with pytest.raises(UserError, match=r"prompt\.pattern .* does not match the question 'qva4'"):
        start(tiny_folder, tmp_path / "runs", eval=alternative)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("split", "place"), [("train", 79), ("validation", 70), ("test", 79)])
def test_a_prompt_that_does_not_fit_is_found_wherever_it_is(
    tiny_folder: Path, tmp_path: Path, split: Split, place: int
) -> None:
    """Only the first 64 were looked at once, and the run ended when it came to the long one, resumed or not."""

    class OneIsLong(ByteTask):
        def items(self, split_: Split) -> Sequence[Item]:
            found = list(super().items(split_))
            if split_ == split:
                found[place] = replace(found[place], question="x" * 200)
            return found

    sizes = {"num_validation": 80, "num_test": 80, "random_vectors": 0}
    with pytest.raises(UserError, match="leaves no room for an answer .*'xxx"):
        start(tiny_folder, tmp_path / "runs", task=OneIsLong(size=80), train={"steps": 1}, eval=sizes)
    assert not (tmp_path / "runs").exists()
    if split != "train":  # one that is never asked does no harm
        start(tiny_folder, tmp_path / "runs", task=OneIsLong(size=80), train={"steps": 1},
              eval={**sizes, "num_validation": 4, "num_test": 4 if split == "test" else 0})  # fmt: skip


# --- the final evaluation ---


def test_the_final_evaluation_writes_what_the_demo_promises(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = bars_of(final, monkeypatch)
    prompts = ({"name": "please", "template": "please {question}"},)
    found = start(
        tiny_folder,
        tmp_path,
        train={"steps": 2},
        eval={"num_test": 4, "random_vectors": 2, "prompts": prompts},
        generation={"max_new_tokens": 6},
    )
    written = json.loads((found.run / "result.json").read_text())
    assert found.result == written and [bar.count() for bar in bars] == ["8/8 conditions"]
    promised = {"trained_numbers", "seed", "seconds", "decoding", "primary", "value_only", "sampled", "stopped"}
    assert promised | {"random", "best_prompt", "larger_budget", "verdict"} <= set(written)
    assert (written["trained_numbers"], written["seed"]) == (6, 0)
    items = list(read_jsonl(found.run / "result_items.jsonl"))
    for key, condition, score in (
        ("primary", "greedy", "strict"),
        ("value_only", "greedy", "value_only"),
        ("sampled", "sampled", "strict"),
        ("sampled_value_only", "sampled", "value_only"),
    ):
        right = {
            side: [row[score] >= 1 for row in items if row["condition"] == f"{side}_{condition}"]
            for side in ("base", "tuned")
        }
        assert len(right["base"]) == len(right["tuned"]) == 4
        for side, values in right.items():
            assert written[key][side] == {"correct": sum(values), "total": 4}
        won = sum(not b and t for b, t in zip(right["base"], right["tuned"], strict=True))
        lost = sum(b and not t for b, t in zip(right["base"], right["tuned"], strict=True))
        expected = binomtest(won, won + lost).pvalue if won + lost else 1.0
        assert written[key]["p_value"] == pytest.approx(expected)
    assert [(entry["total"], entry["length"]) for entry in written["random"]] == [(4, 1.0), (4, 0.5)]
    assert set(written["best_prompt"]["validation"]) == {"own", "please"}
    assert written["larger_budget"]["max_new_tokens"] == 24
    assert set(written["stopped"]) == {"base", "tuned"}
    text = format_result(written)
    assert written["verdict"] in text
    assert written["decoding"] in text
    one, half = (f"{100 * entry['correct'] / 4:.1f} %" for entry in written["random"])
    assert f"random vectors        {one} of the same norm; {half} of 0.5 x the norm\n" in text


def test_the_final_evaluation_gives_each_condition_its_vector(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, Any, float, int]] = []
    lengths: list[float] = []

    def recording(self: Conditions, v: Any, items: Any = None, **options: Any) -> Any:
        items = self.items if items is None else items
        kind = "base" if v is None else "tuned" if v.flatten().tolist() == trained() else "random"
        if kind == "random":
            lengths.append(float(v.norm()) / float(np.linalg.norm(trained())))
        seen.append((kind, items[0].question[1:3], options.get("temperature", 0.0), options.get("max_new_tokens") or 4))
        return answer(self, v, items, **options)

    def trained() -> list[float]:
        return list(read_jsonl(only_run(tmp_path / "runs") / "metrics.jsonl"))[-1]["v"]

    monkeypatch.setattr(Conditions, "_answer", recording)
    settings = {"num_test": 2, "random_vectors": 5}
    found = start(tiny_folder, tmp_path / "runs", train={"steps": 1}, eval=settings, generation={"temperature": 0.7})
    assert seen == [
        ("base", "te", 0.0, 4),
        ("tuned", "te", 0.0, 4),
        ("base", "te", 0.7, 4),
        ("tuned", "te", 0.7, 4),
        ("base", "te", 0.0, 16),  # those that were cut off, here all
        ("base", "va", 0.0, 4),
        *5 * [("random", "te", 0.0, 4)],
    ]
    assert lengths == pytest.approx([1, 0.5, 0.25, 0.125, 1], rel=1e-5)
    assert [one["length"] for one in (found.result or {})["random"]] == [1, 0.5, 0.25, 0.125, 1]


def test_a_run_killed_before_its_final_evaluation_makes_it_on_resume(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, train_module, "final_evaluation", 1)
        with pytest.raises(Crash):
            start(tiny_folder, tmp_path / "runs", train={"steps": 2}, eval={"num_test": 2, "random_vectors": 0})
    run = only_run(tmp_path / "runs")
    assert not (run / "result.json").exists()
    found = resume(run, task=ByteTask(), say=quiet)
    assert found.result == json.loads((run / "result.json").read_text())
    assert found.result["random"] == []


@pytest.mark.parametrize("call", [2, 5, 7])
def test_a_final_evaluation_that_is_killed_goes_on_where_it_was(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    settings = {"num_test": 4, "random_vectors": 2}
    whole = start(tiny_folder, tmp_path / "whole", train={"steps": 1}, eval=settings)
    assert not list(whole.run.glob("*.part"))
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Crash
        return answer(*args, **options)

    monkeypatch.setattr(Conditions, "_answer", counted)
    with pytest.raises(Crash):
        start(tiny_folder, tmp_path / "runs", train={"steps": 1}, eval=settings)
    run = only_run(tmp_path / "runs")
    part = run / "result_items.jsonl.part"
    with part.open("a") as lines:  # and within a line, of a part that is not whole
        lines.write(part.read_text().splitlines()[0].replace('"condition": "', '"condition": "x') + '\n{"condi')
    found = resume(run, task=ByteTask(), say=quiet)
    assert calls == 1 + 8  # nothing that was finished is asked again
    assert read_jsonl(run / "result_items.jsonl") == read_jsonl(whole.run / "result_items.jsonl")
    assert found.result is not None and whole.result is not None
    assert found.result["verdict"] == whole.result["verdict"] and not part.exists()


def test_a_larger_budget_than_the_cache_holds_is_cut(tiny_folder: Path, tmp_path: Path) -> None:
    """Else a run would train to its end and could never be evaluated."""
    budget = {"max_new_tokens": 60, "kv_budget_gib": 1e-4}
    settings = tiny_config(
        tiny_folder, train={"steps": 1}, generation=budget, eval={"num_test": 2, "random_vectors": 0}
    )
    found = train(settings, ByteTask(), out=tmp_path, say=quiet)
    assert found.result is not None
    tokens = found.result["larger_budget"]["max_new_tokens"]
    assert 60 < tokens < 240
    assert f"{tokens} tokens instead of 60 (all that generation.kv_budget_gib holds)" in format_result(found.result)


@pytest.mark.parametrize("names", [("own",), ("a", "a")])
def test_prompts_of_one_name_are_refused(tiny_folder: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    prompts = tuple({"name": name} for name in names)
    with pytest.raises(UserError, match=f"has the name {names[-1]!r}, which"):
        start(tiny_folder, tmp_path / "runs", eval={"prompts": prompts})


def paired(base: int, tuned: int, p_value: float) -> dict[str, Any]:
    difference = (tuned - base) / 100
    return {
        "base": {"correct": base, "total": 100},
        "tuned": {"correct": tuned, "total": 100},
        "difference": difference,
        "interval": [difference - 0.05, difference + 0.05],
        "p_value": p_value,
    }


def report(**changes: Any) -> dict[str, Any]:
    """A gain of 20 points that every control agrees with."""
    clear = {"against_tuned": paired(42, 60, 1e-4)}
    plain: dict[str, Any] = {"trained_numbers": 13, "primary": paired(40, 60, 1e-4), "value_only": paired(50, 65, 1e-3)}
    return plain | {"random": [{"correct": 41, "total": 100}], "best_prompt": clear, "larger_budget": clear} | changes


def test_the_verdict_says_no_more_than_the_numbers() -> None:
    gain = verdict(report())
    assert gain.startswith("Training 13 numbers raised the primary measure by +20.0 points (95 % interval +15.0")
    assert "more than format or stopping" in gain
    assert "random" not in gain
    assert "Against" not in gain
    assert verdict(report(primary=paired(40, 43, 0.4))).startswith("No gain shown:")
    assert verdict(report(primary=paired(43, 40, 0.4))).startswith("No gain shown:")
    assert "made the model worse" in verdict(report(primary=paired(60, 40, 1e-4)))
    form = verdict(report(value_only=paired(60, 62, 0.5)))
    assert "raised the primary measure" in form
    assert "the gain is in format or stopping" in form
    down = verdict(report(value_only=paired(65, 50, 1e-3)))
    assert "the gain is in format or stopping" in down
    assert "do not credit the training" in verdict(report(random=[{"correct": 3}, {"correct": 60}]))
    assert "do not credit" not in verdict(report(random=[]))
    prompt = verdict(report(best_prompt={"against_tuned": paired(58, 60, 0.7)}))
    assert prompt.endswith("Against the untrained model with the best prompt found, no gain is shown.")
    budget = verdict(report(larger_budget={"against_tuned": paired(70, 60, 0.01)}))
    assert budget.endswith("Against the untrained model with a larger token budget, no gain is shown.")


def test_random_vectors_have_the_norm_of_v_and_differ() -> None:
    v = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
    drawn = list(random_vectors(v, 3, seed=5))
    for vector in drawn:
        assert float(vector.norm()) == pytest.approx(13, rel=1e-6)
        assert vector.shape == v.shape
    assert not torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(a, b) for a, b in zip(drawn, random_vectors(v, 3, seed=5), strict=True))
    assert not torch.equal(drawn[0], next(random_vectors(v, 1, seed=6)))
    lengths = [float(shorter.norm() / v.norm()) for shorter in random_vectors(v, 3, seed=5, lengths=(1.0, 0.25))]
    assert lengths == pytest.approx([1, 0.25, 1], rel=1e-6)


def test_random_vectors_in_words() -> None:
    of = lambda correct, **more: {"correct": correct, "total": 200, **more}  # noqa: E731
    found = randoms_in_words([of(1, length=1.0), of(30, length=0.25), of(4, length=1.0)])
    assert found == "0.5 %, 2.0 % of the same norm; 15.0 % of 0.25 x the norm"
    assert randoms_in_words([of(1), of(2)]) == "0.5 %, 1.0 % of the same norm"  # of a run of an earlier version
    assert (randoms_in_words([]), random_label(2, 0.5)) == ("", "random vector 3 of 0.5 x the norm")


@pytest.mark.parametrize(
    "table", [{"template": "{question}"}, {"name": "x", "few_shot": "maybe"}, {"name": "x", "a": ""}]
)
def test_a_prompt_table_with_a_mistake_is_refused(table: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"eval\.prompts\[0\] has .* allowed: name"):
        prompt_candidates(tiny_config("x", eval={"prompts": (table,)}))


@pytest.mark.parametrize("left", [None, b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, "folder"])
def test_a_run_without_its_environment_goes_on(tiny_folder: Path, tmp_path: Path, left: object) -> None:
    run = start(tiny_folder, tmp_path / "runs", train={"steps": 1}).run
    (run / "environment.json").unlink()
    if isinstance(left, bytes):
        (run / "environment.json").write_bytes(left)
    elif left == "folder":
        (run / "environment.json").mkdir()
    said: list[str] = []
    assert resume(run, ["train.steps=2"], task=ByteTask(), say=said.append).steps == 2
    assert sum("environment.json is missing or damaged" in line for line in said) == 1
