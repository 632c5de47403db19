"""Estimators of a Kullback-Leibler divergence from the tokens of a sample."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.arguments import check_choice, check_shape, wide
from jaxlab.rl.arguments import check_number
from jaxlab.rl.reduce import clip, stop

KL_KINDS = ("k1", "k2", "k3", "abs", "k1_st", "k3_st")


@jax.custom_jvp
def _k3(d):
    # exp(-d) - 1 + d as it stands loses all digits near 0; the series to d^13 loses none below 1/4.
    series = jnp.ones_like(d)
    for n in range(13, 2, -1):
        series = 1 - d / n * series
    return jnp.where(jnp.abs(d) < 0.25, d * d / 2 * series, jnp.expm1(-d) + d)


_k3.defjvp(lambda d, slope: (_k3(d[0]), -jnp.expm1(-d[0]) * slope[0]))


def _abs(d):
    return d * stop(
        jnp.sign(d)
    )  # jnp.abs has slope 1 at 0, where a policy that equals its reference is


_ESTIMATORS = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": _k3, "abs": _abs}


def check_kl(kind, clamp) -> None:
    """ValueError for an unknown estimator or a clamp that is no positive number or None."""
    check_choice("kl kind", kind, *KL_KINDS)
    if clamp is not None:
        check_number("clamp of the kl", clamp, 0, above=True)


def kl_tokens(
    logp: Float[Array, "*n"],
    logp_ref: Float[Array, "*n"],
    kind: str = "k3",
    clamp: float | None = None,
) -> Float[Array, "*n"]:
    """Estimate of KL(pi || reference) from each token; d = logp - logp_ref.

    "k1" d; "k2" d^2 / 2; "k3" exp(-d) - 1 + d, never negative and exact near 0; "abs" |d|; "k1_st" and
    "k3_st": the value of k1 and k3, the gradient of k2, which is that of the KL. `clamp` limits
    the value to [-clamp, clamp], without gradient where it does (that of k2 stays). Nothing else is
    clamped. ValueError for names, numbers and shapes. Source: Schulman, Approximating KL divergence, 2020.
    """
    check_kl(kind, clamp)
    check_shape("logp_ref", logp_ref, jnp.shape(logp))
    d = wide(logp) - stop(wide(logp_ref))
    estimate = _ESTIMATORS[kind.removesuffix("_st")]
    value = stop(estimate(d))
    limited = value if clamp is None else clip(value, -clamp, clamp)
    if kind.endswith("_st"):
        k2 = _ESTIMATORS["k2"](d)
        return limited + (k2 - stop(k2))
    if clamp is None:
        return estimate(d)
    moves = limited == value
    return jnp.where(moves, estimate(jnp.where(moves, d, 0)), limited)
