"""Writing under rules that can be checked: how many words, lines or bullets, which words, how it begins and ends.

Items are made from a seed. The answer of an item is its rules as JSON, and every rule is a pure function of the reply.
`required` and `banned` are rules of content; the others are rules of form. Every item has required words, so an empty
reply never keeps all rules of content.
"""

import json
import random
import re
from collections.abc import Callable, Mapping
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import Item, shorten
from tinylora.tasks.scorers.text import Scorer
from tinylora.tasks.split import question_id
from tinylora.tasks.split_task import SplitItems, required_splits, split_by_hash

TOPICS = (
    "a walk in the rain", "a market in the morning", "an old bicycle", "the first snow", "a train journey",
    "a small garden", "moving house", "a lost key", "baking bread", "a storm at sea", "a quiet library",
    "learning to swim", "a night under the stars", "a football match", "a broken clock", "a visit to the dentist",
    "a street musician", "the end of summer", "a long queue", "a letter from far away",
)  # fmt: skip
WORDS = (
    "bridge", "window", "river", "silver", "paper", "candle", "mountain", "copper", "yellow", "garden", "winter",
    "pocket", "ladder", "forest", "mirror", "basket", "thunder", "island", "blanket", "feather", "harbour", "kitchen",
    "lantern", "meadow", "needle", "orange", "pepper", "quarter", "ribbon", "saddle", "teapot", "velvet", "whistle",
    "anchor", "bottle", "carpet", "dragon", "engine", "finger", "hammer",
)  # fmt: skip
OPENERS = ("today", "once", "nobody", "suddenly", "perhaps", "every", "sometimes", "finally")
CLOSERS = ("home", "again", "tomorrow", "together", "forever", "away", "alone", "enough")
CONTENT = ("required", "banned")
DEFAULTS: dict[str, dict[str, Any]] = {"task": {"scorer": "writing"}, "generation": {"max_new_tokens": 192}}
"""What a recipe that only names the task gets, for what it leaves out."""
MAX_DRAWS_PER_ITEM = 20


def words(text: str) -> list[str]:
    """The words of a text, in lower case: letters, digits, apostrophes and hyphens; the signs around them are none."""
    return re.findall(r"\w+(?:['’-]\w+)*", text.casefold())


