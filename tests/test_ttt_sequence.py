"""TTT-Linear, TTT-MLP and ViTTT against autodiff of their inner losses and linear-attention forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ttt_cases import assert_close, assert_trees_close, quick_jit

from jaxlab.ttt import (
    TTTLinearParams,
    TTTMLPParams,
    ttt_linear,
    ttt_linear_init,
    ttt_linear_step,
    ttt_mlp,
    ttt_mlp_init,
    ttt_mlp_step,
    vittt_dwconv,
    vittt_glu,
)

pytestmark = pytest.mark.slow

LAYERS = {
    "linear": (ttt_linear, ttt_linear_init, ttt_linear_step),
    "mlp": (ttt_mlp, ttt_mlp_init, ttt_mlp_step),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def inputs(seed, kind, b=2, t=11, h=2, f=4, dtype="float64"):
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), dtype)  # noqa: E731
    hidden = f if kind == "linear" else 4 * f
    params = (draw(h, f, hidden) * 0.5, draw(h, 1, hidden) * 0.5)
    norm = (1 + 0.3 * draw(h, f), 0.3 * draw(h, f))
    if kind == "linear":
        params = TTTLinearParams(*params, *norm)
    else:
        params = TTTMLPParams(*params, draw(h, hidden, f) * 0.5, draw(h, 1, f) * 0.5, *norm)
    rates = (jnp.asarray(random.uniform(0.02, 0.3, (b, t, h)), dtype) for _ in range(2))
    return draw(b, t, h, f), draw(b, t, h, f), draw(b, t, h, f), params, *rates


def net(w, x):
    z = x @ w["w1"] + w["b1"]
    return z if "w2" not in w else jax.nn.gelu(z, approximate=True) @ w["w2"] + w["b2"]


def norm(z, gamma, beta, eps):
    return gamma * (z - z.mean()) / jnp.sqrt(z.var() + eps) + beta


def oracle(q, k, v, params, rate_in, rate_out, size, residual, eps=1e-6):
    """One head [t, f], token by token: weights after the gradients, by autodiff, of tokens so far."""
    params = params._asdict()
    gamma, beta = params.pop("gamma"), params.pop("beta")

    @jax.jit
    @jax.grad
    def grad(w, k, v):
        return jnp.sum((norm(net(w, k[None])[0], gamma, beta, eps) - (v - k)) ** 2) / 2

    out = []
    for start in range(0, len(q), size):
        total = jax.tree.map(jnp.zeros_like, params)
        for t in range(start, min(start + size, len(q))):
            step = grad(params, k[t], v[t])
            total = jax.tree.map(lambda s, g, t=t: s + rate_in[t] * g, total, step)
            moved = jax.tree.map(lambda w, s, t=t: w - rate_out[t] * s, params, total)
            z = net(moved, q[t][None])[0]
            out.append((q[t] if residual == "query" else z) + norm(z, gamma, beta, eps))
        params = moved
    return jnp.stack(out), params


@layers
@pytest.mark.parametrize(
    "t, residual",
    [
        (11, "query"),
        (8, "output"),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in [(3, "query"), (1, "output")]),
    ],
)
def test_both_forms_are_token_by_token_gradient_descent(kind, t, residual):
    run = LAYERS[kind][0]
    with jax.enable_x64(True):
        args = inputs(t, kind, t=t)
        got = {
            impl: quick_jit(
                functools.partial(run, chunk_size=4, residual=residual, impl=impl, eps=1e-3)
            )(*args)
            for impl in ("dual", "primal")
        }
        for i, j in np.ndindex(2, 2):
            head = (x[i, :, j] for x in args[:3])
            rates = (x[i, :, j] for x in args[4:])
            weights = type(args[3])(*(x[j] for x in args[3]))
            expected, after = oracle(*head, weights, *rates, 4, residual, 1e-3)
            for impl, (out, params) in got.items():
                assert_close(out[i, :, j], expected, 1e-12, impl)
                for name, w in after.items():
                    assert_close(getattr(params, name)[i, j], w, 1e-12, (impl, name))
                assert_close(params.gamma, args[3].gamma, 0)
                assert_close(params.beta, args[3].beta, 0)


@layers
def test_forms_have_the_same_gradients_and_rates_default_to_one(kind):
    run = LAYERS[kind][0]
    with jax.enable_x64(True):
        args = inputs(1, kind, t=7)

        def loss(*args, impl):
            out, params = run(*args, chunk_size=4, impl=impl)
            return jnp.sum(jnp.sin(out)) + sum(jnp.sum(jnp.cos(x)) for x in params)

        dual, primal = (
            quick_jit(jax.grad(functools.partial(loss, impl=impl), range(6)))(*args)
            for impl in ("dual", "primal")
        )
        assert_trees_close(dual, primal, 1e-10)
        ones = jnp.ones((2, 7, 2))
        assert_trees_close(run(*args[:4]), run(*args[:4], ones, ones), 0)


@layers
def test_weights_given_back_continue_and_a_step_takes_one_token(kind):
    run, init, step = LAYERS[kind]
    with jax.enable_x64(True):
        args = inputs(2, kind)
        part = lambda a, b: (tuple(x[:, a:b] for x in args[:3]), tuple(x[:, a:b] for x in args[4:]))  # noqa: E731
        out, after = run(*args, chunk_size=4)
        (tokens, rates), (more, others) = part(0, 8), part(8, 11)
        first, carried = run(*tokens, args[3], *rates, chunk_size=4)
        second, last = run(*more, carried, *others, chunk_size=4)
        assert_close(jnp.concatenate([first, second], 1), out, 1e-12)
        assert_trees_close(last, after, 1e-12)
        nothing, same = run(*part(0, 0)[0], carried, *part(0, 0)[1])
        assert nothing.shape == (2, 0, 2, 4)
        assert_trees_close(same, carried, 0)

        one = quick_jit(functools.partial(step, chunk_size=4))
        for start, state in ((0, init(args[3], 2)), (8, init(carried, 2))):
            kinds = jax.tree.map(lambda x: (x.shape, x.dtype), state)
            for t in range(start, 11):
                (tokens, rates) = part(t, t + 1)
                state, got = one(state, *(x[:, 0] for x in (*tokens, *rates)))
                assert_close(got, out[:, t], 1e-12)
                assert kinds == jax.tree.map(lambda x: (x.shape, x.dtype), state)


@layers
def test_no_token_sees_a_later_one(kind):
    run = quick_jit(functools.partial(LAYERS[kind][0], chunk_size=4))
    q, k, v, *rest = inputs(3, kind, dtype="float32")
    out = run(q, k, v, *rest)[0]
    for at in (2, 4, 10):
        changed = run(q, k.at[:, at].add(1.0), v.at[:, at].add(-1.0), *rest)[0] != out
        changed = np.any(changed, axis=(0, 2, 3))
        assert not changed[:at].any() and changed[at:].all()


@layers
def test_narrow_types_are_carried_in_float32(kind):
    run = LAYERS[kind][0]
    q, k, v, params, *rates = inputs(4, kind, dtype="float32")
    low = tuple(x.astype("bfloat16") for x in (q, k, v))
    out, after = run(*low, params, *rates, chunk_size=4)
    exact, wanted = run(*(x.astype("float32") for x in low), params, *rates, chunk_size=4)
    assert out.dtype == jnp.bfloat16 and after.w1.dtype == jnp.float32
    assert_close(out, exact, 1e-2)
    assert_trees_close(after, wanted, 1e-6)


@layers
def test_inside_shard_map_replicated_weights_get_the_sum_of_gradients(kind):
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    d = P("data")
    args = inputs(5, kind, dtype="float32", t=8)
    for impl in ("dual", "primal") if kind == "linear" else ("dual",):
        local = functools.partial(LAYERS[kind][0], chunk_size=4, impl=impl)
        specs = (d, d, d, P(), d, d)
        f = jax.shard_map(lambda *a, f=local: f(*a)[0], mesh=mesh, in_specs=specs, out_specs=d)
        grads = [
            quick_jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), (1, 3)))(*args)
            for f in (f, lambda *a, f=local: f(*a)[0])
        ]
        assert_trees_close(*grads, 1e-4)


def test_sequences_name_what_does_not_fit():
    q, k, v, params, rate_in, rate_out = inputs(0, "linear", dtype="float32")
    state = ttt_linear_init(params, 2)
    for call, message in (
        (lambda: ttt_linear(q, k, v[..., :3], params), "v has shape"),
        (lambda: ttt_linear(q, k[:1], v, params), "k has shape"),
        (lambda: ttt_linear(q, k, v, params, rate_in[:, :3]), "rate_in has shape"),
        (lambda: ttt_linear(q, k, v, params, None, rate_out[..., None]), "rate_out has shape"),
        (lambda: ttt_linear(q, k, v, params._replace(w1=params.w1[:1])), "params.w1 has shape"),
        (lambda: ttt_linear(q, k, v, params._replace(b1=params.b1[0])), "params.b1 has shape"),
        (lambda: ttt_linear(q, k, v, params._replace(gamma=params.gamma[0])), "params.gamma"),
        (lambda: ttt_linear(q, k, v, params, chunk_size=0), "chunk_size=0"),
        (lambda: ttt_linear(q, k, v, params, residual="none"), "residual='none'"),
        (lambda: ttt_linear(q, k, v, params, impl="fast"), "impl='fast'"),
        (lambda: ttt_linear_step(state, q, k, v, None, None), "q has shape"),
        (lambda: ttt_linear_step(state, *(x[:1, 0] for x in (q, k, v)), None, None), "params.w1"),
        (lambda: ttt_linear_init(params, -1), "batch=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="q has dtype"):
        ttt_linear(q.astype(int), k, v, params)
    with pytest.raises(TypeError, match="must be TTTMLPParams"):
        ttt_mlp(q, k, v, params)
    with pytest.raises(TypeError, match="must be TTTMLPParams"):
        ttt_mlp_init(params, 2)


# ViTTT


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def clipped(g, axis):
    return g / (np.sqrt(np.sum(g * g, axis, keepdims=True)) + 1)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_vittt_glu_is_one_step_of_autodiff(clip, shared):
    with jax.enable_x64(True):
        q, k, v = (draw(i, 2, 6, 3, 4) for i in range(3))
        lead = () if shared else (2,)
        w1, w2 = draw(3, *lead, 3, 4, 4), draw(4, *lead, 3, 4, 4)
        out, after = vittt_glu(q, k, v, w1, w2, rate=0.7, grad_scale=0.5, clip=clip)
        times = functools.partial(jnp.einsum, "bnhd,bhde->bnhe")
        f = lambda x, w1, w2: times(x, w1) * jax.nn.silu(times(x, w2))  # noqa: E731
        batched = [jnp.broadcast_to(w, (2, 3, 4, 4)) for w in (w1, w2)]
        loss = lambda *w: -jnp.sum(f(k, *w) * v) * 0.5 / 6  # noqa: E731
        grads = jax.grad(loss, (0, 1))(*batched)
        moved = [
            w - 0.7 * (clipped(np.asarray(g), -2) if clip else g)
            for w, g in zip(batched, grads, strict=True)
        ]
        assert_trees_close(after, tuple(moved), 1e-12)
        assert_close(out, f(q, *moved), 1e-12)


def test_vittt_glu_without_clip_is_gated_linear_attention():
    """o = phi'(q) * (q w1 + eta sum <q, k> (v * phi(k))), phi' with the moved gate."""
    with jax.enable_x64(True):
        q, k, v = (draw(i, 1, 6, 1, 4) for i in range(3))
        w1, w2 = draw(3, 1, 4, 4), draw(4, 1, 4, 4)
        out, (_, gate) = vittt_glu(q, k, v, w1, w2, rate=0.9, clip=False)
        q, k, v = (x[0, :, 0] for x in (q, k, v))
        values = v * jax.nn.silu(k @ w2[0])
        linear = q @ w1[0] + 0.9 / 3 / 6 * (q @ k.T) @ values
        assert_close(out[0, :, 0], linear * jax.nn.silu(q @ gate[0, 0]), 1e-12)


def conv(x, w):
    """Depthwise cross-correlation of one image [h, w, d] with [d, 3, 3]."""
    out = jax.lax.conv_general_dilated(
        x[None], jnp.moveaxis(w, 0, -1)[:, :, None], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
    )  # fmt: skip
    return out[0]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (2, 5)])
def test_vittt_dwconv_is_one_step_of_autodiff_of_a_convolution(clip, shared, grid):
    with jax.enable_x64(True):
        q, k, v = (draw(i, 2, *grid, 3) for i in range(3))
        w3 = draw(3, *(() if shared else (2,)), 3, 3, 3)
        out, after = vittt_dwconv(q, k, v, w3, rate=0.7, grad_scale=0.5, clip=clip)
        for n in range(2):
            w = w3 if shared else w3[n]
            loss = lambda w, n=n: -jnp.sum(conv(k[n], w) * v[n]) * 0.5 / np.prod(grid)  # noqa: E731
            g = np.asarray(jax.grad(loss)(w))
            w = w - 0.7 * (clipped(g, (-2, -1)) if clip else g)
            assert_close(after[n], w, 1e-12)
            assert_close(out[n], conv(q[n], w), 1e-12)


def test_vittt_dwconv_without_clip_is_linear_attention_over_neighbourhoods():
    with jax.enable_x64(True):
        (h, w), scale = (3, 4), 0.9 / 3 / 12
        q, k, v = (np.asarray(draw(i, 1, h, w, 2)) for i in range(3))
        w3 = draw(3, 2, 3, 3)
        out, _ = vittt_dwconv(q, k, v, w3, rate=0.9, clip=False)
        around = lambda x, y, z: np.pad(x[0], ((1, 1), (1, 1), (0, 0)))[y : y + 3, z : z + 3]  # noqa: E731
        for y, x in np.ndindex(h, w):
            expected = np.asarray(conv(jnp.asarray(q[0]), w3))[y, x]
            for i, j in np.ndindex(h, w):
                overlap = np.sum(around(q, y, x) * around(k, i, j), (0, 1))
                expected = expected + scale * overlap * v[0, i, j]
            assert_close(out[0, y, x], expected, 1e-12)


def test_vittt_keeps_types_is_finite_at_zero_and_names_what_does_not_fit():
    x, w, w3 = jnp.zeros((1, 4, 2, 3), "bfloat16"), jnp.ones((2, 3, 3)), jnp.ones((3, 3, 3))
    out, (w1, _) = vittt_glu(x, x, x, w, w)
    assert out.dtype == x.dtype and w1.dtype == jnp.float32 and w1.shape == (1, 2, 3, 3)
    out, kernel = vittt_dwconv(x, x, x, w3)
    assert out.dtype == x.dtype and kernel.dtype == jnp.float32 and kernel.shape == (1, 3, 3, 3)
    zero = x.astype("float32")
    for f, weights in ((vittt_glu, (w, w)), (vittt_dwconv, (w3,))):
        loss = lambda *a, f=f: jnp.sum(f(*a)[0])  # noqa: E731
        grads = quick_jit(jax.grad(loss, range(3 + len(weights))))
        assert all(np.all(np.isfinite(g)) for g in grads(zero, zero, zero, *weights))
        with pytest.raises(ValueError, match="v has shape"):
            f(zero, zero, zero[..., :2], *weights)
        with pytest.raises(TypeError, match="q has dtype"):
            f(zero.astype(int), zero, zero, *weights)
    with pytest.raises(ValueError, match="w2 has shape"):
        vittt_glu(zero, zero, zero, w, w[:1])
    with pytest.raises(ValueError, match="w3 has shape"):
        vittt_dwconv(zero, zero, zero, w3[:2])
