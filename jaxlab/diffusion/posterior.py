"""Reverse posteriors, and the Psi-posteriors that mix them with a fresh corruption of the guess.

Every one is a mixture of three laws, so that only three weights a token are computed: the guess
p, the token z that is there, and the prior. Source: "The Diffusion Duality, Chapter II"
(arXiv 2602.21185), equations 11 and 12; note on Psi-samplers, sections 3 and 7.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.arguments import wide_type
from jaxlab.diffusion.arguments import (
    HOST,
    check_alphas,
    check_count,
    check_prior,
    check_range,
    floats,
    level_part,
    per_token,
    tokens,
)
from jaxlab.diffusion.forward import prior_probs

Weights = tuple[Float[Array, "*b"], Float[Array, "*b"], Float[Array, "*b"]]


class StepCoef(NamedTuple):
    """Numbers of a step from level t to the less noisy s; differences are fields of their own."""

    alpha_s: Float[Array, "*n"]
    alpha_t: Float[Array, "*n"]
    one_minus_alpha_s: Float[Array, "*n"]
    one_minus_alpha_t: Float[Array, "*n"]
    gap: Float[Array, "*n"]  # alpha_s - alpha_t
    kappa: Float[Array, "*n"]
    sigma: Float[Array, "*n"]  # what the network is told: -log alpha_t, or 0


def coef_of(alpha_s, alpha_t, kappa, dtype) -> StepCoef:
    """Coefficients in `dtype` from two levels; of host values differences are formed in float64."""
    check_alphas(alpha_s, alpha_t)
    check_range("kappa", kappa, 0, 1)
    s, t = level_part(alpha_s), level_part(alpha_t)
    parts = (s, t, 1 - s, 1 - t, s - t, kappa, 0.0)
    return StepCoef(*(jnp.asarray(x, dtype) for x in parts))


def _over(a, b, otherwise):
    """a / b, and `otherwise` where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), otherwise)


def uniform_weights(p_z: Float[Array, "*b"], c: StepCoef, K: int) -> Weights:
    """(W_x, W_z, W_u) of section 7.2; W_u spreads over all K tokens."""
    keep = K * c.alpha_t * p_z
    total = keep + c.one_minus_alpha_t
    stay, renewed = c.one_minus_alpha_s / c.alpha_s, (1 - c.kappa) * c.alpha_s
    guess = c.kappa * c.gap + renewed * c.one_minus_alpha_t
    same = c.kappa * (keep + c.alpha_t * stay) + renewed * keep
    noise = c.kappa * c.gap * stay
    # total = 0: a clean token that the guess excludes; it stays.
    return (
        _over(guess, total, 0.0),
        _over(same, total, c.kappa + renewed),
        _over(noise, total, 0.0) + (1 - c.kappa) * c.one_minus_alpha_s,
    )


def masked_weights(is_mask: Bool[Array, "*b"], c: StepCoef) -> Weights:
    """(W_x, W_z, W_m) of section 7.2."""
    renewed = (1 - c.kappa) * c.alpha_s
    guess = c.kappa * _over(c.gap, c.one_minus_alpha_t, 1.0) + renewed
    ratio = _over(c.kappa, c.one_minus_alpha_t, 0.0)
    masked = c.one_minus_alpha_s * (ratio + 1 - c.kappa)
    zero = jnp.zeros_like(guess)
    return (
        jnp.where(is_mask, guess, zero),
        jnp.where(is_mask, zero, c.kappa + renewed),
        jnp.where(is_mask, masked, (1 - c.kappa) * c.one_minus_alpha_s),
    )


def at(p: Float[Array, "*b v"], z: Int[Array, "*b"]) -> Float[Array, "*b"]:
    """p[..., z]."""
    return jnp.take_along_axis(p, z[..., None], -1)[..., 0]


def weights_of(p_z, z, c: StepCoef, prior: str, mask_id: int | None, K: int) -> Weights:
    """Weights of the guess, of z and of the prior, for either prior; p_z = p[z]."""
    return uniform_weights(p_z, c, K) if prior == "uniform" else masked_weights(z == mask_id, c)


def mixture(p, z, c: StepCoef, prior: str, mask_id: int | None) -> Float[Array, "*b v"]:
    """W_x p + W_z delta_z + W_u prior, for coefficients that broadcast against z."""
    vocab = p.shape[-1]
    w_x, w_z, w_u = (x[..., None] for x in weights_of(at(p, z), z, c, prior, mask_id, vocab))
    same = jnp.arange(vocab) == z[..., None]
    return w_x * p + jnp.where(same, w_z, 0) + w_u * prior_probs(prior, mask_id, vocab, p.dtype)


def _guess(p, z, prior, mask_id):
    p = floats("p", p)
    z = tokens("z", z, p.shape[:-1])
    check_prior(prior, mask_id, p.shape[-1])
    return p, z


def posterior_probs(
    p: Float[Array, "*b v"],
    z: Int[Array, "*b"],
    alpha_s: float | Float[Array, "#*b"],
    alpha_t: float | Float[Array, "#*b"],
    prior: str,
    mask_id: int | None = None,
) -> Float[Array, "*b v"]:
    """q(z_s | z_t = z) when the clean token has law `p`; alpha_s = 1 is the law of the clean token.

    Levels broadcast against z; with the masked prior p[..., mask_id] must be 0. float32 (float64 if
    p is). ValueError for alphas out of (0, 1] or alpha_s < alpha_t (host values), an unknown prior,
    shapes or a mask that do not fit; TypeError unless z holds integers.
    Source: note on Psi-samplers, section 3.
    """
    return psi_probs(p, z, alpha_s, alpha_t, 1.0, prior, mask_id)


