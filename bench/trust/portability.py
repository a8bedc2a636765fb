"""Do the same few bytes mean the same adapter everywhere?

An adapter of 13 numbers is encoded here. Then it is decoded in fresh processes, each with an empty cache, under other
conditions: another thread count, another load dtype, other shards, LAPACK through NumPy in place of our SVD, other code
paths of torch and oneDNN, and, with --other-python, another torch and transformers. Each rebuilds the basis, checks it
against the adapter's own check, and answers 50 prompts greedily in float32 through transformers' forward pass.

`max_rel_update_error` is the largest |dW - dW'| / |dW| over modules and conditions. `same_tokens` counts the
completions that are equal, of all; one that differs is a near tie if the reference's two best logits lie within 1e-3
there, and `other_differences` counts those that are not.

    python -m bench.trust.portability [--model smollm2-135m-instruct] [--other-python PATH] [--save]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import ROOT, finish

NEAR_TIE = 1e-3
TOKENS = 32
STARTS = (
    "The capital of {} is", "Tom has 3 apples and {} more. How many are there?", "def {}(n):\n    ",
    "Once upon a time, in a village called {},", "Write one sentence about {}.",
)  # fmt: skip
WORDS = ("France", "seven", "fibonacci", "Eldham", "rain", "Peru", "12", "is_prime", "Oakton", "the sea")

CONDITIONS: dict[str, dict[str, str]] = {
    "1 thread": {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    "loaded in bfloat16": {"BENCH_DTYPE": "bfloat16"},
    "float32 copy in other shards": {"BENCH_SHARDS": "1"},
    "LAPACK through NumPy": {"BENCH_LAPACK": "1"},
    "ATEN_CPU_CAPABILITY=default": {"ATEN_CPU_CAPABILITY": "default"},
    "ATEN_CPU_CAPABILITY=avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "ONEDNN_MAX_CPU_ISA=AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "ONEDNN_MAX_CPU_ISA=SSE41, no MKL kernels above SSE4.2": {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}


def prompts() -> list[str]:
    return [start.format(word) for start in STARTS for word in WORDS]


# --- a condition, in a process of its own ---


def lapack(W: Any, rank: int) -> Any:
    """The top triplets from NumPy's LAPACK in float64."""
    import torch

    from tinylora.adapter.svd import Triplets

    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    next_sigma = float(S[rank]) if rank < len(S) else 0.0
    parts = (np.ascontiguousarray(x) for x in (U[:, :rank], S[:rank], Vh[:rank].T))
    return Triplets(*(torch.from_numpy(x) for x in parts), next_sigma, 0.0)


def child(job_path: Path) -> None:
    job = json.loads(job_path.read_text())
    import torch
    import transformers

    from tinylora.adapter import factors
    from tinylora.generation.transformers_backend import TransformersEngine
    from tinylora.generation.types import Request, SamplingParams
    from tinylora.methods.put_on import put_on
    from tinylora.models.load import load_base_model
    from tinylora.store.adapter import open_adapter

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if os.environ.get("BENCH_LAPACK"):
        factors.top_triplets = lapack
    base = load_base_model(job["folder"], device="cpu", dtype=os.environ.get("BENCH_DTYPE", "float32"))
    model: Any = base.model
    if os.environ.get("BENCH_SHARDS"):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, max_shard_size="40MB")
            base.tokenizer.save_pretrained(folder)
            assert len(list(Path(folder).glob("*.safetensors"))) > 3
            base = load_base_model(folder, device="cpu", dtype="float32")
            model = base.model
    started = time.perf_counter()
    opened = open_adapter(job["code"])
    attached = put_on(model, opened)  # refuses another base, and a basis whose check disagrees
    seconds = time.perf_counter() - started
    update = {path: attached.delta_factors(path) for path in attached.paths}
    attached.detach()
    attached = put_on(model.float(), opened)  # the text is compared in float32, however the weights were loaded
    engine = TransformersEngine(
        model, context_length=base.context_length, pad_token_id=base.pad_token_id, adapter=attached
    )
    params = SamplingParams(temperature=0.0, max_new_tokens=TOKENS)
    ids = [tuple(base.tokenizer(text).input_ids) for text in prompts()]
    completions = engine.generate([Request(prompt_ids=one, params=params, v=opened.v) for one in ids])
    arrays = {f"{name}.{path}": x.numpy() for path, pair in update.items() for name, x in zip("LR", pair, strict=True)}
    np.savez(job["out"], **arrays)
    gaps = []
    if job["gaps"]:
        attached.write(opened.v)
        for prompt, completion in zip(ids, completions, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *completion.token_ids]]), use_cache=False).logits[0]
            top = logits[len(prompt) - 1 : -1].topk(2, dim=-1).values
            gaps.append((top[:, 0] - top[:, 1]).tolist())
    print(
        json.dumps(
            {
                "tokens": [list(completion.token_ids) for completion in completions],
                "gaps": gaps,
                "seconds": seconds,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            }
        )
    )


