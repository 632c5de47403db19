"""Sequence tiles: an MLP and a cross-entropy whose big intermediates exist one tile at a time."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _check_tiles(length: int, n_tiles: int) -> None:
    if n_tiles < 1 or length % n_tiles:
        legal = [n for n in range(1, length + 1) if length % n == 0]
        near = sorted(legal, key=lambda n: abs(n - n_tiles))[:4]
        raise ValueError(
            f"n_tiles={n_tiles} must divide the sequence length {length}; nearest: {sorted(near)}"
        )


def tiled_mlp(
    fn: Callable[[Float[Array, "b tile d"]], Float[Array, "b tile e"]],
    x: Float[Array, "b t d"],
    *,
    n_tiles: int,
) -> Float[Array, "b t e"]:
    """`fn(x)` for an `fn` that treats tokens alone, on sequence tiles, each recomputed in backward.

    ValueError unless n_tiles divides t. Source: ALST tiling; note on UPipe, section 9.3.
    """
    b, t = x.shape[:2]
    _check_tiles(t, n_tiles)
    if n_tiles == 1:
        return jax.checkpoint(fn)(x)
    tiles = jnp.moveaxis(x.reshape(b, n_tiles, t // n_tiles, *x.shape[2:]), 1, 0)
    out = jax.lax.map(jax.checkpoint(fn, prevent_cse=False), tiles)
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(b, t, *out.shape[3:])


def _logits(h, w, softcap):
    z = jnp.einsum("btd,dv->btv", h, w, preferred_element_type=jnp.promote_types(h.dtype, "float32"))
    return z if softcap is None else softcap * jnp.tanh(z / softcap)


def _stats(h, w, labels, softcap):
    """(log p(label), logsumexp) of one tile."""
    z = _logits(h, w, softcap)
    lse = jax.nn.logsumexp(z, -1)
    chosen = jnp.take_along_axis(z, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return chosen - lse, lse


# Tile i holds tokens i, i + n, i + 2n...: a sequence sharded over devices stays where it is.
def _to_tiles(x, n):
    return jnp.moveaxis(x.reshape(x.shape[0], -1, n, *x.shape[2:]), 2, 0)


def _from_tiles(x):
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _token_stats(h, w, labels, n_tiles, softcap):
    tiles = (_to_tiles(h, n_tiles), _to_tiles(labels, n_tiles))
    out = jax.lax.map(lambda tile: _stats(tile[0], w, tile[1], softcap), tiles)
    return jax.tree.map(_from_tiles, out)


def _token_stats_forward(h, w, labels, n_tiles, softcap):
    return _token_stats(h, w, labels, n_tiles, softcap), (h, w, labels)


def _token_stats_backward(n_tiles, softcap, saved, cotangents):
    h, w, labels = saved
    wide = jnp.promote_types(h.dtype, "float32")

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
        return dw + jnp.einsum("btd,btv->dv", ht, dz, preferred_element_type=wide), dh

    tiles = (_to_tiles(x, n_tiles) for x in (h, labels, *cotangents))
    dw, dh = jax.lax.scan(body, jnp.zeros(w.shape, wide), tuple(tiles))
    return _from_tiles(dh), dw.astype(w.dtype), None


_token_stats.defvjp(_token_stats_forward, _token_stats_backward)


def _checked_stats(h, w, labels, n_tiles, softcap):
    if h.ndim != 3 or w.ndim != 2 or h.shape[2] != w.shape[0] or labels.shape != h.shape[:2]:
        raise ValueError(f"shapes do not fit: h {h.shape}, w {w.shape}, labels {labels.shape}")
    _check_tiles(h.shape[1], n_tiles)
    if n_tiles == 1:
        return _stats(h, w, labels, softcap)
    return _token_stats(h, w, labels, n_tiles, softcap)


def token_log_probs(
    h: Float[Array, "b t d"],
    w: Float[Array, "d v"],
    labels: Int[Array, "b t"],
    *,
    n_tiles: int,
    softcap: float | None = None,
) -> Float[Array, "b t"]:
    """log p(label) under softmax(h @ w), float32; 0 where the label is negative (ignored)."""
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
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of -log p(label), number of labels counted); negative labels are ignored.

    Logits [t, v] exist one tile of t / n_tiles tokens at a time, forward and backward (where they are
    recomputed; dw accumulates in float32). `z_loss` adds z_loss * logsumexp^2 a counted token.
    ValueError unless n_tiles divides t. Source: ALST; note on UPipe, section 9.3.
    """
    logp, lse = _checked_stats(h, w, labels, n_tiles, softcap)
    counted = labels >= 0
    loss = z_loss * jnp.square(lse) - logp if z_loss else -logp
    count = jnp.sum(counted, dtype=jnp.float32)
    return jnp.sum(jnp.where(counted, loss, 0)), count
