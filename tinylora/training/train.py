"""The training loop: sample, step, log, validate, checkpoint. A kill at any instant loses at most the current step."""

import heapq
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylora.adapter.code import fits_a_code
from tinylora.config.resume import resume_config
from tinylora.config.run import RunConfig
from tinylora.config.schema import to_table
from tinylora.errors import UserError
from tinylora.evaluation.final import final_evaluation
from tinylora.learner.learner import Learner, Row
from tinylora.methods.build import THROUGH_PEFT
from tinylora.methods.one_vector import MethodAdapter
from tinylora.methods.peft_files import write_peft_adapter
from tinylora.models.bases import explain_difference, remember
from tinylora.models.fingerprint import Fingerprint, Identity
from tinylora.models.load import encode_prompt
from tinylora.planning.memory_check import check_memory
from tinylora.rollouts.answers import evaluate
from tinylora.rollouts.groups import Rollouts, reward, sample_step
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.prompts import prompt_candidates
from tinylora.rollouts.replies import mean
from tinylora.rollouts.runtime import Workbench, open_workbench
from tinylora.store.adapter import open_adapter
from tinylora.store.adapter_file import BEST, LAST, PORTABLE, save_vector
from tinylora.store.run_folder import RunFolder
from tinylora.system.environment import collect_environment, numeric_differences
from tinylora.system.files import write_atomically
from tinylora.system.jsonl import JsonlWriter, read_jsonl
from tinylora.system.memory import peak_memory
from tinylora.talk import Say, say_to_stderr
from tinylora.tasks.base import Split, Task
from tinylora.training.gradient_basis import with_gradient_basis
from tinylora.training.grpo import grpo_step, make_optimizer
from tinylora.training.liveness import check_liveness
from tinylora.training.metrics import Means, MetricsWriter
from tinylora.training.progress import Progress, StepReport
from tinylora.training.sft import check_references, reference_rows, right_rows, supervised_step
from tinylora.training.trackers import make_trackers
from tinylora.training.watch import Watch

CHECKED_PROMPTS = 64
"""Of each split, the first ones and the longest ones that are encoded before a run."""
HIGHEST_USUAL_RATE = 2e-3
"""Of Adam on LoRA and its kin; at twice that, LoRA of rank 8 unlearned the demo within two steps."""
MOST_LOGGED = 4096
"""Numbers of v that a step writes into metrics.jsonl; of more, only the norm."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where the run is, its adapter (best or last v, as the recipe says), and what it took."""

    run: Path
    v: Tensor
    steps: int
    seconds: float
    result: dict[str, Any] | None
    """The final evaluation (what result.json holds), or None where eval.num_test is 0."""