def lines(text: str) -> list[str]:
    """Lines that are not blank, stripped."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def _whole_numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(n) is int and n >= 0 for n in value)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(word, str) and words(word) for word in value)


def _one_text(value: Any) -> bool:
    return isinstance(value, str) and len(words(value)) == 1


RULES: dict[str, tuple[Callable[[str, Any], bool], Callable[[Any], bool], Callable[[Any], str]]] = {
    "words": (
        lambda text, span: span[0] <= len(words(text)) <= span[1],
        lambda span: _whole_numbers(span, 2) and span[0] <= span[1],
        lambda span: f"Use {span[0]} to {span[1]} words in all.",
    ),
    "lines": (
        lambda text, count: len(lines(text)) == count,
        lambda count: _whole_numbers([count], 1),
        lambda count: f"Write exactly {count} lines.",
    ),
    "bullets": (
        lambda text, count: len(lines(text)) == count and all(re.match(r"[-*•] \S", line) for line in lines(text)),
        lambda count: _whole_numbers([count], 1),
        lambda count: f"Write exactly {count} bullet points and nothing else, each on a line that begins with '- '.",
    ),
    "required": (
        lambda text, wanted: set(map(str.casefold, wanted)) <= set(words(text)),
        _texts,
        lambda wanted: f"Use each of these words: {', '.join(wanted)}.",
    ),
    "banned": (
        lambda text, banned: not set(map(str.casefold, banned)) & set(words(text)),
        _texts,
        lambda banned: f"Do not use these words: {', '.join(banned)}.",
    ),
    "starts": (
        lambda text, word: words(text)[:1] == [word.casefold()],
        _one_text,
        lambda word: f"The first word is '{word}'.",
    ),
    "ends": (
        lambda text, word: words(text)[-1:] == [word.casefold()],
        _one_text,
        lambda word: f"The last word is '{word}'.",
    ),
    "lower": (
        lambda text, on: bool(words(text)) and text == text.lower(),
        lambda on: on is True,
        lambda on: "Write in lower case only.",
    ),
}
"""name -> (reply keeps the rule, the value is one that the rule can have, the rule in words)."""


def kept_rules(rules: Mapping[str, Any], text: str) -> dict[str, bool]:
    """Which of the rules a reply keeps."""
    return {name: RULES[name][0](text, value) for name, value in rules.items()}


class WritingScorer(Scorer):
    """strict: all rules are kept. value_only: all rules of content are. share: the share of the rules that are kept."""

    def parse(self, text: str) -> str | None:
        """The whole reply, or None if it is blank: what else the form is depends on the item."""
        return text.strip() or None

    def score_item(self, item: Item, text: str) -> dict[str, float]:
        """strict, value_only and share, as the class says."""
        kept = kept_rules(json.loads(item.answer), text.strip())
        content = all(ok for name, ok in kept.items() if name in CONTENT)
        return {
            "strict": float(all(kept.values())),
            "value_only": float(content),
            "share": sum(kept.values()) / len(kept),
        }

    def check_answer(self, answer: str) -> None:
        """Raises: UserError unless the answer is a JSON object of known rules, one of them of content."""
        try:
            rules = json.loads(answer)
        except (ValueError, RecursionError):
            rules = None
        if not isinstance(rules, dict) or not set(rules) & set(CONTENT):
            raise UserError(
                f"scorer writing: the answer {shorten(answer)} is no JSON object of rules with required or banned words"
            )
        for name, value in rules.items():
            if name not in RULES:
                raise UserError(f"scorer writing has no rule {name!r}; it has: {', '.join(RULES)}")
            if not RULES[name][1](value):
                raise UserError(f"scorer writing: the rule {name!r} cannot be {shorten(json.dumps(value), 60)}")


def draw_rules(rng: random.Random, allowed: tuple[str, ...], most: int) -> dict[str, Any]:
    """Rules that one reply can keep together: required words, and 1 to `most` - 1 others of those allowed."""
    picked = rng.sample(WORDS, 5)
    values: dict[str, Any] = {
        "words": [low := rng.randrange(20, 61, 5), low + rng.randrange(10, 31, 5)],
        "lines": rng.randint(2, 6),
        "bullets": rng.randint(2, 5),
        "banned": [*picked[3:], rng.choice(("very", "and", "but", "is"))],
        "starts": rng.choice(OPENERS),
        "ends": rng.choice(CLOSERS),
        "lower": True,
    }
    others = [name for name in allowed if name != "required"]
    if "lines" in others and "bullets" in others:  # a reply has one layout
        others.remove(rng.choice(("lines", "bullets")))
    chosen = set(rng.sample(others, min(len(others), rng.randint(1, max(1, most - 1)))))
    required = picked[: rng.randint(1, 3)]
    return {"required": required, **{name: values[name] for name in RULES if name in chosen}}


def load(
    options: Mapping[str, Any], num_items: int, seed: int, validation_share: float, test_share: float
) -> SplitItems:
    """At most `num_items` distinct items; equal arguments give equal items.

    options: `rules`, the names of rules to draw from (all), and `max_rules`, the most an item has (4).
    Raises: UserError for an unknown option or rule.
    """
    for option in options:
        if option not in ("rules", "max_rules"):
            raise UserError(f"task writing has no option {option!r}; it has: rules, max_rules")
    allowed, most = options.get("rules", list(RULES)), options.get("max_rules", 4)
    if not isinstance(allowed, (list, tuple)) or not set(allowed) - {"required"} <= set(RULES):
        raise UserError(f"task.options.rules must be a list of {', '.join(RULES)}, got {shorten(repr(allowed), 80)}")
    if not set(allowed) - {"required"}:
        raise UserError("task.options.rules needs a rule beside required, which every item has")
    if type(most) is not int or most < 2:
        raise UserError(f"task.options.max_rules must be a whole number of at least 2, got {most!r}")
    rng = random.Random(f"writing:{seed}")
    items: dict[str, Item] = {}
    repeats = 0
    for _ in range(MAX_DRAWS_PER_ITEM * num_items):
        if len(items) == num_items:
            break
        rules = draw_rules(rng, tuple(dict.fromkeys(allowed)), most)
        said = "\n".join(f"- {RULES[name][2](value)}" for name, value in rules.items())
        question = f"Write a short text about {rng.choice(TOPICS)}. Keep to these rules:\n{said}"
        item = Item(question_id(question), question, json.dumps(rules))
        repeats += item.id in items
        items.setdefault(item.id, item)
    splits = split_by_hash(list(items.values()), validation_share, test_share)
    return SplitItems(splits, repeats, required=required_splits(validation_share, test_share))
