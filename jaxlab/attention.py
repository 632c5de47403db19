"""Exact softmax attention on one device: the dense form, and the blockwise one of the same contract.

A query that sees no key has out 0, lse -inf and gradient 0. Logits and accumulators are float32,
float64 when the inputs are. The mask rule and the logits are in jaxlab.masks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxlab.arguments import wide_type
from jaxlab.blockwise import attend_in_blocks, default_block
from jaxlab.masks import Rule, allowed_pairs, check_attention, group_heads, logits
from jaxlab.rope import apply_rope
from jaxlab.varying import vary_like

__all__ = ["apply_rope", "blockwise_attention", "cached_attention", "dense_attention", "vary_like"]


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
    q_positions: Int[Array, "#b t"] | None = None,
    k_positions: Int[Array, "#b s"] | None = None,
    k_segment_ids: Int[Array, "b s"] | None = None,
):
    """Attention with all logits [b, h, t, s] at once: the obvious form, and the reference.

    Returns out [b, t, h, kv] in q.dtype, with `return_lse` also lse [b, t, h], the natural logarithm
    of the sum of exp(logit). `scale` None is k**-0.5; query head i reads key head i // (h / hk).
    `k_segment_ids` None is `segment_ids`. Unequal lengths (decoding) need explicit positions.
    ValueError for arguments that do not fit.
    """
    rule, mask = check_attention(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap,
        segment_ids=segment_ids, k_segment_ids=k_segment_ids,
        q_positions=q_positions, k_positions=k_positions,
    )  # fmt: skip
    qp = jnp.arange(q.shape[1])[None] if mask.q_positions is None else mask.q_positions
    kp = jnp.arange(k.shape[1])[None] if mask.k_positions is None else mask.k_positions
    allowed = allowed_pairs(rule, qp, kp, mask.q_segments, mask.k_segments)
    k, v = (rearrange(x, "b s h k -> b h s k") for x in (k, v))
    out, lse = _attend(rule, q, k, v, allowed)
    out = checkpoint_name(out, "attn_out")
    return (out, checkpoint_name(lse, "attn_lse")) if return_lse else out


def cached_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b hk s k"],
    v: Float[Array, "b hk s kv"],
    q_positions: Int[Array, "#b t"],
    k_positions: Int[Array, "#b s"],
) -> Float[Array, "b t h kv"]:
    """Causal `dense_attention` to a cache whose layout a decoding step reads without a copy.

    ValueError for arguments that do not fit.
    """
    usual: list[Any] = [
        jax.ShapeDtypeStruct((*x.shape[:1], *x.shape[1:3][::-1], *x.shape[3:]), x.dtype)
        for x in (k, v)
    ]
    rule, _ = check_attention(
        q, *usual, causal=True, scale=None, window=None, softcap=None,
        segment_ids=None, k_segment_ids=None, q_positions=q_positions, k_positions=k_positions,
    )  # fmt: skip
    return _attend(rule, q, k, v, allowed_pairs(rule, q_positions, k_positions, None, None))[0]


def _attend(rule: Rule, q, k, v, allowed):
    """out and lse of q [b, t, h, k] against k and v [b, hk, s, k]."""
    z = logits(rule, group_heads(q, k.shape[1]), k)
    if allowed is not None:
        z = jnp.where(allowed, z, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(z, -1))
    top = jnp.where(top > -jnp.inf, top, 0)
    p = jnp.exp(z - top[..., None])
    total = jnp.sum(p, -1)
    some = jnp.where(total > 0, total, 1)
    # Dividing after the product spares a pass over [t, s].
    out = jnp.einsum("bhgts,bhsk->bhgtk", p.astype(v.dtype), v, preferred_element_type=wide_type(q))
    out = rearrange(out / some[..., None], "b h g t k -> b t (h g) k").astype(q.dtype)
    lse = jnp.where(total > 0, top + jnp.log(some), -jnp.inf)
    return out, rearrange(lse, "b h g t -> b t (h g)")


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
    block_q: int | None = None,
    block_k: int | None = None,
    q_positions: Int[Array, "#b t"] | None = None,
    k_positions: Int[Array, "#b s"] | None = None,
    k_segment_ids: Int[Array, "b s"] | None = None,
):
    """`dense_attention` in blocks of queries and keys, with an online softmax and its own gradient.

    Memory O(block_q * block_k) a head beyond inputs and outputs, forward and backward; lengths need
    not be multiples of the blocks, which are upper bounds. None takes 128 to 512, the largest with
    which the logits of a pair of blocks stay below 2^20 numbers over all b * h. Pairs of blocks in
    which nothing is allowed are skipped: about half the work for causal. The backward pass
    recomputes probabilities from lse (Dao et al., 2022); there is no forward-mode derivative. The
    output is named 'attn_out', lse 'attn_lse', for remat policies.
    """
    rule, mask = check_attention(
        q, k, v, causal=causal, scale=scale, window=window, softcap=softcap,
        segment_ids=segment_ids, k_segment_ids=k_segment_ids,
        q_positions=q_positions, k_positions=k_positions,
    )  # fmt: skip
    usual = default_block(q.shape[0] * q.shape[2])
    block_q, block_k = (usual if block is None else block for block in (block_q, block_k))
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q={block_q} and block_k={block_k} must be at least 1 or None")
    out, lse = attend_in_blocks(rule, q, k, v, mask, block_q=block_q, block_k=block_k)
    return (out, lse) if return_lse else out
