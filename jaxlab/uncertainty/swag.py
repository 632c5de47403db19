"""SWAG: a Gaussian about the average of the parameters that training walks through.

Source: Maddox et al., 1902.02476. Covariance: half the variance of each parameter, half of low rank from
the last `rank` deviations. Variances are running central moments: the paper's mean of squares less the
squared mean loses its digits in float32 when the walk is short.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from jaxlab.uncertainty.checks import check_count, check_number


class SwagState(NamedTuple):
    """What has been walked through; trees like the parameters, deviations with `rank` in front."""

    count: Int[Array, ""]
    mean: Any
    var: Any
    deviations: Any


def swag_init(params: Any, rank: int) -> SwagState:
    """The state before the first point; parameters are counted in at least float32.

    ValueError for a rank below 2.
    """
    check_count("rank", rank, 2)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, "float32")), params
    )
    rows = jax.tree.map(lambda x: jnp.zeros((rank, *x.shape), x.dtype), zeros)
    return SwagState(jnp.zeros((), jnp.int32), zeros, zeros, rows)


def swag_update(state: SwagState, params: Any) -> SwagState:
    """The state after one more point of the walk; the oldest deviation gives way."""
    n = state.count + 1
    mean = jax.tree.map(lambda m, x: m + (x - m) / n, state.mean, params)
    grow = lambda v, m, new, x: v + ((x - m) * (x - new) - v) / n  # noqa: E731
    var = jax.tree.map(grow, state.var, state.mean, mean, params)
    put = lambda rows, x, m: rows.at[state.count % len(rows)].set(x - m)  # noqa: E731
    return SwagState(n, mean, var, jax.tree.map(put, state.deviations, params, mean))


def swag_sample(key: Key[Array, ""], state: SwagState, *, scale: float = 1.0) -> Any:
    """One draw of the parameters, its standard deviation times `scale`; ValueError for scale < 0.

    mean + scale / sqrt(2) (sqrt(var) z + D^T z' / sqrt(r - 1)), z and z' standard normal, r of the
    deviations D known (one is as none).
    """
    check_number("scale", scale, "finite and at least 0", lambda x: 0 <= x < float("inf"))
    first, second = jax.random.split(key)
    leaves, tree = jax.tree.flatten(state.mean)
    keys = jax.tree.unflatten(tree, list(jax.random.split(first, len(leaves))))
    rank = len(jax.tree.leaves(state.deviations)[0])
    known = jnp.minimum(state.count, rank)
    weights = jax.random.normal(second, (rank,)) / jnp.sqrt(jnp.maximum(known - 1, 1))

    def draw(key, mean, var, rows):
        own = jnp.sqrt(var) * jax.random.normal(key, mean.shape, mean.dtype)
        shared = jnp.tensordot(weights.astype(mean.dtype), rows, 1)
        return mean + scale * 0.5**0.5 * (own + shared)

    return jax.tree.map(draw, keys, state.mean, state.var, state.deviations)