def run(python: str, job: dict[str, Any], environment: dict[str, str], folder: Path) -> dict[str, Any]:
    job_path = folder / "job.json"
    job_path.write_text(json.dumps(job))
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [python, "-m", "bench.trust.portability", "--child", str(job_path)],
            env={**os.environ, "TINYLORA_CACHE": cache, "PYTHONPATH": str(ROOT), **environment},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{environment}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# --- what is compared ---


def relative_error(a: Any, b: Any) -> float:
    """Largest |dW - dW'| / |dW| over modules, from thin factors."""
    worst = 0.0
    for name in a.files:
        if name.startswith("L."):
            path = name[2:]
            left, right = np.hstack([a[name], -b[name]]), np.vstack([a[f"R.{path}"], b[f"R.{path}"]])
            # |L R| from the triangles of both: products of L^T L and R R^T cancel, and see nothing below 1e-8.
            triangles = [np.linalg.qr(thin, mode="r") for thin in (left, right.T)]
            difference = float(np.linalg.norm(triangles[0] @ triangles[1].T))
            size = float(((a[name].T @ a[name]) * (a[f"R.{path}"] @ a[f"R.{path}"].T)).sum()) ** 0.5
            worst = max(worst, difference / size)
    return worst


def compare_tokens(reference: dict[str, Any], found: dict[str, Any]) -> dict[str, int]:
    counts = {"same": 0, "near_ties": 0, "other_differences": 0}
    for a, b, gaps in zip(reference["tokens"], found["tokens"], reference["gaps"], strict=True):
        if a == b:
            counts["same"] += 1
            continue
        first = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
        counts["near_ties" if gaps[first] < NEAR_TIE else "other_differences"] += 1
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--other-python", default="", help="an interpreter with another torch and transformers")
    parser.add_argument("--only-other", action="store_true", help="that interpreter alone; into portability_other.json")
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/trust/portability.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(Path(arguments.child))
        return
    if arguments.only_other and not arguments.other_python:
        parser.error("--only-other needs --other-python")
    import torch

    from tinylora.adapter.attach import attach
    from tinylora.adapter.code import to_code
    from tinylora.adapter.config import AdapterConfig
    from tinylora.methods.put_on import completed
    from tinylora.models.fingerprint import identify
    from tinylora.models.load import load_base_model
    from tinylora.store.adapter import Adapter

    base = load_base_model(arguments.model, device="cpu", dtype="float32")
    config = AdapterConfig(num_groups=13)
    attached = attach(base.model, config)
    v = 0.1 * torch.randn(13, 1, generator=torch.Generator().manual_seed(0))
    adapter = completed(Adapter(label="bench", v=v, config=config), attached, identify(base.model))
    portable = adapter.to_portable("bfloat16")
    data = portable.to_bytes()
    code = to_code(data)
    conditions = {} if arguments.only_other else dict(CONDITIONS)
    pythons = {name: sys.executable for name in conditions}
    if arguments.other_python:
        conditions["another torch and transformers"] = {}
        pythons["another torch and transformers"] = arguments.other_python
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        job = {"folder": str(base.files[0].parent), "code": code}
        reference = run(sys.executable, {**job, "out": str(folder / "reference.npz"), "gaps": True}, {}, folder)
        with np.load(folder / "reference.npz") as loaded:
            known = {name: loaded[name] for name in loaded.files}
        for name, environment in conditions.items():
            out = folder / "other.npz"
            found = run(pythons[name], {**job, "out": str(out), "gaps": False}, environment, folder)
            with np.load(out) as loaded, np.load(folder / "reference.npz") as again:
                error = relative_error(again, loaded)
            results[name] = {
                "rel_update_error": error,
                **compare_tokens(reference, found),
                "decode_seconds": round(found["seconds"], 2),
                "torch": found["torch"],
                "transformers": found["transformers"],
            }
            print(f"{name}: {results[name]}", file=sys.stderr, flush=True)
    total = len(prompts()) * len(results)
    result = {
        "file_bytes": len(data),
        "code_chars": len(code),
        "max_rel_update_error": max(r["rel_update_error"] for r in results.values()),
        "same_tokens": f"{sum(r['same'] for r in results.values())} of {total}",
        "near_ties": sum(r["near_ties"] for r in results.values()),
        "other_differences": sum(r["other_differences"] for r in results.values()),
        "model": arguments.model,
        "modules": len(known) // 2,
        "code": code,
        "tokens_each": TOKENS,
        "conditions": results,
    }
    finish("trust/portability_other" if arguments.only_other else "trust/portability", result, arguments.save)


if __name__ == "__main__":
    main()
