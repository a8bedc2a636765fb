"""Recipes: what TOML says is what the dataclasses hold, every mistake is named, and a dump comes back exactly."""

import math
import random
import tomllib
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from tinylora.config.help import describe_fields
from tinylora.config.recipe import apply_overrides, load_recipe
from tinylora.config.run import EvalConfig, GenerationConfig, GrpoConfig, LogConfig, OptimConfig, RunConfig, TrainConfig
from tinylora.config.schema import diff_configs, dump_config
from tinylora.errors import UserError
from tinylora.tasks.config import PromptConfig, TaskConfig


def recipe(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(str(path), overrides)


def test_recipe_sets_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    got = recipe(
        tmp_path,
        """
        [adapter]
        num_groups = 13
        targets = ["q_proj", "*.mlp.*"]
        [task]
        options = {max_terms = 2, ops = ["+"]}
        [prompt]
        few_shot = [{question = "1+1", answer = "2"}]
        [reward]
        value_only = 1
        [optim]
        lr = 1
        """,
    )
    assert got.adapter.num_groups == 13
    assert got.adapter.targets == ("q_proj", "*.mlp.*")
    assert got.task.options == {"max_terms": 2, "ops": ["+"]}
    assert got.prompt.few_shot == ({"question": "1+1", "answer": "2"},)
    assert got.reward == {"value_only": 1.0}  # the table as written replaces the default one
    assert type(got.reward["value_only"]) is float
    assert type(got.optim.lr) is float
    assert {key.split(".")[0] for key, _, _ in diff_configs(RunConfig(), got)} == {
        "adapter", "task", "prompt", "reward", "optim",
    }  # fmt: skip
    assert recipe(tmp_path, "") == RunConfig()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[optm]\nlr = 1.0", ["unknown section 'optm'", "did you mean 'optim'", "generation"]),
        ("[optim]\nlearning = 1.0", ["unknown key 'learning'", "[optim]", "allowed: lr, beta1"]),
        ("[grpo]\ngroupsize = 4", ["'groupsize'", "[grpo]", "did you mean 'group_size'"]),
        ("lr = 1.0", ["unknown section 'lr'", "lr is a key of [optim]"]),
        ("optim = 3", ["optim must be a section", "lr", "got 3"]),
        ('[train]\nsteps = "ten"', ["train.steps must be a whole number", "'ten'"]),
        ("[train]\nsteps = 3.0", ["train.steps must be a whole number", "3.0"]),
        ("[train]\nsteps = true", ["train.steps must be a whole number", "True"]),
        ("[train]\ngradient_checkpointing = 1", ["train.gradient_checkpointing must be true or false", "got 1"]),
        ("[optim]\nlr = true", ["optim.lr must be a number", "True"]),
        ('[optim]\nlr = "1e-2"', ["optim.lr must be a number", "'1e-2'"]),
        ("[model]\nname = 3", ["model.name must be text", "got 3"]),
        ('[model]\ndevice = "gpu"', ["model.device must be one of auto, cpu, cuda, mps", "'gpu'"]),
        ('[train]\nkeep = "lst"', ["train.keep", "best, last", "did you mean 'last'"]),
        ('[adapter]\ntargets = "q_proj"', ["adapter.targets must be a list of text", "'q_proj'"]),
        ("[adapter]\ntargets = [1]", ["adapter.targets[0] must be text", "got 1"]),
        ("[prompt]\nfew_shot = [{question = 1}]", ["prompt.few_shot[0].question must be text"]),
        ('[reward]\nstrict = "1"', ["reward.strict must be a number"]),
        ("[task.options]\nday = 2020-01-01", ["task.options.day must be text, a number"]),
        ("[train]\nsteps = 3\nsteps = = 4\n", ["is not TOML", "line 3"]),
        ("[grpo]\ngroup_size = 1", ["grpo.group_size must be at least 2", "got 1"]),
        ("[adapter]\nu = 0", ["adapter.u must be at least 1", "got 0"]),
    ],
)
def test_each_mistake_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        recipe(tmp_path, text)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.toml does not exist"):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"is a folder.*config\.toml"):
        load_recipe(str(tmp_path / "folder"))
    (tmp_path / "latin.toml").write_bytes(b'[model]\nname = "\xe9"\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        load_recipe(str(tmp_path / "latin.toml"))


def test_bare_name_comes_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinylora.system.paths.recipes_dir", lambda: tmp_path)
    (tmp_path / "demo.toml").write_text("[train]\nsteps = 7")
    assert load_recipe("demo").train.steps == 7
    with pytest.raises(UserError, match="no recipe is named 'dmeo', did you mean 'demo'"):
        load_recipe("dmeo")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=2e-4", "optim.lr", 2e-4),
        ("optim.lr=1", "optim.lr", 1.0),
        ("train.steps = 7", "train.steps", 7),
        ("model.name=Qwen/Qwen2.5-0.5B-Instruct", "model.name", "Qwen/Qwen2.5-0.5B-Instruct"),
        ("model.name='a = b'", "model.name", "a = b"),
        ("model.revision=1234567", "model.revision", "1234567"),
        ("model.revision=12e5", "model.revision", "12e5"),
        ("model.revision=true", "model.revision", "true"),
        ("train.keep=last", "train.keep", "last"),
        ("model.trust_remote_code=true", "model.trust_remote_code", True),
        ('adapter.targets=["q_proj", "k_proj"]', "adapter.targets", ("q_proj", "k_proj")),
        ("task.options.max_terms=2", "task.options", {"max_terms": 2}),
        ("task.options.a.b=x y", "task.options", {"a": {"b": "x y"}}),
        ("reward.value_only=0.5", "reward", {"strict": 1.0, "value_only": 0.5}),
        ("reward={value_only = 2}", "reward", {"value_only": 2.0}),
        ("prompt.template={question}=?", "prompt.template", "{question}=?"),
    ],
)
def test_set_changes_one_setting(tmp_path: Path, override: str, key: str, value: object) -> None:
    got: Any = recipe(tmp_path, "", override)
    changed = {key for key, _, _ in diff_configs(RunConfig(), got)}
    assert changed
    assert all(name == key or name.startswith(f"{key}.") for name in changed)
    for part in key.split("."):
        got = getattr(got, part)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr", ["section.key=value", "'optim.lr'"]),
        ("=3", ["section.key=value"]),
        ("optim..lr=3", ["section.key=value"]),
        ("optim.rate=3", ["unknown key 'rate'", "[optim]", "allowed: lr"]),
        ("optm.lr=3", ["unknown section 'optm'", "did you mean 'optim'"]),
        ("optim.lr.x=3", ["optim.lr is not a table", "0.004"]),
        ("optim=3", ["optim is a section"]),
        ("train.steps=ten", ["train.steps must be a whole number", "'ten'"]),
        ("train.steps=[1", ["train.steps must be a whole number", "'[1'"]),
        ("train.steps=5\nseed = 4", ["train.steps must be a whole number"]),
        ("train.steps=0", ["train.steps must be at least 1", "got 0"]),
    ],
)
def test_set_mistakes_are_named(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        apply_overrides(RunConfig(), [override])
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_overrides_are_checked_together_and_the_last_one_counts() -> None:
    start = apply_overrides(RunConfig(), ["adapter.tying=structured"])
    both = apply_overrides(start, ["adapter.num_groups=13", "adapter.tying=tiled"])  # wrong one at a time in this order
    assert both.adapter.num_groups == 13
    assert apply_overrides(start, ["train.steps=3", "train.steps=4"]).train.steps == 4
    assert start.task.options is not apply_overrides(start, ["task.options.a=1"]).task.options
    assert start.task.options == {}


# --- round trip ---

TEXT = [
    "",
    "a",
    'quo"te',
    "new\nline\r\n",
    "tab\t",
    "\x00\x1f\x7f",
    "back\\slash",
    "ünïcode ☃ 🎲",
    "[x]",
    "'''",
    "a.b",
    "# no",
]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(TEXT) for _ in range(rng.randrange(4)))


