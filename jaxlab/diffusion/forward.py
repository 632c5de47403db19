"""The forward process: tokens are kept with probability alpha, else drawn from the prior.

Source: Sahoo et al., 2025 (arXiv 2506.10892), section 2; note on Psi-samplers, section 2.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxlab.arguments import check_choice, wide
from jaxlab.diffusion.arguments import (
    PRIORS,
    check_count,
    check_mask_id,
    check_prior,
    check_range,
    floats,
    per_token,
    tokens,
)
from jaxlab.diffusion.schedules import Level


def prior_probs(prior: str, mask_id: int | None, vocab: int, dtype) -> Float[Array, "v"]:
    """The prior as a distribution over the vocabulary: uniform, or all on the mask."""
    if prior == "uniform":
        return jnp.full((vocab,), 1 / vocab, dtype)
    return (jnp.arange(vocab) == mask_id).astype(dtype)


def prior_draw(key, shape: tuple[int, ...], mask_id: int | None, vocab: int) -> Int[Array, "*b"]:
    """Tokens of the prior: the mask, or any token where there is none."""
    if mask_id is not None:
        return jnp.full(shape, mask_id, jnp.int32)
    return jax.random.randint(key, shape, 0, vocab, jnp.int32)


def q_probs(
    p: Float[Array, "*b v"], level: Level, prior: str, mask_id: int | None = None
) -> Float[Array, "*b v"]:
    """alpha p + (1 - alpha) prior, the law of a noisy token whose clean one has law `p`.

    Fields of `level` broadcast against the axes before the vocabulary. float32 (float64 if p is).
    ValueError for an unknown prior, a mask that does not fit, alpha out of [0, 1].
    """
    p = floats("p", p)
    check_prior(prior, mask_id, p.shape[-1])
    check_range("level.alpha", level.alpha, 0, 1)
    alpha, rest = (per_token(x, p.dtype, 1) for x in (level.alpha, level.one_minus_alpha))
    return alpha * p + rest * prior_probs(prior, mask_id, p.shape[-1], p.dtype)


def q_sample(
    key: Key[Array, ""],
    x0: Int[Array, "*b"],
    level: Level,
    prior: str,
    mask_id: int | None = None,
    K: int | None = None,
) -> Int[Array, "*b"]:
    """Noisy tokens int32: each of `x0` replaced by a draw of the prior with probability 1 - alpha.

    `K` clean categories, required with the uniform prior, whose draw may be the old token. Fields
    of `level` broadcast against x0. TypeError unless x0 holds integers; ValueError as in `q_probs`.
    """
    x0 = tokens("x0", x0)
    check_choice("prior", prior, *PRIORS)
    if prior == "masked":
        # Without K the size of the vocabulary is not known: any token may be the mask.
        check_mask_id(mask_id, None if K is None else K + 1)
    elif K is None:
        raise ValueError("K=None must be the number of categories with prior='uniform'")
    else:
        check_count("K", K, 2)
        check_prior(prior, mask_id, K)
    check_range("level.alpha", level.alpha, 0, 1)
    which, draw = jax.random.split(key)
    rest = wide(level.one_minus_alpha)
    replaced = jax.random.uniform(which, x0.shape, rest.dtype) < rest
    noise = prior_draw(draw, x0.shape, mask_id, K or 0)
    return jnp.where(replaced, noise, x0)
