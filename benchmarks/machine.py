"""What a benchmark says about its machine, and how it sums up a list of times."""

import contextlib
import json
import os
import platform
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp


def matmul_peak(n: int, dtype: str, repeats: int = 8) -> float:
    """Best FLOP/s of an [n, n] by [n, n] product."""
    a = jax.random.normal(jax.random.key(0), (n, n), dtype)
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        product(a, a).block_until_ready()
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and most of a list of times, in seconds."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "rounds": len(seconds),
    }


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processor() -> str:
    """Model name of the CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment() -> dict:
    """Date, hardware, versions and the load average, for a record."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {
            "cpu": processor(),
            "cores": cores(),
            "device": jax.devices()[0].device_kind,
        },
        "python": platform.python_version(),
        "jax": jax.__version__,
        "load": load(),
    }


def described(record: dict) -> str:
    """The machine and JAX of a record of `environment`, for its page."""
    hardware, loads = record["hardware"], ", ".join(f"{x:.1f}" for x in record["load"])
    return (
        f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['device']}; load average {loads}. "
        f"JAX {record['jax']} on Python {record['python']}"
    )


def load() -> list[float]:
    """The load average of the last minute, where there is one."""
    return [os.getloadavg()[0]] if hasattr(os, "getloadavg") else []


def publish(record: dict, page: str, out: Path, name: str) -> None:
    """Writes `out`/`name`_<platform>.json and .md, and prints the page."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}_{jax.default_backend()}"
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(page)
    print(page)
