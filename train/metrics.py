"""Metrics of a run: JSONL is the truth; the terminal and TensorBoard are views of it."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Order and width of the columns of a log line; other metrics go to JSONL and TensorBoard only.
COLUMNS = {"loss": ".4f", "valid/loss": ".4f", "grad_norm": ".3f", "lr": ".2e",
           "tokens_per_second": ",.0f", "mfu": ".1%", "data_wait": ".1%"}  # fmt: skip
SHORT = {"tokens_per_second": "tok/s", "grad_norm": "grad", "data_wait": "data"}


class Recorder:
    """Writes records to `folder`; every method does nothing on processes other than the first."""

    def __init__(self, folder: Path, total: int, active: bool, quiet: bool = False):
        self.folder, self.active = folder, active
        self.console = Console(stderr=True, quiet=quiet or not active, highlight=False)
        self._file = self._board = self._bar = None
        if not active:
            return
        from tensorboardX import SummaryWriter

        self._file = open(folder / "metrics.jsonl", "a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"))
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._task = self._bar.add_task("train", total=total, text="compiling")
            self._bar.start()

    def record(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Appends one record of `kind` (train, eval, resume, stop, ...)."""
        if self._file is None or self._board is None:
            return
        row = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(row, allow_nan=True) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name if "/" in name else f"{kind}/{name}", value, step)
            elif isinstance(value, str):
                self._board.add_text(name, value, step)

    def line(self, step: int, values: Mapping[str, Any], eta: float | None = None) -> None:
        """Prints one aligned line of the known columns."""
        cells = [f"step {step:>6}"]
        cells += [
            f"{SHORT.get(name, name)} {values[name]:{form}}"
            for name, form in COLUMNS.items()
            if values.get(name) is not None
        ]
        if eta is not None and self._bar is None:
            cells.append(f"eta {eta:.0f}s")
        self.console.print("  ".join(cells), soft_wrap=True)

    def advance(self, step: int, text: str) -> None:
        """Moves the progress bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a message on the first process."""
        self.console.print(text, style=style, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints what has gone wrong, on the first process; `quiet` does not silence it."""
        if self.active:
            Console(stderr=True, highlight=False).print(text, style="bold red", soft_wrap=True)

    def close(self) -> None:
        """Flushes and closes every view."""
        if self._bar is not None:
            self._bar.stop()
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            self._file.close()
        self._file = self._board = self._bar = None


def read(folder: Path) -> list[dict[str, Any]]:
    """Records of a run in order; those that a resumption went back over are left out."""
    rows: list[dict[str, Any]] = []
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return rows
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(text)
        except json.JSONDecodeError:  # a line cut short by a kill
            continue
        if row["kind"] in ("start", "resume"):
            rows = [r for r in rows if r["step"] <= row["step"]]
        rows.append(row)
    return rows


def series(rows: list[dict[str, Any]], kind: str, name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric."""
    got = [(r["step"], r[name]) for r in rows if r["kind"] == kind and name in r]
    return [s for s, _ in got], [v for _, v in got]


def plot_loss(folder: Path) -> Path | None:
    """Draws loss.png from metrics.jsonl; None when there is nothing to draw."""
    rows = read(folder)
    steps, train = series(rows, "train", "loss")
    if not steps:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, train, label="train", color="#2b6cb0")
    for name, style in (("valid/loss", "o-"), ("valid/bigram", "--")):
        at, values = series(rows, "eval", name)
        if at and name == "valid/bigram":
            axes.axhline(values[-1], ls=style, color="#718096", label=f"bigram {values[-1]:.3f}")
        elif at:
            axes.plot(at, values, style, label=f"valid {values[-1]:.3f}", color="#c05621")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def perplexity(loss: float) -> float:
    """exp(loss), infinite instead of an overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def is_terminal() -> bool:
    """True when a person is likely to watch."""
    return sys.stderr.isatty()
