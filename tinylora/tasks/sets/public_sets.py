r"""The public sets that are known by name, their row formats and default prompts.

Mathematics: `question` (or the hub's `problem`) and `answer`, or a `solution` whose last \boxed{...} is it; GSM8K also
in its original form, whose answer is a solution that ends in "#### 42". BANKING77: `text`, `label`. RESTAURANTS-8K:
`text`, `slots`, `requested_slots`. IFEval: see `ifeval.py`. MBPP: see
`mbpp.py`.
"""

import json
import re
from difflib import get_close_matches
from functools import partial
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import Item, shorten
from tinylora.tasks.scorers.latex import last_boxed
from tinylora.tasks.sets import ifeval, mbpp, writing
from tinylora.tasks.sets.banking77_labels import LABELS
from tinylora.tasks.sets.jsonl import text_field
from tinylora.tasks.sets.public import Options, PublicSet, loose_text
from tinylora.tasks.sets.slots import SLOTS
from tinylora.tasks.split import question_id

BOXED = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
RESTAURANT = f"""A guest wrote this to a restaurant:
{{question}}

Give what the message says about the booking as one JSON object and nothing else. Allowed keys: {", ".join(SLOTS)}. \
Copy each value word for word from the message, leave out keys that it says nothing about, and write {{}} if it says \
nothing at all."""


def _rest(row: dict[str, Any], *used: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in used}


def _gsm8k(row: dict[str, Any], where: str, options: Options) -> Item:
    question = text_field(row, "question", where)
    solution, marker, final = text_field(row, "answer", where).rpartition("####")
    if not final.strip():
        raise UserError(f"{where}: no answer behind '####' in {shorten(row['answer'], 60)}")
    metadata = _rest(row, "question", "answer")
    if marker:
        metadata["solution"] = solution.strip()
    return Item(question_id(question), question, final.strip(), metadata)


SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
"""Of MATH, as its hub configurations are named; rows write them as "Counting & Probability"."""
LEVELS = (1, 2, 3, 4, 5)


def _mathematics(row: dict[str, Any], where: str, options: Options) -> Item:
    name = "problem" if "problem" in row and "question" not in row else "question"
    question = text_field(row, name, where)
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        row = {**row, "answer": str(int(answer)) if answer == int(answer) else str(answer)}
    elif answer is None and "solution" in row:
        solution = text_field(row, "solution", where)
        boxed = (last_boxed(solution) or "").strip()
        if not boxed:
            raise UserError(f"{where}: no 'answer', and no \\boxed{{...}} in the solution {shorten(solution, 60)}")
        row = {**row, "answer": boxed}
    return Item(question_id(question), question, text_field(row, "answer", where).strip(), _rest(row, name, "answer"))


def _check_part_of_math(name: str, options: Options) -> None:
    for option, known in (("levels", LEVELS), ("subjects", SUBJECTS)):
        chosen = options.get(option, known)
        if not isinstance(chosen, (list, tuple)) or not chosen:
            raise UserError(f"task.options.{option} must be a list, got {shorten(repr(chosen), 60)}")
        for one in chosen:
            if isinstance(one, bool) or one not in known:
                raise UserError(f"task.options.{option}: {one!r} is not among {', '.join(map(str, known))}")
    unknown = sorted(set(options) - {"levels", "subjects"})
    if unknown:
        raise UserError(f"task {name} has no option {unknown[0]!r}; it has: levels, subjects")


def _in_part_of_math(item: Item, options: Options) -> bool:
    """By `level` (5 or "Level 5"; "Level ?" is none of them) and `subject` or `type` ("Counting & Probability")."""
    row = item.metadata
    for option, names in (("levels", ("level",)), ("subjects", ("subject", "type"))):
        if option not in options:
            continue
        value = next((str(row[name]) for name in names if row.get(name) is not None), None)
        if value is None:
            raise UserError(
                f"task.options.{option} needs {' or '.join(map(repr, names))} in every row, and there is none beside "
                f"{shorten(item.question, 60)}; leave the option out"
            )
        plain = re.sub(r"[^a-z0-9]+", "_", value.lower().replace("&", "and")).strip("_")
        if plain.removeprefix("level_") not in [str(one) for one in options[option]]:
            return False
    return True


