"""The peer of bench/speed/grpo_step.py, in a process of its own: TRL's GRPOTrainer with PEFT's TinyLoRA on a given job.

The job file (JSON, written by bench/speed/grpo_step.py) names the model folder, the prompts as token ids, the length of
every completion, and how many steps to time. A completion gets its length from a logits processor: the end token cannot
be drawn before and must be drawn at the last position, so that the trainer stops and masks as it always does. What else
is done to the trainer is what a user can do: settings, and where the weights lie in memory (`tuned`, see README.md).

    python -m bench.peers.trl_step JOB.json [--set name=value ...]
"""

import argparse
import gc
import json
import logging
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")

import torch
from peft import TinyLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
from transformers.generation.continuous_batching import ContinuousBatchingManager
from trl import GRPOConfig, GRPOTrainer

from bench.peers import PeakMemory


@dataclass(frozen=True)
class Settings:
    """What can be set. The defaults are the best found on a CPU; `AS_IT_COMES` is what the library would do."""

    batch: int = 8
    """per_device_train_batch_size; the rest of the step's completions by gradient accumulation."""
    checkpointing: bool = False
    autocast: bool = True
    """bf16=True: mixed precision around a bf16 model. False keeps the model's own dtypes, v in bf16."""
    attention: str = "sdpa"
    head: str = "transposed"
    """tied: as loaded; copy: a matrix of its own; transposed: a contiguous copy of its transpose."""
    dense: str = "plain"
    """plain, or transposed: every other linear map stored as the head is."""
    cache: str = ""
    """cache_implementation of generate; empty for the default."""
    compile: bool = False
    compact: bool = False
    """The vocabulary product on completion tokens alone. Not a setting: needs a change inside TRL."""
    continuous: bool = False
    """use_transformers_continuous_batching."""


AS_IT_COMES = Settings(batch=8, checkpointing=True, head="tied")


class ForcedLengths(LogitsProcessor):
    """Row i ends, with the end token, exactly at lengths[i]."""

    def __init__(self, lengths: Tensor, end: list[int]) -> None:
        self.lengths, self.end, self.position = lengths, end, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.position += 1
        scores[:, self.end] = -torch.inf
        last = (self.lengths == self.position).nonzero().squeeze(1)
        scores[last] = -torch.inf
        scores[last, self.end[0]] = 0.0
        return scores


@contextmanager
def forced_lengths(model: Any, lengths: Tensor, end: list[int]) -> Iterator[None]:
    """Whatever `model` generates in the block has these lengths, by generate as by continuous batching."""
    generate, add_request = model.generate, ContinuousBatchingManager.add_request

    def generate_forced(**given: Any) -> Any:
        return generate(**given, logits_processor=LogitsProcessorList([ForcedLengths(lengths, end)]))

    def add_forced(manager: Any, *, request_id: str, **given: Any) -> Any:
        given |= {"max_new_tokens": int(lengths[int(request_id.rpartition("_")[2])]), "eos_token_id": -1}
        return add_request(manager, request_id=request_id, **given)

    model.generate, ContinuousBatchingManager.add_request = generate_forced, add_forced
    try:
        yield
    finally:
        model.generate, ContinuousBatchingManager.add_request = generate, add_request


class Trainer(GRPOTrainer):
    """GRPOTrainer whose prompts are numbers of the job's prompts, whose lengths are the job's, and which looks at the
    clock."""

    job: dict[str, Any]
    clock: dict[str, float]

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        seen: Counter[int] = Counter()
        lengths = []
        for prompt in map(int, prompts):
            lengths.append(self.job["lengths"][prompt][seen[prompt]])
            seen[prompt] += 1
        self.row_lengths = torch.tensor(lengths)
        return [self.job["prompts"][int(prompt)] for prompt in prompts], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        with forced_lengths(self.accelerator.unwrap_model(self.model), self.row_lengths, self.eos_token_ids):
            result = super()._generate_single_turn(*args, **kwargs)
        drawn = [len(ids) for ids in result[0]]
        if drawn != self.row_lengths.tolist():
            raise SystemExit(f"the lengths are not the job's: {drawn} for {self.row_lengths.tolist()}")
        self.clock["tokens"] += sum(drawn)
        self.clock["rollout"] += time.perf_counter() - started
        return result

    def _compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        loss = super()._compute_loss(*args, **kwargs)
        self.clock["forward"] += time.perf_counter() - started
        return loss


