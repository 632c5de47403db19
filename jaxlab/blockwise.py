"""Attention in blocks: online softmax forward, probabilities recomputed from lse backward.

Blocks have the layout [n, b, hk, g, block, k]: the number of blocks first, tokens beside the head
dim, so that every product is a batch of plain matrix products. Source: Dao et al., 2022.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from jaxlab.arguments import wide_type
from jaxlab.loops import loop_at_most
from jaxlab.masks import Mask, Rule, allowed_pairs, logits
from jaxlab.varying import vary_like


class Plan(NamedTuple):
    """Everything static: the rule, the lengths, the blocks, whether positions are the index."""

    rule: Rule
    t: int
    s: int
    block_q: int
    block_k: int
    natural: bool

    @property
    def n_q(self) -> int:
        return -(-self.t // self.block_q)

    @property
    def n_k(self) -> int:
        return -(-self.s // self.block_k)


def attend_in_blocks(
    rule: Rule,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s hk k"],
    v: Float[Array, "b s hk kv"],
    mask: Mask,
    *,
    block_q: int,
    block_k: int,
) -> tuple[Float[Array, "b t h kv"], Float[Array, "b t h"]]:
    """(out, lse) of checked arguments; blocks have at most block_q queries and block_k keys."""
    plan = plan_blocks(rule, q, k, mask, block_q, block_k)
    # One type for all under shard_map: a custom gradient must have the type of its input.
    q, k, v, mask = jax.tree.map(lambda x: vary_like(x, q, k, v, mask), (q, k, v, mask))
    return _attend(plan, q, k, v, mask)


def plan_blocks(rule: Rule, q, k, mask: Mask, block_q: int, block_k: int) -> Plan:
    """The plan of `forward_in_blocks` and `backward_in_blocks` for q [b, t, h, k], k [b, s, hk, k]."""
    t, s = q.shape[1], k.shape[1]
    return Plan(
        rule, t, s, even_block(t, block_q), even_block(s, block_k), mask.q_positions is None
    )


def default_block(rows: int) -> int:
    """Block size for b * h = `rows`: 512, halved to 128 at least while rows * block^2 > 2^20.

    Larger intermediates leave the caches: on a CPU, forward and backward took twice the time.
    """
    return next((block for block in (512, 256) if rows * block**2 <= 2**20), 128)


def even_block(length: int, block: int) -> int:
    """Block size, a multiple of 8 where that fits, for as many blocks but with less padding."""
    n = -(-length // block)
    return min(length, block, -(-length // (8 * n)) * 8)


def _pad(x: jax.Array, block: int, mode: str = "constant") -> jax.Array:
    """Axis 1 in whole blocks."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2), mode)


def _at(x: jax.Array, i, block: int) -> jax.Array:
    """Block i of axis 1. Whole arrays are never transposed: that would be a copy of each."""
    return jax.lax.dynamic_slice_in_dim(x, i * block, block, 1)


