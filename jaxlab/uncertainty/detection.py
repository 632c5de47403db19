"""Detection by a score, such as out-of-distribution samples by uncertainty: AUROC, AUPR, FPR at a TPR.

Samples of one score enter together. Where there is no positive or no negative to count, the result is
NaN.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.uncertainty.checks import check_binary, check_number, check_scores


def auroc(score: Float[Array, "n"], positive: Int[Array, "n"]) -> Float[Array, ""]:
    """P(score of a positive > score of a negative), ties counting half; positive [N] is 0 or 1.

    ValueError for lengths that differ, other labels than 0 and 1, NaN scores. Source: Mann and
    Whitney, 1947.
    """
    positive, above, above_or_tied, dtype = _thresholds(score, positive)
    negatives = positive.shape[0] - jnp.sum(positive)
    higher = (above[1] + above_or_tied[1]).astype(dtype) / 2  # negatives, ties counting half
    wins = 1 - higher / negatives.astype(dtype)
    return jnp.sum(positive * wins) / jnp.sum(positive).astype(dtype)


def aupr(score: Float[Array, "n"], positive: Int[Array, "n"]) -> Float[Array, ""]:
    """Average precision: precision times the step of recall, summed over the distinct thresholds.

    ValueError as in `auroc`.
    """
    positive, _, (tp, fp), dtype = _thresholds(score, positive)
    precision = tp.astype(dtype) / (tp + fp).astype(dtype)
    return jnp.sum(positive * precision) / jnp.sum(positive).astype(dtype)


def fpr_at_tpr(
    score: Float[Array, "n"], positive: Int[Array, "n"], tpr: float = 0.95
) -> Float[Array, ""]:
    """False-positive rate at the highest threshold t whose true-positive rate (score >= t) is >= tpr.

    ValueError as in `auroc`, and for tpr outside (0, 1].
    """
    check_number("tpr", tpr, "above 0 and at most 1", lambda x: 0 < x <= 1)
    positive, _, (tp, fp), dtype = _thresholds(score, positive)
    n, positives = positive.shape[0], jnp.sum(positive)
    reached = tp.astype(dtype) / positives.astype(dtype) >= jnp.asarray(tpr, dtype)
    fewest = jnp.min(jnp.where(reached, fp, n)).astype(dtype)
    return jnp.where(positives > 0, fewest / (n - positives).astype(dtype), jnp.nan)


def _thresholds(score, positive):
    """Samples by falling score: (positive, counts of higher score, of at least this score, dtype).

    Both counts are (positives, negatives) [n].
    """
    score = check_scores(score)
    positive = check_binary("positive", positive, score.shape[0])
    order = jnp.argsort(-score, stable=True)
    score, positive = score[order], positive[order]
    new = score[1:] != score[:-1]
    place = jnp.arange(score.shape[0])
    first = jax.lax.cummax(jnp.where(jnp.append(True, new), place, 0))
    last = jax.lax.cummin(jnp.where(jnp.append(new, True), place, place[-1]), reverse=True)
    hits = jnp.stack([positive, 1 - positive])
    up_to = jnp.cumsum(hits, 1)
    return positive, (up_to - hits)[:, first], up_to[:, last], score.dtype
