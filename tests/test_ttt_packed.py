"""Packed documents and ragged pieces against each document alone, by the operators of whole runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.ttt import (
    LADDER,
    FastWeights,
    InnerConfig,
    TTTLinearParams,
    TTTMLPParams,
    document_places,
    packed_minibatch_state,
    packed_state,
    ttt,
    ttt_linear,
    ttt_minibatch_packed,
    ttt_mlp,
    ttt_packed,
)

H, D, DH = 2, 4, 3


def draw(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def lengths_of(t):
    """Documents of a row of t tokens."""
    return st.lists(st.integers(1, t), min_size=1, max_size=5).map(
        lambda parts: [n for n in np.diff([0, *np.minimum(np.cumsum(parts), t), t]) if n]
    )


def row_places(lengths):
    return np.concatenate([np.arange(n) for n in lengths])


def tokens(seed, b, t, wide):
    q, k, v = (draw(seed + i, b, t, H, D).astype(wide) for i in range(3))
    rates = 0.3 * jax.nn.softplus(draw(seed + 3, b, t, H, 3).astype(wide))
    return q, k, v, rates, jax.nn.sigmoid(draw(seed + 4, b, t, H).astype(wide))


def lact(cfg):
    """(packed operator, the operator of one document, its state before the first token)."""
    dh = D if cfg.net == "linear" else DH
    fw = FastWeights(draw(10, H, D, dh), draw(11, H, dh, D), draw(12, H, D, dh))

    def packed(args, places, state=None):
        return ttt_packed(*args[:3], fw, *args[3:], cfg, places, state)

    def alone(args):
        return ttt(*args[:3], fw, *args[3:], cfg, impl="recurrent", return_state=False)[0]

    return packed, alone, lambda b, wide: packed_state(cfg, b, H, D, dh, D, wide)


def minibatch(kind, size, residual):
    op, cls = (ttt_linear, TTTLinearParams) if kind == "linear" else (ttt_mlp, TTTMLPParams)
    wide = D if kind == "linear" else 4 * D
    w = (draw(10, H, D, wide), draw(11, H, 1, wide), draw(12, H, wide, D), draw(13, H, 1, D))
    params = cls(*w[: 2 if kind == "linear" else 4], 1 + 0.1 * draw(14, H, D), draw(15, H, D))
    how = {"chunk_size": size, "residual": residual}

    def packed(args, places, state=None):
        rates = args[3][..., 0], args[4]
        return ttt_minibatch_packed(*args[:3], params, *rates, places, state, **how)

    def alone(args):
        return op(*args[:3], params, args[3][..., 0], args[4], **how)[0]

    return packed, alone, lambda b, wide: packed_minibatch_state(kind, b, H, D, wide)


BASE = dataclasses.replace(LADDER["base"], chunk_size=4)
METHODS = {
    "base": lact(BASE),
    "V1p": lact(dataclasses.replace(LADDER["V1p"], chunk_size=3)),
    "V3": lact(dataclasses.replace(LADDER["V3"], chunk_size=4)),
    "V6, chunks of one": lact(dataclasses.replace(LADDER["V6"], chunk_size=1)),
    "squared, q<-k, ascent": lact(
        dataclasses.replace(BASE, loss="squared", query="k", sign=-1, orthogonalize=None)
    ),
    "linear": minibatch("linear", 4, "query"),
    "mlp": minibatch("mlp", 3, "output"),
}
# The quick suite has a net that moves whole, one that stands still, and both kinds of mini-batch.
SLOW = ("V1p", "V6, chunks of one", "squared, q<-k, ascent")
methods = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in METHODS],
)


T = 13


@functools.cache
def compiled(name):
    """(packed, alone) as jitted functions, the latter of T tokens whatever the document's length:
    tokens that follow change nothing."""
    packed, alone, _ = METHODS[name]

    def padded(args):
        n = args[0].shape[1]
        fill = lambda x: jnp.pad(x, [(0, 0), (0, T - n)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
        return whole(jax.tree.map(fill, args))[:, :n]

    whole = jax.jit(alone)
    return jax.jit(packed), padded


@methods
@settings(max_examples=4, deadline=None)
@given(rows=st.tuples(lengths_of(T), lengths_of(T)), seed=st.integers(0, 99))
def test_each_document_comes_out_as_it_would_alone(name, rows, seed):
    with jax.enable_x64(True):
        args = tokens(seed, 2, T, jnp.float64)
        places = jnp.asarray(np.stack([row_places(r) for r in rows]))
        packed, alone = compiled(name)
        out = np.asarray(packed(args, places)[0])
        for i, lengths in enumerate(rows):
            at = 0
            for n in lengths:
                part = jax.tree.map(lambda x, i=i, at=at, n=n: x[i : i + 1, at : at + n], args)
                want = alone(part)[0]
                np.testing.assert_allclose(out[i, at : at + n], want, atol=1e-11)
                at += n


@pytest.mark.slow
@methods
def test_gradients_are_those_of_documents_alone(name):
    packed, alone, _ = METHODS[name]
    with jax.enable_x64(True):
        args = tokens(5, 1, 11, jnp.float64)
        places = jnp.asarray(row_places([6, 1, 4]))[None]

        def apart(args):
            cut = lambda a, b: jax.tree.map(lambda x: x[:, a:b], args)  # noqa: E731
            return jnp.concatenate([alone(cut(*ab)) for ab in ((0, 6), (6, 7), (7, 11))], 1)

        loss = lambda f: jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(f(a)))))(args)  # noqa: E731
        got, want = loss(lambda a: packed(a, places)[0]), loss(apart)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)
            assert np.all(np.isfinite(a))


@methods
@settings(max_examples=4, deadline=None)
@given(
    lengths=st.tuples(st.integers(0, T), st.integers(1, T)),
    sizes=st.lists(st.sampled_from((1, 3, 7)), min_size=2, max_size=9),
    seed=st.integers(0, 99),
)
def test_ragged_rows_in_pieces_are_whole_rows(name, lengths, sizes, seed):
    """Padding on the right of every piece, different in each row, leaves no trace."""
    (packed, alone), start = compiled(name), METHODS[name][2]
    lengths = np.minimum(lengths, sum(sizes))
    with jax.enable_x64(True):
        args = tokens(seed, 2, T, jnp.float64)
        state, seen, outs = start(2, jnp.float64), np.zeros(2, int), [[], []]
        for size in sizes:
            take = np.minimum(size, lengths - seen)
            at = np.minimum(seen[:, None] + np.arange(size), T - 1)
            piece = jax.tree.map(lambda x, at=at: x[np.arange(2)[:, None], at], args)
            real = jnp.arange(size)[None] < jnp.asarray(take)[:, None]
            places = document_places(jnp.zeros_like(real), real, jnp.asarray(seen))
            out, after = packed(piece, places, state)
            assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
            state = after
            for i in range(2):
                outs[i].append(out[i, : take[i]])
            seen = seen + take
        for i, n in enumerate(lengths):
            if n:
                want = alone(jax.tree.map(lambda x, i=i, n=n: x[i : i + 1, :n], args))[0]
                np.testing.assert_allclose(np.concatenate(outs[i]), want, atol=1e-11)


def test_places_count_within_documents():
    first = jnp.array([[0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]], bool)
    real = jnp.array([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 0, 0]], bool)
    places = document_places(first, real, jnp.array([7, 3]))
    np.testing.assert_array_equal(places, [[7, 8, 0, -1, 1, 0], [0, 1, 2, 3, -1, -1]])


def test_what_cannot_be_packed_says_why():
    args = tokens(0, 1, 4, jnp.float32)
    fw = FastWeights(draw(0, H, D, DH), draw(1, H, DH, D), draw(2, H, D, DH))
    places = jnp.arange(4)[None]
    for cfg in (InnerConfig(visibility="inclusive_chunk"), InnerConfig(steps=2)):
        with pytest.raises(ValueError, match="visibility='exclusive' and steps=1"):
            ttt_packed(*args[:3], fw, *args[3:], cfg, places)
    with pytest.raises(ValueError, match="places"):
        ttt_packed(*args[:3], fw, *args[3:], BASE, places[:, :3])
    with pytest.raises(ValueError, match="rates"):
        ttt_packed(*args[:3], fw, args[3][:, 1:], args[4], BASE, places)
