"""Layers of the decoder: parameters with logical axis names around jaxlab functions.

A matrix whose name is in the collection "lora" (see models/lora.py) is used with that adapter.

A mixer (models/mixers.py has them all) is a module with two promises. `init_state(batch, length)`,
which needs no parameters, makes the state of one layer for decoding: a pytree whose leaves are
[batch, ...] or scalars; `length` bounds the tokens it will see, which a state of constant size ignores.
`mix(x, positions, segment_ids, inv_freq, state)` returns (y, state). State None is training: every
token sees those before it in its segment. With a state the t tokens, many (prefill) or one (a step),
follow those that the state has seen, and segment 0 is padding, which leaves no trace in it.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlab.attention import apply_rope
from jaxlab.lora import lora_delta, lora_product
from jaxlab.norm import rms_norm
from jaxlab.rope import rope_factor
from jaxlab.tiled import tiled_mlp
from models.cache import NOWHERE, KVCache
from sharding.context import attention_layer, automatic_attention
from sharding.context.cores import without_kernel
from sharding.rules import constrain
from sharding.tokens import over_tokens


def compute_dtype(dtype: str, platform: str) -> str:
    """`dtype`, with 'auto' settled for `platform`: float32 on CPUs, bfloat16 elsewhere."""
    return dtype if dtype != "auto" else "float32" if platform == "cpu" else "bfloat16"


def weight(
    module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], std, dtype
) -> jax.Array:
    """Declares a parameter with logical `axes`, truncated normal of standard deviation `std`, or drawn
    by `std` if it is an initialiser."""
    w = _declare(module, name, shape, axes, std, dtype)
    if module.has_variable("lora", name):
        w = w + lora_delta(module.get_variable("lora", name)).astype(w.dtype)
    return w


@struct.dataclass
class Linear:
    """The product with a matrix over its first `inputs` axes: a function, and a pytree of its arrays.

    An adapter is applied in its low-rank form: x W + (x A) B, W is not touched.
    """

    w: Float[Array, "..."]
    adapter: Any
    inputs: int = struct.field(pytree_node=False, default=1)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, self.w.astype(x.dtype), self.inputs)
        return y if self.adapter is None else y + lora_product(x, self.adapter, self.inputs)


def linear(
    module: nn.Module,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    std,
    dtype,
    inputs: int = 1,
) -> Linear:
    """Declares a `weight` and returns the product with it over its first `inputs` axes."""
    w = _declare(module, name, shape, axes, std, dtype)
    adapter = module.get_variable("lora", name) if module.has_variable("lora", name) else None
    return Linear(w, adapter, inputs)


def constant(module: nn.Module, name: str, shape: tuple[int, ...], value: float, dtype):
    """Declares a bias or a scale that starts at `value`: on every device whole, without decay."""
    axes = ("norm", *(None,) * (len(shape) - 1))
    init = nn.with_logical_partitioning(nn.initializers.constant(value), axes)
    return jnp.asarray(module.param(name, init, shape, dtype))


def _declare(module: nn.Module, name, shape, axes, std, dtype) -> jax.Array:
    init = std if callable(std) else nn.initializers.truncated_normal(std)
    init = nn.with_logical_partitioning(init, axes)
    return jnp.asarray(module.param(name, init, shape, dtype))


class RMSNorm(nn.Module):
    """`rms_norm` with a learnt scale."""

    eps: float = 1e-6
    param_dtype: str = "float32"

    @nn.compact
    def gain(self, width: int) -> Float[Array, "d"]:
        """The scale itself, for those who normalise elsewhere."""
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
        return jnp.asarray(self.param("scale", init, (width,), self.param_dtype))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return rms_norm(x, self.gain(x.shape[-1]), self.eps)


class SequenceLayer(nn.Module):
    """A mixer that is a layer by itself too, [b, t, d] to [b, t, d]."""

    def __call__(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t d"]:
        """The layer on whole sequences; positions None are 0, 1, 2..."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return self.mix(x, positions, segment_ids, None)[0]

    def mix(self, x, positions, segment_ids, inv_freq, state=None) -> tuple[jax.Array, Any]:
        """The mixer: (y, state)."""
        raise NotImplementedError


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and optional QK-norm."""

    config: Any  # DecoderConfig, whose module imports this one

    def init_state(self, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots, in the compute type."""
        c = self.config
        return KVCache.empty(batch, c.kv_heads, length, c.head_dim, c.dtype)

    @nn.compact
    def mix(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None,
        inv_freq: Float[Array, "half"],
        state: KVCache | None = None,
    ) -> tuple[Float[Array, "b t d"], KVCache | None]:
        """Attention to the tokens before, in the segment or in the cache."""
        c = self.config
        d, h, hk, k = c.d_model, c.heads, c.kv_heads, c.head_dim
        std, out_std = d**-0.5, (h * k * 2 * c.layers) ** -0.5
        declared = {
            "wq": ((d, h, k), ("embed", "heads", "head_dim"), std, c.param_dtype),
            "wk": ((d, hk, k), ("embed", "kv_heads", "head_dim"), std, c.param_dtype),
            "wv": ((d, hk, k), ("embed", "kv_heads", "head_dim"), std, c.param_dtype),
            "wo": ((h, k, d), ("heads", "head_dim", "embed"), out_std, c.param_dtype),
        }
        q_norm = k_norm = None
        if c.qk_norm:
            q_norm, k_norm = (
                RMSNorm(c.norm_eps, c.param_dtype, name=name).gain(k)
                for name in ("q_norm", "k_norm")
            )
        factor = rope_factor(c.rope_scaling)
        # Parameters are born without a mesh; decoding looks at a cache that is whole.
        if state is None and c.context.method != "none" and not self.is_initializing():
            weights = [weight(self, name, *rest) for name, rest in declared.items()]
            y = attention_layer(
                x, *weights, positions=positions, segment_ids=segment_ids, inv_freq=inv_freq,
                rope_factor=factor, q_norm=q_norm, k_norm=k_norm, norm_eps=c.norm_eps,
                **dataclasses.asdict(c.context),
            )  # fmt: skip
            return y, None
        wq, wk, wv, wo = (
            linear(self, name, *rest, inputs=2 if name == "wo" else 1)
            for name, rest in declared.items()
        )
        q, key, v = wq(x), wk(x), wv(x)
        q = q if q_norm is None else rms_norm(q, q_norm, c.norm_eps)
        key = key if k_norm is None else rms_norm(key, k_norm, c.norm_eps)
        q = apply_rope(q, positions, inv_freq, factor)
        key = apply_rope(key, positions, inv_freq, factor)
        q = constrain(q, "batch", "length", "act_heads", None)
        if state is None:
            out = automatic_attention(q, key, v, segment_ids=segment_ids, core=c.context.core)
        else:
            seen = positions if segment_ids is None else jnp.where(segment_ids, positions, NOWHERE)
            state = state.append(key, v, seen)
            out = state.attend(without_kernel(c.context.core), q, positions)
        return checkpoint_name(wo(out), "attn_y"), state


