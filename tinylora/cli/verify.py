"""verify: is an adapter intact, and what would it change?"""

import dataclasses
from typing import TYPE_CHECKING

from tinylora.cli.adapters import AdapterArgument, Model, load_base, put_on
from tinylora.cli.common import Json, OtherBase, app, print_json, verb
from tinylora.store.describe import describe_json, describe_text
from tinylora.talk import show

if TYPE_CHECKING:
    from tinylora.adapter.attach import AttachedAdapter


@dataclasses.dataclass(frozen=True, slots=True)
class _Change:
    module: str
    tie_group: int
    change: float
    """|dW|."""
    weight: float
    """|W|."""


def _change(attached: "AttachedAdapter", path: str, group: int) -> _Change:
    left, right = attached.delta_factors(path)
    change = float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())
    return _Change(path, group, change, float(attached.base_weight(path).float().norm()))


@app.command()
@verb
def verify(
    adapter: AdapterArgument,
    model: Model = "",
    other_base: OtherBase = False,
    as_json: Json = False,
) -> None:
    """Check that an adapter is intact and fits a base, all of it. Prints what it would change, module by module.

    \b
    Examples:
      tinylora verify demo.tinylora
      tinylora verify TINY-... --model ./my-copy-of-the-model
    """
    from tinylora.store.adapter import open_adapter

    opened = open_adapter(adapter)
    base = load_base(opened, model)
    attached = put_on(opened, base, other_base, hashed=True)
    rows = [_change(attached, path, group) for path, group in zip(attached.paths, attached.groups, strict=True)]
    total, weights = (sum(getattr(row, name) ** 2 for row in rows) ** 0.5 for name in ("change", "weight"))
    stated = (
        "is taken to be"
        if other_base
        else "is"
        if opened.fingerprint
        else "is not stated in it, so it could not be compared; this one is"
    )
    verdict = (
        f"intact; its base {stated} {base.name}"
        + ("" if not other_base else " by --other-base, and was not compared")
        + (", and its basis came out the same" if opened.check and not other_base else "")
    )
    if as_json:
        print_json(
            {
                **describe_json(opened),
                "verdict": verdict,
                "modules": [dataclasses.asdict(row) for row in rows],
                "change": total,
                "weight": weights,
            }
        )
        return
    show(describe_text(opened))
    show(verdict)
    show(f"{'module':<44} {'group':>5} {'|dW|':>10} {'|dW|/|W|':>10}")
    for row in rows:
        relative = row.change / row.weight if row.weight else float("nan")
        show(f"{row.module:<44} {row.tie_group:>5} {row.change:>10.4g} {relative:>10.2e}")
    show(
        f"{f'all {len(rows)} modules':<44} {'':>5} {total:>10.4g} {total / weights if weights else float('nan'):>10.2e}"
    )
