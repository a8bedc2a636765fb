"""A model card: what was trained, on what, what it gained against which controls, what it cost, and how to load it.

Names and texts in it may be a stranger's. In the front matter and in lines of Python stands only what has the form of a
hub id, a revision or a licence; everywhere else `_text` takes from them what Markdown and HTML would follow.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinylora.adapter.code import fits_a_code, to_code
from tinylora.adapter.portable import PortableAdapter
from tinylora.errors import UserError
from tinylora.evaluation.lengths import randoms_in_words
from tinylora.evaluation.recount import LACKS, by_condition, lacks, recount_result
from tinylora.models.bases import read_name
from tinylora.models.names import HUB_ID
from tinylora.store.adapter import Adapter
from tinylora.system.jsonl import read_jsonl
from tinylora.system.reading import MOST_DATA_BYTES
from tinylora.system.strict_json import read_json
from tinylora.talk import one_line, shell_line

UNKNOWN_LICENCE = "other"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,99}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
MEASURED = {"primary", "value_only", "sampled", "best_prompt", "larger_budget", "random", "verdict"}
"""Keys of a result.json that a card shows the measures of."""


def model_card(
    adapter: Adapter, portable: PortableAdapter | None, *, base_name: str, licence: str = "", run: Path | None = None
) -> str:
    """README.md of an adapter's folder. What is not known is said to be unknown, never made up.

    run: the run folder, whose result.json and metrics.jsonl fill in the measures and the cost.
    """
    result = _read_result(run, adapter) if run else None
    settings = adapter.run
    task = settings.task.name if settings else ""
    repository, revision, quantization = ("", "", "none") if _is_local(base_name) else read_name(base_name)
    if settings is not None and settings.model.name == repository:
        revision, quantization = revision or settings.model.revision, settings.model.quantization
    shown = Path(base_name).name if _is_local(base_name) else repository  # where it lay is nobody's business
    lines = [
        "---",
        *([f"base_model: {repository}"] if HUB_ID.fullmatch(repository) else []),
        "library_name: tinylora",
        f"license: {licence if _LICENCE.fullmatch(licence) else UNKNOWN_LICENCE}",
        "pipeline_tag: text-generation",
        "tags:",
        "- tinylora",
        "- reinforcement-learning",
        "---",
        "",
        f"# {adapter.v.numel():,} numbers for {_text(shown)}",
        "",
        _what_it_is(adapter),
        "",
    ]
    if portable is not None:
        data = portable.to_bytes()
        if fits_a_code(data):
            lines += [f"The file has {len(data)} bytes. The same as text:", "", "```", to_code(data), "```", ""]
        else:
            lines += [f"The file has {len(data)} bytes.", ""]
        lines += _how_to_load(repository if quantization == "none" else "", revision)
    lines += ["## What was trained", ""]
    lines += _training(adapter, shown, licence)
    lines += ["", "## What it changed", ""]
    lines += _measures(result, task)
    lines += ["", "## What it cost", ""]
    lines += _cost(run, result)
    return "\n".join(lines) + "\n"


def _what_it_is(adapter: Adapter) -> str:
    count = f"An adapter of {adapter.v.numel():,} trained numbers (|v| = {float(adapter.v.norm()):.3g})"
    if adapter.method.name != "tinylora":
        return f"{count}: {adapter.method.describe()}."
    rebuilt = "everything else is rebuilt from the base model and a seed"
    if adapter.explicit is not None:
        rebuilt = "it brings its factors along"
    return f"{count}; {rebuilt}: W' = W + U diag(S) (sum_i v_i P_i) V^T (Morris et al. 2026, arXiv:2602.04118)."


def _text(text: str) -> str:
    """A name or another text within a line: on one line, and nothing in it is markup, a link or HTML."""
    plain = re.sub(r"([\\`*<>\[\]|&~$])", r"\\\1", one_line(text, 300))
    return re.sub(r"(?i)(https?|ftp|www|mailto)(?=[:.])", r"\1\\", plain).replace("@", "\\@")


def _is_local(name: str) -> bool:
    return name.startswith(("/", ".", "~")) or name.endswith(".gguf") or Path(name).exists()


def _how_to_load(repository: str, revision: str) -> list[str]:
    # The embedded model, a folder, a GGUF file, a quantised base, a name of no known form: tinylora says what to do.
    if not HUB_ID.fullmatch(repository) or not (revision == "" or _REVISION.fullmatch(revision)):
        return ["```", "tinylora chat adapter.tinylora", "```", ""]
    at = f', revision="{revision}"' if revision else ""
    return [
        "```python",
        "from transformers import AutoModelForCausalLM",
        "import tinylora",
        f'model = AutoModelForCausalLM.from_pretrained("{repository}"{at})',
        'tinylora.load_adapter(model, "adapter.tinylora")',
        "```",
        "",
    ]


def _training(adapter: Adapter, base_name: str, licence: str) -> list[str]:
    settings, config = adapter.run, adapter.config
    lines = [
        f"- Base: {_text(base_name)}" + (f", fingerprint {adapter.fingerprint.hex()}" if adapter.fingerprint else "")
    ]
    if settings is not None and settings.model.revision:
        lines.append(f"- Revision of the base: {_text(settings.model.revision)}")
    lines.append(f"- Licence of the base: {_text(licence) or 'not stated here; see the base model'}")
    if adapter.method.name != "tinylora":
        lines.append(f"- Method: {adapter.method.describe()}, {adapter.v.numel():,} numbers")
    elif config is not None:
        lines.append(
            f"- Adapter: rank {config.rank}, u = {config.u}, {config.sharing(adapter.v.shape[0])}, targets "
            f"{_text(', '.join(config.targets))}, basis {config.basis}, seed {config.seed}"
        )
    elif adapter.explicit is not None:
        lines.append(f"- Adapter with factors of its own: {_text(adapter.explicit.origin)}")
    if settings is None:
        lines.append("- How it was trained is not recorded in the adapter.")
        return lines
    scores = ", ".join(f"{weight:g} x {_text(name)}" for name, weight in settings.reward.items())
    lines += [
        f"- Task: {_text(settings.task.name)}; reward {scores}",
        f"- GRPO: {settings.grpo.prompts_per_step} prompts x {settings.grpo.group_size} completions a step, "
        f"{settings.train.steps} steps, {settings.pace()}, temperature "
        f"{settings.generation.temperature:g}, at most {settings.generation.max_new_tokens} tokens",
        f"- Training seed {settings.train.seed}",
    ]
    return lines


def _measures(result: Mapping[str, Any] | None, task: str) -> list[str]:
    if result is None:
        return ["Not measured: there is no final evaluation of this adapter."]
    if not set(result) >= MEASURED:
        return ["Not measured: its result.json is of another version."]
    primary, of_task = result["primary"], f" of {_text(task)}" if task else ""
    rows = [
        ("greedy, strict (the measure declared beforehand)", primary["text"]),
        ("greedy, value only", result["value_only"]["text"]),
        ("sampled, strict", result["sampled"]["text"]),
        ("untrained with the best prompt found, against trained", result["best_prompt"]["against_tuned"]["text"]),
        ("untrained with a larger token budget, against trained", result["larger_budget"]["against_tuned"]["text"]),
    ]
    return [
        f"On {primary['base']['total']:,} held-out items{of_task}, untrained and trained on the same items; 95 % "
        "intervals, p by exact McNemar.",
        "",
        "| measure | result |",
        "| --- | --- |",
        *[f"| {name} | {text} |" for name, text in rows],
        f"| random vectors | {randoms_in_words(result['random']) or 'none tried'} |",
        "",
        str(result["verdict"]),
    ]


def _read_result(run: Path, adapter: Adapter) -> dict[str, Any] | None:
    """The run's result.json, counted again from its items. Raises: UserError where it is of other numbers than the
    adapter, or says otherwise than its items."""
    path = run / "result.json"
    result = _read_json(path)
    if result is None or not set(result) >= MEASURED:
        return result
    try:
        found = recount_result(result, by_condition(read_jsonl(run / "result_items.jsonl")))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except LACKS as error:
        raise UserError(f"{path} {lacks(error)}: it is damaged, or of another version; remove it") from error
    count, norm = adapter.v.numel(), float(adapter.v.double().norm())
    said = found.get("v_norm", norm)
    if found["trained_numbers"] != count or not math.isclose(said, norm, rel_tol=1e-4, abs_tol=1e-9):
        raise UserError(
            f"{path} is of other numbers than the adapter ({found['trained_numbers']} of norm {said:.4g} there, "
            f"{count} of norm {norm:.4g} here); go on with: {shell_line('tinylora', 'train', '--resume', run)}, or "
            "remove the file"
        )
    return found


def _cost(run: Path | None, result: Mapping[str, Any] | None) -> list[str]:
    rows = read_jsonl(run / "metrics.jsonl") if run else []
    sampled = sum(int(_number(row.get("tokens_sampled"))) for row in rows)
    if not rows or not sampled:
        return ["Not recorded."]
    environment = _read_json(run / "environment.json") if run else None
    seconds = sum(_number(row.get("seconds")) for row in rows)
    machine = (environment or {}).get("cpu") or (environment or {}).get("processor") or ""
    steps = sum("tokens_sampled" in row for row in rows)
    lines = [f"- {sampled:,} tokens sampled in {steps} steps, {seconds / 60:.1f} minutes of training"]
    if result is not None and "seconds" in result:
        lines.append(f"- with the final evaluation {_number(result['seconds']) / 60:.1f} minutes")
    if machine:
        lines.append(f"- on {_text(str(machine))}")
    return lines


def _number(value: object) -> float:
    """A number of a file; 0 for what is none."""
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return float(value) if is_number else 0.0  # type: ignore[arg-type]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not os.path.lexists(path):
        return None
    found = read_json(path, "mend it, or remove it", MOST_DATA_BYTES)
    return found if isinstance(found, dict) else None
