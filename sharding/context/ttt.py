"""TTT in chunks on a sharded sequence: by prefixes where updates are a plain sum, else chunk by chunk.

Source: note on TTT as linear attention, sections 5.5 and 8.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab.arguments import check_shape, wide_type
from jaxlab.ttt import FastWeights, InnerConfig, PackedState, ttt, ttt_packed
from jaxlab.ttt.arguments import batched_weights, check_gate, check_rates, check_tokens
from jaxlab.ttt.net import features, read
from jaxlab.ttt.packed import check_packed, packed_window, roles_of
from jaxlab.ttt.parallel import parallel, why_not_parallel
from jaxlab.ttt.state import Chunk, Moving, learn, moving_part, renormalise, state_of
from jaxlab.varying import vary_like, varying_axes
from sharding.context.place import Place, check_divides, find_place
from sharding.context.prefix import prefix_state_exchange

DEFAULT = InnerConfig()


def context_ttt(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    fw: FastWeights,
    rates: Float[Array, "b t h 3"] | Float[Array, "b t h"] | None = None,
    momentum: Float[Array, "b t h"] | None = None,
    cfg: InnerConfig = DEFAULT,
    *,
    places: Int[Array, "b t"] | None = None,
    mesh: Any = None,
) -> Float[Array, "b t h v"]:
    """`ttt` on global arrays, tokens sharded in natural order: its out.

    Where only w1 moves, by the dot loss and without a post-norm, each shard sends its momentum and the
    sum of its updates: two matrices a head, however long the sequence; its tokens must be whole chunks.
    Everything else is sequential over chunks: the tokens of every chunk are spread over the shards,
    by one all-to-all there and one back, and the gradients of a chunk are summed over them; chunks
    must then be a multiple of the shards, and so must the tokens of one. So are documents laid end to
    end, with `places` as in `ttt_packed`, whatever moves. ValueError for lengths that do not fit, for
    visibility "token", and as `ttt` or `ttt_packed`. Source: note on TTT, sections 5.5 and 8.
    """
    place = find_place(mesh)
    if cfg.visibility == "token":
        raise ValueError("visibility='token' is linear attention: use context_recurrence")
    if places is not None:
        check_packed(cfg)
    if place is None and places is not None:
        return ttt_packed(q, k, v, fw, rates, momentum, cfg, places)[0]
    if place is None:
        return ttt(q, k, v, fw, rates, momentum, cfg, return_state=False)[0]
    q, k, v = check_tokens(q, k, v, "B T H Dk")
    (b, t, h, dk), dv, wide, out_type = q.shape, v.shape[-1], wide_type(v), v.dtype
    check_divides(place, b, t, h)
    batched_weights(fw, cfg.net, b, h, dk, dv, wide)  # checked whole
    rates = check_rates("rates", rates, (b, t, h), wide) if cfg.token_rates else None
    momentum = check_gate("momentum", momentum, (b, t, h), wide) if cfg.momentum else None
    if places is not None:
        check_shape("places", places, (b, t))
    static = places is None and why_not_parallel(cfg, momentum is not None) is None
    check_chunks(t, place.size(place.tokens), cfg.chunk_size, spread=not static)

    def local(q, k, v, rates, momentum, fw, places):
        q, k, v = (x.astype(wide) for x in (k if cfg.query == "k" else q, k, v))
        weights = batched_weights(fw, cfg.net, len(q), q.shape[2], dk, dv, wide)
        # Weights are the same on all shards of a sequence, and typed so.
        others = tuple(sorted(varying_axes(q) - set(place.tokens)))
        cast = lambda w: jax.lax.pcast(  # noqa: E731
            w, tuple(a for a in others if a not in varying_axes(w)), to="varying"
        )
        state = state_of(jax.tree.map(cast, weights), cfg)
        state = state._replace(delta=jax.tree.map(cast, state.delta))
        go = _by_prefix if static else _spread
        return go(place, cfg, state, (q, k, v, rates, momentum), places).astype(out_type)

    return place.shard(local, q, k, v, rates, momentum, fw, places)


def check_chunks(length: int, shards: int, chunk_size: int, *, spread: bool) -> None:
    """ValueError unless every shard has whole chunks and, with `spread`, a share of every chunk."""
    unit = shards * chunk_size
    if length % unit or (spread and chunk_size % shards):
        rest = f", and chunk_size one of {shards}" if spread else ""
        raise ValueError(
            f"length {length} must be a multiple of {shards} shards * chunk_size={chunk_size} = "
            f"{unit}{rest}"
        )


def _by_prefix(place: Place, cfg: InnerConfig, state, tokens, _) -> jax.Array:
    """Two exchanges: the momentum that enters, then the sum of updates, orthogonalised or not."""
    cut = lambda x: rearrange(x, "b (n c) h ... -> n b h c ...", c=cfg.chunk_size)  # noqa: E731
    q, k, v, rates, gates = jax.tree.map(cut, tokens)
    chunks = Chunk(q, k, v, rates, None if gates is None else jnp.mean(gates, -1))
    moving = moving_part(state, cfg)
    if chunks.gate is not None:
        plain = dataclasses.replace(cfg, orthogonalize=None)
        last = parallel(plain, state, moving, chunks)[0].delta
        assert last is not None  # the configuration has momentum
        through = jnp.prod(chunks.gate, 0)[..., None, None]
        entered = prefix_state_exchange(through, last["w1"], place.tokens)
        moving = moving._replace(delta={"w1": entered})
    after, out = parallel(cfg, state, moving, chunks)
    start = moving.read if moving.main is None else moving.main
    done = (after.read if after.main is None else after.main)["w1"] - start["w1"]
    before = prefix_state_exchange(jnp.ones_like(done), done, place.tokens)
    if moving.main is None:
        out = out + features(cfg.net, state.fw, chunks.q) @ before
    else:  # what is read is not linear in the sum: again, from the right one
        main = start["w1"] + before
        begins = jax.lax.axis_index(place.tokens) == 0  # the initial weights are read as they are
        read = jnp.where(begins, moving.read["w1"], renormalise(main, state.norms["w1"]))
        out = parallel(cfg, state, Moving({"w1": read}, {"w1": main}, moving.delta), chunks)[1]
    return rearrange(out, "n b h c v -> b (n c) h v")


def _spread(place: Place, cfg: InnerConfig, state, tokens, places) -> jax.Array:
    """Chunk after chunk, each device with its share of every chunk's tokens."""
    shards, axes = place.size(place.tokens), place.tokens
    share = cfg.chunk_size // shards

    def there(x):
        x = rearrange(x, "b (n p c) h ... -> b n p c h ...", p=shards, c=share)
        x = jax.lax.all_to_all(x, axes, split_axis=2, concat_axis=1, tiled=True)
        return rearrange(x, "b n 1 c h ... -> n b h c ...")

    def back(x):
        x = rearrange(x, "n b h c v -> b n 1 c h v")
        x = jax.lax.all_to_all(x, axes, split_axis=1, concat_axis=2, tiled=True)
        return rearrange(x, "b n p c h v -> b (n p c) h v")

    total = lambda sums: jax.lax.psum(sums, axes)  # noqa: E731

    def body(moving, chunk: Chunk):
        entry, moving = moving, learn(cfg, state, moving, chunk, total)
        seen = entry if cfg.visibility == "exclusive" else moving
        return moving, read(cfg.net, state.fw._replace(**seen.read), chunk.q)

    tokens = jax.tree.map(there, tokens)
    if places is not None:
        return back(_documents(cfg, state, tokens, places, axes, total))
    q, k, v, rates, gates = tokens
    gate = None if gates is None else jax.lax.pmean(jnp.mean(gates, -1), axes)
    chunks = Chunk(q, k, v, rates, gate)
    body = jax.checkpoint(body, prevent_cse=False)
    return back(jax.lax.scan(body, moving_part(state, cfg), chunks)[1])


def _documents(cfg: InnerConfig, state, tokens, places, axes, total) -> jax.Array:
    """Window after window, as `ttt_packed`; a device has its share of the tokens and all the places."""
    places = jax.lax.all_gather(places, axes, axis=1, tiled=True)
    windows = rearrange(places, "b (n c) -> n b c", c=cfg.chunk_size)
    share = tokens[0].shape[3]
    at = jax.lax.axis_index(axes) * share
    zero: Any = jax.tree.map(jnp.zeros_like, moving_part(state, cfg))
    before = PackedState(zero, zero.read, jnp.zeros_like(state.fw.w1[..., 0, 0]))
    before = jax.tree.map(lambda x: vary_like(x, tokens, places, state), before)

    def body(before, window):
        places, tokens = window
        roles = roles_of(places, cfg.chunk_size)
        mine = lambda x: jax.lax.dynamic_slice_in_dim(x, at, share, 1) if x.ndim == 2 else x  # noqa: E731
        roles = jax.tree.map(mine, roles)
        return packed_window(cfg, state.fw, state.norms, before, roles, tokens, total)

    body = jax.checkpoint(body, prevent_cse=False)
    return jax.lax.scan(body, before, (windows, tokens))[1]
