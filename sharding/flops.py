"""Floating-point operations of a function, counted in its jaxpr: loops included, nothing compiled."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

from jaxlab.loops import most_of


def count_flops(fn: Callable, *args: Any) -> float:
    """FLOPs of `fn(*args)` over all devices: 2 for every multiply-add of a matmul or convolution.

    `args` are arrays or `jax.ShapeDtypeStruct`s (typed PRNG keys too); nothing is computed. Scans
    count `length` times, the branches of a `cond` as the dearest one, the body of a `while_loop`
    once (its length is data) unless `jaxlab.loops.loop_at_most` made it, then as often as it runs
    at most: blockwise attention counts in full, masked blocks included, which is the convention of
    model FLOPs utilisation. A `shard_map` body counts once per device of its manual axes, a Pallas
    kernel once per grid point; what no output needs does not count. Recomputation under
    `jax.checkpoint` is in the count where it is in the program, that is in gradients. Elementwise
    operations, reductions and scatters are not.
    """
    return jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr) -> float:
    """`count_flops` of a program that is already traced."""
    return _flops(live(jaxpr))


def live(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The program without what no output needs, which compilers drop too."""
    return partial_eval.dce_jaxpr(jaxpr, True)[0]


def _flops(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if rule := _RULES.get(eqn.primitive.name):
            total += rule(eqn)
        elif eqn.primitive.name == "cond":
            total += max(_flops(branch.jaxpr) for branch in eqn.params["branches"])
        else:
            times = repeats(eqn) * spread(eqn)
            total += times * sum(map(_flops, sub_jaxprs(eqn)))
    return total


def sub_jaxprs(eqn: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The jaxprs among the parameters of an equation: bodies, branches, wrapped calls."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def repeats(eqn: core.JaxprEqn) -> int:
    """How often one device runs the body of an equation at most, as far as the program says."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "pallas_call":
        grid = eqn.params["grid_mapping"].grid
        return math.prod(size for size in grid if isinstance(size, int))
    if eqn.primitive.name == "while":
        return most_of(str(eqn.source_info.name_stack)) or 1
    return 1


def spread(eqn: core.JaxprEqn) -> int:
    """Over how many devices a `shard_map` equation runs its body; 1 for all others."""
    if eqn.primitive.name != "shard_map":
        return 1
    sizes = eqn.params["mesh"].shape
    return math.prod(sizes[axis] for axis in eqn.params["newly_manual_axes"])


def array_of(variable: Any) -> Any:
    """Shape and type of a variable that stands for an array (pyright knows `AbstractValue` only)."""
    return variable.aval


def _dot(eqn: core.JaxprEqn) -> float:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs = array_of(eqn.invars[0]).shape
    return 2.0 * math.prod(array_of(eqn.outvars[0]).shape) * math.prod(lhs[i] for i in contracting)


def _conv(eqn: core.JaxprEqn) -> float:
    """Multiply-adds that touch a real input element: padding and dilation holes cost nothing."""
    p, out = eqn.params, array_of(eqn.outvars[0]).shape
    lhs, rhs = (array_of(v).shape for v in eqn.invars)
    spec = p["dimension_numbers"]
    taps = 1
    for i in range(len(lhs) - 2):
        taps *= _taps(
            lhs[spec.lhs_spec[2 + i]],
            rhs[spec.rhs_spec[2 + i]],
            out[spec.out_spec[2 + i]],
            p["window_strides"][i],
            p["padding"][i][0],
            p["lhs_dilation"][i],
            p["rhs_dilation"][i],
        )
    # The kernel's input features are already those of one feature group.
    return 2.0 * taps * rhs[spec.rhs_spec[1]] * out[spec.out_spec[0]] * out[spec.out_spec[1]]


def _taps(size: int, window: int, out: int, stride: int, low: int, holes: int, spacing: int) -> int:
    """Pairs of output position and window position that meet an input element, in one dimension."""
    pairs = 0
    short, long = sorted([(out, stride), (window, spacing)])
    steps = np.arange(long[0], dtype=np.int64) * long[1]
    for i in range(short[0]):
        at = steps + i * short[1] - low
        pairs += int(np.sum((at >= 0) & (at <= (size - 1) * holes) & (at % holes == 0)))
    return pairs


_RULES: dict[str, Callable[[core.JaxprEqn], float]] = {
    "dot_general": _dot,
    "conv_general_dilated": _conv,
}
