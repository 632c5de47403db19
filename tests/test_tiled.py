"""Sequence tiles: values and gradients of a token-by-token float64 oracle, and what never exists."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.tiled import tiled_cross_entropy, tiled_mlp, token_log_probs
from sharding.plan import aot_memory

B, T, D, V = 2, 12, 5, 19
# Most of the time of this file is compilation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def oracle(h, w, labels, dloss, dlogp, *, z_loss=0.0, softcap=None):
    """Loss, count, log-probabilities and, for both functions, dh and dw: one token at a time."""
    h, w = np.asarray(h, np.float64), np.asarray(w, np.float64)
    loss, logp, dh, dw = (
        0.0,
        np.zeros(labels.shape),
        np.zeros((2, *h.shape)),
        np.zeros((2, *w.shape)),
    )
    for at in np.ndindex(*labels.shape):
        label = labels[at]
        if label < 0:
            continue
        z, slope = h[at] @ w, np.ones(w.shape[1])
        if softcap is not None:
            slope = 1 - np.tanh(z / softcap) ** 2
            z = softcap * np.tanh(z / softcap)
        lse = z.max() + math.log(np.sum(np.exp(z - z.max())))
        p, hot = np.exp(z - lse), np.arange(len(z)) == label
        logp[at] = z[label] - lse
        loss += z_loss * lse**2 - logp[at]
        for n, dz in enumerate((dloss * (p - hot + 2 * z_loss * lse * p), dlogp[at] * (hot - p))):
            dh[n][at] += w @ (dz * slope)
            dw[n] += np.outer(h[at], dz * slope)
    return loss, np.sum(labels >= 0), logp, dh, dw


def inputs(seed, dtype="float64"):
    random = np.random.default_rng(seed)
    h, w = random.standard_normal((B, T, D)), random.standard_normal((D, V))
    labels = random.integers(-2, V, (B, T)).astype(np.int32)
    return jnp.asarray(h, dtype), jnp.asarray(w, dtype), labels, random.standard_normal((B, T))


def measured(n_tiles, **options):
    """What the oracle returns, of the library, in one jitted program."""
    extra = {key: options[key] for key in options if key == "softcap"}

    @quick_jit
    def run(h, w, labels, dlogp):
        entropy = lambda h, w: tiled_cross_entropy(h, w, labels, n_tiles=n_tiles, **options)  # noqa: E731
        loss, vjp, count = jax.vjp(entropy, h, w, has_aux=True)
        logp, vjp2 = jax.vjp(
            lambda h, w: token_log_probs(h, w, labels, n_tiles=n_tiles, **extra), h, w
        )
        return loss, count, logp, *zip(vjp(jnp.asarray(3.0, loss.dtype)), vjp2(dlogp), strict=True)

    return run


def assert_close(got, expected, tolerance):
    for name, x, y in zip(("loss", "count", "logp", "dh", "dw"), got, expected, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.max(np.abs(x - y)) <= tolerance * max(1, np.max(np.abs(y))), name


@pytest.mark.parametrize("n_tiles", [1, 2, 3, 4, 6, 12])
def test_every_number_of_tiles_matches_the_oracle_in_float64(n_tiles):
    options = dict(z_loss=0.3 if n_tiles % 2 else 0.0, softcap=None if n_tiles % 3 else 1.5)
    if n_tiles == 4:
        options = dict(z_loss=0.1, softcap=2.0)
    run = measured(n_tiles, **options)

    @settings(max_examples=6, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1))
    def check(seed):
        args = inputs(seed)
        got = run(*args)
        assert got[0].dtype == got[2].dtype == jnp.float64 and got[1].dtype == jnp.float32
        h, w, labels, dlogp = args
        assert_close(got, oracle(h, w, labels, 3.0, dlogp, **options), 1e-12)

    with jax.enable_x64(True):
        check()


@pytest.mark.parametrize("n_tiles", [1, 4])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_narrow_types_sum_in_float32(n_tiles, dtype, tolerance):
    h, w, labels, dlogp = inputs(0, dtype)
    dlogp = dlogp.astype(np.float32)
    got = measured(n_tiles, z_loss=0.1)(h, w, labels, dlogp)
    assert [str(x.dtype) for x in got[:3]] == ["float32"] * 3
    assert {str(x.dtype) for x in (*got[3], *got[4])} == {dtype}
    expected = oracle(h, w, labels, 3.0, dlogp, z_loss=0.1)
    assert_close(got, expected, tolerance)
    assert_close(got[:3] + expected[3:], expected, 2e-6)


def test_gradients_of_weights_accumulate_in_float32():
    """512 steps of -1/2, of which bfloat16 would lose all after the first 256."""
    h, w = jnp.ones((1, 512, 1), "bfloat16"), jnp.zeros((1, 2), "bfloat16")
    loss = lambda w: tiled_cross_entropy(h, w, jnp.zeros((1, 512), int), n_tiles=512)[0]  # noqa: E731
    np.testing.assert_array_equal(jax.grad(loss)(w).astype("float32"), [[-256.0, 256.0]])


@pytest.mark.parametrize("n_tiles", [1, 3])
def test_ignored_labels_cost_nothing_and_labels_outside_are_seen(n_tiles):
    h, w, labels, dlogp = inputs(1, "float32")
    loss, count, logp, dh, dw = measured(n_tiles, z_loss=0.1)(h, w, np.full_like(labels, -1), dlogp)
    assert loss == 0 and count == 0 and not np.any(logp)
    assert not np.any(dh) and not np.any(dw)
    outside = np.where(labels < 0, labels, 0)
    outside[0, 0] = V
    loss, _ = tiled_cross_entropy(h, w, outside, n_tiles=n_tiles)
    assert np.isnan(loss)
    logp = token_log_probs(h, w, outside, n_tiles=n_tiles)
    assert np.isnan(logp[0, 0]) and np.all(np.isfinite(logp.ravel()[1:]))


def equations(jaxpr):
    """Every equation of a jaxpr and of all inside it, a loop's body once."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def largest(jaxpr):
    """Elements of the largest array in a jaxpr and all inside it."""
    return max(math.prod(x.aval.shape) for eqn in equations(jaxpr) for x in eqn.outvars)


