"""What a run costs: tokens per second, FLOPs, waiting, between two log records."""

import time
from typing import Any

import jax
import numpy as np

from sharding.flops import count_flops
from sharding.topology import peak_flops
from train.optimizer import learning_rate


class Meter:
    """Time and token accounting between log records."""

    def __init__(self, program: Any):
        run, batch = program.run, program.batch
        self.run, self.tokens = run, int(np.prod(batch["tokens"].shape)) if "tokens" in batch else 0
        self.lr = learning_rate(run.optimizer, run.steps)
        self.forward_flops = forward_flops(program)
        device = program.mesh.local_devices[0]
        peak = peak_flops(device.device_kind, str(getattr(run.model, "dtype", "auto")))
        self.peak = peak * program.mesh.size if peak else None
        self.device = device
        self.last_loss, self.rate, self.pace = float("nan"), 0.0, float("nan")
        self.compiling = True
        self.restart()

    def restart(self) -> None:
        """Starts a new interval."""
        self.data_wait = self.checkpoint = 0.0
        self.sums: dict[str, np.ndarray] = {}
        self.count, self.begin = 0, time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Time spent on something else (an evaluation) is not the interval's."""
        self.begin += seconds

    def add(self, metrics: dict[str, Any]) -> int:
        """Adds a step's (sum, weight) pairs; returns how many bad steps there were in a row."""
        bad_run = int(metrics.pop("bad_run")[0])
        if not bad_run:
            for name, pair in metrics.items():
                self.sums[name] = self.sums.get(name, 0.0) + np.asarray(pair, np.float64)
            loss, weight = metrics["loss"]
            self.last_loss = float(loss) / max(float(weight), 1e-30)
        else:
            pair = np.asarray(metrics["skipped"], np.float64)
            self.sums["skipped"] = self.sums.get("skipped", 0.0) + pair
        self.count += 1
        if self.compiling:
            # The first step's time is the compiler's.
            self.compiling, self.count, self.begin = False, 0, time.perf_counter()
            self.data_wait = self.checkpoint = 0.0
            return bad_run
        self.pace = (time.perf_counter() - self.begin) / self.count
        self.rate = self.tokens / self.pace
        return bad_run

    def text(self) -> str:
        """For the progress bar."""
        return f"loss {self.last_loss:.4f}  {self.rate:,.0f} tok/s"

    def eta(self, step: int) -> float:
        """Seconds left at the pace of the interval under way, or of the one just recorded."""
        return (self.run.steps - step) * self.pace

    def row(self, step: int) -> dict[str, float]:
        """The record of the interval, and a new interval."""
        spent, count = time.perf_counter() - self.begin, max(self.count, 1)
        row = {name: float(s / max(w, 1e-30)) for name, (s, w) in self.sums.items()}
        row |= {"lr": float(np.asarray(self.lr(step - 1))), "tokens": step * self.tokens}
        if not self.count:  # the step that was compiled: nothing to measure
            self.restart()
            return row
        row |= {
            "tokens_per_second": count * self.tokens / spent,
            "step_seconds": (spent - self.data_wait - self.checkpoint) / count,
            "data_wait": self.data_wait / spent,
            "checkpoint": self.checkpoint / spent,
            "flops_per_second": 3 * self.forward_flops * count / spent,
        }
        if self.peak:
            row["mfu"] = row["flops_per_second"] / self.peak
        memory = self.device.memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            row["device_peak_bytes"] = memory["peak_bytes_in_use"]
        begin = self.begin
        self.restart()
        self.begin = begin + spent
        return row


def forward_flops(program: Any) -> float:
    """Counted FLOPs of the objective's forward pass; a step is three times that (no recomputation)."""
    params, key = program.state.params, jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    bare = lambda tree: jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)  # noqa: E731
    loss = lambda p, b, k: program.run.objective(program.apply, p, b, k)[0]  # noqa: E731
    with jax.set_mesh(program.mesh):  # a sequence over many devices is, in here, the program's
        return count_flops(loss, bare(params), bare(program.batch), key)
