"""What a run carries from chunk to chunk, and the one step that learns from a chunk."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.arguments import check_count, wide_type
from jaxlab.ttt.arguments import batched_weights
from jaxlab.ttt.config import FastWeights, InnerConfig
from jaxlab.ttt.net import minus_grads
from jaxlab.ttt.orthogonal import newton_schulz, safe_norm

Matrices = dict[str, jax.Array]  # [b, h, in, out] by name, those that move


class TTTState(NamedTuple):
    """State of a TTT layer, of constant shapes and types: memory does not grow with the tokens.

    `fw` are the weights of the last read. The other fields: `main` the sums of pre-norm, `norms` the
    norms of the initial weights, `delta` the momentum, `grads` and `gate` the sums over the open
    chunk of visibility "exclusive", which is learnt when the next token comes, and `count` the
    tokens in the last chunk (0 before the first). Fields that a configuration lacks are None.
    """

    fw: FastWeights
    main: Matrices | None
    norms: Matrices | None
    delta: Matrices | None
    grads: Matrices | None
    gate: Float[Array, "b h"] | None
    count: Int[Array, ""]


class Moving(NamedTuple):
    """The part of the state that changes from chunk to chunk, and nothing else: a scan carry."""

    read: Matrices
    main: Matrices | None
    delta: Matrices | None


class Chunk(NamedTuple):
    """Tokens of one chunk [b, h, c, ...], or of n chunks with n in front; `gate` is their mean."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    rates: jax.Array | None  # [..., c, 3]
    gate: jax.Array | None  # [..., b, h]


def keeps_open_chunk(cfg: InnerConfig) -> bool:
    """Whether the last chunk waits for the next token; with several steps it cannot be continued."""
    return cfg.visibility == "exclusive" and cfg.steps == 1


def weight_norms(w: jax.Array) -> jax.Array:
    """Norm of each output channel over its inputs, [..., 1, out]."""
    return safe_norm(w, -2)


def renormalise(w: jax.Array, norms: jax.Array) -> jax.Array:
    """`w` with the `norms` of the initial weights; epsilon is added to the norm."""
    return w / (weight_norms(w) + 1e-5) * norms


def state_of(fw: FastWeights, cfg: InnerConfig) -> TTTState:
    """State before the first token of batched weights `fw`."""
    weights = {name: getattr(fw, name) for name in cfg.moving}
    zeros = lambda: jax.tree.map(jnp.zeros_like, weights)  # noqa: E731
    norms = None
    if cfg.weight_norm is not None:
        norms = jax.tree.map(weight_norms, weights)
        norms = jax.lax.stop_gradient(norms) if cfg.detach_norm else norms
    opened = keeps_open_chunk(cfg)
    return TTTState(
        fw=fw,
        main=weights if cfg.weight_norm == "pre" else None,
        norms=norms,
        delta=zeros() if cfg.momentum else None,
        grads=zeros() if opened else None,
        gate=jnp.zeros(fw.w1.shape[:2], fw.w1.dtype) if opened and cfg.momentum else None,
        count=jnp.zeros((), jnp.int32),
    )


def init_ttt_state(fw: FastWeights, batch: int, cfg: InnerConfig) -> TTTState:
    """State before the first token, for `batch` sequences; `fw` may be per sequence already.

    Float32, or the wider type of fw.w1. ValueError for shapes that do not fit.
    Source: 2602.21204, section 3; decoding of LaCT (2505.23884).
    """
    batch = check_count("batch", batch, 0)
    weights = batched_weights(fw, cfg.net, batch, None, None, None, None)
    wide = wide_type(weights.w1)
    return state_of(jax.tree.map(lambda w: w.astype(wide), weights), cfg)


def moving_part(state: TTTState, cfg: InnerConfig) -> Moving:
    """The scan carry inside `state`."""
    weights = {name: getattr(state.fw, name) for name in cfg.moving}
    return Moving(weights, state.main, state.delta)


def with_moved(state: TTTState, moving: Moving) -> TTTState:
    """`state` after `moving` has moved."""
    fw = state.fw._replace(**moving.read)
    return state._replace(fw=fw, main=moving.main, delta=moving.delta)


def orthogonal(cfg: InnerConfig, grads: Matrices) -> Matrices:
    """The update that momentum `grads` makes: signed, and orthogonalised if so configured."""
    if cfg.orthogonalize is not None:
        grads = {n: newton_schulz(g, cfg.orthogonalize, cfg.ns_steps) for n, g in grads.items()}
    return {name: cfg.sign * g for name, g in grads.items()}


def take_step(
    cfg: InnerConfig, norms: Matrices | None, moving: Moving, grads: Matrices, gate
) -> Moving:
    """One inner step: momentum, orthogonalisation, addition, normalisation, in this order.

    `gate` [b, h] None means no momentum, which leaves the buffer as it is.
    """
    delta = moving.delta
    if gate is not None:
        decayed = jax.tree.map(lambda d: gate[..., None, None] * d, delta)
        grads = delta = jax.tree.map(jnp.add, grads, decayed)
    base = moving.read if moving.main is None else moving.main
    total = jax.tree.map(jnp.add, base, orthogonal(cfg, grads))
    if cfg.weight_norm is None:
        return Moving(total, None, delta)
    read = jax.tree.map(renormalise, total, norms)
    return Moving(read, total if cfg.weight_norm == "pre" else None, delta)


def learn(
    cfg: InnerConfig,
    state: TTTState,
    moving: Moving,
    chunk: Chunk,
    total: Callable = lambda grads: grads,
) -> Moving:
    """`cfg.steps` inner steps on a chunk, each from the weights that the step before left.

    `total` sums gradients over the devices that share the chunk's tokens.
    """

    def step(moving: Moving, _):
        fw = state.fw._replace(**moving.read)
        grads = minus_grads(cfg.net, cfg.loss, cfg.moving, fw, chunk.k, chunk.v, chunk.rates)
        return take_step(cfg, state.norms, moving, total(grads), chunk.gate), None

    if cfg.steps == 1:
        return step(moving, None)[0]
    return jax.lax.scan(step, moving, length=cfg.steps)[0]