def _put(x: jax.Array, i, part: jax.Array) -> jax.Array:
    """`x` with block i of axis 1 replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, part.astype(x.dtype), i * part.shape[1], 1)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    tail = "k" if x.ndim == 4 else ""
    return rearrange(x, f"b t (h g) {tail} -> b h g t {tail}", h=kv_heads)


def _flat(x: jax.Array) -> jax.Array:
    tail = "k" if x.ndim == 5 else ""
    return rearrange(x, f"b h g t {tail} -> b t (h g) {tail}")


def _keys(x: jax.Array, j, block: int) -> jax.Array:
    return rearrange(_at(x, j, block), "b t h k -> b h t k")


def _cut_mask(plan: Plan, mask: Mask) -> Mask:
    """Blocks [n, b, block] of positions and segments, padded so that no more pairs are allowed."""
    sizes = (plan.block_q, plan.block_k, plan.block_q, plan.block_k)

    def cut(x, block):
        return None if x is None else rearrange(_pad(x, block, "edge"), "b (n t) -> n b t", t=block)

    return Mask(*map(cut, mask, sizes))


def _allowed(plan: Plan, cut: Mask, i, j) -> jax.Array | None:
    """Mask of query block i against key block j, padded keys excluded."""
    rows = i * plan.block_q + jnp.arange(plan.block_q)
    columns = j * plan.block_k + jnp.arange(plan.block_k)
    qp = rows[None] if cut.q_positions is None else cut.q_positions[i]
    kp = columns[None] if cut.k_positions is None else cut.k_positions[j]
    qs = None if cut.q_segments is None else cut.q_segments[i]
    ks = None if cut.k_segments is None else cut.k_segments[j]
    allowed = allowed_pairs(plan.rule, qp, kp, qs, ks)
    if plan.s % plan.block_k:
        real = (columns < plan.s)[None, None, None, None]
        allowed = real if allowed is None else allowed & real
    return allowed


def key_blocks(plan: Plan, i):
    """First and last + 1 key block that query block i can see by causality and window."""
    low, high = 0, plan.n_k
    if not plan.natural:
        return low, high
    window = plan.rule.window
    first, last = i * plan.block_q, (i + 1) * plan.block_q - 1
    if window is not None:
        low = jnp.maximum(first - window + 1, 0) // plan.block_k
        high = jnp.minimum((last + window - 1) // plan.block_k + 1, plan.n_k)
    if plan.rule.causal:
        high = jnp.minimum(last // plan.block_k + 1, plan.n_k)
    return low, high


def query_blocks(plan: Plan, j):
    """First and last + 1 query block that can see key block j."""
    low, high = 0, plan.n_q
    if not plan.natural:
        return low, high
    window = plan.rule.window
    first, last = j * plan.block_k, (j + 1) * plan.block_k - 1
    if window is not None:
        low = jnp.maximum(first - window + 1, 0) // plan.block_q
        high = jnp.minimum((last + window - 1) // plan.block_q + 1, plan.n_q)
    if plan.rule.causal:
        low = jnp.minimum(first // plan.block_q, plan.n_q)
    return low, high


def _visible(plan: Plan, cut: Mask) -> Bool[Array, "n m"] | None:
    """Pairs of blocks whose ranges of positions and segments allow that one sees the other.

    Made once, before the loops: under automatic sharding it costs a collective over the batch.
    """
    tests = []

    def ends(queries, keys):
        q, k = queries[:, None], keys[None]
        return jnp.min(q, -1), jnp.max(q, -1), jnp.min(k, -1), jnp.max(k, -1)

    window = plan.rule.window
    if cut.q_positions is not None:
        q0, q1, k0, k1 = ends(cut.q_positions, cut.k_positions)
        if plan.rule.causal:
            tests.append(k0 <= q1)
        if window is not None:
            tests.append((k0 - q1 < window) & (q0 - k1 < window))
    if cut.q_segments is not None:
        q0, q1, k0, k1 = ends(cut.q_segments, cut.k_segments)
        tests.append((k0 <= q1) & (q0 <= k1))
    return jnp.any(functools.reduce(jnp.logical_and, tests), -1) if tests else None


def _where_visible(visible, i, j, step, idle):
    """`step()`, at run time `idle()` for a pair of blocks that is not visible."""
    return step() if visible is None else jax.lax.cond(visible[i, j], step, idle)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, mask: Mask):
    return _forward(plan, q, k, v, mask)[0]


def _forward(plan: Plan, q, k, v, mask: Mask):
    out, lse = forward_in_blocks(plan, q, k, v, mask)
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return (out, lse), (q, k, v, mask, out, lse)


def _backward(plan: Plan, saved, cotangents):
    q, k, v, mask, *_ = saved
    # Narrow types leave the loop, so that no whole dk or dv exists in the wide one.
    dq, dk, dv = backward_in_blocks(plan, *saved, *cotangents, dtypes=(k.dtype, v.dtype))
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), mask)
    return dq.astype(q.dtype), dk, dv, nothing


_attend.defvjp(_forward, _backward)


def forward_in_blocks(
    plan: Plan, q, k, v, mask: Mask
) -> tuple[Float[Array, "b t h kv"], Float[Array, "b t h"]]:
    """(out, lse), not differentiable: `attend_in_blocks` is."""
    hk, wide = k.shape[2], wide_type(q)
    cut = _cut_mask(plan, mask)
    visible = _visible(plan, cut)
    ks, vs = _pad(k, plan.block_k), _pad(v, plan.block_k)
    qs = _pad(q, plan.block_q)

    def one(done, i):
        qi = _grouped(_at(qs, i, plan.block_q), hk)

        def body(j, carry):
            allowed = _allowed(plan, cut, i, j)

            def step():
                acc, top, total = carry
                z = logits(plan.rule, qi, _keys(ks, j, plan.block_k))
                if allowed is not None:
                    z = jnp.where(allowed, z, -jnp.inf)
                new = jnp.maximum(top, jnp.max(z, -1))
                safe = jnp.where(new > -jnp.inf, new, 0)
                p = jnp.exp(z - safe[..., None])
                fade = jnp.exp(top - safe)
                vj = _keys(vs, j, plan.block_k)
                part = jnp.einsum(
                    "bhgts,bhsk->bhgtk", p.astype(v.dtype), vj, preferred_element_type=wide
                )
                return acc * fade[..., None] + part, new, total * fade + jnp.sum(p, -1)

            return _where_visible(visible, i, j, step, lambda: carry)

        shape = qi.shape[:-1]
        start = (
            jnp.zeros((*shape, v.shape[-1]), wide),
            jnp.full(shape, -jnp.inf, wide),
            jnp.zeros(shape, wide),
        )
        start = jax.tree.map(lambda x: vary_like(x, q), start)
        acc, top, total = loop_at_most(plan.n_k, *key_blocks(plan, i), body, start)
        some = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, top + jnp.log(some), -jnp.inf)
        parts = _flat(acc / some[..., None]), _flat(lse)
        return jax.tree.map(lambda x, part: _put(x, i, part), done, parts), None

    rows = qs.shape[:3]
    # Every block is written: what is there before does not matter.
    start = qs if k.shape == v.shape else _zeros(q, (*rows, v.shape[-1]), q.dtype)
    start = start, _zeros(q, rows, wide)
    (out, lse), _ = jax.lax.scan(one, start, jnp.arange(plan.n_q))
    return out[:, : plan.t], lse[:, : plan.t]


def backward_in_blocks(
    plan: Plan, q, k, v, mask: Mask, out, lse, dout, dlse, *, dtypes=(None, None)
) -> tuple[Float[Array, "b t h k"], Float[Array, "b s hk k"], Float[Array, "b s hk kv"]]:
    """Gradients (dq, dk, dv) in the wide type, the latter two in `dtypes` where given.

    `out` and `lse` may be those of attention to more keys than `k`: the result is then the part of
    the gradients that these keys have, which is what attention in several places adds up.
    """
    hk, wide, softcap = k.shape[2], wide_type(q), plan.rule.softcap
    of_k, of_v = (wide if dtype is None else dtype for dtype in dtypes)
    cut = _cut_mask(plan, mask)
    visible = _visible(plan, cut)
    # d lse / d logit = p, d out / d logit = p (v - out): both gradients in one row sum.
    delta = jnp.sum(dout.astype(wide) * out.astype(wide), -1)
    delta -= jnp.where(lse > -jnp.inf, dlse, 0)
    rows = [_pad(x, plan.block_q) for x in (q, dout, lse, delta)]
    ks, vs = _pad(k, plan.block_k), _pad(v, plan.block_k)

    def one(carry, j):
        dq, *done = carry
        kj, vj = (_keys(x, j, plan.block_k) for x in (ks, vs))

        def body(i, carry):
            dq, dk, dv = carry
            allowed = _allowed(plan, cut, i, j)

            def step():
                qi, doi, lsei, deltai = (_grouped(_at(x, i, plan.block_q), hk) for x in rows)
                z = logits(plan.rule, qi, kj)
                p = jnp.exp(z - lsei[..., None])
                # Also where a row sees nothing: its lse is -inf and the exponential inf.
                if allowed is not None:
                    p = jnp.where(allowed, p, 0)
                dp = jnp.einsum("bhgtk,bhsk->bhgts", doi, vj, preferred_element_type=wide)
                dz = p * (dp - deltai[..., None]) * plan.rule.scale
                if softcap is not None:
                    dz *= 1 - jnp.square(z / softcap)
                dz, p = dz.astype(q.dtype), p.astype(dout.dtype)
                return (
                    _flat(jnp.einsum("bhgts,bhsk->bhgtk", dz, kj, preferred_element_type=wide)),
                    dk + jnp.einsum("bhgtk,bhgts->bhks", qi, dz, preferred_element_type=wide),
                    dv + jnp.einsum("bhgtk,bhgts->bhks", doi, p, preferred_element_type=wide),
                )

            old = _at(dq, i, plan.block_q)
            dqi, dk, dv = _where_visible(visible, i, j, step, lambda: (old * 0, dk, dv))
            return _put(dq, i, old + dqi), dk, dv

        # Gradients of keys as [k, s]: the large factor, [t, s], is then never transposed.
        start = (dq, *(_zeros(x, x.mT.shape, wide) for x in (kj, vj)))
        dq, *parts = loop_at_most(plan.n_q, *query_blocks(plan, j), body, start)
        parts = [rearrange(x, "b h k t -> b t h k") for x in parts]
        return (dq, *map(lambda x, part: _put(x, j, part), done, parts)), None

    start = (_zeros(q, rows[0].shape, wide), ks.astype(of_k), vs.astype(of_v))
    (dq, dk, dv), _ = jax.lax.scan(one, start, jnp.arange(plan.n_k))
    return dq[:, : plan.t], dk[:, : plan.s], dv[:, : plan.s]


def _zeros(ref: jax.Array, shape: tuple[int, ...], dtype) -> jax.Array:
    """Of the type of `ref` inside shard_map."""
    return vary_like(jnp.zeros(shape, dtype), ref)