def random_float(rng: random.Random) -> float:
    return rng.choice(
        [0.1, 5e-324, 1e22, 1e16, 123456789.123456789, 1 / 3, -0.0, rng.random() * 10 ** rng.randrange(-300, 300)]
    )


def random_any(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(6 if depth < 3 else 4)
    if kind == 4:
        return [random_any(rng, depth + 1) for _ in range(rng.randrange(3))]
    if kind == 5:
        return {random_text(rng): random_any(rng, depth + 1) for _ in range(rng.randrange(3))}
    return [rng.randrange(-(2**63), 2**63), random_float(rng), rng.random() < 0.5, random_text(rng)][kind]


def random_config(rng: random.Random) -> RunConfig:
    """Any value of every field's type that the range checks let pass: a field is tried until its section takes it."""

    def value(annotation: Any) -> Any:
        origin, args = get_origin(annotation), get_args(annotation)
        if annotation is Any:
            return random_any(rng)
        if annotation is bool:
            return rng.random() < 0.5
        if annotation is int:
            return rng.choice([0, 1, 2, 17, 2**40])
        if annotation is float:
            return rng.choice([rng.random(), abs(random_float(rng)), 1.0])
        if annotation is str:
            return random_text(rng)
        if origin is tuple and args[0] is str:
            return tuple(rng.sample(["tensorboard", "wandb", "trackio"], rng.randrange(4)))
        if origin is tuple:
            return tuple({"question": random_text(rng), "answer": random_text(rng)} for _ in range(rng.randrange(3)))
        if origin is dict:
            return {random_text(rng): value(args[1]) for _ in range(rng.randrange(3))}
        return rng.choice(args)

    def section(cls: Any) -> Any:
        built, hints = cls(), get_type_hints(cls)
        for f in fields(cls):
            for _ in range(5):
                try:
                    new = section(hints[f.name]) if is_dataclass(hints[f.name]) else value(hints[f.name])
                    built = replace(built, **{f.name: new})
                    break
                except UserError:
                    continue
        return built

    config: RunConfig = section(RunConfig)
    return config


def exact(value: Any) -> Any:
    """Tells -0.0 from 0.0 and 1.0 from 1 and True, which == does not. TOML keeps no order among a table's entries."""
    if is_dataclass(value):
        return {f.name: exact(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {k: exact(v) for k, v in value.items()}
    return [exact(v) for v in value] if isinstance(value, (list, tuple)) else repr(value)


def test_dump_then_load_is_exact(tmp_path: Path) -> None:
    rng = random.Random(0)
    touched: set[str] = set()
    for _ in range(300):
        config = random_config(rng)
        back = recipe(tmp_path, dump_config(config))
        assert back == config
        assert exact(back) == exact(config)
        assert diff_configs(config, back) == []
        touched |= {key for key, _, _ in diff_configs(RunConfig(), config)}
    # the generator reached nearly every setting (the ones with a single choice aside)
    untouched = {row.key for row in describe_fields()} - {
        t for key in touched for t in (key, ".".join(key.split(".")[:2]))
    }
    assert untouched <= {"generation.backend", "prompt.date", "prompt.template", "reward", "task.skip"}, untouched


def test_dump_holds_every_field() -> None:
    table = tomllib.loads(dump_config(RunConfig()))
    for section in fields(RunConfig):
        inner = getattr(RunConfig(), section.name)
        if is_dataclass(inner):
            assert set(table[section.name]) == {f.name for f in fields(inner)}


def test_dump_refuses_what_toml_cannot_hold() -> None:
    with pytest.raises(UserError, match=r"task\.options must hold"):
        dump_config(RunConfig(task=TaskConfig(options={"x": None})))


def test_diff_names_each_changed_setting() -> None:
    old = RunConfig()
    new = replace(
        old,
        optim=OptimConfig(lr=0.5),
        task=TaskConfig(options={"n": 2}),
        reward={"value_only": 1.0},
        log=LogConfig(trackers=("wandb",)),
    )
    assert diff_configs(old, new) == [
        ("task.options.n", None, 2),
        ("reward.strict", 1.0, None),
        ("reward.value_only", None, 1.0),
        ("optim.lr", 0.004, 0.5),
        ("log.trackers", [], ["wandb"]),
    ]


def test_help_has_a_row_for_every_setting() -> None:
    rows = {row.key: row for row in describe_fields()}
    assert rows["optim.lr"].help == "Adam's learning rate."
    assert rows["optim.lr"].default == "0.004"
    assert rows["model.device"].type == "one of auto, cpu, cuda, mps"
    assert rows["reward"].default == "{strict = 1.0}"
    assert rows["adapter.rank"].help.startswith("Singular directions")
    expected = []
    for section in fields(RunConfig):
        inner = getattr(RunConfig(), section.name)
        expected += [f"{section.name}.{f.name}" for f in fields(inner)] if is_dataclass(inner) else [section.name]
    assert list(rows) == expected
    for row in rows.values():  # a default, copied from the help, is accepted
        assert apply_overrides(RunConfig(), [f"{row.key}={row.default}"]) == RunConfig()


# --- ranges ---


@pytest.mark.parametrize(
    ("build", "key"),
    [
        (lambda: GrpoConfig(group_size=1), "grpo.group_size"),
        (lambda: GrpoConfig(prompts_per_step=0), "grpo.prompts_per_step"),
        (lambda: GrpoConfig(clip_low=1.5), "grpo.clip_low"),
        (lambda: GrpoConfig(kl_coef=-1.0), "grpo.kl_coef"),
        (lambda: GrpoConfig(refill_factor=math.nan), "grpo.refill_factor"),
        (lambda: GrpoConfig(refill_factor=math.inf), "grpo.refill_factor"),
        (lambda: GrpoConfig(importance_cap=0.5), "grpo.importance_cap"),
        (lambda: GrpoConfig(max_logprob_gap=0.0), "grpo.max_logprob_gap"),
        (lambda: OptimConfig(lr=-1e-3), "optim.lr"),
        (lambda: OptimConfig(lr=math.inf), "optim.lr"),
        (lambda: OptimConfig(lr=math.nan), "optim.lr"),
        (lambda: OptimConfig(beta2=1.0), "optim.beta2"),
        (lambda: OptimConfig(eps=0.0), "optim.eps"),
        (lambda: TrainConfig(steps=0), "train.steps"),
        (lambda: TrainConfig(seed=-1), "train.seed"),
        (lambda: GenerationConfig(temperature=0.0), "generation.temperature"),
        (lambda: GenerationConfig(max_new_tokens=0), "generation.max_new_tokens"),
        (lambda: EvalConfig(every=-1), "eval.every"),
        (lambda: EvalConfig(random_vectors=-1), "eval.random_vectors"),
        (lambda: TaskConfig(test_share=1.0), "task.test_share"),
        (lambda: TaskConfig(validation_share=-0.1), "task.validation_share"),
        (lambda: TaskConfig(validation_share=0.5, test_share=0.5), "task.validation_share + task.test_share"),
        (lambda: PromptConfig(template="solve it"), "prompt.template"),
        (lambda: PromptConfig(few_shot=({"question": "1+1"},)), "prompt.few_shot"),
        (lambda: LogConfig(trackers=("tensorbord",)), "log.trackers"),
        (lambda: RunConfig(reward={}), "reward"),
        (lambda: RunConfig(reward={"strict": math.nan}), "reward"),
        (lambda: RunConfig(reward={"strict": 0.0}), "reward"),
    ],
)
def test_values_out_of_range_are_refused(build: Any, key: str) -> None:
    with pytest.raises(UserError) as caught:
        build()
    assert str(caught.value).startswith(f"{key} must be ")
    assert ", got " in str(caught.value)
