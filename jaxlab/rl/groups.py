"""Sums that every estimator of this package is made of: over groups of rows, and backwards in time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Moments(NamedTuple):
    """Statistics of a row's group over the rows that count, repeated on every row."""

    count: Float[Array, "n"]
    centred: Float[Array, "n"]  # x minus the mean
    mean: Float[Array, "n"]
    variance: Float[Array, "n"]  # 0 where there are no more than ddof rows


def group_moments(
    x: Float[Array, "n"],
    ids: Int[Array, "n"],
    counted: Bool[Array, "n"],
    number: int,
    ddof: int = 1,
) -> Moments:
    """Moments of `x` by group; exactly 0 centred and variance where all counted rows are equal.

    What rows that do not count hold, NaN included, changes no other row. Ids outside [0, number)
    must not count.
    """
    ids = jnp.clip(ids, 0, number - 1)
    total = lambda x: jax.ops.segment_sum(jnp.where(counted, x, 0), ids, number)[ids]  # noqa: E731
    count = total(jnp.ones_like(x))
    # From the least value on, not from 0: a mean of equal numbers would not be that number.
    low = jax.ops.segment_min(jnp.where(counted, x, jnp.inf), ids, number)[ids]
    low = jnp.where(count > 0, low, 0)
    offset = total(x - low) / jnp.maximum(count, 1)
    centred = (x - low) - offset
    freedom = count - ddof
    variance = jnp.where(freedom > 0, total(centred**2) / jnp.where(freedom > 0, freedom, 1), 0)
    return Moments(count, centred, low + offset, variance)


def backward_sums(x: Float[Array, "*b t"], keep: Float[Array, "*b t"]) -> Float[Array, "*b t"]:
    """y_t = x_t + keep_t y_{t+1} along the last axis, 0 beyond its end; log(t) steps deep."""

    def combine(later, sooner):
        (keep1, x1), (keep0, x0) = later, sooner
        return keep1 * keep0, x0 + keep0 * x1

    axis = x.ndim - 1
    return jax.lax.associative_scan(combine, (keep, x), reverse=True, axis=axis)[1]


def following(x: Array) -> Array:
    """x_{t+1} along the last axis, 0 after the last."""
    return jnp.pad(x[..., 1:], [(0, 0)] * (x.ndim - 1) + [(0, 1)])
