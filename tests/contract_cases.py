"""One row a public method of `jaxlab`: how to call it on small arrays. A new method adds its row here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlab import linear_attention as la
from jaxlab import ttt
from jaxlab.attention import blockwise_attention, dense_attention
from jaxlab.rope import apply_rope, rope_frequencies
from jaxlab.tiled import tiled_cross_entropy, tiled_mlp, token_log_probs


class Case(NamedTuple):
    """`call(*args(key, dtype))`: arrays in, arrays out, everything static closed over."""

    call: Callable[..., Any]
    args: Callable[[jax.Array, Any], tuple]
    out: str = "like"  # floating outputs are "like" the floating inputs, or always "wide" (float32)
    grad: bool = True


def _normal(key, dtype, *shapes):
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True))


def _qkv(key, dtype):
    q, k, v = _normal(key, dtype, (2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8))
    return q, k, v, jnp.array([[1, 1, 1, 2, 2]] * 2)


def _head(key, dtype):
    return *_normal(key, dtype, (2, 6, 8), (8, 11)), jnp.array([[3, 1, -1, 10, 0, 2]] * 2)


CASES: dict[str, Case] = {
    "jaxlab.attention.dense_attention": Case(
        lambda q, k, v, s: dense_attention(q, k, v, segment_ids=s, window=3, softcap=5.0), _qkv
    ),
    "jaxlab.attention.blockwise_attention": Case(
        lambda q, k, v, s: blockwise_attention(q, k, v, segment_ids=s, block_q=2, block_k=3), _qkv
    ),
    "jaxlab.rope.apply_rope": Case(
        lambda x, p: apply_rope(x, p, jnp.asarray(rope_frequencies(8, 1e4))),
        lambda key, dtype: (*_normal(key, dtype, (2, 5, 4, 8)), jnp.array([[0, 1, 2, 0, 1]] * 2)),
    ),
    "jaxlab.tiled.tiled_mlp": Case(
        lambda x, w: tiled_mlp(lambda part: jax.nn.silu(part @ w), x, n_tiles=3),
        lambda key, dtype: _normal(key, dtype, (2, 6, 8), (8, 4)),
    ),
    "jaxlab.tiled.tiled_cross_entropy": Case(
        lambda h, w, y: tiled_cross_entropy(h, w, y, n_tiles=2, z_loss=1e-3), _head, out="wide"
    ),
    "jaxlab.tiled.token_log_probs": Case(
        lambda h, w, y: token_log_probs(h, w, y, n_tiles=2), _head, out="wide"
    ),
}

# Public functions that are no methods on arrays, and why.
EXEMPT: dict[str, str] = {
    "jaxlab.rope.rope_frequencies": "static numbers, tested in test_rope.py",
    "jaxlab.rope.yarn_attention_factor": "a static number, tested in test_rope.py",
}

# Modules that other modules of jaxlab are made of; their functions are not public.
INTERNAL = {"jaxlab.masks", "jaxlab.blockwise", "jaxlab.varying"}
