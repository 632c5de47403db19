"""Exact softmax attention on one device: the dense form, and a blockwise one with its own gradient.

logit = scale * q.k, then softcap * tanh(logit / softcap) if given. Query i may see key j iff
(not causal or j <= i) and (window is None or |i - j| < window) and their segment ids are equal,
where i and j are positions. A row that sees nothing has out 0, lse -inf and gradient 0. Logits and
accumulators are float32, float64 when the inputs are. Source: papers' note on UPipe, section 9.1.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int


class Mask(NamedTuple):
    """What decides who sees whom: static rule, positions, segments. Positions None: 0, 1, 2..."""

    q_positions: Int[Array, "b t"] | None
    k_positions: Int[Array, "b s"] | None
    q_segments: Int[Array, "b t"] | None
    k_segments: Int[Array, "b s"] | None


class Rule(NamedTuple):
    """The static part of attention."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None
    block_q: int = 0
    block_k: int = 0


def apply_rope(
    x: Float[Array, "b t h k"], positions: Int[Array, "b t"], inv_freq: Float[Array, "half"] | None
) -> Float[Array, "b t h k"]:
    """Rotates pairs (x1, x2) of the two halves of the head by position * inv_freq.

    [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin], computed in float32 (float64 if x is), returned
    in x.dtype; `inv_freq` [k / 2], None is the identity.
    """
    if inv_freq is None:
        return x
    if x.shape[-1] != 2 * inv_freq.shape[-1]:
        raise ValueError(f"x has head dim {x.shape[-1]}, inv_freq {inv_freq.shape[-1]}: need half")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angle = positions[..., None].astype(wide) * jnp.asarray(inv_freq, wide)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    x1, x2 = jnp.split(x.astype(wide), 2, -1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


def _prepare(q, k, v, causal, scale, segment_ids, window, softcap, positions, k_segment_ids):
    """Checks the arguments; returns the static rule and the mask."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, length, heads, head dim], got {x.shape}")
    b, t, h, d = q.shape
    s, hk = k.shape[1:3]
    if k.shape != (b, s, hk, d) or v.shape[:3] != (b, s, hk):
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}")
    if h % hk:
        raise ValueError(f"query heads {h} must be a multiple of key/value heads {hk}")
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1 or None")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive or None")
    q_positions, k_positions = positions
    if (q_positions is None) != (k_positions is None):
        raise ValueError("q_positions and k_positions must be given together")
    if q_positions is None and t != s:
        raise ValueError(f"lengths {t} of q and {s} of k differ: give q_positions and k_positions")
    if k_segment_ids is None:
        k_segment_ids = segment_ids
    for name, x, shape in (
        ("segment_ids", segment_ids, (b, t)),
        ("k_segment_ids", k_segment_ids, (b, s)),
        ("q_positions", q_positions, (b, t)),
        ("k_positions", k_positions, (b, s)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} must be {shape}, got {x.shape}")
    scale = d**-0.5 if scale is None else scale
    rule = Rule(bool(causal), float(scale), window, softcap)
    return rule, Mask(q_positions, k_positions, segment_ids, k_segment_ids)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _allowed(rule: Rule, qp, kp, qs, ks) -> jax.Array | None:
    """Boolean [b or 1, 1, 1, t, s] of the pairs that may see each other; None: all."""
    tests = []
    if rule.causal:
        tests.append(kp[:, None, :] <= qp[:, :, None])
    if rule.window is not None:
        tests.append(jnp.abs(qp[:, :, None] - kp[:, None, :]) < rule.window)
    if qs is not None:
        tests.append(qs[:, :, None] == ks[:, None, :])
    return functools.reduce(jnp.logical_and, tests)[:, None, None] if tests else None


def _logits(rule: Rule, q, k) -> jax.Array:
    """[b hk g t s] in the wide type, soft-capped."""
    z = jnp.einsum("bthgk,bshk->bhgts", q, k, preferred_element_type=_wide(q)) * rule.scale
    return z if rule.softcap is None else rule.softcap * jnp.tanh(z / rule.softcap)


def _grouped(q: jax.Array, hk: int) -> jax.Array:
    b, t, h, d = q.shape
    return q.reshape(b, t, hk, h // hk, d)


def dense_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s hk k"],
    v: Float[Array, "b s hk kv"],
    *,
    causal: bool = True,
    scale: float | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    q_positions: Int[Array, "b t"] | None = None,
    k_positions: Int[Array, "b s"] | None = None,
    k_segment_ids: Int[Array, "b s"] | None = None,
):
    """Attention with all logits [b, h, t, s] at once: the obvious form, and the reference.

    Returns out [b, t, h, kv] in q.dtype, with `return_lse` also lse [b, t, h], the natural logarithm
    of the sum of exp(logit). `scale` None is k**-0.5; query head i reads key head i // (h / hk).
    Unequal lengths (decoding) need explicit positions. ValueError for shapes that do not fit.
    """
    rule, mask = _prepare(
        q, k, v, causal, scale, segment_ids, window, softcap,
        (q_positions, k_positions), k_segment_ids,
    )  # fmt: skip
    b, t, h, _ = q.shape
    s, hk = k.shape[1:3]
    qp = jnp.arange(t)[None] if mask.q_positions is None else mask.q_positions
    kp = jnp.arange(s)[None] if mask.k_positions is None else mask.k_positions
    z = _logits(rule, _grouped(q, hk), k)
    allowed = _allowed(rule, qp, kp, mask.q_segments, mask.k_segments)
    if allowed is not None:
        z = jnp.where(allowed, z, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(z, -1, keepdims=True))
    top = jnp.where(top > -jnp.inf, top, 0)
    p = jnp.exp(z - top)
    total = jnp.sum(p, -1, keepdims=True)
    some = jnp.where(total > 0, total, 1)
    out = jnp.einsum(
        "bhgts,bshk->bthgk", (p / some).astype(v.dtype), v, preferred_element_type=_wide(v)
    )
    out = checkpoint_name(out.reshape(b, t, h, -1).astype(q.dtype), "attn_out")
    if not return_lse:
        return out
    lse = jnp.where(total > 0, top + jnp.log(some), -jnp.inf)[..., 0]
    lse = checkpoint_name(jnp.moveaxis(lse, 3, 1).reshape(b, t, h), "attn_lse")
    return out, lse


def blockwise_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s hk k"],
    v: Float[Array, "b s hk kv"],
    *,
    causal: bool = True,
    scale: float | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    block_q: int = 512,
    block_k: int = 512,
    q_positions: Int[Array, "b t"] | None = None,
    k_positions: Int[Array, "b s"] | None = None,
    k_segment_ids: Int[Array, "b s"] | None = None,
):
    """`dense_attention` in blocks of queries and keys, with an online softmax and its own gradient.

    Memory O(block_q * block_k) a head beyond inputs and outputs, forward and backward; lengths need
    not be multiples of the blocks. Without explicit positions, blocks that causality or the window
    exclude are skipped (about half the work for causal). The backward pass recomputes probabilities
    from lse (Dao et al., 2022). The output is named 'attn_out', lse 'attn_lse', for remat policies.
    """
    rule, mask = _prepare(
        q, k, v, causal, scale, segment_ids, window, softcap,
        (q_positions, k_positions), k_segment_ids,
    )  # fmt: skip
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q={block_q} and block_k={block_k} must be at least 1")
    rule = rule._replace(block_q=min(block_q, q.shape[1]), block_k=min(block_k, k.shape[1]))
    out, lse = _blockwise(rule, q, k, v, mask)
    return (out, lse) if return_lse else out


def _varying(*refs) -> set[str]:
    axes: set[str] = set()
    for x in jax.tree.leaves(refs):
        kind = getattr(jax.typeof(x), "manual_axis_type", None)
        axes |= set(kind.varying if kind is not None else getattr(jax.typeof(x), "vma", ()))
    return axes


def vary_like(x: jax.Array, *refs) -> jax.Array:
    """`x` typed as device-varying over the manual mesh axes of `refs`; identity outside shard_map.

    Scan carries under shard_map must have the type that the body returns.
    """
    missing = tuple(sorted(_varying(*refs) - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _cut(x, block: int, fill=0):
    """[b, t, ...] -> [n, b, block, ...], padded at the end with `fill`."""
    if x is None:
        return None
    pad = -x.shape[1] % block
    x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    """Inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


class _Blocks(NamedTuple):
    """Position and segment blocks of both sides, cut once."""

    qp: jax.Array | None
    kp: jax.Array | None
    qs: jax.Array | None
    ks: jax.Array | None
    t: int
    s: int


def _cut_mask(rule: Rule, mask: Mask, t: int, s: int) -> _Blocks:
    return _Blocks(
        _cut(mask.q_positions, rule.block_q),
        _cut(mask.k_positions, rule.block_k),
        _cut(mask.q_segments, rule.block_q, -1),
        _cut(mask.k_segments, rule.block_k, -2),
        t, s,
    )  # fmt: skip


def _block_allowed(rule: Rule, blocks: _Blocks, i, j) -> jax.Array | None:
    """Mask of query block i against key block j, padding excluded."""
    rows = i * rule.block_q + jnp.arange(rule.block_q)
    columns = j * rule.block_k + jnp.arange(rule.block_k)
    qp = rows[None] if blocks.qp is None else blocks.qp[i]
    kp = columns[None] if blocks.kp is None else blocks.kp[j]
    qs = None if blocks.qs is None else blocks.qs[i]
    ks = None if blocks.ks is None else blocks.ks[j]
    allowed = _allowed(rule, qp, kp, qs, ks)
    if blocks.s % rule.block_k:
        real = (columns < blocks.s)[None, None, None, None]
        allowed = real if allowed is None else allowed & real
    return allowed


def _key_range(rule: Rule, blocks: _Blocks, i):
    """First and last + 1 key block that query block i can see."""
    n = math.ceil(blocks.s / rule.block_k)
    if blocks.qp is not None:
        return 0, n
    first, last = i * rule.block_q, (i + 1) * rule.block_q - 1
    low, high = 0, n
    if rule.causal:
        high = jnp.minimum(last // rule.block_k + 1, n)
    if rule.window is not None:
        low = jnp.maximum(first - rule.window + 1, 0) // rule.block_k
        if not rule.causal:
            high = jnp.minimum((last + rule.window - 1) // rule.block_k + 1, n)
    return low, high


def _query_range(rule: Rule, blocks: _Blocks, j):
    """First and last + 1 query block that can see key block j."""
    n = math.ceil(blocks.t / rule.block_q)
    if blocks.qp is not None:
        return 0, n
    first, last = j * rule.block_k, (j + 1) * rule.block_k - 1
    low, high = 0, n
    if rule.causal:
        low = jnp.minimum(first // rule.block_q, n)
    if rule.window is not None:
        high = jnp.minimum((last + rule.window - 1) // rule.block_q + 1, n)
        if not rule.causal:
            low = jnp.maximum(first - rule.window + 1, 0) // rule.block_q
    return low, high


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(rule: Rule, q, k, v, mask: Mask):
    return _forward(rule, q, k, v, mask)[0]


def _forward(rule: Rule, q, k, v, mask: Mask):
    b, t, h, _ = q.shape
    s, hk = k.shape[1:3]
    wide = _wide(q)
    blocks = _cut_mask(rule, mask, t, s)
    qs, ks, vs = _cut(_grouped(q, hk), rule.block_q), _cut(k, rule.block_k), _cut(v, rule.block_k)

    def one(args):
        i, qi = args
        shape = (b, hk, h // hk, rule.block_q)
        start = (
            vary_like(jnp.zeros((*shape, v.shape[-1]), wide), q, k, v, mask),
            vary_like(jnp.full(shape, -jnp.inf, wide), q, k, v, mask),
            vary_like(jnp.zeros(shape, wide), q, k, v, mask),
        )

        def body(j, carry):
            acc, top, total = carry
            z = _logits(rule, qi, ks[j])
            allowed = _block_allowed(rule, blocks, i, j)
            if allowed is not None:
                z = jnp.where(allowed, z, -jnp.inf)
            new = jnp.maximum(top, jnp.max(z, -1))
            safe = jnp.where(new > -jnp.inf, new, 0)
            p = jnp.exp(z - safe[..., None])
            fade = jnp.exp(top - safe)
            part = jnp.einsum(
                "bhgts,bshk->bhgtk", p.astype(v.dtype), vs[j], preferred_element_type=wide
            )
            return acc * fade[..., None] + part, new, total * fade + jnp.sum(p, -1)

        acc, top, total = jax.lax.fori_loop(*_key_range(rule, blocks, i), body, start)
        some = jnp.where(total > 0, total, 1)
        lse = jnp.where(total > 0, top + jnp.log(some), -jnp.inf)
        out = (acc / some[..., None]).astype(q.dtype)
        return jnp.moveaxis(out, 3, 1), jnp.moveaxis(lse, 3, 1)

    out, lse = jax.lax.map(one, (jnp.arange(qs.shape[0]), qs))
    out, lse = _join(out, t).reshape(b, t, h, -1), _join(lse, t).reshape(b, t, h)
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return (out, lse), (q, k, v, mask, out, lse)


def _backward(rule: Rule, saved, cotangents):
    q, k, v, mask, out, lse = saved
    dout, dlse = cotangents
    b, t, h, d = q.shape
    s, hk = k.shape[1:3]
    wide = _wide(q)
    blocks = _cut_mask(rule, mask, t, s)
    grouped = lambda x: _cut(_grouped(x, hk), rule.block_q)  # noqa: E731
    # A row that sees nothing: lse 0 instead of -inf keeps exp(-inf - lse) at 0.
    safe = jnp.where(lse > -jnp.inf, lse, 0)
    delta = jnp.sum(dout.astype(wide) * out.astype(wide), -1) - dlse.astype(wide)
    rows = lambda x: jnp.moveaxis(grouped(x[..., None])[..., 0], 2, 4)  # noqa: E731  [n b hk g t]
    qs, dos, lses, deltas = grouped(q), grouped(dout), rows(safe), rows(delta)
    ks, vs = _cut(k, rule.block_k), _cut(v, rule.block_k)
    dq = vary_like(jnp.zeros((*qs.shape,), wide), q, k, v, mask, dout)

    def one(dq, args):
        j, kj, vj = args
        zero = lambda x: vary_like(jnp.zeros(x.shape, wide), q, k, v, mask, dout)  # noqa: E731

        def body(i, carry):
            dq, dk, dv = carry
            z = _logits(rule, qs[i], kj)
            allowed = _block_allowed(rule, blocks, i, j)
            p = jnp.exp(z - lses[i][..., None])
            if allowed is not None:
                p = jnp.where(allowed, p, 0)
            dv += jnp.einsum(
                "bhgts,bthgk->bshk", p.astype(dout.dtype), dos[i], preferred_element_type=wide
            )
            dp = jnp.einsum("bthgk,bshk->bhgts", dos[i], vj, preferred_element_type=wide)
            dz = p * (dp - deltas[i][..., None]) * rule.scale
            if rule.softcap is not None:
                dz *= 1 - jnp.square(z / rule.softcap)
            dz = dz.astype(q.dtype)
            dk += jnp.einsum("bhgts,bthgk->bshk", dz, qs[i], preferred_element_type=wide)
            dqi = jnp.einsum("bhgts,bshk->bthgk", dz, kj, preferred_element_type=wide)
            return dq.at[i].add(dqi), dk, dv

        start = (dq, zero(kj), zero(vj))
        dq, dk, dv = jax.lax.fori_loop(*_query_range(rule, blocks, j), body, start)
        return dq, (dk.astype(k.dtype), dv.astype(v.dtype))

    dq, (dk, dv) = jax.lax.scan(one, dq, (jnp.arange(ks.shape[0]), ks, vs))
    dq = _join(dq, t).reshape(b, t, h, d).astype(q.dtype)
    return dq, _join(dk, s), _join(dv, s), jax.tree.map(_no_gradient, mask)


def _no_gradient(x: jax.Array):
    return jnp.zeros(x.shape, jax.dtypes.float0)


_blockwise.defvjp(_forward, _backward)
