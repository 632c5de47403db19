"""What the functions of this package demand of their arguments; of values of arrays see `jaxlab.arguments`."""

import jax
import jax.numpy as jnp

from jaxlab.arguments import check_number, check_shape, demand

__all__ = ["check_axes", "check_ids", "check_number", "demand", "flags"]


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
