"""From logits to one token a row: greedy, or the largest of log-probabilities with counter-based noise.

No noise tensor the size of the vocabulary is drawn: first a block of 256 tokens is drawn by the blocks' sums, then a
token in it, both by Gumbel noise that depends only on (seed, request key, sample, position, token), so a completion
does not depend on what else is in the batch. On the CPU, rows are taken a few at a time through one buffer that stays
in the cache: copied, shifted by their maximum, exponentiated and summed by blocks there; everything after that touches
one block of a row. Logits of a device without float64 are drawn from on the CPU.
Leaves out: processors that transformers has beyond those of `SamplingParams`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

from tinylora.generation.noise import Uint64Array, draw_state, gumbel_noise
from tinylora.generation.sequences import Sequence
from tinylora.generation.types import SamplingParams
from tinylora.system.device import for_float64

BLOCK = 256
CHUNK = 1 << 18
"""Numbers of float32 that the buffer holds on the CPU: 1 MB, at least one row."""
NUCLEUS = 1024
"""Most probable tokens among which the end of top_p's set is looked for first: sorting all takes 15 times as long."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """The next token of every row."""

    tokens: Tensor
    """(rows,) int64, on the logits' device; 0 where the logits are not finite."""
    token_ids: list[int]
    """The same numbers on the host."""
    logprobs: list[float]
    """Under the model at the row's temperature (at 1 when greedy)."""
    sampling_logprobs: list[float]
    """Under the distribution really drawn from."""
    finite: list[bool]
    """Whether the row has a distribution; where not, its sequence has an error and must not be appended to."""


@torch.no_grad()
def draw_tokens(logits: Tensor, sequences: list[Sequence], sums: "SumBlocks | None" = None) -> Drawn:
    """Draw the next token of every sequence, or take its forced one; sequences that have finished are not to be given.

    sums: what stands for `block_sums`, where an engine has something faster.
    Shapes: logits (rows, vocabulary), any float dtype, left as they are; one sequence a row. A row whose logits hold a
    NaN or +inf, or nothing but -inf, sets its sequence's `error`; the other rows are not touched by it.
    """
    device, logits = logits.device, for_float64(logits)
    rows = len(sequences)
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, sequence in enumerate(sequences):
        groups.setdefault(_settings(sequence.request.params), []).append(i)
    # One transfer to the host for all that it needs: token, two log-probs and a flag, exact in float64.
    drawn = torch.zeros((4, rows), dtype=torch.float64, device=logits.device)
    for members in _parts(groups, sequences, logits):
        if len(members) == rows:
            drawn = _draw_group(logits, sequences, sums or block_sums)
        else:
            index = torch.tensor(members, device=logits.device)
            drawn[:, index] = _draw_group(logits[index], [sequences[i] for i in members], sums or block_sums)
    token_ids, logprobs, sampling_logprobs, finite = drawn.tolist()
    for sequence, good in zip(sequences, finite, strict=True):
        if not good:
            sequence.error = (
                f"the model gave non-finite logits for token {len(sequence.token_ids)} of sample "
                f"{sequence.sample_index}; try --set model.dtype=float32, or a smaller optim.lr if this happened "
                "during training"
            )
    return Drawn(
        drawn[0].long().to(device),
        [int(token) for token in token_ids],
        logprobs,
        sampling_logprobs,
        [bool(f) for f in finite],
    )


