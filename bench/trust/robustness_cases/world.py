"""What the trials are made of: tiny random models, questions, recipes, and a reward that any text can earn."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.common import ROOT

CONTEXT = 192
LIBRARY = "robustness_reward"
REWARD = """\
def even(item, text):
    share = sum(ord(c) % 2 == 0 for c in text) / max(1, len(text))
    return {"strict": float(share >= 0.5), "value_only": share}
"""
RECIPE: dict[str, dict[str, Any]] = {
    "model": {"device": "cpu", "dtype": "float32"},
    "adapter": {"u": 2, "n_tie": 8},
    "task": {"name": "jsonl", "path": "sums.jsonl", "scorer": "shaped:even"},
    "reward": {"value_only": 1.0},
    "generation": {"max_new_tokens": 4},
    "grpo": {"prompts_per_step": 2, "group_size": 2, "truncated": "keep"},
    "optim": {"lr": 0.05},
    "train": {"steps": 2, "num_threads": 1},
    "eval": {"every": 0, "num_validation": 2, "num_test": 0, "random_vectors": 1},
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALSO_LOADED = ("transformers.models.gpt2.modeling_gpt2", "gguf", "matplotlib.figure", "matplotlib.backends.backend_svg")
LISTED = """
import atexit, json, runpy, sys
atexit.register(lambda: open("modules.json", "w").write(json.dumps(list(sys.modules))))
sys.argv[:] = ["tinylora", "train", "t.toml"]
runpy.run_module("tinylora", run_name="__main__", alter_sys=True)
"""
"""The first run, which leaves a list of the modules that it has imported."""


def toml(value: Any) -> str:
    """A value of TOML, tables in one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (str, bool)) else repr(value)


