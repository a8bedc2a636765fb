"""The conditions that a trained adapter is held against, each answered on the same test items, and kept as it comes.

    untrained        v off, the same prompt and budget
    tuned            the adapter
    zero             v = 0 through the adapter's own path: the machinery without the numbers
    *_sampled        the first two again, sampled instead of greedy
    random_0 ...     random vectors, of the adapter's norm or shorter
    best_random      the best of N random vectors by validation; N completions as many as training sampled
    best_shorter     the same with N vectors of a half, a quarter and an eighth of that norm
    best_prompt      the untrained model under the best of several prompts by validation
    larger_budget    the untrained model with more tokens
    constant         one and the same reply to every item, the best by validation
    trained:NAME     adapters trained on a control reward

Leaves out: what these mean together (evidence.py, final.py).
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from tinylora.adapter.attach import linear_shapes
from tinylora.evaluation.account import Account, evaluation_account, linear_parameters
from tinylora.evaluation.lengths import LENGTHS, random_label
from tinylora.evaluation.resumable import TRIAL, Condition, Store
from tinylora.rollouts.prompts import BUDGET_FACTOR, larger_budget, larger_budget_in_words, prompt_candidates
from tinylora.rollouts.replies import Reply, mean, score_text
from tinylora.rollouts.runtime import Runtime
from tinylora.system.progress import Bar
from tinylora.talk import Say
from tinylora.tasks.base import Item, Message

CONSTANTS = 50
"""Most frequent train answers tried as a constant reply, each in CONSTANT_FORMS."""
CONSTANT_FORMS = ("{answer}", "\\boxed{{{answer}}}", "#### {answer}", "<answer>{answer}</answer>")
Prompting = Callable[[Item], list[Message]]


class Conditions:
    """Answers the conditions of an evaluation. Each method returns the stored answers where there are any."""

    def __init__(
        self, runtime: Runtime, v: Tensor, items: Sequence[Item], store: Store, say: Say, bar: Bar | None = None
    ) -> None:
        """v (groups, u): the adapter; items: what every condition answers, in this order; bar: counts conditions."""
        self.runtime, self.v, self.items, self.store, self.say, self._bar = runtime, v, items, store, say, bar
        self._there: set[str] = set()
        self._label = ""
        """Of the condition that is being answered."""
        self.task = runtime.task
        self.validation = runtime.task.items("validation")[: runtime.config.eval.num_validation]
        self.parameters = linear_parameters(linear_shapes(runtime.base.model))
        self.budget = runtime.config.generation.max_new_tokens

    def untrained(self) -> Condition:
        """v off."""
        return self._kept("untrained", "untrained", "untrained model, same prompt", lambda: self._answer(None))

    def adapter(self) -> Condition:
        """The adapter; in files it is called tuned."""
        return self._kept("tuned", "tuned", f"{self.v.numel()} trained numbers", lambda: self._answer(self.v))

    def sampled(self, temperature: float) -> tuple[Condition, Condition]:
        """The untrained model and the adapter, one reply an item at a temperature, with the same random numbers."""
        how = f"sampled at {temperature:g}"
        return (
            self._kept("untrained_sampled", "sampled", f"untrained model, {how}",
                       lambda: self._answer(None, temperature=temperature)),
            self._kept("tuned_sampled", "sampled", f"{self.v.numel()} trained numbers, {how}",
                       lambda: self._answer(self.v, temperature=temperature)),
        )  # fmt: skip

    def zero(self) -> Condition:
        """v = 0 through the adapter's path; details count the replies that differ from the untrained model's."""
        untrained = self.untrained()

        def run() -> _Answered:
            answered = self._answer(torch.zeros_like(self.v))
            differ = sum(a.text != b.text for a, b in zip(untrained.replies, answered.replies, strict=True))
            return replace(answered, details={"texts_that_differ": differ})

        return self._kept("zero", "zero", "v = 0 through the adapter path", run)

    def randoms(self, count: int, lengths: Sequence[float] = (1.0,)) -> list[Condition]:
        """Random vectors whose norms are `lengths` times the adapter's, in turn; details say which."""
        found = []
        for i, v in enumerate(random_vectors(self.v, count, self.runtime.config.train.seed, lengths)):
            label = random_label(i, lengths[i % len(lengths)])
            found.append(self._kept(f"random_{i}", "random", label, lambda v=v: self._answer(v)))  # type: ignore[misc]
        return found

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

        def vectors() -> Iterator[Tensor]:
            return random_vectors(self.v, count, self.runtime.config.train.seed + seed, lengths)

        def run() -> _Answered:
            tried = [self._trial(f"{name}, vector {i + 1} of {count}", v) for i, v in enumerate(vectors())]
            scores = [mean(one.replies, "strict") for one in tried]
            best = max(range(count), key=scores.__getitem__)
            details = {
                "vectors_tried": count, "lengths": lengths, "validation": scores, "chosen": best,
                "completions_allowed": completions,
            }  # fmt: skip
            answered = self._answer(next(islice(vectors(), best, None)))
            return replace(answered, details=details, trials=tuple(tried))

        return self._kept(name, name, f"best of {count} {what}, by validation", run)

    def best_prompt(self) -> Condition:
        """The untrained model under the best of the run's own prompt and the recipe's others, by validation."""
        candidates = prompt_candidates(self.runtime.config)

        def run() -> _Answered:
            tried = {name: self._trial(f"prompt {name!r}", None, prompt) for name, prompt in candidates.items()}
            scores = {name: mean(one.replies, "strict") for name, one in tried.items()}
            best = max(scores, key=lambda name: (scores[name], name == "own"))
            if best == "own":
                own = self.untrained()
                answered = _Answered(own.replies, own.account)
            else:
                answered = self._answer(None, prompt=candidates[best])
            details = {"prompt": best, "validation": scores}
            return replace(answered, details=details, trials=tuple(tried.values()))

        label = f"untrained model, best of {len(candidates)} prompts by validation"
        return self._kept("best_prompt", "best_prompt", label, run)

    def larger_budget(self) -> Condition:
        """The untrained model with BUDGET_FACTOR times the tokens: greedy, so only cut-off replies are made again."""
        untrained = self.untrained()
        cut = [i for i, reply in enumerate(untrained.replies) if not reply.stopped]
        tokens = larger_budget(self.runtime, [self.items[i] for i in cut]) if cut else BUDGET_FACTOR * self.budget

        def run() -> _Answered:
            replies = list(untrained.replies)
            details = {"max_new_tokens": tokens, "answered_again": len(cut)}
            if not cut:
                return _Answered(tuple(replies), untrained.account, details)
            again = self._answer(None, [self.items[i] for i in cut], max_new_tokens=tokens)
            for i, reply in zip(cut, again.replies, strict=True):
                replies[i] = reply
            return _Answered(tuple(replies), again.account, details, (untrained,))

        label = f"untrained model, {larger_budget_in_words(tokens, self.budget)}"
        return self._kept("larger_budget", "larger_budget", label, run)

    def constant(self) -> Condition:
        """The best constant reply: frequent train answers, bare and in the usual wrappings, chosen on validation."""

        def run() -> _Answered:
            answers = Counter(item.answer for item in self.task.items("train") if item.answer)
            replies = [form.format(answer=a) for a, _ in answers.most_common(CONSTANTS) for form in CONSTANT_FORMS] or [
                ""
            ]

            def scored(reply: str, items: Sequence[Item]) -> tuple[Reply, ...]:
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
        key = f"trained:{name}"
        if (found := self.store.get(key)) is not None and found.details.get("numbers_sha256") != digest:
            self.say(f"{label}: the answers that are there are of other numbers, and are made again")
            self.store.drop(key)
        return self._kept(
            key, "trained_control", label, lambda: replace(self._answer(v), details={"numbers_sha256": digest})
        )

    def _kept(self, name: str, kind: str, label: str, run: "Callable[[], _Answered]") -> Condition:
        """The stored condition of that name, or what `run` gives, which is stored in place of its trials."""
        condition = self.store.get(name) or self._made(name, kind, label, run)
        self._there.add(name)
        if self._bar is not None:
            self._bar.update(len(self._there))
        return condition

    def _made(self, name: str, kind: str, label: str, run: "Callable[[], _Answered]") -> Condition:
        self.say(f"{label}: {len(self.items):,} items")
        self._label = label
        answered = run()
        condition = Condition(
            name=name, kind=kind, label=label, replies=answered.replies, account=answered.account,
            details=answered.details,
        )  # fmt: skip
        condition = replace(condition, account=condition.plus(answered.trials)) if answered.trials else condition
        if trials := [one.name for one in answered.trials if one.kind == "trial"]:
            self.store.drop(*trials)
        self.store.put(condition)
        return condition

    def _trial(self, what: str, v: Tensor | None, prompt: Prompting | None = None) -> Condition:
        """Greedy answers to the validation items, stored until the condition that they decide on is."""
        name = f"trial: {what}"
        if (found := self.store.get(name)) is not None:
            return found
        self.say(f"  {what}, {len(self.validation):,} validation items")
        answered = self._answer(v, self.validation, prompt=prompt, who=what)
        trial = Condition(
            name=name, kind="trial", label=what, replies=answered.replies, account=answered.account,
            details={TRIAL: len(self.validation)},
        )  # fmt: skip
        self.store.put(trial)
        return trial

    def _answer(
        self,
        v: Tensor | None,
        items: Sequence[Item] | None = None,
        *,
        temperature: float = 0.0,
        max_new_tokens: int = 0,
        prompt: Prompting | None = None,
        who: str = "",
    ) -> "_Answered":
        config = self.runtime.config
        clock, cpu = time.perf_counter(), time.process_time()
        replies = self.runtime.answer(
            self.items if items is None else items, v, prompt=prompt, temperature=temperature, seed=config.train.seed,
            max_new_tokens=max_new_tokens, who=who or self._label,
        )  # fmt: skip
        cost = evaluation_account(
            replies, prompt_tokens=sum(reply.prompt_tokens for reply in replies), seconds=time.perf_counter() - clock,
            cpu_seconds=time.process_time() - cpu, parameters=self.parameters, device=config.model.device,
        )  # fmt: skip
        return _Answered(tuple(replies), cost)


@dataclass(frozen=True, slots=True)
class _Answered:
    """What answers a condition, and what else it took: trials, and conditions that it is made of."""

    replies: tuple[Reply, ...]
    account: Account
    details: dict[str, Any] = field(default_factory=dict)
    trials: tuple[Condition, ...] = ()


def random_vectors(v: Tensor, count: int, seed: int, lengths: Sequence[float] = (1.0,)) -> Iterator[Tensor]:
    """`count` vectors of uniformly random direction; their norms are `lengths`, taken in turn, times that of v.

    One at a time, as v may be all weights of a model.
    """
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    for index in range(count):
        direction = torch.randn(v.shape, generator=generator)
        yield (direction / direction.norm() * v.norm() * lengths[index % len(lengths)]).to(v.dtype)
