"""Attention whose keys and values go round a ring of devices, with a gradient that does the same.

Each rank keeps its queries; keys and values of all ranks visit it, and the softmax is put together
from their parts. The backward pass is a second turn, in which the gradients of keys and values travel
with them and are home after a whole turn. Autodiff of the first turn would store every visit.
Source: Ring Attention (Liu et al., 2023); papers' note on UPipe, section 7.8.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlab.arguments import wide_type
from jaxlab.attention import blockwise_attention
from jaxlab.blockwise import backward_in_blocks, default_block, forward_in_blocks, plan_blocks
from jaxlab.masks import Mask, Rule
from jaxlab.varying import vary_like
from sharding.context.zigzag import natural_index


class Ring(NamedTuple):
    """What is static: mesh axis, its size, the rule of the mask, tokens in all, their order."""

    axis: str
    size: int
    rule: Rule
    seq_len: int
    zigzag: bool

    def positions(self, rank: int | Int[Array, ""]) -> Int[Array, "1 s"]:
        """Natural indices of the tokens of a rank."""
        each = self.seq_len // self.size
        places = rank * each + jnp.arange(each, dtype=jnp.int32)
        if self.zigzag:
            places = natural_index(places, self.seq_len, self.size)
        return places[None]

    def segments(self, segment_ids: Int[Array, "b t"] | None, rank) -> Int[Array, "b s"] | None:
        """Those of the tokens of a rank, out of those of all."""
        each = self.seq_len // self.size
        if segment_ids is None:
            return None
        return jax.lax.dynamic_slice_in_dim(segment_ids, rank * each, each, 1)

    def mask(self, segment_ids, queries, keys) -> Mask:
        """What decides between the queries of one rank and the keys of another."""
        return Mask(
            self.positions(queries),
            self.positions(keys),
            self.segments(segment_ids, queries),
            self.segments(segment_ids, keys),
        )

    def rank(self) -> Int[Array, ""]:
        """This device's."""
        return jax.lax.axis_index(self.axis)

    def rank_for(self, x):
        """This device's, tied to x: of constants JAX takes all blocks' masks out of a scan over layers."""
        return jax.lax.optimization_barrier((self.rank(), x[(slice(1),) * x.ndim]))[0]

    def send(self, x):
        """To the next rank, from the one before."""
        n = self.size
        return jax.lax.ppermute(x, self.axis, [(i, (i + 1) % n) for i in range(n)])


def ring_attention(
    ring: Ring,
    q: Float[Array, "b s h k"],
    k: Float[Array, "b s hk k"],
    v: Float[Array, "b s hk k"],
    segment_ids: Int[Array, "b t"] | None,
) -> Float[Array, "b s h k"]:
    """Attention of this rank's queries to all keys, inside shard_map.

    `segment_ids` are those of all t tokens, in the order in which the ranks hold them.
    """
    refs = (q, k, v, segment_ids, ring.rank())
    q, k, v, segment_ids = jax.tree.map(lambda x: vary_like(x, refs), refs[:4])
    return _ring(ring, q, k, v, segment_ids)


def gathered_attention(
    ring: Ring,
    q: Float[Array, "b s h k"],
    k: Float[Array, "b s hk k"],
    v: Float[Array, "b s hk k"],
    segment_ids: Int[Array, "b t"] | None,
):
    """What `ring_attention` returns, with the keys and values of all ranks gathered at once."""
    k, v = (jax.lax.all_gather(x, ring.axis, axis=1, tiled=True) for x in (k, v))
    rank = ring.rank_for(q)
    everyone = [ring.positions(rank) for rank in range(ring.size)]
    rule: dict[str, Any] = ring.rule._asdict()
    return blockwise_attention(
        q, k, v, **rule,
        q_positions=ring.positions(rank), k_positions=jnp.concatenate(everyone, 1),
        segment_ids=ring.segments(segment_ids, rank), k_segment_ids=segment_ids,
    )  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring: Ring, q, k, v, segment_ids):
    return _forward(ring, q, k, v, segment_ids)[0]


def _turn(ring: Ring, visit, state, kv):
    """`state` after `visit(state, kv, own rank, rank they are from)` at every rank, size - 1 journeys."""
    rank = ring.rank_for(kv)

    def hop(carry, i):
        state, kv = carry
        # Sent before they are used: the next visit's travel while this one computes.
        following = ring.send(kv)
        return (visit(state, kv, rank, (rank - i) % ring.size), following), None

    if ring.size > 1:
        (state, kv), _ = jax.lax.scan(hop, (state, kv), jnp.arange(ring.size - 1))
    return visit(state, kv, rank, (rank + 1) % ring.size)


def _forward(ring: Ring, q, k, v, segment_ids):
    wide, block = wide_type(q), default_block(q.shape[0] * q.shape[2])

    def visit(state, kv, rank, source):
        mask = _alike(ring.mask(segment_ids, rank, source), q)
        plan = plan_blocks(ring.rule, q, k, mask, block, block)
        out, lse = forward_in_blocks(plan, q, kv[0], kv[1], mask)
        return _merge(state[0], state[1], out, lse)

    nothing = jnp.zeros(q.shape, wide), jnp.full(q.shape[:3], -jnp.inf, wide)
    out, lse = _turn(ring, visit, _alike(nothing, q), jnp.stack([k, v]))
    out = checkpoint_name(out.astype(q.dtype), "attn_out")
    lse = checkpoint_name(lse, "attn_lse")
    return out, (q, k, v, segment_ids, out, lse)


def _merge(out, lse, more, lse_more):
    """The softmax over two sets of keys from those over each; one may be empty (lse -inf)."""
    total = jnp.logaddexp(lse, lse_more)
    top = jnp.where(total > -jnp.inf, total, 0)
    share = lambda x, part: x * jnp.exp(part - top)[..., None]  # noqa: E731
    return share(out, lse) + share(more.astype(out.dtype), lse_more), total


def _backward(ring: Ring, saved, dout):
    q, k, v, segment_ids, out, lse = saved
    wide, block = wide_type(q), default_block(q.shape[0] * q.shape[2])
    no_dlse = jnp.zeros_like(lse)

    def visit(state, kv, rank, source):
        dq, dkv = state
        mask = _alike(ring.mask(segment_ids, rank, source), q)
        plan = plan_blocks(ring.rule, q, k, mask, block, block)
        dqi, dk, dv = backward_in_blocks(plan, q, kv[0], kv[1], mask, out, lse, dout, no_dlse)
        # After the last visit this is the step home.
        return dq + dqi, ring.send(dkv + jnp.stack([dk, dv]))

    start = _alike((jnp.zeros(q.shape, wide), jnp.zeros((2, *k.shape), wide)), q)
    dq, (dk, dv) = _turn(ring, visit, start, jnp.stack([k, v]))
    no_segments = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), segment_ids)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), no_segments


def _alike(tree, q):
    """With the type of q inside shard_map."""
    return jax.tree.map(lambda x: vary_like(x, q), tree)


_ring.defvjp(_forward, _backward)
