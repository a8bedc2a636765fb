"""Does PEFT's TinyLoRA, its factors set to ours, learn the same, step by step, through the same loop?

Ours samples; both then take the same GRPO steps on the same completions, each with its own v and its own Adam: ours by
the packed forward with frozen weights, PEFT's by its own layers in transformers' forward. PEFT writes U sqrt(S) R
sqrt(S) V^T where the paper writes U S R V^T; P carries the difference. Two updates a batch, so that the second loss
depends on how the first one moved v. Compared: loss, gradient norm, and v itself.

    python -m bench.trust.equivalence [--model NAME] [--recipe demo-tiled] [--steps 10] [--save]
"""

import argparse
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.common import finish
from tinylora.adapter.attach import AttachedAdapter
from tinylora.config.method import MethodConfig
from tinylora.config.recipe import load_recipe
from tinylora.config.run import RunConfig
from tinylora.interop.peft_tinylora import write_peft
from tinylora.learner.learner import Learner
from tinylora.methods.one_vector import MethodAdapter, Wrapped
from tinylora.rollouts.groups import Group, sample_step
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.runtime import Runtime, open_runtime
from tinylora.tasks.base import Task
from tinylora.training.grpo import grpo_step
from tinylora.training.update import make_optimizer


def peft_twin(runtime: Runtime) -> MethodAdapter:
    """PEFT's TinyLoRA with our factors, on the same model, which our adapter leaves."""
    ours = runtime.adapter
    assert isinstance(ours, AttachedAdapter)
    from peft import PeftModel

    ours.write(None)
    with tempfile.TemporaryDirectory() as folder:
        write_peft(Path(folder) / "peft", ours, base_name="base")
        paths = list(ours.paths)
        model = ours.detach()
        plain = {path: model.get_submodule(path) for path in paths}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            PeftModel.from_pretrained(model, str(Path(folder) / "peft"), is_trainable=True)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    wrapped = [Wrapped(path, plain[path], model.get_submodule(path)) for path in paths]
    return MethodAdapter(model, MethodConfig(), names, wrapped, paths)


def learn(runtime: Runtime, adapter: Any, batches: list[list[Group]] | None, steps: int) -> dict[str, Any]:
    """GRPO steps on given batches, or on what is sampled under the v of the moment, which is then given back."""
    config = runtime.config
    v = adapter.zeros().requires_grad_()
    optimizer = make_optimizer(v, config)
    learner = Learner(runtime.base.model, adapter, temperature=config.generation.temperature,
                      pad_token_id=runtime.base.pad_token_id)  # fmt: skip
    order = DataOrder(runtime.task.items("train"), config.train.seed)
    kept: list[list[Group]] = []
    losses, norms, path = [], [], []
    for step in range(steps):
        groups = batches[step] if batches is not None else sample_step(runtime, order, v.detach().clone()).groups
        kept.append(groups)
        done = grpo_step(learner, groups, v, optimizer, config, step)
        losses.append(done["policy_loss"])
        norms.append(done["grad_norm"])
        path.append(v.detach().flatten().clone())
    return {"losses": losses, "norms": norms, "path": path, "batches": kept}


def compare(config: RunConfig, steps: int, task: Task | None = None) -> dict[str, Any]:
    """Largest differences over the steps, relative to the largest value."""
    config = replace(config, grpo=replace(config.grpo, updates_per_batch=2))
    runtime = open_runtime(config, task=task or True, say=lambda text: None)
    ours = learn(runtime, runtime.adapter, None, steps)
    theirs = learn(runtime, peft_twin(runtime), ours["batches"], steps)

    def furthest(name: str) -> float:
        a, b = torch.tensor(ours[name]), torch.tensor(theirs[name])
        return float((a - b).abs().max() / a.abs().max())

    moved = torch.stack(ours["path"]) - torch.stack(theirs["path"])
    return {
        "steps": steps,
        "numbers": len(ours["path"][0]),
        "losses_ours": ours["losses"],
        "losses_peft": theirs["losses"],
        "grad_norms_ours": ours["norms"],
        "grad_norms_peft": theirs["norms"],
        "loss_relative_difference": furthest("losses"),
        "grad_norm_relative_difference": furthest("norms"),
        "v_norm": float(ours["path"][-1].norm()),
        "v_difference": float(moved.norm(dim=1).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo-tiled")
    parser.add_argument("--model", default="")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    changes = ["model.dtype=float32", f"train.num_threads={args.threads}"]
    config = load_recipe(args.recipe, [*changes, *([f"model.name={args.model}"] if args.model else [])])
    found = compare(config, args.steps)
    finish("trust/equivalence", {"recipe": args.recipe, "model": config.model.name, **found}, args.save)


if __name__ == "__main__":
    main()
