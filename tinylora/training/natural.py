"""The mathematics of npg: curvature from scores, a step of so many nats, and whether a gradient is noise.

Numbers in, numbers out, in float64: no model, no config. A score is d/dv of a reply's log-prob, d numbers.
Sources: natural gradient, Amari 1998; for policies Kakade 2001; the step that spends a KL budget is that of TRPO
(Schulman et al. 2015, arXiv:1502.05477, appendix C) with the matrix itself in place of products with it.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

REPLIES_A_NUMBER = 10
"""From so many replies a number on, the matrix is taken as it is; with fewer it is shrunk towards its diagonal."""
NUMBERS_A_REPLY = 0.5
"""Most numbers that are trained for each reply which the running mean holds."""
RELATIVE_RANK = 1e-11
"""Eigenvalues below this share of the largest one, all numbers scaled to 1, are taken for 0."""
CLIP = 4.0
"""A score counts in the gradient at most as one whose F-norm squared is this often what is usual, d."""
PERMUTATIONS = 999
"""Orders of the rewards with which a gradient is compared."""
PERMUTED_AT_ONCE = 2**22
"""Rewards that are in memory at a time, all orders of them together, unless one order has more."""


class Curvature:
    """F = mean of s s^T over replies, as a running mean that follows the policy. A small step costs dv F dv / 2 nats.

    Every batch weighs `decay` times as much as the one behind it. `replies` is the number of equally weighted replies
    that would say as much.
    """

    def __init__(self, numbers: int, decay: float) -> None:
        """decay 0 takes the last batch alone."""
        self.decay = decay
        self.products = torch.zeros(numbers, numbers, dtype=torch.float64)
        self.squares = torch.zeros_like(self.products)
        self.weight = self.weight_squared = 0.0

    def update(self, scores: Tensor) -> None:
        """Take in the scores (replies, numbers) of a batch."""
        s = scores.double()
        self.products = self.decay * self.products + s.T @ s
        self.squares = self.decay * self.squares + s.square().T @ s.square()
        self.weight = self.decay * self.weight + len(s)
        self.weight_squared = self.decay**2 * self.weight_squared + len(s)

    @property
    def replies(self) -> float:
        """How many replies the mean is worth (Kish's effective sample size)."""
        return self.weight**2 / self.weight_squared if self.weight_squared else 0.0

    def matrix(self) -> Tensor:
        """F (numbers, numbers). From few replies its correlations are shrunk by the rule of Schäfer and Strimmer 2005.

        That rule is Ledoit and Wolf's with the diagonal as target. It keeps the scale of each number; with
        `REPLIES_A_NUMBER` replies nothing is shrunk, and a rotation of v changes nothing either.
        """
        F = self.products / self.weight
        if self.replies >= REPLIES_A_NUMBER * len(F):
            return F
        scale = F.diagonal().clamp_min(torch.finfo(F.dtype).tiny).sqrt()
        both = torch.outer(scale, scale)
        correlations = (F / both).fill_diagonal_(0.0)
        variance = (self.squares / self.weight / both.square() - correlations.square()) / self.replies
        noise = variance.fill_diagonal_(0.0).clamp_min(0.0).sum()
        shrink = float((noise / correlations.square().sum().clamp_min(1e-300)).clamp(0.0, 1.0))
        shrunk = (1.0 - shrink) * F
        shrunk.diagonal().copy_(F.diagonal())
        return shrunk

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "npg_products": self.products,
            "npg_squares": self.squares,
            "npg_weight": self.weight,
            "npg_weight_squared": self.weight_squared,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.products, self.squares = saved["npg_products"], saved["npg_squares"]
        self.weight, self.weight_squared = saved["npg_weight"], saved["npg_weight_squared"]


def dead_numbers(F: Tensor) -> list[int]:
    """Places of numbers of v that move no reply: their curvature is 0."""
    return [int(i) for i in (F.diagonal() <= 0).nonzero()]


def solve(F: Tensor, g: Tensor) -> Tensor:
    """F^+ g, (numbers,) or (numbers, columns): by eigenvalues, all numbers scaled to a curvature of 1 first.

    Directions without curvature get nothing.
    """
    scale = F.diagonal().clamp_min(torch.finfo(F.dtype).tiny).sqrt()
    values, vectors = torch.linalg.eigh(F / torch.outer(scale, scale))
    inverse = torch.where(values > RELATIVE_RANK * values.max(), 1.0 / values, 0.0)
    scaled = g / (scale if g.dim() == 1 else scale.unsqueeze(1))
    found = vectors @ ((vectors.T @ scaled) * (inverse if g.dim() == 1 else inverse.unsqueeze(1)))
    return found / (scale if g.dim() == 1 else scale.unsqueeze(1))


def along(direction: Tensor, F: Tensor, kl: float) -> Tensor:
    """The multiple of a direction that costs kl nats a reply, 1/2 dv F dv = kl; zero where the direction is."""
    cost = float(direction @ F @ direction) / 2
    return direction * math.sqrt(kl / cost) if cost > 0 else torch.zeros_like(direction)


def within_total(v: Tensor, dv: Tensor, F: Tensor, total: float) -> Tensor:
    """The longest part of dv that keeps v + dv within `total` nats of the base, 1/2 v F v by the present F.

    A step that brings v no further away is always whole; one that leads out from outside is nothing.
    """
    before, after = kl_from_base(v, F), kl_from_base(v + dv, F)
    if after <= max(total, before):
        return dv
    if before >= total:
        return torch.zeros_like(dv)
    a, b, c = kl_from_base(dv, F), float(v @ F @ dv), before - total
    return dv * ((-b + math.sqrt(b * b - 4 * a * c)) / (2 * a))


def kl_from_base(v: Tensor, F: Tensor) -> float:
    """1/2 v F v, nats a reply: the KL between base (v = 0) and model as the present curvature reckons it."""
    return float(v @ F @ v) / 2


def leave_one_out(rewards: Tensor) -> Tensor:
    """A = reward minus the mean of the *other* replies to the same prompt; (prompts, G) -> the same, float64.

    Source: RLOO (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740). Equal rewards give exactly 0.
    """
    exact = rewards.double()
    size = rewards.shape[1]
    advantages = (exact - exact.mean(1, keepdim=True)) * (size / (size - 1))
    return advantages.masked_fill((exact.amax(1) == exact.amin(1)).unsqueeze(1), 0.0)


def clipped(scores: Tensor, F: Tensor) -> tuple[Tensor, float]:
    """Scores (replies, numbers) cut to an F-norm squared of `CLIP` d, and the share that was cut.

    Log-probs of long odd replies have gradients many times the usual one, and a few of them would be the step. The
    F-norm is the same in every parameterisation.
    """
    s = scores.double()
    norms = (s * solve(F, s.T).T).sum(1).clamp_min(0.0)
    most = CLIP * s.shape[1]
    factor = torch.where(norms > most, (most / norms.clamp_min(1e-300)).sqrt(), 1.0)
    return s * factor.unsqueeze(1), float((factor < 1).double().mean())


@dataclass(frozen=True, slots=True)
class Signal:
    """What a batch's gradient says beside what chance would."""

    p: float
    """Share of orders of the rewards whose gradient is as large as the one found: small means that this is no noise."""
    ratio: float
    """T^2 / d: 1 on average where there is nothing but noise."""


def signal(advantages: Tensor, scores: Tensor, seed: int) -> Signal:
    """Whether sum A s differs from what it would be if a prompt's rewards said nothing about its replies.

    advantages (prompts, G), whose sums over a prompt are 0; scores (prompts, G, d). T^2 = g^T C^+ g, where C is the
    covariance of g over all orders of the rewards within prompts:

        C = sum over prompts of (sum A^2) / (G - 1) * sum (s - mean s) (s - mean s)^T

    p comes from `PERMUTATIONS` such orders, so it is right for any distribution of scores and any number of prompts
    (Fisher's permutation test); Hotelling's T^2 with a covariance over prompts would ask for more prompts than numbers.
    Departure from Hotelling: given the prompts, not over them. `seed` draws the orders.
    """
    A, s = advantages.double(), scores.double()
    d = s.shape[-1]
    if not bool((A != 0).any()):
        return Signal(1.0, 0.0)
    centred = s - s.mean(1, keepdim=True)
    weights = A.square().sum(1) / (A.shape[1] - 1)
    C = torch.einsum("m,mgi,mgj->ij", weights, centred, centred)
    generator = torch.Generator().manual_seed(seed % 2**63)
    at_once = max(1, PERMUTED_AT_ONCE // A.numel())
    found = []
    for first in range(0, PERMUTATIONS, at_once):
        count = min(at_once, PERMUTATIONS - first)
        orders = torch.rand(count, *A.shape, generator=generator, dtype=torch.float64).argsort(-1)
        found.append(torch.einsum("kmg,mgd->kd", A.expand(count, *A.shape).gather(-1, orders), centred))
    sums = torch.cat([torch.einsum("mg,mgd->d", A, centred).unsqueeze(0), *found])
    T2 = (sums * solve(C, sums.T).T).sum(1)
    as_large = int((T2[1:] >= T2[0] * (1 - 1e-12)).sum())
    return Signal((1 + as_large) / (1 + PERMUTATIONS), float(T2[0]) / d)
