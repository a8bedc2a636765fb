"""Module order, targets and tie groups against counts of the paper and cases solved by hand."""

import random

import pytest

from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.grouping import canonical_order, num_groups, select_targets, settings_for_count, tie_groups
from tinylora.errors import UserError

# Within a block as the published order has them, with where they stand in a Llama or Qwen block.
TYPES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def block_paths(layers: int) -> list[str]:
    part = {kind: "self_attn" if kind in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp" for kind in TYPES}
    return [f"model.layers.{layer}.{part[kind]}.{kind}" for layer in range(layers) for kind in TYPES]


QWEN_7B, QWEN_3B, SMOLLM2 = block_paths(28), block_paths(36), block_paths(30)


@pytest.mark.parametrize(
    ("paths", "modules", "n_tie", "groups"),
    [(QWEN_7B, 196, 16, 13), (QWEN_3B, 252, 16, 16), (SMOLLM2, 210, 17, 13), (SMOLLM2, 210, 16, 14)],
)
def test_tiled_counts_of_real_shapes(paths: list[str], modules: int, n_tie: int, groups: int) -> None:
    assert len(paths) == modules
    config = AdapterConfig(n_tie=n_tie)
    assert num_groups(paths, config) == groups
    found = tie_groups(paths, config)
    assert found == sorted(found)
    assert [found.count(group) for group in range(groups - 1)] == [n_tie] * (groups - 1)
    assert found.count(groups - 1) == modules - n_tie * (groups - 1)


@pytest.mark.parametrize(("layers", "n_tie", "per_type"), [(28, 16, 2), (36, 16, 3), (30, 30, 1), (30, 1, 30)])
def test_structured_counts_are_seven_times_the_chunks_of_a_type(layers: int, n_tie: int, per_type: int) -> None:
    paths = block_paths(layers)
    config = AdapterConfig(tying="structured", n_tie=n_tie)
    assert num_groups(paths, config) == 7 * per_type
    for path, group in zip(paths, tie_groups(paths, config), strict=True):
        layer, kind = int(path.split(".")[2]), path.split(".")[-1]
        assert group == TYPES.index(kind) * per_type + layer // n_tie


def test_full_tying_is_one_group_and_no_tying_one_each() -> None:
    assert tie_groups(QWEN_7B, AdapterConfig(tying="all")) == [0] * 196
    assert tie_groups(QWEN_7B, AdapterConfig(tying="none")) == list(range(196))
    assert num_groups([], AdapterConfig()) == 0


@pytest.mark.parametrize("paths", [QWEN_7B, QWEN_3B, SMOLLM2])
def test_thirteen_even_chunks(paths: list[str]) -> None:
    found = tie_groups(paths, AdapterConfig(num_groups=13))
    sizes = [found.count(group) for group in range(13)]
    assert found == sorted(found)
    assert sum(sizes) == len(paths)
    assert max(sizes) - min(sizes) <= 1


def test_order_is_by_numeric_layer_and_published_type_whatever_the_registration() -> None:
    paths = block_paths(12)
    for seed in range(5):
        shuffled = paths.copy()
        random.Random(seed).shuffle(shuffled)
        assert canonical_order(shuffled) == paths
        assert select_targets([*shuffled, "lm_head"], ["all-linear"], "lm_head") == paths
    assert paths.index("model.layers.10.self_attn.q_proj") > paths.index("model.layers.9.mlp.down_proj")


def test_unlisted_types_follow_the_listed_ones_by_name_and_then_by_path() -> None:
    paths = ["h.1.attn.c_attn", "h.0.b.c_proj", "h.0.a.c_proj", "h.0.a.c_fc", "h.0.a.down_proj", "embed_out"]
    assert canonical_order(paths) == [
        "embed_out",
        "h.0.a.down_proj",
        "h.0.a.c_fc",
        "h.0.a.c_proj",
        "h.0.b.c_proj",
        "h.1.attn.c_attn",
    ]


def test_targets_by_suffix_glob_and_all_linear() -> None:
    paths = [*block_paths(11), "lm_head"]
    assert select_targets(paths, ["q_proj"], "lm_head") == [f"model.layers.{i}.self_attn.q_proj" for i in range(11)]
    assert select_targets(paths, ["mlp.up_proj"], "lm_head") == [f"model.layers.{i}.mlp.up_proj" for i in range(11)]
    glob = select_targets(paths, ["model.layers.1.mlp.*"], "lm_head")
    assert glob == [f"model.layers.1.mlp.{kind}" for kind in ("gate_proj", "up_proj", "down_proj")]
    assert "lm_head" not in select_targets(paths, ["all-linear"], "lm_head")
    assert "lm_head" in select_targets(paths, ["all-linear", "lm_head"], "lm_head")
    assert len(select_targets(paths, ["q_proj", "*.q_proj"], "lm_head")) == 11  # named twice, adapted once


def test_a_suffix_ends_at_a_dot() -> None:
    assert select_targets(["a.proj", "a.q_proj"], ["proj"], None) == ["a.proj"]


def test_a_target_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"\['qproj', 'x\.\*'\] match no linear map; this model has 196, e\.g\. 'model"):
        select_targets(QWEN_7B, ["qproj", "q_proj", "x.*"], None)
    with pytest.raises(UserError, match="tinylora inspect MODEL"):
        select_targets(["lm_head"], ["all-linear"], "lm_head")


def test_more_groups_than_modules_are_refused_with_the_nearest_count() -> None:
    with pytest.raises(UserError, match="num_groups 8 exceeds the 7 adapted modules; the nearest count is 7"):
        tie_groups(block_paths(1), AdapterConfig(num_groups=8))


@pytest.mark.parametrize("count", [1, 2, 13, 50, 99, 195, 196])
@pytest.mark.parametrize("u", [1, 4])
def test_settings_for_count_train_exactly_that_many(count: int, u: int) -> None:
    config = settings_for_count(QWEN_7B, count * u, u)
    assert num_groups(QWEN_7B, config) * config.u == count * u


def test_settings_for_count_prefers_n_tie() -> None:
    assert settings_for_count(QWEN_7B, 13).n_tie == 16
    assert settings_for_count(SMOLLM2, 13).n_tie == 17
    assert settings_for_count(QWEN_7B, 99).num_groups == 99  # ceil(196 / 1) = 196 and ceil(196 / 2) = 98


@pytest.mark.parametrize(("count", "u", "nearest"), [(0, 1, 1), (211, 1, 210), (13, 4, 12), (1000, 4, 840), (1, 3, 3)])
def test_an_unreachable_count_names_the_nearest(count: int, u: int, nearest: int) -> None:
    with pytest.raises(UserError, match=f"trains {count} numbers; the nearest count is {nearest}$"):
        settings_for_count(SMOLLM2, count, u)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "adapter.rank must be at least 1, got 0"),
        ({"u": 0}, "adapter.u must be at least 1"),
        ({"n_tie": -1}, "adapter.n_tie must be at least 1"),
        ({"num_groups": -1}, "adapter.num_groups must be 0"),
        ({"tying": "tile"}, "adapter.tying must be one of tiled, structured, all, none, got 'tile'"),
        ({"tying": "all", "num_groups": 13}, "adapter.num_groups needs tying 'tiled', got 'all'"),
        ({"basis": "qr"}, "adapter.basis must be one of svd, random, sketch"),
        ({"targets": ()}, "adapter.targets must name"),
        ({"targets": ("",)}, "adapter.targets must name"),
        ({"seed": -1}, "adapter.seed must be at least 0"),
    ],
)
def test_a_config_out_of_range_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdapterConfig(**values)  # type: ignore[arg-type]
