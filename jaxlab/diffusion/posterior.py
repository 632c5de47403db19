"""Posteriors q_{s|t} and Psi_{s|t} of a step from time t to s, in their mixture form.

Psi = kappa q_{s|t} + (1 - kappa) [alpha_s q_{0|t} + (1 - alpha_s) prior] is a mixture of the clean
distribution p, the token z and noise; its weights need nothing of the size of the vocabulary.
Source: Duo++ 2602.21185, equations 11 and 12; note on Psi-samplers, sections 3 and 7.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxlab.diffusion.checks import (
    check_levels,
    check_prior,
    check_range,
    check_tokens,
    known,
    wide,
)


class StepCoef(NamedTuple):
    """What a step from t to s needs; differences are fields, for they cancel in float32."""

    alpha_t: Any
    noise_t: Any  # 1 - alpha_t
    alpha_s: Any
    noise_s: Any  # 1 - alpha_s
    gain: Any  # alpha_s - alpha_t
    kappa: Any
    sigma: Any  # what the network is told of t


def coefficients(alpha_s, alpha_t, kappa, dtype) -> StepCoef:
    """The coefficients of alphas and kappa of type `dtype`; checked where they are known."""
    check_levels(alpha_s, alpha_t, kappa)
    s, t, kappa = (jnp.asarray(x, dtype) for x in (alpha_s, alpha_t, kappa))
    return StepCoef(t, 1 - t, s, 1 - s, s - t, kappa, -jnp.log(t))


def uniform_weights(p_z, c: StepCoef, K: int):
    """(W_x, W_z, W_u) of section 7.2; where nothing is possible, z stays."""
    own = K * c.alpha_t * p_z
    evidence = own + c.noise_t
    some = evidence > 0
    evidence = jnp.where(some, evidence, 1)
    back = (1 - c.kappa) * c.alpha_s
    to_x = (c.kappa * c.gain + back * c.noise_t) / evidence
    stay = (c.kappa * (own + c.alpha_t / c.alpha_s * c.noise_s) + back * own) / evidence
    noise = c.noise_s * (c.kappa * c.gain / c.alpha_s / evidence + 1 - c.kappa)
    return jnp.where(some, to_x, 0), jnp.where(some, stay, 1), jnp.where(some, noise, 0)


def masked_weights(is_mask, c: StepCoef):
    """(W_x, W_z, W_m) of section 7.2."""
    some = c.noise_t > 0
    rest = jnp.where(some, c.noise_t, 1)
    to_x = c.kappa * jnp.where(some, c.gain / rest, 1) + (1 - c.kappa) * c.alpha_s
    hidden = c.noise_s * (c.kappa * jnp.where(some, 1 / rest, 0) + 1 - c.kappa)
    stay = c.kappa + (1 - c.kappa) * c.alpha_s
    again = (1 - c.kappa) * c.noise_s
    return (
        jnp.where(is_mask, to_x, 0),
        jnp.where(is_mask, 0, stay),
        jnp.where(is_mask, hidden, again),
    )


def mixture(p, z, c: StepCoef, prior: str, mask_id: int | None) -> Float[Array, "*b v"]:
    """Psi as probabilities, of the clean distribution p and the token z."""
    here = jax.nn.one_hot(z, p.shape[-1], dtype=p.dtype)
    if prior == "masked":
        to_x, stay, noise = masked_weights(z == mask_id, c)
        spread = jax.nn.one_hot(mask_id, p.shape[-1], dtype=p.dtype)
    else:
        p_z = jnp.take_along_axis(p, z[..., None], -1)[..., 0]
        to_x, stay, noise = uniform_weights(p_z, c, p.shape[-1])
        spread = 1 / p.shape[-1]
    return to_x[..., None] * p + stay[..., None] * here + noise[..., None] * spread


def posterior_probs(
    p: Float[Array, "*b v"],
    z: Int[Array, "*b"],
    alpha_s: Any,
    alpha_t: Any,
    prior: str,
    mask_id: int | None = None,
) -> Float[Array, "*b v"]:
    """q_{s|t}(. | z) with `p` for the clean token; alpha_s = 1 gives q_{0|t}. Errors of `psi_probs`."""
    return psi_probs(p, z, alpha_s, alpha_t, 1.0, prior, mask_id)


def psi_probs(
    p: Float[Array, "*b v"],
    z: Int[Array, "*b"],
    alpha_s: Any,
    alpha_t: Any,
    kappa: Any,
    prior: str,
    mask_id: int | None = None,
) -> Float[Array, "*b v"]:
    """Psi_{s|t}(. | z) with `p` for the clean token; kappa 1 is the posterior, 0 the corrector.

    Alphas and kappa broadcast against z. ValueError for shapes or, where they are known, levels that
    cannot be; TypeError for tokens that are not integers.
    """
    p, z = jnp.asarray(p), jnp.asarray(z)
    check_tokens(z=z)
    check_prior(prior, mask_id, p.shape[-1])
    try:
        shape = np.broadcast_shapes(p.shape[:-1], z.shape)
    except ValueError:
        raise ValueError(f"p {p.shape} must be z {z.shape} with the vocabulary behind") from None
    dtype = wide(p, alpha_s, alpha_t, kappa)
    p = jnp.broadcast_to(p.astype(dtype), (*shape, p.shape[-1]))
    c = coefficients(alpha_s, alpha_t, kappa, dtype)
    return mixture(p, jnp.broadcast_to(z, shape), c, prior, mask_id)


def psi_weights(p_z: Float[Array, "*b"], alpha_s: Any, alpha_t: Any, kappa: Any, K: int):
    """(W_x, W_z, W_u), each [*b]: with uniform noise Psi = W_x p + W_z delta_z + W_u / K.

    `p_z` is p at the noisy token. ValueError for K < 2 and for levels that cannot be, where known.
    """
    check_prior("uniform", None, K)
    dtype = wide(p_z, alpha_s, alpha_t, kappa)
    c = coefficients(alpha_s, alpha_t, kappa, dtype)
    return uniform_weights(jnp.asarray(p_z, dtype), c, K)


def psi_weights_masked(is_mask: Bool[Array, "*b"], alpha_s: Any, alpha_t: Any, kappa: Any):
    """(W_x, W_z, W_m), each [*b]: with a mask Psi = W_x p + W_z delta_z + W_m delta_mask."""
    c = coefficients(alpha_s, alpha_t, kappa, wide(alpha_s, alpha_t, kappa))
    return masked_weights(jnp.asarray(is_mask), c)


def guided_probs(
    q_cond: Float[Array, "*b v"], q_uncond: Float[Array, "*b v"], weight: Any
) -> Float[Array, "*b v"]:
    """q_cond^weight q_uncond^(1 - weight), normalised; what is 0 in either is 0 (section 7.8)."""
    if q_cond.shape != q_uncond.shape:
        raise ValueError(f"q_cond {q_cond.shape} must have the shape of q_uncond {q_uncond.shape}")
    dtype = wide(q_cond, q_uncond, weight)
    cond, uncond = q_cond.astype(dtype), q_uncond.astype(dtype)
    weight = jnp.asarray(weight, dtype)[..., None]
    some = (cond > 0) & (uncond > 0)
    logs = [jnp.log(jnp.where(some, q, 1)) for q in (cond, uncond)]
    return jax.nn.softmax(jnp.where(some, weight * logs[0] + (1 - weight) * logs[1], -1e6))


def remdm_sigma_to_kappa(sigma: Any, alpha_s: Any) -> Float[Array, "*b"]:
    """kappa of ReMDM's remasking probability: 1 - sigma / (1 - alpha_s) (section 7.3).

    ValueError for a known sigma outside [0, 1 - alpha_s], which Psi cannot express.
    """
    dtype = wide(sigma, alpha_s)
    noise, values = known(alpha_s), known(sigma)
    if noise is not None and values is not None:
        limit = 1 - noise
        if np.any((values < 0) | (values > limit * (1 + 1e-6))):
            raise ValueError(f"sigma={sigma} must be in [0, 1 - alpha_s], alpha_s={alpha_s}")
    rest = 1 - jnp.asarray(alpha_s, dtype)
    sigma = jnp.asarray(sigma, dtype)
    return jnp.where(rest > 0, 1 - sigma / jnp.where(rest > 0, rest, 1), 1)


def kappa_to_remdm_sigma(kappa: Any, alpha_s: Any) -> Float[Array, "*b"]:
    """ReMDM's remasking probability (1 - kappa) (1 - alpha_s)."""
    check_range("kappa", kappa, 0, 1, "[0, 1]")
    dtype = wide(kappa, alpha_s)
    return (1 - jnp.asarray(kappa, dtype)) * (1 - jnp.asarray(alpha_s, dtype))
