"""The inputs of bench/trust/robustness.py, a file a theme; each begins with the point that it is an instance of."""

from bench.trust.robustness_cases import (  # noqa: F401 (each puts its inputs on the list)
    bounds,
    chat_templates,
    codes,
    data_files,
    gold_answers,
    hostile_text,
    kernel_cache,
    models,
    outputs,
    places,
    recipes,
    records,
    scores,
    signals,
    strangers,
    text,
)
from bench.trust.robustness_cases.inputs import INPUTS

__all__ = ["INPUTS"]
