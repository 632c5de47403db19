"""The inner step of TTT and its theorems: closed forms against autodiff, SVD and unrolled sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ttt_oracle
from ttt_cases import as_numpy, assert_close, config, inputs, quick_jit, replace

from jaxlab.ttt import (
    FastWeights,
    newton_schulz,
    swiglu_minus_grads,
    to_linear_attention,
    ttt,
    ttt_autodiff,
)

pytestmark = pytest.mark.slow


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def swiglu(fw, x):
    return (jax.nn.silu(x @ fw["w0"]) * (x @ fw["w2"])) @ fw["w1"]


# Newton-Schulz


@pytest.mark.parametrize("shape", [(4, 4), (3, 6), (6, 3), (2, 1, 5, 4)])
@pytest.mark.parametrize("coeffs, steps", [("lact", 5), ("lact", 2), ("muon", 5), ("muon", 7)])
def test_newton_schulz_moves_singular_values_only(shape, coeffs, steps):
    """U and V stay; each singular value goes through the odd polynomials."""
    with jax.enable_x64(True):
        g = np.asarray(draw(0, *shape))
        u, s, vt = np.linalg.svd(g, full_matrices=False)
        s = s / (np.linalg.norm(s, axis=-1, keepdims=True) + 1e-7)
        for a, b, c in (ttt_oracle.LACT if coeffs == "lact" else ttt_oracle.MUON)[:steps]:
            s = a * s + b * s**3 + c * s**5
        assert_close(newton_schulz(g, coeffs, steps), (u * s[..., None, :]) @ vt, 1e-12)


def test_newton_schulz_without_steps_only_scales_and_takes_coefficients():
    with jax.enable_x64(True):
        g = draw(1, 3, 5)
        assert_close(newton_schulz(g, steps=0), g / (jnp.linalg.norm(g) + 1e-7), 1e-14)
        assert_close(newton_schulz(g, ttt_oracle.LACT), newton_schulz(g), 0)
        assert_close(newton_schulz(g, ttt_oracle.LACT, 2), newton_schulz(g, "lact", 2), 0)
        assert newton_schulz(g).dtype == jnp.float64
    low = draw(2, 8, 8).astype("bfloat16")
    assert newton_schulz(low).dtype == jnp.bfloat16
    exact = newton_schulz(low.astype("float32")).astype("bfloat16")
    assert np.array_equal(newton_schulz(low), exact)
    assert not np.array_equal(newton_schulz(low, dtype="bfloat16"), exact)
    # Norms whose squares are beyond the type of the iteration, or of the input.
    for scale, dtype in ((300, "float16"), (1e20, "float32"), (1e-30, "float32")):
        big = newton_schulz(scale * jnp.eye(8), dtype=dtype)
        assert_close(big, newton_schulz(jnp.eye(8)) if scale > 1 else 0 * big, 2e-3)
    values = np.linalg.svd(newton_schulz(draw(3, 64, 64).astype("float32")), compute_uv=False)
    assert 0.5 < values.min() and values.max() < 1.2


@pytest.mark.parametrize("shape", [(3, 3), (2, 4), (4, 2)])
def test_newton_schulz_of_zero_is_zero_with_finite_gradients(shape):
    zero = jnp.zeros(shape, "float32")
    value, grad = jax.value_and_grad(lambda g: jnp.sum(newton_schulz(g)))(zero)
    assert value == 0 and np.all(np.isfinite(grad))


def test_newton_schulz_names_what_it_does_not_know():
    g = jnp.ones((2, 2))
    for call, message in (
        (lambda: newton_schulz(g, "svd"), "coeffs='svd'"),
        (lambda: newton_schulz(g, "lact", 6), "steps=6 must be at most 5"),
        (lambda: newton_schulz(g, "muon", -1), "steps=-1"),
        (lambda: newton_schulz(g, [(1.0, 2.0)]), "coeffs="),
        (lambda: newton_schulz(g, [(1.0, 2.0, 3.0)]), "a triple for each of steps=5"),
        (lambda: newton_schulz(g[0]), "G has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Gradients of the inner loss


@pytest.mark.parametrize("loss", ["dot", "squared"])
@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_closed_gradients_are_those_of_autodiff_each_with_its_rate(loss, lead):
    with jax.enable_x64(True):
        fw = {"w0": draw(0, *lead, 3, 5), "w1": draw(1, *lead, 5, 4), "w2": draw(2, *lead, 3, 5)}
        k, v, rates = draw(3, *lead, 7, 3), draw(4, *lead, 7, 4), draw(5, *lead, 7, 3)

        def total(fw, rate):
            pred = swiglu(fw, k)
            each = jnp.sum((pred - v) ** 2, -1) / 2 if loss == "squared" else -jnp.sum(pred * v, -1)
            return -jnp.sum(rate * each)

        got = swiglu_minus_grads(FastWeights(**fw), k, v, rates, loss)
        for i, name in enumerate(("w0", "w1", "w2")):
            expected = jax.grad(total)(fw, rates[..., i])[name]
            assert_close(getattr(got, name), expected, 1e-12, name)
        ones = swiglu_minus_grads(FastWeights(**fw), k, v, loss=loss)
        assert_close(ones.w0, jax.grad(total)(fw, jnp.ones(v.shape[:-1]))["w0"], 1e-12)


def test_gradients_name_shapes_that_do_not_fit():
    fw = FastWeights(jnp.ones((3, 5)), jnp.ones((5, 4)), jnp.ones((3, 5)))
    k, v = jnp.ones((7, 3)), jnp.ones((7, 4))
    for args, message in (
        ((fw, k, v[:6]), "v has shape"),
        ((fw, k[:, :2], v), "fw.w0 has shape"),
        ((fw._replace(w1=fw.w1.T), k, v), "fw.w"),
        ((fw._replace(w2=None), k, v), "fw.w2 has shape None"),
        ((fw._replace(w2=jnp.ones((2, 3, 5))), k, v), "fw.w2 has leading axes"),
        ((fw, k, v, jnp.ones((7, 2))), "rates has shape"),
        ((fw, k, v, None, "l1"), "loss='l1'"),
    ):
        with pytest.raises(ValueError, match=message):
            swiglu_minus_grads(*args)


# The oracle


@pytest.mark.parametrize("t", [0, 1, 4, 11])
@pytest.mark.parametrize("visibility", ["exclusive", "inclusive_chunk"])
@pytest.mark.parametrize("loss, steps", [("dot", 1), ("squared", 2)])
def test_autodiff_oracle_is_the_layer_where_both_exist(t, visibility, loss, steps):
    """No norm, no orthogonalisation, one rate for all: the swiglu layer is TTT of a plain net."""
    cfg = config("base", weight_norm=None, orthogonalize=None, loss=loss, steps=steps)
    cfg = replace(cfg, visibility=visibility)
    with jax.enable_x64(True):
        q, k, v, fw, rates, mu = inputs(0, cfg, b=1, h=1, t=t, per_matrix=False)
        rates = 0.1 * rates  # squared error diverges otherwise, and rounding with it
        expected, state = ttt(q, k, v, fw, rates, mu, cfg)
        one = lambda x: x[0, :, 0]  # noqa: E731
        params = {name: w[0] for name, w in fw._asdict().items()}
        out, params = ttt_autodiff(
            one(q), one(k), one(v), params, swiglu, loss, rates=one(rates), momentum=one(mu),
            chunk_size=4, visibility=visibility, steps=steps,
        )  # fmt: skip
        assert_close(out, one(expected), 1e-12)
        for name, w in params.items():
            assert_close(w, getattr(state.fw, name)[0, 0], 1e-12, name)


def test_autodiff_oracle_applies_rates_out_by_chunk_and_any_loss():
    """A linear net, squared error: the plain loop written out."""
    with jax.enable_x64(True):
        q, k, v, w = draw(0, 7, 3), draw(1, 7, 3), draw(2, 7, 2), draw(3, 3, 2)
        rates, out_rates, mu = (jax.random.uniform(jax.random.key(i), (7,)) * 0.3 for i in range(3))
        huber = lambda pred, target: jnp.sum(jnp.sqrt(1 + (pred - target) ** 2), -1)  # noqa: E731
        out, params = ttt_autodiff(
            q, k, v, w, lambda w, x: x @ w, huber, rates=rates, rate_out=out_rates, momentum=mu,
            chunk_size=3, steps=2,
        )  # fmt: skip
        q, k, v, w, rates, out_rates, mu = as_numpy((q, k, v, w, rates, out_rates, mu))
        delta, expected = np.zeros_like(w), []
        for part in (slice(0, 3), slice(3, 6), slice(6, 7)):
            for _ in range(2):
                error = k[part] @ w - v[part]
                slope = rates[part, None] * error / np.sqrt(1 + error**2)
                delta = k[part].T @ slope + mu[part].mean() * delta
                w = w - out_rates[part].mean() * delta
            expected.append(q[part] @ w)
        assert_close(out, np.concatenate(expected), 1e-12)
        assert_close(params, w, 1e-12)


def tanh_mlp(theta, x):
    return jnp.tanh(jnp.tanh(x @ theta["a"] + theta["c"]) @ theta["b"])


@pytest.mark.parametrize("loss", ["dot", "squared"])
@pytest.mark.parametrize("gates", ["", "momentum", "rates", "momentum rates rate_out"])
def test_ttt_is_linear_attention_with_momentum_with_any_kernel(loss, gates):
    """Theorems 1 to 3, the coefficients from their double sum, term by term."""
    with jax.enable_x64(True):
        t = 9
        q, k, v = draw(0, t, 3), draw(1, t, 3), 0.3 * draw(2, t, 4)
        # Small enough for descent with rate 1 to be stable: chaos would amplify rounding.
        theta = {"a": 0.3 * draw(3, 3, 6), "c": 0.3 * draw(4, 6), "b": 0.3 * draw(5, 6, 5)}
        params = {"theta": theta, "w": 0.3 * draw(6, 5, 4)}
        rng = np.random.default_rng(7)
        given = {name: jnp.asarray(rng.uniform(0.1, 0.6, t)) for name in gates.split()}
        net = lambda p, x: tanh_mlp(p["theta"], x) @ p["w"]  # noqa: E731
        expected, after = ttt_autodiff(q, k, v, params, net, loss, **given)
        form = quick_jit(functools.partial(to_linear_attention, phi=tanh_mlp, loss=loss))(
            q, k, v, params, **given
        )
        q_eff, k_eff, v_eff, s0, coeff = form
        assert_close(q_eff @ s0 + ((q_eff @ k_eff.T) * coeff) @ v_eff, expected, 1e-13)
        assert_close(s0 + k_eff.T @ (coeff[-1][:, None] * v_eff), after["w"], 1e-13)
        assert_close(q_eff[-1], tanh_mlp(after["theta"], q[-1:])[0], 1e-13)
        alpha = given.get("momentum", np.zeros(t))
        out = given.get("rate_out", np.ones(t))
        for i, j in np.ndindex(t, t):
            terms = [out[s] * np.prod(alpha[j + 1 : s + 1]) for s in range(j, i + 1)]
            assert abs(coeff[i, j] - sum(terms)) < 1e-13


def test_first_token_of_the_linear_form_is_theorem_one():
    with jax.enable_x64(True):
        q, k, v = draw(0, 1, 3), draw(1, 1, 3), draw(2, 1, 4)
        theta = {"a": draw(3, 3, 6), "c": draw(4, 6), "b": draw(5, 6, 5)}
        params = {"theta": theta, "w": draw(6, 5, 4)}
        form = to_linear_attention(q, k, v, params, tanh_mlp, rates=jnp.asarray([0.3]))
        feature = tanh_mlp(theta, k)
        assert_close(form.k_eff, feature, 1e-14)
        assert_close(form.v_eff, -0.3 * (feature @ params["w"] - v), 1e-14)
        assert_close(form.coeff, [[1.0]], 0)


def test_oracle_names_what_does_not_fit():
    q = k = jnp.ones((5, 3))
    v, w = jnp.ones((5, 2)), jnp.ones((3, 2))
    net = lambda w, x: x @ w  # noqa: E731
    phi = lambda theta, x: x  # noqa: E731
    for call, message in (
        (lambda: ttt_autodiff(q, k[:4], v, w, net), "k has shape"),
        (lambda: ttt_autodiff(q, k, v, w, net, "l1"), "loss='l1'"),
        (lambda: ttt_autodiff(q, k, v, w, net, rates=jnp.ones(4)), "rates has shape"),
        (lambda: ttt_autodiff(q, k, v, w, net, visibility="token"), "visibility='token'"),
        (lambda: ttt_autodiff(q, k, v, w, net, chunk_size=0), "chunk_size=0"),
        (lambda: to_linear_attention(q, k, v, {"theta": (), "w": w, "b": v}, phi), "bias-free"),
        (lambda: to_linear_attention(q, k, v, {"w": w}, phi), "bias-free"),
        (lambda: to_linear_attention(q, k, v, {"theta": (), "w": w[:, :1]}, phi), "'w'"),
        (lambda: to_linear_attention(q, k, v, {"theta": (), "w": w[:-1]}, phi), "features"),
        (lambda: to_linear_attention(q, k, v, {"theta": (), "w": w}, phi, momentum=v), "momentum"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="v has dtype"):
        ttt_autodiff(q, k, v.astype(int), w, net)
