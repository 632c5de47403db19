"""TTT in chunks on a sharded sequence: by prefixes where updates are a plain sum, else chunk by chunk.

Source: note on TTT as linear attention, sections 5.5 and 8.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jaxlab.arguments import wide_type
from jaxlab.ttt import FastWeights, InnerConfig, ttt
from jaxlab.ttt.arguments import batched_weights, check_gate, check_tokens
from jaxlab.ttt.net import features, minus_grads, read
from jaxlab.ttt.parallel import parallel, why_not_parallel
from jaxlab.ttt.state import Chunk, moving_part, state_of, take_step
from jaxlab.varying import varying_axes
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
    mesh: Any = None,
) -> Float[Array, "b t h v"]:
    """`ttt` on global arrays, tokens sharded in natural order: its out.

    Where only w1 moves, by the dot loss and without a norm, each shard sends its momentum and the sum
    of its updates: two matrices a head, however long the sequence; its tokens must be whole chunks.
    Everything else is sequential over chunks: the tokens of every chunk are spread over the shards,
    by one all-to-all there and one back, and the gradients of a chunk are summed over them; chunks
    must then be a multiple of the shards, and so must the tokens of one. ValueError for lengths that
    do not fit, for visibility "token", and as `ttt`. Source: note on TTT, sections 5.5 and 8.
    """
    place = find_place(mesh)
    if cfg.visibility == "token":
        raise ValueError("visibility='token' is linear attention: use context_recurrence")
    if place is None:
        return ttt(q, k, v, fw, rates, momentum, cfg, return_state=False)[0]
    q, k, v = check_tokens(q, k, v, "B T H Dk")
    (b, t, h, dk), dv, wide, out_type = q.shape, v.shape[-1], wide_type(v), v.dtype
    check_divides(place, b, t, h)
    batched_weights(fw, cfg.net, b, h, dk, dv, wide)  # checked whole
    rates = check_gate("rates", rates, (b, t, h), wide, (b, t, h, 3)) if cfg.token_rates else None
    momentum = check_gate("momentum", momentum, (b, t, h), wide) if cfg.momentum else None
    if rates is not None and rates.ndim == 3:
        rates = jnp.broadcast_to(rates[..., None], (b, t, h, 3))
    shards, size = place.size(place.tokens), cfg.chunk_size
    static = why_not_parallel(cfg, momentum is not None) is None and cfg.weight_norm is None
    unit = shards * size
    if t % unit or (not static and size % shards):
        rest = "" if static else f", and chunk_size one of {shards}"
        raise ValueError(
            f"length {t} must be a multiple of {shards} shards * chunk_size={size} = {unit}{rest}"
        )

    def local(q, k, v, rates, momentum, fw):
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
        return go(place, cfg, state, (q, k, v, rates, momentum)).astype(out_type)

    return place.shard(local, q, k, v, rates, momentum, fw)


def _by_prefix(place: Place, cfg: InnerConfig, state, tokens) -> jax.Array:
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
    done = after.read["w1"] - moving.read["w1"]
    before = prefix_state_exchange(jnp.ones_like(done), done, place.tokens)
    out = out + features(cfg.net, state.fw, chunks.q) @ before
    return rearrange(out, "n b h c v -> b (n c) h v")


def _spread(place: Place, cfg: InnerConfig, state, tokens) -> jax.Array:
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

    def learn(moving, chunk: Chunk):
        fw = state.fw._replace(**moving.read)
        grads = minus_grads(cfg.net, cfg.loss, cfg.moving, fw, chunk.k, chunk.v, chunk.rates)
        return take_step(cfg, state.norms, moving, jax.lax.psum(grads, axes), chunk.gate)

    def body(moving, chunk: Chunk):
        entry = moving
        for _ in range(cfg.steps):
            moving = learn(moving, chunk)
        seen = entry if cfg.visibility == "exclusive" else moving
        return moving, read(cfg.net, state.fw._replace(**seen.read), chunk.q)

    q, k, v, rates, gates = jax.tree.map(there, tokens)
    gate = None if gates is None else jax.lax.pmean(jnp.mean(gates, -1), axes)
    chunks = Chunk(q, k, v, rates, gate)
    body = jax.checkpoint(body, prevent_cse=False)
    return back(jax.lax.scan(body, moving_part(state, cfg), chunks)[1])
