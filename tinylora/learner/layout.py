"""How a batch of completions lies on one flat token axis, every distinct prompt on it once.

The axis is a tree of segments: what all prompts begin with, then what is left of each prompt, then the completions; a
token sees its ancestors and its own segment up to itself. With a v for each completion nothing is shared: each is one
segment, its prompt in front (`lay_out_apart`); or what is shared lies on an axis of its own (`lay_out_in_two`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinylora.models.prefill import MIN_SHARED, common_prefix_length


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start to stop of the axis, which see the segments `ancestors` (start, stop) before their own."""

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]
    owner: int = -1
    """The completion by whose v it goes, where each has its own."""

    @property
    def depth(self) -> int:
        """Tokens before this segment: the position of its first one."""
        return sum(stop - start for start, stop in self.ancestors)


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch on the flat axis."""

    token_ids: list[int]
    segments: list[list[Segment]]
    """Segments with the same ancestors, one behind the other, longest first."""
    scored: list[list[int]]
    """Of each completion, the place on the axis whose hidden state predicts each of its tokens."""

    def positions(self) -> Tensor:
        """Of each token, how many it sees before it."""
        found = torch.zeros(len(self.token_ids), dtype=torch.long)
        for one in self._each():
            found[one.start : one.stop] = torch.arange(one.depth, one.depth + one.stop - one.start)
        return found

    def owners(self) -> Tensor:
        """Of each token, its segment's owner."""
        found = torch.zeros(len(self.token_ids), dtype=torch.long)
        for one in self._each():
            found[one.start : one.stop] = one.owner
        return found

    def _each(self) -> Iterator[Segment]:
        return (one for siblings in self.segments for one in siblings)


def shared_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that distinct prompts begin with, 0 where they are too few for a segment of their own."""
    length = common_prefix_length(prompts) if len(prompts) > 1 else 0
    return length if length >= MIN_SHARED else 0


class _Axis:
    """The flat axis while it is laid out."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.segments: list[list[Segment]] = []

    def append(self, tokens: Sequence[int], ancestors: tuple[tuple[int, int], ...] = (), owner: int = -1) -> Segment:
        """Put tokens behind all others; whoever calls puts the segment among its siblings."""
        self.token_ids.extend(tokens)
        return Segment(len(self.token_ids) - len(tokens), len(self.token_ids), ancestors, owner)

    def add_prompts(self, prompts: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], Segment]:
        """Distinct prompts, longest first, behind what all begin with; of each the segment that ends it."""
        if not all(prompts):
            raise ValueError("a completion needs a prompt of at least one token")
        distinct = sorted(dict.fromkeys(prompts), key=len, reverse=True)
        shared = shared_prefix(distinct)
        above: tuple[tuple[int, int], ...] = ()
        if shared:
            head = self.append(distinct[0][:shared])
            self.segments.append([head])
            above = ((head.start, head.stop),)
        roots = [self.append(prompt[shared:], above) for prompt in distinct]
        self.segments.append(roots)
        return dict(zip(distinct, roots, strict=True))


def _behind(
    axis: _Axis, roots: dict[tuple[int, ...], Segment], prompts: Sequence[tuple[int, ...]],
    completions: Sequence[tuple[int, ...]], *, owned: bool,
) -> list[Segment]:  # fmt: skip
    """Put completions on the axis, those of one prompt together and longest first; each one's segment, in order.

    A completion's last token predicts nothing and is left out. Of one that has no other, the segment is empty.
    """
    found: dict[int, Segment] = {}
    for prompt, root in roots.items():
        siblings = []
        for i in sorted((i for i, one in enumerate(prompts) if one == prompt), key=lambda i: -len(completions[i])):
            ancestors = (*root.ancestors, (root.start, root.stop))
            found[i] = one = axis.append(completions[i][:-1], ancestors, i if owned else -1)
            if one.stop > one.start:
                siblings.append(one)
        if siblings:
            axis.segments.append(siblings)
    return [found[i] for i in range(len(completions))]


def lay_out(prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]]) -> Layout:
    """Put completions behind their prompts (one for each completion, equal ones count once).

    Order: by length, then by place in the batch.
    Raises: ValueError for an empty prompt, behind which nothing can be scored.
    """
    axis = _Axis()
    roots = axis.add_prompts(prompts)
    segments = _behind(axis, roots, prompts, completions, owned=False)
    scored = [
        [roots[prompt].stop - 1, *range(one.start, one.stop)][: len(tokens)]
        for prompt, one, tokens in zip(prompts, segments, completions, strict=True)
    ]
    return Layout(axis.token_ids, axis.segments, scored)


def lay_out_apart(prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]]) -> Layout:
    """Each completion behind a prompt of its own, one segment each, longest first. Raises: ValueError as `lay_out`."""
    if not all(prompts):
        raise ValueError("a completion needs a prompt of at least one token")
    axis = _Axis()
    texts = [prompt + tokens[:-1] for prompt, tokens in zip(prompts, completions, strict=True)]
    segments = {i: axis.append(texts[i], (), i) for i in sorted(range(len(texts)), key=lambda i: -len(texts[i]))}
    axis.segments.append(list(segments.values()))
    scored = [
        list(range(segments[i].start + len(prompts[i]) - 1, segments[i].stop))[: len(completions[i])]
        for i in range(len(texts))
    ]
    return Layout(axis.token_ids, axis.segments, scored)


def lay_out_in_two(prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]]) -> tuple[Layout, Layout]:
    """Prompts on one axis, completions on another, which see places on the first and go by a v of their own.

    On the first axis the place of each completion's first token is scored, on the second those of the others.
    Raises: ValueError as `lay_out`.
    """
    above, axis = _Axis(), _Axis()
    roots = above.add_prompts(prompts)
    segments = _behind(axis, roots, prompts, completions, owned=True)
    first = [[roots[prompt].stop - 1][: len(tokens)] for prompt, tokens in zip(prompts, completions, strict=True)]
    others = [list(range(one.start, one.stop)) for one in segments]
    return Layout(above.token_ids, above.segments, first), Layout(axis.token_ids, axis.segments, others)
