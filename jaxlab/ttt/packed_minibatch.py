"""TTT-Linear and TTT-MLP over packed documents and ragged batches, window by window.

As jaxlab.ttt.packed does for LaCT: mini-batches begin where a document begins, and any cut of a run
into pieces gives the same numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab.arguments import check_shape
from jaxlab.ttt.minibatch import (
    Layers,
    Params,
    Static,
    TTTLinearParams,
    TTTMLPParams,
    gelu,
    inner_gradients,
    layers_of,
    output,
    with_layers,
)  # fmt: skip
from jaxlab.ttt.net import outer_sum
from jaxlab.ttt.packed import choose, in_windows, roles_of
from jaxlab.ttt.sequence import checked_params, checked_tokens
from jaxlab.varying import vary_like


class PackedMiniBatch(NamedTuple):
    """Weights at the start of the open mini-batch, its sums of gradients, its last rate_out."""

    layers: Layers
    sums: Layers
    rate_out: Float[Array, "b h"]


def packed_minibatch_state(
    kind: str, batch: int, heads: int, head_dim: int, dtype=jnp.float32
) -> PackedMiniBatch:
    """State before the first token of a "linear" or "mlp" net: zeros, whatever the initial weights."""
    hidden = 4 * head_dim
    sizes = [(head_dim, head_dim)] if kind == "linear" else [(head_dim, hidden), (hidden, head_dim)]
    zeros = lambda *shape: jnp.zeros((batch, heads, *shape), dtype)  # noqa: E731
    layers = tuple((zeros(m, n), zeros(1, n)) for m, n in sizes)
    return PackedMiniBatch(layers, layers, zeros())


def _window(static: Static, initial: Params, state: PackedMiniBatch, window):
    """(state, out [b, h, c, f]) after a window of places and (q, k, v, rate_in, rate_out)."""
    places, (q, k, v, rate_in, rate_out) = window
    r = roles_of(places, static.chunk_size)
    row = lambda mask: mask[:, None, :, None]  # noqa: E731
    pick = lambda a, b, c: jnp.where(row(r.fresh), c, jnp.where(row(r.after), b, a))  # noqa: E731
    source, reading = rate_in[..., None], rate_out[..., None]

    def add(sums: Layers, chosen, inputs, grads) -> Layers:
        weight = jnp.where(row(chosen), source, 0)
        return tuple(
            (dw + outer_sum(weight * y, g), db + jnp.sum(weight * g, -2, keepdims=True))
            for (dw, db), y, g in zip(sums, inputs, grads, strict=True)
        )

    def last_rate(chosen):
        at = jnp.where(chosen, jnp.arange(chosen.shape[1]), -1)
        found = jnp.take_along_axis(rate_out, jnp.argmax(at, 1)[:, None, None], 2)[..., 0]
        return choose(jnp.any(chosen, 1), found, state.rate_out)

    entered = with_layers(initial, state.layers)
    at_entry = inner_gradients(entered, k, v, static.eps)
    rate = last_rate(r.before)[..., None, None]
    learnt = jax.tree.map(
        lambda w, s: w - rate * s, state.layers, add(state.sums, r.before, *at_entry)
    )
    moved = choose(r.crossed, learnt, state.layers)
    start = layers_of(initial)
    inputs, grads = jax.tree.map(
        pick,
        at_entry,
        inner_gradients(with_layers(initial, moved), k, v, static.eps),
        inner_gradients(initial, k, v, static.eps),
    )
    same = (r.chunk[:, :, None] == r.chunk[:, None, :]) & (places >= 0)[:, None, :]
    eta = jnp.where(same[:, None], jnp.tril(reading * rate_in[..., None, :]), 0)
    carried = jnp.where(row(r.before), reading, 0)
    x = z = q
    for i, (y, g) in enumerate(zip(inputs, grads, strict=True)):
        x = gelu(z) if i else q
        z = pick(*(x @ w + b for w, b in (state.layers[i], moved[i], start[i])))
        dw, db = state.sums[i]
        z = z - carried * (x @ dw + db) - (eta * (x @ jnp.swapaxes(y, -1, -2))) @ g - eta @ g
    left = choose(r.crossed | r.begun, jax.tree.map(jnp.zeros_like, state.sums), state.sums)
    after = PackedMiniBatch(
        choose(r.begun, start, moved),
        add(left, r.last, inputs, grads),
        last_rate(places >= 0),
    )
    return after, output(initial, q, z, static)


def ttt_minibatch_packed(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    params: TTTLinearParams | TTTMLPParams,
    rate_in: Float[Array, "b t h"] | None,
    rate_out: Float[Array, "b t h"] | None,
    places: Int[Array, "b t"],
    state: PackedMiniBatch | None = None,
    *,
    chunk_size: int = 16,
    residual: str = "query",
    eps: float = 1e-6,
) -> tuple[Float[Array, "b t h k"], PackedMiniBatch]:
    """`ttt_linear` or `ttt_mlp`, by the kind of `params`, of documents laid end to end: (out, state).

    Each document begins with `params`; `places` and `state` as in `ttt_packed`; what padding gives
    means nothing. Types and errors as in `ttt_linear`. Source: 2407.04620, section 2.
    """
    static = Static(type(params), chunk_size, residual, eps)
    tokens, out_type = checked_tokens(static, q, k, v, rate_in, rate_out, "B T H f")
    (b, t, h, f), wide = tokens[0].shape, tokens[0].dtype
    initial = checked_params(static.kind, params, b, h, f, wide)
    check_shape("places", places, (b, t))
    if state is None:
        kind = "linear" if static.kind is TTTLinearParams else "mlp"
        state = packed_minibatch_state(kind, b, h, f, wide)
    if t == 0:
        return jnp.zeros(q.shape, out_type), state
    places, tokens = in_windows(places, tokens, chunk_size)
    given = state
    state = jax.tree.map(lambda x: vary_like(x.astype(wide), tokens, initial, given), given)

    def body(state, window):
        return _window(static, initial, state, window)

    state, out = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), state, (places, tokens))
    out = rearrange(out, "n b h c f -> b (n c) h f")[:, :t].astype(out_type)
    return out, jax.tree.map(lambda x, like: x.astype(like.dtype), state, given)
