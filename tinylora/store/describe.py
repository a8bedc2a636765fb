"""An opened adapter as a person or a program reads it."""

import dataclasses
from typing import TYPE_CHECKING, Any

from tinylora.talk import one_line

if TYPE_CHECKING:
    from tinylora.store.adapter import Adapter


def code_of(data: bytes) -> str | None:
    """The code, or None where it would be too long to be one."""
    from tinylora.adapter.code import fits_a_code, to_code

    return to_code(data) if fits_a_code(data) else None


def describe_json(opened: "Adapter") -> dict[str, Any]:
    """An adapter as plain data."""
    return {
        "adapter": opened.label,
        "numbers": opened.v.flatten().tolist(),
        "shape": list(opened.v.shape),
        "dtype": opened.value_type,
        "norm": float(opened.v.norm()),
        "config": dataclasses.asdict(opened.config) if opened.config else None,
        "fingerprint": opened.fingerprint.hex() if opened.fingerprint else None,
        "check": opened.check.hex() or None,
        "base": opened.base_name or None,
        "origin": opened.explicit.origin if opened.explicit else None,
    }


def describe_text(opened: "Adapter") -> str:
    """An adapter in words."""
    from tinylora.adapter.config import count_groups

    groups, u = opened.v.shape
    is_tinylora = opened.method.name == "tinylora"
    what = f"({count_groups(groups)} x {u})" if is_tinylora else f"of {opened.method.describe()}"
    lines = [f"{opened.v.numel():,} numbers {what} in {opened.value_type}, |v| = {float(opened.v.norm()):.4g}"]
    if not is_tinylora:
        lines.append("each is how far training moved a parameter of the method from its start")
    elif opened.config is not None:
        c = opened.config
        targets = one_line(", ".join(c.targets))
        lines.append(
            f"rank {c.rank}, u = {c.u}, {c.sharing(groups)}, targets {targets}, basis {c.basis}, "
            f"seed {c.seed}: the factors are rebuilt from the base"
        )
    else:
        assert opened.explicit is not None
        origin = one_line(opened.explicit.origin)
        lines.append(f"brings the factors of {len(opened.explicit.modules)} modules along ({origin})")
    known = f" ({one_line(opened.base_name)})" if opened.base_name else ""
    if opened.fingerprint:
        lines.append(f"base {opened.fingerprint.hex()}{known or ', not seen on this machine'}")
    else:
        lines.append(f"base{known or ' not stated'}")
    most = 200 if is_tinylora else 20
    shown = " ".join(f"{x:+.5g}" for x in opened.v.flatten()[:most].tolist())
    count = opened.v.numel()
    lines.append(shown + (f" ... ({count - most:,} more; --json has all)" if count > most else ""))
    return "\n".join(lines)
