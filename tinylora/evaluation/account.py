"""What a run and its controls cost: tokens, problems, time, operations, memory, and estimates of energy and money.

Counted: tokens, problems, seconds, memory. Computed from the model's shapes: operations. Estimated from stated prices
and powers: energy and money. What was not counted is None, never a guess.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tinylora.errors import UserError
from tinylora.rollouts.replies import Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """What energy and money are computed with."""

    watts: float = 10.0
    """Power of one busy CPU core, or of the GPU."""
    price_per_hour: float | None = None
    """Money for an hour of one CPU core, or of the GPU; None leaves money out."""
    currency: str = "USD"

    def __post_init__(self) -> None:
        if not 0 < self.watts < 1e6:
            raise UserError(f"--watts must be a power above 0, of one core or of the GPU, got {self.watts}")
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < 1e9:
            raise UserError(
                f"--price must be 0 or more, for an hour of one core or of the GPU, got {self.price_per_hour}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One run's, or one control's. None: not counted."""

    tokens_sampled: int
    """Completion tokens that were drawn."""
    prompt_tokens: int | None
    """Prompt tokens, each prompt once."""
    seconds: float | None
    flops: float | None
    """2 x (parameters of the linear maps, output head included) a token forward; the backward pass forms no gradient
    of a weight and costs the same again. Attention scores are left out."""
    tokens_trained: int | None = None
    """Completion tokens in the loss."""
    distinct_problems: int | None = None
    cpu_hours: float | None = None
    """Of all cores, as the system counts them."""
    gpu_hours: float | None = None
    peak_memory_bytes: int | None = None
    energy_kwh: float | None = None
    money: float | None = None
    prices: Prices | None = None

    def to_json(self) -> dict[str, Any]:
        """For evidence.json."""
        return asdict(self)


def priced(account: Account, prices: Prices) -> Account:
    """The account with energy and money from its hours; a GPU's hours count for both where there are any."""
    from dataclasses import replace

    hours = account.gpu_hours if account.gpu_hours else account.cpu_hours
    return replace(
        account,
        energy_kwh=None if hours is None else hours * prices.watts / 1000,
        money=None if hours is None or prices.price_per_hour is None else hours * prices.price_per_hour,
        prices=prices,
    )


def linear_parameters(shapes: Mapping[tuple[int, int], int]) -> int:
    """Parameters of linear maps, given how often each (out, in) occurs."""
    return sum(out * inner * count for (out, inner), count in shapes.items())


def training_account(
    metrics: Sequence[Mapping[str, Any]],
    *,
    num_train: int,
    group_size: int,
    parameters: int,
    device: str,
    threads: int,
    all_weights: bool = False,
) -> Account:
    """What training cost, from the lines of metrics.jsonl.

    num_train: distinct train problems, which are passed through in turn, so that the first num_train prompts are
    distinct. CPU hours come from the system's count where the run has it (cpu_seconds), else from seconds times
    threads. all_weights: every weight has a gradient (method full), which is as many operations again as a forward
    pass. Validation during the run is in seconds and memory, not in tokens.
    """
    steps = [row for row in metrics if row.get("step")]
    total = lambda name: sum(float(row.get(name) or 0) for row in steps)  # noqa: E731
    sampled, prompts = total("tokens_sampled"), total("prompt_tokens")
    computed = total("tokens_computed")
    # A group's prompt is computed once for the learner; which groups had rows with a gradient is not recorded, so all
    # sampled prompts count: an upper bound.
    flops = 2.0 * parameters * (sampled + prompts) + (6.0 if all_weights else 4.0) * parameters * (computed + prompts)
    seconds = total("seconds")
    on_cpu = device == "cpu"
    cpu = total("cpu_seconds") if any("cpu_seconds" in row for row in steps) else seconds * threads * on_cpu
    peaks = [int(row["peak_memory_bytes"]) for row in steps if row.get("peak_memory_bytes")]
    return Account(
        tokens_sampled=int(sampled),
        prompt_tokens=int(prompts),
        tokens_trained=int(total("tokens_trained")),
        distinct_problems=min(num_train, int(total("prompts_sampled"))),
        seconds=seconds,
        cpu_hours=cpu / 3600,
        gpu_hours=0.0 if on_cpu else seconds / 3600,
        flops=flops,
        peak_memory_bytes=max(peaks, default=None),
    )


def completions_sampled(metrics: Sequence[Mapping[str, Any]], group_size: int) -> int:
    """Replies that training saw: completions drawn, discarded groups included, or reference solutions."""
    return sum(int(row.get("completions_per_prompt", group_size)) * int(row.get("prompts_sampled") or 0)
               for row in metrics)  # fmt: skip


def evaluation_account(
    results: Sequence[Reply], *, prompt_tokens: int | None, seconds: float | None, cpu_seconds: float | None,
    parameters: int, device: str,
) -> Account:  # fmt: skip
    """What it cost to answer some items."""
    tokens = sum(result.num_tokens for result in results)
    return Account(
        tokens_sampled=tokens,
        prompt_tokens=prompt_tokens,
        seconds=seconds,
        cpu_hours=None if cpu_seconds is None else cpu_seconds / 3600,
        gpu_hours=None if seconds is None else (0.0 if device == "cpu" else seconds / 3600),
        flops=None if prompt_tokens is None else 2.0 * parameters * (tokens + prompt_tokens),
        distinct_problems=len({result.item_id for result in results}),
    )


def gain_curve(metrics: Sequence[Mapping[str, Any]], num_train: int) -> list[dict[str, float]]:
    """Held-out shares against the number of distinct problems that training had seen by then."""
    curve: list[dict[str, float]] = []
    seen = 0
    for row in metrics:
        seen += int(row.get("prompts_sampled") or 0)
        if row.get("validation_strict") is not None:
            curve.append(
                {
                    "step": float(row["step"]),
                    "distinct_problems": float(min(seen, num_train)),
                    "validation_strict": float(row["validation_strict"]),
                    "validation_value_only": float(row["validation_value_only"]),
                }
            )
    return curve
