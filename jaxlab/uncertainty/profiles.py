"""Which classes carry the uncertainty: of a sample, of a true class, of an error, over time.

Source: the diagnostics of arXiv 2602.21160.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.uncertainty.checks import check_count, check_labels, check_values, real
from jaxlab.uncertainty.safe import ratio, root, xlogx


class Dominance(NamedTuple):
    """How the contributions of a sample are spread over the classes."""

    index: Int[Array, "*b"]
    fraction: Float[Array, "*b"]
    entropy: Float[Array, "*b"]


class DriftStats(NamedTuple):
    """Statistics of consecutive batches; std divides by the number of samples."""

    mean: Float[Array, "t k"]
    std: Float[Array, "t k"]
    median: Float[Array, "t k"]
    by_prediction: Float[Array, "t c k"]  # NaN where a class is not predicted


def dominance(c: Float[Array, "*b k"]) -> Dominance:
    """Class with the largest share of c [..., K], that share, and the entropy of the shares (nats).

    0, 0, 0 where c is all zeros. ValueError for NaN and c without axes, TypeError unless it is real.
    """
    c = real("c", c)
    if c.ndim < 1:
        raise ValueError(f"c={c.shape} must have classes in its last axis")
    check_values(~jnp.isnan(c), "c holds NaN")
    share = ratio(c, jnp.sum(c, -1, keepdims=True))
    index = jnp.argmax(c, -1).astype(jnp.int32)
    return Dominance(index, jnp.max(share, -1), -jnp.sum(xlogx(share), -1))


def epistemic_profiles(
    c: Float[Array, "n k"], y: Int[Array, "n"], num_classes: int
) -> Float[Array, "c k"]:
    """E[c | y = i] [num_classes, K] of contributions c [N, K]; NaN where no sample has the label.

    ValueError for shapes that do not fit and labels outside [0, num_classes).
    """
    num_classes = check_count("num_classes", num_classes, 1)
    c = _table(c)
    return _group_means(c, check_labels("y", y, num_classes, c.shape[0]), num_classes)


def error_signatures(
    c: Float[Array, "n k"], y: Int[Array, "n"], yhat: Int[Array, "n"], num_classes: int
) -> Float[Array, "c c k"]:
    """E[c | y = i, yhat = j] [num_classes, num_classes, K]; NaN and ValueError as in `epistemic_profiles`."""
    num_classes = check_count("num_classes", num_classes, 1)
    c = _table(c)
    y, yhat = (check_labels(a, x, num_classes, c.shape[0]) for a, x in (("y", y), ("yhat", yhat)))
    means = _group_means(c, y * num_classes + yhat, num_classes**2)
    return means.reshape(num_classes, num_classes, -1)


def drift(
    c: Float[Array, "n k"], yhat: Int[Array, "n"], num_classes: int, num_batches: int
) -> DriftStats:
    """Mean, deviation, median and E[c | yhat] of `num_batches` batches of N // num_batches samples.

    Samples in order; what is left over at the end is dropped. ValueError for shapes that do not fit,
    labels outside [0, num_classes) and num_batches outside [1, N].
    """
    num_classes = check_count("num_classes", num_classes, 1)
    c = _table(c)
    yhat = check_labels("yhat", yhat, num_classes, c.shape[0])
    num_batches = check_count("num_batches", num_batches, 1, c.shape[0])
    size = c.shape[0] // num_batches
    c, yhat = (x[: size * num_batches].reshape(num_batches, size, *x.shape[1:]) for x in (c, yhat))
    mean = jnp.mean(c, 1)
    std = root(jnp.mean((c - mean[:, None]) ** 2, 1))
    by_prediction = jax.vmap(lambda c, yhat: _group_means(c, yhat, num_classes))(c, yhat)
    return DriftStats(mean, std, jnp.median(c, 1), by_prediction)


def _table(c) -> jax.Array:
    c = real("c", c)
    if c.ndim != 2 or not c.size:
        raise ValueError(f"c={c.shape} must have the shape [samples, classes]")
    check_values(~jnp.isnan(c), "c holds NaN")
    return c


def _group_means(c: jax.Array, group: jax.Array, num_groups: int) -> jax.Array:
    sums = jax.ops.segment_sum(c, group, num_groups)
    count = jax.ops.segment_sum(jnp.ones_like(group), group, num_groups)[:, None]
    return jnp.where(count > 0, sums / jnp.maximum(count, 1), jnp.nan)
