"""What an adapter is, apart from its trained numbers: a frozen description with exact counts and bytes."""

from dataclasses import dataclass
from typing import Literal, get_args

from tinylora.errors import UserError

Tying = Literal["tiled", "structured", "all", "none"]
BasisKind = Literal["svd", "random", "sketch", "gradient"]

MAX_NUMBERS = 2**24
"""Most trained numbers: the method is for 1 to a few thousand, and no header shall ask for more memory than that."""
MAX_PROJECTION = 2**17
"""Most numbers of P for one map, u r^2, for the same reason: v may be short and still ask for gigabytes of them."""


def count_groups(count: int) -> str:
    """1 tie group, 13 tie groups."""
    return f"{count:,} tie group{'' if count == 1 else 's'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """W' = W + U diag(S) (sum_i v_i P_i) V^T in every adapted module (Morris et al. 2026, arXiv:2602.04118, section 4).

    Raises: UserError for a value out of range, naming the field and what is allowed.
    """

    rank: int = 2
    """Singular directions kept per weight (r in the paper)."""
    u: int = 1
    """Trained numbers in each tie group's vector (u in the paper)."""
    tying: Tying = "tiled"
    """Which modules share a vector: tiled (chunks in model order), structured (chunks per type), all, none."""
    n_tie: int = 16
    """Modules that share one vector under tiled and structured tying; the last group may hold fewer."""
    num_groups: int = 0
    """If above 0, overrides n_tie under tiled tying: this many even chunks (sizes differ by at most one)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Modules to adapt: a suffix (q_proj), a glob (model.layers.*.mlp.*), or all-linear (all but the output head)."""
    basis: BasisKind = "svd"
    """Where U, S, V come from: svd (of the frozen weight), random, sketch, or gradient (of the reward on one batch)."""
    seed: int = 0
    """Seed of P, and of the basis where that is random."""

    def sharing(self, groups: int) -> str:
        """How modules share their numbers, in words: "1 tie group (all)", "13 tie groups (tiled, n_tie 17)"."""
        how: str = self.tying
        if self.num_groups:
            how = f"{self.num_groups} even chunks"
        elif self.tying in ("tiled", "structured"):
            how += f", n_tie {self.n_tie}"
        return f"{count_groups(groups)} ({how})"

    def check_projection(self) -> None:
        """Raises: UserError for u and rank that give a map more numbers of P than MAX_PROJECTION.

        Not for LoRA-XS, whose P is another one.
        """
        if (numbers := self.u * self.rank**2) > MAX_PROJECTION:
            raise UserError(
                f"adapter.u = {self.u} and rank {self.rank} give every map {numbers:,} numbers of P; at most "
                f"{MAX_PROJECTION:,} are allowed (u times rank squared); take a smaller adapter.u or adapter.rank"
            )

    def __post_init__(self) -> None:
        for name in ("rank", "u", "n_tie"):
            if getattr(self, name) < 1:
                raise UserError(f"adapter.{name} must be at least 1, got {getattr(self, name)}")
        if self.num_groups < 0:
            raise UserError(f"adapter.num_groups must be 0 (off) or more, got {self.num_groups}")
        if self.tying not in get_args(Tying):
            raise UserError(f"adapter.tying must be one of {', '.join(get_args(Tying))}, got {self.tying!r}")
        if self.num_groups and self.tying != "tiled":
            raise UserError(f"adapter.num_groups needs tying 'tiled', got {self.tying!r}; leave num_groups at 0")
        if self.basis not in get_args(BasisKind):
            raise UserError(f"adapter.basis must be one of {', '.join(get_args(BasisKind))}, got {self.basis!r}")
        if not self.targets or not all(isinstance(t, str) and t for t in self.targets):
            raise UserError(f"adapter.targets must name a suffix, a glob or 'all-linear', got {self.targets!r}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"adapter.seed must be at least 0 and below 2**63, got {self.seed}")
