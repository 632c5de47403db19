"""One device's part of an attention layer: project, exchange, attend, exchange back, project.

UPipe does this in stages of a few heads. What a stage makes is dropped when it ends, and made again
in the backward pass, so that memory is that of one stage. Source: UPipe (arXiv 2602.21196); papers'
note on it, section 3.
"""

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

POLICIES: dict[str, Callable | None] = {
    "nothing": None,
    "attn_out": jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse"),
}


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
        return jax.lax.all_to_all(x, self.axis, split_axis=2, concat_axis=1, tiled=True)

    def keys(self, x: Float[Array, "b s hk k"]) -> Float[Array, "b t m k"]:
        """`to_heads` of keys or values."""
        return self.to_heads(jnp.repeat(x, self.copies, 2) if self.copies > 1 else x)

    def to_tokens(self, x: Float[Array, "b t m k"]) -> Float[Array, "b s h k"]:
        """Some tokens of all heads."""
        if self.axis is None:
            return x
        return jax.lax.all_to_all(x, self.axis, split_axis=1, concat_axis=2, tiled=True)


class Layer(NamedTuple):
    """Everything but x and the weights."""

    attend: Callable[[Any, Any, Any], Any]
    exchange: Exchange
    rotation: Rotation

    def queries(self, x, wq):
        """Rotated queries, exchanged."""
        return self.exchange.to_heads(self.rotation(_project(x, wq), self.rotation.q_norm))

    def keys(self, x, wk, wv):
        """Rotated keys, and values, exchanged."""
        # One product: two would make two gradients of x as large as x.
        k, v = jnp.split(_project(x, jnp.concatenate([wk, wv], 1)), 2, 2)
        k = self.rotation(k, self.rotation.k_norm)
        return self.exchange.keys(k), self.exchange.keys(v)

    def outputs(self, out, wo):
        """What these heads add to the layer's output."""
        out = self.exchange.to_tokens(out)
        b, s, h, k = out.shape
        return (out.reshape(b * s, h * k) @ wo.reshape(h * k, -1)).reshape(b, s, -1)

    def stage(self, x, wq, k, v, wo):
        """The share of the layer's output that the heads of `wq` have."""
        return self.outputs(self.attend(self.queries(x, wq), k, v), wo)


def _project(x, w):
    # One plain product: with heads and head dims as two axes the CPU compiler needs a copy of x more.
    b, s, d = x.shape
    return (x.reshape(b * s, d) @ w.reshape(d, -1)).reshape(b, s, *w.shape[1:])


def whole(layer: Layer, x: Float[Array, "b s d"], w: Weights) -> Float[Array, "b s d"]:
    """All heads at once."""
    return layer.stage(x, w.wq, *layer.keys(x, w.wk, w.wv), w.wo)


def staged(
    layer: Layer, schedule: HeadSchedule, policy: str, x: Float[Array, "b s d"], w: Weights
) -> Float[Array, "b s d"]:
    """A chunk of key/value heads after the other, and within it a slice of queries after the other."""
    remat = {"policy": POLICIES[policy]}
    n, t, r, i = schedule.n_outer, schedule.n_inner, schedule.cp_size, schedule.gt
    cut = {"o": n, "t": t, "r": r, "i": i}
    wq = rearrange(w.wq, "d (o r j t i) k -> o t d (r j i) k", **cut)
    wo = rearrange(w.wo, "(o r j t i) k d -> o t (r j i) k d", **cut)
    wk, wv = (rearrange(y, "d (o u) k -> o d u k", o=n) for y in (w.wk, w.wv))

    def chunk(y, weights):
        wq, wo, wk, wv = weights
        k, v = layer.keys(x, wk, wv)

        def one(y, weights):
            wq, wo = weights
            return y + layer.stage(x, wq, k, v, wo), None

        # A loop of one step is no loop to the compiler: only a barrier then keeps it from merging
        # what is computed again with what was computed before, and keeping that.
        return jax.lax.scan(jax.checkpoint(one, **remat, prevent_cse=t == 1), y, (wq, wo))

    y = vary_like(jnp.zeros(x.shape[:2] + w.wo.shape[2:], x.dtype), x, w)
    return jax.lax.scan(jax.checkpoint(chunk, **remat, prevent_cse=n == 1), y, (wq, wo, wk, wv))[0]
