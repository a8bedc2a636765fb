"""The door of training: checks before a run, the run itself (loop.py), and the files that it leaves."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tinylora.adapter.code import fits_a_code
from tinylora.config.algorithms import ALGORITHMS as FACTS
from tinylora.config.algorithms import AlgorithmName
from tinylora.config.located import located
from tinylora.config.resume import check_as_begun, resume_config
from tinylora.config.run import RunConfig
from tinylora.config.schema import dump_config
from tinylora.errors import UserError
from tinylora.evaluation.final import final_evaluation
from tinylora.learner.learner import Learner
from tinylora.methods.build import THROUGH_PEFT
from tinylora.methods.one_vector import MethodAdapter
from tinylora.methods.peft_files import write_peft_adapter
from tinylora.models.bases import explain_difference, remember
from tinylora.models.fingerprint import Fingerprint, Identity
from tinylora.planning.memory_check import check_memory
from tinylora.planning.reach import reach
from tinylora.rollouts.check import check_prompts, never_ends
from tinylora.rollouts.runtime import Runtime, open_runtime
from tinylora.rollouts.skipped import TaskWithoutSkipped, data_order
from tinylora.store.adapter import open_adapter
from tinylora.store.adapter_file import BEST, LAST, PORTABLE, save_vector
from tinylora.store.own import is_own, remember_own, settle_run
from tinylora.store.run_folder import SKIPPED, RunFolder
from tinylora.system.environment import collect_environment, numeric_differences
from tinylora.system.files import write_atomically
from tinylora.system.folders import check_name
from tinylora.system.jsonl import GO_ON, read_jsonl
from tinylora.talk import Say, say_to_stderr, shell_line
from tinylora.tasks.base import Task
from tinylora.training.algorithm import Algorithm
from tinylora.training.gradient_basis import with_gradient_basis
from tinylora.training.grpo import Grpo
from tinylora.training.loop import Loop, State
from tinylora.training.npg import Npg
from tinylora.training.rft import Rft
from tinylora.training.sft import Sft

HIGHEST_USUAL_RATE = 2e-3
"""Of Adam on LoRA and its kin; at twice that, LoRA of rank 8 unlearned the demo within two steps."""
ALGORITHMS: dict[AlgorithmName, type[Algorithm]] = {"grpo": Grpo, "npg": Npg, "sft": Sft, "rft": Rft}


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where the run is, its adapter (best or last v, as the recipe says), and what it took."""

    run: Path
    v: Tensor
    steps: int
    seconds: float
    result: dict[str, Any] | None
    """The final evaluation (what result.json holds), or None where eval.num_test is 0."""


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
    check_name(name, "a run's name")
    config = located(config)
    check_memory(config, say)
    runtime = open_runtime(config, task=task or True, say=say)
    _check(runtime, say)
    folder = RunFolder.create(out, name, runtime.config, collect_environment())
    remember_own(runtime.config, say)
    with folder.lock():
        return _run(runtime, folder, say)


def resume(
    run: Path,
    overrides: Sequence[str] = (),
    *,
    task: Task | None = None,
    say: Say = say_to_stderr,
) -> TrainResult:
    """Go on with a run from its last checkpoint, bit for bit on the same machine; only steps, logging and the cache's
    budget may change, and where the last might cost a bit, it says so.

    A run that this user did not make is gone on with where its settings choose nothing that matters
    (config/strangers.py), or were trusted before: `tinylora.store.own.settle_run`.
    Raises: UserError for a folder that is no run, is not trusted or is in use, other changes, fewer steps than are
    done, or a task or base model that is another one by now.
    """
    folder = RunFolder.open(run)
    stored = folder.read_config()
    config = resume_config(stored, overrides)
    settle_run(run, stored, ["task", "prompt"] if task else [], say=say)
    if is_own(stored):  # what changes by the command line is the user's, too
        remember_own(config, say)
    if config.generation.kv_budget_gib != stored.generation.kv_budget_gib:
        say(
            "another generation.kv_budget_gib may compute other sequences together, which can move last digits, so the "
            "run goes on, but perhaps not bit for bit"
        )
    environment = folder.read_environment()
    differences = numeric_differences(environment, collect_environment()) if environment is not None else []
    if environment is None:
        say(
            f"{folder.environment_path} is missing or damaged, so whether this is the machine of the run's start is "
            "not known; it goes on"
        )
    if differences:
        say("this is not the machine of the run's start, so it goes on, but not bit for bit: " + "; ".join(differences))
    with folder.lock():
        saved = folder.load_checkpoint()
        if saved is not None:
            check_as_begun(str(saved.state.get("settings", "")), stored, str(folder.config_path))
        else:
            folder.check_logs(None)  # before a model is loaded
        check_memory(config, say, refuse=False)
        if not config.prompt.date:
            config = replace(config, prompt=replace(config.prompt, date=folder.day_of_start()))
        runtime = open_runtime(config, task=task or True, say=say)
        if runtime.config.prompt.date != stored.prompt.date:  # older versions kept none
            say(
                "the chat template writes the date, and the run did not keep the one it began with; from here on it is "
                f"{runtime.config.prompt.date} (another: --set prompt.date=YYYY-MM-DD)"
            )
        check_prompts(runtime, say)
        return _run(runtime, folder, say)


