"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "*b d"], scale: Float[Array, "d"], eps: float = 1e-6
) -> Float[Array, "*b d"]:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (Zhang and Sennrich, 2019).

    Computed in float32, float64 if x is, and returned in x.dtype. ValueError for another width of
    `scale`.
    """
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"scale {scale.shape} must be the last axis of x {x.shape}")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + eps)
    return (wide * scale.astype(wide.dtype)).astype(x.dtype)
