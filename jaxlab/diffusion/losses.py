"""Negative evidence lower bounds of discrete diffusion, in nats per token.

Source: MDLM 2406.07524; UDLM 2412.10193 and Duo 2506.10892, in the form that keeps its digits in
float32: note on Psi-samplers, section 4.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.diffusion.checks import check_prior, check_tokens, wide
from jaxlab.diffusion.schedules import Level

LEAST_NOISE, LEAST_ALPHA = 1e-12, 1e-30  # closer to 0 a level is taken for this: no 0/0


def subs(
    logits: Float[Array, "b t v"], z: Int[Array, "b t"], mask_id: int
) -> Float[Array, "b t v"]:
    """Log-probabilities of clean tokens: never the mask, and a token that is seen is certain (MDLM)."""
    logits = _check(logits, z, mask_id=mask_id)
    ids = jnp.arange(logits.shape[-1])
    logs = jax.nn.log_softmax(jnp.where(ids == mask_id, -jnp.inf, logits))
    certain = jnp.where(ids == z[..., None], 0.0, -jnp.inf)
    return jnp.where((z == mask_id)[..., None], logs, certain)


def masked_nelbo(
    logits: Float[Array, "b t v"],
    z: Int[Array, "b t"],
    x0: Int[Array, "b t"],
    level: Level,
    mask_id: int,
) -> Float[Array, "b t"]:
    """alpha' / (1 - alpha) log p(x0) where z is the mask, else 0; applies `subs` itself.

    ValueError for shapes or a mask that do not fit, TypeError for tokens that are not integers.
    """
    logits = _check(logits, z, x0, mask_id=mask_id)
    noise = jnp.maximum(jnp.asarray(level.one_minus_alpha, logits.dtype), LEAST_NOISE)
    logits = jnp.where(jnp.arange(logits.shape[-1]) == mask_id, -jnp.inf, logits)
    logs = _at(logits, x0) - jax.nn.logsumexp(logits, -1)
    return jnp.where(z == mask_id, level.dalpha / noise * logs, 0).astype(logits.dtype)


def uniform_nelbo(
    logits: Float[Array, "b t v"], z: Int[Array, "b t"], x0: Int[Array, "b t"], level: Level
) -> Float[Array, "b t"]:
    """-alpha' / (K alpha) sum_j a_j h(b_j / a_j - 1), h(e) = e - log(1 + e) (section 4.2, form B).

    Every term is non-negative, so that nothing cancels. The gradient recomputes what has the size of
    the vocabulary from the logits. Errors of `masked_nelbo`.
    """
    logits = _check(logits, z, x0)
    dtype = logits.dtype
    alpha, noise, slope = (jnp.asarray(x, dtype) for x in level)
    alpha, noise = jnp.maximum(alpha, LEAST_ALPHA), jnp.maximum(noise, LEAST_NOISE)
    r = jnp.broadcast_to(logits.shape[-1] * alpha / noise, z.shape)
    return -slope / (logits.shape[-1] * alpha) * _divergence(logits, z, x0, r)


@jax.checkpoint
def _divergence(logits, z, x0, r):
    """sum_j a_j h(b_j / a_j - 1), with r = K alpha / (1 - alpha)."""
    ids = jnp.arange(logits.shape[-1])
    not_x, not_z = ids != x0[..., None], ids != z[..., None]
    e = jnp.exp(logits - jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True)))
    total = jnp.sum(e, -1)
    p = e / total[..., None]
    # Sums over the others, for 1 - p loses its digits.
    without_x, without_z = (jnp.sum(e, -1, where=w) / total for w in (not_x, not_z))
    p_x, p_z = _at(p, x0), _at(p, z)
    same, below = z == x0, 1 + r * p_z
    kept = r * (1 + r)
    up = (r * without_z)[..., None] + kept[..., None] * p
    ratio = jnp.where(same[..., None], up, r[..., None] * (p - p_z[..., None])) / below[..., None]
    logs = jnp.log1p(r[..., None] * p) - jnp.log1p(r * p_z)[..., None]
    others = jnp.sum(_h(ratio, logs), -1, where=not_x)
    ratio_x = -(r * without_x + kept * p_z) / ((1 + r) * below)
    logs_x = jnp.log1p(r * p_x) - jnp.log1p(r * p_z) - jnp.log1p(r)
    own = (1 + r) * _h(jnp.where(same, 0, ratio_x), logs_x)
    return jnp.where(same, others / (1 + r), others + own)


def _h(e, log_one_plus):
    """e - log(1 + e); `log_one_plus` is log(1 + e) by another way, taken near e = -1."""
    small, low = jnp.abs(e) < 0.05, e < -0.5
    near = jnp.where(small, e, 0)
    series = jnp.zeros_like(e)
    for n in range(8 if e.dtype == jnp.float32 else 14, 1, -1):
        series = 1 / n - near * series
    usual = e - jnp.log1p(jnp.where(small | low, 0, e))
    return jnp.where(small, near**2 * series, jnp.where(low, e - log_one_plus, usual))


def nelbo_mean(
    per_token: Float[Array, "b t"], valid: Bool[Array, "b t"]
) -> tuple[Float[Array, ""], dict[str, tuple[Array, Array]]]:
    """Mean over valid tokens, and {"nll": (sum, weight)}; 0 when there are none."""
    if per_token.shape != valid.shape:
        raise ValueError(f"valid {valid.shape} must have the shape of per_token {per_token.shape}")
    dtype = wide(per_token)
    keep = valid.astype(bool)
    total = jnp.sum(jnp.where(keep, per_token.astype(dtype), 0))
    weight = jnp.sum(keep.astype(dtype))
    return total / jnp.maximum(weight, 1), {"nll": (total, weight)}


def _at(x, ids):
    return jnp.take_along_axis(x, ids[..., None], -1)[..., 0]


def _check(logits, z, *tokens, mask_id: int | None = None):
    """The logits in the type to compute in."""
    check_tokens(z=z, **dict(zip(("x0",), tokens, strict=False)))
    check_prior("uniform" if mask_id is None else "masked", mask_id, logits.shape[-1])
    shapes = {logits.shape[:-1], z.shape, *(x.shape for x in tokens)}
    if len(shapes) > 1:
        got = ", ".join(str(x.shape) for x in (logits, z, *tokens))
        raise ValueError(f"logits [..., v], z and x0 [...] must agree, got {got}")
    return jnp.asarray(logits, wide(logits))