def _check(runtime: Runtime, say: Say) -> None:
    check_prompts(runtime, say)
    if word := never_ends(runtime):
        say(word)
    ALGORITHMS[runtime.config.train.algorithm].check(runtime, say)


def _fingerprint(task: Task) -> str:
    return str(task.fingerprint()) if hasattr(task, "fingerprint") else ""


def _scorer_prints(task: Task) -> dict[str, str]:
    return dict(task.scorer_prints()) if hasattr(task, "scorer_prints") else {}


def _check_scorer(saved: dict[str, Any], runtime: Runtime, folder: RunFolder, say: Say) -> None:
    """Raises: UserError if the scorer reads other things than in the run's beginning; a checkpoint of older versions
    does not know. Other code is said and no more: a run that a scorer's fault stopped goes on when that is mended.
    """
    now = _scorer_prints(runtime.task)
    changed = {name for name, value in now.items() if saved.get(name, value) != value}
    if "scorer_reads" in changed:
        raise UserError(
            f"what the scorer {runtime.config.task.scorer} reads of the questions beside their answers (tests, other "
            f"fields) is not what the run {folder.path} began with; bring it back, or start a new run"
        )
    if "scorer_code" in changed:
        say(
            f"the code of the scorer {runtime.config.task.scorer} has changed since the last checkpoint: rewards from "
            "here on are not by the rule of those before"
        )


def _check_base(began: str | None, found: Identity, runtime: Runtime, folder: RunFolder) -> None:
    """Raises: UserError if the run began on other weights; `began` is None in checkpoints of older versions."""
    if began is not None and began != found.fingerprint.hex():
        difference = explain_difference(Fingerprint.of(bytes.fromhex(began)), found)
        raise UserError(
            f"{runtime.base.name} is not the base model that the run {folder.path} began with: {difference}; "
            "bring back that one, or start a new run"
        )


def _run(runtime: Runtime, folder: RunFolder, say: Say) -> TrainResult:
    """Steps until the run is done, then its files and the final evaluation. The folder is locked."""
    if runtime.config.adapter.basis == "gradient":
        runtime = with_gradient_basis(runtime, folder, say)
    config, task = runtime.config, runtime.task
    kind = ALGORITHMS[config.train.algorithm]
    learner = Learner(
        runtime.base.model,
        runtime.adapter,
        temperature=kind.learner_temperature(runtime),
        pad_token_id=runtime.base.pad_token_id,
        checkpointing=config.train.gradient_checkpointing,
    )
    v = runtime.adapter.zeros().requires_grad_(True)
    state = State(v, kind(runtime, learner, v), data_order(task, config.train.seed))
    with runtime.adapter.using(None):  # of the base alone, without a method's layers
        identity = remember(runtime.base)
    saved = folder.load_checkpoint()
    folder.check_logs(saved)
    if saved is not None:
        _restore(state, saved.state, identity, runtime, folder, say)
    folder.cut_back(saved)  # now that nothing refuses to go on
    folder.write_config(config)  # the settings that a resumed run changes, now that nothing refuses them any more
    _announce(runtime, folder, say)
    _keep_skipped(runtime, folder, say)
    about = {
        "task_fingerprint": _fingerprint(task),
        "base_fingerprint": identity.fingerprint.hex(),
        "engine_arithmetic": runtime.engine.arithmetic,
        **_scorer_prints(task),
        "settings": dump_config(config),
    }
    Loop(runtime, learner, state, folder, say, about=about, resumed=saved is not None).run()
    kept = _save(runtime, state, folder, about["base_fingerprint"], say)
    result = final_evaluation(folder.path, runtime, kept, say, state.seconds) if config.eval.num_test else None
    return TrainResult(folder.path, kept, state.step, state.seconds, result)


def _restore(
    state: State, saved: dict[str, Any], identity: Identity, runtime: Runtime, folder: RunFolder, say: Say
) -> None:
    """Put a checkpoint back. Raises: UserError if questions or base are other ones, or too many steps are done."""
    if saved["task_fingerprint"] != _fingerprint(runtime.task):
        raise UserError(f"the questions of task {runtime.task.name} are not those the run {folder.path} began with")
    _check_scorer(saved, runtime, folder, say)
    _check_base(saved.get("base_fingerprint"), identity, runtime, folder)
    state.restore(saved, runtime.config, folder)
    say(f"resuming {folder.path} after step {state.step}")
    now, then = runtime.engine.arithmetic, saved.get("engine_arithmetic", runtime.engine.arithmetic)
    if now != then:
        say(f"the rollout engine has {now}, and had {then}, so the run goes on, but not bit for bit: that hangs on "
            "the memory that is free and on a C compiler")  # fmt: skip


