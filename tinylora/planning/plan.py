"""What a run comes to: tokens from its settings, hours from a measured speed. Leaves out: measuring it (timing.py)."""

import math
from dataclasses import dataclass, replace

from tinylora.config.algorithms import ALGORITHMS, AlgorithmName
from tinylora.config.run import RunConfig
from tinylora.models.prefill import MIN_SHARED, common_prefix_length
from tinylora.planning.speed import Speed
from tinylora.talk import format_duration

ASSUMED_PROMPT_TOKENS = 200
CHARACTERS_PER_TOKEN = 4.0
"""Of text; digits are tokens of their own for most tokenizers."""
MESSAGE_TOKENS = 5
"""Marks around a chat message."""
SYSTEM_TOKENS = 20
"""The system turn that many templates bring where a prompt has none."""
_END = "\x1e"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompts:
    """How long a task's prompts are."""

    tokens: int
    """Of one, on average."""
    shared: int = 0
    """Of them, what all begin with (system prompt, examples): computed once a batch."""
    source: str
    """How that was found."""

    def together(self, count: int) -> int:
        """Tokens that are computed for `count` of them in one batch."""
        return self.shared + count * (self.tokens - self.shared) if count else 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Tokens and hours of a run if every completion fills its budget: upper bounds but for refilled groups."""

    algorithm: AlgorithmName
    steps: int
    completions_per_step: int
    prompts: Prompts
    sampled_tokens: int
    """In training; 0 under sft."""
    sampled_tokens_with_all_refills: int
    learner_tokens: int
    evaluation_tokens: int
    hours: float
    """No group refilled."""
    hours_with_all_refills: float
    step_seconds: float
    """One step, no group refilled, validation left out."""
    step_seconds_at_half: float
    """The same where replies fill half of their budget, and half of the groups (rft: of the replies) are learned from;
    a group whose rewards are equal costs the learner nothing."""


def prompts_of(config: RunConfig) -> Prompts:
    """How long the prompts are, guessed from the characters of a few of the task's questions where those can be had
    without network, else an assumption."""
    from tinylora.tasks.build import build_task
    from tinylora.tasks.sets.public_sets import PUBLIC

    task = config.task
    if task.name in PUBLIC and not task.path:
        return Prompts(tokens=ASSUMED_PROMPT_TOKENS, source="assumed: the questions are on the hub")
    if task.name.startswith("reasoning_gym:"):
        task = replace(task, num_items=min(task.num_items, 512))
    built = build_task(task, config.prompt)
    prompts = [built.prompt(item) for item in built.items("train")[:64]]
    texts = ["".join(m["content"] + _END for m in prompt) for prompt in prompts]
    alike = common_prefix_length([tuple(map(ord, text)) for text in texts]) if len(texts) > 1 else 0

    def count(text: str) -> float:
        digits = sum(map(str.isdecimal, text))
        messages = text.count(_END)
        tokens = digits + (len(text) - digits - messages) / CHARACTERS_PER_TOKEN
        return tokens + MESSAGE_TOKENS * messages if config.prompt.chat else tokens

    is_marked = config.prompt.chat and any(m["role"] == "system" for m in prompts[0])
    added = SYSTEM_TOKENS if config.prompt.chat and not is_marked else 0
    tokens = round(added + sum(map(count, texts)) / len(texts))
    shared = int(added + count(texts[0][:alike]))
    return Prompts(
        tokens=tokens,
        shared=min(shared, tokens - 1) if shared >= MIN_SHARED else 0,
        source="guessed from questions of the task",
    )


def make_plan(config: RunConfig, speed: Speed, prompts: Prompts, numbers: int = 1) -> Plan:
    """Tokens and hours of the run. `numbers` of v count under npg, which scores every reply by itself.

    What prompts have in common counts once a step, a group's own prompt once; under sft every reply has its own. The
    final evaluation counts, for a test item, greedy and sampled answers of both models, one of a larger budget, one
    under another prompt and one for each random vector; and each candidate prompt on the validation items.
    """
    full, half = (_step(config, speed, prompts, numbers, share) for share in (1.0, 0.5))
    steps, refill = config.train.steps, config.grpo.refill_factor
    tokens, passes, replies = _evaluation(config)
    evaluation = tokens / speed.decode_tokens_per_second
    evaluation += (passes * prompts.shared + replies * (prompts.tokens - prompts.shared)) / (
        speed.forward_tokens_per_second
    )
    hours = (steps * full.seconds + evaluation) / 3600
    return Plan(
        algorithm=config.train.algorithm,
        steps=steps,
        completions_per_step=config.grpo.prompts_per_step * config.grpo.group_size,
        prompts=prompts,
        sampled_tokens=steps * full.sampled,
        sampled_tokens_with_all_refills=math.ceil(steps * full.sampled * refill),
        learner_tokens=steps * full.learned,
        evaluation_tokens=tokens,
        hours=hours,
        hours_with_all_refills=hours + steps * full.sampling_seconds * (refill - 1) / 3600,
        step_seconds=full.seconds,
        step_seconds_at_half=half.seconds,
    )


@dataclass(frozen=True, slots=True)
class _Step:
    """One step where replies fill a given share of their budget, and that share of what is sampled is learned from."""

    sampled: int
    learned: int
    sampling_seconds: float
    seconds: float


def _step(config: RunConfig, speed: Speed, prompts: Prompts, numbers: int, share: float) -> _Step:
    grpo, facts = config.grpo, ALGORITHMS[config.train.algorithm]
    count, completions = grpo.prompts_per_step, grpo.prompts_per_step * grpo.group_size
    replies = math.ceil(share * completions * config.generation.max_new_tokens)
    if not facts.samples:
        count, sampling, sampled, updates, kept = completions, 0.0, 0, 1, 1.0
    else:
        kept = share
        sampled, updates = replies, grpo.updates_per_batch if facts.is_reinforcement else 1
        sampling = sampled / speed.decode_tokens_per_second
        sampling += prompts.together(count) / speed.forward_tokens_per_second
    learned = updates * (prompts.together(math.ceil(kept * count)) + math.ceil(kept * replies))
    if config.train.algorithm == "npg":  # scores every reply, the way that computes fewer tokens
        apart, tangents = completions * prompts.tokens, math.ceil((1 + numbers) * prompts.together(count) / 3)
        learned = min(apart, tangents) + replies
    seconds = sampling + learned / speed.learner_tokens_per_second + speed.vector_seconds
    if facts.is_reinforcement and grpo.kl_coef > 0:
        seconds += learned / speed.forward_tokens_per_second
    return _Step(sampled, learned, sampling, seconds)


def _evaluation(config: RunConfig) -> tuple[int, int, int]:
    """Tokens of replies, passes over a set of items, and replies of validation and final evaluation."""
    from tinylora.rollouts.prompts import BUDGET_FACTOR, prompt_candidates

    each, budget = config.eval, config.generation.max_new_tokens
    passes = 1 + (config.train.steps // each.every if each.every else 1)
    replies = passes * each.num_validation
    tokens = replies
    if each.num_test:
        candidates = len(prompt_candidates(config))
        conditions = 4 + 1 + 1 + each.random_vectors
        passes += conditions + candidates
        replies += conditions * each.num_test + candidates * each.num_validation
        tokens = replies + (BUDGET_FACTOR - 1) * each.num_test
    return tokens * budget, passes, replies


def format_plan(speed: Speed, plan: Plan) -> str:
    """Lines for people: speed, tokens, hours."""
    prompts = plan.prompts
    shared = f", of which all share {prompts.shared}" if prompts.shared else ""
    refills = f" (up to {plan.sampled_tokens_with_all_refills:,} if groups are refilled to the cap)"
    what = "completions" if ALGORITHMS[plan.algorithm].samples else "reference replies"
    is_refilled = plan.sampled_tokens_with_all_refills > plan.sampled_tokens
    return "\n".join(
        [
            f"speed here now, measured on {speed.measured_on}: {speed.forward_tokens_per_second:,.0f} tok/s forward, "
            f"{speed.learner_tokens_per_second:,.0f} tok/s forward and backward, "
            f"{speed.decode_tokens_per_second:,.0f} tok/s decoding {speed.decode_rows} rows, {speed.threads} threads",
            f"run: {plan.steps} steps of {plan.completions_per_step} "
            f"{what}; prompts of {prompts.tokens} tokens"
            f"{shared} ({prompts.source})",
            f"tokens, if every reply fills its budget: {plan.sampled_tokens:,} sampled"
            + (refills if is_refilled else "")
            + f", {plan.learner_tokens:,} through the learner, {plan.evaluation_tokens:,} for evaluation",
            f"time, at most: {plan.hours:,.1f} hours ({format_duration(3600 * plan.hours)})"
            + (f"; {plan.hours_with_all_refills:,.1f} hours with every refill" if is_refilled else "")
            + f"; a step {format_duration(plan.step_seconds)}, or {format_duration(plan.step_seconds_at_half)} where "
            f"replies fill half of their budget{ALGORITHMS[plan.algorithm].shortened_by}",
        ]
    )
