"""What a compiled program needs: as figures, and as a table to print."""

from typing import NamedTuple

from sharding.topology import Chip


class MemoryReport(NamedTuple):
    """Bytes one device needs, and the seconds that lowering and compiling took.

    `peak_bytes` is the compiler's own figure on TPUs and GPUs. The CPU compiler's covers arguments
    and outputs only, and a TPU's counts buffers offloaded to the host as its own: there it is
    arguments + outputs - donated + temporaries, an upper bound.
    """

    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    peak_bytes: int
    host_temp_bytes: int
    seconds: float


class CompileReport(NamedTuple):
    """A step compiled for a TPU slice; all bytes and seconds are per device and step.

    When the step does not fit, `memory`, `collectives` and the times but for compute are None.
    """

    topology: str
    chip: Chip
    devices: int
    fits: bool
    needs_bytes: float
    hbm_bytes: float
    memory: MemoryReport | None
    collectives: dict[str, tuple[int, int]] | None
    model_flops: float | None  # all devices, given by the caller
    step_flops: float  # all devices, counted in the step, recomputation included
    hbm_traffic: float | None
    compute_seconds: float
    hbm_seconds: float | None
    ici_seconds: float | None
    largest: tuple[
        tuple[int, str], ...
    ] = ()  # places in HBM: bytes, shapes of what takes turns there
    unknown_loops: int = 0  # loops whose length the compiled text does not tell, counted once
    message: str = ""


def format_report(report: CompileReport) -> str:
    """The report as a plain table."""
    r, m = report, report.memory
    verdict = "fits" if r.fits else "does not fit"
    lines = [f"{verdict}: needs {_size(r.needs_bytes)} of {_size(r.hbm_bytes)} usable HBM a device"]
    if m:
        lines += [
            f"  arguments        {_size(m.argument_bytes):>12}",
            f"  outputs          {_size(m.output_bytes):>12}  (donated arguments share their bytes)",
            f"  temporaries      {_size(m.temp_bytes):>12}",
            f"  peak             {_size(m.peak_bytes):>12}  {m.peak_bytes / r.hbm_bytes:.1%} of it",
        ]
        if m.host_temp_bytes:
            lines.append(f"  on the host      {_size(m.host_temp_bytes):>12}")
    if r.largest:
        lines.append("largest places in memory, with what takes turns there")
        lines += [f"  {_size(size):>12}  {shapes[:100]}" for size, shapes in r.largest]
    if r.collectives is not None:
        lines.append("collectives of a step, a device" + ("" if r.collectives else ": none"))
        for kind, (calls, size) in sorted(r.collectives.items(), key=lambda kv: -kv[1][1]):
            lines.append(f"  {kind:<22}{calls:>6} calls{_size(size):>14}")
    lines.append("FLOPs of a step, all devices")
    if r.model_flops is not None:
        lines.append(f"  useful           {r.model_flops:>12.3e}")
    lines += [
        f"  counted          {r.step_flops:>12.3e}  (recomputation included)",
        "time of a step, at least",
        f"  compute          {_time(r.compute_seconds):>12}  at {r.chip.bf16_flops:.3e} FLOP/s",
    ]
    if r.hbm_seconds is not None and r.ici_seconds is not None and m:
        times = {"compute": r.compute_seconds, "memory": r.hbm_seconds, "network": r.ici_seconds}
        bound = max(times, key=lambda k: times[k])
        lines += [
            f"  memory           {_time(r.hbm_seconds):>12}  "
            f"{_size(r.hbm_traffic or 0)} at {r.chip.hbm_bandwidth:.3e} B/s",
            f"  network          {_time(r.ici_seconds):>12}  each collective on one ring",
            f"  bound by {bound}: {_time(times[bound])} with perfect overlap, "
            f"{_time(sum(times.values()))} with none",
        ]
        if r.model_flops and times[bound]:
            best = r.model_flops / r.devices / r.chip.bf16_flops
            low, high = best / sum(times.values()), best / times[bound]
            lines.append(f"  utilisation (MFU) at most {high:.1%}, without overlap {low:.1%}")
        if r.unknown_loops:
            lines.append(f"  {r.unknown_loops} loops of unknown length are counted once")
        lines.append(f"compiled in {m.seconds:.1f} s")
    if r.message:
        lines.append(f"compiler: {r.message}")
    return "\n".join(lines)


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n:.2f} TiB"


def _time(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.2f} {unit}"
    return f"{seconds * 1e6:.3f} us"
