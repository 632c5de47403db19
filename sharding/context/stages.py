"""One device's part of an attention layer: project, exchange, attend, exchange back, project.

UPipe does this in stages of a few heads. What a stage makes is dropped when it ends, and made again
in the backward pass, so that memory is that of one stage. Source: UPipe (arXiv 2602.21196); papers'
note on it, section 3.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab.norm import rms_norm
from jaxlab.rope import apply_rope
from jaxlab.varying import vary_like
from sharding.context.schedule import HeadSchedule

_KEEP = jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse")


class Weights(NamedTuple):
    """Heads in natural order, in one type."""

    wq: Float[Array, "d h k"]
    wk: Float[Array, "d hk k"]
    wv: Float[Array, "d hk k"]
    wo: Float[Array, "h k d"]


class Rotation(NamedTuple):
    """What happens to queries and keys between projection and attention."""

    positions: Int[Array, "#b s"]
    inv_freq: Float[Array, "half"] | None  # None: no rotation
    factor: float
    q_norm: Float[Array, "k"] | None  # gains of RMSNorm; None: no norm
    k_norm: Float[Array, "k"] | None
    eps: float

    def __call__(self, x: Float[Array, "b s h k"], gain: Float[Array, "k"] | None):
        """Normalised and rotated."""
        x = x if gain is None else rms_norm(x, gain, self.eps)
        return apply_rope(x, self.positions, self.inv_freq, self.factor)


class Exchange(NamedTuple):
    """Between shards of the sequence and shards of the heads, over a mesh axis or none."""

    axis: str | None
    copies: int  # of a key/value head, where there are fewer than devices

    def to_heads(self, x: Float[Array, "b s h k"]) -> Float[Array, "b t m k"]:
        """All tokens of some heads."""
        if self.axis is None:
            return x
        x = rearrange(x, "b s (c m) k -> c b s m k", c=jax.lax.axis_size(self.axis))
        return rearrange(self._swap(x), "c b s m k -> b (c s) m k")

    def keys(self, x: Float[Array, "b s hk k"]) -> Float[Array, "b t m k"]:
        """`to_heads` of keys or values."""
        return self.to_heads(jnp.repeat(x, self.copies, 2) if self.copies > 1 else x)

    def to_tokens(self, x: Float[Array, "b t m k"]) -> Float[Array, "b s h k"]:
        """Some tokens of all heads."""
        if self.axis is None:
            return x
        x = rearrange(x, "b (c s) m k -> c b s m k", c=jax.lax.axis_size(self.axis))
        return rearrange(self._swap(x), "c b s m k -> b s (c m) k")

    def _swap(self, x):
        # Parts lie one after the other: with a split between tokens and heads the TPU compiler makes
        # copies in which a single head is padded to two.
        return jax.lax.all_to_all(x, self.axis, split_axis=0, concat_axis=0, tiled=True)


class Layer(NamedTuple):
    """Everything but x and the weights."""

    attend: Callable[[Any, Any, Any], Any]
    exchange: Exchange
    rotation: Rotation

    def queries(self, x, wq, sink=None):
        """Rotated queries, exchanged; and `sink`, see `_project`."""
        q, sink = _project(x, wq, sink)
        return self.exchange.to_heads(self.rotation(q, self.rotation.q_norm)), sink

    def keys(self, x, wk, wv, sink=None):
        """Rotated keys, and values, exchanged; and `sink`."""
        kv, sink = _project(x, jnp.concatenate([wk, wv], 1), sink)
        k, v = jnp.split(kv, 2, 2)
        k = self.rotation(k, self.rotation.k_norm)
        return self.exchange.keys(k), self.exchange.keys(v), sink

    def outputs(self, out, wo):
        """What these heads add to the layer's output."""
        out = self.exchange.to_tokens(out)
        b, s, h, k = out.shape
        return (out.reshape(b * s, h * k) @ wo.reshape(h * k, -1)).reshape(b, s, -1)


def whole(layer: Layer, x: Float[Array, "b s d"], w: Weights) -> Float[Array, "b s d"]:
    """All heads at once."""
    q, _ = layer.queries(x, w.wq)
    k, v, _ = layer.keys(x, w.wk, w.wv)
    return layer.outputs(layer.attend(q, k, v), w.wo)


