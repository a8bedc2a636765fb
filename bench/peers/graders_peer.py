"""The peer process of bench/trust/graders.py: lm-evaluation-harness's own verdicts on replies.

python graders_peer.py JOB.json        (an interpreter with lm-eval[math]; see README.md)

gsm8k's filters and exact match are taken from the task file that is installed. The checks of minerva_math and
hendrycks_math are given the last box of a reply, found by their own function, because their tasks ask for other formats
("Final Answer: The final answer is ...", dollars). What cannot be imported is left out of the verdicts.
"""

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import yaml


def gsm8k(name: str) -> Callable[[str, str], bool]:
    import lm_eval
    import lm_eval.filters
    from lm_eval.api.metrics import exact_match_fn
    from lm_eval.api.registry import get_filter

    config = yaml.safe_load((Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml").read_text())
    (metric,) = config["metric_list"]
    settings = {key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore")}
    (steps,) = (one["filter"] for one in config["filter_list"] if one["name"] == name)

    def verdict(answer: str, text: str) -> bool:
        replies = [[text]]
        for step in steps:
            options = {key: value for key, value in step.items() if key != "function"}
            replies = list(get_filter(step["function"])(**options).apply(replies, [{}]))
        target = f"Some solution.\n#### {answer}"  # what a row of the data set has as answer
        return bool(exact_match_fn(references=[target], predictions=[replies[0]], **settings)["exact_match"])

    return verdict


def hendrycks() -> Callable[[str, str], bool]:
    utils = importlib.import_module("lm_eval.tasks.hendrycks_math.utils")

    def verdict(answer: str, text: str) -> bool:
        box = utils.last_boxed_only_string(text)
        return box is not None and bool(utils.is_equiv(utils.remove_boxed(box), answer))

    return verdict


def minerva() -> Callable[[str, str], bool]:
    utils = importlib.import_module("lm_eval.tasks.minerva_math.utils")

    def verdict(answer: str, text: str) -> bool:
        box = utils.last_boxed_only_string(text)
        if box is None:
            return False
        given = utils.normalize_final_answer(utils.remove_boxed(box))
        return bool(utils.is_equiv(given, utils.normalize_final_answer(answer)))

    return verdict


GRADERS = {
    "lm-eval gsm8k strict-match": lambda: gsm8k("strict-match"),
    "lm-eval gsm8k flexible-extract": lambda: gsm8k("flexible-extract"),
    "lm-eval hendrycks_math on the box": hendrycks,
    "lm-eval minerva_math on the box": minerva,
}


def main() -> None:
    outputs = json.loads(Path(sys.argv[1]).read_text())
    verdicts, left_out = {}, {}
    with contextlib.redirect_stdout(io.StringIO()):
        import lm_eval  # noqa: F401 (its absence ends this process with a message that the caller knows)

        for name, make in GRADERS.items():
            try:
                grade = make()
            except (ImportError, AssertionError) as error:
                left_out[name] = str(error).splitlines()[0]
                continue
            verdicts[name] = []
            for one in outputs:
                try:
                    verdicts[name].append(grade(one["answer"], one["text"]))
                except AssertionError:  # hendrycks' and minerva's remove_boxed, on \\fbox: there it ends the evaluation
                    verdicts[name].append("AssertionError")
    print(json.dumps({"verdicts": verdicts, "left_out": left_out, "version": version("lm_eval")}))


if __name__ == "__main__":
    main()
