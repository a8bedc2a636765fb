"""What train, eval, chat and inspect all need, opened once: model, adapter at v = 0, engine, task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tinylora.adapter.attach import AttachedAdapter, map_shapes
from tinylora.adapter.quantised import quantisation_of
from tinylora.adapter.trained import Trained
from tinylora.config.run import RunConfig
from tinylora.errors import UserError
from tinylora.generation.engine import Engine
from tinylora.generation.types import Completion, Request, SamplingParams
from tinylora.learner.memory import FALLBACK_MICRO_BATCH_TOKENS, FEWEST_PADDED_TOKENS, micro_batch_tokens_for
from tinylora.methods.build import put_method_on, resolve_quantization
from tinylora.methods.engine import engine_for
from tinylora.methods.estimate import padded_bytes_a_token
from tinylora.methods.one_vector import MethodAdapter
from tinylora.methods.put_on import put_on
from tinylora.models.architecture import Unsupported, describe
from tinylora.models.base import BaseModel
from tinylora.models.load import load_base_model
from tinylora.models.prompt import Encoded, does_not_fit, encode_prompt, encode_prompts, end_of_reply
from tinylora.models.template import Handed, unread_variables, with_fixed_date
from tinylora.rollouts.candidates import prompt_candidates
from tinylora.rollouts.references import reference_tokens
from tinylora.rollouts.replies import Reply, draw_key, score_completion, stop_at
from tinylora.rollouts.skipped import TaskWithoutSkipped
from tinylora.store.adapter import Adapter
from tinylora.system.busy import warn_if_busy
from tinylora.system.cores import default_threads
from tinylora.system.paths import cache_dir
from tinylora.system.progress import Bar
from tinylora.talk import Say, say_to_stderr
from tinylora.tasks.base import Item, Message, Split, Task, shorten
from tinylora.tasks.build import build_task, say_what_runs

Prompting = Callable[[Item], list[Message]]
"""From an item to its chat messages."""
AT_ONCE = 1024
"""Prompts that are tokenised together."""


class NoTask:
    """Stands where a runtime is opened for something else than the items of a task, such as chat."""

    name = "none"

    def items(self, split: Split) -> Sequence[Item]:
        """Raises: RuntimeError, as all of it does."""
        raise RuntimeError("this runtime was opened without a task")

    def prompt(self, item: Item) -> list[Message]:
        """Raises: RuntimeError."""
        raise RuntimeError("this runtime was opened without a task")

    def parse(self, text: str) -> str | None:
        """Raises: RuntimeError."""
        raise RuntimeError("this runtime was opened without a task")

    def score(self, item: Item, text: str) -> dict[str, float]:
        """Raises: RuntimeError."""
        raise RuntimeError("this runtime was opened without a task")


@dataclass
class Runtime:
    """The open model with its adapter, engine and task, under a resolved config: what asks and scores."""

    config: RunConfig
    base: BaseModel
    adapter: Trained
    engine: Engine
    task: Task

    def encode(self, messages: list[Message]) -> tuple[int, ...]:
        """Token ids of chat messages, by the model's chat template or, with prompt.chat off, as plain text."""
        prompt = self.config.prompt
        return encode_prompt(self.base, messages, prompt.chat, Handed.of(prompt))

    def encode_items(self, items: Sequence[Item], prompting: Prompting | None = None) -> list[Encoded]:
        """The prompts of many items, by the task or by `prompting`, of whatever length."""
        prompt, messages = self.config.prompt, [(prompting or self.task.prompt)(item) for item in items]
        parts = (messages[start : start + AT_ONCE] for start in range(0, len(messages), AT_ONCE))
        return [one for part in parts for one in encode_prompts(self.base, part, prompt.chat, Handed.of(prompt))]

    def misfits(
        self, split: Split, items: Sequence[Item], encoded: Sequence[Encoded], prompting: Prompting | None = None
    ) -> dict[int, str]:
        """Places of items that cannot be asked, or under sft not be learned from, with the reason."""
        found = {i: reason for i, one in enumerate(encoded) if (reason := self._why_not(len(one.ids)))}
        if split == "train" and prompting is None and self.config.train.algorithm == "sft":
            context = self.base.context_length
            for i, reply in enumerate(self.references(items)):
                total = len(encoded[i].ids) + len(reply)
                if total > context and i not in found:
                    found[i] = (
                        f"a prompt of {len(encoded[i].ids)} tokens and its reference reply of {len(reply)} do not fit "
                        f"in the {context} tokens of context that {self.base.name} has"
                    )
        return found

    def references(self, items: Sequence[Item]) -> list[tuple[int, ...]]:
        """Reference replies to items, with the token that ends a turn (see `end_of_reply`)."""
        end = end_of_reply(self.base, self.config.prompt.chat, Handed.of(self.config.prompt))
        return reference_tokens(self.base, self.task, items, self.config.sft.target, end)

    def _why_not(self, num_tokens: int, max_new_tokens: int = 0) -> str:
        """Why a prompt of that many tokens cannot be answered within a budget (0: the config's); empty if it can."""
        if reason := does_not_fit(self.base, num_tokens):
            return reason
        budget = max_new_tokens or self.config.generation.max_new_tokens
        budget = min(budget, self.base.context_length - num_tokens)
        if budget <= self.engine.room_for_reply(num_tokens):
            return ""
        return (
            f"a prompt of {num_tokens} tokens and a reply of {budget} need more memory than generation.kv_budget_gib = "
            f"{self.config.generation.kv_budget_gib:g} holds, which can be raised"
        )

    def _too_long(self, split: Split, items: Sequence[Item]) -> dict[int, str]:
        """Places of items that do not fit under some prompt that a run asks them with."""
        others = list(prompt_candidates(self.config).values())[1:] if split != "train" else []
        found: dict[int, str] = {}
        for prompting in (None, *others):
            found = {**self.misfits(split, items, self.encode_items(items, prompting), prompting), **found}
        return found

    def sampling(self, temperature: float = 0.0, seed: int = 0, max_new_tokens: int = 0) -> SamplingParams:
        """How replies are drawn: until a stop token of the model, or max_new_tokens (0 takes the config's)."""
        return SamplingParams(
            temperature=temperature,
            max_new_tokens=max_new_tokens or self.config.generation.max_new_tokens,
            stop_token_ids=self.base.stop_token_ids,
            seed=seed,
        )

    def request(
        self,
        item: Item,
        v: Tensor | None,
        params: SamplingParams,
        *,
        key: int,
        num_samples: int = 1,
        prompt_ids: tuple[int, ...] = (),
        on_finished: Callable[[], object] | None = None,
    ) -> Request:
        """What asks the engine for replies to one item under v; `key` names its random draws.

        prompt_ids: the prompt, where it is encoded already.
        """
        return Request(
            prompt_ids=prompt_ids or self.encode(self.task.prompt(item)),
            params=params,
            num_samples=num_samples,
            key=key,
            v=v,
            should_stop=stop_at(self.base, self.config.generation.stop_strings),
            on_finished=on_finished,
        )

    def score(self, item: Item, request: Request, completion: Completion) -> Reply:
        """A completion as a reply with its scores. Raises: ScorerError, with the item, if the scorer fails."""
        stops, prompt_tokens = self.config.generation.stop_strings, len(request.prompt_ids)
        return score_completion(self.base, self.task, item, completion, stops, prompt_tokens)

    def answer(
        self,
        items: Sequence[Item],
        v: Tensor | None,
        *,
        prompt: Prompting | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        max_new_tokens: int = 0,
        num_samples: int = 1,
        on_progress: Callable[[int, int], None] | None = None,
        who: str = "answering",
    ) -> list[Reply]:
        """Answer every item `num_samples` times under v (None: the untrained model), in the order of the items.

        `prompt` replaces the task's own prompt, for comparing prompts; max_new_tokens = 0 takes the config's budget;
        `who` answers is what a bar says.
        Draws are keyed by the item's id, so the same item gets the same random numbers whatever stands beside it.
        Raises: UserError, before anything is asked, for a prompt that cannot be made or does not fit.
        """
        prompts = [one.ids for one in self.encode_items(items, prompt)]
        for item, ids in zip(items, prompts, strict=True):
            if reason := self._why_not(len(ids), max_new_tokens):
                raise UserError(
                    f"{reason}; shorten it, or use fewer few-shot examples: {shorten(item.question, 60)}; or leave "
                    "such items out: --set 'task.skip=[\"too-long\"]'"
                )
        replies: list[Reply] = []
        params = self.sampling(temperature, seed, max_new_tokens)
        chunk = max(1, 4 * self.engine.max_batch_rows // num_samples)
        with Bar(who, len(items) * num_samples, "items" if num_samples == 1 else "samples") as bar:
            told = bar.advance if bar.is_on else None
            for start in range(0, len(items), chunk):
                part = items[start : start + chunk]
                requests = [
                    self.request(
                        item, v, params, key=draw_key(item), num_samples=num_samples, prompt_ids=ids, on_finished=told
                    )
                    for item, ids in zip(part, prompts[start : start + chunk], strict=True)
                ]
                replies += [
                    self.score(part[c.request_index], requests[c.request_index], c)
                    for c in self.engine.generate(requests)
                ]
                bar.update(len(replies))
                if on_progress is not None:
                    on_progress(min(start + chunk, len(items)), len(items))
        return replies


def set_threads(num_threads: int) -> int:
    """Set torch's threads (0: OMP_NUM_THREADS, else the cores really available) and return the count."""
    threads = num_threads or default_threads()
    torch.set_num_threads(threads)
    return threads


def resolve_micro_batch(model: PreTrainedModel, adapter: Trained, config: RunConfig) -> int:
    """Tokens of a micro-batch: as the config says, else what its memory budget holds (at least 256 where they are
    padded, as for all methods but TinyLoRA's own layers, and for quantised models); 4,096 for a model whose memory
    cannot be told beforehand.

    Raises: UserError if the budget does not hold even one token.
    """
    train = config.train
    if train.micro_batch_tokens:
        return train.micro_batch_tokens
    budget = int(train.memory_budget_gib * 2**30)
    if isinstance(adapter, MethodAdapter) or quantisation_of(model):
        shapes = {}
        if isinstance(adapter, MethodAdapter):
            with adapter.using(None):
                shapes = map_shapes(model, adapter.paths)
        itemsize = model.get_input_embeddings().weight.element_size()
        each = padded_bytes_a_token(model, config.method, shapes, itemsize, train.gradient_checkpointing)
        return max(FEWEST_PADDED_TOKENS, budget // each)
    try:
        architecture = describe(model)
    except Unsupported:
        return FALLBACK_MICRO_BATCH_TOKENS
    return micro_batch_tokens_for(budget, architecture, train.gradient_checkpointing)


def open_runtime(
    config: RunConfig,
    *,
    task: bool | Task = True,
    say: Say = say_to_stderr,
    base: BaseModel | None = None,
    on: Adapter | None = None,
    other_base: bool = False,
) -> Runtime:
    """Load the model, set the threads, attach v = 0 with the cached basis, build the task and the engine.

    on: the adapter that is to be used, by the method that it was trained by; its base and basis are checked (see
    `methods.put_on` for `other_base`), its factors taken where it brings its own.

    Whatever "auto" stood for (device, dtype, threads, revision), the engine that serves the model and the day that its
    chat template writes are resolved in the returned config.
    """
    config = resolve_quantization(config, say) if base is None else config
    threads = set_threads(config.train.num_threads)
    built: Task = NoTask()
    if task is not False:
        built = build_task(config.task, config.prompt) if task is True else task
        say_what_runs(built, say)
    if base is None:
        model = config.model
        if model.trust_remote_code:
            say(f"code of {model.name} may run here as you, without isolation (model.trust_remote_code)")
        base = load_base_model(
            model.name,
            device=model.device,
            dtype=model.dtype,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            quantization=model.quantization,
        )
    if base.device.type == "cpu":
        warn_if_busy(threads, say)
    if on is None:
        files = list(base.files) or None
        adapter: AttachedAdapter | MethodAdapter = put_method_on(
            base.model, config.method, config.adapter, cache_dir=cache_dir(), source=files
        )
    else:
        adapter = put_on(base.model, on, files=base.files, other_base=other_base)
        adapter.write(None)
    if adapter.excluded:
        say(
            f"{len(adapter.excluded)} modules left out: " + "; ".join(f"{k} ({v})" for k, v in adapter.excluded.items())
        )
    engine = engine_for(
        base.model,
        adapter,
        config,
        context_length=base.context_length,
        pad_token_id=base.pad_token_id,
        say=say,
    )
    resolved = replace(
        config,
        model=replace(
            config.model,
            device=base.device.type,  # type: ignore[arg-type]
            dtype="bfloat16" if base.dtype == torch.bfloat16 else "float32",
            revision=base.revision or config.model.revision,
            quantization=base.quantization,  # type: ignore[arg-type]
        ),
        prompt=with_fixed_date(base, config.prompt),
        generation=replace(config.generation, backend=engine.name),  # type: ignore[arg-type]
        train=replace(
            config.train, num_threads=threads, micro_batch_tokens=resolve_micro_batch(base.model, adapter, config)
        ),
    )
    if word := unread_variables(base, resolved.prompt):
        say(word)
    runtime = Runtime(resolved, base, adapter, engine, built)
    if config.task.skip and not isinstance(built, NoTask):
        runtime.task = TaskWithoutSkipped(built, config.task.skip, runtime._too_long)
    return runtime