class World:
    """Made once, when something is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def warm_up(self) -> None:
        """Import what children share, and compile the kernels once, in a process of its own."""
        library = self.folder / "library"  # on the path, so that the first run is the user's own wherever it is copied
        library.mkdir(exist_ok=True)
        (library / f"{LIBRARY}.py").write_text(self.reward())
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(library)])
        sys.path.append(str(library))
        ready = self.folder / "warm"
        if not (ready / "runs" / "t-001").exists():
            ready.mkdir(exist_ok=True)
            (ready / "sums.jsonl").write_text(self.sums())
            task = {"path": str(ready / "sums.jsonl"), "scorer": f"{LIBRARY}:even"}
            (ready / "t.toml").write_text(self.recipe(self.model("llama"), task=task, eval={"num_test": 2}))
            done = subprocess.run(
                [sys.executable, "-c", LISTED], cwd=ready, capture_output=True, text=True,
                timeout=900, env=dict(os.environ),
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"the tiny run itself fails: {done.stderr[-2000:]}")
        for name in ["tinylora", *json.loads((ready / "modules.json").read_text()), *ALSO_LOADED]:
            if name.split(".")[0] not in ("__main__", LIBRARY):
                with suppress(Exception):  # some are no modules that can be imported by name
                    importlib.import_module(name)

    @property
    def first_run(self) -> Path:
        """A finished run with a final evaluation, to be copied and not to be touched."""
        return self.folder / "warm" / "runs" / "t-001"

    def sums(self, count: int = 48) -> str:
        rows = ({"question": f"{n // 8} + {n % 8} =", "answer": str(n // 8 + n % 8)} for n in range(count))
        return "".join(json.dumps(row) + "\n" for row in rows)

    def reward(self) -> str:
        return REWARD

    def recipe(self, model: str | Path, **sections: Any) -> str:
        """The tiny recipe as TOML; `sections` change keys of it, and None takes one out."""
        text = ""
        for name in {**RECIPE, **sections}:
            keys = {**({"name": str(model)} if name == "model" else {}), **RECIPE.get(name, {})}
            given = sections.get(name, {})
            if name == "reward" and given:
                keys = {}
            lines = (f"{key} = {toml(value)}" for key, value in {**keys, **given}.items() if value is not None)
            text += f"[{name}]\n" + "\n".join(lines) + "\n\n"
        return text

    def model(self, kind: str) -> Path:
        """The folder of a tiny model: llama, gpt2, mixtral, qwen3_moe, qwen2."""
        folder = self.folder / "models" / kind
        if not (folder / "config.json").exists():
            self._save(folder, *_ARCHITECTURES[kind]())
        return folder

    def with_template(self, name: str, template: str | Callable[[dict[str, Any]], None], kind: str = "llama") -> Path:
        """A copy of a tiny model with another chat template, or with its tokenizer's settings changed."""
        import shutil

        folder = self.folder / "models" / f"{kind}-{name}"
        if not folder.exists():
            shutil.copytree(self.model(kind), folder)
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            path = folder / "tokenizer_config.json"
            settings = json.loads(path.read_text())
            settings.pop("chat_template", None)
            if isinstance(template, str):
                (folder / "chat_template.jinja").write_text(template)
            else:
                (folder / "chat_template.jinja").write_text(CHAT)
                template(settings)
                if "chat_template" in settings:
                    (folder / "chat_template.jinja").unlink()
            path.write_text(json.dumps(settings))
        return folder

    def parrot(self, reply: str, prompt_tokens: int) -> Path:
        """A model that answers every prompt of that length with one text: only the position decides its next token."""
        import hashlib

        import torch
        import transformers

        name = hashlib.sha256(f"{reply} {prompt_tokens}".encode()).hexdigest()[:12]
        folder = self.folder / "models" / f"parrot-{name}"
        if (folder / "config.json").exists():
            return folder
        tokenizer = _byte_tokenizer()
        width = 256
        config = transformers.GPT2Config(
            vocab_size=len(tokenizer), n_embd=width, n_layer=1, n_head=2, n_positions=width, n_inner=64,
            tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        wanted = [*tokenizer(reply, add_special_tokens=False)["input_ids"], 2]
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(0.0, 0.02) if "ln" not in key else None
            model.transformer.wpe.weight.copy_(10 * torch.eye(width))
            model.lm_head.weight.zero_()
            for offset, token in enumerate(wanted):
                model.lm_head.weight[token, prompt_tokens - 1 + offset] = 1.0
        self._save(folder, model, tokenizer)
        return folder

    def gguf(self, name: str, **options: Any) -> Path:
        """A tiny Qwen2 as a GGUF file."""
        from bench.trust.robustness_cases.tiny_gguf import write_gguf

        path = self.folder / "gguf" / name
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            write_gguf(path, **options)
        return path

    def _save(self, folder: Path, model: Any, tokenizer: Any) -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()
        scratch = folder.with_name(f".{folder.name}")
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(folder)


def _byte_tokenizer() -> Any:
    """One token a byte behind three special ones: <|endoftext|> 0, <|im_start|> 1, <|im_end|> 2 (eos and pad)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        chat_template=CHAT,
    )  # fmt: skip


def _random(model_class: str, config_class: str, **sizes: Any) -> tuple[Any, Any]:
    import torch
    import transformers

    tokenizer = _byte_tokenizer()
    common: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**common, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.to(torch.float32), tokenizer


_SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
_ARCHITECTURES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llama": lambda: _random("LlamaForCausalLM", "LlamaConfig", **_SIZES),
    "qwen2": lambda: _random("Qwen2ForCausalLM", "Qwen2Config", **{**_SIZES, "tie_word_embeddings": True}),
    "gpt2": lambda: _random("GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT),
    "mixtral": lambda: _random(
        "MixtralForCausalLM", "MixtralConfig", num_local_experts=4, num_experts_per_tok=2, **_SIZES
    ),
    "qwen3_moe": lambda: _random(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
        head_dim=8, **_SIZES,
    ),
}  # fmt: skip