def chosen_labels(options: Options) -> tuple[str, ...]:
    """The labels of task.options.labels, in that order; all 77 where it is not set."""
    labels: tuple[str, ...] = tuple(options.get("labels", LABELS))
    return labels


def _check_labels(name: str, options: Options) -> None:
    unknown = sorted(set(options) - {"labels"})
    if unknown:
        raise UserError(f"task {name} has no option {unknown[0]!r}; it has: labels")
    labels = options.get("labels", LABELS)
    if not isinstance(labels, (list, tuple)) or not all(isinstance(label, str) for label in labels):
        raise UserError(f"task.options.labels must be a list of label names, got {shorten(repr(labels), 60)}")
    for label in labels:
        if label not in LABELS:
            close = get_close_matches(label, LABELS, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"there are {len(LABELS)}, such as {LABELS[0]}"
            raise UserError(f"task {name} has no label {label!r}; {hint}")
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise UserError(f"task.options.labels must name at least 2 labels, each once, got {list(labels)}")


def _banking77(row: dict[str, Any], where: str, options: Options) -> Item | None:
    text = text_field(row, "text", where)
    label = text_field(row, "label_text" if "label_text" in row else "label", where).strip()
    if label not in LABELS:
        raise UserError(f"{where}: {label!r} is no label of banking77")
    if label not in chosen_labels(options):
        return None
    return Item(question_id(text), text, label, _rest(row, "text", "label", "label_text"))


def _list_labels(options: Options) -> str:
    labels = "\n".join(chosen_labels(options))
    return (
        f"Labels:\n{labels}\n\nMessage of a bank's customer: {{question}}\n\n"
        "Answer with the label that fits best, alone."
    )


def _labels_in_prompt(text: str, options: Options) -> None:
    missing = [label for label in chosen_labels(options) if not re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text)]
    if missing:
        raise UserError(
            f"task banking77: the prompt does not list the label {missing[0]} ({len(missing)} are missing); put all "
            "labels, each as a word of its own, into prompt.template or prompt.system, or leave the prompt to the task"
        )


def _restaurant8k(row: dict[str, Any], where: str, options: Options) -> Item:
    text = text_field(row, "text", where)
    slots, asked = row.get("slots"), row.get("requested_slots", [])
    if not isinstance(slots, dict) or not all(isinstance(value, str) for value in slots.values()):
        raise UserError(f"{where}: 'slots' must be an object of texts, got {shorten(json.dumps(slots), 60)}")
    if not isinstance(asked, list) or not {*slots, *asked} <= set(SLOTS):
        raise UserError(f"{where}: 'slots' and 'requested_slots' must be among {', '.join(SLOTS)}")
    question = f"{text}\n(The restaurant had just asked for: {', '.join(dict.fromkeys(asked))}.)" if asked else text
    answer = json.dumps({name: slots[name] for name in SLOTS if name in slots}, ensure_ascii=False)
    return Item(question_id(question), question, answer, {**_rest(row, "slots"), "text": text})


_mathematics_set = partial(
    PublicSet, item=_mathematics, test_only=True, template=lambda options: BOXED, max_new_tokens=4096
)
_math_set = partial(
    _mathematics_set, licence="MIT; problems from the Art of Problem Solving", scorer="math-verify",
    check_options=_check_part_of_math, select=_in_part_of_math,
)  # fmt: skip
_MAA = "problems copyright of the Mathematical Association of America; the collection's code is MIT"