def psi_probs(
    p: Float[Array, "*b v"],
    z: Int[Array, "*b"],
    alpha_s: float | Float[Array, "#*b"],
    alpha_t: float | Float[Array, "#*b"],
    kappa: float | Float[Array, "#*b"],
    prior: str,
    mask_id: int | None = None,
) -> Float[Array, "*b v"]:
    """kappa q_{s|t} + (1 - kappa) (alpha_s q_{0|t} + (1 - alpha_s) prior), given z and the guess `p`.

    As `posterior_probs`, which is kappa = 1; ValueError also for kappa out of [0, 1].
    Source: arXiv 2602.21185, equation 12.
    """
    p, z = _guess(p, z, prior, mask_id)
    return mixture(p, z, coef_of(alpha_s, alpha_t, kappa, p.dtype), prior, mask_id)


def psi_weights(
    p_z: Float[Array, "*b"],
    alpha_s: float | Float[Array, "#*b"],
    alpha_t: float | Float[Array, "#*b"],
    kappa: float | Float[Array, "#*b"],
    K: int,
) -> Weights:
    """(W_x, W_z, W_u): with the uniform prior Psi = W_x p + W_z delta_z + W_u / K; p_z = p[z].

    Shapes of p_z and levels broadcast. float32 (float64 if p_z is). ValueError as in `psi_probs`,
    and for K below 2. Source: note on Psi-samplers, section 7.2.
    """
    check_count("K", K, 2)
    dtype = wide_type(p_z)
    weights = uniform_weights(per_token(p_z, dtype), coef_of(alpha_s, alpha_t, kappa, dtype), K)
    w_x, w_z, w_u = jnp.broadcast_arrays(*weights)
    return w_x, w_z, w_u


def psi_weights_masked(
    is_mask: Bool[Array, "*b"],
    alpha_s: float | Float[Array, "#*b"],
    alpha_t: float | Float[Array, "#*b"],
    kappa: float | Float[Array, "#*b"],
) -> Weights:
    """(W_x, W_z, W_m): with the masked prior Psi = W_x p + W_z delta_z + W_m delta_mask.

    W_z is 0 where masked, W_x elsewhere. Floating type of the levels, at least float32. ValueError as
    in `psi_probs`. Source: note on Psi-samplers, section 7.2.
    """
    dtype = wide_type(alpha_s, alpha_t, kappa, 1.0)
    return masked_weights(jnp.asarray(is_mask, bool), coef_of(alpha_s, alpha_t, kappa, dtype))


def guided_probs(
    q_cond: Float[Array, "*b v"],
    q_uncond: Float[Array, "*b v"],
    weight: float | Float[Array, "#*b"],
) -> Float[Array, "*b v"]:
    """q_cond^weight q_uncond^(1 - weight), normalised: posteriors with class guidance.

    An entry that is 0 in either is 0; a row without others is all 0. `weight` broadcasts against the
    axes before the vocabulary. float32 (float64 if q_cond is). ValueError for different shapes.
    Source: note on Psi-samplers, section 7.8.
    """
    q_cond, q_uncond = floats("q_cond", q_cond), floats("q_uncond", q_uncond)
    if q_cond.shape != q_uncond.shape:
        raise ValueError(f"q_uncond has shape {q_uncond.shape}; expected {q_cond.shape}")
    weight = per_token(weight, q_cond.dtype, 1)
    both = (q_cond > 0) & (q_uncond > 0)
    log_cond, log_uncond = (jnp.log(jnp.where(both, q, 1)) for q in (q_cond, q_uncond))
    score = jnp.where(both, weight * log_cond + (1 - weight) * log_uncond, -jnp.inf)
    top = jnp.max(score, -1, keepdims=True)
    mass = jnp.exp(score - jnp.where(jnp.isfinite(top), jax.lax.stop_gradient(top), 0))
    return mass / jnp.where(jnp.isfinite(top), jnp.sum(mass, -1, keepdims=True), 1)


def remdm_sigma_to_kappa(
    sigma: float | Float[Array, "*b"], alpha_s: float | Float[Array, "*b"]
) -> Float[Array, "*b"]:
    """kappa of a ReMDM step with remasking probability `sigma`: 1 - sigma / (1 - alpha_s).

    Where alpha_s = 1 only sigma = 0 is possible, and kappa is 1. ValueError for host values with
    sigma out of [0, 1 - alpha_s]. Source: note on Psi-samplers, section 7.3.
    """
    dtype = wide_type(sigma, alpha_s, 1.0)
    check_range("alpha_s", alpha_s, 0, 1, open_low=True)
    check_range("sigma", sigma, 0, 1)
    rest = 1 - level_part(alpha_s)
    # A rounding of 1 - alpha_s that the caller made is no error.
    if isinstance(sigma, HOST) and isinstance(rest, HOST) and np.any(sigma > rest * (1 + 1e-6)):
        raise ValueError(f"sigma={sigma} must be at most 1 - alpha_s = {rest}")
    rest = jnp.asarray(rest, dtype)
    return 1 - _over(jnp.asarray(sigma, dtype), rest, 0.0)


def kappa_to_remdm_sigma(
    kappa: float | Float[Array, "*b"], alpha_s: float | Float[Array, "*b"]
) -> Float[Array, "*b"]:
    """Remasking probability of a masked Psi step as ReMDM has it: (1 - kappa) (1 - alpha_s).

    ValueError for host values with kappa out of [0, 1] or alpha_s out of (0, 1].
    Source: note on Psi-samplers, section 7.3.
    """
    dtype = wide_type(kappa, alpha_s, 1.0)
    check_range("kappa", kappa, 0, 1)
    check_range("alpha_s", alpha_s, 0, 1, open_low=True)
    return jnp.asarray((1 - level_part(kappa)) * (1 - level_part(alpha_s)), dtype)
