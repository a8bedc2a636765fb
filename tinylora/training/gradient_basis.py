"""adapter.basis = "gradient": the directions in which a batch of rewards would move each weight, not the weight's own.

Before the first step one batch is sampled from the untrained model. G, the gradient of the policy objective in a weight
(the sum over trained tokens of advantage times the gradient of the log-probability), is never formed: passes over the
batch add up its products with k thin vectors, G Omega and G^T Q, for all modules at once, which is a randomised SVD
with one power iteration (Halko et al. 2011, arXiv:0909.4061, algorithms 4.3 and 5.1). U and V are G's top singular
vectors; S is the weight's own, so that v has the scale that it has in the basis svd.

The factors depend on the batch, so nobody can rebuild them from the base: they lie in the run's folder.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tinylora.adapter.attach import AttachedAdapter, attach_explicit, linear_maps
from tinylora.adapter.explicit import FILE, ExplicitFactors, ExplicitModule, load_explicit, save_explicit
from tinylora.adapter.grouping import tie_groups
from tinylora.adapter.projection import projection
from tinylora.adapter.quantised import weight_shape
from tinylora.errors import UserError
from tinylora.learner.learner import Learner, Row, micro_batches
from tinylora.learner.memory import FALLBACK_MICRO_BATCH_TOKENS
from tinylora.methods.engine import engine_for
from tinylora.rollouts.groups import sample_step
from tinylora.rollouts.order import DataOrder
from tinylora.rollouts.runtime import Runtime
from tinylora.store.run_folder import RunFolder
from tinylora.system.device import for_float64
from tinylora.system.files import write_atomically
from tinylora.talk import Say
from tinylora.training.advantages import group_advantages

OVERSAMPLING = 8
"""Thin vectors beyond the rank."""


@dataclass(frozen=True, slots=True)
class Directions:
    """Top singular triplets of one weight's gradient, float64: U (out, r), sigma (r,), V (in, r)."""

    U: Tensor
    sigma: Tensor
    V: Tensor


