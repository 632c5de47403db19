"""All chunks at once: sums over chunks instead of a loop, where the inner step allows it.

`parallel`: only w1 moves and the loss is the dot product, so that the gradient of a chunk does not
depend on the state; what remains is a scan of momentum and a sum. With the normalisation before the
sum ("pre") the sum is the state, and normalising belongs to the read-out. `affine`: linear net and
squared error, where a chunk maps the state by a matrix. Sources: 2602.21204, sections 4 and 5.
"""

import functools

import jax
import jax.numpy as jnp

from jaxlab.affine import compose
from jaxlab.ttt.config import InnerConfig
from jaxlab.ttt.net import features, outer_sum
from jaxlab.ttt.state import Chunk, Moving, TTTState, orthogonal, renormalise


def why_not_parallel(cfg: InnerConfig, momentum: bool) -> str | None:
    """Why `parallel` cannot compute this configuration, or None if it can."""
    if cfg.loss != "dot":
        return "loss='squared' makes a gradient depend on the state; use impl='affine'"
    if cfg.moving != ("w1",):
        return f"update={cfg.update}: the features must stand still, so only ('w1',) may move"
    if cfg.weight_norm == "post":
        return "weight_norm='post' makes the state no sum; use 'pre' or None"
    if cfg.steps > 1 and (momentum or cfg.orthogonalize is not None):
        return f"steps={cfg.steps} with momentum or orthogonalize is not associative"
    return None


def why_not_affine(cfg: InnerConfig, momentum: bool) -> str | None:
    """Why `affine` cannot compute this configuration, or None if it can."""
    if cfg.net != "linear" or cfg.loss != "squared" or cfg.moving != ("w1",):
        return (
            "it needs net='linear', loss='squared' and w1 in update; "
            f"got {cfg.net!r}, {cfg.loss!r}, {cfg.update}"
        )
    if momentum or cfg.weight_norm is not None or cfg.orthogonalize is not None:
        return "it needs momentum=False, weight_norm=None and orthogonalize=None"
    return None


def _momentum(gates, grads, entry):
    """D_c = gate_c D_{c-1} + G_c over the leading axis, D before the first being `entry`.

    No division by products of gates, which vanish: pairs (a, x) of the map D -> a D + x compose.
    """
    scan = functools.partial(compose, jnp.multiply)
    a, x = jax.lax.associative_scan(scan, (gates[..., None, None], grads))
    return a * entry + x


def parallel(
    cfg: InnerConfig, state: TTTState, moving: Moving, chunks: Chunk
) -> tuple[Moving, jax.Array]:
    """What a scan of `learn` over chunks gives: (the carry after them, outputs [n, b, h, c, v])."""

    # Checkpointed: summaries are cheap to make again (and XLA of JAX 0.11.2 crashes on the gradient
    # of an associative scan of pairs in shard_map without this).
    @jax.checkpoint
    def entry_weights(grads, gates, moving, norms):
        delta = moving.delta
        if gates is not None:
            grads = _momentum(gates, grads, moving.delta["w1"])
            delta = {"w1": grads[-1]}
        # The loss is linear in w1: with neither momentum nor orthogonalisation, n steps are n times one.
        updates = cfg.steps * orthogonal(cfg, {"w1": grads})["w1"]
        start = moving.read["w1"] if moving.main is None else moving.main["w1"]
        sums = jnp.cumsum(jnp.concatenate([start[None], updates]), 0)
        if cfg.weight_norm is None:
            return sums, Moving({"w1": sums[-1]}, None, delta)
        # The first chunk reads what it is given: initial weights are not normalised.
        reads = jnp.concatenate([moving.read["w1"][None], renormalise(sums[1:], norms["w1"])])
        return reads, Moving({"w1": reads[-1]}, {"w1": sums[-1]}, delta)

    rates = chunks.rates
    weighted = chunks.v if rates is None else rates[..., 1:2] * chunks.v
    grads = outer_sum(features(cfg.net, state.fw, chunks.k), weighted)
    weights, after = entry_weights(grads, chunks.gate, moving, state.norms)
    weights = weights[:-1] if cfg.visibility == "exclusive" else weights[1:]
    return after, features(cfg.net, state.fw, chunks.q) @ weights


def affine(
    cfg: InnerConfig, state: TTTState, moving: Moving, chunks: Chunk
) -> tuple[Moving, jax.Array]:
    """The same for squared error and a linear net: chunk c maps S to A_c S + X_c.

    A = (I - K^T E K)^n and X = sum_{j<n} (I - K^T E K)^j K^T E V for n inner steps; memory for a
    [k, k] matrix a chunk and head.
    """

    @jax.checkpoint
    def entry_weights(k, v, rates, start):
        weighted = k if rates is None else rates[..., 1:2] * k
        one = jnp.eye(k.shape[-1], dtype=k.dtype) - cfg.sign * outer_sum(weighted, k)
        add = cfg.sign * outer_sum(weighted, v)
        power, total = one, add
        for _ in range(cfg.steps - 1):
            power, total = one @ power, one @ total + add
        scan = functools.partial(compose, jnp.matmul)
        power, total = jax.lax.associative_scan(scan, (power, total))
        return jnp.concatenate([start[None], power @ start + total])

    weights = entry_weights(chunks.k, chunks.v, chunks.rates, moving.read["w1"])
    after = moving._replace(read={"w1": weights[-1]})
    return after, chunks.q @ (weights[:-1] if cfg.visibility == "exclusive" else weights[1:])
