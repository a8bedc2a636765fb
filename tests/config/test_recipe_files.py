"""Every recipe that comes with tinylora: loads, comes back from its dump, and trains the counts that it promises."""

import math
import re
from pathlib import Path

import pytest
from torch import nn

from tinylora.adapter.attach import adapted_paths
from tinylora.adapter.grouping import num_groups
from tinylora.config.recipe import apply_overrides, load_recipe, recipe_name
from tinylora.config.run import RunConfig
from tinylora.config.schema import dump_config
from tinylora.planning.shapes import shape_model
from tinylora.rollouts.prompts import prompt_candidates
from tinylora.tasks.build import SCORERS
from tinylora.tasks.prompt import Prompt

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
NAMES = [path.stem for path in RECIPES]

# Table 2 of arXiv:2602.04118, Qwen2.5-7B | 3B, and (u, n_tie) as the counts decode.
TABLE_2 = {
    (1, 16): (13, 16),
    (1, 4): (49, 63),
    (1, 1): (196, 252),
    (2, 1): (392, 504),
    (32, 1): (6_272, 8_064),
    (512, 1): (100_352, 129_024),
}
PAPER = {"paper-qwen2.5-7b": 28, "paper-qwen2.5-3b": 36, "paper-llama-3.2-3b": 28}  # decoder blocks
SIZE_LINE = re.compile(r"^#\s+([\d,]+)\s+(--set .*)$", re.MULTILINE)


def num_trained(config: RunConfig, model: nn.Module) -> int:
    return num_groups(adapted_paths(model, config.adapter)[1], config.adapter) * config.adapter.u


@pytest.mark.parametrize("name", NAMES)
def test_recipe_loads_by_name_and_comes_back_from_its_dump(name: str, tmp_path: Path) -> None:
    config = load_recipe(name)
    path = tmp_path / "resolved.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_recipe(str(path)) == config


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe_begins_with_one_line_of_what_it_is(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert re.fullmatch(r"# .{20,150}\.", first)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_scorer_are_valid(name: str) -> None:
    config = load_recipe(name)
    asks = "Sort these numbers in ascending order: 1 + 2 =" if name == "sort-three" else "What is: 1 + 2 ="
    messages = Prompt(config.prompt).messages(asks)  # raises for a pattern or template that cannot work
    assert "1 + 2 =" in messages[-1]["content"]
    assert "own" in prompt_candidates(config)
    assert config.task.scorer in (*SCORERS, "reasoning-gym")
    if config.task.scorer == "boxed":
        asked = (config.prompt.system, config.prompt.template)
        alternatives = [(table.get("system", ""), table["template"]) for table in config.eval.prompts]
        # A raw string with one backslash too many would ask for \\boxed.
        assert all(re.search(r"(?<!\\)\\boxed\{\}", " ".join(pair)) for pair in [asked, *alternatives])


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipe_has_the_counts_of_table_2(name: str) -> None:
    blocks = PAPER[name]
    column = 0 if blocks == 28 else 1
    config = load_recipe(name)
    model, _ = shape_model(config.model)
    text = next(path for path in RECIPES if path.stem == name).read_text(encoding="utf-8")
    lines = SIZE_LINE.findall(text)
    counts = {}
    for count, flags in lines:
        sized = apply_overrides(config, [part.strip() for part in flags.split("--set") if part.strip()])
        adapter = sized.adapter
        assert num_trained(sized, model) == adapter.u * math.ceil(7 * blocks / adapter.n_tie)
        assert num_trained(sized, model) == int(count.replace(",", ""))
        counts[adapter.u, adapter.n_tie] = int(count.replace(",", ""))
    assert counts == {setting: both[column] for setting, both in TABLE_2.items()}
    assert num_trained(config, model) == int(lines[0][0])  # the file as it is gives the first


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipe_has_the_papers_settings(name: str) -> None:
    config = load_recipe(name)
    assert (config.adapter.rank, config.adapter.tying, config.adapter.basis) == (2, "tiled", "svd")
    assert (config.task.name, config.generation.max_new_tokens, config.generation.temperature) == ("gsm8k", 4096, 1.0)
    assert (config.grpo.group_size, config.grpo.kl_coef, config.grpo.prompts_per_step) == (4, 0.0, 16)
    assert config.grpo.prompts_per_step * config.grpo.group_size == 64
    assert config.train.steps == 3 * 7473 // 16
    assert config.eval.num_test == 1319


@pytest.mark.parametrize("name", ["gsm8k-0.5b", "gsm8k-0.5b.toml", "some.where/gsm8k-0.5b.toml"])
def test_a_point_in_a_recipes_name_stays_in_the_names_of_its_runs(name: str) -> None:
    assert recipe_name(name) == "gsm8k-0.5b"


@pytest.mark.parametrize(("name", "modules"), [("gsm8k-0.5b", 168), ("demo", 210)])
def test_small_recipes_train_thirteen_numbers(name: str, modules: int) -> None:
    config = load_recipe(name)
    model, _ = shape_model(config.model)
    assert len(adapted_paths(model, config.adapter)[1]) == modules
    assert num_trained(config, model) == 13
