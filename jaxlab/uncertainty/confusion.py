"""Which classes trade probability between samples: Fisher covariance and cross-boundary confusion.

With C = var / (2 mu) and Pearson's r over samples, sqrt(C_i C_j) max(0, -r_ij) is
max(0, -cov_ij) / (2 sqrt(mu_i mu_j)). Source: arXiv 2602.21160 (CBEC); the identity is derived here.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.arguments import check_choice
from jaxlab.uncertainty.checks import (
    Classes,
    as_probabilities,
    check_eps,
    check_values,
    class_groups,
    real,
)
from jaxlab.uncertainty.safe import HIGHEST, Centered, center, ratio, root

FORMS = ("fisher", "reference")


def fisher_covariance(
    p: Float[Array, "s *b k"], *, from_logits: bool = False
) -> Float[Array, "*b k k"]:
    """cov_ij / sqrt(mu_i mu_j) [..., K, K] of p [S, ..., K]: half its diagonal is C, its kernel sqrt(mu).

    ValueError for p as in `moments`.
    """
    return _products(_fisher(center(as_probabilities(p, from_logits))))


def _fisher(c: Centered) -> jax.Array:
    return ratio(c.dev, root(c.mean))


def _products(x: jax.Array, y: jax.Array | None = None) -> jax.Array:
    y = x if y is None else y
    return jnp.einsum("s...i,s...j->...ij", x, y, precision=HIGHEST) / x.shape[0]


def pair_terms(
    c: Centered, rows: Classes, columns: Classes, form: str = "fisher", eps: float | jax.Array = 0.0
) -> jax.Array:
    """sqrt(C_i C_j) max(0, -r_ij) for i of `rows` and j of `columns`, [..., rows, columns]."""
    i, j = jnp.asarray(rows), jnp.asarray(columns)
    if form == "fisher":
        x = _fisher(c)
        return jax.nn.relu(-_products(x[..., i], x[..., j])) / 2
    var = jnp.mean(c.dev**2, 0)
    deviation, share = root(var + eps), ratio(var, 2 * c.mean)
    outer = lambda x: x[..., i][..., :, None] * x[..., j][..., None, :]  # noqa: E731
    r = ratio(_products(c.dev[..., i], c.dev[..., j]), outer(deviation) + eps)
    return root(outer(share) + eps) * jax.nn.relu(-r)


def cbec(
    p: Float[Array, "s *b k"],
    safe: Classes,
    critical: Classes,
    *,
    weights: Float[Array, "i j"] | None = None,
    form: str = "fisher",
    eps: float = 1e-10,
    from_logits: bool = False,
) -> Float[Array, "*b"]:
    """Cross-boundary epistemic confusion [...]: pair terms of safe with critical classes, summed.

    `weights` [safe, critical] weigh the pairs. `form` "reference" is the authors' code, with eps added
    to variances, to products of deviations and to products of C; "fisher" needs no eps.

    ValueError for p as in `moments`, groups that are empty, overlap or hold no class of p, weights of
    another shape or not finite, an unknown form, eps < 0.
    """
    check_choice("form", form, *FORMS)
    p = as_probabilities(p, from_logits)
    added = check_eps(eps, p.dtype)
    safe, critical = class_groups(safe, critical, p.shape[-1])
    terms = pair_terms(center(p), safe, critical, form, added)
    if weights is None:
        return jnp.sum(terms, (-2, -1))
    weights = real("weights", weights)
    check_values(jnp.isfinite(weights), "weights must be finite", weights)
    if weights.shape != (len(safe), len(critical)):
        want = (len(safe), len(critical))
        raise ValueError(f"weights={weights.shape} must be {want}: a number for safe x critical")
    return jnp.sum(terms * weights.astype(p.dtype), (-2, -1))


def epistemic_confusion_matrix(
    p: Float[Array, "s *b k"],
    *,
    form: str = "fisher",
    eps: float = 1e-10,
    from_logits: bool = False,
) -> Float[Array, "k k"]:
    """Mean of the pair terms of `cbec` over all batch axes [K, K], zero on the diagonal.

    ValueError as in `cbec`, and for a batch of nothing.
    """
    check_choice("form", form, *FORMS)
    p = as_probabilities(p, from_logits)
    added = check_eps(eps, p.dtype)
    if not p.size:
        raise ValueError(f"p={p.shape} must hold at least 1 distribution: the mean is over them")
    classes = tuple(range(p.shape[-1]))
    terms = pair_terms(center(p), classes, classes, form, added)
    return jnp.mean(terms, tuple(range(terms.ndim - 2))) * (
        1 - jnp.eye(len(classes), dtype=p.dtype)
    )
