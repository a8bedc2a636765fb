"""Every setting of a run, as frozen dataclasses: the string under a field is its help, a default is written once."""

import math
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Literal

from tinylora.adapter.config import AdapterConfig
from tinylora.config.algorithms import ALGORITHMS, AlgorithmName
from tinylora.config.bounds import check_numbers
from tinylora.config.method import MethodConfig
from tinylora.errors import check_path, check_text, require, require_at_least
from tinylora.tasks.config import PromptConfig, TaskConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The base model, and where and in which dtype it runs."""

    name: str = "smollm2-135m-instruct"
    """The embedded model's name, a folder, a .gguf file, or a hub id."""
    revision: str = ""
    """Hub revision; empty means main. The commit that was loaded is recorded in the run."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto takes CUDA, then Apple's mps, then the CPU."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto takes bfloat16 only where the hardware has it, float32 elsewhere."""
    quantization: Literal["none", "bnb-4bit", "bnb-8bit", "torchao-int8", "torchao-int4"] = "none"
    """Keep the linear maps quantised: bnb-4bit (NF4), bnb-8bit, torchao-int8, torchao-int4 (4 bits, a byte each).
    The output head and the embeddings stay in dtype. docs/quantised.md says what works where."""
    trust_remote_code: bool = False
    """Run code from a hub repository. Off unless you ask."""

    def __post_init__(self) -> None:
        require(bool(self.name), "model.name", "a model's name, folder, file or hub id", self.name)
        check_path("model.name", self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationConfig:
    """How rollouts are sampled."""

    backend: Literal["native", "transformers"] = "native"
    """Rollout engine; where native does not cover the model, transformers is used, and the run says so."""
    temperature: float = 1.0
    """Sampling temperature of the rollouts; the learner's log-probs are at the same temperature."""
    max_new_tokens: int = 64
    """Token budget of a completion, stop token included."""
    stop_strings: tuple[str, ...] = ()
    """A reply ends, and is cut, before the first of these texts; for prompts without a chat template."""
    max_batch_rows: int = 128
    """Completions decoded side by side."""
    kv_budget_gib: float = 2.0
    """Memory for keys and values (native); completions wait for their turn where it is full."""
    cuda_graphs: bool = True
    """On a GPU, record decode steps and replay them, which saves the time to launch their many small kernels."""

    def __post_init__(self) -> None:
        allowed = "from 1e-6 to 1e6 (a greedy rollout has nothing to compare)"
        require(1e-6 <= self.temperature <= 1e6, "generation.temperature", allowed, self.temperature)
        require_at_least(1, "generation", self, "max_new_tokens", "max_batch_rows")
        require(all(self.stop_strings), "generation.stop_strings", "texts that are not empty", list(self.stop_strings))
        finite = 0 < self.kv_budget_gib < math.inf
        require(finite, "generation.kv_budget_gib", "a finite number above 0", self.kv_budget_gib)


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpoConfig:
    """From rollouts to the loss."""

    prompts_per_step: int = 12
    """Groups (distinct prompts) whose gradient makes one step."""
    group_size: int = 8
    """Completions per prompt (G)."""
    advantage: Literal["group", "mean"] = "group"
    """group divides the centred reward by the group's standard deviation; mean only centres it."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped at 1 + clip_high."""
    kl_coef: float = 0.0
    """Weight of the KL to the base model (k3 estimator); the base is v = 0, so it costs a forward and no memory."""
    updates_per_batch: int = 1
    """Optimiser steps on each batch of rollouts."""
    normalisation: Literal["token", "sequence"] = "token"
    """token: mean over all trained tokens of the step; sequence: mean over completions of their token means."""
    truncated: Literal["keep", "mask", "zero"] = "zero"
    """Completions cut off at the budget (strict is 0): zero gives reward 0, keep the other scores, mask skips them."""
    refill_factor: float = 3.0
    """Sample at most this many times prompts_per_step prompts to replace groups whose rewards are all equal."""
    importance_cap: float = 2.0
    """Truncated importance sampling: learner/sampler probability ratios are cut at this value."""
    max_logprob_gap: float = 0.1
    """Stop the run when the mean |learner - sampler| log-prob of a step exceeds this."""
    until_signal: bool = False
    """npg: sample further batches until the step is no noise (p below 0.05), signal_batches at most."""
    signal_batches: int = 4
    """Batches of prompts_per_step that a step may sample under until_signal."""

    def __post_init__(self) -> None:
        enough = "at least 2 (a completion is compared with others of its prompt)"
        require(self.group_size >= 2, "grpo.group_size", enough, self.group_size)
        require_at_least(1, "grpo", self, "prompts_per_step", "updates_per_batch", "refill_factor", "importance_cap")
        require_at_least(1, "grpo", self, "signal_batches")
        require(self.refill_factor < math.inf, "grpo.refill_factor", "finite", self.refill_factor)
        require(0 <= self.clip_low <= 1, "grpo.clip_low", "between 0 and 1", self.clip_low)
        for name in ("clip_high", "kl_coef"):
            require(0 <= getattr(self, name) < math.inf, f"grpo.{name}", "0 or more, and finite", getattr(self, name))
        require(self.max_logprob_gap > 0, "grpo.max_logprob_gap", "above 0", self.max_logprob_gap)


@dataclass(frozen=True, kw_only=True, slots=True)
class SftConfig:
    """Supervised learning on reference solutions (train.algorithm = sft)."""

    target: str = "{answer}"
    """The reply to learn; {question} is the user's turn, {answer} and {solution} are the item's."""

    def __post_init__(self) -> None:
        require(bool(self.target.strip()), "sft.target", "text, such as '{question} {answer}'", self.target)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """How v moves: Adam with a rate (grpo, sft, rft), or steps of so many nats (npg)."""

    lr: float = 4e-3
    """Adam's learning rate."""
    beta1: float = 0.9
    """Decay of Adam's running mean of the gradient."""
    beta2: float = 0.99
    """Decay of Adam's running mean of the squared gradient."""
    eps: float = 1e-8
    """Added to the denominator of Adam's step."""
    max_grad_norm: float = 0.0
    """Clip the gradient's norm at this value; 0 is off."""
    warmup_steps: int = 0
    """Steps over which the rate rises linearly."""
    kl_step: float = 0.01
    """npg: length of a step in nats a reply, the KL between the model before and after it. Takes the place of lr."""
    kl_total: float = 0.0
    """npg: nats a reply that v may be from the base, by the present curvature; 0 is no bound."""
    direction: Literal["natural", "adam"] = "natural"
    """npg: where a step goes, F^-1 g or where Adam would go; kl_step is its length in both."""
    momentum: float = 0.8
    """npg: decay of the running mean of the gradient."""
    curvature_decay: float = 0.8
    """npg: decay of the running mean of the curvature F."""

    def __post_init__(self) -> None:
        for name in ("lr", "max_grad_norm"):
            require(0 <= getattr(self, name) < math.inf, f"optim.{name}", "0 or more, and finite", getattr(self, name))
        require(0 < self.kl_step <= 1, "optim.kl_step", "above 0 and at most 1 nat a reply", self.kl_step)
        nats = "0 (no bound) or more nats, and finite"
        require(0 <= self.kl_total < math.inf, "optim.kl_total", nats, self.kl_total)
        for name in ("beta1", "beta2", "momentum", "curvature_decay"):
            require(0 <= getattr(self, name) < 1, f"optim.{name}", "at least 0 and below 1", getattr(self, name))
        require(0 < self.eps < math.inf, "optim.eps", "above 0, and finite", self.eps)
        require_at_least(0, "optim", self, "warmup_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, seed and memory of a run."""

    algorithm: AlgorithmName = "grpo"
    """grpo; npg (natural gradient, no learning rate); sft on reference solutions (sft.target); rft on the untrained
    model's own right replies. A step of each has prompts_per_step x group_size replies; rft keeps the right ones."""
    steps: int = 100
    """Optimiser batches to run."""
    seed: int = 0
    """Seed of data order and sampling."""
    micro_batch_tokens: int = 0
    """Tokens per forward and backward pass; moves memory and speed, the result only by rounding. 0 takes as many as
    memory_budget_gib holds; resolved once and recorded."""
    memory_budget_gib: float = 1.0
    """Memory for the activations of a micro-batch, where micro_batch_tokens is 0."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    num_threads: int = 0
    """Torch threads; 0 takes OMP_NUM_THREADS, else the cores really available. Resolved once and recorded."""
    check_memory: bool = True
    """Refuse a run whose estimated memory is more than there is."""
    keep: Literal["best", "last"] = "best"
    """Which v is the adapter: best on validation, or the last one. Both are saved."""
    control: Literal["none", "format", "shuffled"] = "none"
    """Train on a control reward instead: format gives 1 for a finished reply in the asked-for format, right or wrong;
    shuffled deals each prompt's rewards out to its completions at random."""
    liveness_every: int = 50
    """Steps between liveness probes; one always runs at the start."""

    def __post_init__(self) -> None:
        only = "none unless train.algorithm is grpo or npg (it is a reward)"
        is_rewarded = ALGORITHMS[self.algorithm].is_reinforcement
        require(is_rewarded or self.control == "none", "train.control", only, self.control)
        require_at_least(1, "train", self, "steps", "liveness_every")
        require_at_least(0, "train", self, "num_threads", "micro_batch_tokens")
        finite = 0 < self.memory_budget_gib < math.inf
        require(finite, "train.memory_budget_gib", "a finite number above 0", self.memory_budget_gib)
        require(0 <= self.seed < 2**63, "train.seed", "at least 0 and below 2**63", self.seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Validation during the run, and the final evaluation."""

    every: int = 10
    """Steps between validation runs; 0 validates only at the end."""
    num_validation: int = 128
    """Validation items (greedy)."""
    num_test: int = 1000
    """Test items of the final evaluation; 0 leaves it out."""
    random_vectors: int = 5
    """Random vectors that the final evaluation compares with: of 1, 1/2, 1/4 and 1/8 times the norm of v, in turn."""
    prompts: tuple[dict[str, str], ...] = ()
    """Prompts (name, system, template, pattern, few_shot = yes|no) tried untrained; validation's best is a control."""

    def __post_init__(self) -> None:
        require_at_least(0, "eval", self, "every", "num_test", "random_vectors")
        require_at_least(1, "eval", self, "num_validation")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """What is written down, and how often."""

    trackers: tuple[str, ...] = ()
    """Extra trackers: tensorboard, wandb, trackio."""
    samples_per_step: int = 2
    """Completions written to samples.jsonl each step."""
    checkpoint_every: int = 1
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        known = ("tensorboard", "wandb", "trackio")
        require(set(self.trackers) <= set(known), "log.trackers", f"among {', '.join(known)}", list(self.trackers))
        require_at_least(0, "log", self, "samples_per_step")
        require_at_least(1, "log", self, "checkpoint_every")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run, resolved: what `config.toml` in the run folder holds."""

    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    prompt: PromptConfig = field(default_factory=PromptConfig)
    reward: dict[str, float] = field(default_factory=lambda: {"strict": 1.0})
    """Weights of the task's scores in the reward, by name; --set reward.value_only=0.2 adds one."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for section in fields(self):
            held = getattr(self, section.name)
            if is_dataclass(held):
                check_numbers(section.name, held)
            inner = {one.name: getattr(held, one.name) for one in fields(held)} if is_dataclass(held) else held
            check_text(section.name, inner)
        finite = all(math.isfinite(weight) for weight in self.reward.values())
        useful = finite and any(weight != 0 for weight in self.reward.values())
        own = self.method.name == "tinylora" or self.adapter.basis != "gradient"
        require(own, "method.name", "tinylora where adapter.basis is gradient", self.method.name)
        if self.method.name == "tinylora":
            self.adapter.check_projection()
        require(useful, "reward", "finite weights of the task's scores, at least one of them not 0", self.reward)

    def pace(self) -> str:
        """What decides how far a step goes, in words."""
        if ALGORITHMS[self.train.algorithm].has_rate:
            return f"learning rate {self.optim.lr:g}"
        return f"steps of {self.optim.kl_step:g} nats a reply"
