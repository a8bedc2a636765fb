"""Every prompt of a run is made before it: what does not fit, or cannot be made, ends no run in the night."""

from collections import Counter
from collections.abc import Mapping, Sequence

from tinylora.errors import UserError
from tinylora.models.control import found_in
from tinylora.models.prompt import Encoded, unknown_end
from tinylora.models.template import Handed
from tinylora.rollouts.candidates import prompt_candidates
from tinylora.rollouts.runtime import Prompting, Runtime
from tinylora.talk import Say
from tinylora.tasks.base import Item, Split

EVERY = 10**12
"""More items than there are: all of a split."""


def check_prompts(runtime: Runtime, say: Say) -> None:
    """Encode the prompts of all items that training, validation and the final evaluation ask, and say what is worth it.

    Raises: UserError for a prompt that cannot be made, or one that does not fit, with its item and the ways out.
    """
    config, task = runtime.config, runtime.task
    counts: dict[Split, int] = {"train": EVERY, "validation": config.eval.num_validation}
    if config.eval.num_test:
        counts["test"] = config.eval.num_test
    candidates = list(prompt_candidates(config).values())[1:]
    seen: Counter[str] = Counter()
    for split, count in counts.items():
        items = task.items(split)
        check_items(runtime, split, items[:count], [None, *(candidates if split != "train" else [])], seen)
        for prompting in (task.prompt, *(candidates if split != "train" else [])):
            for item in items[count:]:
                prompting(item)  # a pattern that does not match
    total = sum(seen[split] for split in counts)
    for remark, number in seen.items():
        if remark not in counts:
            say(f"{remark} (in {number:,} of {total:,} prompts)")


def check_items(
    runtime: Runtime,
    split: Split,
    items: Sequence[Item],
    promptings: Sequence[Prompting | None],
    seen: Counter[str] | None = None,
) -> None:
    """The same for some items of a split; remarks are counted in `seen`."""
    seen = Counter() if seen is None else seen
    for prompting in promptings:
        encoded = runtime.encode_items(items, prompting)
        refuse_misfits(runtime, split, items, runtime.misfits(split, items, encoded, prompting))
        seen[split] += len(items)
        for item, one in zip(items, encoded, strict=True):
            seen.update({*one.remarks, *_remarks(runtime, item, one)})
        if len({one.ids for one in encoded}) == 1 and len({item.question for item in items}) > 1:
            seen[f"all {split} prompts are the same, whatever is asked"] += len(items)


def refuse_misfits(runtime: Runtime, split: Split, items: Sequence[Item], reasons: Mapping[int, str]) -> None:
    """Raises: UserError that names the first item that does not fit, how many there are, and what to do."""
    if not reasons:
        return
    index, reason = next(iter(sorted(reasons.items())))
    item = items[index]
    excerpt = item.question if len(item.question) <= 60 else f"{item.question[:60]}…"
    more = f", and {len(reasons) - 1:,} more" if len(reasons) > 1 else ""
    raise UserError(
        f"{reason}; shorten it, or use fewer few-shot examples: {excerpt!r} ({split} item {item.id[:12]}{more}); or "
        "leave such items out: --set 'task.skip=[\"too-long\"]'"
    )


def never_ends(runtime: Runtime) -> str:
    """What is to be said of a model whose replies cannot end, or end by a token that does not count; else nothing."""
    base, config = runtime.base, runtime.config
    if config.generation.stop_strings:
        return ""
    way_out = (
        "an eos_token in its tokenizer_config.json, or an eos_token_id in its generation_config.json, or set "
        "generation.stop_strings"
    )
    if not base.stop_token_ids:
        return (
            f"{base.name} has no token that ends a reply: each is cut off at generation.max_new_tokens, and what is "
            f"cut off has a strict score of 0, whatever the budget; name {way_out}"
        )
    if config.prompt.chat and (token := unknown_end(base, Handed.of(config.prompt))):
        return (
            f"the chat template of {base.name} ends a turn with {token}, which is none of the tokens that end a reply "
            f"here; if replies never stop, name it as {way_out}"
        )
    return ""


def _remarks(runtime: Runtime, item: Item, encoded: Encoded) -> list[str]:
    base, found = runtime.base, []
    unknown = base.tokenizer.unk_token_id
    if unknown is not None and unknown not in (*base.stop_token_ids, base.pad_token_id) and unknown in encoded.ids:
        found.append(f"characters that the tokenizer of {base.name} does not know")
    if not runtime.config.prompt.chat and (tokens := found_in(base, item.question)):
        found.append(
            f"{', '.join(tokens)}: control tokens of {base.name} in a question, which count as such without a chat "
            "template"
        )
    return found
