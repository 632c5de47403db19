"""Epistemic uncertainty of each class: D_k, whose sum is mutual information, and its approximations.

D_k = E[p_k log p_k] - mu_k log mu_k; C_k = var_k / (2 mu_k), its second order in p_k - mu_k.
Source: arXiv 2602.21160 (C_k, the skewness ratio); D_k and the bounds are derived here.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlab.arguments import check_choice
from jaxlab.uncertainty.checks import (
    as_probabilities,
    check_count,
    check_eps,
    check_number,
    check_type,
    real,
)
from jaxlab.uncertainty.moments import Moments
from jaxlab.uncertainty.safe import center, curvature, jensen_gap, ratio

TAYLOR = ("taylor2", "taylor3", "taylor4")


def contributions(
    p: Float[Array, "s *b k"],
    method: str = "taylor2",
    *,
    eps: float = 0.0,
    ddof: int = 0,
    from_logits: bool = False,
) -> Float[Array, "*b k"]:
    """What each class contributes to the mutual information of p [S, ..., K], in nats.

    "taylor2": C = var / (2 (mu + eps)), the paper's; "taylor3": less m3 / (6 (mu + eps)^2), which is
    hugely negative for rare classes and no score; "taylor4": plus m4 / (12 (mu + eps)^3); "exact":
    D, which needs neither eps nor ddof. ddof=1 removes the bias (S - 1) / S of C.

    ValueError for p as in `moments`, an unknown method, eps < 0 and ddof outside [0, S).
    """
    check_choice("method", method, *TAYLOR, "exact")
    p = as_probabilities(p, from_logits)
    added = check_eps(eps, p.dtype)
    check_count("ddof", ddof, 0, p.shape[0] - 1)
    centered = center(p)
    if method == "exact":
        return jensen_gap(*centered)
    _, mean, dev = centered
    # Powers of dev / mu instead of quotients of powers: those of small numbers underflow.
    scaled = ratio(dev, mean + added)
    parts = [jnp.mean(dev * scaled**n, 0) for n in range(1, TAYLOR.index(method) + 2)]
    return _series([parts[0] * (p.shape[0] / (p.shape[0] - ddof)), *parts[1:]])


def contributions_from_moments(
    m: Moments, method: str = "taylor2", *, eps: float = 0.0
) -> Float[Array, "*b k"]:
    """The Taylor forms of `contributions` from moments [..., K]; ValueError as there."""
    check_choice("method", method, *TAYLOR)
    check_type("m", m, Moments)
    order = TAYLOR.index(method) + 1
    mean = real("m.mean", m.mean)
    below = mean + check_eps(eps, mean.dtype)
    parts = []
    for n, part in enumerate((m.var, m.m3, m.m4)[:order], 1):
        for _ in range(n):
            part = ratio(part, below)
        parts.append(part)
    return _series(parts)


def _series(parts: list[Array]) -> Array:
    """m_n / mu^(n - 1), n = 2, 3, 4, each by (-1)^n / (n (n - 1))."""
    return sum(x * c for x, c in zip(parts, (1 / 2, -1 / 6, 1 / 12), strict=False))  # type: ignore


def contribution_bounds(
    p: Float[Array, "s *b k"], *, from_logits: bool = False
) -> tuple[Float[Array, "*b k"], Float[Array, "*b k"]]:
    """(lower, upper) bounds [..., K] of the exact D: g(t) C and 2 C, t = max p / mu over samples.

    g(t) = 2 phi(t) / (t - 1)^2, phi(t) = t log t - t + 1, falls from 2 at 0 over 1 at 1 to 0.
    ValueError for p as in `moments`.
    """
    _, mean, dev = center(as_probabilities(p, from_logits))
    u = ratio(dev, mean)
    twice = jnp.mean(dev * u, 0)
    return curvature(jnp.max(u, 0)) * twice / 2, twice


def mutual_information(
    p: Float[Array, "s *b k"], *, from_logits: bool = False
) -> Float[Array, "*b"]:
    """Mutual information of label and posterior, H(mu) - E[H(p)] as the sum of D, in nats [...].

    ValueError for p as in `moments`.
    """
    return jnp.sum(contributions(p, "exact", from_logits=from_logits), -1)


def signed_skewness_ratio(
    mu: Float[Array, "*b k"],
    var: Float[Array, "*b k"],
    m3: Float[Array, "*b k"],
    *,
    eps: float = 0.0,
) -> Float[Array, "*b k"]:
    """m3 / (3 (mu + eps)(var + eps)): third order over second order of D, 0 where var is 0.

    ValueError for eps < 0 and shapes that do not broadcast.
    """
    mu, var, m3 = real("mu", mu), real("var", var), real("m3", m3)
    added = check_eps(eps, jnp.result_type(mu, var, m3))
    try:
        jnp.broadcast_shapes(mu.shape, var.shape, m3.shape)
    except ValueError:
        raise ValueError(
            f"mu={mu.shape}, var={var.shape}, m3={m3.shape} must be of one shape"
        ) from None
    return ratio(ratio(m3, var + added), 3 * (mu + added))


def skewness_ratio(
    mu: Float[Array, "*b k"],
    var: Float[Array, "*b k"],
    m3: Float[Array, "*b k"],
    *,
    eps: float = 0.0,
) -> Float[Array, "*b k"]:
    """rho = |m3| / (3 (mu + eps)(var + eps)), the paper's diagnostic: C is reliable far below 1.

    ValueError for eps < 0.
    """
    return jnp.abs(signed_skewness_ratio(mu, var, m3, eps=eps))


def reliable_mask(rho: Float[Array, "*b k"], threshold: float = 0.3) -> Bool[Array, "*b k"]:
    """Where rho < threshold: C may be read as D. 0.3 is the paper's. ValueError for a negative threshold."""
    check_number("threshold", threshold, "at least 0", lambda x: x >= 0)
    rho = real("rho", rho)
    return rho < jnp.asarray(threshold, rho.dtype)
