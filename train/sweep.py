"""`jaxlab compile --sweep`: the train step of many configurations, compiled; a table and a plot of HBM."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharding.topology import parse_topology
from train.report import compiled
from train.run import Run

GIB = 2**30


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
    again. Table and plot are put beside it. A point that is refused has a row that says why.
    """
    parse_topology(topology)
    record = json.loads(file.read_text()) if file.exists() else {"rows": []}
    if record.setdefault("base", [base, topology]) != [base, topology]:
        raise ValueError(f"{file} is of {record['base']}, not of {[base, topology]}: name another")
    file.parent.mkdir(parents=True, exist_ok=True)
    for point in points(sweeps):
        if any(row["point"] == point for row in record["rows"]):
            continue
        record["rows"].append({"point": point} | _row(make, point, topology))
        file.write_text(json.dumps(record, indent=1) + "\n")
    text = table(record["rows"], f"{base} on {topology}")
    file.with_suffix(".md").write_text(text)
    plot(record["rows"], f"{base} on {topology}", file.with_suffix(".png"))
    return text


def _row(make: Callable[[list[str]], Run], point: list[str], topology: str) -> dict[str, Any]:
    try:
        _, report = compiled(make(point), topology)
    except ValueError as error:
        return {"error": str(error).splitlines()[0]}
    row = {name: getattr(report, name) for name in ("fits", "needs_bytes", "hbm_bytes", "message")}
    row |= {"step_flops": report.step_flops, "model_flops": report.model_flops}
    row |= {name: getattr(report, f"{name}_seconds") for name in ("compute", "hbm", "ici")}
    return row | (report.memory._asdict() if report.memory else {})


def table(rows: list[dict[str, Any]], title: str) -> str:
    """Markdown."""
    lines = [f"# Train step of {title}", "", "GiB a device; seconds are lower bounds.", ""]
    names = "point fits peak temporaries arguments host compute,s memory,s network,s".split()
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        size = lambda name, row=row: f"{row[name] / GIB:.2f}" if name in row else "-"  # noqa: E731
        time = lambda name, row=row: f"{row[name]:.1f}" if row.get(name) else "-"  # noqa: E731
        fits = row.get("error") or ("yes" if row["fits"] else "no")
        cells = [", ".join(row["point"]), fits, size("needs_bytes")]
        cells += map(size, ("temp_bytes", "argument_bytes", "host_temp_bytes"))
        cells += map(time, ("compute", "hbm", "ici"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Peak HBM against the last field swept that is a number, a line for each choice of the others."""
    import matplotlib.pyplot as plt

    lines: dict[str, list[tuple[float, float]]] = {}
    field = ""
    for row in (row for row in rows if "needs_bytes" in row):
        numbers = [text for text in row["point"] if text.partition("=")[2].isdigit()]
        if not numbers:
            return
        field, _, value = numbers[-1].partition("=")
        others = ", ".join(text for text in row["point"] if text != numbers[-1])
        lines.setdefault(others, []).append((int(value), row["needs_bytes"] / GIB))
    if not lines:
        return
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, dots in sorted(lines.items()):
        axes.plot(*zip(*sorted(dots), strict=True), "o-", label=name)
    axes.axhline(max(r["hbm_bytes"] for r in rows if "hbm_bytes" in r) / GIB, color="gray")
    axes.set(xlabel=field, ylabel="peak HBM, GiB", title=title)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)
