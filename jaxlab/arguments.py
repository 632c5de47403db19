"""What every package here asks of its arguments: errors name the argument, its value and what is allowed.

What depends on the values of an array raises ValueError where they are known (outside jit and vmap), and is
a `checkify.debug_check` where they are traced: silent unless the caller wraps the function in
`checkify.checkify`.
"""

import math
import numbers
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify


def wide_type(*arrays) -> jnp.dtype:
    """Type to compute in: that of the arrays together, at least float32; numbers take it as it is."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def wide(x) -> jax.Array:
    """`x` as an array of its `wide_type`: float64 stays, smaller types and integers become float32."""
    x = jnp.asarray(x)
    return x.astype(wide_type(x))


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


def check_count(
    name: str,
    value: Any,
    least: int,
    most: int | None = None,
    *,
    wrong_type: type[Exception] = ValueError,
) -> int:
    """`value` as an int in [least, most], else ValueError; `wrong_type` unless an integer. bool is none."""
    allowed = f"of at least {least}" + ("" if most is None else f" and at most {most}")
    message = f"{name}={value!r} must be an integer {allowed}"
    try:
        number = operator.index(value)
    except TypeError:
        raise wrong_type(message) from None
    if isinstance(value, bool):
        raise wrong_type(message)
    if number < least or (most is not None and number > most):
        raise ValueError(message)
    return number


def check_choice(name: str, value: Any, *allowed: Any) -> None:
    """ValueError unless `value` is among `allowed`, its type included."""
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def check_shape(name: str, x, *allowed: tuple[int, ...]) -> None:
    """ValueError unless the shape of `x`, which may not be None, is among `allowed`."""
    if x is None or jnp.shape(x) not in allowed:
        got = "None" if x is None else f"shape {jnp.shape(x)}"
        legal = " or ".join(map(str, dict.fromkeys(allowed)))
        raise ValueError(f"{name} has {got}; allowed: {legal}")