class MLP(nn.Module):
    """SwiGLU: (silu(x Wg) * x Wu) Wd (Shazeer, 2020)."""

    config: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], norm: RMSNorm, tiles: int = 1
    ) -> Float[Array, "b t d"]:
        """Of x normalised; in `tiles` pieces of the sequence, of which one is in memory at a time."""
        c = self.config
        d, f = c.d_model, c.mlp
        std = (f * 2 * c.layers) ** -0.5
        parts = (
            norm.gain(d),
            linear(self, "w_gate", (d, f), ("embed", "mlp"), d**-0.5, c.param_dtype),
            linear(self, "w_up", (d, f), ("embed", "mlp"), d**-0.5, c.param_dtype),
            linear(self, "w_down", (f, d), ("mlp", "embed"), std, c.param_dtype),
        )

        def mlp(parts, x):
            gain, gate, up, down = parts
            x = rms_norm(x, gain, norm.eps)
            hidden = jax.nn.silu(gate(x)) * up(x)
            return down(constrain(hidden, "batch", "length", "act_mlp"))

        def tiled(x, parts):
            return tiled_mlp(functools.partial(mlp, parts), x, n_tiles=tiles, consecutive=True)

        if tiles == 1 or self.is_initializing():
            return mlp(parts, x)
        return over_tokens(tiled, x, parts, pieces=tiles)
