"""Does the engine really apply the adapter? A probe that an engine which ignores v cannot pass.

Fixed tokens are scored by the learner and by the engine, under v = 0 and under a probe vector. Comparing log-probs at a
small v proves nothing (an engine that ignores the adapter agrees too), so the probe is large: its effect on the learner
must be at least 10 times the noise between engine and learner, and the engine must show the same effect, with a slope
between 0.95 and 1.05.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora.errors import UserError
from tinylora.generation.engine import Engine
from tinylora.generation.types import Request, SamplingParams
from tinylora.learner.learner import Learner, Row

MIN_SIGNAL = 10.0
SLOPE = (0.95, 1.05)
NEARLY = (0.85, 1.15)
"""A slope that noise may have moved out of `SLOPE`."""
SMALLEST_NUMBER = 0.003
"""Of each number under the first probe, at least, where there are many."""
NORMS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass(frozen=True, slots=True)
class Liveness:
    """What a probe saw: mean absolute effect over noise, the slope of engine on learner, the probe's norm."""

    signal: float
    slope: float
    norm: float


def _engine_scores(engine: Engine, rows: Sequence[Row], temperature: float, v: Tensor | None) -> Tensor:
    requests = [
        Request(
            prompt_ids=row.prompt_ids,
            params=SamplingParams(temperature=temperature, max_new_tokens=len(row.token_ids)),
            forced_ids=row.token_ids,
            v=v,
        )
        for row in rows
    ]
    completions = engine.generate(requests)
    return torch.cat([torch.tensor(c.logprobs) for c in completions])


def check_liveness(engine: Engine, learner: Learner, rows: Sequence[Row]) -> Liveness:
    """Run the probe on rows of tokens. The probe vector has numbers of one size and random signs (a regular
    pattern could cancel in a product of factors), and the first norm whose effect stands out of the noise.

    Under a probe the noise itself grows, above all in bfloat16 where a few tokens make up the effect: a slope that is
    off by a little is looked for again at the larger norms.
    Raises: UserError if no norm up to 1000 has an effect on the learner, or the engine's effect differs from it.
    """
    adapter = learner.adapter
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (adapter.num_trained,), generator=generator) * 2.0 - 1
    direction = (signs / signs.norm()).reshape(adapter.shape).to(adapter.zeros())

    def learner_scores(v: Tensor | None) -> Tensor:
        with torch.no_grad():
            logprobs, mask = learner.logprobs(rows, v)
        return logprobs[mask].cpu()

    learner_base = learner_scores(None)
    engine_base = _engine_scores(engine, rows, learner.temperature, None)
    signal = 0.0
    wrong: tuple[float, float] | None = None
    # Spread over very many numbers, a small norm is nothing to any of them: not worth an engine's time.
    for norm in (norm for norm in NORMS if norm >= SMALLEST_NUMBER * adapter.num_trained**0.5):
        v = direction * norm
        learner_effect = learner_scores(v) - learner_base
        engine_probe = _engine_scores(engine, rows, learner.temperature, v)
        engine_effect = engine_probe - engine_base
        noise = float((engine_base - learner_base).abs().mean())
        signal = float(learner_effect.abs().mean()) / max(noise, 1e-9)
        if signal >= MIN_SIGNAL:
            slope = float((engine_effect * learner_effect).sum() / learner_effect.square().sum())
            if SLOPE[0] <= slope <= SLOPE[1]:
                return Liveness(signal, slope, norm)
            wrong = wrong or (norm, slope)
            if not NEARLY[0] <= slope <= NEARLY[1]:
                break
    if wrong:
        raise UserError(
            f"liveness: a probe vector of norm {wrong[0]} moves the learner's log-probs but the engine shows "
            f"{wrong[1]:.3f} times that effect (allowed {SLOPE[0]} to {SLOPE[1]}); the "
            "rollouts would not come from the model that is trained, so the run is stopped"
        )
    raise UserError(
        f"liveness: no probe vector up to norm {NORMS[-1]} moves the learner's log-probs by {MIN_SIGNAL:.0f} times the "
        f"noise between engine and learner (reached {signal:.1f}); try --set model.dtype=float32"
    )
