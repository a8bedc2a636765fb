"""All controls on a tiny model: what they are, every number from the items again, and a stop that loses nothing."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pseudo_terminal import bars_of
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from tiny_run import ByteTask, quiet, start, tiny_config
from typer.testing import CliRunner

from tinylora.adapter.explicit import ExplicitFactors
from tinylora.cli import app
from tinylora.config.method import MethodConfig
from tinylora.errors import UserError
from tinylora.evaluation import evidence as evidence_module
from tinylora.evaluation.account import Account, Prices, gain_curve, priced, training_account
from tinylora.evaluation.evidence import EvidenceOptions, assemble, check_control, gather_evidence
from tinylora.evaluation.resumable import Condition
from tinylora.evaluation.sampled import compare_samples
from tinylora.evaluation.side_effects import read_text, text_effect
from tinylora.evaluation.verdict import evidence_verdict, format_evidence
from tinylora.rollouts.groups import reward, shuffled
from tinylora.rollouts.replies import Reply
from tinylora.rollouts.runtime import Runtime, open_runtime
from tinylora.store.adapter import Adapter, open_adapter
from tinylora.system.jsonl import read_jsonl
from tinylora.training.train import resume, train

pytestmark = pytest.mark.usefixtures("fresh_cache")

answer = Runtime.answer
PROMPTS = ({"name": "shout", "template": "{question}!"}, {"name": "plain"})


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path) -> Path:
    return start(tiny_folder, tmp_path / "runs", train={"steps": 2}).run


@pytest.fixture
def runtime(run: Path) -> Runtime:
    config = open_adapter(run).settings()
    return open_runtime(config, task=ByteTask(size=12), say=quiet)


def gather(runtime: Runtime, run: Path, **options: Any) -> dict[str, Any]:
    return gather_evidence(runtime, open_adapter(run), run, EvidenceOptions(**options), quiet, run=run)


def test_every_number_can_be_computed_again_from_the_items(
    runtime: Runtime, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = bars_of(evidence_module, monkeypatch)
    runtime.config = replace(runtime.config, eval=replace(runtime.config.eval, prompts=PROMPTS))
    evidence = gather(runtime, run)
    assert json.loads((run / "evidence.json").read_text()) == json.loads(json.dumps(evidence))
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in read_jsonl(run / "evidence_items.jsonl"):
        rows.setdefault(row["condition"], []).append(row)
    named = {one["name"]: one for one in evidence["conditions"]}
    assert list(rows) == list(named) and [bar.count() for bar in bars] == ["13/13 conditions"]
    assert Counter(one["kind"] for one in named.values()) == {
        "untrained": 1, "tuned": 1, "zero": 1, "random": 5, "best_random": 1, "best_shorter": 1,
        "best_prompt": 1, "larger_budget": 1, "constant": 1,
    }  # fmt: skip
    tuned = np.array([row["strict"] >= 1 for row in rows["tuned"]])
    p_values = []
    for name, one in named.items():
        assert [row["item_id"] for row in rows[name]] == [row["item_id"] for row in rows["tuned"]]
        for measure in ("strict", "value_only", "stopped", "answered"):
            right = sum(row[measure] >= 1 for row in rows[name])
            assert (one[measure]["correct"], one[measure]["total"]) == (right, 12)
            assert one[measure]["interval"] == pytest.approx(proportion_confint(right, 12, method="wilson"), abs=1e-9)
        assert one["length"] == pytest.approx(np.mean([row["num_tokens"] for row in rows[name]]))
        if name != "tuned":
            base = np.array([row["strict"] >= 1 for row in rows[name]])
            table = [[(base & tuned).sum(), (base & ~tuned).sum()], [(~base & tuned).sum(), (~base & ~tuned).sum()]]
            against = one["against_tuned"]
            assert (against["won"], against["lost"]) == (table[1][0], table[0][1])
            assert against["p_value"] == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-12)
            assert against["difference"] == pytest.approx(tuned.mean() - base.mean())
            p_values.append((against["p_value"], against["p_adjusted"]))
    raw, adjusted = zip(*p_values, strict=True)
    assert adjusted == pytest.approx(list(multipletests(raw, method="fdr_bh")[1]), abs=1e-12)
    assert evidence["gain"]["total"] == pytest.approx(named["untrained"]["against_tuned"]["difference"])
    assert [row["text"] for row in rows["zero"]] == [row["text"] for row in rows["untrained"]]
    assert [row["text"] for row in rows["random_0"]] != [row["text"] for row in rows["untrained"]]
    assert named["zero"]["details"] == {"texts_that_differ": 0}
    assert evidence["verdict"] in format_evidence(evidence)


@pytest.mark.parametrize("kind", ["best_random", "best_shorter"])
def test_the_best_random_vector_gets_as_many_completions_as_training(runtime: Runtime, run: Path, kind: str) -> None:
    evidence = gather(runtime, run)
    best = next(one for one in evidence["conditions"] if one["kind"] == kind)
    prompts = sum(row.get("prompts_sampled", 0) for row in read_jsonl(run / "metrics.jsonl"))
    config = runtime.config
    assert best["details"]["completions_allowed"] == prompts * config.grpo.group_size
    tried = prompts * config.grpo.group_size // config.eval.num_validation
    assert best["details"]["vectors_tried"] == len(best["details"]["validation"]) == tried > 1
    scores = best["details"]["validation"]
    assert best["details"]["chosen"] == scores.index(max(scores))


def test_random_vectors_have_the_norms_that_they_are_said_to_have(
    runtime: Runtime, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[torch.Tensor] = []

    def noted(self: Runtime, items: Any, v: Any, **options: Any) -> list[Reply]:
        tried.append(v)
        return answer(self, items, v, **options)

    monkeypatch.setattr(Runtime, "answer", noted)
    evidence = gather(runtime, run)
    norm = evidence["v_norm"]
    lengths = [round(float(v.norm()) / norm, 4) for v in tried if v is not None and v.any()]
    details = next(one["details"] for one in evidence["conditions"] if one["kind"] == "best_shorter")
    assert details["lengths"][:4] == [0.5, 0.25, 0.125, 0.5]
    # the adapter, the random ones, those that were tried and the best of them, at each kind of length
    count = details["vectors_tried"]
    assert lengths == [1.0] * (1 + 5 + count + 1) + details["lengths"] + [details["lengths"][details["chosen"]]]
    flat = [v.flatten() / v.norm() for v in tried if v is not None and v.any()]
    directions = torch.stack([v for v, length in zip(flat, lengths, strict=True) if length < 1][:count])
    assert float((directions @ flat[6]).abs().max()) < 0.9999  # directions of their own


def test_a_stopped_evaluation_goes_on(runtime: Runtime, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gather(runtime, run)
    (run / "evidence_plan.json").unlink()
    calls = 0

    def counted(*args: Any, **options: Any) -> list[Reply]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return answer(*args, **options)

    monkeypatch.setattr(Runtime, "answer", counted)
    with pytest.raises(KeyboardInterrupt):
        gather(runtime, run)
    with (run / "evidence_items.jsonl").open("a") as lines:
        lines.write('{"condition": "random_1", "item')  # killed within a line
    again = gather(runtime, run)
    clock = ("account",)
    strip = lambda e: [{k: v for k, v in one.items() if k not in clock} for one in e["conditions"]]  # noqa: E731
    assert strip(again) == strip(whole)
    before = calls
    gather(runtime, run)
    assert calls == before  # all is there
    path = run / "evidence_items.jsonl"
    rows = [line for line in path.read_text().splitlines(keepends=True) if '"best_random"' not in line]
    path.write_text("".join(rows[:-1]))  # some answers are lost
    assert strip(gather(runtime, run)) == strip(whole)
    path.unlink()
    assert strip(gather(runtime, run)) == strip(whole)
    before = calls
    gather(runtime, run, num_items=3)  # another plan
    assert calls > before
    assert {row["condition"] for row in read_jsonl(run / "evidence_items.jsonl")} >= {"untrained", "constant"}
    old = [json.loads(line) for line in (run / "evidence_items.jsonl.old").read_text().splitlines()]
    assert len({row["item_id"] for row in old}) == 12 and (run / "evidence.json.old").exists()


def result(i: int, strict: float, text: str = "t", **changes: Any) -> Reply:
    fields = {"value_only": strict, "stopped": True, "num_tokens": 3, "scores": {"strict": strict}, "answered": True}
    return Reply(f"{i:064x}", f"q{i}", "a", text, strict, **(fields | changes))


def condition(name: str, kind: str, right: list[int], num: int = 100) -> Condition:
    results = tuple(result(i, float(i in right)) for i in range(num))
    return Condition(
        name=name, kind=kind, label=name, replies=results, details={},
        account=Account(tokens_sampled=1, prompt_tokens=1, seconds=1.0, flops=1.0),
    )  # fmt: skip


def assembled(**sides: list[int]) -> dict[str, Any]:
    kinds = {"untrained": "untrained", "tuned": "tuned"}
    side = {
        "kl_per_token": 0.0, "perplexity": {"base": 1.0, "tuned": 1.0}, "num_tokens": 1, "tasks": [],
        "length": {"base": 1.0, "tuned": 1.0}, "repetition": {"base": 0.0, "tuned": 0.0},
    }  # fmt: skip
    meta = {"trained_numbers": 13, "num_items": 100, "model": "m", "task": "t", "decoding": {"max_new_tokens": 4}}
    conditions = [condition(name, kinds.get(name, "random"), right) for name, right in sides.items()]
    return assemble(conditions, meta=meta, side_effects=side, account={"training": None}, prices=Prices())


def test_verdicts() -> None:
    clear = assembled(untrained=list(range(20)), tuned=list(range(50)), random_0=list(range(22)))
    assert clear["verdict"].startswith(
        "Better: with 13 trained numbers strict accuracy on 100 held-out items rose by +30.0"
    )
    assert "more than format" in clear["verdict"] and clear["verdict"].endswith(
        "beats every control that was run beyond chance."
    )
    luck = assembled(untrained=list(range(20)), tuned=list(range(50)), random_0=list(range(48)))
    assert luck["verdict"].endswith("It is not shown to be better than: random_0.")
    none = assembled(untrained=list(range(20)), tuned=list(range(12, 34)))
    assert none["verdict"].startswith("No gain shown") and "show a difference" in none["verdict"]
    worse = assembled(untrained=list(range(50)), tuned=list(range(20)))
    assert worse["verdict"].startswith("Worse")
    format_only = dict(clear, value_only={"p_value": 0.4, "difference": 0.01})
    assert "do not call it skill" in evidence_verdict(format_only)
    with pytest.raises(UserError, match="other items"):
        assemble(
            [condition("untrained", "untrained", [], 9), condition("tuned", "tuned", [], 10)],
            meta={}, side_effects={}, account={}, prices=Prices(),
        )  # fmt: skip
    with pytest.raises(UserError, match="untrained model"):
        assemble([condition("tuned", "tuned", [])], meta={}, side_effects={}, account={}, prices=Prices())


def test_text_effect_is_that_of_a_full_forward(runtime: Runtime) -> None:
    v = torch.full((runtime.adapter.num_groups, runtime.adapter.config.u), 0.3)
    text = "one two three\n\nfour five"
    effect = text_effect(runtime, v, text)
    kl = base_sum = tuned_sum = 0.0
    count = 0
    for paragraph in text.split("\n\n"):
        ids = torch.tensor([runtime.base.tokenizer(paragraph)["input_ids"]])
        logits = []
        for vector in (None, v):
            with runtime.adapter.using(vector), torch.no_grad():
                logits.append(runtime.base.model(ids).logits[0, :-1].double().numpy())
        p, q = (one - np.log(np.exp(one).sum(-1, keepdims=True)) for one in logits)
        kl += float((np.exp(p) * (p - q)).sum())
        base_sum += float(p[np.arange(len(p)), ids[0, 1:].numpy()].sum())
        tuned_sum += float(q[np.arange(len(q)), ids[0, 1:].numpy()].sum())
        count += len(p)
    assert effect.num_tokens == count
    assert effect.kl_per_token == pytest.approx(kl / count, rel=1e-4)
    assert effect.base_perplexity == pytest.approx(np.exp(-base_sum / count), rel=1e-4)
    assert effect.tuned_perplexity == pytest.approx(np.exp(-tuned_sum / count), rel=1e-4)
    assert text_effect(runtime, torch.zeros_like(v), text).kl_per_token == 0
    with pytest.raises(UserError, match="at least two tokens"):
        text_effect(runtime, v, "a")


def test_a_text_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("empty", "binary", "missing"):
        with pytest.raises(UserError, match=name):
            read_text(str(tmp_path / name))


def test_the_account_of_training(run: Path) -> None:
    metrics = read_jsonl(run / "metrics.jsonl")
    account = training_account(metrics, num_train=5, group_size=2, parameters=1000, device="cpu", threads=1)
    steps = [row for row in metrics if row["step"]]
    assert account.tokens_sampled == sum(row["tokens_sampled"] for row in steps)
    whole = training_account(
        metrics, num_train=5, group_size=2, parameters=1000, device="cpu", threads=1, all_weights=True
    )
    learned = sum(row["tokens_computed"] + row["prompt_tokens"] for row in steps)
    assert whole.flops - account.flops == pytest.approx(2000 * learned)
    assert account.distinct_problems == min(5, sum(row["prompts_sampled"] for row in steps))
    assert account.peak_memory_bytes == max(row["peak_memory_bytes"] for row in steps) > 2**24
    assert account.cpu_hours == pytest.approx(sum(row["cpu_seconds"] for row in steps) / 3600)
    bill = priced(replace(account, cpu_hours=2.0), Prices(watts=50, price_per_hour=0.1))
    assert (bill.energy_kwh, bill.money) == pytest.approx((0.1, 0.2))
    assert priced(account, Prices()).money is None
    curve = gain_curve(metrics, num_train=5)
    assert [point["step"] for point in curve] == [row["step"] for row in metrics if "validation_strict" in row]
    assert curve[0]["distinct_problems"] == 0
    for wrong in ({"watts": 0.0}, {"price_per_hour": -1.0}, {"watts": float("nan")}):
        with pytest.raises(UserError):
            Prices(**wrong)


def test_control_rewards(tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_folder, train={"control": "format"})
    assert reward(result(0, 0.0), config) == 1.0
    assert reward(result(0, 1.0, answered=False), config) == 0.0
    assert reward(result(0, 1.0, stopped=False), config) == 0.0
    rewards = [0.0, 0.25, 0.5, 0.75, 1.0]
    dealt = [shuffled(rewards, 0, position) for position in range(40)]
    assert all(sorted(one) == rewards for one in dealt)
    assert dealt[3] == shuffled(rewards, 0, 3) and len({tuple(one) for one in dealt}) > 20
    assert np.allclose(np.mean(dealt, axis=0), 0.5, atol=0.2)  # no place gets more than another
    runs = {
        control: start(tiny_folder, tmp_path, train={"steps": 2, "control": control})
        for control in ("none", "format", "shuffled")
    }
    assert not torch.equal(runs["shuffled"].v, runs["none"].v)
    with pytest.raises(UserError, match=r"train\.control"):
        resume(runs["none"].run, ["train.control=shuffled"], task=ByteTask(), say=quiet)


def test_a_control_says_that_it_is_one(tiny_folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    train(
        tiny_config(tiny_folder, train={"steps": 1, "control": "shuffled"}), ByteTask(), out=tmp_path, say=said.append
    )
    assert any("this is a control: its reward is shuffled" in line for line in said)


def test_a_control_of_another_adapter_is_refused(runtime: Runtime, run: Path) -> None:
    other = Adapter(label="other", v=torch.zeros(1, 1), config=None)
    with pytest.raises(UserError, match="other has another adapter than"):
        gather(runtime, run, trained=(other,))
    control = replace(open_adapter(run), label="twin")
    evidence = gather(runtime, run, trained=(control,))
    twin = next(one for one in evidence["conditions"] if one["kind"] == "trained_control")
    assert twin["against_tuned"]["won"] == twin["against_tuned"]["lost"] == 0
    assert control.fingerprint is not None and control.check
    others = {
        "another base": replace(control, fingerprint=replace(control.fingerprint, weights=b"other567")),
        "another basis": replace(control, check=b"else"),
        "another adapter": replace(control, run=replace(runtime.config, method=MethodConfig(name="lora"))),
    }
    for what, other in others.items():
        with pytest.raises(UserError, match=what):
            gather(runtime, run, trained=(other,))


def test_a_control_on_a_basis_of_its_own_is_refused(run: Path) -> None:
    here = open_adapter(run)
    explicit = ExplicitFactors(v=here.v, modules={}, origin="gradient")
    mine, other = (replace(here, config=None, explicit=explicit, folder=Path(name)) for name in ("a", "b"))
    with pytest.raises(UserError, match="is on a basis of its own run"):
        check_control(mine, other)
    check_control(mine, mine)


def test_a_control_more_leaves_the_others_as_they_are(
    runtime: Runtime, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gather(runtime, run)
    asked: list[Any] = []

    def counted(self: Runtime, items: Any, v: Any, **options: Any) -> list[Reply]:
        asked.append(v)
        return answer(self, items, v, **options)

    monkeypatch.setattr(Runtime, "answer", counted)
    first = replace(open_adapter(run), label="first")
    second = replace(first, v=first.v + 0.5)
    for control in (first, second, second):
        evidence = gather(runtime, run, trained=(control,))
    assert [v.tolist() for v in asked] == [first.v.tolist(), second.v.tolist()]
    rows = [row for row in read_jsonl(run / "evidence_items.jsonl") if row["condition"] == "trained:none"]
    share = next(one["strict"] for one in evidence["conditions"] if one["kind"] == "trained_control")
    assert (sum(row["strict"] >= 1 for row in rows), len(rows)) == (share["correct"], 12)


def test_another_task_that_cannot_be_asked_is_told_first(
    runtime: Runtime, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> list[Reply]:
        pytest.fail("hours were spent")

    monkeypatch.setattr(Runtime, "answer", never)
    with pytest.raises(UserError, match="no recipe is named 'nothing'"):
        gather(runtime, run, also=("nothing",))
    recipe = tmp_path / "other.toml"
    recipe.write_text('[task]\nname = "reasoning_gym:chain_sum"\nnum_items = 60\n[prompt]\npattern = "xyz(.*)"\n')
    with pytest.raises(UserError, match=r"prompt\.pattern .* does not match"):
        gather(runtime, run, also=(str(recipe),))


def test_samples(runtime: Runtime, run: Path) -> None:
    v = open_adapter(run).v
    compared = compare_samples(runtime, v, label="x", num_samples=4, temperature=1.0, num_items=6, say=quiet)
    by_name = {score.name: score for score in compared.scores}
    right = np.array([r.strict >= 1 for r in compared.adapter]).reshape(6, 4)
    assert by_name["average@4"].adapter == pytest.approx(right.mean())
    assert by_name["pass@4"].adapter == pytest.approx(right.any(1).mean())
    pairs = [[right[i, a] or right[i, b] for a in range(4) for b in range(a)] for i in range(6)]
    assert by_name["pass@2"].adapter == pytest.approx(np.mean(pairs))
    average = by_name["average@4"]
    assert average.difference == pytest.approx(average.adapter - average.untrained)
    assert "pass@2" in compared.text() and compared.to_json()["num_items"] == 6
    for samples, temperature in ((1, 1.0), (4, 0.0)):
        with pytest.raises(UserError, match="at least 2"):
            compare_samples(runtime, v, label="x", num_samples=samples, temperature=temperature, say=quiet)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--also", "gsm8k"], "go with --controls"),
        (["--controls", "--samples", "4"], "greedy answers"),
        (["--controls", "--random", "2"], "at least 5"),
        (["--controls", "--watts", "0"], "--watts must be"),
        (["--controls", "--text", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--samples", "4", "--rounded"], "leave --rounded out"),
    ],
)
def test_misuse_on_the_command_line(run: Path, args: list[str], sentence: str) -> None:
    file = run.parent / "sums.jsonl"
    file.write_text("".join(f'{{"question": "{a} + {b}", "answer": "{a + b}"}}\n' for a in range(8) for b in range(8)))
    task = ["--task", "jsonl", "--set", f"task.path={file}"]
    done = CliRunner().invoke(app, ["eval", str(run), *task, *args])
    assert done.exit_code == 2
    assert sentence in done.output


def test_controls_on_the_command_line(run: Path) -> None:
    file = run.parent / "sums.jsonl"
    file.write_text("".join(f'{{"question": "{a} + {b}", "answer": "{a + b}"}}\n' for a in range(8) for b in range(8)))
    task = ["--task", "jsonl", "--set", f"task.path={file}", "--num-items", "6"]
    out = run.parent / "elsewhere"
    done = CliRunner().invoke(app, ["eval", str(run), *task, "--controls", "--price", "0.05", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "best constant reply" in done.output and "core hours" in done.output
    evidence = json.loads((out / "evidence.json").read_text())
    assert evidence["num_items"] == 6 and evidence["account"]["controls"]["money"] is not None
    # What training drew is the run's, wherever this is written.
    assert {"best_random", "best_shorter"} <= {one["kind"] for one in evidence["conditions"]}
    assert evidence["account"]["training"] is not None and evidence["run"] == str(run)
    into = CliRunner().invoke(app, ["eval", str(run), *task, "--controls"])
    assert into.exit_code == 2 and "and task.name, task.path, generation.max_new_tokens are not as in" in into.output