_ALL = (
    PublicSet(
        name="gsm8k", about="grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168)", licence="MIT",
        hub_id="openai/gsm8k", hub_config="main", item=_gsm8k, scorer="boxed", template=lambda options: BOXED,
        max_new_tokens=512,
    ),
    _math_set(
        name="math", about="MATH, competition problems of five levels (Hendrycks et al. 2021, arXiv:2103.03874)",
        hub_id="EleutherAI/hendrycks_math", hub_configs=SUBJECTS, test_only=False,
        same=lambda item: "".join(item.question.split()),
    ),
    _math_set(
        name="math500", about="500 test problems of MATH (Lightman et al. 2023, arXiv:2305.20050)",
        hub_id="HuggingFaceH4/MATH-500",
    ),
    _mathematics_set(
        name="aime24", about="AIME 2024 I and II", licence=_MAA, hub_id="HuggingFaceH4/aime_2024", hub_test="train",
        scorer="boxed",
    ),
    _mathematics_set(
        name="aime25", about="AIME 2025 I and II", licence=_MAA, hub_id="math-ai/aime25", scorer="boxed",
    ),
    _mathematics_set(
        name="amc23", about="40 problems of AMC 12 2023 with a number as answer", licence=_MAA,
        hub_id="math-ai/amc23", scorer="boxed",
    ),
    PublicSet(
        name="banking77", about="customers' messages to a bank, 77 intents (Casanueva et al. 2020, arXiv:2003.04807)",
        licence="CC BY 4.0", hub_id="mteb/banking77", item=_banking77, scorer="exact", template=_list_labels,
        max_new_tokens=32, same=lambda item: loose_text(item.question), check_options=_check_labels,
        check_prompt=_labels_in_prompt,
    ),
    PublicSet(
        name="restaurant8k", about="slots of a restaurant booking (Coope et al. 2020, arXiv:2005.08866)",
        licence="CC BY 4.0", item=_restaurant8k, scorer="slots", template=lambda options: RESTAURANT,
        max_new_tokens=96, same=lambda item: loose_text(item.metadata["text"]),
    ),
    PublicSet(
        name="ifeval", about="instructions that rules can check (Zhou et al. 2023, arXiv:2311.07911)",
        licence="CC BY 4.0", hub_id="google/IFEval", hub_test="train", test_only=True, item=ifeval.to_item,
        scorer="ifeval", max_new_tokens=1280,
    ),
    PublicSet(
        name="mbpp", about="short Python tasks with tests (Austin et al. 2021, arXiv:2108.07732)", licence="CC BY 4.0",
        hub_id="google-research-datasets/mbpp", hub_config="full", hub_train="prompt+train+validation",
        item=mbpp.to_item, scorer="python-tests", template=lambda options: mbpp.TEMPLATE, max_new_tokens=512,
        same=lambda item: loose_text(item.metadata["text"]),
    ),
)  # fmt: skip
PUBLIC: dict[str, PublicSet] = {public.name: public for public in _ALL}


HAVE_DEFAULTS = (*PUBLIC, "writing")
"""Tasks that bring a scorer, a prompt or a budget of their own."""


def fill_in(table: dict[str, Any]) -> dict[str, Any]:
    """A recipe's table with the defaults of the set (or generator) that its [task] names, for what it leaves out.

    A recipe that writes a scorer gets none of the set's scorer options, and one that writes a template or a system
    prompt none of the set's prompt.
    """
    task = table.get("task")
    if not isinstance(task, dict) or not isinstance(task.get("name"), str) or task["name"] not in HAVE_DEFAULTS:
        return table
    options = task.get("options", {})
    if task["name"] in PUBLIC:
        defaults = PUBLIC[task["name"]].defaults(options if isinstance(options, dict) else {})
    else:
        defaults = dict(writing.DEFAULTS)
    if "scorer" in task:
        defaults["task"] = {}
    if isinstance(table.get("prompt"), dict) and {"template", "system"} & set(table["prompt"]):
        defaults["prompt"] = {}
    filled = dict(table)
    for section, values in defaults.items():
        own = table.get(section, {})
        filled[section] = {**values, **own} if isinstance(own, dict) else own
    return filled
