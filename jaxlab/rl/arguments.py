"""What the functions of this package demand of their arguments.

Static arguments and shapes raise ValueError at once. What depends on the values of an array raises
ValueError where they are known (outside jit and vmap), and is a `checkify.debug_check` where they are
traced: silent unless the caller wraps the function in `checkify.checkify`.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from jaxlab.arguments import check_shape


def demand(holds: Callable[..., Any], message: str, *arrays) -> None:
    """ValueError(message) unless `holds(numpy or jax.numpy, *arrays)` everywhere; see the module."""
    if any(isinstance(x, Tracer) for x in arrays):
        checkify.debug_check(jnp.all(holds(jnp, *arrays)), message.replace("{", "{{"))
    elif not np.all(holds(np, *map(np.asarray, arrays))):
        raise ValueError(message)


def check_number(name: str, value, low: float, high: float = math.inf, *, above=False) -> None:
    """ValueError unless `value` is a finite number in [low, high]; (low, high] if `above`."""
    real = isinstance(value, numbers.Real | np.number) and not isinstance(value, bool)
    number = float(value) if real else math.nan  # type: ignore[arg-type]
    if not (math.isfinite(number) and low <= number <= high) or (above and number == low):
        bounds = f"{'above' if above else 'at least'} {low}"
        bounds += f" and at most {high}" if high < math.inf else ""
        raise ValueError(f"{name}={value!r} must be a finite number {bounds}")


def check_axes(name: str, x, axes: str) -> None:
    """ValueError unless `x` has as many axes as the words of `axes` name."""
    if jnp.ndim(x) != len(axes.split()):
        raise ValueError(f"{name} has shape {jnp.shape(x)}; expected axes ({axes})")


def flags(name: str, x, *allowed: tuple[int, ...]) -> jax.Array:
    """0/1 array `x` of any type and one of the shapes `allowed`, as booleans."""
    check_shape(name, x, *allowed)
    demand(lambda xp, x: (x == 0) | (x == 1), f"{name} must hold 0 and 1 only", x)
    return jnp.asarray(x) != 0


def check_ids(name: str, ids, counted, number: int) -> jax.Array:
    """Where `ids` are in [0, number); ValueError if one of a counted row is not."""
    if not jnp.issubdtype(jnp.result_type(ids), jnp.integer):
        raise ValueError(f"{name} has dtype {jnp.result_type(ids)}; it must hold integers")
    inside = lambda xp, ids, counted: ((ids >= 0) & (ids < number)) | (counted == 0)  # noqa: E731
    demand(inside, f"{name} must be in [0, {number}) in every valid row", ids, counted)
    return (jnp.asarray(ids) >= 0) & (jnp.asarray(ids) < number)
