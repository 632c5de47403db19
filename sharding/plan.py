"""What a program needs before it runs: memory, communication and time, from jaxprs and compilers."""

import math
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from sharding.costs import (
    CommModel,
    MemoryModel,
    choose_heads_per_stage,
    comm_model,
    memory_model,
)
from sharding.flops import array_of, jaxpr_flops, live, repeats, sub_jaxprs
from sharding.hlo import Module
from sharding.report import CompileReport, MemoryReport, format_report
from sharding.topology import parse_topology, topology_devices
from sharding.usage import dump_options, read_usage

__all__ = [
    "CommModel",
    "CompileReport",
    "MemoryModel",
    "MemoryReport",
    "aot_memory",
    "choose_heads_per_stage",
    "comm_model",
    "compile_report",
    "count_collectives",
    "format_report",
    "memory_model",
    "topology_devices",
]

# Primitives that move bytes between devices; some have a form with `_start` and `_done`.
_COMMUNICATE = set(
    "psum psum_invariant unreduced_psum pmax pmin unreduced_pmax unreduced_pmin pbroadcast "
    "all_gather all_gather_invariant all_gather_reduced reduce_scatter unreduced_reduce_scatter "
    "all_to_all ragged_all_to_all ppermute psend precv".split()
)


def count_collectives(fn: Callable, *args: Any) -> dict[str, tuple[int, int]]:
    """{primitive name: (calls, bytes)} one device runs in `fn(*args)`, written out in the program.

    `args` are arrays or `jax.ShapeDtypeStruct`s. Counted are the collectives inside `shard_map`,
    bytes of their operands as one device sees them; a scan counts `length` times, a `cond` as the
    branch with the most bytes, a `while_loop` as in `count_flops`. Axes of size 1 cost nothing. What
    the compiler adds for arrays outside `shard_map` is in `hlo_collectives` of compiled text only.
    """
    return _collectives(live(jax.make_jaxpr(fn)(*args).jaxpr), {})


def _collectives(jaxpr: core.Jaxpr, sizes: dict[str, int]) -> dict[str, tuple[int, int]]:
    total: dict[str, tuple[int, int]] = {}
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name.removesuffix("_start")
        if name in _COMMUNICATE:
            axes = eqn.params["axes" if "axes" in eqn.params else "axis_name"]
            axes = axes if isinstance(axes, tuple) else (axes,)
            if math.prod(sizes.get(axis, 1) for axis in axes) > 1:
                operands = map(array_of, eqn.invars)
                size = sum(math.prod(a.shape) * a.dtype.itemsize for a in operands)
                _add(total, {name: (1, size)}, 1)
            continue
        inside = sizes
        if name == "shard_map":
            inside = sizes | dict(eqn.params["mesh"].shape)
        found = [_collectives(sub, inside) for sub in sub_jaxprs(eqn)]
        if name == "cond" and found:
            found = [max(found, key=lambda f: sum(size for _, size in f.values()))]
        for one in found:
            _add(total, one, repeats(eqn))
    return total


def _add(total: dict, more: dict, times: int) -> None:
    for name, (calls, size) in more.items():
        before = total.get(name, (0, 0))
        total[name] = (before[0] + times * calls, before[1] + times * size)


def aot_memory(
    fn: Callable, args: tuple[Any, ...], *, compiler_options: dict[str, Any] | None = None
) -> MemoryReport:
    """Compiles `fn(*args)` for the devices of the shardings of `args` and reports its memory.

    `fn` may be jitted already (donation and out_shardings then count); `args` are
    `jax.ShapeDtypeStruct`s with shardings, over real devices or those of `topology_devices`.
    """
    begin = time.perf_counter()
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    compiled = jitted.lower(*args).compile(compiler_options=compiler_options)
    return _memory(compiled, time.perf_counter() - begin)


def _memory(compiled: Any, seconds: float) -> MemoryReport:
    m = compiled.memory_analysis()
    sizes = m.argument_size_in_bytes, m.output_size_in_bytes, m.temp_size_in_bytes
    placed = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))
    on_cpu = any(d.platform == "cpu" for s in placed for d in s.device_set)
    bound = on_cpu or m.host_temp_size_in_bytes
    peak = sum(sizes) - m.alias_size_in_bytes if bound else m.peak_memory_in_bytes
    return MemoryReport(*sizes, peak, m.host_temp_size_in_bytes, seconds)


