"""LaCT over packed documents and ragged batches: chunks that begin where a document begins.

Tokens carry their place in their document; place 0 begins one, a multiple of the chunk ends a chunk,
-1 is padding. A run goes window by window, at most a chunk of tokens each. In a window the document
that was open crosses at most one end of a chunk, and those that begin in it none, so that three sets
of weights serve all tokens: before the end, after it, and the initial ones. Documents come out as
they would alone, and any cut of a run into pieces, down to single tokens, gives the same numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from jaxlab.arguments import check_shape, wide_type
from jaxlab.ttt.arguments import batched_weights, check_gate, check_rates, check_tokens
from jaxlab.ttt.config import FastWeights, InnerConfig
from jaxlab.ttt.net import minus_grads, read
from jaxlab.ttt.state import Matrices, Moving, moving_part, state_of, take_step
from jaxlab.varying import vary_like

PADDING = -1


class PackedState(NamedTuple):
    """What a run leaves: weights (zeros before the first token), and the sums of the open chunk.

    Leaves are [b, h, ...]; memory does not grow with the tokens.
    """

    moving: Moving
    grads: Matrices
    gate: Float[Array, "b h"]


class Roles(NamedTuple):
    """Which weights each token of a window meets; padding has no role."""

    before: Bool[Array, "b c"]  # those that entered
    after: Bool[Array, "b c"]  # those after the end of the open chunk
    fresh: Bool[Array, "b c"]  # the initial ones
    chunk: Int[Array, "b c"]  # number of the chunk, 0 being the open one
    last: Bool[Array, "b c"]  # in the chunk that stays open
    crossed: Bool[Array, "b"]  # whether the open document ends a chunk here
    begun: Bool[Array, "b"]  # whether a document begins here


def document_places(
    first: Bool[Array, "b t"], real: Bool[Array, "b t"], seen: Int[Array, "b"]
) -> Int[Array, "b t"]:
    """Index of each token in its document, -1 for padding.

    `first` marks tokens that begin one, `real` all but padding; `seen` tokens of the open document
    came before.
    """
    at = jnp.cumsum(real, 1) - 1
    begin = jax.lax.cummax(jnp.where(first & real, at, -seen[:, None]), axis=1)
    return jnp.where(real, at - begin, PADDING)


def roles_of(places: Int[Array, "b c"], size: int) -> Roles:
    """The roles of a window of at most `size` tokens."""
    real = places >= 0
    ends = real & (places % size == 0)
    begun = jnp.cumsum(places == 0, 1) > 0
    crossed = (jnp.cumsum(ends, 1) > 0) & ~begun
    chunk = jnp.cumsum(ends, 1)
    return Roles(
        before=real & ~begun & ~crossed,
        after=real & crossed,
        fresh=real & begun,
        chunk=chunk,
        last=real & (chunk == chunk[:, -1:]),
        crossed=jnp.any(crossed, 1),
        begun=begun[:, -1],
    )


def choose(rows: Bool[Array, "b"], new: Any, old: Any) -> Any:
    """`new` in the chosen rows of two trees of arrays [b, ...], else `old`."""

    def leaf(x, y):
        return jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(leaf, new, old)


def in_windows(places: Int[Array, "b t"], tokens: Any, size: int) -> tuple[jax.Array, Any]:
    """Places [n, b, c] and tokens [n, b, h, c, ...] of windows of at most `size`, padded at the end."""
    t = places.shape[1]
    size = min(size, t)
    n = -(-t // size)
    pad = lambda x, fill=0: jnp.pad(  # noqa: E731
        x, [(0, 0), (0, n * size - t)] + [(0, 0)] * (x.ndim - 2), constant_values=fill
    )
    cut = lambda x: rearrange(pad(x), "b (n c) h ... -> n b h c ...", n=n)  # noqa: E731
    return rearrange(pad(places, PADDING), "b (n c) -> n b c", n=n), jax.tree.map(cut, tokens)


def packed_state(
    cfg: InnerConfig, batch: int, heads: int, dk: int, dh: int, dv: int, dtype=jnp.float32
) -> PackedState:
    """State before the first token: zeros, whatever the initial weights."""
    wide = lambda a, b: jnp.zeros((batch, heads, a, b), dtype)  # noqa: E731
    w1 = wide(dk if cfg.net == "linear" else dh, dv)
    weights = FastWeights(wide(dk, dh), w1, wide(dk, dh))
    moving = moving_part(state_of(weights, cfg), cfg)
    zeros = jax.tree.map(jnp.zeros_like, moving)
    return PackedState(zeros, zeros.read, jnp.zeros((batch, heads), dtype))


def packed_window(
    cfg: InnerConfig,
    initial: FastWeights,
    norms,
    state: PackedState,
    r: Roles,
    tokens,
    total: Callable = lambda sums: sums,
) -> tuple[PackedState, Any]:
    """(state, out [b, h, c, v]) after a window of tokens (q, k, v, rates, gates) with roles `r`.

    `total` sums over the devices that share the window's tokens.
    """
    q, k, v, rates, gates = tokens
    mask = lambda chosen: chosen[:, None, :, None].astype(v.dtype)  # noqa: E731

    def gradient(moving: Moving, chosen):
        fw = initial._replace(**moving.read)
        weights = mask(chosen) * (jnp.ones((1, 1, 1, 3), v.dtype) if rates is None else rates)
        return total(minus_grads(cfg.net, cfg.loss, cfg.moving, fw, k, v, weights))

    def gate_of(chosen):
        return 0.0 if gates is None else total(jnp.sum(gates * mask(chosen)[..., 0], -1))

    opened = jax.tree.map(jnp.add, state.grads, gradient(state.moving, r.before))
    gate = state.gate + gate_of(r.before)

    def commit(moving: Moving) -> Moving:
        mean = None if gates is None else gate / cfg.chunk_size
        return choose(r.crossed, take_step(cfg, norms, moving, opened, mean), moving)

    # In a batch of single tokens a chunk seldom ends, and orthogonalising is dear.
    moved = jax.lax.cond(jnp.any(r.crossed), commit, lambda moving: moving, state.moving)
    start = moving_part(state_of(initial, cfg), cfg)
    outs = [
        jnp.where(mask(chosen) > 0, read(cfg.net, initial._replace(**moving.read), q), 0)
        for chosen, moving in ((r.before, state.moving), (r.after, moved), (r.fresh, start))
    ]
    base = choose(r.begun, start, moved)
    left = r.crossed | r.begun
    zero = jax.tree.map(jnp.zeros_like, (opened, gate))
    opened, gate = choose(left, zero, (opened, gate))
    again = r.last & ~r.before
    grads = jax.tree.map(jnp.add, opened, gradient(base, again))
    return PackedState(base, grads, gate + gate_of(again)), sum(outs)


def check_packed(cfg: InnerConfig) -> None:
    """ValueError for a configuration whose documents cannot be packed."""
    if cfg.visibility != "exclusive" or cfg.steps > 1:
        raise ValueError(
            "packed documents need visibility='exclusive' and steps=1; "
            f"got {cfg.visibility!r} and {cfg.steps}"
        )


def ttt_packed(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    fw: FastWeights,
    rates: Float[Array, "b t h 3"] | Float[Array, "b t h"] | None,
    momentum: Float[Array, "b t h"] | None,
    cfg: InnerConfig,
    places: Int[Array, "b t"],
    state: PackedState | None = None,
) -> tuple[Float[Array, "b t h v"], PackedState]:
    """`ttt` of documents laid end to end, each from the initial weights `fw`: (out, state).

    `places` as `document_places` gives them; the padding's out is 0. `state` None, or as returned,
    continues the open document of each row at any token. Types as in `ttt`. ValueError for shapes
    that do not fit, and unless visibility="exclusive" and steps=1. Costs up to 2.3 times `ttt`.
    Source: 2602.21204, sections 3 and 5.
    """
    check_packed(cfg)
    q, k, v = check_tokens(q, k, v, "B T H Dk")
    (b, t, h, dk), dv, wide, out_type = q.shape, v.shape[-1], wide_type(v), v.dtype
    rates = check_rates("rates", rates, (b, t, h), wide) if cfg.token_rates else None
    momentum = check_gate("momentum", momentum, (b, t, h), wide) if cfg.momentum else None
    check_shape("places", places, (b, t))
    initial = batched_weights(fw, cfg.net, b, h, dk, dv, wide)
    if state is None:
        state = packed_state(cfg, b, h, dk, initial.w1.shape[2], dv, wide)
    if t == 0:
        return jnp.zeros((b, 0, h, dv), out_type), state
    q, k, v = (x.astype(wide) for x in (k if cfg.query == "k" else q, k, v))
    places, tokens = in_windows(places, (q, k, v, rates, momentum), cfg.chunk_size)
    norms = state_of(initial, cfg).norms
    given = state
    state = jax.tree.map(lambda x: vary_like(x.astype(wide), tokens, initial, given), given)

    def body(state, window):
        places, tokens = window
        return packed_window(cfg, initial, norms, state, roles_of(places, cfg.chunk_size), tokens)

    state, out = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), state, (places, tokens))
    out = rearrange(out, "n b h c v -> b (n c) h v")[:, :t].astype(out_type)
    return out, jax.tree.map(lambda x, like: x.astype(like.dtype), state, given)