def _parts(
    groups: dict[tuple[object, ...], list[int]], sequences: list[Sequence], logits: Tensor
) -> Iterator[list[int]]:
    """Rows to take together: those of like settings, on the CPU only as many as stay in the cache if processed."""
    for members in groups.values():
        plain = sequences[members[0]].request.params.is_plain
        size = len(members) if plain or logits.device.type != "cpu" else max(1, 4 * CHUNK // logits.shape[1])
        for start in range(0, len(members), size):
            yield members[start : start + size]


def _settings(params: SamplingParams) -> tuple[object, ...]:
    return (
        params.temperature,
        params.top_k,
        params.top_p,
        params.min_p,
        params.repetition_penalty,
        params.logit_bias,
    )


def _draw_group(logits: Tensor, sequences: list[Sequence], sum_blocks: "SumBlocks") -> Tensor:
    """Rows of like settings: token, logprob, sampling_logprob and whether finite, (4, rows) float64."""
    params = sequences[0].request.params
    state = _state(sequences) if params.temperature > 0 else None
    temperature = float(params.temperature) or 1.0
    sums = sum_blocks(logits, temperature)
    if params.is_plain:
        scores, own_temperature, own_sums = logits, temperature, sums
    else:
        scores, own_temperature = process(logits, sequences, params), 1.0
        own_sums = sum_blocks(scores, 1.0)
    tokens = own_sums.argmax(scores) if state is None else _sample(scores, own_temperature, own_sums, state)
    if any(sequence.request.forced_ids for sequence in sequences):
        forced = torch.tensor([sequence.forced_token() for sequence in sequences], device=logits.device)
        tokens = torch.where(forced >= 0, forced, tokens)
    finite = (torch.isfinite(sums.top) & torch.isfinite(own_sums.top)).squeeze(-1)
    tokens = torch.where(finite, tokens, 0)
    logprob = sums.logprob(logits, tokens, temperature)
    sampling_logprob = logprob if params.is_plain else own_sums.logprob(scores, tokens, own_temperature)
    return torch.stack([tokens.double(), logprob, sampling_logprob, finite.double()])


def _state(sequences: list[Sequence]) -> Uint64Array:
    return draw_state(
        [int(sequence.request.params.seed) for sequence in sequences],
        [int(sequence.request.key) for sequence in sequences],
        [sequence.sample_index for sequence in sequences],
        [len(sequence.token_ids) for sequence in sequences],
    )


@dataclass(frozen=True, slots=True)
class BlockSums:
    """softmax, summed over blocks of the vocabulary and not yet normalised."""

    tops: Tensor
    """Largest score of each block, (rows, blocks) float32."""
    top: Tensor
    """Largest score of the row, (rows, 1) float32; NaN if a score is."""
    sums: Tensor
    """Sum of exp((score - top) / temperature) over each block, (rows, blocks) float64."""

    def argmax(self, scores: Tensor) -> Tensor:
        """The first token with the largest score, (rows,) int64; for the scores that this was made of."""
        block = (self.tops == self.top).byte().argmax(-1)
        token = block * BLOCK + _block_of(scores, block).argmax(-1)
        return token.clamp_max(scores.shape[1] - 1)

    def logprob(self, scores: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        """log-probabilities of the tokens, (rows,) float64."""
        shifted = scores.gather(1, tokens.unsqueeze(-1)).double() - self.top
        return shifted.squeeze(-1) / temperature - self.sums.sum(-1).log()


SumBlocks = Callable[[Tensor, float], BlockSums]


def block_sums(scores: Tensor, temperature: float) -> BlockSums:
    """Maxima and sums of the blocks of (rows, vocabulary) scores, which are left as they are."""
    rows, vocabulary = scores.shape
    blocks = -(-vocabulary // BLOCK)
    chunk = rows if scores.device.type != "cpu" else min(rows, max(1, CHUNK // (blocks * BLOCK)))
    buffer = torch.empty((chunk, blocks * BLOCK), dtype=torch.float32, device=scores.device)
    tops = torch.empty((rows, blocks), dtype=torch.float32, device=scores.device)
    top = torch.empty((rows, 1), dtype=torch.float32, device=scores.device)
    sums = torch.empty((rows, blocks), dtype=torch.float64, device=scores.device)
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        held = buffer[: part.stop - start]
        held[:, :vocabulary].copy_(scores[part])
        held[:, vocabulary:] = -torch.inf
        blocked = held.view(-1, blocks, BLOCK)
        torch.amax(blocked, -1, out=tops[part])
        torch.amax(tops[part], -1, keepdim=True, out=top[part])
        held.sub_(top[part])
        if temperature != 1:
            held.div_(temperature)
        held.exp_()
        torch.sum(blocked, -1, dtype=torch.float64, out=sums[part])
    return BlockSums(tops, top, sums)


def _block_of(scores: Tensor, block: Tensor) -> Tensor:
    """One block of each row, (rows, BLOCK) float32, -inf past the vocabulary's end."""
    vocabulary = scores.shape[1]
    index = block.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=scores.device)
    values = scores.gather(1, index.clamp_max(vocabulary - 1)).float()
    return values.masked_fill_(index >= vocabulary, -torch.inf)


def _sample(scores: Tensor, temperature: float, sums: BlockSums, state: Uint64Array) -> Tensor:
    """Draw a block by the blocks' sums, then a token of it; a token of probability 0 is never drawn."""
    blocks = sums.sums.shape[1]
    noise = torch.from_numpy(gumbel_noise(state, 0, blocks)).to(scores.device)
    block = (sums.sums.log() + noise).argmax(-1)
    noise = torch.from_numpy(gumbel_noise(state, 1 + block.cpu().numpy(), BLOCK)).to(scores.device)
    token = ((_block_of(scores, block) - sums.top).double() / temperature + noise).argmax(-1)
    # Only a row of NaN can point past the vocabulary's end.
    return (block * BLOCK + token).clamp_max(scores.shape[1] - 1)


def process(logits: Tensor, sequences: list[Sequence], params: SamplingParams) -> Tensor:
    """Logits after all processors, temperature included, up to a constant a row: softmax of it is drawn from.

    Shapes: (rows, vocabulary) -> the same in float32, -inf where a token is ruled out. Order and definitions are those
    of transformers (see SamplingParams); when greedy only bias and penalty apply.
    """
    scores = logits.float()
    empty = torch.empty((len(sequences), 0), dtype=torch.long)
    if params.logit_bias:
        index = torch.tensor([token for token, _ in params.logit_bias], device=logits.device)
        bias = torch.tensor([float(bias) for _, bias in params.logit_bias], device=logits.device)
        scores = scores.index_add(1, index, bias.expand(len(sequences), -1))
    if params.repetition_penalty != 1:
        penalty = RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty))
        scores = penalty(_seen(sequences, logits.device), scores)
    if params.temperature == 0:
        return scores
    scores = (scores - scores.amax(-1, keepdim=True)) / params.temperature
    if params.top_k:
        scores = TopKLogitsWarper(int(params.top_k))(empty, scores)
    if params.top_p < 1:
        scores = scores.masked_fill(scores < nucleus_floor(scores, params.top_p, NUCLEUS), -torch.inf)
    if params.min_p > 0:
        scores = MinPLogitsWarper(float(params.min_p))(empty, scores)
    return scores


def nucleus_floor(scores: Tensor, top_p: float, candidates: int) -> Tensor:
    """The smallest score that top_p keeps: of the last token of the smallest set of best tokens with that probability.

    Shapes: scores (rows, vocabulary) float32 -> (rows, 1). Looks among that many best tokens first, and among all for
    rows where they do not suffice. Departure from transformers' TopPLogitsWarper, which sorts every row: tokens that
    tie with the last of the set all stay, where there the order of the sort decides.
    """
    vocabulary = scores.shape[1]
    few = candidates < vocabulary
    best = scores.topk(candidates, dim=-1).values if few else scores.sort(dim=-1, descending=True).values
    mass = (best - scores.logsumexp(-1, keepdim=True)).double().exp().cumsum(-1)
    last = (mass < top_p).sum(-1, keepdim=True).clamp_max(best.shape[1] - 1)
    floor = best.gather(1, last)
    short = mass[:, -1] < top_p
    if few and short.any():
        floor[short] = nucleus_floor(scores[short], top_p, vocabulary)
    return floor


def _seen(sequences: list[Sequence], device: torch.device) -> Tensor:
    """Tokens of prompt and completion, (rows, longest); short rows repeat their first one, which penalises no more."""
    width = max(sequence.num_tokens for sequence in sequences)
    rows = [(*sequence.request.prompt_ids, *sequence.token_ids) for sequence in sequences]
    return torch.tensor([(*row, *(row[:1] * (width - len(row)))) for row in rows], device=device)
