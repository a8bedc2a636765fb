"""How long should a thread spin at a barrier before it sleeps, alone and beside another process?

A decode step of 64 rows has some three hundred barriers. Threads that sleep at once are late at each; threads that
spin hold the core that the thread they wait for needs. For each GOMP_SPINCOUNT, with OMP_WAIT_POLICY=PASSIVE, and for
libgomp as it comes: the step in a process alone, then in two at once with as many threads each as there are cores.

    python -m bench.speed.spin [--model smollm2-135m-instruct] [--counts 0,1000,10000] [--save]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

from bench.common import ROOT, finish


def child(model: str) -> None:
    import torch

    from bench.speed.rollout import draw_rollouts, make_engine, step_seconds
    from tinylora.models.load import load_base_model
    from tinylora.system.cores import available_threads

    torch.set_num_threads(available_threads())
    base = load_base_model(model, device="cpu", dtype="bfloat16")
    engine = make_engine("native", base)
    rollouts = draw_rollouts(base, 8, 8, (100, 150), (40, 40), 0)
    step_seconds(engine, rollouts)
    print(json.dumps([step_seconds(engine, rollouts) for _ in range(3)]))


def start(model: str, count: str) -> "subprocess.Popen[str]":
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    if count != "as it comes":
        env |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": count}
    command = [sys.executable, "-m", "bench.speed.spin", "--child", "--model", model]
    return subprocess.Popen(command, env=env | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)


def measure(model: str, count: str, processes: int) -> float:
    """Median step in milliseconds."""
    running = [start(model, count) for _ in range(processes)]
    steps = [step for one in running for step in json.loads(one.communicate()[0].splitlines()[-1])]
    return round(1e3 * statistics.median(steps), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--counts", default="0,300,1000,3000,10000")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.model)
        return
    found: dict[str, Any] = {}
    for count in [*arguments.counts.split(","), "as it comes"]:
        found[count] = {
            "alone_ms": measure(arguments.model, count, 1),
            "two_at_once_ms": measure(arguments.model, count, 2),
        }
        print(f"{count}: {found[count]}", file=sys.stderr, flush=True)
    finish("speed/spin", {"step_ms_by_spin_count": found, "model": arguments.model}, arguments.save)


if __name__ == "__main__":
    main()
