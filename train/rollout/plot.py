"""What a run on rollouts shows over its steps: reward, pass@k or success with intervals, and more."""

import re
from pathlib import Path
from typing import Any

from train.metrics import read, series

INTERFERENCE = ("crossfit", "same_samples")


def plot_policy(folder: Path) -> Path | None:
    """Draws policy.png from metrics.jsonl; None for a run without pass@k or success of agents."""
    rows = read(folder)
    evals = [r for r in rows if r["kind"] == "eval"]
    names = {n for r in evals for n in r if re.fullmatch(r"valid/(pass@\d+|success)", n)}
    if not names:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    steps, reward = series(rows, "train", "reward")
    left.plot(steps, reward, color="#2b6cb0")
    left.set(xlabel="step", ylabel="reward of samples", ylim=(0, 1))
    for name in sorted(names, key=lambda n: (len(n), n)):
        at, mean = series(rows, "eval", name)
        error = series(rows, "eval", f"{name}_ci95")[1]
        middle.errorbar(at, mean, error, marker="o", capsize=3, label=name.partition("/")[2])
    middle.set(xlabel="step", ylabel="held out, 95% interval", ylim=(0, 1))
    (_agent if "valid/success" in names else _interference)(right, rows)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(folder.name, parse_math=False)
    path = folder / "policy.png"
    figure.savefig(path, dpi=120)
    return path


def _agent(axes: Any, rows: list[dict[str, Any]]) -> None:
    """How uncertain an agent was of its episodes, and how often its actions were none."""
    for name in ("uncertainty", "invalid", "gate"):
        axes.plot(*series(rows, "train", name), label=name)
    axes.set(xlabel="step", ylabel="of sampled episodes", ylim=(0, 1))


def _interference(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Estimates of the inner product of the gradients of pass@k and pass@1."""
    for name in INTERFERENCE:
        at, values = series(rows, "eval", f"interference/{name}")
        if at:
            axes.plot(at, values, "o-", label=name.replace("_", " "))
    axes.axhline(0, color="#718096", lw=0.8)
    axes.set(xlabel="step", ylabel="inner product of the gradients of pass@k and pass@1")