def _save(runtime: Runtime, state: State, folder: RunFolder, fingerprint: str, say: Say) -> Tensor:
    """Write the adapter in its forms; the v that is the adapter, on the CPU."""
    config, adapter = runtime.config, runtime.adapter
    chosen, chosen_step = state.chosen(config.train.keep)
    facts = {"fingerprint": fingerprint}
    try:
        facts["basis_check"] = adapter.check().hex()
    except UserError as error:  # the numbers are worth more than their short form
        say(str(error))
    kept = chosen.detach().cpu().clone()
    save_vector(folder.path / LAST, state.v, config, {"step": state.step, **facts})
    save_vector(folder.path / BEST, chosen, config, {"step": chosen_step, "kept": config.train.keep, **facts})
    then = shell_line("tinylora", "chat", folder.path)
    say(f"saved {folder.path / BEST} ({config.train.keep} v, step {chosen_step}); next: {then}")
    _say_if_nothing_was_gained(state, config, folder, say)
    if isinstance(adapter, MethodAdapter) and config.method.name in THROUGH_PEFT:
        write_peft_adapter(folder.path / "peft", adapter, kept, base_name=config.model.name)
        say(f"and as PEFT's own adapter: {folder.path / 'peft'}")
    if "basis_check" in facts and config.method.name == "tinylora" and config.adapter.basis != "gradient":
        data = open_adapter(folder.path / BEST).to_portable().to_bytes()
        write_atomically(folder.path / PORTABLE, data)
        as_text = f"; as text: {shell_line('tinylora', 'encode', folder.path)}" if fits_a_code(data) else ""
        say(f"and as {len(data)} bytes: {folder.path / PORTABLE}{as_text}")
    return kept


def _say_if_nothing_was_gained(state: State, config: RunConfig, folder: RunFolder, say: Say) -> None:
    untrained = _untrained_score(folder)
    if state.best_v is None or untrained is None or state.best_score > untrained:
        return
    full = sum(max(0.0, weight) for weight in config.reward.values())  # scores are from 0 to 1
    advice = (
        "which is the whole reward: there was nothing to gain"
        if untrained >= full - 1e-9
        else f"before anything else try another optim.lr, here {config.optim.lr:g}"
        if FACTS[config.train.algorithm].has_rate
        else "before anything else try another prompt, or more replies a step"
    )
    say(
        f"at no validation was it better than the untrained model (mean reward {state.best_score:.3f} at best, "
        f"untrained {untrained:.3f}); {advice}"
    )


def _keep_skipped(runtime: Runtime, folder: RunFolder, say: Say) -> None:
    """Write which items are left out and why, and say so."""
    if not isinstance(runtime.task, TaskWithoutSkipped):
        return
    rows = [one.row() for one in runtime.task.known_skipped()]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder.path / SKIPPED, text.encode("utf-8", errors="replace"), again=GO_ON)
    each = Counter(row["split"] for row in rows)
    listed = ", ".join(f"{number} {split}" for split, number in each.items()) or "none"
    say(f"items left out by task.skip: {listed} (which, and why: {folder.path / SKIPPED})")


def _announce(runtime: Runtime, folder: RunFolder, say: Say) -> None:
    adapter, config = runtime.adapter, runtime.config
    numbers = f"training {adapter.num_trained:,} numbers ({4 * adapter.num_trained:,} bytes in float32)"
    where = f"over {len(adapter.paths)} modules of {runtime.base.name}"
    if config.method.name == "tinylora":
        say(f"{numbers}: u = {config.adapter.u}, {config.adapter.sharing(adapter.shape[0])} {where}; base frozen")
    elif config.method.name == "full":
        say(f"{numbers}: all weights of {runtime.base.name}")
    else:
        say(f"{numbers}: {config.method.describe()} {where}; base frozen")
    if config.method.name != "full":
        with adapter.using(None):
            say(reach(runtime.base.model, adapter.paths).in_words())
    has_rate = FACTS[config.train.algorithm].has_rate
    few = config.method.name in ("tinylora", "lora-xs", "vera", "ia3")
    if not few and has_rate and config.optim.lr > HIGHEST_USUAL_RATE:
        say(
            f"optim.lr = {config.optim.lr:g} suits TinyLoRA's few numbers; for {config.method.describe()} a hundredth "
            "to a tenth of it is usual, and all weights take less still"
        )
    if announced := FACTS[config.train.algorithm].announced:
        say(f"this is {announced}, not reinforcement learning")
    if config.train.control != "none":
        say(f"this is a control: its reward is {config.train.control}, not what the task asks for")
    if hasattr(runtime.task, "describe"):
        say(f"task {runtime.task.name}: {runtime.task.describe()}")
    say(
        f"run folder {folder.path}; {config.model.device}, {config.model.dtype}, {config.train.num_threads} threads; "
        f"Ctrl-C stops, {shell_line('tinylora', 'train', '--resume', folder.path)} goes on"
    )


def _untrained_score(folder: RunFolder) -> float | None:
    """Mean validation reward before the first step, by the run's own log."""
    first = next(iter(read_jsonl(folder.metrics_path)), {})
    return first.get("validation_reward") if first.get("step") == 0 else None
