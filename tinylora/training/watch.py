"""An early word when a run cannot learn, while there is still time to change something. Plain numbers in, words out."""

import math
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

PATIENCE = 5
"""Steps in a row after which a word is said."""
NOISE_STEPS = 10
"""Steps whose p are looked at together: whether all of them could be noise."""


class Watch:
    """Looks at each step's metrics; says each thing once, and again only after it had gone away."""

    def __init__(self, max_logprob_gap: float, patience: int = PATIENCE, *, can_end: bool = True) -> None:
        """can_end: whether there is anything that ends a reply before its budget."""
        self._at_the_budget = (
            "raise generation.max_new_tokens"
            if can_end
            else "nothing ends a reply of this model: name its eos_token, or set generation.stop_strings"
        )
        self._gap_limit = max_logprob_gap
        self._patience = patience
        self._runs: dict[str, int] = {}
        self._p: deque[float] = deque(maxlen=NOISE_STEPS)

    def step(self, metrics: Mapping[str, Any]) -> list[str]:
        """Words about this step, most often none. Of a supervised step, only whether there was a reply to learn."""
        if "replies_trained" in metrics:
            word = (
                "not one sampled reply was right, so nothing is learned: try an easier task, a better prompt, a larger "
                "generation.temperature or grpo.group_size"
            )
            return self._said({"replies": not metrics["replies_trained"]}, {"replies": word})
        silent = metrics["zero_variance_groups"] >= 1.0
        found = {
            "signal": silent,
            "truncated": metrics["truncated"] > 0.9,
            "format": metrics["answered"] < 0.02,
            "gap": metrics.get("sampler_gap", 0.0) > self._gap_limit / 2,
        }
        words = {
            "signal": f"every reward of a prompt is the same, most lately {metrics['reward']:.2f} on average, so "
            "nothing is learned: "
            + (
                "the task is too easy for the model as it is"
                if metrics["reward"] > 0.9
                else "try an easier task, a better prompt, a larger generation.temperature or grpo.group_size"
            ),
            "truncated": f"{100 * metrics['truncated']:.0f} % of the completions were cut off at the token budget; "
            f"{self._at_the_budget}",
            "format": "next to no completion has the asked-for format; say in the prompt what is asked for, or choose "
            "another task.scorer",
            "gap": f"sampler and learner log-probs differ by {metrics.get('sampler_gap', 0.0):.3f} on average, more "
            "than half of what stops the run; model.dtype = float32 would bring them together",
        }
        return self._said(found, words) + self._noise(metrics)

    def _noise(self, metrics: Mapping[str, Any]) -> list[str]:
        """A word where the last steps together say no more than chance would, by Fisher's sum of log p."""
        if "signal_p" not in metrics:
            return []
        self._p.append(metrics["signal_p"])
        if len(self._p) < NOISE_STEPS or (p := together(self._p)) < 0.05:
            return []
        self._p.clear()
        return [
            f"the last {NOISE_STEPS} steps cannot be told from noise (p = {p:.2f} together): take more prompts a step, "
            "grpo.until_signal = true, an easier task, or stop here"
        ]

    def _said(self, found: Mapping[str, bool], words: Mapping[str, str]) -> list[str]:
        said = []
        for name, is_so in found.items():
            self._runs[name] = self._runs.get(name, 0) + 1 if is_so else 0
            if self._runs[name] == self._patience:
                said.append(f"{self._patience} steps in a row: {words[name]}")
        return said


def together(ps: Collection[float]) -> float:
    """p of several independent tests at once: -2 sum log p is chi-squared with 2 n degrees of freedom (Fisher 1925)."""
    half = -sum(math.log(p) for p in ps)
    term = total = 1.0
    for i in range(1, len(ps)):
        term *= half / i
        total += term
    return math.exp(-half) * total
