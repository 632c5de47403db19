"""Variational posterior of a weight matrix of low rank: W = A B^T, A and B Gaussian, all independent.

Source: the variational networks of arXiv 2602.21160. The loss is cross-entropy per sample plus
kl / (number of training samples), the latter brought in linearly over the first epochs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxlab.uncertainty.checks import check_count, check_number


class LowRankPosterior(NamedTuple):
    """Means of both factors, and their deviations as softplus(rho): what is trained."""

    a_mean: Float[Array, "d r"]
    a_rho: Float[Array, "d r"]
    b_mean: Float[Array, "e r"]
    b_rho: Float[Array, "e r"]


def lowrank_vi_init(
    key: Key[Array, ""], d_in: int, d_out: int, rank: int, *, std: float = 0.05, dtype=jnp.float32
) -> LowRankPosterior:
    """A posterior of deviation `std` about random factors, with weights of variance 2 / d_in (He).

    ValueError for sizes and ranks below 1 and std <= 0.
    """
    for name, size in {"d_in": d_in, "d_out": d_out, "rank": rank}.items():
        check_count(name, size, 1)
    check_number("std", std, "finite and above 0", lambda x: 0 < x < float("inf"))
    scale = (2 / (d_in * rank)) ** 0.25
    a, b = jax.random.split(key)
    rho = jnp.log(jnp.expm1(jnp.asarray(std, dtype)))
    a_mean, b_mean = (
        scale * jax.random.normal(k, (size, rank), dtype) for k, size in ((a, d_in), (b, d_out))
    )
    return LowRankPosterior(a_mean, jnp.full_like(a_mean, rho), b_mean, jnp.full_like(b_mean, rho))


def lowrank_vi_sample(key: Key[Array, ""], post: LowRankPosterior) -> Float[Array, "d e"]:
    """One draw of W = A B^T [d_in, d_out], differentiable in the posterior."""

    def draw(key, mean, rho):
        return mean + jax.nn.softplus(rho) * jax.random.normal(key, mean.shape, mean.dtype)

    a, b = jax.random.split(key)
    return draw(a, post.a_mean, post.a_rho) @ draw(b, post.b_mean, post.b_rho).T


def lowrank_vi_kl(post: LowRankPosterior, *, prior_std: float = 1.0) -> Float[Array, ""]:
    """KL in nats from the posterior of the factors to N(0, prior_std^2); ValueError for prior_std <= 0."""
    check_number("prior_std", prior_std, "finite and above 0", lambda x: 0 < x < float("inf"))
    prior = jnp.asarray(prior_std, post.a_mean.dtype)

    def kl(mean, rho):
        std = jax.nn.softplus(rho) / prior
        return jnp.sum((std**2 + (mean / prior) ** 2 - 1) / 2 - jnp.log(std))

    return kl(post.a_mean, post.a_rho) + kl(post.b_mean, post.b_rho)
