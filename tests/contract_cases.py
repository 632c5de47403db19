"""One row a public method of `jaxlab`: how to call it on small arrays. A new method adds its row here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlab import lora, sampling
from jaxlab.attention import blockwise_attention, cached_attention, dense_attention
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


def _cache(key, dtype):
    q, k, v = _normal(key, dtype, (2, 1, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    return q, k, v, jnp.array([[3], [2]]), jnp.array([[0, 1, 2, 3, 9]] * 2)


def _logits(key, dtype):
    return _normal(key, dtype, (3, 7))


def _kept(filtered):
    """What a filter keeps, and 0 elsewhere, so that sums are finite."""
    return jnp.where(filtered > -jnp.inf, filtered, 0)


def _adapted(key, dtype):
    """Parameters, and an adapter of a stack of two matrices 6 x (4 2)."""
    w, a, b, x = _normal(key, dtype, (2, 6, 4, 2), (2, 6, 3), (2, 3, 4, 2), (5, 6))
    return {"w": w, "bias": x}, {"w": {"a": a, "b": b}}


def _adapter(key, dtype):
    return _adapted(key, dtype)[0]["bias"], jax.tree.map(
        lambda x: x[0], _adapted(key, dtype)[1]["w"]
    )


def _head(key, dtype):
    return *_normal(key, dtype, (2, 6, 8), (8, 11)), jnp.array([[3, 1, -1, 10, 0, 2]] * 2)


CASES: dict[str, Case] = {
    "jaxlab.attention.dense_attention": Case(
        lambda q, k, v, s: dense_attention(q, k, v, segment_ids=s, window=3, softcap=5.0), _qkv
    ),
    "jaxlab.attention.blockwise_attention": Case(
        lambda q, k, v, s: blockwise_attention(q, k, v, segment_ids=s, block_q=2, block_k=3), _qkv
    ),
    "jaxlab.attention.cached_attention": Case(cached_attention, _cache),
    "jaxlab.sampling.keep_top_k": Case(lambda z: _kept(sampling.keep_top_k(z, 3)), _logits),
    "jaxlab.sampling.keep_top_p": Case(lambda z: _kept(sampling.keep_top_p(z, 0.7)), _logits),
    "jaxlab.sampling.keep_min_p": Case(lambda z: _kept(sampling.keep_min_p(z, 0.2)), _logits),
    "jaxlab.sampling.keep_best": Case(lambda z: _kept(sampling.keep_best(z)), _logits),
    "jaxlab.sampling.sampling_logits": Case(
        lambda z: _kept(sampling.sampling_logits(z, sampling.Sampling(0.5, 4, 0.9, 0.1))),
        _logits,
        out="wide",
    ),
    "jaxlab.sampling.draw": Case(
        lambda z: sampling.draw(jax.random.split(jax.random.key(1), 3), z, sampling.PLAIN),
        _logits,
        out="wide",
    ),
    "jaxlab.sampling.entropy": Case(lambda z: sampling.entropy(jax.nn.log_softmax(z)), _logits),
    "jaxlab.lora.lora_delta": Case(
        lambda _, adapter: lora.lora_delta(adapter), _adapter, out="wide"
    ),
    "jaxlab.lora.lora_product": Case(lora.lora_product, _adapter),
    "jaxlab.lora.lora_scale": Case(lambda _, tree: lora.lora_scale(tree, alpha=8.0), _adapted),
    "jaxlab.lora.lora_merge": Case(lambda p, tree: lora.lora_merge(p, tree, alpha=8.0), _adapted),
    "jaxlab.lora.lora_unmerge": Case(
        lambda p, tree: lora.lora_unmerge(p, tree, alpha=8.0), _adapted
    ),
    "jaxlab.lora.lora_stack": Case(lambda _, tree: lora.lora_stack([tree, tree]), _adapted),
    "jaxlab.lora.lora_init": Case(
        lambda w: lora.lora_init(
            jax.random.key(0), {"w": w}, rank=2, target=lambda *_: True, init="normal"
        ),
        lambda key, dtype: _normal(key, dtype, (6, 4)),
        grad=False,
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
    "jaxlab.lora.lora_num_params": "a static number, tested in test_lora.py",
    "jaxlab.lora.pairs": "walks a tree, computes nothing",
    "jaxlab.lora.flatten": "walks a tree, computes nothing",
    "jaxlab.lora.unflatten": "walks a tree, computes nothing",
    "jaxlab.rope.rope_factor": "a static number, tested in test_rope.py",
    "jaxlab.rope.yarn_attention_factor": "a static number, tested in test_rope.py",
}

# Modules that other modules of jaxlab are made of; their functions are not public.
INTERNAL = {"jaxlab.masks", "jaxlab.blockwise", "jaxlab.varying"}
