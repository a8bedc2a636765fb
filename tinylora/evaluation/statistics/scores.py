"""Scores over several samples of one item, and how much a text repeats itself. Plain numbers in, plain numbers out."""

import re
from collections import Counter
from collections.abc import Sequence
from math import comb

from tinylora.errors import UserError


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al. 2021 (arXiv:2107.03374), equation 1; exact integers here instead of its product of floats.
    Raises: UserError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples or num_samples < 1:
        raise UserError(f"num_correct must be from 0 to {num_samples} (the samples), got {num_correct}")
    if not 1 <= k <= num_samples:
        raise UserError(f"pass@k needs k from 1 to {num_samples} (the samples of an item), got {k}")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def majority_correct(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """majority@k of one item: is the most frequent answer right? Answers that could not be read (None) do not vote.

    Of several most frequent answers one is taken to be drawn at random, so a tie counts by the share of right ones. An
    answer is right if its first sample is. No readable answer counts 0.
    Raises: UserError if the two differ in length or are empty.
    """
    if len(answers) != len(correct) or not answers:
        raise UserError(f"majority needs one verdict an answer, got {len(answers)} answers and {len(correct)} verdicts")
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    verdicts = [correct[answers.index(answer)] for answer, count in votes.items() if count == most]
    return sum(verdicts) / len(verdicts)


def repetition(text: str, size: int = 4) -> float:
    """Share of the text's word n-grams (`size` words) that stood in it before: 0 for none, near 1 for a loop.

    Words are what stands between white space; a single character over and over counts by characters. Short texts are 0.
    """
    words = text.split()
    if len(words) <= size and len(text) > 20 * size:
        words = re.findall(r"\S", text)
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0
