"""TTT layers: TTT-Linear and TTT-MLP (2407.04620), and the mixer of ViTTT (2512.01643)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab.rope import apply_rope, rope_frequencies
from jaxlab.ttt import (
    PackedMiniBatch,
    TTTLinearParams,
    TTTMLPParams,
    document_places,
    packed_minibatch_state,
    ttt_linear,
    ttt_minibatch_packed,
    ttt_mlp,
    vittt_dwconv,
    vittt_glu,
)
from models.layers import SequenceLayer, constant, linear, weight


def places_of(x, segment_ids, seen: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(place of each token of x [b, t, d] in its document, tokens seen after).

    `seen` None is training, a document a segment; else tokens follow and segment 0 is padding.
    """
    first = jnp.zeros(x.shape[:2], bool)
    real = jnp.ones_like(first)
    if seen is not None:
        real = real if segment_ids is None else segment_ids != 0
        return document_places(first, real, seen), seen + jnp.sum(real, 1)
    if segment_ids is not None:
        first = first.at[:, 1:].set(segment_ids[:, 1:] != segment_ids[:, :-1])
    none = jnp.zeros(len(x), jnp.int32)
    return document_places(first, real, none), none


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, in float32."""

    eps: float = 1e-6
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        shape = (x.shape[-1],)
        scale = constant(self, "scale", shape, 1.0, self.param_dtype)
        bias = constant(self, "bias", shape, 0.0, self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide - jnp.mean(wide, -1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return (wide * scale + bias).astype(x.dtype)


class TTTState(NamedTuple):
    """Fast weights with the sums of the open mini-batch, and the tokens seen: constant memory."""

    fast: PackedMiniBatch
    seen: Int[Array, "b"]


class TTTLayer(SequenceLayer):
    """TTT-Linear or TTT-MLP with its projections, LayerNorm after it and an optional gate.

    `kind` is "linear" or "mlp"; ValueError for another, and unless the heads divide `hidden_size`
    into even widths. Rotary positions count within a mini-batch, in interleaved pairs. Computed in
    `dtype`, fast weights in float32. Source: 2407.04620, sections 2 and 3.
    """

    kind: str
    hidden_size: int
    num_heads: int
    chunk_size: int = 16
    base_rate: float = 1.0
    rope_theta: float = 1e4
    use_gate: bool = False
    depth: int = 1  # layers of the whole network: the output starts the smaller
    dtype: str = "float32"
    param_dtype: str = "float32"

    def check(self) -> None:
        """ValueError for values that do not fit, naming the field."""
        if self.kind not in ("linear", "mlp"):
            raise ValueError(f"kind={self.kind!r} must be 'linear' or 'mlp'")
        c, h = self.hidden_size, self.num_heads
        if h < 1 or c % h or c // h % 2:
            raise ValueError(f"num_heads={h} must divide hidden_size={c} into even widths")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size} must be at least 1")

    def init_state(self, batch: int, length: int) -> TTTState:
        """The state before the first token: zeros."""
        h = self.num_heads
        fast = packed_minibatch_state(self.kind, batch, h, self.hidden_size // h)
        return TTTState(fast, jnp.zeros(batch, jnp.int32))

    @nn.compact
    def mix(
        self, x, positions, segment_ids, inv_freq, state: TTTState | None = None
    ) -> tuple[jax.Array, TTTState | None]:
        """A mixer of models/layers.py; positions are counted here."""
        self.check()
        c, h, kind, size = self.hidden_size, self.num_heads, self.param_dtype, self.chunk_size
        x = x.astype(self.dtype)
        flat = [linear(self, f"w{n}", (c, c), ("embed", "heads"), c**-0.5, kind)(x) for n in "qkv"]
        q, k, v = (rearrange(y, "b t (h k) -> b t h k", h=h) for y in flat)
        places, seen = places_of(x, segment_ids, None if state is None else state.seen)
        inside = places % size
        q, k = (self._turn(y, inside) for y in (q, k))

        wide = jnp.promote_types(x.dtype, jnp.float32)
        w = linear(self, "w_rate", (c, h), ("embed", "heads"), c**-0.5, kind)(x.astype(wide))
        rate_in = jax.nn.sigmoid(w + constant(self, "b_rate", (h,), 0.0, kind).astype(wide))
        rate_in = rate_in * (self.base_rate / (c // h))
        by_place = constant(self, "token_rate", (size,), 0.0, kind) + 1 / jnp.arange(1, size + 1)
        rate_out = jnp.maximum(by_place, 0).astype(wide)[inside]
        rate_out = jnp.broadcast_to(rate_out[..., None], rate_in.shape)

        params = self._initial()
        if state is None and segment_ids is None:
            run: Any = ttt_linear if self.kind == "linear" else ttt_mlp
            y = run(q, k, v, params, rate_in, rate_out, chunk_size=size)[0]
        else:
            y, after = ttt_minibatch_packed(
                q, k, v, params, rate_in, rate_out, places, None if state is None else state.fast,
                chunk_size=size,
            )  # fmt: skip
            state = None if state is None else TTTState(after, seen)
        y = LayerNorm(1e-6, kind, name="post_norm")(rearrange(y, "b t h k -> b t (h k)"))
        if self.use_gate:
            gate = linear(self, "w_gate", (c, c), ("embed", "heads"), c**-0.5, kind)(x)
            y = y * jax.nn.gelu(gate, approximate=True)
        std = (2 * self.depth * c) ** -0.5
        return linear(self, "wo", (c, c), ("heads", "embed"), std, kind)(y), state

    def _turn(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """Rotary positions on pairs (0, 1), (2, 3)... of the head."""
        inv_freq = jnp.asarray(rope_frequencies(x.shape[-1], self.rope_theta))
        halves = rearrange(x, "b t h (k pair) -> b t h (pair k)", pair=2)
        turned = apply_rope(halves, positions, inv_freq)
        return rearrange(turned, "b t h (pair k) -> b t h (k pair)", pair=2)

    def _initial(self) -> TTTLinearParams | TTTMLPParams:
        h, f, kind = self.num_heads, self.hidden_size // self.num_heads, self.param_dtype

        def matrix(name: str, m: int, n: int):
            return weight(self, name, (h, m, n), ("heads", None, None), 0.02, kind)

        bias = lambda name, n: constant(self, name, (h, 1, n), 0.0, kind)  # noqa: E731
        norm = [constant(self, f"ttt_norm_{n}", (h, f), 1.0 - i, kind) for i, n in enumerate("wb")]
        if self.kind == "linear":
            return TTTLinearParams(matrix("w1", f, f), bias("b1", f), *norm)
        layers = matrix("w1", f, 4 * f), bias("b1", 4 * f), matrix("w2", 4 * f, f), bias("b2", f)
        return TTTMLPParams(*layers, *norm)


def ttt_params_from_torch(state: dict[str, Array]) -> dict[str, Any]:
    """Parameters of `TTTLayer` from the original checkpoint's tensors, by array operations alone.

    Torch layout [out, in]; the net and the gate are read from the names. Source: 2407.04620.
    """
    get = lambda name: jnp.asarray(state[name])  # noqa: E731
    params: dict[str, Any] = {f"w{n}": get(f"{n}_proj.weight").T for n in "qkvo"}
    params["w_rate"] = get("learnable_ttt_lr_weight")[:, 0].T
    params["b_rate"] = get("learnable_ttt_lr_bias")[:, 0]
    params["token_rate"] = get("learnable_token_idx").reshape(-1)
    params["ttt_norm_w"], params["ttt_norm_b"] = get("ttt_norm_weight"), get("ttt_norm_bias")
    params |= {name.lower(): get(name) for name in ("W1", "b1", "W2", "b2") if name in state}
    params["post_norm"] = {"scale": get("post_norm.weight"), "bias": get("post_norm.bias")}
    return params | ({"w_gate": get("g_proj.weight").T} if "g_proj.weight" in state else {})


class ViTTTMixer(nn.Module):
    """The two inner nets of ViTTT on the tokens of an image: heads of a GLU, and one convolution.

    ValueError unless the heads divide `hidden_size` and the grid holds the tokens. Not causal: no
    mixer of a language model. Source: ViTTT, 2512.01643, section 3.
    """

    hidden_size: int
    num_heads: int
    qkv_bias: bool = True
    depth: int = 1  # layers of the whole network: the output starts the smaller
    dtype: str = "float32"
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], grid: tuple[int, int]) -> Float[Array, "b t d"]:
        """x [b, y * x, d], tokens row by row of a `grid` of y by x."""
        c, h, kind = self.hidden_size, self.num_heads, self.param_dtype
        if h < 1 or c % h:
            raise ValueError(f"num_heads={h} must divide hidden_size={c}")
        rows, columns = grid
        if x.ndim != 3 or x.shape[1:] != (rows * columns, c):
            raise ValueError(
                f"x has shape {x.shape}; expected [b, {rows * columns}, {c}] for grid={grid}"
            )
        d = c // h
        x = x.astype(self.dtype)

        def project(name: str, width: int) -> jax.Array:
            y = linear(self, f"w{name}", (c, width), ("embed", "heads"), c**-0.5, kind)(x)
            if not self.qkv_bias:
                return y
            return y + constant(self, f"b{name}", (width,), 0.0, kind).astype(y.dtype)

        q1, k1, v1 = (rearrange(project(f"{n}1", c), "b t (h k) -> b t h k", h=h) for n in "qkv")
        maps = [project(f"{n}2", d) for n in "qkv"]
        q2, k2, v2 = (rearrange(y, "b (y x) k -> b y x k", y=rows) for y in maps)
        w1, w2 = (
            weight(self, n, (h, d, d), ("heads", None, None), 0.02, kind) for n in ("w1", "w2")
        )
        w3 = weight(self, "w3", (d, 3, 3), (None, None, None), 0.02, kind)
        glu = rearrange(vittt_glu(q1, k1, v1, w1, w2)[0], "b t h k -> b t (h k)")
        conv = rearrange(vittt_dwconv(q2, k2, v2, w3)[0], "b y x k -> b (y x) k")
        both = jnp.concatenate([glu, conv], -1)
        std = (2 * self.depth * (c + d)) ** -0.5
        y = linear(self, "wo", (c + d, c), ("heads", "embed"), std, kind)(both)
        return y + constant(self, "bo", (c,), 0.0, kind).astype(y.dtype)


def vittt_params_from_torch(state: dict[str, Array]) -> dict[str, Array]:
    """Parameters of `ViTTTMixer` from the original checkpoint's tensors, by array operations alone.

    Torch layout [out, in]; the fast weights lose their axis of 1. Source: ViTTT, 2512.01643.
    """
    get = lambda name: jnp.asarray(state[name])  # noqa: E731
    d, c = get("w3").shape[0], get("proj.weight").shape[0]
    cuts = [c, 2 * c, 3 * c, 3 * c + d, 3 * c + 2 * d]
    names = [f"{n}{i}" for i in (1, 2) for n in "qkv"]
    params = {f"w{n}": w.T for n, w in zip(names, jnp.split(get("qkv.weight"), cuts), strict=True)}
    if "qkv.bias" in state:
        parts = jnp.split(get("qkv.bias"), cuts)
        params |= {f"b{n}": b for n, b in zip(names, parts, strict=True)}
    params |= {"w1": get("w1")[0], "w2": get("w2")[0], "w3": get("w3")[:, 0]}
    return params | {"wo": get("proj.weight").T, "bo": get("proj.bias")}
