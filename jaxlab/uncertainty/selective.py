"""Selective prediction: samples are kept from the most certain one on, the rest is deferred.

A stable sort of the score orders the samples, so that ties stay in the order of the data. Cumulative
counts then hold every coverage. Sources: critical rates and AUSC, arXiv 2602.21160; AURC, E-AURC:
Geifman et al., 1805.08206; AUGRC: Traub et al., 2407.01032.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlab.arguments import check_choice
from jaxlab.uncertainty.checks import (
    Classes,
    among,
    check_binary,
    check_count,
    check_coverages,
    check_labels,
    check_number,
    check_scores,
    check_values,
    class_indices,
)

METRICS = ("critical_fnr", "critical_error", "error_rate")


class SelectiveCurve(NamedTuple):
    """The kept part at each coverage, each [coverages]. Rates over no sample at all are 0."""

    kept: Int[Array, "c"]
    accuracy: Float[Array, "c"]
    macro_f1: Float[Array, "c"]
    error_rate: Float[Array, "c"]
    critical_fnr: Float[
        Array, "c"
    ]  # of kept critical samples, those predicted as no critical class
    critical_error: Float[Array, "c"]  # of kept critical samples, those predicted as another class
    kept_critical: Int[Array, "c"]
    deferred_critical: Float[Array, "c"]  # of all critical samples, those not kept


def selective_curve(
    y: Int[Array, "n"],
    yhat: Int[Array, "n"],
    score: Float[Array, "n"],
    critical: Classes,
    coverages: tuple[float, ...],
    *,
    num_classes: int,
) -> SelectiveCurve:
    """Rates of the kept part at static coverages c in (0, 1]: the first max(1, ceil(c N)) samples.

    y true and yhat predicted labels, `score` higher for what is deferred first. macro_f1 is over the
    classes of the kept part, true or predicted. Read critical_fnr beside deferred_critical: it is 0
    where every critical sample is deferred.

    ValueError for lengths that differ, labels outside [0, num_classes), NaN scores, coverages outside
    (0, 1] and critical classes that are empty, repeated or out of range.
    """
    num_classes = check_count("num_classes", num_classes, 2)
    critical = class_indices("critical", critical, num_classes)
    y, yhat, score = _samples(y, yhat, score, num_classes)
    kept = kept_sizes(y.shape[0], coverages)
    counts = _critical_counts(y, yhat, critical)
    total = jnp.sum(among(critical, y))
    hot = lambda x: jax.nn.one_hot(x, num_classes, dtype=jnp.int32)  # noqa: E731
    counts |= {"true": hot(y), "predicted": hot(yhat), "hit": hot(y) * (y == yhat)[:, None]}
    at = _kept_counts(score, counts, kept)
    divide = lambda a, b: _share(a, b, score.dtype)  # noqa: E731
    support = at["true"] + at["predicted"]
    f1 = divide(2 * at["hit"], support)
    return SelectiveCurve(
        jnp.asarray(kept),
        divide(kept - at["error_rate"], kept),
        jnp.sum(f1, -1) / jnp.sum(support > 0, -1).astype(f1.dtype),
        divide(at["error_rate"], kept),
        divide(at["critical_fnr"], at["critical"]),
        divide(at["critical_error"], at["critical"]),
        at["critical"],
        divide(total - at["critical"], total),
    )


def ausc(
    y: Int[Array, "n"],
    yhat: Int[Array, "n"],
    score: Float[Array, "n"],
    critical: Classes,
    *,
    metric: str = "critical_fnr",
    low: float = 0.05,
    high: float = 1.0,
    num: int = 200,
) -> Float[Array, ""]:
    """Area under a rate of `selective_curve` over `num` coverages from low to high, by trapezoids.

    `metric` "critical_fnr", "critical_error" or "error_rate"; not divided by high - low. ValueError as
    in `selective_curve`, for an unknown metric, and unless 0 < low < high <= 1 and num >= 2.
    """
    check_choice("metric", metric, *METRICS)
    critical = class_indices("critical", critical)
    y, yhat, score = _samples(y, yhat, score, None)
    check_coverages("low and high", (low, high))
    if low >= high:
        raise ValueError(f"low={low} must be below high={high}")
    coverages = np.linspace(low, high, check_count("num", num, 2))
    kept = kept_sizes(y.shape[0], coverages)
    at = _kept_counts(score, _critical_counts(y, yhat, critical), kept)
    rate = _share(at[metric], kept if metric == "error_rate" else at["critical"], score.dtype)
    steps = np.diff(coverages)
    weights = (np.append(steps, 0) + np.append(0, steps)) / 2
    return jnp.sum(rate * jnp.asarray(weights, rate.dtype))


def aurc(
    score: Float[Array, "n"], error: Int[Array, "n"], *, kind: str = "trapezoid"
) -> Float[Array, ""]:
    """Area under the risk-coverage curve; error [N] is 0 or 1, r_k the errors of the first k over k.

    "mean": mean of r_k; "trapezoid": trapezoids of r_k over k / N, divided by 1 - 1/N.
    ValueError for lengths that differ, other errors than 0 and 1, NaN scores, an unknown kind, and one
    sample under "trapezoid".
    """
    check_choice("kind", kind, "trapezoid", "mean")
    _, risk = _risks(score, error)
    return jnp.mean(risk) if kind == "mean" else _trapezoids(risk)


def eaurc(score: Float[Array, "n"], error: Int[Array, "n"]) -> Float[Array, ""]:
    """`aurc` "mean" in excess of that of the best order, errors last. ValueError as there."""
    errors, risk = _risks(score, error)
    best = jnp.cumsum(jnp.sort(jnp.diff(errors, prepend=0)))
    return jnp.mean(_over_k(errors - best, risk.dtype))


def augrc(score: Float[Array, "n"], error: Int[Array, "n"]) -> Float[Array, ""]:
    """Area under the generalised risk r_k k / N over coverage k / N, by trapezoids, over 1 - 1/N.

    ValueError as in `aurc`.
    """
    errors, risk = _risks(score, error)
    return _trapezoids(errors.astype(risk.dtype) / errors.shape[0])


def coverage_at_risk(
    score: Float[Array, "n"], error: Int[Array, "n"], risk: float
) -> Float[Array, ""]:
    """Largest coverage k / N with r_k <= risk, NaN if there is none. ValueError as in `aurc`, for NaN."""
    check_number("risk", risk, "from 0 to 1", lambda x: 0 <= x <= 1)
    errors, found = _risks(score, error)
    k = jnp.arange(1, errors.shape[0] + 1)
    most = jnp.max(jnp.where(found <= jnp.asarray(risk, found.dtype), k, 0)).astype(found.dtype)
    return jnp.where(most > 0, most / errors.shape[0], jnp.nan)


def risk_at_coverage(
    score: Float[Array, "n"], error: Int[Array, "n"], coverage: float
) -> Float[Array, ""]:
    """r_k of the first k = max(1, ceil(coverage N)) samples; coverage static, in (0, 1].

    ValueError as in `aurc`, and for the coverage.
    """
    errors, risk = _risks(score, error)
    return risk[kept_sizes(errors.shape[0], (coverage,), "coverage")[0] - 1]


def bootstrap_indices(key: Key[Array, ""], num: int, n: int) -> Int[Array, "num n"]:
    """`num` resamples of n indices in [0, n), with replacement; int32. ValueError for sizes below 1."""
    num, n = check_count("num", num, 1), check_count("n", n, 1)
    return jax.random.randint(key, (num, n), 0, n, jnp.int32)


def bootstrap(indices: Int[Array, "num n"], fn: Callable, *arrays):
    """fn(*(a[i] for a in arrays)) for each row i of `indices`, stacked: one vmapped call.

    ValueError for indices that are not [num, n] or leave an array.
    """
    indices = jnp.asarray(indices)
    if indices.ndim != 2 or not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices={indices.shape} {indices.dtype} must be integers [num, n]")
    arrays = tuple(jnp.asarray(a) for a in arrays)
    for a in arrays:
        if not a.ndim:
            raise ValueError("arrays must have samples on their first axis; one is a scalar")
        good = (indices >= 0) & (indices < a.shape[0])
        check_values(good, f"indices must be at least 0 and below the length {a.shape[0]}", indices)
    return jax.vmap(lambda i: fn(*(a[i] for a in arrays)))(indices)


def kept_sizes(n: int, coverages, name: str = "coverages") -> np.ndarray:
    """max(1, ceil(c n - 1e-9)) in float64 on the host: in float32 c n may round up past an integer."""
    values = check_coverages(name, coverages)
    return np.maximum(1, np.ceil(values * n - 1e-9)).astype(np.int32)


def _samples(y, yhat, score, num_classes):
    y = check_labels("y", y, num_classes)
    yhat = check_labels("yhat", yhat, num_classes, y.shape[0])
    return y, yhat, check_scores(score, y.shape[0])


def _critical_counts(y, yhat, critical: Classes) -> dict[str, jax.Array]:
    wrong, is_critical = y != yhat, among(critical, y)
    return {
        "error_rate": wrong,
        "critical": is_critical,
        "critical_fnr": is_critical & ~among(critical, yhat),
        "critical_error": is_critical & wrong,
    }


def _kept_counts(score, counts: dict[str, jax.Array], kept: np.ndarray) -> dict[str, jax.Array]:
    """Sums of each of `counts` over the first `kept` samples."""
    order = jnp.argsort(score, stable=True)
    return {name: jnp.cumsum(x[order].astype(jnp.int32), 0)[kept - 1] for name, x in counts.items()}


def _share(a, b, dtype) -> jax.Array:
    """a / b of counts, 0 where b is 0."""
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    return a / jnp.maximum(b, 1)


def _risks(score, error) -> tuple[jax.Array, jax.Array]:
    """(cumulative errors in the order of the score, r_k)."""
    score = check_scores(score)
    error = check_binary("error", error, score.shape[0])
    errors = jnp.cumsum(error[jnp.argsort(score, stable=True)])
    return errors, _over_k(errors, score.dtype)


def _over_k(errors, dtype) -> jax.Array:
    return errors.astype(dtype) / jnp.arange(1, errors.shape[0] + 1).astype(dtype)


def _trapezoids(values: jax.Array) -> jax.Array:
    """Trapezoids over k / N, divided by 1 - 1/N: the mean of the N - 1 midpoints."""
    if values.shape[0] < 2:
        raise ValueError("score=(1,) must hold at least 2 samples for an area by trapezoids")
    return jnp.mean((values[1:] + values[:-1]) / 2)
