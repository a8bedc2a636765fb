"""The loop: step, log, validate, checkpoint. A kill at any instant loses at most the current step."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tinylora.config.run import RunConfig
from tinylora.config.schema import to_table
from tinylora.errors import UserError
from tinylora.generation.types import Request, SamplingParams
from tinylora.learner.learner import Learner, Row
from tinylora.rollouts.groups import Rollouts, reward
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.replies import mean
from tinylora.rollouts.runtime import Runtime
from tinylora.store.run_folder import RunFolder
from tinylora.system.jsonl import JsonlWriter
from tinylora.system.memory import peak_memory
from tinylora.talk import Say
from tinylora.training.algorithm import Algorithm
from tinylora.training.liveness import check_liveness
from tinylora.training.metrics import MetricsWriter
from tinylora.training.progress import Progress, StepReport
from tinylora.training.trackers import make_trackers
from tinylora.training.watch import Watch

MOST_LOGGED = 4096
"""Numbers of v that a step writes into metrics.jsonl; of more, only the norm."""


@dataclass
class State:
    """All that a step changes. What a checkpoint holds, and nothing else, decides how the run goes on."""

    v: Tensor
    algorithm: Algorithm
    order: DataOrder
    step: int = 0
    seconds: float = 0.0
    best_score: float = -1.0
    best_step: int = 0
    best_v: Tensor | None = None

    def to_checkpoint(self, **about: str) -> dict[str, Any]:
        """What a checkpoint keeps; `about` says of what run it is: see `Loop.about`."""
        return {
            "v": self.v.detach().cpu(),
            **self.algorithm.state(),
            "best_v": (torch.zeros_like(self.v) if self.best_v is None else self.best_v).detach().cpu(),
            "has_best": self.best_v is not None,
            "best_score": self.best_score,
            "best_step": self.best_step,
            "step": self.step,
            "data_position": self.order.position,
            "seconds": self.seconds,
            **about,
        }

    def restore(self, saved: dict[str, Any], config: RunConfig, folder: RunFolder) -> None:
        """Go on from a checkpoint. Raises: UserError if it is of more steps than the run is to have."""
        with torch.no_grad():
            self.v.copy_(saved["v"])
        self.algorithm.restore(saved)
        self.best_v = saved["best_v"].to(self.v.device) if saved["has_best"] else None
        self.best_score, self.best_step = saved["best_score"], saved["best_step"]
        self.step, self.seconds = saved["step"], saved["seconds"]
        self.order.position = saved["data_position"]
        if self.step > config.train.steps:  # its files would say that they are of a shorter run
            raise UserError(
                f"train.steps is {config.train.steps}, but the run {folder.path} has done {self.step} steps already; "
                f"set train.steps to at least {self.step}, or start a new run"
            )

    def chosen(self, keep: str) -> tuple[Tensor, int]:
        """The v that is the adapter, and its step: the best on validation, or the last one."""
        if keep == "last" or self.best_v is None:
            return self.v.detach(), self.step
        return self.best_v, self.best_step


class Loop:
    """Steps of a run until train.steps are done."""

    def __init__(
        self,
        runtime: Runtime,
        learner: Learner,
        state: State,
        folder: RunFolder,
        say: Say,
        *,
        about: dict[str, str],
        resumed: bool,
    ) -> None:
        """about: what every checkpoint says of the run: fingerprints of questions and base, how the engine computes.

        resumed: whether the liveness probe runs before the first step whatever its number.
        """
        self.runtime, self.learner, self.state, self.folder, self.say = runtime, learner, state, folder, say
        self.config, self.about, self.resumed, self._probe_now = runtime.config, about, resumed, resumed
        self._probe_rows: list[Row] = []

    def run(self) -> None:
        """Raises: UserError for what ends a run; the last checkpoint is whole, and `resume` goes on from there."""
        state, config, folder = self.state, self.config, self.folder
        progress = Progress(config.train.steps, state.step)
        can_end = bool(self.runtime.base.stop_token_ids or config.generation.stop_strings)
        watch = Watch(config.grpo.max_logprob_gap, can_end=can_end)
        trackers = make_trackers(config.log.trackers, folder.path, to_table(config), state.step)
        with MetricsWriter(folder.metrics_path, trackers) as metrics, JsonlWriter(folder.samples_path) as samples:
            if state.step == 0 and not self.resumed:
                metrics.log(0, _validate(self.runtime, state, self.say))
                # Before the first step, so that a run which has steps and no checkpoint is known to have lost it.
                folder.save_checkpoint(state.to_checkpoint(**self.about))
            while state.step < config.train.steps:
                record, rollouts, step_seconds = self._step()
                if rollouts is not None:
                    _log_samples(samples, rollouts, state.step, config)
                metrics.log(state.step, record)
                for word in watch.step(record):
                    self.say(f"step {state.step}: {word}")
                if state.step % config.log.checkpoint_every == 0 or state.step == config.train.steps:
                    folder.save_checkpoint(state.to_checkpoint(**self.about))
                progress.step(_report(state.step, record, step_seconds))

    def _step(self) -> tuple[dict[str, Any], Rollouts | None, float]:
        """One step with its probe and validation: what metrics.jsonl keeps, what was sampled, its own seconds."""
        state, config = self.state, self.config
        started, cpu_started = time.perf_counter(), time.process_time()
        record = self._probe()
        learned, rollouts = state.algorithm.step(state.order, state.step)
        record |= learned
        state.step += 1
        record["v_norm"] = float(state.v.detach().norm())
        if state.v.numel() <= MOST_LOGGED:
            record["v"] = state.v.detach().flatten().tolist()
        step_seconds = time.perf_counter() - started
        if _is_validation_step(state.step, config):
            record |= _validate(self.runtime, state, self.say)
        state.seconds += time.perf_counter() - started
        record |= {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "peak_memory_bytes": peak_memory(self.runtime.base.device),
        }
        return record, rollouts, step_seconds

    def _probe(self) -> dict[str, Any]:
        """The liveness probe where it is due; after a resume it runs whatever the step, and is not logged for it."""
        if not self._probe_rows:
            self._probe_rows = _probe_rows(self.runtime)
        is_due = self.state.step % self.config.train.liveness_every == 0
        if not is_due and not self._probe_now:
            return {}
        self._probe_now = False
        probe = check_liveness(self.runtime.engine, self.learner, self._probe_rows)
        return {f"liveness_{key}": value for key, value in asdict(probe).items()} if is_due else {}


def _probe_rows(runtime: Runtime) -> list[Row]:
    """The first train prompts with the base model's own greedy answers: fixed tokens for the liveness probe."""
    budget = min(16, runtime.config.generation.max_new_tokens)
    params = SamplingParams(temperature=0.0, max_new_tokens=budget)  # no stop token ends one early
    prompts = [runtime.encode(runtime.task.prompt(item)) for item in runtime.task.items("train")[:4]]
    completions = runtime.engine.generate([Request(prompt_ids=ids, params=params) for ids in prompts])
    return [Row(c.request_index, prompts[c.request_index], c.token_ids) for c in completions]