def compile_report(
    jitted: Callable, args: tuple[Any, ...], *, topology: str, flops: float | None = None
) -> CompileReport:
    """Compiles a jitted step for TPU slice `topology` and says what it needs and how long it takes.

    `args` are `jax.ShapeDtypeStruct`s with shardings over `topology_devices(topology)`; use
    `jax.set_mesh` around the call if the step needs it. `flops` are the useful FLOPs of a step over
    all devices, from which the best possible utilisation follows. Times are bounds: compute at the
    published bfloat16 rate; memory with each operand and result of a fused operation in HBM moved
    once; the network with each collective on a ring along one torus axis, nothing overlapped. Blocks
    of attention that the mask lets a loop skip count in all three.
    A step too large for the memory gives a report with `fits=False`; other compiler errors are
    raised. ValueError for an unknown topology or for arguments placed elsewhere.
    """
    slice_ = parse_topology(topology)
    chip = slice_.chip
    placed = [getattr(a, "sharding", None) for a in jax.tree.leaves(args)]
    used = {d for s in placed if s is not None for d in s.device_set}
    kinds = sorted({d.platform for d in used}) or ["no devices"]
    if kinds != ["tpu"] or len(used) > slice_.devices:
        raise ValueError(
            f"args are placed on {len(used)} devices ({', '.join(kinds)}); they must be "
            f"jax.ShapeDtypeStructs with shardings over the {slice_.devices} devices of "
            f"topology_devices({topology!r})"
        )
    begin = time.perf_counter()
    traced = jitted.trace(*args)
    step_flops = jaxpr_flops(traced.jaxpr.jaxpr)
    report = CompileReport(
        topology=slice_.name,
        chip=chip,
        devices=len(used),
        fits=True,
        needs_bytes=0,
        hbm_bytes=chip.usable_bytes,
        memory=None,
        collectives=None,
        model_flops=flops,
        step_flops=step_flops,
        hbm_traffic=None,
        compute_seconds=step_flops / len(used) / chip.bf16_flops,
        hbm_seconds=None,
        ici_seconds=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        options = dump_options(folder)
        return _compiled(traced, report, begin, options, lambda: read_usage(folder))


def _compiled(traced, report: CompileReport, begin: float, options, usage) -> CompileReport:
    """`report` with what the compiler says."""
    chip = report.chip
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        needs, limit = out_of_memory(str(error))
        if not needs:
            raise
        return report._replace(
            fits=False, needs_bytes=needs, hbm_bytes=limit, message=str(error).splitlines()[0]
        )
    memory = _memory(compiled, time.perf_counter() - begin)
    used = usage()
    if used and memory.host_temp_bytes:
        memory = memory._replace(peak_bytes=used.hbm_bytes)
    module = Module(compiled.as_text())
    found = module.collectives()
    collectives: dict[str, tuple[int, int]] = {}
    for c in found:
        _add(collectives, {c.kind: (1, c.bytes)}, c.calls)
    ring = 2 * chip.link_bandwidth / chip.per_chip
    traffic = module.traffic()
    return report._replace(
        needs_bytes=memory.peak_bytes,
        memory=memory,
        collectives=collectives,
        hbm_traffic=traffic,
        hbm_seconds=traffic / chip.hbm_bandwidth,
        ici_seconds=sum(c.calls * c.ring_bytes for c in found) / ring,
        largest=used.largest if used else (),
        unknown_loops=len(module.unknown_loops),
    )


def out_of_memory(message: str) -> tuple[float, float]:
    """(bytes needed, bytes there) when a compiler error says that HBM is too small, else zeros."""
    size = r"\(?([\d.]+)([KMGT]?)\)?"
    units = dict(zip("KMGT", (2.0**10, 2.0**20, 2.0**30, 2.0**40), strict=True))
    for pattern in (
        rf"required for HLO temporaries {size} exceeds available HBM {size}",
        rf"Used {size} of {size} hbm",
    ):
        if "RESOURCE_EXHAUSTED" in message and (m := re.search(pattern, message)):
            needs, limit = (float(m[i]) * units.get(m[i + 1], 1.0) for i in (1, 3))
            return needs, limit
    return 0.0, 0.0
