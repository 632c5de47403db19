"""Moments of posterior samples, of a batch or of a stream.

Streams merge by the pairwise formulas of Chan et al. (1979) and Pebay (2008), on averages rather than
sums: raw powers would lose the digits of a small spread. Source of the moments: arXiv 2602.21160.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxlab.uncertainty.checks import as_probabilities, check_count, check_type
from jaxlab.uncertainty.safe import HIGHEST, center


class Moments(NamedTuple):
    """Central moments over samples."""

    mean: Float[Array, "*b k"]
    var: Float[Array, "*b k"]
    m3: Float[Array, "*b k"]
    m4: Float[Array, "*b k"]
    cov: Float[Array, "*b k k"]


class MomentsState(NamedTuple):
    """What a stream of samples leaves: how many there were, and their moments with ddof 0."""

    count: Float[Array, ""]
    moments: Moments


def moments(p: Float[Array, "s *b k"], *, ddof: int = 0, from_logits: bool = False) -> Moments:
    """Moments over samples of p [S, ..., K]; var and cov divide by S - ddof, m3 and m4 by S.

    ValueError for fewer than 2 samples or classes, rows that are no probabilities, ddof outside
    [0, S).
    """
    p = as_probabilities(p, from_logits)
    check_count("ddof", ddof, 0, p.shape[0] - 1)
    _, mean, dev = center(p)
    cov = jnp.einsum("s...i,s...j->...ij", dev, dev, precision=HIGHEST) / p.shape[0]
    var, m3, m4 = (jnp.mean(dev**n, 0) for n in (2, 3, 4))
    return _corrected(Moments(mean, var, m3, m4, cov), p.shape[0], ddof)


def moments_init(
    batch_shape: tuple[int, ...], num_classes: int, *, dtype=jnp.float32
) -> MomentsState:
    """The state before the first sample of shape [*batch_shape, num_classes]; at least float32.

    TypeError unless batch_shape is a tuple, ValueError for negative sizes and fewer than 2 classes.
    """
    check_count("num_classes", num_classes, 2)
    check_type("batch_shape", batch_shape, tuple)
    shape = (*(check_count("batch_shape", size, 0) for size in batch_shape), num_classes)
    zeros = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
    cov = jnp.zeros((*shape, num_classes), zeros.dtype)
    return MomentsState(jnp.zeros((), zeros.dtype), Moments(zeros, zeros, zeros, zeros, cov))


def moments_update(
    state: MomentsState, p_one: Float[Array, "*b k"], *, from_logits: bool = False
) -> MomentsState:
    """The state after one more sample [..., K]; ValueError for another shape than the state's."""
    check_type("state", state, MomentsState)
    p = as_probabilities(p_one, from_logits, samples=False, name="p_one")
    mean, cov = state.moments.mean, state.moments.cov
    if p.shape != mean.shape:
        raise ValueError(f"p_one={p.shape} must have the shape {mean.shape} of the state")
    zeros = jnp.zeros_like(mean)
    one = Moments(p.astype(mean.dtype), zeros, zeros, zeros, jnp.zeros_like(cov))
    return moments_merge(state, MomentsState(jnp.ones_like(state.count), one))


def moments_merge(a: MomentsState, b: MomentsState) -> MomentsState:
    """The state of the samples of both; ValueError unless they have one shape."""
    check_type("a", a, MomentsState)
    check_type("b", b, MomentsState)
    x, y = a.moments, b.moments
    if x.mean.shape != y.mean.shape:
        raise ValueError(f"states of shapes {x.mean.shape} and {y.mean.shape} must have one shape")
    count = a.count + b.count
    fb = b.count / jnp.maximum(count, 1)
    fa = a.count / jnp.maximum(count, 1)
    delta, both = y.mean - x.mean, fa * fb
    lift = delta[..., :, None] * delta[..., None, :]
    merged = Moments(
        # From the mean of the larger part: exact when the other is empty.
        jnp.where(fa >= fb, x.mean + fb * delta, y.mean - fa * delta),
        fa * x.var + fb * y.var + both * delta**2,
        fa * x.m3 + fb * y.m3 + both * (fa - fb) * delta**3 + 3 * both * delta * (y.var - x.var),
        fa * x.m4
        + fb * y.m4
        + both * (fa**2 - both + fb**2) * delta**4
        + 6 * both * delta**2 * (fa * y.var + fb * x.var)
        + 4 * both * delta * (y.m3 - x.m3),
        fa * x.cov + fb * y.cov + both * lift,
    )
    return MomentsState(count, merged)


def moments_finish(state: MomentsState, *, ddof: int = 0) -> Moments:
    """Moments of all samples of the stream; ValueError for fewer than 2, or ddof of them, if known."""
    check_type("state", state, MomentsState)
    if np.ndim(state.count):
        raise ValueError(
            f"state.count={np.shape(state.count)} must be a scalar: jax.vmap moments_finish too"
        )
    known = not isinstance(state.count, Tracer)
    if known and state.count < 2:
        raise ValueError(
            f"the state holds {int(state.count)} samples; it must be at least 2: "
            "the variance of one is undefined"
        )
    check_count("ddof", ddof, 0, int(state.count) - 1 if known else None)
    return _corrected(state.moments, state.count, ddof)


def _corrected(m: Moments, samples, ddof: int) -> Moments:
    if not ddof:
        return m
    factor = samples / (samples - ddof)
    return m._replace(var=m.var * factor, cov=m.cov * factor)
