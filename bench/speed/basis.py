"""Is the basis right, and how much faster is it than a full SVD of every module?

Ours: round the weight to bf16, converge the top `rank` triplets in float64, fix the signs. Peer: what PEFT's TinyLoRA
layer does when it is built, a full float32 torch.linalg.svd, then a slice. In turn, module by module, several rounds.

The one matrix is 3584 x 18944 (the largest of a 7B model), of two kinds: `decaying`, Gaussian entries times
(row + 1)^-0.15 (column + 1)^-0.15, whose singular values fall slowly (sigma3/sigma2 about 0.94); and `spiked`, Gaussian
noise plus six directions at 3, 2.2, 2.1, 1.9, 1.6 and 1.5 times the noise's largest singular value (0.96). The peer's
time does not depend on the kind; the smaller speed-up of the two counts.

    python -m bench.speed.basis [--model FILE_OR_FOLDER] [--rounds 3] [--matrix-rounds 1] [--save]
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.common import finish
from tinylora.adapter.attach import linear_maps, output_head_path
from tinylora.adapter.basis import Factors, model_basis, svd_factors
from tinylora.adapter.canonical import canonical_weight
from tinylora.adapter.config import AdapterConfig
from tinylora.adapter.grouping import select_targets
from tinylora.adapter.projection import projection
from tinylora.models.load import load_base_model

RANK = 2


def ours(module: nn.Module) -> Factors:
    return svd_factors(canonical_weight(module), RANK)


def peft_way(module: nn.Module) -> tuple[Tensor, Tensor]:
    """TinyLoraLayer._init_svd of peft, line by line."""
    weight = module.weight.data
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    U_r, S_r, V_r = U[:, :RANK].to(weight.dtype), S[:RANK].to(weight.dtype), Vh[:RANK, :].to(weight.dtype)
    root = torch.sqrt(S_r)
    return (root.unsqueeze(1) * V_r).contiguous(), (U_r * root.unsqueeze(0)).contiguous()


def seconds(work: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    work(*arguments)
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turn(module: nn.Module, ours_first: bool) -> dict[str, tuple[float, float]]:
    sides: list[tuple[str, Callable[[nn.Module], Any]]] = [("ours", ours), ("peft", peft_way)]
    return {name: seconds(work, module) for name, work in (sides if ours_first else sides[::-1])}


def time_model(modules: dict[str, nn.Module], rounds: int) -> dict[str, Any]:
    totals: list[dict[str, np.ndarray]] = []
    for number in range(rounds):
        total = {"ours": np.zeros(2), "peft": np.zeros(2)}
        for index, module in enumerate(modules.values()):
            for name, pair in in_turn(module, (index + number) % 2 == 0).items():
                total[name] += pair
        totals.append(total)
        print(f"round {number + 1}: ours {total['ours'][0]:.2f} s, peft {total['peft'][0]:.2f} s", file=sys.stderr)
    wall = [round(float(t["peft"][0] / t["ours"][0]), 2) for t in totals]
    return {
        "speedup_vs_peft": statistics.median(wall),
        "speedups_by_round": wall,
        "ours_seconds": [round(float(t["ours"][0]), 3) for t in totals],
        "peft_seconds": [round(float(t["peft"][0]), 3) for t in totals],
        "ours_cpu_seconds": [round(float(t["ours"][1]), 3) for t in totals],
        "peft_cpu_seconds": [round(float(t["peft"][1]), 3) for t in totals],
    }


def one_matrix(kind: str) -> nn.Linear:
    out, columns = 3584, 18944
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(out, columns, generator=generator) * 0.02
    if kind == "decaying":
        W *= (torch.arange(1, out + 1) ** -0.15)[:, None] * torch.arange(1, columns + 1) ** -0.15
    else:
        U = torch.linalg.qr(torch.randn(out, 6, generator=generator)).Q
        V = torch.linalg.qr(torch.randn(columns, 6, generator=generator)).Q
        largest = 0.02 * (out**0.5 + columns**0.5)
        W += (U * torch.tensor([3.0, 2.2, 2.1, 1.9, 1.6, 1.5]) * largest) @ V.T
    module = nn.Linear(columns, out, bias=False, device="meta")
    module.weight = nn.Parameter(W.bfloat16(), requires_grad=False)
    return module


def time_one_matrix(rounds: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for kind in ("decaying", "spiked"):
        module = one_matrix(kind)
        times = [in_turn(module, number % 2 == 0) for number in range(rounds)]
        ratios = [t["peft"][0] / t["ours"][0] for t in times]
        result[kind] = {
            "speedup": round(statistics.median(ratios), 2),
            "ours_seconds": [round(t["ours"][0], 3) for t in times],
            "peft_seconds": [round(t["peft"][0], 3) for t in times],
        }
        print(f"3584 x 18944 {kind}: {result[kind]}", file=sys.stderr)
    return {"speedup_one_matrix": min(kind["speedup"] for kind in result.values()), "one_matrix": result}


def update_error(path: str, module: nn.Module, f: Factors) -> float:
    """Relative distance of U diag(S) P V^T from NumPy's float64 LAPACK, for the module's own P."""
    P = projection(0, path, 1, RANK)[0]
    U, S, Vh = np.linalg.svd(canonical_weight(module).double().numpy(), full_matrices=False)
    V = Vh[:RANK].T
    signs = np.sign((V * f.V.numpy()).sum(axis=0))
    expected = (U[:, :RANK] * signs * S[:RANK]) @ P @ (V * signs).T
    return float(np.linalg.norm((f.U * f.S).numpy() @ P @ f.V.numpy().T - expected) / np.linalg.norm(expected))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, folder or .gguf file")
    parser.add_argument("--rounds", type=int, default=3, help="times over all modules")
    parser.add_argument("--matrix-rounds", type=int, default=1, help="times over the one matrix; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="keep the result in bench/results/speed/basis.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    base = load_base_model(arguments.model, device="cpu", dtype="bfloat16")
    maps = linear_maps(base.model)
    paths = select_targets(list(maps), ["all-linear"], output_head_path(base.model))
    modules = {path: maps[path] for path in paths}
    ours(next(iter(modules.values())))  # load the libraries before any clock runs
    result: dict[str, Any] = {"model": Path(arguments.model).name, "modules": len(modules), "rank": RANK}
    result |= time_model(modules, arguments.rounds)

    with tempfile.TemporaryDirectory() as folder:
        config = AdapterConfig(rank=RANK)
        factors, excluded = model_basis(modules, config, Path(folder), base.files)
        loads = [seconds(model_basis, modules, config, Path(folder), base.files)[0] for _ in range(5)]
    errors = {path: update_error(path, modules[path], f) for path, f in factors.items()}
    result |= {
        "cached_seconds": round(max(loads), 4),
        "max_rel_update_error": max(errors.values()),
        "max_residual": max(f.residual for f in factors.values()),
        "smallest_gap": min(f.gap for f in factors.values()),
        "excluded": excluded,
    }
    if arguments.matrix_rounds:
        result |= time_one_matrix(arguments.matrix_rounds)
    finish("speed/basis", result, arguments.save)


if __name__ == "__main__":
    main()