@pytest.mark.parametrize("n_tiles", [1, 4])
def test_all_logits_exist_with_one_tile_only(n_tiles):
    def loss(h, w, labels):
        total, count = tiled_cross_entropy(h, w, labels, n_tiles=n_tiles, z_loss=0.1)
        return total / count + jnp.sum(token_log_probs(h, w, labels, n_tiles=n_tiles))

    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((B, 64, D), (D, 200))]
    labels = jax.ShapeDtypeStruct((B, 64), "int32")
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*shapes, labels)
    assert largest(jaxpr.jaxpr) == B * 64 * 200 // n_tiles
    # Both functions: logits, dh and dw, and the logits once more where they are not kept.
    assert sum(eqn.primitive.name == "dot_general" for eqn in equations(jaxpr.jaxpr)) == (
        6 if n_tiles == 1 else 8
    )


@pytest.mark.parametrize("width", [64, 512])
def test_temporaries_are_a_fraction_of_the_plain_form_at_any_width(width):
    """From the compiler; a wide model's gradient of w is as large as a tile's logits many times."""

    def temporaries(n_tiles):
        loss = lambda h, w, labels: tiled_cross_entropy(h, w, labels, n_tiles=n_tiles)[0]  # noqa: E731
        shapes = ((1, 1024, width), "float32"), ((width, 16_384), "float32"), ((1, 1024), "int32")
        args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        return aot_memory(jax.value_and_grad(loss, (0, 1)), args).temp_bytes

    assert temporaries(16) <= temporaries(1) / 8


