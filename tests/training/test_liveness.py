"""The probe must pass on the real engine and stop on engines that do not apply the adapter as the learner does."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from transformers import PreTrainedModel

from tinylora.adapter.attach import attach
from tinylora.adapter.config import AdapterConfig
from tinylora.errors import UserError
from tinylora.generation.transformers_backend import TransformersEngine
from tinylora.generation.types import Completion, Request
from tinylora.learner.learner import Learner, Row
from tinylora.training.liveness import check_liveness

ROWS = [Row(0, (11, 12, 13), (41, 42, 43, 44, 45)), Row(1, (21, 22, 23, 24, 25), (51, 52, 53)), Row(2, (9,), (61, 62))]


class Deaf(TransformersEngine):
    """Ignores the adapter vector."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return super().generate([replace(request, v=None) for request in requests])


class Half(TransformersEngine):
    """Shows half of what the vector does to each log-prob."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        base = super().generate([replace(request, v=None) for request in requests])
        tuned = super().generate(requests)
        return [
            replace(t, logprobs=tuple(b0 + (t0 - b0) / 2 for b0, t0 in zip(b.logprobs, t.logprobs, strict=True)))
            for b, t in zip(base, tuned, strict=True)
        ]


class Noisy(TransformersEngine):
    """So far from the learner that no probe stands out."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        found = super().generate(requests)
        return [replace(c, logprobs=tuple(x + 1e6 for x in c.logprobs)) for c in found]


def parts(model: PreTrainedModel, kind: type[TransformersEngine], u: int = 1) -> tuple[TransformersEngine, Learner]:
    adapter = attach(model, AdapterConfig(u=u, n_tie=4))
    return kind(model, context_length=128, adapter=adapter), Learner(model, adapter, temperature=0.7)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
def test_the_real_engine_passes(name: str, request: pytest.FixtureRequest) -> None:
    engine, learner = parts(request.getfixturevalue(name), TransformersEngine, u=2)
    found = check_liveness(engine, learner, ROWS)
    assert found.signal >= 10
    assert found.slope == pytest.approx(1, abs=1e-3)
    assert not learner.adapter.read().any()  # the probe does not stay on the model


@pytest.mark.parametrize(("kind", "slope"), [(Deaf, "0.000"), (Half, "0.500")])
def test_an_engine_with_another_effect_stops_the_run(
    tiny_llama: PreTrainedModel, kind: type[TransformersEngine], slope: str
) -> None:
    engine, learner = parts(tiny_llama, kind)
    with pytest.raises(UserError, match=rf"liveness: .* the engine shows {slope} times that effect .*0\.95 to 1\.05"):
        check_liveness(engine, learner, ROWS)


def test_a_probe_that_does_not_stand_out_stops_the_run(tiny_llama: PreTrainedModel) -> None:
    engine, learner = parts(tiny_llama, Noisy)
    with pytest.raises(UserError, match=r"liveness: no probe vector up to norm 1000\.0 .* 10 times the noise"):
        check_liveness(engine, learner, ROWS)
