"""Quality of samplers against the number of network calls: a panel each, a line a sampler."""

from pathlib import Path


def curves(
    calls: list[int], panels: dict[str, dict[str, list[float]]], label: str, file: Path
) -> None:
    """Draws {title: {sampler: values at `calls`}} into `file`, two panels a row, both axes logarithmic."""
    from matplotlib.figure import Figure

    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(10, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False).flat
    for (title, lines), axis in zip(panels.items(), axes, strict=False):
        for name, values in lines.items():
            axis.plot(calls, values, "o-", markersize=3, label=name)
        axis.set(xscale="log", yscale="log", xlabel="network calls", ylabel=label, title=title)
        axis.set_xticks(calls, [str(n) for n in calls])
        axis.set_xticks([], minor=True)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