@dataclass
class _State:
    """All that a step changes. What a checkpoint holds, and nothing else, decides how the run goes on."""

    v: Tensor
    optimizer: torch.optim.Adam
    order: DataOrder
    step: int = 0
    seconds: float = 0.0
    best_score: float = -1.0
    best_step: int = 0
    best_v: Tensor | None = None

    def to_checkpoint(self, fingerprint: str, base: str, arithmetic: str) -> dict[str, Any]:
        """fingerprint: of the task's questions; base: of the base model; arithmetic: of the engine."""
        moments = self.optimizer.state.get(self.v, {})
        zeros = torch.zeros_like(self.v)
        return {
            "v": self.v.detach().cpu(),
            "adam_m": moments.get("exp_avg", zeros).cpu(),
            "adam_v": moments.get("exp_avg_sq", zeros).cpu(),
            "adam_step": float(moments.get("step", 0.0)),
            "best_v": (zeros if self.best_v is None else self.best_v).detach().cpu(),
            "has_best": self.best_v is not None,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "step": self.step,
            "data_position": self.order.position,
            "seconds": self.seconds,
            "task_fingerprint": fingerprint,
            "base_fingerprint": base,
            "engine_arithmetic": arithmetic,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        device = self.v.device
        with torch.no_grad():
            self.v.copy_(saved["v"])
        if saved["adam_step"]:
            self.optimizer.state[self.v] = {
                "step": torch.tensor(saved["adam_step"]),
                "exp_avg": saved["adam_m"].to(device),
                "exp_avg_sq": saved["adam_v"].to(device),
            }
        self.best_v = saved["best_v"].to(device) if saved["has_best"] else None
        self.best_score, self.best_step = saved["best_score"], saved["best_step"]
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.order.position = saved["data_position"]


def train(
    config: RunConfig,
    task: Task | None = None,
    *,
    out: Path = Path("runs"),
    name: str = "run",
    say: Say = say_to_stderr,
) -> TrainResult:
    """Train v as the config says, in a new numbered folder below `out`.

    `task` replaces the config's task: any object of the Task protocol. A run that stops early, for whatever reason,
    goes on with `resume(run)`.

    Raises: UserError for settings that cannot work, before anything is written; during the run, see `grpo_step`.
    """
    check_memory(config, say)
    bench = open_workbench(config, task=task or True, say=say)
    _check(bench, say)
    folder = RunFolder.create(out, name, bench.config, collect_environment())
    with folder.lock():
        return _run(bench, folder, say)


def resume(
    run: Path, overrides: Sequence[str] = (), *, task: Task | None = None, say: Say = say_to_stderr
) -> TrainResult:
    """Go on with a run from its last checkpoint, bit for bit on the same machine; only steps, logging and the cache's
    budget may change, and where the last might cost a bit, it says so.

    Raises: UserError for a folder that is no run or is in use, other changes, fewer steps than are done, or a task or
    base model that is another one by now.
    """
    folder = RunFolder.open(run)
    stored = folder.read_config()
    config = resume_config(stored, overrides)
    if config.generation.kv_budget_gib != stored.generation.kv_budget_gib:
        say(
            "another generation.kv_budget_gib may compute other sequences together, which can move last digits, so the "
            "run goes on, but perhaps not bit for bit"
        )
    differences = numeric_differences(folder.read_environment(), collect_environment())
    if differences:
        say("this is not the machine of the run's start, so it goes on, but not bit for bit: " + "; ".join(differences))
    with folder.lock():
        check_memory(config, say, refuse=False)
        bench = open_workbench(config, task=task or True, say=say)
        return _run(bench, folder, say)


def _check(bench: Workbench, say: Say) -> None:
    task, config = bench.task, bench.config
    assert task is not None
    candidates = list(prompt_candidates(config).values())[1:]
    # A pattern that does not match or a prompt that does not fit is found now, not in the middle of the night.
    used: dict[Split, int | None] = {"train": None, "validation": config.eval.num_validation}
    if config.eval.num_test:
        used["test"] = config.eval.num_test
    for split, count in used.items():
        items = task.items(split)
        for prompt in [task.prompt, *(candidates if split != "train" else [])]:
            lengths = [sum(len(message["content"]) for message in prompt(item)) for item in items]
            longest = heapq.nlargest(CHECKED_PROMPTS, range(len(lengths[:count])), key=lengths.__getitem__)
            for index in sorted({*range(min(CHECKED_PROMPTS, len(items))), *longest}):
                encode_prompt(bench.base, prompt(items[index]), config.prompt.chat)
    if config.train.algorithm == "sft":
        check_references(bench, say)


def _fingerprint(task: Task) -> str:
    return str(task.fingerprint()) if hasattr(task, "fingerprint") else ""


def _check_base(began: str | None, found: Identity, bench: Workbench, folder: RunFolder) -> None:
    """Raises: UserError if the run began on other weights; `began` is None in checkpoints of older versions."""
    if began is not None and began != found.fingerprint.hex():
        difference = explain_difference(Fingerprint.of(bytes.fromhex(began)), found)
        raise UserError(
            f"{bench.base.name} is not the base model that the run {folder.path} began with: {difference}; "
            "bring back that one, or start a new run"
        )


def _run(bench: Workbench, folder: RunFolder, say: Say) -> TrainResult:
    if bench.config.adapter.basis == "gradient":
        bench = with_gradient_basis(bench, folder, say)
    config, task, adapter = bench.config, bench.task, bench.adapter
    assert task is not None
    v = adapter.zeros().requires_grad_(True)
    state = _State(v, make_optimizer(v, config), DataOrder(task.items("train"), config.train.seed))
    with adapter.using(None):  # of the base alone, without a method's layers
        identity = remember(bench.base)
    base_fingerprint = identity.fingerprint.hex()
    saved = folder.resume()
    if saved is not None:
        if saved.state["task_fingerprint"] != _fingerprint(task):
            raise UserError(f"the questions of task {task.name} are not those the run {folder.path} began with")
        _check_base(saved.state.get("base_fingerprint"), identity, bench, folder)
        state.restore(saved.state)
        if state.step > config.train.steps:  # its files would say that they are of a shorter run
            raise UserError(
                f"train.steps is {config.train.steps}, but the run {folder.path} has done {state.step} steps already; "
                f"set train.steps to at least {state.step}, or start a new run"
            )
        say(f"resuming {folder.path} after step {state.step}")
        now, then = bench.engine.arithmetic, saved.state.get("engine_arithmetic", bench.engine.arithmetic)
        if now != then:
            say(f"the rollout engine has {now}, and had {then}, so the run goes on, but not bit for bit: that hangs on "
                "the memory that is free and on a C compiler")  # fmt: skip
    folder.write_config(config)  # what a resumed run changes holds from here on, where nothing refuses it any more
    learner = Learner(
        bench.base.model,
        adapter,
        temperature=config.generation.temperature if config.train.algorithm == "grpo" else 1.0,
        pad_token_id=bench.base.pad_token_id,
        checkpointing=config.train.gradient_checkpointing,
    )
    _announce(bench, folder, say)
    progress = Progress(config.train.steps, state.step)
    watch = Watch(config.grpo.max_logprob_gap)
    trackers = make_trackers(config.log.trackers, folder.path, to_table(config), state.step)
    with MetricsWriter(folder.metrics_path, trackers) as metrics, JsonlWriter(folder.samples_path) as samples:
        probe_rows: list[Row] = []
        if state.step == 0:
            metrics.log(0, _validate(bench, state, say))
        while state.step < config.train.steps:
            started, cpu_started = time.perf_counter(), time.process_time()
            record: dict[str, Any] = {}
            if not probe_rows:
                probe_rows = _probe_rows(bench)
            if state.step % config.train.liveness_every == 0 or saved is not None:
                probe = check_liveness(bench.engine, learner, probe_rows)
                if state.step % config.train.liveness_every == 0:
                    record |= {f"liveness_{key}": value for key, value in asdict(probe).items()}
                saved = None
            rollouts = _learn(bench, learner, state, record)
            state.step += 1
            record["v_norm"] = float(v.detach().norm())
            if v.numel() <= MOST_LOGGED:
                record["v"] = v.detach().flatten().tolist()
            step_seconds = time.perf_counter() - started
            if _is_validation_step(state.step, config):
                record |= _validate(bench, state, say)
            state.seconds += time.perf_counter() - started
            record |= {
                "seconds": time.perf_counter() - started,
                "cpu_seconds": time.process_time() - cpu_started,
                "peak_memory_bytes": peak_memory(bench.base.device),
            }
            if rollouts is not None:
                _log_samples(samples, rollouts, state.step, config)
            metrics.log(state.step, record)
            for word in watch.step(record):
                say(f"step {state.step}: {word}")
            if state.step % config.log.checkpoint_every == 0 or state.step == config.train.steps:
                about = (_fingerprint(task), base_fingerprint, bench.engine.arithmetic)
                folder.save_checkpoint(state.to_checkpoint(*about))
            progress.step(
                StepReport(
                    step=state.step,
                    reward=record.get("reward"),
                    length_tokens=record.get("length"),
                    tokens_per_second=record.get("tokens_per_second"),
                    loss=record.get("loss"),
                    v_norm=record["v_norm"],
                    grad_norm=record["grad_norm"],
                    step_seconds=step_seconds,
                )
            )
    chosen = v.detach() if config.train.keep == "last" or state.best_v is None else state.best_v
    chosen_step = state.step if config.train.keep == "last" or state.best_v is None else state.best_step
    facts = {"fingerprint": base_fingerprint}
    try:
        facts["basis_check"] = adapter.check().hex()
    except UserError as error:  # the numbers are worth more than their short form
        say(str(error))
    kept = chosen.detach().cpu().clone()
    save_vector(folder.path / LAST, v, config, {"step": state.step, **facts})
    save_vector(folder.path / BEST, chosen, config, {"step": chosen_step, "kept": config.train.keep, **facts})
    say(f"saved {folder.path / BEST} ({config.train.keep} v, step {chosen_step}); next: tinylora chat {folder.path}")
    untrained = _untrained_score(folder)
    if state.best_v is not None and untrained is not None and state.best_score <= untrained:
        full = sum(max(0.0, weight) for weight in config.reward.values())  # scores are from 0 to 1
        advice = (
            "which is the whole reward: there was nothing to gain"
            if untrained >= full - 1e-9
            else f"before anything else try another optim.lr, here {config.optim.lr:g}"
        )
        say(
            f"at no validation was it better than the untrained model (mean reward {state.best_score:.3f} at best, "
            f"untrained {untrained:.3f}); {advice}"
        )
    if isinstance(adapter, MethodAdapter) and config.method.name in THROUGH_PEFT:
        write_peft_adapter(folder.path / "peft", adapter, kept, base_name=config.model.name)
        say(f"and as PEFT's own adapter: {folder.path / 'peft'}")
    if "basis_check" in facts and config.method.name == "tinylora" and config.adapter.basis != "gradient":
        data = open_adapter(folder.path / BEST).to_portable().to_bytes()
        write_atomically(folder.path / PORTABLE, data)
        as_text = f"; as text: tinylora encode {folder.path}" if fits_a_code(data) else ""
        say(f"and as {len(data)} bytes: {folder.path / PORTABLE}{as_text}")
    result = None
    if config.eval.num_test:
        result = final_evaluation(folder.path, bench, kept, say, state.seconds)
    return TrainResult(folder.path, kept, state.step, state.seconds, result)


def _learn(bench: Workbench, learner: Learner, state: _State, record: dict[str, Any]) -> Rollouts | None:
    """One step by the run's algorithm; its metrics go into `record`, what was sampled comes back."""
    config = bench.config
    if config.train.algorithm == "sft":
        rows = reference_rows(bench, state.order)
        record |= {"prompts_sampled": len(rows), "completions_per_prompt": 1, "tokens_sampled": 0}
        record["prompt_tokens"] = sum(len(row.prompt_ids) for row in rows)
        record |= supervised_step(learner, rows, state.v, state.optimizer, config, state.step).metrics()
        return None
    is_rft = config.train.algorithm == "rft"
    rollouts = sample_step(bench, state.order, None if is_rft else state.v.detach().clone(), refill=not is_rft)
    record |= _rollout_metrics(rollouts, bench)
    record |= {
        "rollout_seconds": rollouts.seconds,
        "tokens_per_second": rollouts.tokens_sampled / rollouts.seconds,
    }
    if is_rft:
        rows = right_rows(rollouts.sampled)
        record |= supervised_step(learner, rows, state.v, state.optimizer, config, state.step).metrics()
    else:
        record |= grpo_step(learner, rollouts.groups, state.v, state.optimizer, config, state.step)
    return rollouts


def _announce(bench: Workbench, folder: RunFolder, say: Say) -> None:
    adapter, config = bench.adapter, bench.config
    numbers = f"training {adapter.num_trained:,} numbers ({4 * adapter.num_trained:,} bytes in float32)"
    where = f"over {len(adapter.paths)} modules of {bench.base.name}"
    if config.method.name == "tinylora":
        say(f"{numbers}: u = {config.adapter.u}, {config.adapter.sharing(adapter.shape[0])} {where}; base frozen")
    elif config.method.name == "full":
        say(f"{numbers}: all weights of {bench.base.name}")
    else:
        say(f"{numbers}: {config.method.describe()} {where}; base frozen")
    if config.method.name not in ("tinylora", "lora-xs", "vera", "ia3") and config.optim.lr > HIGHEST_USUAL_RATE:
        say(
            f"optim.lr = {config.optim.lr:g} suits TinyLoRA's few numbers; for {config.method.describe()} a hundredth "
            "to a tenth of it is usual, and all weights take less still"
        )
    algorithms = {"sft": "supervised learning on reference solutions (sft)",
                  "rft": "supervised learning on the untrained model's own right replies (rft)"}  # fmt: skip
    if config.train.algorithm in algorithms:
        say(f"this is {algorithms[config.train.algorithm]}, not reinforcement learning")
    if config.train.control != "none":
        say(f"this is a control: its reward is {config.train.control}, not what the task asks for")
    if bench.task is not None and hasattr(bench.task, "describe"):
        say(f"task {bench.task.name}: {bench.task.describe()}")
    say(
        f"run folder {folder.path}; {config.model.device}, {config.model.dtype}, {config.train.num_threads} threads; "
        f"Ctrl-C stops, tinylora train --resume {folder.path} goes on"
    )


def _probe_rows(bench: Workbench) -> list[Row]:
    """The first train prompts with the base model's own greedy answers: fixed tokens for the liveness probe."""
    from tinylora.generation.types import Request, SamplingParams

    assert bench.task is not None
    prompts = [
        encode_prompt(bench.base, bench.task.prompt(item), bench.config.prompt.chat)
        for item in bench.task.items("train")[:4]
    ]
    budget = min(16, bench.config.generation.max_new_tokens)
    completions = bench.engine.generate(
        [Request(prompt_ids=p, params=SamplingParams(temperature=0.0, max_new_tokens=budget)) for p in prompts]
    )
    return [Row(c.request_index, prompts[c.request_index], c.token_ids) for c in completions]


def _untrained_score(folder: RunFolder) -> float | None:
    """Mean validation reward before the first step, by the run's own log."""
    first = next(iter(read_jsonl(folder.metrics_path)), {})
    return first.get("validation_reward") if first.get("step") == 0 else None


def _is_validation_step(step: int, config: RunConfig) -> bool:
    return step == config.train.steps or bool(config.eval.every and step % config.eval.every == 0)


def _validate(bench: Workbench, state: _State, say: Say) -> dict[str, float]:
    """Greedy validation under the current v; keeps the best one by mean reward."""
    config = bench.config
    assert bench.task is not None
    results = evaluate(
        bench.engine,
        bench.base,
        bench.task,
        bench.task.items("validation")[: config.eval.num_validation],
        v=state.v.detach().clone(),
        max_new_tokens=config.generation.max_new_tokens,
        chat=config.prompt.chat,
        stop_strings=config.generation.stop_strings,
    )
    score = sum(reward(result, config) for result in results) / len(results)
    # Step 0 is the untrained model: shown for comparison, never kept as the adapter. best_v decides whether there is a
    # best score yet: a reward may be below any number one begins with.
    if state.step and (state.best_v is None or score > state.best_score):
        state.best_score, state.best_step, state.best_v = score, state.step, state.v.detach().clone()
    record = {
        "validation_reward": score,
        "validation_strict": mean(results, "strict"),
        "validation_value_only": mean(results, "value_only"),
        "validation_answered": mean(results, "answered"),
        "validation_stopped": mean(results, "stopped"),
        "validation_length": mean(results, "num_tokens"),
    }
    say(
        f"validation after step {state.step}: strict {record['validation_strict']:.3f}, "
        f"value-only {record['validation_value_only']:.3f}, stopped {record['validation_stopped']:.3f} "
        f"on {len(results)} items (greedy)"
        + (f"; best so far at step {state.best_step}" if state.step else ", untrained")
    )
    return record


def _rollout_metrics(rollouts: Rollouts, bench: Workbench) -> dict[str, Any]:
    means = Means()
    for group in rollouts.sampled:
        for result, value in zip(group.results, group.rewards, strict=True):
            means.add("reward", value)
            means.add("strict", result.strict)
            means.add("value_only", result.value_only)
            means.add("answered", float(result.answered))
            means.add("truncated", float(not result.stopped))
            means.add("length", result.num_tokens)
        means.add("zero_variance_groups", float(not group.has_variance))
    return {
        **means.result(),
        "prompts_sampled": len(rollouts.sampled),
        "tokens_sampled": rollouts.tokens_sampled,
        "prompt_tokens": sum(len(group.prompt_ids) for group in rollouts.sampled),
    }


def _log_samples(samples: JsonlWriter, rollouts: Rollouts, step: int, config: RunConfig) -> None:
    for group in rollouts.groups[: config.log.samples_per_step]:
        result, value = group.results[0], group.rewards[0]
        samples.append(
            {
                "step": step,
                "item": result.item_id,
                "question": result.question,
                "answer": result.answer,
                "text": result.text,
                "reward": value,
                "stopped": result.stopped,
                "tokens": result.num_tokens,
            }
        )


__all__ = ["TrainResult", "resume", "train"]
