"""PEFT's TinyLoRA with our factors through our loop: the same losses, gradients and numbers, step by step."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_run import ByteTask, tiny_config

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="bench/ comes with the repository alone")


@pytest.mark.parametrize("adapter", [{"u": 2, "n_tie": 8}, {"u": 1, "n_tie": 5, "tying": "structured"}])
def test_peft_takes_the_steps_that_we_take(adapter: dict[str, object], tiny_folder: Path, fresh_cache: Path) -> None:
    from bench.trust import equivalence

    config = tiny_config(tiny_folder, adapter=adapter, grpo={"group_size": 4}, generation={"max_new_tokens": 6})
    found = equivalence.compare(replace(config), 5, ByteTask())
    assert found["v_norm"] > 0.1
    assert len(set(found["losses_ours"])) == 5
    assert found["loss_relative_difference"] < 1e-3
    assert found["grad_norm_relative_difference"] < 1e-3
    assert found["v_difference"] < 1e-3 * found["v_norm"]