def test_tiled_mlp_is_fn_with_gradients_to_all_it_closes_over():
    random = np.random.default_rng(0)
    x, w1, w2, dy = (
        jnp.asarray(random.standard_normal(s), "float32")
        for s in ((B, T, D), (D, 64), (64, 3), (B, T, 3))
    )

    def run(mlp, x, w1, w2):
        y, vjp = jax.vjp(lambda x, w1, w2: mlp(lambda tile: jnp.tanh(tile @ w1) @ w2, x), x, w1, w2)
        return y, *vjp(dy)

    expected = quick_jit(functools.partial(run, lambda fn, x: fn(x)))(x, w1, w2)
    for n_tiles in (1, 3, 12):
        tiled = functools.partial(run, functools.partial(tiled_mlp, n_tiles=n_tiles))
        for got, wanted in zip(quick_jit(tiled)(x, w1, w2), expected, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
        assert largest(jax.make_jaxpr(tiled)(x, w1, w2).jaxpr) == max(B * T * 64 // n_tiles, D * 64)


def test_tiles_of_consecutive_tokens_give_the_same():
    with jax.enable_x64(True):
        h, w, labels, _ = inputs(3)

        def both(h, w, **how):
            h = tiled_mlp(lambda tile: jnp.tanh(tile @ (w @ w.T)), h, n_tiles=3, **how)
            return tiled_cross_entropy(h, w, labels, n_tiles=4, z_loss=0.1, **how)[0]

        got = quick_jit(jax.value_and_grad(functools.partial(both, consecutive=True), (0, 1)))(h, w)
        expected = quick_jit(jax.value_and_grad(both, (0, 1)))(h, w)
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12)


def test_inside_shard_map_gradients_are_those_outside():
    """Batch over one axis, tokens over the other, weights replicated over both."""
    mesh = jax.make_mesh((2, 4), ("data", "context"), (AxisType.Auto,) * 2)
    h, w, labels, _ = inputs(2, "float32")
    tokens = P("data", "context")

    def both(h, w, labels, n_tiles):
        h = tiled_mlp(lambda tile: jnp.tanh(tile @ (w @ w.T)), h, n_tiles=n_tiles)
        loss, count = tiled_cross_entropy(h, w, labels, n_tiles=n_tiles, softcap=3.0)
        return loss - jnp.sum(jnp.sin(token_log_probs(h, w, labels, n_tiles=n_tiles))), count

    def sharded(h, w, labels):
        local = lambda *args: jax.lax.psum(both(*args, n_tiles=3), ("data", "context"))  # noqa: E731
        f = jax.shard_map(local, mesh=mesh, in_specs=(tokens, P(), tokens), out_specs=P())
        return f(h, w, labels)

    grad = lambda f: quick_jit(jax.value_and_grad(f, (0, 1), has_aux=True))(h, w, labels)  # noqa: E731
    got, expected = grad(sharded), grad(functools.partial(both, n_tiles=1))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_tiles_of_a_sharded_sequence_move_no_tokens():
    mesh = jax.make_mesh((8,), ("context",), (AxisType.Auto,))
    shard = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731
    h = jax.ShapeDtypeStruct((B, 64, D), "float32", sharding=shard(None, "context"))
    labels = jax.ShapeDtypeStruct((B, 64), "int32", sharding=shard(None, "context"))
    w = jax.ShapeDtypeStruct((D, V), "float32", sharding=shard())

    def loss(h, w, labels):
        h = tiled_mlp(lambda tile: jnp.tanh(tile @ (w @ w.T)), h, n_tiles=4)
        return tiled_cross_entropy(h, w, labels, n_tiles=4)[0]

    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(h, w, labels).compile().as_text()
    assert "all-reduce" in text
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize(
    "n_tiles, near", [(0, r"\[1, 2, 3, 4\]"), (5, r"\[3, 4, 6\]"), (7, r"\[4, 6\]")]
)
def test_tiles_that_do_not_divide_name_those_that_do(n_tiles, near):
    h, w, labels, _ = inputs(0, "float32")
    message = f"n_tiles={n_tiles} must divide the sequence length 12; nearest: "
    for call in (
        lambda: tiled_cross_entropy(h, w, labels, n_tiles=n_tiles),
        lambda: token_log_probs(h, w, labels, n_tiles=n_tiles),
        lambda: tiled_mlp(jnp.tanh, h, n_tiles=n_tiles),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert all(
            n in str(error.value).split("nearest")[1] for n in near.strip("\\[]").split(", ")
        )


@pytest.mark.parametrize("call", [tiled_cross_entropy, token_log_probs])
def test_shapes_and_softcap_are_checked(call):
    h, w, labels, _ = inputs(0, "float32")
    for bad in ((h[0], w, labels), (h, w.T, labels), (h, w, labels[:, :1])):
        with pytest.raises(
            ValueError, match=r"need h \[b, t, d\], w \[d, v\], labels \[b, t\]; got"
        ):
            call(*bad, n_tiles=2)
    with pytest.raises(ValueError, match="softcap=-1.0 must be positive or None"):
        call(h, w, labels, n_tiles=2, softcap=-1.0)
