"""Records, table and picture of `rl_lm.py`."""

import argparse
from pathlib import Path

import jax
import numpy as np

from benchmarks.machine import described, environment, publish
from benchmarks.small_lm import mean_and_error
from train.metrics import series

KS = (1, 4, 8)
LIVE = ("crossfit", "same_samples", "negative_fraction", "critical_k", "weight_decades", "pass@1")
INTRO = """\
Held-out problems: {problems} of {tasks} tasks, 16 answers each, the same for every arm of a seed.
{sft_steps} supervised steps, then {steps} of reinforcement learning, {batch} answers each, {samples} to a
problem, learning rate {lr}. ± is the half-width of a 95% interval over seeds (Student's t, {freedom} degrees of
freedom). "change" is against the supervised start of the same seed and problems.
"""
# Two-sided 97.5% points of Student's t.
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def record(arm: str, seed: int, rows: list[dict]) -> dict:
    """Curves of pass@k and interference of a run, its first and last values, and where time went."""
    out: dict = {"arm": arm, "seed": seed}
    for k in KS:
        at, values = series(rows, "eval", f"valid/pass@{k}")
        half = series(rows, "eval", f"valid/pass@{k}_ci95")[1]
        out |= {"steps": at, f"pass@{k}": values, f"pass@{k}_ci95": half}
    evals = [r for r in rows if r["kind"] == "eval"]
    tasks = [n for n in evals[-1] if n.startswith("valid/pass@1/")]
    names = {n: n.removeprefix("valid/") for n in (*tasks, "valid/informative")}
    names |= {f"interference/{n}": f"interference/{n}" for n in LIVE}
    for name, short in names.items():
        if values := series(rows, "eval", name)[1]:
            out[short] = values
    out["reward"] = series(rows, "train", "reward")[1]
    out["data_wait"] = series(rows, "train", "data_wait")[1]
    return out


def interval(values: list[float], digits: str = ".3f", sign: str = "") -> str:
    """Mean and the half-width of its 95% interval."""
    mean, error = mean_and_error(values)
    half = f" ± {T975.get(len(values) - 1, 1.96) * error:{digits}}" if len(values) > 1 else ""
    return f"{mean:{sign}{digits}}{half}"


def table(records: list[dict]) -> list[list[str]]:
    """One line an arm: pass@k after it, its change, and interference averaged over a run."""
    head = ["arm", "seeds", *(f"pass@{k}" for k in KS), *(f"change of @{k}" for k in (1, 8))]
    head += ["⟨g₈, g₁⟩ across problems", "⟨g₈, g₁⟩ same samples", "negative share"]
    lines = [head, ["---"] * len(head)]
    for arm in dict.fromkeys(r["arm"] for r in records):
        mine = [r for r in records if r["arm"] == arm]
        cells = [arm, str(len(mine))]
        cells += [interval([r[f"pass@{k}"][-1] for r in mine]) for k in KS]
        if arm == "supervised":
            cells += [""] * 5
        else:
            cells += [
                interval([r[f"pass@{k}"][-1] - r[f"pass@{k}"][0] for r in mine], sign="+")
                for k in (1, 8)
            ]
            for name in ("crossfit", "same_samples", "negative_fraction"):
                means = [float(np.mean(r[f"interference/{name}"])) for r in mine]
                cells.append(interval(means, ".2f" if name.startswith("neg") else ".1e"))
        lines.append(cells)
    return lines


def tasks(records: list[dict]) -> list[list[str]]:
    """pass@1 of each task after every arm, and the share of problems with mixed answers before it."""
    names = [n for n in records[0] if n.startswith("pass@1/")]
    head = ["arm", *(n.partition("/")[2] for n in names), "mixed answers"]
    lines = [head, ["---"] * len(head)]
    for arm in dict.fromkeys(r["arm"] for r in records):
        mine = [r for r in records if r["arm"] == arm]
        lines.append(
            [arm, *(interval([r[n][-1] for r in mine], ".2f") for n in (*names, "informative"))]
        )
    return lines


def plot(records: list[dict], path: Path) -> None:
    """pass@1 and pass@8 over the steps, and the inner product of their gradients; means over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3)
    shown = ("pass@1", "pass@8", "interference/crossfit")
    for arm in dict.fromkeys(r["arm"] for r in records if r["arm"] != "supervised"):
        mine = [r for r in records if r["arm"] == arm]
        for ax, name in zip(axes, shown, strict=True):
            values = np.array([r[name] for r in mine])
            spread = values.std(0, ddof=1) if len(mine) > 1 else np.zeros(values.shape[1])
            ax.errorbar(mine[0]["steps"], values.mean(0), spread, marker="o", capsize=2, label=arm)
    for ax, name in zip(axes, (*shown[:2], "⟨g₈, g₁⟩, across problems"), strict=True):
        ax.set(xlabel="step", ylabel=name)
        ax.grid(alpha=0.3)
    axes[2].axhline(0, color="#718096", lw=0.8)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def publish_page(args: argparse.Namespace, records: list[dict]) -> None:
    """JSON, Markdown and picture of what there is."""
    result = environment() | {"settings": {k: str(v) for k, v in vars(args).items()}}
    seeds = max(r["seed"] for r in records) + 1
    names = [n for n in records[0] if n.startswith("pass@1/")]
    intro = INTRO.format(**vars(args), tasks=len(names), freedom=max(seeds - 1, 1))
    text = lambda rows: "\n".join("| " + " | ".join(row) + " |" for row in rows)  # noqa: E731
    name = f"rl_lm_{jax.default_backend()}.png"
    page = [
        f"# Reinforcement learning of a tiny language model, {result['date']}", "",
        f"{described(result)}.", "", intro, text(table(records)), "",
        "pass@1 by task, and the share of held-out problems that got both right and wrong answers:", "",
        text(tasks(records)), "", f"![curves]({name})", "",
    ]  # fmt: skip
    publish(result | {"records": records}, "\n".join(page), args.out, "rl_lm")
    plot(records, args.out / name)
