"""TPU attention: JAX's splash kernels, piece after piece of a sequence of any length.

The kernels' own mask classes look at every pair of tokens on the host: minutes at 256K tokens. Which
blocks are empty, whole or neither follows from their first and last tokens alone. These tables go to
scalar memory, which holds those of some rows of blocks only, and what the kernels write is padded to
128 lanes: so queries are taken in pieces, and keys in the pass for their gradients, there with some
rows of queries at a time.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlab.masks import Rule

_LANES = 128  # of a TPU register: what lengths and head dims must be multiples of
_MOST_BLOCKS = 128 * 1024  # of a piece: two tables of them fill most of the scalar memory
_MOST_ROWS = 2048  # of the tables by keys: each is padded to 128 lanes, however few blocks it has
_LEAST_BLOCKS = 64  # a side of a piece, where the table allows it: fewer are not worth a kernel


def splash_problem(q) -> str:
    """Why the kernel cannot take q [b, t, h, k]; '' if it can."""
    t, d = q.shape[1], q.shape[3]
    if d % _LANES or t % _LANES:
        return f"splash needs a length and a head dim divisible by {_LANES}, got {t} and {d}"
    if jnp.dtype(q.dtype).itemsize > 4:
        return f"splash computes in float32, got {q.dtype}"
    return ""


def splash_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t hk k"],
    v: Float[Array, "b t hk k"],
    *,
    causal: bool,
    scale: float,
    segment_ids: Int[Array, "b t"] | None,
    window: int | None,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "b t h k"]:
    """`dense_attention` by the kernels; `interpret` runs them anywhere, slowly."""
    how = _How(Rule(causal, 1.0, window, softcap), interpret, *_pieces(q.shape[1]))
    # Heads first, those that share keys together: the kernels are for one key head.
    q = rearrange(q * jnp.asarray(scale, q.dtype), "b t (h g) k -> b h g t k", h=k.shape[2])
    k, v = (rearrange(x, "b t h k -> b h t k") for x in (k, v))
    heads = jax.vmap(functools.partial(_attend, how), (0, 0, 0, None))
    out = jax.vmap(heads, (0, 0, 0, None if segment_ids is None else 0))(q, k, v, segment_ids)
    return rearrange(out, "b h g t k -> b t (h g) k")


def _pieces(length: int) -> tuple[int, int, int]:
    """Tokens of a block, of a piece (an eighth of the sequence) and of its rows, within the limits above."""
    block = next(b for b in (1024, 512, 256, 128) if length % b == 0)
    n = length // block
    most = max(1, min(_MOST_BLOCKS // n, max(n // 8, _LEAST_BLOCKS)))
    whole = lambda limit: block * next(c for c in range(min(limit, n), 0, -1) if n % c == 0)  # noqa: E731
    return block, whole(most), whole(_MOST_ROWS)


class _How(NamedTuple):
    """What is static: mask, whether to interpret, tokens of a block, of a piece, of its rows of queries."""

    rule: Rule
    interpret: bool
    block: int
    piece: int
    rows: int

    @property
    def keywords(self) -> dict[str, Any]:
        """Of all kernels."""
        masked = self.rule.causal or self.rule.window is not None
        return dict(
            is_mqa=True, mask_value=_lib("kernel").DEFAULT_MASK_VALUE, interpret=self.interpret,
            attn_logits_soft_cap=self.rule.softcap,
            mask_function=functools.partial(_allowed, self.rule) if masked else None,
        )  # fmt: skip

    def info(self, by_keys: bool, queries, keys, length_q: int, length_k: int):
        """The mask of queries and keys whose first ones have these positions, for a kernel."""
        starts = lambda first, length: (  # noqa: E731
            first + jnp.arange(0, length, self.block, dtype=jnp.int32)
        )
        kinds = block_kinds(
            self.rule, starts(queries, length_q), starts(keys, length_k), self.block
        )
        small = jnp.int8 if max(kinds.shape) <= 128 else jnp.int16
        # Of the queries as the kernel counts the keys, which is from 0.
        places = queries - keys + jnp.arange(length_q, dtype=jnp.int32)
        return _lib("mask_info").MaskInfo(
            next_blocks(kinds, by_keys).astype(small)[None], None, kinds.astype(jnp.int8)[None],
            None, places if self.keywords["mask_function"] else None,
        )  # fmt: skip

    def pieces(self, function: Callable, start: Any, length: int):
        """`function(i, carry)` for the first token i of each piece of `length` tokens."""
        turn = lambda n, carry: function(n * self.piece, carry)  # noqa: E731
        return jax.lax.fori_loop(0, length // self.piece, turn, start)

    def cut(self, x, i, axis: int, length: int | None = None):
        """The piece of x from token i."""
        return jax.lax.dynamic_slice_in_dim(x, i, length or self.piece, axis)

    def segments(self, queries, keys):
        """What kernels take, of the segments of queries and of keys."""
        return None if queries is None else _lib("kernel").SegmentIds(queries, keys)

    def segment_piece(self, ids, i, length: int | None = None):
        """The piece of the segments from token i, if there are segments."""
        return None if ids is None else self.cut(ids, i, 0, length)


def _lib(name: str) -> Any:
    package = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_"
    return importlib.import_module(package + name)


def _allowed(rule: Rule, i, j):
    """Of the positions of queries and keys."""
    tests = [j <= i] if rule.causal else []
    if rule.window is not None:
        tests += [i - j < rule.window, j - i < rule.window]
    return functools.reduce(jnp.logical_and, tests)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, q, k, v, segments):
    """Of q [g, t, k], scaled, over one key/value head [t, k]."""
    return _forward(how, q, k, v, segments)[0]


def _forward(how: _How, q, k, v, segments):
    g, t, _ = q.shape
    sizes = _lib("kernel").BlockSizes(block_q=how.block, block_kv=how.block)

    def piece(i, carry):
        info = how.info(False, i, 0, how.piece, t)
        kernel = _lib("kernel").SplashAttentionKernel(
            info, None, None, block_sizes=sizes, save_residuals=True,
            residual_checkpoint_name=None, **how.keywords,
        )  # fmt: skip
        ids = how.segments(how.segment_piece(segments, i), segments)
        out, (lse,) = kernel(how.cut(q, i, 1), k, v, ids)
        put = jax.lax.dynamic_update_slice_in_dim
        return put(carry[0], out, i, 1), put(carry[1], lse, i, 1)

    start = jnp.zeros((g, t, v.shape[1]), q.dtype), jnp.zeros((g, t), jnp.float32)
    out, lse = how.pieces(piece, start, t)
    out, lse = checkpoint_name(out, "attn_out"), checkpoint_name(lse, "attn_lse")
    return out, (q, k, v, segments, out, lse)


def _backward(how: _How, saved, dout):
    q, k, v, segments, out, lse = saved
    t, lib, wide = q.shape[1], _lib("kernel"), jnp.float32
    seq_minor = {
        name: lib.QKVLayout.HEAD_DIM_MINOR for name in ("q_layout", "k_layout", "v_layout")
    }
    common = dict(bq=how.block, bkv=how.block, sinks=None, **seq_minor, **how.keywords)
    di = jnp.einsum("gtk,gtk->gt", out, dout, preferred_element_type=wide)
    put = jax.lax.dynamic_update_slice_in_dim

    def queries(i, dq):
        part = lib._splash_attention_bwd_dq(
            q=how.cut(q, i, 1), k=k, v=v,
            segment_ids=how.segments(how.segment_piece(segments, i), segments),
            logsumexp=how.cut(lse, i, 1), do=how.cut(dout, i, 1), di=how.cut(di, i, 1),
            mask_info=how.info(False, i, 0, how.piece, t), **common,
        )  # fmt: skip
        return put(dq, part, i, 1)

    def keys(i, carry):
        def seen_from(j):
            """Gradients of the keys and values of the piece from token i by the rows from token j."""
            at = lambda x: how.cut(x, j, 1, how.rows)  # noqa: E731
            ids = how.segment_piece(segments, j, how.rows), how.segment_piece(segments, i)
            _, *parts = lib._splash_attention_bwd_dkv(
                q=at(q), k=how.cut(k, i, 0), v=how.cut(v, i, 0), logsumexp=at(lse), do=at(dout),
                di=at(di), segment_ids=how.segments(*ids), bkv_compute=how.block,
                mask_info=how.info(True, j, i, how.rows, how.piece), use_fused_bwd_kernel=False,
                **common,
            )  # fmt: skip
            return parts

        def add(n, sums):
            return [x + part for x, part in zip(sums, seen_from(n * how.rows), strict=True)]

        if how.rows == t:
            parts = seen_from(0)
        else:
            start = [jnp.zeros_like(how.cut(x, i, 0), dtype=wide) for x in (k, v)]
            parts = jax.lax.fori_loop(0, t // how.rows, add, start)
        return tuple(put(x, p.astype(x.dtype), i, 0) for x, p in zip(carry, parts, strict=True))

    dk, dv = how.pieces(keys, (jnp.zeros_like(k), jnp.zeros_like(v)), t)
    dq = how.pieces(queries, jnp.zeros_like(q), t)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def block_kinds(
    rule: Rule, queries: Int[Array, "n"], keys: Int[Array, "m"], block: int
) -> Int[Array, "n m"]:
    """0 where no query of the block sees a key of it, 2 where each sees all, else 1.

    `queries` and `keys` are the first positions of blocks of `block` tokens.
    """
    # Of query minus key, in a block: the least and the most.
    least = queries[:, None] - keys[None] - (block - 1)
    most = least + 2 * (block - 1)
    some = every = jnp.full(least.shape, True)
    if rule.causal:
        some, every = most >= 0, least >= 0
    if rule.window is not None:
        some &= (most > -rule.window) & (least < rule.window)
        every &= (least > -rule.window) & (most < rule.window)
    return some + (some & every).astype(jnp.int32)


def next_blocks(kinds: Int[Array, "n m"], by_keys: bool) -> Int[Array, "n m"]:
    """At each place of the walk, the block to fetch for the next one that is not empty.

    A walk goes by queries, then by keys, and gives blocks of keys; `by_keys` the other way round.
    """
    walk = kinds.T if by_keys else kinds
    places = jnp.arange(walk.size, dtype=jnp.int32)
    there = jnp.where(walk.reshape(-1) > 0, places, walk.size)
    # From the end back: the first one at or after each place, or else the first of all.
    following = jax.lax.cummin(there, reverse=True)
    following = jnp.where(following < walk.size, following, following[0])
    blocks = (following % walk.shape[1]).reshape(walk.shape)
    return blocks.T if by_keys else blocks
