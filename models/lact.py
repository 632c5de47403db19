"""The LaCT layer: window attention and a large-chunk TTT operator that share one QKV (2505.23884)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab.attention import apply_rope
from jaxlab.rope import rope_frequencies
from jaxlab.ttt import FastWeights, InnerConfig, PackedState, packed_state, ttt, ttt_packed
from models.cache import NOWHERE, RingCache
from models.layers import RMSNorm, SequenceLayer, constant, linear, weight
from models.ttt import places_of
from sharding.context.cores import without_kernel
from sharding.context.ttt import context_ttt
from sharding.rules import constrain


class LaCTState(NamedTuple):
    """A window of keys and values, the fast weights, and the tokens seen: constant memory."""

    window: RingCache
    fast: PackedState
    seen: Int[Array, "b"]


def l2(x: Float[Array, "*b k"]) -> Float[Array, "*b k"]:
    """x / (|x| + 1e-5) over the last axis, gradient 0 at 0."""
    square = jnp.sum(jnp.square(x), -1, keepdims=True)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return x / (norm + 1e-5)


class LaCTLayer(SequenceLayer):
    """y = (window attention(q, k, v) + TTT(q, k, v)) Wo, of which TTT learns k -> v chunk by chunk.

    `inner` says how, `attn_heads` and `ttt_heads` cut the same channels; ValueError unless they
    divide `hidden_size`. Initial fast weights are learnt, w0 and w2 as products of rank `low_rank`
    plus half the identity, or whole if None. Computed in `dtype`, the fast weights in float32.
    """

    hidden_size: int
    attn_heads: int
    ttt_heads: int
    inter_multi: int = 1
    window: int = 2048
    inner: InnerConfig = InnerConfig()
    low_rank: int | None = 32
    qkv_bias: bool = False
    qk_norm: bool = False
    ttt_rope: bool = True
    v_silu: bool = True
    learnable_scale: bool = True
    rope_theta: float = 1e6
    base_rate: float = 1e-3
    core: str = "dense"
    depth: int = 1  # layers of the whole network: the output starts the smaller
    dtype: str = "float32"
    param_dtype: str = "float32"

    def check(self) -> None:
        """ValueError for sizes that do not fit, naming the field."""
        c = self.hidden_size
        for name in ("attn_heads", "ttt_heads"):
            heads = getattr(self, name)
            if heads < 1 or c % heads:
                raise ValueError(f"{name}={heads} must divide hidden_size={c}")
        if c // self.attn_heads % 2:
            raise ValueError(
                f"attn_heads={self.attn_heads} must leave an even width of hidden_size={c}"
            )
        for name in ("window", "inter_multi"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.low_rank is not None and self.low_rank < 1:
            raise ValueError(f"low_rank={self.low_rank} must be at least 1 or None")

    def init_state(self, batch: int, length: int) -> LaCTState:
        """The state before the first token: the window's cache and zeros."""
        ha, d = self.attn_heads, self.hidden_size // self.ttt_heads
        size, width = min(self.window, length), self.hidden_size // ha
        return LaCTState(
            RingCache.empty(batch, ha, size, width, self.dtype),
            packed_state(self.inner, batch, self.ttt_heads, d, self.inter_multi * d, d),
            jnp.zeros(batch, jnp.int32),
        )

    @nn.compact
    def mix(
        self, x, positions, segment_ids, inv_freq, state: LaCTState | None = None
    ) -> tuple[jax.Array, LaCTState | None]:
        """A mixer of models/layers.py; its rotary frequencies are its own."""
        self.check()
        c, ha, kind = self.hidden_size, self.attn_heads, self.param_dtype
        x = x.astype(self.dtype)

        def project(name: str):
            y = linear(self, name, (c, c), ("embed", "heads"), c**-0.5, kind)(x)
            bias = f"b{name[1:]}"
            return y + constant(self, bias, (c,), 0.0, kind).astype(y.dtype) if self.qkv_bias else y

        q, k, v = (project(name) for name in ("wq", "wk", "wv"))
        if self.qk_norm:
            q, k = (RMSNorm(1e-5, kind, name=f"{n}_norm")(y) for n, y in (("q", q), ("k", k)))
        inv_freq = jnp.asarray(rope_frequencies(c // ha, self.rope_theta))
        heads = lambda y: rearrange(y, "b t (h k) -> b t h k", h=ha)  # noqa: E731
        turn = lambda y: apply_rope(heads(y), positions, inv_freq)  # noqa: E731

        fast = (self._scaled("q", q), self._scaled("k", k), v)
        y, state = self._learn(x, fast, turn, segment_ids, state)
        q, k, v = turn(q), turn(k), heads(v)
        q = constrain(q, "batch", "length", "act_heads", None)
        attend = without_kernel(self.core)
        if state is None:
            out = attend(q, k, v, causal=True, window=self.window, segment_ids=segment_ids)
        else:
            seen = positions if segment_ids is None else jnp.where(segment_ids, positions, NOWHERE)
            out, ring = state.window.attend(attend, q, k, v, positions, seen)
            state = state._replace(window=ring)
        out = rearrange(out, "b t h k -> b t (h k)") + y.astype(out.dtype)
        std = (2 * self.depth * c) ** -0.5
        return linear(self, "wo", (c, c), ("heads", "embed"), std, kind)(out), state

    def _scaled(self, name: str, y: jax.Array) -> jax.Array:
        c, kind = self.hidden_size, self.param_dtype
        scale = constant(self, f"{name}_scale", (c,), 1.0, kind).astype(y.dtype)
        return y * scale + constant(self, f"{name}_offset", (c,), 0.0, kind).astype(y.dtype)

    def _gate(self, name: str, x, shape: tuple[int, ...]) -> jax.Array:
        """x W + b [b, t, *shape] in float32, or wider."""
        c, kind = self.hidden_size, self.param_dtype
        axes = ("embed", "heads", *(None,) * (len(shape) - 1))
        wide = jnp.promote_types(x.dtype, jnp.float32)
        product = linear(self, f"w_{name}", (c, *shape), axes, c**-0.5, kind)(x.astype(wide))
        return product + constant(self, f"b_{name}", shape, 0.0, kind).astype(wide)

    def _learn(self, x, fast, turn, segment_ids, state: LaCTState | None):
        """The TTT branch [b, t, d], and the state with the tokens learnt."""
        h, inner = self.ttt_heads, self.inner
        q, k, v = (rearrange(y, "b t (h k) -> b t h k", h=h) for y in fast)
        q, k = l2(jax.nn.silu(q)), l2(jax.nn.silu(k))
        v = jax.nn.silu(v) if self.v_silu else v
        if self.ttt_rope:  # in the heads of attention, whatever those of TTT
            flat = lambda y: rearrange(y, "b t h k -> b t (h k)")  # noqa: E731
            q, k = (rearrange(flat(turn(flat(y))), "b t (h k) -> b t h k", h=h) for y in (q, k))
        rates = mu = None
        if inner.token_rates:
            start = np.log(np.expm1(self.base_rate))
            rates = jax.nn.softplus(self._gate("rate", x, (h, 3)) + start)
        if inner.momentum:
            mu = jax.nn.sigmoid(self._gate("momentum", x, (h,)))
        fw = self._initial()
        self.sow("intermediates", "learnt", (k, v, fw, rates, mu))
        places: Any = None
        if state is not None or segment_ids is not None:
            places, seen = places_of(x, segment_ids, None if state is None else state.seen)
        if state is not None:
            y, after = ttt_packed(q, k, v, fw, rates, mu, inner, places, state.fast)
            state = state._replace(fast=after, seen=seen)
        elif self.is_initializing() and places is None:  # of one row, which no mesh divides
            y = ttt(q, k, v, fw, rates, mu, inner, return_state=False)[0]
        else:
            y = context_ttt(q, k, v, fw, rates, mu, inner, places=places)
        y = RMSNorm(1e-5, self.param_dtype, name="ttt_norm")(y)
        if self.learnable_scale:
            y = y * jax.nn.silu(self._gate("scale", x, (h,)))[..., None].astype(y.dtype)
        return rearrange(y, "b t h k -> b t (h k)"), state

    def _initial(self) -> FastWeights:
        """The learnt fast weights at the start of a document, in rows: f(x) = x w."""
        h, d, kind = self.ttt_heads, self.hidden_size // self.ttt_heads, self.param_dtype

        def matrix(name: str, m: int, n: int, std: float):
            return weight(self, name, (h, m, n), ("heads", None, None), std, kind)

        def first(name: str):
            if self.low_rank is None:
                return matrix(name, d, dh, d**-0.5)
            into = matrix(f"{name}_in", d, self.low_rank, 0.5 * d**-0.5)
            out = matrix(f"{name}_out", self.low_rank, dh, 0.5 * self.low_rank**-0.5)
            return into @ out + 0.5 * jnp.eye(d, dh, dtype=into.dtype)

        if self.inner.net == "linear":
            return FastWeights(None, matrix("w1", d, d, d**-0.5), None)
        dh = self.inter_multi * d
        return FastWeights(first("w0"), matrix("w1", dh, d, dh**-0.5), first("w2"))


def lact_params_from_torch(state: dict[str, Array]) -> dict[str, Any]:
    """Parameters of `LaCTLayer` from the original checkpoint's tensors, by array operations alone.

    Torch layout [out, in]; whether there are biases, norms, gates, a scale, low-rank weights is read
    from the names. Source: LaCT, 2505.23884.
    """
    t = jnp.swapaxes
    q, k, v = jnp.split(jnp.asarray(state["qkv.weight"]), 3)
    params: dict[str, Any] = {"wq": q.T, "wk": k.T, "wv": v.T}
    params["wo"] = jnp.asarray(state["o_proj.weight"]).T
    if "qkv.bias" in state:
        params |= zip(("bq", "bk", "bv"), jnp.split(jnp.asarray(state["qkv.bias"]), 3), strict=True)
    for i, name in enumerate("qk"):
        params[f"{name}_scale"] = jnp.asarray(state["qk_scale"])[:, i]
        params[f"{name}_offset"] = jnp.asarray(state["qk_offset"])[:, i]
        if f"{name}_norm.weight" in state:
            params[f"{name}_norm"] = {"scale": jnp.asarray(state[f"{name}_norm.weight"])}
    for name in ("w0", "w2"):
        if f"{name}.w_left" in state:
            params[f"{name}_in"] = t(jnp.asarray(state[f"{name}.w_right"]), -1, -2)
            params[f"{name}_out"] = t(jnp.asarray(state[f"{name}.w_left"]), -1, -2)
        elif name in state:
            params[name] = t(jnp.asarray(state[name]), -1, -2)
    params["w1"] = t(jnp.asarray(state["w1"]), -1, -2)
    heads = params["w1"].shape[0]
    gates = {"rate": "lr_proj", "momentum": "momentum_proj.0", "scale": "ttt_scale_proj"}
    for name, original in gates.items():
        if f"{original}.weight" in state:
            shape = (heads, 3) if name == "rate" else (heads,)
            w, b = (jnp.asarray(state[f"{original}.{part}"]) for part in ("weight", "bias"))
            params |= {f"w_{name}": w.T.reshape(-1, *shape), f"b_{name}": b.reshape(shape)}
    params["ttt_norm"] = {"scale": jnp.asarray(state["ttt_norm.weight"])}
    return params
