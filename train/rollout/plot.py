"""What a run on rollouts shows: reward, pass@k with its intervals and interference, over its steps."""

import re
from pathlib import Path
from typing import Any

from train.metrics import read, series

INTERFERENCE = ("crossfit", "same_samples")


def plot_policy(folder: Path) -> Path | None:
    """Draws policy.png from metrics.jsonl; None for a run without pass@k."""
    rows = read(folder)
    evals = [r for r in rows if r["kind"] == "eval"]
    ks = sorted(
        {int(m[1]) for r in evals for n in r if (m := re.fullmatch(r"valid/pass@(\d+)", n))}
    )
    if not ks:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    steps, reward = series(rows, "train", "reward")
    left.plot(steps, reward, color="#2b6cb0")
    left.set(xlabel="step", ylabel="reward of samples", ylim=(0, 1))
    for k in ks:
        at, mean = series(rows, "eval", f"valid/pass@{k}")
        error = series(rows, "eval", f"valid/pass@{k}_ci95")[1]
        middle.errorbar(at, mean, error, marker="o", capsize=3, label=f"pass@{k}")
    middle.set(xlabel="step", ylabel="held-out problems, 95% interval", ylim=(0, 1))
    _interference(right, rows)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(folder.name, parse_math=False)
    path = folder / "policy.png"
    figure.savefig(path, dpi=120)
    return path


def _interference(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Estimates of the inner product of the gradients of pass@k and pass@1."""
    for name in INTERFERENCE:
        at, values = series(rows, "eval", f"interference/{name}")
        if at:
            axes.plot(at, values, "o-", label=name.replace("_", " "))
    axes.axhline(0, color="#718096", lw=0.8)
    axes.set(xlabel="step", ylabel="inner product of the gradients of pass@k and pass@1")
