"""Layers of the decoder: parameters with logical axis names around jaxlab functions."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.attention import apply_rope, blockwise_attention, dense_attention
from sharding.rules import constrain

ATTENTION: dict[str, Callable] = {"dense": dense_attention, "blockwise": blockwise_attention}


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], std, dtype
) -> jax.Array:
    """Declares a truncated-normal parameter of standard deviation `std` with logical `axes`."""
    init = nn.with_logical_partitioning(nn.initializers.truncated_normal(std), axes)
    return jnp.asarray(module.param(name, init, shape, dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, computed in float32 (Zhang and Sennrich, 2019)."""

    eps: float = 1e-6
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        scale = jnp.asarray(self.param("scale", init, (x.shape[-1],), self.param_dtype))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and optional QK-norm."""

    config: Any  # DecoderConfig, whose module imports this one

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None,
        inv_freq: Float[Array, "half"],
    ) -> Float[Array, "b t d"]:
        c = self.config
        d, h, hk, k = c.d_model, c.heads, c.kv_heads, c.head_dim
        std = d**-0.5
        wq = weight(self, "wq", (d, h, k), ("embed", "heads", "head_dim"), std, c.param_dtype)
        wk = weight(self, "wk", (d, hk, k), ("embed", "kv_heads", "head_dim"), std, c.param_dtype)
        wv = weight(self, "wv", (d, hk, k), ("embed", "kv_heads", "head_dim"), std, c.param_dtype)
        std = (h * k * 2 * c.layers) ** -0.5
        wo = weight(self, "wo", (h, k, d), ("heads", "head_dim", "embed"), std, c.param_dtype)
        project = lambda w: jnp.einsum("btd,dhk->bthk", x, w.astype(x.dtype))  # noqa: E731
        q, key, v = project(wq), project(wk), project(wv)
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, c.param_dtype, name="q_norm")(q)
            key = RMSNorm(c.norm_eps, c.param_dtype, name="k_norm")(key)
        q = apply_rope(q, positions, inv_freq)
        key = apply_rope(key, positions, inv_freq)
        q = constrain(q, "batch", "length", "act_heads", None)
        out = ATTENTION[c.attention](q, key, v, causal=True, segment_ids=segment_ids)
        return jnp.einsum("bthk,hkd->btd", out, wo.astype(x.dtype))


class MLP(nn.Module):
    """SwiGLU: (silu(x Wg) * x Wu) Wd (Shazeer, 2020)."""

    config: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        c = self.config
        d, f = c.d_model, c.mlp
        gate = weight(self, "w_gate", (d, f), ("embed", "mlp"), d**-0.5, c.param_dtype)
        up = weight(self, "w_up", (d, f), ("embed", "mlp"), d**-0.5, c.param_dtype)
        std = (f * 2 * c.layers) ** -0.5
        down = weight(self, "w_down", (f, d), ("mlp", "embed"), std, c.param_dtype)
        hidden = jax.nn.silu(x @ gate.astype(x.dtype)) * (x @ up.astype(x.dtype))
        return constrain(hidden, "batch", "length", "act_mlp") @ down.astype(x.dtype)


MIXERS: dict[str, type[nn.Module]] = {"attention": Attention}
