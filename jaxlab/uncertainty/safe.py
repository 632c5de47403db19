"""Arithmetic that is defined at the edge of the simplex, in value and gradient, and sample means."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


class Centered(NamedTuple):
    """Samples about their mean: p = mean + dev."""

    p: jax.Array  # [s, ..., k]
    mean: jax.Array  # [..., k]
    dev: jax.Array  # [s, ..., k]


def present(x: jax.Array) -> jax.Array:
    """Where `x` counts as above 0: from 1e-31 in float32, so that cotangents over it stay finite."""
    return x >= jnp.finfo(x.dtype).tiny / jnp.finfo(x.dtype).eps


@jax.custom_jvp
def ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b for b >= 0, and 0 where b is 0."""
    there = present(b)
    return jnp.where(there, a / jnp.where(there, b, 1), 0)


@ratio.defjvp
def _ratio_jvp(primals, tangents):
    # The usual rule squares b, which underflows below 1e-19 in float32.
    (_, b), (da, db) = primals, tangents
    quotient = ratio(*primals)
    return quotient, ratio(da - quotient * db, b)


def root(x: jax.Array) -> jax.Array:
    """Square root of x >= 0, of slope 0 at 0."""
    there = present(x)
    return jnp.where(there, jnp.sqrt(jnp.where(there, x, 1)), 0)


def xlogx(x: jax.Array) -> jax.Array:
    """x log x, of value and slope 0 at 0."""
    there = present(x)
    return jnp.where(there, x * jnp.log(jnp.where(there, x, 1)), 0)


def center(p: jax.Array) -> Centered:
    """Mean over axis 0 and deviations from it, which are exactly 0 for identical samples.

    The mean is corrected by that of the deviations: a sum of many float32 rounds off the spread.
    """
    pivot = jnp.clip(jnp.mean(p, 0), jnp.min(p, 0), jnp.max(p, 0))
    shifted = p - jax.lax.stop_gradient(pivot)
    rest = jnp.mean(shifted, 0)
    return Centered(p, jax.lax.stop_gradient(pivot) + rest, shifted - rest)


def curvature(u: jax.Array) -> jax.Array:
    """2 phi(1 + u) / u^2 for u >= -1, phi(t) = t log t - t + 1: 2 at -1, 1 at 0, decreasing.

    Where u is small, by the series of log(1 + u) = 2 artanh(r), r = u / (2 + u), so that no digits
    cancel.
    """
    r = u / (2 + u)
    small = jnp.abs(r) <= 0.25
    square, series = r * r, jnp.zeros_like(r)
    for n in reversed(range(14)):  # 16^-14 is below the rounding of float64
        series = series * square + 1 / (2 * n + 3)
    near = (1 - r) * (1 + (1 + r) * r * series)
    u = jnp.where(small, 1, u)
    return jnp.where(small, near, 2 * (xlogx(1 + u) / u - 1) / u)


@jax.custom_jvp
def jensen_gap(p: jax.Array, mean: jax.Array, dev: jax.Array) -> jax.Array:
    """E[p log p] - mean log mean over axis 0, as mean E[phi(p / mean)]: a sum of non-negative terms.

    `mean` and `dev` are those of p; the gradient goes through p alone.
    """
    u = ratio(dev, mean)
    return jnp.mean(curvature(u) * u * dev, 0) / 2


@jensen_gap.defjvp
def _jensen_gap_jvp(primals, tangents):
    p, mean, dev = primals
    u = ratio(dev, mean)
    near = jnp.abs(u) < 0.5
    log_mean = jnp.log(jnp.where(present(mean), mean, 1))
    far = jnp.log(jnp.where(present(p), p, 1)) - log_mean
    slope = jnp.where(near, jnp.log1p(jnp.where(near, u, 0)), far)
    # The slope of p log p, log p + 1, is taken as 0 at p = 0; that of mean log mean stays.
    slope = jnp.where(present(p), slope, -log_mean - 1)
    slope = jnp.where(present(mean), slope, 0)
    return jensen_gap(p, mean, dev), jnp.mean(slope * tangents[0], 0)