def _is_validation_step(step: int, config: RunConfig) -> bool:
    return step == config.train.steps or bool(config.eval.every and step % config.eval.every == 0)


def _validate(runtime: Runtime, state: State, say: Say) -> dict[str, float]:
    """Greedy validation under the current v; keeps the best one by mean reward."""
    config = runtime.config
    items = runtime.task.items("validation")[: config.eval.num_validation]
    replies = runtime.answer(items, state.v.detach().clone(), who="validation")
    score = sum(reward(reply, config) for reply in replies) / len(replies)
    # Step 0 is the untrained model: shown for comparison, never kept as the adapter. best_v decides whether there is a
    # best score yet: a reward may be below any number one begins with.
    if state.step and (state.best_v is None or score > state.best_score):
        state.best_score, state.best_step, state.best_v = score, state.step, state.v.detach().clone()
    record = {
        "validation_reward": score,
        "validation_strict": mean(replies, "strict"),
        "validation_value_only": mean(replies, "value_only"),
        "validation_answered": mean(replies, "answered"),
        "validation_stopped": mean(replies, "stopped"),
        "validation_length": mean(replies, "num_tokens"),
    }
    say(
        f"validation after step {state.step}: strict {record['validation_strict']:.3f}, "
        f"value-only {record['validation_value_only']:.3f}, stopped {record['validation_stopped']:.3f} "
        f"on {len(replies)} items (greedy)"
        + (f"; best so far at step {state.best_step}" if state.step else ", untrained")
    )
    return record


def _log_samples(samples: JsonlWriter, rollouts: Rollouts, step: int, config: RunConfig) -> None:
    for group in rollouts.groups[: config.log.samples_per_step]:
        reply, value = group.replies[0], group.rewards[0]
        samples.append(
            {
                "step": step,
                "item": reply.item_id,
                "question": reply.question,
                "answer": reply.answer,
                "text": reply.text,
                "reward": value,
                "stopped": reply.stopped,
                "tokens": reply.num_tokens,
            }
        )


def _report(step: int, record: dict[str, Any], step_seconds: float) -> StepReport:
    return StepReport(
        step=step,
        reward=record.get("reward"),
        length_tokens=record.get("length"),
        tokens_per_second=record.get("tokens_per_second"),
        loss=record.get("loss"),
        noise_p=record.get("signal_p"),
        v_norm=record["v_norm"],
        grad_norm=record["grad_norm"],
        step_seconds=step_seconds,
    )
