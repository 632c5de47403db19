"""Thresholds with a finite-sample guarantee: conformal risk control.

Keeping only what scores below t costs sum(loss where score < t) / n, which grows with t. Exchangeable
with the calibration samples, a new sample costs at most alpha in expectation under the largest t with
(sum + bound) / (n + 1) <= alpha. Source: Angelopoulos et al., 2208.02814, theorem 1.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.uncertainty.checks import (
    Classes,
    among,
    check_labels,
    check_number,
    check_scores,
    check_values,
    class_indices,
)


def conformal_threshold(
    score: Float[Array, "n"],
    loss: Float[Array, "n"],
    alpha: float,
    *,
    bound: float = 1.0,
    include: Bool[Array, "n"] | None = None,
) -> Float[Array, ""]:
    """Largest t such that keeping samples with score < t has an expected loss of at most alpha.

    `loss` [N] from 0 to `bound` is what a calibration sample costs if it is kept; deferred, it costs
    nothing. The guarantee is about samples like those of `include` (None: all). inf: keep everything;
    -inf: defer everything, as alpha (n + 1) < bound asks for.

    ValueError for lengths that differ, NaN, losses outside [0, bound], alpha outside (0, 1] times
    bound, bound <= 0.
    """
    check_number("bound", bound, "above 0", lambda x: 0 < x < float("inf"))
    check_number("alpha", alpha, f"above 0 and at most bound={bound}", lambda x: 0 < x <= bound)
    score = check_scores(score)
    loss = check_scores(loss, score.shape[0], "loss").astype(score.dtype)
    check_values((loss >= 0) & (loss <= bound), f"loss must be from 0 to bound={bound}", loss)
    taken = jnp.ones(score.shape, bool) if include is None else jnp.asarray(include, bool)
    if taken.shape != score.shape:
        raise ValueError(f"include={taken.shape} must have the shape {score.shape} of score")
    order = jnp.argsort(score, stable=True)
    spent = jnp.cumsum(jnp.where(taken, loss, 0)[order])
    n = jnp.sum(taken).astype(score.dtype)
    most, worst = (jnp.asarray(x, score.dtype) for x in (alpha, bound))
    # alpha (n + 1) is rounded: without slack 0.1 * 20 may fail to pay for 2.
    budget = most * (n + 1) * (1 + 4 * jnp.finfo(score.dtype).eps) - worst
    # Spending grows with the order, so the first score over budget is the least one that is deferred;
    # scores that tie with it are deferred too.
    over = jnp.min(jnp.where(spent > budget, score[order], jnp.inf))
    return jnp.where(budget < 0, -jnp.inf, over)


def critical_fnr_threshold(
    y: Int[Array, "n"],
    yhat: Int[Array, "n"],
    score: Float[Array, "n"],
    critical: Classes,
    alpha: float,
) -> Float[Array, ""]:
    """Threshold t under which P(kept and predicted as no critical class | critical) <= alpha.

    A sample is kept if its score is below t. Calibrated on the critical samples among y [N]; unlike
    the rate of `selective_curve`, the one controlled here is over all critical samples, kept or not,
    and so grows with t. -inf, inf and ValueError as in `conformal_threshold` and `selective_curve`.
    """
    critical = class_indices("critical", critical)
    y = check_labels("y", y, None)
    yhat = check_labels("yhat", yhat, None, y.shape[0])
    missed = among(critical, y) & ~among(critical, yhat)
    score = check_scores(score, y.shape[0])
    return conformal_threshold(score, missed, alpha, include=among(critical, y))
