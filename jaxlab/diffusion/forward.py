"""The forward process: q_t(z | x) = alpha x + (1 - alpha) prior. Source: note, section 2."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxlab.diffusion.checks import check_prior, check_tokens, wide
from jaxlab.diffusion.schedules import Level


def q_probs(
    p: Float[Array, "*b v"], level: Level, prior: str, mask_id: int | None = None
) -> Float[Array, "*b v"]:
    """Distribution of the noisy token of clean tokens ~ p. ValueError for priors that cannot be."""
    check_prior(prior, mask_id, p.shape[-1])
    dtype = wide(p, level.alpha)
    alpha, rest = (jnp.asarray(x, dtype)[..., None] for x in level[:2])
    return alpha * p.astype(dtype) + rest * prior_probs(p.shape[-1], prior, mask_id, dtype)


def prior_probs(vocab: int, prior: str, mask_id: int | None, dtype) -> Float[Array, "v"]:
    """The distribution at time 1."""
    if prior == "uniform":
        return jnp.full(vocab, 1 / vocab, dtype)
    return jnp.zeros(vocab, dtype).at[mask_id].set(1)


def q_sample(
    key: Key[Array, ""],
    x0: Int[Array, "*b"],
    level: Level,
    prior: str,
    mask_id: int | None = None,
    K: int | None = None,
) -> Int[Array, "*b"]:
    """Noisy tokens of `x0`, each replaced with probability 1 - alpha; K is needed iff uniform.

    ValueError for priors that cannot be, TypeError for tokens that are not integers.
    """
    check_tokens(x0=x0)
    if (K is None) != (prior == "masked"):
        raise ValueError(f"K={K} must be given with prior='uniform' and only there, got {prior!r}")
    check_prior(prior, mask_id, (mask_id or 0) + 2 if K is None else K)
    change, noise = jax.random.split(key)
    u = jax.random.uniform(change, x0.shape, wide(level.one_minus_alpha))
    new = mask_id if K is None else jax.random.randint(noise, x0.shape, 0, K)
    return jnp.where(u < level.one_minus_alpha, new, x0).astype(jnp.int32)
