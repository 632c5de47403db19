"""`jaxlab compile --sweep`: the train step of many configurations, compiled; a table and a plot of HBM."""

import datetime
import importlib.metadata
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharding.topology import parse_topology
from train.report import compiled
from train.run import Run

GIB = 2**30
KEPT = ("fits", "needs_bytes", "hbm_bytes", "message", "largest", "collectives")


def points(sweeps: list[str]) -> list[list[str]]:
    """['a=1,2', 'b=3,4'] as [['a=1', 'b=3'], ['a=1', 'b=4'], ...]; ValueError for a text without values."""
    axes = []
    for text in sweeps:
        field, equals, values = text.partition("=")
        if not (field and equals and all(values.split(","))):
            raise ValueError(f"--sweep {text!r} must be FIELD=VALUE,VALUE,...")
        axes.append([f"{field}={value}" for value in values.split(",")])
    return [list(point) for point in itertools.product(*axes)]


def sweep(
    make: Callable[[list[str]], Run], sweeps: list[str], topology: str, base: str, file: Path
) -> str:
    """Compiles `make(assignments)` for every point and returns the table.

    Each row goes to `file` (JSON) as it is made; rows that are there, of the same `base`, are not made
    again. Table and plot are put beside it. A point that cannot work, by its values or on this
    topology, is refused in the table, not in the file: the next call tries again. ValueError, before
    anything is compiled, for an assignment that is none.
    """
    parse_topology(topology)
    record = json.loads(file.read_text()) if file.exists() else {"rows": []}
    if record.setdefault("base", [base, topology]) != [base, topology]:
        raise ValueError(f"{file} is of {record['base']}, not of {[base, topology]}: name another")
    file.parent.mkdir(parents=True, exist_ok=True)
    runs = [(point, make(point)) for point in points(sweeps)]
    refused = []
    for point, run in runs:
        if any(row["point"] == point for row in record["rows"]):
            continue
        try:
            record["rows"].append({"point": point} | _row(run, topology))
        except ValueError as error:
            refused.append({"point": point, "error": str(error).splitlines()[0]})
            continue
        file.write_text(json.dumps(record, indent=1) + "\n")
    text = table(record["rows"] + refused, f"{base} on {topology}")
    file.with_suffix(".md").write_text(text)
    plot(record["rows"], f"{base} on {topology}", file.with_suffix(".png"))
    return text


def _row(run: Run, topology: str) -> dict[str, Any]:
    _, report = compiled(run, topology)
    row = {name: getattr(report, name) for name in KEPT}
    row |= {"step_flops": report.step_flops, "model_flops": report.model_flops}
    row |= {name: getattr(report, f"{name}_seconds") for name in ("compute", "hbm", "ici")}
    row |= {"date": str(datetime.date.today())}
    row |= {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return row | (report.memory._asdict() if report.memory else {})


def table(rows: list[dict[str, Any]], title: str) -> str:
    """Markdown."""
    lines = [f"# Train step of {title}", "", "GiB a device; seconds are lower bounds.", ""]
    names = "point fits peak temporaries arguments host compute,s memory,s network,s".split()
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        size = lambda name, row=row: f"{row[name] / GIB:.2f}" if name in row else "-"  # noqa: E731
        time = lambda name, row=row: "-" if row.get(name) is None else f"{row[name]:.1f}"  # noqa: E731
        fits = row.get("error") or ("yes" if row["fits"] else "no")
        cells = [", ".join(row["point"]), fits, size("needs_bytes")]
        cells += map(size, ("temp_bytes", "argument_bytes", "host_temp_bytes"))
        cells += map(time, ("compute", "hbm", "ici"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Peak HBM against the last field that is a number in every row, a line for each choice of the
    others; without such a field none, nor an older one."""
    import matplotlib.pyplot as plt

    file.unlink(missing_ok=True)
    rows = [row for row in rows if "needs_bytes" in row]
    points = [dict(text.split("=", 1) for text in row["point"]) for row in rows]
    fields = list(points[0]) if points else []
    numeric = [name for name in fields if all(p.get(name, "").isdigit() for p in points)]
    if not numeric:
        return
    field = numeric[-1]
    lines: dict[str, list[tuple[float, float]]] = {}
    for point, row in zip(points, rows, strict=True):
        others = ", ".join(f"{name}={value}" for name, value in point.items() if name != field)
        dot = int(point[field]), row["needs_bytes"] / GIB
        lines.setdefault(others, []).append(dot)
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, dots in sorted(lines.items()):
        axes.plot(*zip(*sorted(dots), strict=True), "o-", label=name)
    axes.axhline(max(row["hbm_bytes"] for row in rows) / GIB, color="gray", label="HBM")
    axes.set(xlabel=field, ylabel="peak HBM, GiB", title=title)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)