def staged(
    layer: Layer, schedule: HeadSchedule, policy: str, x: Float[Array, "b s d"], w: Weights
) -> Float[Array, "b s d"]:
    """A chunk of key/value heads after the other, and within it a slice of queries after the other."""
    keep = _KEEP if policy == "attn_out" else None
    remat = functools.partial(jax.checkpoint, policy=keep, prevent_cse=False)
    if schedule.n_outer == schedule.n_inner == 1:
        return remat(functools.partial(whole, layer))(x, w)
    cut = {"o": schedule.n_outer, "t": schedule.n_inner, "r": schedule.cp_size, "i": schedule.gt}
    wq = rearrange(w.wq, "d (o r j t i) k -> o t d (r j i) k", **cut)
    wo = rearrange(w.wo, "(o r j t i) k d -> o t (r j i) k d", **cut)
    wk, wv = (rearrange(y, "d (o u) k -> o d u k", o=schedule.n_outer) for y in (w.wk, w.wv))
    sink = x

    def chunk(carry, weights):
        y, sink = carry
        wq, wo, wk, wv = weights
        k, v, sink = layer.keys(x, wk, wv, sink)

        def stage(carry, weights):
            y, sink = carry
            wq, wo = weights
            q, sink = layer.queries(x, wq, sink)
            return (_add(y, layer.outputs(layer.attend(q, k, v), wo)), sink), None

        return jax.lax.scan(remat(stage), (y, sink), (wq, wo))

    zero = vary_like(jnp.zeros(x.shape[:2] + w.wo.shape[2:], x.dtype), x, w)
    # Of a narrow type two numbers, the sum and what it lost, or many stages would lose digits.
    narrow = jnp.finfo(x.dtype).bits < 32
    start = (zero, zero if narrow else None), sink
    return jax.lax.scan(remat(chunk), start, (wq, wo, wk, wv))[0][0][0]


def _add(y, part):
    """`part` added to a sum (high, low); low None: plainly."""
    high, low = y
    if low is None:
        return high + part, None
    high, low = _compensated(high, jax.lax.stop_gradient(low), part)
    return high, jax.lax.stop_gradient(low)


# The derivative is that of a plain sum, in the narrow type: a wide sum would have a wide gradient.
@jax.custom_vjp
def _compensated(high, low, part):
    kind = jnp.finfo(high.dtype)
    total = sum(x.astype(jnp.float32) for x in (high, low, part))
    # Not a conversion there and back, which compilers may leave out.
    rounded = jax.lax.reduce_precision(total, kind.nexp, kind.nmant)
    return rounded.astype(high.dtype), (total - rounded).astype(high.dtype)


def _compensated_backward(_, cotangents):
    return cotangents[0], None, cotangents[0]


_compensated.defvjp(lambda *args: (_compensated(*args), None), _compensated_backward)


def _project(x, w, sink):
    """The product x w [b, s, h, k], and `sink` as it is.

    With a sink, which is x again, the gradient of x is added to that of the sink, in place: a carry
    of loops then holds the only array of that size, where autodiff adds up one of each stage.
    """
    return (_product(x, w), None) if sink is None else _into_sink(x, w, sink)


def _product(x, w):
    # One plain product: with heads and head dims as two axes the CPU compiler needs a copy of x more.
    b, s, d = x.shape
    return (x.reshape(b * s, d) @ w.reshape(d, -1)).reshape(b, s, *w.shape[1:])


@jax.custom_vjp
def _into_sink(x, w, sink):
    return _product(x, w), sink


def _into_sink_forward(x, w, sink):
    return (_product(x, w), sink), (x, w)


def _into_sink_backward(saved, cotangents):
    (x, w), (dy, dx) = saved, cotangents
    b, s, d = x.shape
    dw = (x.reshape(b * s, d).T @ dy.reshape(b * s, -1)).reshape(w.shape)
    n = math.gcd(s, _TILES)
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def tile(i, dx):
        old, part = (jax.lax.dynamic_slice_in_dim(a, i * (s // n), s // n, 1) for a in (dx, dy))
        more = jnp.tensordot(part, w, ((2, 3), (1, 2)), preferred_element_type=wide)
        new = (old.astype(wide) + more).astype(dx.dtype)
        return jax.lax.dynamic_update_slice_in_dim(dx, new, i * (s // n), 1)

    return None, dw, jax.lax.fori_loop(0, n, tile, dx)


# Of the sequence, so that what is added is a fraction of x.
_TILES = 8
_into_sink.defvjp(_into_sink_forward, _into_sink_backward)