class Clock(TrainerCallback):
    """Seconds of every optimiser step, from the end of the last one to its own."""

    def __init__(self, clock: dict[str, float], memory: PeakMemory) -> None:
        self.clock, self.memory, self.steps = clock, memory, []
        self.last = self.last_cpu = 0.0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._restart()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.last
        cpu = time.process_time() - self.last_cpu
        self.steps.append({"seconds": seconds, "cpu_seconds": cpu, **self.clock, "peak_mb": self.memory.peak_mb()})
        print(f"  peer: step {len(self.steps)}: {seconds:.2f} s", file=sys.stderr, flush=True)
        self._restart()

    def _restart(self) -> None:
        self.clock.update(rollout=0.0, forward=0.0, backward=0.0, tokens=0)
        gc.collect()
        self.memory.restart()
        self.last, self.last_cpu = time.perf_counter(), time.process_time()


def lay_out(model: Any, settings: Settings) -> None:
    """Where the weights lie in memory; the numbers are the same."""

    def transposed(module: nn.Module) -> None:
        module.weight = nn.Parameter(module.weight.data.t().contiguous().t(), requires_grad=False)

    if settings.dense == "transposed":
        for module in model.model.modules():
            if isinstance(module, nn.Linear):
                transposed(module)
    if settings.head == "transposed":
        transposed(model.lm_head)
    elif settings.head == "copy":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone(), requires_grad=False)


def build(job: dict[str, Any], settings: Settings, folder: str) -> Trainer:
    from datasets import Dataset

    model = AutoModelForCausalLM.from_pretrained(
        job["folder"], dtype=torch.bfloat16, attn_implementation=settings.attention
    )
    tokenizer = AutoTokenizer.from_pretrained(job["folder"], padding_side="left")
    lay_out(model, settings)
    num_modules = sum(isinstance(m, nn.Linear) for m in model.model.modules())
    config = TinyLoraConfig(
        r=2, u=1, weight_tying=1 - job["numbers"] / num_modules, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=settings.autocast)
    rows = len(job["prompts"]) * job["group_size"]
    rewards = random.Random(job["seed"])
    arguments = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=rows // settings.batch,
        num_generations=job["group_size"],
        max_completion_length=max(max(lengths) for lengths in job["lengths"]),
        temperature=job["temperature"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        max_steps=job["warmup"] + job["steps"],
        beta=0.0,
        bf16=settings.autocast,
        gradient_checkpointing=settings.checkpointing,
        cache_implementation=settings.cache or None,
        torch_compile=settings.compile,
        use_transformers_continuous_batching=settings.continuous,
        use_cpu=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        max_grad_norm=0.0,
        seed=job["seed"],
    )
    trainer = Trainer(
        model=model,
        reward_funcs=lambda completions, **_: [rewards.random() for _ in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(job["prompts"]))]}),
        processing_class=tokenizer,
    )
    trainer.job = job
    return trainer


def watch(trainer: Trainer, clock: dict[str, float]) -> None:
    trainer.clock = clock
    backward = trainer.accelerator.backward

    def timed(*args: Any, **kwargs: Any) -> None:
        started = time.perf_counter()
        backward(*args, **kwargs)
        clock["backward"] += time.perf_counter() - started

    trainer.accelerator.backward = timed


def patch_compact() -> None:
    """Score only the labelled positions, as TRL does where it has Triton."""
    from trl.trainer import utils

    plain = utils._ChunkedLogProbFunction

    class Compact:
        @staticmethod
        def apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> Any:
            keep = (targets > 0).nonzero().squeeze(1)  # masked labels were clamped to 0, which nobody draws here
            found = plain.apply(hidden[keep], weight, bias, targets[keep], *rest)
            return tuple(None if x is None else x.new_zeros(len(targets)).index_put((keep,), x) for x in found)

    utils._ChunkedLogProbFunction = Compact


def read_settings(pairs: list[str], settings: Settings) -> Settings:
    types = {field.name: field.type for field in fields(Settings)}
    for pair in pairs:
        name, _, value = pair.partition("=")
        kind = types[name]
        settings = replace(settings, **{name: value == "True" if kind in (bool, "bool") else kind(value)})
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--as-it-comes", action="store_true", help="start from the library's own settings")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    job = json.loads(arguments.job.read_text())
    settings = read_settings(arguments.set, AS_IT_COMES if arguments.as_it_comes else Settings())
    torch.set_num_threads(job["threads"])
    if settings.compact:
        patch_compact()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(job, settings, folder)
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in trained]
        memory, clock = PeakMemory(), dict[str, float]()
        watch(trainer, clock)
        timer = Clock(clock, memory)
        trainer.add_callback(timer)
        trainer.train()
        if all(torch.equal(a, b) for a, b in zip(trained, before, strict=True)):
            raise SystemExit("the peer's steps have not moved v")
    result = {
        "steps": timer.steps[job["warmup"] :],
        "numbers": sum(p.numel() for p in trained),
        "dtype_v": str(trained[0].dtype),
        "process_peak_mb": memory.process_peak_mb(),
        "threads": torch.get_num_threads(),
        "settings": asdict(settings),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
