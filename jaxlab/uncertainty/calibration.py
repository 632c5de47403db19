"""Calibration of predictive probabilities: Brier score, reliability curve, expected calibration error."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.uncertainty.checks import as_probabilities, check_count, check_labels


class ReliabilityCurve(NamedTuple):
    """Bins of equal width of the largest probability; NaN in the first two where a bin is empty."""

    confidence: Float[Array, "m"]  # mean largest probability
    accuracy: Float[Array, "m"]
    count: Int[Array, "m"]


def brier(probs: Float[Array, "n k"], y: Int[Array, "n"]) -> Float[Array, ""]:
    """Mean of sum_k (p_k - 1{y = k})^2, from 0 to 2. Source: Brier, 1950.

    ValueError unless probs [N, K] are probabilities and y [N] labels of their classes.
    """
    probs, y = _predictions(probs, y)
    return jnp.mean(
        jnp.sum((probs - jax.nn.one_hot(y, probs.shape[-1], dtype=probs.dtype)) ** 2, -1)
    )


def reliability_curve(
    probs: Float[Array, "n k"], y: Int[Array, "n"], *, num_bins: int = 15
) -> ReliabilityCurve:
    """Confidence and accuracy of each bin (i / num_bins, (i + 1) / num_bins] of the largest probability.

    ValueError as in `brier`, and for num_bins below 1. Source: Guo et al., 1706.04599, section 2.
    """
    confidence, hits, count = _bins(probs, y, num_bins)
    mean = lambda x: jnp.where(count > 0, x / jnp.maximum(count, 1), jnp.nan)  # noqa: E731
    return ReliabilityCurve(mean(confidence), mean(hits), count)


def ece(probs: Float[Array, "n k"], y: Int[Array, "n"], *, num_bins: int = 15) -> Float[Array, ""]:
    """Expected calibration error: |accuracy - confidence| of the bins, weighed by their counts.

    Bins, ValueError and source as in `reliability_curve`.
    """
    confidence, hits, count = _bins(probs, y, num_bins)
    return jnp.sum(jnp.abs(hits - confidence)) / jnp.sum(count).astype(hits.dtype)


def _bins(probs, y, num_bins: int):
    """Sums of confidence and of hits, and counts, of each bin."""
    num_bins = check_count("num_bins", num_bins, 1)
    probs, y = _predictions(probs, y)
    confidence = jnp.max(probs, -1)
    hit = (jnp.argmax(probs, -1) == y).astype(probs.dtype)
    place = jnp.clip(jnp.ceil(confidence * num_bins).astype(jnp.int32) - 1, 0, num_bins - 1)
    add = lambda x: jax.ops.segment_sum(x, place, num_bins)  # noqa: E731
    return add(confidence), add(hit), add(jnp.ones_like(place))


def _predictions(probs, y) -> tuple[jax.Array, jax.Array]:
    probs = as_probabilities(probs, False, samples=False, name="probs")
    if probs.ndim != 2:
        raise ValueError(f"probs={probs.shape} must have the shape [samples, classes]")
    return probs, check_labels("y", y, probs.shape[-1], probs.shape[0])
