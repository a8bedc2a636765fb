"""What does README's picture show? Accuracy against trained numbers on the demo's task, from the studies' results.

    python -m bench.studies.front_figure        writes docs/drawings/dial.png

A point is the mean over the seeds that were run, a small ring one seed. All have the recipe's own draw of P and 3,840
training samples. The full picture, with every cell, is docs/studies/dial-smollm2.png.
"""

import json
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.common import RESULTS, ROOT

TARGET = ROOT / "docs" / "drawings" / "dial.png"
# files, cell, label, its place from the point (points right, points up), and which of its sides is there
POINTS = (
    ("dial-smollm2-part2", "rl-tinylora-1", "1", (0, 8), "center"),
    ("dial-smollm2-part2", "rl-tinylora-13", "13, shared as in the paper", (9, -6), "left"),
    ("basis-13 basis-13-seed2", "13-one-group", "13, shared by all modules\n(make demo)", (10, -22), "left"),
    ("dial-smollm2-part2", "rl-tinylora-210", "210, one a module", (-6, 10), "center"),
    ("dial-smollm2-part2", "rl-lora-xs", "LoRA-XS: 3,360", (0, 8), "center"),
    ("dial-smollm2-part2", "rl-lora-1", "LoRA, rank 1", (0, 8), "center"),
    ("dial-smollm2", "rl-lora-32", "LoRA, rank 32", (0, 8), "center"),
    ("dial-smollm2-part4", "rl-full", "all weights", (0, 8), "center"),
)
BLUE, GREY = "#1d66c2", "#5b6770"


def shares(files: str, cell: str) -> tuple[int, list[float], float]:
    """Trained numbers, the accuracy of each seed, and the untrained model's, in per cent of 1,000."""
    cells = [
        one
        for file in files.split()
        for one in json.loads((RESULTS / "studies" / f"{file}.json").read_text(encoding="utf-8"))["cells"]
    ]
    runs = [run for one in cells if one["name"] == cell for run in one["runs"]]
    own = [run for run in runs if run["state"] == "done" and run["projection_seed"] == 0]
    untrained = {100 * run["strict"]["base"]["correct"] / run["strict"]["base"]["total"] for run in own}
    right = [100 * run["strict"]["tuned"]["correct"] / run["strict"]["tuned"]["total"] for run in own]
    return own[0]["trained_numbers"], right, untrained.pop()


def main() -> None:
    plt.rcParams.update(
        {"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": GREY, "text.color": "#1b1f23"}
    )
    figure, axes = plt.subplots(figsize=(8, 3.7), dpi=200, layout="constrained")
    base = set()
    for files, cell, label, shift, side in POINTS:
        count, right, untrained = shares(files, cell)
        base.add(untrained)
        axes.plot([count] * len(right), right, "o", ms=3.5, mfc="none", mec=BLUE, mew=0.8)
        axes.plot([count], [mean(right)], "o", ms=7, color=BLUE)
        axes.annotate(f"{label}\n{mean(right):.0f} %", (count, mean(right)), xytext=shift, textcoords="offset points",
                      ha=side, va="bottom", fontsize=8.5)  # fmt: skip
    low, high = min(base), max(base)
    axes.axhspan(low - 0.15, high + 0.15, color=GREY, alpha=0.55, lw=0)
    axes.annotate(f"untrained, best of 8 prompts: {high:.0f} %", (1e8, high), xytext=(26, -6),
                  textcoords="offset points", ha="right", va="top", fontsize=8.5, color=GREY)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(0.5, 6e8)
    axes.set_ylim(15, 50)
    axes.set_xlabel("trained numbers")
    axes.set_ylabel("right, % of 1,000 questions")
    axes.set_xticks([1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8])
    axes.set_xticklabels(["1", "10", "100", "1k", "10k", "100k", "1M", "10M", "100M"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, metadata={"Software": None})
    print(json.dumps({"written": str(TARGET.relative_to(ROOT))}))


if __name__ == "__main__":
    main()
