"""The conditions that a trained adapter is held against, each answered on the same test items, and kept as it comes.

    untrained        v off, the same prompt and budget
    tuned            the adapter
    zero             v = 0 through the adapter's own path: the machinery without the numbers
    random_0 ...     random vectors of the adapter's norm
    best_random      the best of N random vectors by validation; N completions as many as training sampled
    best_shorter     the same with N vectors of a half, a quarter and an eighth of that norm
    best_prompt      the untrained model under the best of several prompts by validation
    larger_budget    the untrained model with more tokens
    constant         one and the same reply to every item, the best by validation
    trained:NAME     adapters trained on a control reward

Leaves out: what these mean together (evidence.py).
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tinylora.adapter.attach import linear_shapes
from tinylora.evaluation.account import Account, evaluation_account, linear_parameters
from tinylora.evaluation.final import random_vectors
from tinylora.evaluation.lengths import LENGTHS, random_label
from tinylora.evaluation.resumable import Condition, Store
from tinylora.models.load import encode_prompt
from tinylora.rollouts.answers import evaluate
from tinylora.rollouts.prompts import BUDGET_FACTOR, larger_budget, larger_budget_in_words, prompt_candidates
from tinylora.rollouts.replies import ItemResult, mean, score_text
from tinylora.rollouts.runtime import Workbench
from tinylora.talk import Say
from tinylora.tasks.base import Item, Message

CONSTANTS = 50
"""Most frequent train answers tried as a constant reply, each in CONSTANT_FORMS."""
CONSTANT_FORMS = ("{answer}", "\\boxed{{{answer}}}", "#### {answer}", "<answer>{answer}</answer>")


class Conditions:
    """Answers the conditions under one workbench. Each method returns the stored answers where there are any."""

    def __init__(self, bench: Workbench, v: Tensor, items: Sequence[Item], store: Store, say: Say) -> None:
        assert bench.task is not None
        self.bench, self.v, self.items, self.store, self.say = bench, v, items, store, say
        self.task = bench.task
        self.validation = bench.task.items("validation")[: bench.config.eval.num_validation]
        self.parameters = linear_parameters(linear_shapes(bench.base.model))
        self.budget = bench.config.generation.max_new_tokens

    def untrained(self) -> Condition:
        """v off."""
        return self._kept("untrained", "untrained", "untrained model, same prompt", lambda: self._answer(None))

    def tuned(self) -> Condition:
        """The adapter."""
        return self._kept("tuned", "tuned", f"{self.v.numel()} trained numbers", lambda: self._answer(self.v))

    def zero(self) -> Condition:
        """v = 0 through the adapter's path; details count the replies that differ from the untrained model's."""
        untrained = self.untrained()

        def run() -> _Answered:
            answered = self._answer(torch.zeros_like(self.v))
            differ = sum(a.text != b.text for a, b in zip(untrained.results, answered.results, strict=True))
            return replace(answered, details={"texts_that_differ": differ})

        return self._kept("zero", "zero", "v = 0 through the adapter path", run)

    def randoms(self, count: int) -> list[Condition]:
        """Random vectors of the same norm, and none shorter: `best_shorter` is for those."""
        return [
            self._kept(f"random_{i}", "random", random_label(i, 1.0), lambda v=v: self._answer(v))  # type: ignore[misc]
            for i, v in enumerate(random_vectors(self.v, count, self.bench.config.train.seed))
        ]

    def best_random(self, completions: int) -> Condition:
        """As many random vectors as `completions` allow (a greedy reply to each validation item), the best tested."""
        return self._best_of("best_random", "random vectors", completions, 7919, (1.0,))

    def best_shorter(self, completions: int) -> Condition:
        """As many again, of the shorter LENGTHS: if those of the full norm break the model, their best says little."""
        return self._best_of("best_shorter", "shorter random vectors", completions, 2 * 7919, LENGTHS[1:])

    def _best_of(self, name: str, what: str, completions: int, seed: int, shares_of_norm: Sequence[float]) -> Condition:
        """`seed`: added to the run's, so that these are none of `randoms`; the lengths are taken in turn."""
        count = max(1, completions // len(self.validation))
        lengths = [shares_of_norm[i % len(shares_of_norm)] for i in range(count)]

        def run() -> _Answered:
            def vectors() -> Iterator[Tensor]:
                return random_vectors(self.v, count, self.bench.config.train.seed + seed, lengths)

            tried = [
                self._answer(v, self.validation, f"vector {i + 1} of {count}, validation")
                for i, v in enumerate(vectors())
            ]
            scores = [mean(one.results, "strict") for one in tried]
            best = max(range(count), key=scores.__getitem__)
            answered = self._answer(next(islice(vectors(), best, None)))
            details = {
                "vectors_tried": count, "lengths": lengths, "validation": scores, "chosen": best,
                "completions_allowed": completions,
            }  # fmt: skip
            return replace(answered.plus(tried), details=details)

        return self._kept(name, name, f"best of {count} {what}, by validation", run)

    def best_prompt(self) -> Condition | None:
        """The untrained model under the best of the recipe's prompts; None where it has none but its own."""
        candidates = prompt_candidates(self.bench.config)
        if len(candidates) < 2:
            return None

        def run() -> _Answered:
            tried = {
                name: self._answer(None, self.validation, f"prompt {name!r}, validation", prompt=prompt)
                for name, prompt in candidates.items()
            }
            scores = {name: mean(one.results, "strict") for name, one in tried.items()}
            best = max(scores, key=lambda name: (scores[name], name == "own"))
            if best == "own":
                own = self.untrained()
                answered = _Answered(own.results, own.account, {})
            else:
                answered = self._answer(None, what=f"prompt {best!r}", prompt=candidates[best])
            return replace(answered.plus(list(tried.values())), details={"prompt": best, "validation": scores})

        label = f"untrained model, best of {len(candidates)} prompts by validation"
        return self._kept("best_prompt", "best_prompt", label, run)

    def larger_budget(self) -> Condition:
        """The untrained model with BUDGET_FACTOR times the tokens: greedy, so only cut-off replies are made again."""
        untrained = self.untrained()
        cut = [i for i, result in enumerate(untrained.results) if not result.stopped]
        tokens = larger_budget(self.bench, [self.items[i] for i in cut]) if cut else BUDGET_FACTOR * self.budget

        def run() -> _Answered:
            results = list(untrained.results)
            details = {"max_new_tokens": tokens, "answered_again": len(cut)}
            if not cut:
                return _Answered(tuple(results), untrained.account, details)
            again = self._answer(None, [self.items[i] for i in cut], "a larger token budget", max_new_tokens=tokens)
            for i, result in zip(cut, again.results, strict=True):
                results[i] = result
            return replace(
                again.plus([_Answered(untrained.results, untrained.account, {})]),
                results=tuple(results),
                details=details,
            )

        label = f"untrained model, {larger_budget_in_words(tokens, self.budget)}"
        return self._kept("larger_budget", "larger_budget", label, run)

    def constant(self) -> Condition:
        """The best constant reply: frequent train answers, bare and in the usual wrappings, chosen on validation."""

        def run() -> _Answered:
            answers = Counter(item.answer for item in self.task.items("train") if item.answer)
            replies = [form.format(answer=a) for a, _ in answers.most_common(CONSTANTS) for form in CONSTANT_FORMS] or [
                ""
            ]

            def scored(reply: str, items: Sequence[Item]) -> tuple[ItemResult, ...]:
                return tuple(score_text(self.task, item, reply, stopped=True, num_tokens=0) for item in items)

            shares = {reply: mean(scored(reply, self.validation), "strict") for reply in dict.fromkeys(replies)}
            best = max(shares, key=shares.__getitem__)
            cost = evaluation_account((), prompt_tokens=0, seconds=None, cpu_seconds=None, parameters=0, device="cpu")
            details = {"reply": best, "validation_strict": shares[best], "replies_tried": len(shares)}
            return _Answered(scored(best, self.items), cost, details)

        return self._kept("constant", "constant", "best constant reply, by validation", run)

    def trained_control(self, name: str, v: Tensor, label: str) -> Condition:
        """Another trained vector of the same adapter, such as one trained on shuffled rewards."""
        digest = hashlib.sha256(v.contiguous().numpy().tobytes()).hexdigest()

        def run() -> _Answered:
            return replace(self._answer(v), details={"numbers_sha256": digest})

        key = f"trained:{name}"
        if (found := self.store.get(key)) is not None and found.details.get("numbers_sha256") != digest:
            self.say(f"{label}: the answers that are there are of other numbers, and are made again")
            self.store.drop(key)
        return self._kept(key, "trained_control", label, run)

    def _kept(self, name: str, kind: str, label: str, run: "Callable[[], _Answered]") -> Condition:
        if (found := self.store.get(name)) is not None:
            return found
        self.say(f"{label}: {len(self.items):,} items")
        answered = run()
        condition = Condition(
            name=name, kind=kind, label=label, results=answered.results, account=answered.account,
            details=answered.details,
        )  # fmt: skip
        self.store.put(condition)
        return condition

    def _answer(
        self,
        v: Tensor | None,
        items: Sequence[Item] | None = None,
        what: str = "",
        *,
        max_new_tokens: int = 0,
        prompt: Callable[[Item], list[Message]] | None = None,
    ) -> "_Answered":
        config, items = self.bench.config, self.items if items is None else items
        if what:
            self.say(f"  {what}")
        clock, cpu = time.perf_counter(), time.process_time()
        results = evaluate(
            self.bench.engine, self.bench.base, self.task, items,
            v=v, max_new_tokens=max_new_tokens or self.budget, chat=config.prompt.chat, seed=config.train.seed,
            prompt=prompt, stop_strings=config.generation.stop_strings,
        )  # fmt: skip
        messages = prompt or self.task.prompt
        prompt_tokens = sum(len(encode_prompt(self.bench.base, messages(item), config.prompt.chat)) for item in items)
        cost = evaluation_account(
            results, prompt_tokens=prompt_tokens, seconds=time.perf_counter() - clock,
            cpu_seconds=time.process_time() - cpu, parameters=self.parameters, device=config.model.device,
        )  # fmt: skip
        return _Answered(tuple(results), cost, {})


@dataclass(frozen=True, slots=True)
class _Answered:
    results: tuple[ItemResult, ...]
    account: Account
    details: dict[str, Any]

    def plus(self, others: "Sequence[_Answered]") -> "_Answered":
        """With the cost of others added: what had to be tried to get here."""
        accounts = [self.account, *(other.account for other in others)]
        names = ("tokens_sampled", "prompt_tokens", "seconds", "flops", "cpu_hours", "gpu_hours")
        totals: dict[str, Any] = {name: sum(getattr(one, name) or 0 for one in accounts) for name in names}
        return replace(self, account=replace(self.account, **totals))
