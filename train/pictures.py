"""The page and the pictures of `Uncertainty`: reliability, risk and coverage, uncertainty by class."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxlab import uncertainty as un
from train.classified import ranked


def table(values: dict[str, Any], p, y, step: int, evaluator: Any) -> str:
    """The figures as Markdown tables: one number, by score, by class."""
    posterior = type(evaluator.posterior).__name__
    plain = {k: v for k, v in values.items() if "/" not in k}
    lines = [
        f"step {step}, {len(y)} held-out rows, {p.shape[0]} samples ({posterior})", "",
        "| " + " | ".join(plain) + " |", "|" + "---|" * len(plain),
        "| " + " | ".join(f"{v:.4f}" for v in plain.values()) + " |", "",
    ]  # fmt: skip
    by_score = [k.split("/") for k in values if k.count("/") == 1]
    for group in (False, True):
        chosen = [pair for pair in by_score if pair[0].startswith("critical_") == group]
        columns = list(dict.fromkeys(kind for kind, _ in chosen))
        rows = list(dict.fromkeys(score for _, score in chosen))
        if rows:
            at = f" (at coverage {evaluator.coverage})" if group else ""
            lines += [
                f"| score{at} | " + " | ".join(columns) + " |",
                "|---|" + "---|" * len(columns),
            ]
            cells = lambda s: (f"{values[f'{c}/{s}']:.4f}" for c in columns)  # noqa: B023, E731
            lines += [f"| {s} | " + " | ".join(cells(s)) + " |" for s in rows] + [""]
    profiles = np.asarray(un.epistemic_profiles(jax.jit(un.contributions)(p), y, p.shape[-1]))
    classes = range(p.shape[-1])
    lines += [
        "| true class | rows | " + " | ".join(f"C_{k}" for k in classes) + " |",
        "|---|---|" + "---|" * len(classes),
    ]
    for i, row in enumerate(profiles):
        lines.append(f"| {i} | {np.sum(y == i)} | " + " | ".join(f"{c:.4f}" for c in row) + " |")
    mean = " | ".join(f"{values[f'class/{k}/c']:.4f}" for k in classes)
    return "\n".join([*lines, f"| all | {len(y)} | {mean} |"])


def draw(folder: Path, page: str, p, y, x, critical: tuple[int, ...]) -> None:
    """Writes table.md, reliability.png, risk_coverage.png, classes.png, most_uncertain.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(page + "\n")

    def save(figure, name: str) -> None:
        figure.savefig(folder / f"{name}.png", dpi=120)

    def blank(size):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        return figure

    mean = p.mean(0)
    yhat = mean.argmax(-1)

    figure = blank((5, 4.5))
    axes = figure.add_subplot()
    curve = jax.jit(un.reliability_curve)(mean, y)
    full = np.asarray(curve.count) > 0
    axes.plot([0, 1], [0, 1], "--", color="#718096")
    axes.plot(np.asarray(curve.confidence)[full], np.asarray(curve.accuracy)[full], "o-")
    axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    save(figure, "reliability")

    figure = blank((6, 4.5))
    axes = figure.add_subplot()
    coverages = tuple(np.linspace(0.05, 1, 96).tolist())
    # Without critical classes, the curves are of all errors; the argument has to name some class.
    what, chosen = ("critical_fnr", critical) if critical else ("error_rate", (0,))

    @jax.jit
    def rate(score):
        found = un.selective_curve(y, yhat, score, chosen, coverages, num_classes=p.shape[-1])
        return getattr(found, what)

    for name, score in ranked(p).items():
        axes.plot(coverages, rate(score), label=name)
    axes.set(xlabel="coverage", ylabel=what.replace("_", " "))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, "risk_coverage")

    c: Any = np.asarray(jax.jit(un.contributions)(p))
    figure = blank((6, 5))
    axes = figure.add_subplot()
    profiles = np.asarray(un.epistemic_profiles(c, y, p.shape[-1]))
    image = axes.imshow(profiles, cmap="viridis")
    axes.set(xlabel="class k the uncertainty is about", ylabel="true class", title="mean C_k")
    axes.set_xticks(range(p.shape[-1]))
    axes.set_yticks(range(p.shape[-1]))
    figure.colorbar(image)
    save(figure, "classes")

    figure = blank((12, 4))
    worst = np.argsort(-c.sum(-1), kind="stable")[:6]
    grid = figure.subplots(2, 6, squeeze=False)
    for i, row in enumerate(worst):
        if x.ndim > 2:
            grid[0, i].imshow(x[row], cmap="gray")
        else:
            grid[0, i].bar(range(x.shape[1]), x[row])
        grid[0, i].set(title=f"true {y[row]}, said {yhat[row]}", xticks=[], yticks=[])
        bars = grid[1, i].bar(range(c.shape[1]), c[row])
        for k in critical:
            bars[k].set_color("#c05621")
        grid[1, i].set(xlabel="class", xticks=range(c.shape[1]))
    for blank_axes in grid[:, len(worst) :].ravel():
        blank_axes.set_axis_off()
    grid[1, 0].set(ylabel="C_k")
    save(figure, "most_uncertain")
