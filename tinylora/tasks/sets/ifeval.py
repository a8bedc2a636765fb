"""IFEval (Zhou et al. 2023, arXiv:2311.07911): prompts with instructions that rules can check.

The rules are those of lm-evaluation-harness, which keeps Google's up (`pip install 'tinylora[ifeval]'`); nothing of
them is copied here. Rows have `prompt`, `instruction_id_list` and, for each instruction, `kwargs`; any JSONL task whose
rows have them can be scored, too. nltk's data punkt_tab must be on the machine: nothing is fetched behind your back.
"""

import importlib
import random
from functools import cache
from typing import Any

from tinylora.errors import UserError
from tinylora.tasks.base import Item, shorten
from tinylora.tasks.scorers.text import Scorer
from tinylora.tasks.sets.jsonl import text_field
from tinylora.tasks.sets.public import Options
from tinylora.tasks.split import question_id

CHECKER = "lm_eval.tasks.ifeval.utils"
FETCH_DATA = "python -m nltk.downloader punkt_tab"


def to_item(row: dict[str, Any], where: str, options: Options) -> Item:
    """One row; there is no gold answer."""
    prompt = text_field(row, "prompt", where)
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(names, list) or not isinstance(arguments, list) or not names or len(names) != len(arguments):
        raise UserError(f"{where}: 'instruction_id_list' and 'kwargs' must be lists of equal length, one at least")
    return Item(question_id(prompt), prompt, "", {key: value for key, value in row.items() if key != "prompt"})


class IfevalScorer(Scorer):
    """strict: all instructions are followed (prompt-level strict). value_only: they are if asterisks, the first or the
    last line are taken off (prompt-level loose). instructions, instructions_loose: the shares that are followed; their
    mean over prompts is not the benchmark's instruction-level accuracy, which weighs a prompt by its instructions.
    """

    needs_answer = False

    def __init__(self) -> None:
        self._rules = _rules()

    def parse(self, text: str) -> str | None:
        """The whole reply, or None if it is blank."""
        return text.strip() or None

    def reads(self, item: Item) -> Any:
        """The instructions and their arguments."""
        return [item.metadata.get(name) for name in ("instruction_id_list", "kwargs")]

    def score_item(self, item: Item, text: str) -> dict[str, float]:
        """Raises: UserError for an item without instructions or with an unknown one."""
        names = item.metadata.get("instruction_id_list")
        if not names or "kwargs" not in item.metadata:
            raise UserError("scorer ifeval needs 'instruction_id_list' and 'kwargs' beside the question")
        known = self._rules.instructions_registry.INSTRUCTION_DICT
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"scorer ifeval knows no instruction {shorten(str(unknown[0]), 60)}")
        state = random.getstate()
        random.seed(0)  # a rule without arguments draws some: the same text must get the same scores
        try:
            found = self._rules.process_results({"key": 0, **item.metadata, "prompt": item.question}, [text])
        finally:
            random.setstate(state)
        strict, loose = found["inst_level_strict_acc"], found["inst_level_loose_acc"]
        return {
            "strict": float(found["prompt_level_strict_acc"]),
            "value_only": float(found["prompt_level_loose_acc"]),
            "instructions": sum(strict) / len(strict),
            "instructions_loose": sum(loose) / len(loose),
        }


@cache
def _rules() -> Any:
    """The harness's module. It would fetch punkt_tab itself while it is imported, hence the look before.

    Raises: UserError if a package, or nltk's data, is missing.
    """
    try:
        nltk_data = importlib.import_module("nltk.data")
        langdetect = importlib.import_module("langdetect")
        try:
            nltk_data.find("tokenizers/punkt_tab")
        except LookupError as error:
            raise UserError(
                f"scorer ifeval needs nltk's data punkt_tab, which is not on this machine; run {FETCH_DATA}, "
                "or copy the folder and set NLTK_DATA to what holds tokenizers/punkt_tab"
            ) from error
        rules = importlib.import_module(CHECKER)
    except ImportError as error:
        raise UserError(
            f"scorer ifeval needs the rules of lm-evaluation-harness ({error}); run pip install 'tinylora[ifeval]'"
        ) from error
    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    return rules
