"""Do other tools answer as we do with our adapter, and we as they do with theirs?

On a real model in float32, everything against the tool itself:

    peft_read    a TinyLoRA of PEFT's with numbers in it, saved by PEFT and imported: logits against PEFT's own
    peft_write   our adapter exported as PEFT's TinyLoRA and loaded by PEFT: logits against ours, numbers counted
    lora         our adapter exported as plain LoRA and loaded by PEFT: logits against ours
    gguf         exported as GGUF LoRA, on a float32 GGUF of the same base, in llama.cpp: greedy tokens of 50 prompts
                 against ours (a difference is a near tie where llama.cpp's two best logits lie within 1e-3); and on the
                 quantised GGUF, KL(base || adapted) on fixed tokens in llama.cpp against ours
    lm_eval      the LoRA export under lm-evaluation-harness's own `peft=` argument: greedy texts against ours

The last two run in an interpreter of their own (--peer-python; bench/peers/README.md says how to make one) and are left
out, with a word, where it lacks the package. PEFT runs in this one.

    python -m bench.trust.interop [--model smollm2-135m-instruct] [--peer-python PATH] [--save]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from bench.common import ROOT, finish
from bench.trust.portability import NEAR_TIE, prompts
from tinylora.adapter.attach import AttachedAdapter, attach, attach_explicit
from tinylora.adapter.config import AdapterConfig
from tinylora.generation.transformers_backend import TransformersEngine
from tinylora.generation.types import Request, SamplingParams
from tinylora.interop.gguf_lora import write_gguf
from tinylora.interop.lora import write_lora
from tinylora.interop.peft_tinylora import read_peft, write_peft
from tinylora.models.base import BaseModel
from tinylora.models.load import load_base_model
from tinylora.models.names import resolve_name
from tinylora.models.text import text_of

TOKENS = 24


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def logits_of(model: Any, ids: list[tuple[int, ...]]) -> list[Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([one])).logits[0] for one in ids]


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def put_on(base: BaseModel) -> AttachedAdapter:
    """13 numbers of a size that training reaches."""
    adapter = attach(base.model, AdapterConfig(num_groups=13))
    adapter.write(0.1 * torch.randn(13, 1, generator=torch.Generator().manual_seed(0)))
    return adapter


# --- PEFT ---


def peft_read(base: BaseModel, ids: list[tuple[int, ...]], folder: Path) -> dict[str, Any]:
    from peft import TinyLoraConfig, get_peft_model

    say("PEFT makes a TinyLoRA (one SVD a module)")
    tying = 1 - 13 / 210
    config = TinyLoraConfig(r=2, u=1, weight_tying=tying, target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(base.model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "tinylora_v" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    theirs = logits_of(peft, ids)
    peft.save_pretrained(folder)
    size = sum(f.stat().st_size for f in folder.iterdir())
    peft.unload()
    plain = logits_of(base.model, ids)
    explicit = read_peft(folder, base.model).explicit
    adapter = attach_explicit(base.model, explicit)
    adapter.write(explicit.v)
    ours = logits_of(base.model, ids)
    adapter.detach()
    return {
        "max_logit_diff": largest_difference(ours, theirs),
        "effect_of_the_adapter": largest_difference(plain, theirs),
        "largest_logit": max(float(x.abs().max()) for x in theirs),
        "peft_folder_bytes": size,
        "numbers": explicit.v.numel(),
    }


def peft_write(base: BaseModel, ids: list[tuple[int, ...]], folder: Path, kind: str) -> dict[str, Any]:
    from peft import PeftModel

    adapter = put_on(base)
    ours, numbers = logits_of(base.model, ids), adapter.num_trained
    write = write_peft if kind == "peft" else write_lora
    write(folder, adapter, base_name=base.name)
    adapter.detach()
    plain = logits_of(base.model, ids)
    say(f"PEFT loads our {kind} export")
    peft = PeftModel.from_pretrained(base.model, folder, is_trainable=True)
    theirs = logits_of(peft, ids)
    trained = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    peft.unload()
    return {
        "max_logit_diff": largest_difference(ours, theirs),
        "effect_of_the_adapter": largest_difference(plain, ours),
        "folder_bytes": sum(f.stat().st_size for f in folder.iterdir()),
        **({"trained_numbers": trained, "ours": numbers} if kind == "peft" else {}),
    }


# --- llama.cpp ---


def write_float32_gguf(source: Path, target: Path) -> None:
    """The same model with every tensor in float32, rounded to bfloat16 first, which is how we define the base."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub)
    for tensor in reader.tensors:
        values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32))
        writer.add_tensor(tensor.name, values.bfloat16().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def peer(python: str, script: str, job: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """What a peer script printed; None if its interpreter lacks the package."""
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    done = subprocess.run(
        [python, str(ROOT / "bench" / "peers" / script), str(path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        if any(f"No module named '{name}'" in done.stderr for name in ("llama_cpp", "lm_eval")):
            say(f"left out: {python} lacks a package for {script} ({done.stderr.strip().splitlines()[-1]})")
            return None
        raise SystemExit(f"{script} failed: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def greedy(base: BaseModel, adapter: AttachedAdapter, ids: list[tuple[int, ...]], stops: tuple[int, ...] = ()) -> Any:
    engine = TransformersEngine(
        base.model, context_length=base.context_length, pad_token_id=base.pad_token_id, adapter=adapter
    )
    params = SamplingParams(temperature=0.0, max_new_tokens=TOKENS, stop_token_ids=stops)
    v = adapter.read()
    return [c.token_ids for c in engine.generate([Request(prompt_ids=one, params=params, v=v) for one in ids])]


def llama_cpp(base: BaseModel, ids: list[tuple[int, ...]], folder: Path, python: str) -> dict[str, Any] | None:
    if base.kind == "embedded":
        from tinylora.models.embedded import embedded_file

        source = embedded_file(base.name)
    else:
        found = resolve_name(base.name)
        if found.kind != "gguf" or found.path is None:
            say("left out: llama.cpp needs a base that is a GGUF file")
            return None
        source = found.path
    adapter = put_on(base)
    write_gguf(folder / "adapter.gguf", adapter)
    write_float32_gguf(source, folder / "float32.gguf")
    ours = greedy(base, adapter, ids)
    common = {"lora": str(folder / "adapter.gguf"), "prompts": [list(one) for one in ids], "count": TOKENS}
    say("llama.cpp answers with our GGUF LoRA")
    found_tokens = peer(
        python, "llama_cpp_peer.py", {**common, "what": "tokens", "model": str(folder / "float32.gguf")}, folder
    )
    if found_tokens is None:
        adapter.detach()
        return None
    counts = {"same": 0, "near_ties": 0, "other_differences": 0}
    for a, b, gaps in zip(ours, found_tokens["tokens"], found_tokens["gaps"], strict=True):
        first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
        if first is None:
            counts["same"] += 1
        else:
            counts["near_ties" if gaps[first] < NEAR_TIE else "other_differences"] += 1
    fixed = [[*prompt, *tokens] for prompt, tokens in zip(ids, ours, strict=True)][:20]
    say("llama.cpp on the quantised base")
    kl = peer(python, "llama_cpp_peer.py", {**common, "what": "kl", "model": str(source), "prompts": fixed}, folder)
    assert kl is not None
    theirs = float(np.mean([x for row in kl["kl"] for x in row]))
    mine = []
    v = adapter.read()
    for one in fixed:
        adapter.write(None)
        p = logits_of(base.model, [tuple(one)])[0].double().log_softmax(-1)
        adapter.write(v)
        q = logits_of(base.model, [tuple(one)])[0].double().log_softmax(-1)
        mine += (p.exp() * (p - q)).sum(-1).tolist()
    adapter.detach()
    return {
        **counts,
        "prompts": len(ids),
        "tokens_each": TOKENS,
        "kl_on_quantised_base": theirs,
        "kl_ours": float(np.mean(mine)),
        "adapter_bytes": (folder / "adapter.gguf").stat().st_size,
        "version": found_tokens["version"],
    }


# --- lm-evaluation-harness ---


def lm_eval(base: BaseModel, folder: Path, python: str) -> dict[str, Any] | None:
    adapter = put_on(base)
    write_lora(folder / "lm_eval_lora", adapter, base_name=base.name)
    texts = prompts()
    ids = [tuple(base.tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    stops = (int(base.tokenizer.eos_token_id),)  # what the harness stops at; ours alone knows the others
    ours = greedy(base, adapter, ids, stops)
    adapter.detach()
    plain_adapter = attach(base.model, AdapterConfig(num_groups=13))
    plain = greedy(base, plain_adapter, ids, stops)
    plain_adapter.detach()
    job = {"folder": str(base.files[0].parent), "lora": str(folder / "lm_eval_lora"), "texts": texts, "count": TOKENS}
    say("lm-evaluation-harness answers with our LoRA export")
    found = peer(python, "lm_eval_peer.py", job, folder)
    if found is None:
        return None
    decode = lambda tokens: text_of(base, tokens)  # noqa: E731
    mine, untrained = [decode(one) for one in ours], [decode(one) for one in plain]
    return {
        "same_texts": sum(a.strip() == b.strip() for a, b in zip(mine, found["texts"], strict=True)),
        "texts": len(texts),
        "changed_by_the_adapter": sum(a != b for a, b in zip(mine, untrained, strict=True)),
        "version": found["version"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a base that is a GGUF file")
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-interop" / "bin" / "python"))
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/trust/interop.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    base = load_base_model(arguments.model, device="cpu", dtype="float32")
    ids = [tuple(base.tokenizer(text).input_ids) for text in prompts()]
    python = arguments.peer_python
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        read = peft_read(base, ids[:10], folder / "peft_read")
        written = peft_write(base, ids[:10], folder / "peft", "peft")
        lora = peft_write(base, ids[:10], folder / "lora", "lora")
        llama = llama_cpp(base, ids, folder, python) if Path(python).exists() else None
        harness = lm_eval(base, folder, python) if Path(python).exists() else None
    if not Path(python).exists():
        say(f"left out: llama.cpp and lm-eval, there being no {python} (make interop-setup)")
    result = {
        "peft_read_max_logit_diff": read["max_logit_diff"],
        "peft_write_max_logit_diff": written["max_logit_diff"],
        "lora_max_logit_diff": lora["max_logit_diff"],
        "gguf_same_tokens": f"{llama['same']} of {llama['prompts']}" if llama else None,
        "lm_eval_same_texts": f"{harness['same_texts']} of {harness['texts']}" if harness else None,
        "peft_read": read,
        "peft_write": written,
        "lora": lora,
        "gguf": llama,
        "lm_eval": harness,
        "model": arguments.model,
    }
    finish("trust/interop", result, arguments.save)


if __name__ == "__main__":
    main()
