"""Which modules share a vector, and in which order modules stand. Plain Python: no tensors, no device.

Order (published in docs/format.md): by numeric layer, then by type (q, k, v, o, gate, up, down, then every other type
by name), then by path. Never by registration order, which differs between model classes and library versions.
"""

import fnmatch
import math
import re
from collections.abc import Iterable, Sequence

from tinylora.adapter.config import AdapterConfig
from tinylora.errors import UserError

TYPE_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer_index(path: str) -> int:
    """First purely numeric component of a module path: `model.layers.10.mlp.up_proj` -> 10; -1 if there is none."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), -1)


def module_type(path: str) -> str:
    """Last component of a module path: `model.layers.10.mlp.up_proj` -> `up_proj`."""
    return path.rsplit(".", 1)[-1]


def _type_rank(path: str) -> tuple[int, str]:
    kind = module_type(path)
    return (TYPE_ORDER.index(kind), "") if kind in TYPE_ORDER else (len(TYPE_ORDER), kind)


def canonical_order(paths: Iterable[str]) -> list[str]:
    """Module paths by (numeric layer, type, path)."""
    return sorted(paths, key=lambda path: (layer_index(path), _type_rank(path), path))


def select_targets(paths: Sequence[str], targets: Sequence[str], output_head: str | None) -> list[str]:
    """Paths that the targets name, in canonical order.

    A target is `all-linear` (every linear map but the output head), a glob over the whole path, or a suffix that ends
    the path at a dot (`q_proj`, `mlp.up_proj`). The output head is adapted only if a target names it.

    Raises: UserError if a target matches nothing.
    """
    chosen: set[str] = set()
    unmatched = []
    for target in targets:
        if target == "all-linear":
            found = {path for path in paths if path != output_head}
        elif re.search(r"[*?\[]", target):
            found = {path for path in paths if fnmatch.fnmatchcase(path, target)}
        else:
            found = {path for path in paths if path == target or path.endswith("." + target)}
        if not found:
            unmatched.append(target)
        chosen |= found
    if unmatched:
        example = f", e.g. {paths[0]!r}" if paths else ""
        raise UserError(
            f"adapter.targets {unmatched} match no linear map; this model has {len(paths)}{example}. "
            "List them with: tinylora inspect MODEL"
        )
    return canonical_order(chosen)


def tie_groups(paths: Sequence[str], config: AdapterConfig) -> list[int]:
    """Tie group of each module, for modules already in canonical order.

    tiled: consecutive chunks of n_tie, the last one short, so ceil(modules / n_tie) groups. structured: the same within
    each type, by numeric layer, so the sum over types of ceil(count / n_tie). all: one group. none: one each.
    num_groups: that many consecutive chunks whose sizes differ by at most one. Source: Morris et al. 2026, "Parameter
    sharing"; that chunks are ceil-sized is read off the paper's counts (Fig. 1 and 4).

    Raises: UserError if num_groups exceeds the number of modules; names the nearest count.
    """
    count = len(paths)
    if config.num_groups:
        if config.num_groups > count:
            raise UserError(
                f"adapter.num_groups {config.num_groups} exceeds the {count} adapted modules; "
                f"the nearest count is {count}"
            )
        return [index * config.num_groups // count for index in range(count)]
    if config.tying == "all":
        return [0] * count
    if config.tying == "none":
        return list(range(count))
    if config.tying == "tiled":
        return [index // config.n_tie for index in range(count)]
    groups: dict[tuple[str, int], int] = {}
    seen: dict[str, int] = {}
    keys = []
    for path in paths:
        kind = module_type(path)
        keys.append((kind, seen.get(kind, 0) // config.n_tie))
        seen[kind] = seen.get(kind, 0) + 1
    # Groups are numbered type by type, in the published order of types, then by depth.
    for key in sorted(set(keys), key=lambda key: (_type_rank(key[0]), key[1])):
        groups[key] = len(groups)
    return [groups[key] for key in keys]


def num_groups(paths: Sequence[str], config: AdapterConfig) -> int:
    """Number of tie groups: trained numbers = this times u."""
    return max(tie_groups(paths, config)) + 1 if paths else 0


def settings_for_count(paths: Sequence[str], count: int, u: int = 1) -> AdapterConfig:
    """The config with tiled tying that trains exactly `count` numbers, by n_tie where one does it, else by even chunks.

    Raises: UserError if no tying reaches the count; names the nearest one.
    """
    reachable = u * len(paths)
    if count < u or count % u or count > reachable:
        nearest = min(max(u, round(count / u) * u), reachable)
        raise UserError(
            f"no tying of {len(paths)} modules with u = {u} trains {count} numbers; the nearest count is {nearest}"
        )
    groups = count // u
    n_tie = math.ceil(len(paths) / groups)
    if math.ceil(len(paths) / n_tie) == groups:
        return AdapterConfig(u=u, n_tie=n_tie)
    return AdapterConfig(u=u, num_groups=groups)
