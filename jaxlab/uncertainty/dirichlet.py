"""Per-class uncertainty of a Dirichlet posterior in closed form."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.uncertainty.checks import check_values, real
from jaxlab.uncertainty.safe import HIGHEST, curvature

SHIFT = 10  # arguments of the asymptotic series are at least this
# B_2n / 2n of psi(x + 1) = log x + 1 / (2x) - sum B_2n / (2n x^2n).
BERNOULLI = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12)


class DirichletUncertainty(NamedTuple):
    """What the functions of samples converge to."""

    mean: Float[Array, "*b k"]
    var: Float[Array, "*b k"]
    contribution: Float[Array, "*b k"]  # C
    exact: Float[Array, "*b k"]  # D
    rho: Float[Array, "*b k"]
    cbec: Float[Array, "*b k k"]  # the pair terms, zero on the diagonal


def dirichlet_uncertainty(alpha: Float[Array, "*b k"]) -> DirichletUncertainty:
    """Moments, C, D, rho and pair terms of Dirichlet(alpha), alpha [..., K]; Beta(a, b) is (a, b).

    sum C = (K - 1) / (2 (sum alpha + 1)) whatever the mean. ValueError unless alpha is positive and
    finite with at least 2 classes.
    """
    alpha = real("alpha", alpha)
    if alpha.ndim < 1 or alpha.shape[-1] < 2:
        raise ValueError(f"alpha={alpha.shape} must have at least 2 classes in its last axis")
    check_values((alpha > 0) & (alpha < jnp.inf), "alpha must be positive and finite", alpha)
    k = alpha.shape[-1]
    total = jnp.sum(alpha, -1, keepdims=True)
    # Not total - alpha, which cancels when one class has nearly all.
    others = jnp.matmul(alpha, 1 - jnp.eye(k, dtype=alpha.dtype), precision=HIGHEST)
    mean, rest = alpha / total, others / total
    root = jnp.sqrt(mean)
    pairs = root[..., :, None] * root[..., None, :] / (2 * (total[..., None] + 1))
    return DirichletUncertainty(
        mean,
        mean * rest / (total + 1),
        rest / (2 * (total + 1)),
        mean * _gap(alpha, others),
        2 * jnp.abs(others - alpha) / (3 * alpha * (total + 2)),
        pairs * (1 - jnp.eye(k, dtype=alpha.dtype)),
    )


def _gap(a: jax.Array, delta: jax.Array) -> jax.Array:
    """h(a) - h(a + delta) of h(x) = psi(x + 1) - log x, as a sum without cancellation.

    Both steps up to a large argument and what is left there are differences in closed form.
    """
    at, step = a[..., None] + jnp.arange(SHIFT, dtype=a.dtype), delta[..., None]
    above = at + step
    # h(at) - h(at + 1) = log(1 + 1 / at) - 1 / (at + 1): its difference is of two terms above 0.
    x = step / (at * (above + 1))
    bend = curvature(x) * x * (x / (1 + x)) / 2
    steps = jnp.sum(bend + step / ((at + 1) * above * (above + 1)), -1)
    y, z = a + SHIFT, a + delta + SHIFT
    q, r = 1 / (y * y), 1 / (z * z)
    series = slope = jnp.zeros_like(a)
    for b in reversed(BERNOULLI):  # sum b_n (q^n - r^n) = (q - r) slope
        slope = q * slope + series + b
        series = (series + b) * r
    return delta / (2 * y * z) + steps - delta * (y + z) * q * r * slope