@contextmanager
def _products(
    model: nn.Module, maps: Mapping[str, nn.Module], add: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """While gradients flow, call add(path, x (tokens, in), g (tokens, out)) for every use of every map."""

    def keep(path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            x = inputs[0].detach()
            if output.requires_grad:
                output.register_hook(lambda g: add(path, x.flatten(0, -2).float(), g.flatten(0, -2).float()))

        return hook

    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    handles = [embedding.register_forward_hook(lambda m, i, output: output.requires_grad_(True))]
    handles += [module.register_forward_hook(keep(path)) for path, module in maps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradient_directions(
    learner: Learner, paths: Sequence[str], rows: Sequence[Row], weights: Sequence[float], *, rank: int, seed: int,
    micro_batch_tokens: int,
) -> dict[str, Directions]:  # fmt: skip
    """Top directions of the gradient of sum_i weights_i x log-prob of row i, of each module, by a padded learner.

    Four passes over the rows, in memory for (out + in) x (rank + 8) numbers a module.
    """
    assert learner.padded
    model = learner.model
    maps = {path: linear_maps(model)[path] for path in paths}
    generator = torch.Generator().manual_seed(seed)
    thin: dict[str, Tensor] = {}
    for path, module in maps.items():
        out, inner = weight_shape(module)
        width = min(rank + OVERSAMPLING, out, inner)
        thin[path] = torch.randn(inner, width, generator=generator).to(next(module.parameters()).device)

    def run(add: Callable[[str, Tensor, Tensor], None]) -> None:
        batches = micro_batches(rows, micro_batch_tokens, shared_prompts=learner.shared_prompts, padded=True)
        for batch in batches:
            with _products(model, maps, add):
                logprobs, mask = learner.logprobs([rows[i] for i in batch], None)
                scale = torch.tensor([weights[i] for i in batch], device=logprobs.device).unsqueeze(1)
                (scale * logprobs.masked_fill(~mask, 0)).sum().backward()

    def times(from_left: bool, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def add(path: str, x: Tensor, g: Tensor) -> None:
            part = g.T @ (x @ vectors[path]) if from_left else x.T @ (g @ vectors[path])
            sums[path] = sums[path] + part if path in sums else part

        run(add)
        return sums

    right = times(True, thin)  # G Omega
    for _ in range(1):
        left = times(False, {path: _orthogonal(Y) for path, Y in right.items()})
        right = times(True, {path: _orthogonal(Z) for path, Z in left.items()})
    Q = {path: _orthogonal(Y) for path, Y in right.items()}
    left = times(False, Q)  # G^T Q
    found = {}
    for path, Z in left.items():
        V, sigma, Ut = torch.linalg.svd(for_float64(Z).double(), full_matrices=False)
        found[path] = Directions((for_float64(Q[path]).double() @ Ut.T)[:, :rank], sigma[:rank], V[:, :rank])
    return found


def _orthogonal(Y: Tensor) -> Tensor:
    return torch.linalg.qr(for_float64(Y).double())[0].float().to(Y.device)


def _explicit(runtime: Runtime, say: Say) -> ExplicitFactors:
    adapter, config, task = runtime.adapter, runtime.config, runtime.task
    assert isinstance(adapter, AttachedAdapter)
    order = DataOrder(task.items("train"), config.train.seed)  # the batch that the first step will see, too
    groups = sample_step(runtime, order, None).groups
    advantages = group_advantages(torch.tensor([group.rewards for group in groups]), config.grpo.advantage)
    rows, weights = [], []
    for index, group in enumerate(groups):
        for place, reply in enumerate(group.replies):
            trained = reply.stopped or config.grpo.truncated != "mask"  # as in grpo.py
            if trained and float(advantages[index, place]):
                rows.append(Row(index, group.prompt_ids, reply.token_ids))
                weights.append(float(advantages[index, place]))
    if not rows:
        raise UserError(
            "adapter.basis = gradient needs a batch in which rewards differ, and every prompt's replies got the same, "
            "or were cut off under grpo.truncated = mask; "
            "try an easier task, a larger generation.temperature or grpo.group_size, or basis = svd"
        )
    total = sum(len(row.token_ids) for row in rows)
    say(f"finding the gradient's directions on {len(rows)} replies ({total:,} tokens), four passes")
    learner = Learner(runtime.base.model, adapter, temperature=config.generation.temperature,
                      pad_token_id=runtime.base.pad_token_id, packed=False)  # fmt: skip
    found = gradient_directions(
        learner, adapter.paths, rows, [weight / total for weight in weights], rank=config.adapter.rank,
        seed=config.adapter.seed, micro_batch_tokens=config.train.micro_batch_tokens or FALLBACK_MICRO_BATCH_TOKENS,
    )  # fmt: skip
    tied = tie_groups(adapter.paths, config.adapter)
    modules = {
        path: ExplicitModule(
            U=found[path].U.cpu().contiguous(),
            S=adapter.factors[path].S.double().cpu(),
            V=found[path].V.cpu().contiguous(),
            P=torch.from_numpy(projection(config.adapter.seed, path, config.adapter.u, config.adapter.rank)),
            tie_group=group,
        )
        for path, group in zip(adapter.paths, tied, strict=True)
    }
    zeros = torch.zeros(max(tied) + 1, config.adapter.u)
    return ExplicitFactors(zeros, modules, f"the gradient of one batch of {task.name}")


def with_gradient_basis(runtime: Runtime, folder: RunFolder, say: Say) -> Runtime:
    """The runtime with the run's own basis: read from its folder, or found now and written there.

    Raises: UserError if all rewards of the batch are the same, or the file is damaged.
    """
    path = folder.path / FILE
    if path.exists():
        explicit = load_explicit(path)
    else:
        explicit = _explicit(runtime, say)
        write_atomically(path, save_explicit(explicit))
    assert isinstance(runtime.adapter, AttachedAdapter)
    runtime.adapter.detach()
    adapter = attach_explicit(runtime.base.model, explicit)
    engine = engine_for(
        runtime.base.model,
        adapter,
        runtime.config,
        context_length=runtime.base.context_length,
        pad_token_id=runtime.base.pad_token_id,
        say=say,
    )
    return replace(runtime, adapter=adapter, engine=engine)
