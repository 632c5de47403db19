"""Sequence tiles: an MLP and a cross-entropy whose big intermediates exist one tile at a time."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab.varying import vary_like


def _check_tiles(length: int, n_tiles: int) -> None:
    if n_tiles < 1 or length % n_tiles:
        legal = [n for n in range(1, length + 1) if length % n == 0]
        near = sorted(legal, key=lambda n: abs(n - n_tiles))[:4]
        raise ValueError(
            f"n_tiles={n_tiles} must divide the sequence length {length}; nearest: {sorted(near)}"
        )


def _divisor_at_least(n: int, least: float) -> int:
    return next(m for m in range(1, n + 1) if n % m == 0 and (m >= least or m == n))


# Tile i holds tokens i, i + n, i + 2n...: a sequence sharded over devices stays where it is. One that
# is not sharded is cut without a copy into tiles of consecutive tokens.
def _to_tiles(x, n, consecutive):
    order = "b (n t) ... -> n b t ..." if consecutive else "b (t n) ... -> n b t ..."
    return rearrange(x, order, n=n)


def _from_tiles(x, consecutive):
    order = "n b t ... -> b (n t) ..." if consecutive else "n b t ... -> b (t n) ..."
    return rearrange(x, order)


def tiled_mlp(
    fn: Callable[[Float[Array, "b tile d"]], Float[Array, "b tile e"]],
    x: Float[Array, "b t d"],
    *,
    n_tiles: int,
    consecutive: bool = False,
) -> Float[Array, "b t e"]:
    """`fn(x)` for an `fn` that treats tokens alone, on tiles of the sequence.

    What `fn` makes exists for t / n_tiles tokens at a time and is recomputed in the backward pass.
    A tile takes every n_tiles-th token, or, with `consecutive`, tokens that follow each other, which
    costs no copy of x where x is not sharded along t. ValueError unless n_tiles divides t.
    Source: ALST tiling; note on UPipe, section 9.3.
    """
    _check_tiles(x.shape[1], n_tiles)
    if n_tiles == 1:
        return jax.checkpoint(fn)(x)
    tiles = _to_tiles(x, n_tiles, consecutive)
    return _from_tiles(jax.lax.map(jax.checkpoint(fn, prevent_cse=False), tiles), consecutive)


def _logits(h, w, softcap):
    z = jnp.einsum(
        "btd,dv->btv", h, w, preferred_element_type=jnp.promote_types(h.dtype, "float32")
    )
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def _stats(h, w, labels, softcap):
    """(log p(label), logsumexp) of one tile."""
    z = _logits(h, w, softcap)
    lse = jax.nn.logsumexp(z, -1)
    chosen = jnp.take_along_axis(z, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return chosen - lse, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_stats(h, w, labels, n_tiles, softcap, consecutive):
    tiles = tuple(_to_tiles(x, n_tiles, consecutive) for x in (h, labels))
    out = jax.lax.map(lambda tile: _stats(tile[0], w, tile[1], softcap), tiles)
    return jax.tree.map(lambda x: _from_tiles(x, consecutive), out)


def _token_stats_forward(h, w, labels, *static):
    return _token_stats(h, w, labels, *static), (h, w, labels)


def _token_stats_backward(n_tiles, softcap, consecutive, saved, cotangents):
    h, w, labels = saved
    wide = jnp.promote_types(h.dtype, "float32")
    # dw grows by parts of its rows no larger than a tile's logits: a whole product would be dw again.
    parts = _divisor_at_least(w.shape[0], w.shape[0] * n_tiles / max(labels.size, 1))

    def body(dw, tile):
        ht, lt, dlogp, dlse = tile
        z = _logits(ht, w, softcap)
        p = jax.nn.softmax(z, -1)
        chosen = jnp.maximum(lt, 0)[..., None] == jnp.arange(w.shape[1])
        dz = jnp.where(chosen, dlogp[..., None], 0) + p * (dlse - dlogp)[..., None]
        if softcap is not None:
            dz *= 1 - jnp.square(z / softcap)
        dz = dz.astype(h.dtype)
        dh = jnp.einsum("btv,dv->btd", dz, w, preferred_element_type=wide).astype(h.dtype)
        ht = rearrange(ht, "b t (d p) -> p b t d", p=parts)

        def add(i, dw):
            part = jnp.einsum("btd,btv->dv", ht[i], dz, preferred_element_type=wide)
            return dw.at[:, i].add(part)

        return (add(0, dw) if parts == 1 else jax.lax.fori_loop(0, parts, add, dw)), dh

    tiles = (_to_tiles(x, n_tiles, consecutive) for x in (h, labels, *cotangents))
    zeros = jnp.zeros((w.shape[0] // parts, parts, w.shape[1]), wide)
    dw, dh = jax.lax.scan(body, vary_like(zeros, w), tuple(tiles))
    return _from_tiles(dh, consecutive), dw.reshape(w.shape).astype(w.dtype), None


_token_stats.defvjp(_token_stats_forward, _token_stats_backward)


def _checked_stats(
    h, w, labels, n_tiles, softcap, consecutive=False
) -> tuple[jax.Array, jax.Array]:
    if h.ndim != 3 or w.ndim != 2 or h.shape[2] != w.shape[0] or labels.shape != h.shape[:2]:
        raise ValueError(
            f"need h [b, t, d], w [d, v], labels [b, t]; got {h.shape}, {w.shape}, {labels.shape}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive or None")
    _check_tiles(h.shape[1], n_tiles)
    if n_tiles == 1:
        return _stats(h, w, labels, softcap)
    # One type for all under shard_map: a custom gradient must have the type of its input.
    h, w, labels = (vary_like(x, h, w, labels) for x in (h, w, labels))
    return _token_stats(h, w, labels, n_tiles, softcap, consecutive)


def token_log_probs(
    h: Float[Array, "b t d"],
    w: Float[Array, "d v"],
    labels: Int[Array, "b t"],
    *,
    n_tiles: int,
    softcap: float | None = None,
) -> Float[Array, "b t"]:
    """log p(label) under softmax(h @ w), 0 where the label is negative (ignored).

    float32, float64 when h is. Logits are soft-capped and tiled as in `tiled_cross_entropy`; a label
    that is not below v gives NaN. ValueError unless n_tiles divides t and the shapes fit.
    """
    logp, _ = _checked_stats(h, w, labels, n_tiles, softcap)
    return jnp.where(labels >= 0, logp, 0)


def tiled_cross_entropy(
    h: Float[Array, "b t d"],
    w: Float[Array, "d v"],
    labels: Int[Array, "b t"],
    *,
    n_tiles: int,
    z_loss: float = 0.0,
    softcap: float | None = None,
    parts: bool = False,
    consecutive: bool = False,
) -> tuple[Float[Array, ""], ...]:
    """(sum of -log p(label), number of labels counted); negative labels are ignored.

    Logits, softcap * tanh(h @ w / softcap) if `softcap` is given, exist for one tile of t / n_tiles
    tokens at a time, forward and backward (where they are recomputed; dw accumulates in float32).
    With n_tiles=1 they are kept for the backward pass instead: the plain computation. `consecutive` as
    in `tiled_mlp`.
    `z_loss` adds z_loss * logsumexp^2 a counted token; with `parts` a third result is the sum without
    it. All results are float32 scalars, the loss
    float64 when h is; a label that is not below v makes the loss NaN, not silently wrong.
    ValueError unless n_tiles divides t and the shapes fit. Source: ALST; note on UPipe, section 9.3.
    """
    logp, lse = _checked_stats(h, w, labels, n_tiles, softcap, consecutive)
    counted = labels >= 0
    total = lambda x: jnp.sum(jnp.where(counted, x, 0))  # noqa: E731
    count, nll = jnp.sum(counted, dtype=jnp.float32), total(-logp)
    loss = nll + z_loss * total(jnp.square(lse)) if z_loss else nll
    return (loss, count, nll) if parts else (loss, count)
