"""Layers of the decoder: parameters with logical axis names around jaxlab functions.

A mixer is a module with two promises. `init_state(config, batch, length)` makes the state of one
layer for decoding: a pytree whose leaves are [batch, ...] or scalars; `length` bounds the tokens it
will see, which a state of constant size ignores. `__call__(x, positions, segment_ids, inv_freq, state)`
returns (y, state). State None is training: every token sees those before it in its segment. With a
state the t tokens, many (prefill) or one (a step), follow those that the state has seen, and segment 0
is padding, which leaves no trace in it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab.attention import (
    apply_rope,
    blockwise_attention,
    cached_attention,
    dense_attention,
)
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


class KVCache(NamedTuple):
    """Keys and values of the tokens seen, one slot each for all rows alike."""

    keys: Float[Array, "b hk s k"]
    values: Float[Array, "b hk s k"]
    positions: Int[Array, "b s"]  # NOWHERE in slots without a token
    used: Int[Array, ""]  # slots

    def append(self, keys, values, positions) -> "KVCache":
        """With t tokens more: keys and values [b, t, hk, k], positions [b, t]."""

        def put(cache, new, axis):
            new = new.astype(cache.dtype)
            return jax.lax.dynamic_update_slice_in_dim(cache, new, self.used, axis)

        place = lambda x: constrain(x, "batch", "act_kv_heads", "cache", None)  # noqa: E731
        keys, values = (rearrange(x, "b t h k -> b h t k") for x in (keys, values))
        return KVCache(
            place(put(self.keys, keys, 2)),
            place(put(self.values, values, 2)),
            put(self.positions, positions, 1),
            self.used + positions.shape[1],
        )


# A position after every query's, so that the causal rule hides the slot.
NOWHERE = jnp.iinfo(jnp.int32).max


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and optional QK-norm."""

    config: Any  # DecoderConfig, whose module imports this one

    @staticmethod
    def init_state(config, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots, in the compute type."""
        shape = (batch, config.kv_heads, length, config.head_dim)
        empty = jnp.zeros(shape, config.dtype)
        return KVCache(empty, empty, jnp.full((batch, length), NOWHERE), jnp.zeros((), jnp.int32))

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None,
        inv_freq: Float[Array, "half"],
        state: KVCache | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
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
        if state is None:
            out = ATTENTION[c.attention](q, key, v, causal=True, segment_ids=segment_ids)
        else:
            seen = positions if segment_ids is None else jnp.where(segment_ids, positions, NOWHERE)
            state = state.append(key, v, seen)
            out = attend_to_cache(c.attention, q, state, positions)
        return jnp.einsum("bthk,hkd->btd", out, wo.astype(x.dtype)), state


def attend_to_cache(
    name: str, q: Float[Array, "b t h k"], cache: KVCache, positions: Int[Array, "b t"]
) -> Float[Array, "b t h k"]:
    """Attention of new tokens, already in the cache, to all that it holds; one token reads it as it lies."""
    if q.shape[1] == 1:
        return cached_attention(q, cache.keys, cache.values, positions, cache.positions)
    keys, values = (rearrange(x, "b h s k -> b s h k") for x in (cache.keys, cache.values))
    return ATTENTION[name](
        q, keys, values, causal=True, q_positions=positions, k_positions=cache.positions
    )


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


MIXERS: dict[str, Any] = {"attention": Attention}
