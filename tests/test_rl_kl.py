"""KL estimators, log-probabilities and entropies of jaxlab.rl against exact enumeration and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from jaxlab import rl

SMALL = np.concatenate([s * np.geomspace(1e-6, 0.5, 60) for s in (1, -1)] + [[0.0]])
LARGE = np.linspace(-15, 15, 61)


def k3(d):
    """exp(-d) - 1 + d by its series where that is short, in float64."""
    n = np.arange(2, 40)
    series = np.sum((-d[:, None]) ** n / scipy.special.factorial(n), 1)
    return np.where(np.abs(d) < 1, series, np.expm1(-d) + d)


VALUES = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": k3, "abs": np.abs}
SLOPES = {"k1": np.ones_like, "k2": lambda d: d, "k3": lambda d: -np.expm1(-d), "abs": np.sign}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 5e-7), ("float64", 1e-15)])
@pytest.mark.parametrize("kind", VALUES)
def test_values_and_slopes_keep_their_digits(kind, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        d = jnp.asarray(np.concatenate([SMALL, LARGE]), dtype)
        fn = lambda x: jnp.sum(rl.kl_tokens(x, jnp.zeros_like(x), kind))  # noqa: E731
        value, slope = rl.kl_tokens(d, jnp.zeros_like(d), kind), jax.jit(jax.grad(fn))(d)
    exact = np.asarray(d, np.float64)
    assert value.dtype == dtype
    np.testing.assert_allclose(value, VALUES[kind](exact), rtol=tolerance * 2)
    np.testing.assert_allclose(slope, SLOPES[kind](exact), rtol=tolerance * 2)
    assert kind == "k1" or np.all(np.asarray(value) >= 0)


@pytest.mark.parametrize("kind", ("k1_st", "k3_st"))
@pytest.mark.parametrize("clamp", (None, 0.5))
def test_straight_through_has_a_value_and_the_gradient_of_k2(kind, clamp):
    d = jnp.float32(LARGE)
    value, vjp = jax.vjp(lambda x: rl.kl_tokens(x, jnp.zeros_like(x), kind, clamp), d)
    expected = VALUES[kind[:2]](LARGE)
    expected = expected if clamp is None else np.clip(expected, -clamp, clamp)
    np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(vjp(jnp.ones_like(d))[0], d)


def test_a_clamp_stops_values_and_gradients_even_of_infinite_estimates():
    d = jnp.array([-200.0, -2.0, 0.1, 30.0])
    value, vjp = jax.vjp(lambda x: rl.kl_tokens(x, jnp.zeros(4), "k3", 10.0), d)
    np.testing.assert_allclose(value, [10, np.exp(2) - 3, k3(np.array([0.1]))[0], 10], rtol=1e-6)
    np.testing.assert_allclose(vjp(jnp.ones(4))[0], [0, 1 - np.exp(2), 0.0951626, 0], rtol=1e-5)


def test_in_expectation_estimators_are_the_divergence_and_its_gradients():
    """Enumerated policy: E k1 = E k3 = KL; E grad k2 = grad KL(pi, ref); E grad k3 = grad KL(ref, pi)."""
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        z, reference = (jnp.asarray(random.standard_normal(9)) for _ in range(2))
        log_ref = jax.nn.log_softmax(reference)
        pi = jax.nn.softmax(z)

        def mean(kind):  # the samples are drawn from pi, which is not differentiated
            return lambda z: jnp.sum(pi * rl.kl_tokens(jax.nn.log_softmax(z), log_ref, kind))

        def kl(p_logits, q_logs):
            logs = jax.nn.log_softmax(p_logits)
            return jnp.sum(jnp.exp(logs) * (logs - q_logs))

        forward, reverse = (
            jax.value_and_grad(kl)(z, log_ref),
            jax.grad(lambda z: jnp.sum(jnp.exp(log_ref) * (log_ref - jax.nn.log_softmax(z))))(z),
        )
        for kind in ("k1", "k3", "k1_st", "k3_st"):
            np.testing.assert_allclose(mean(kind)(z), forward[0], rtol=1e-12)
        for kind in ("k2", "k1_st", "k3_st"):
            np.testing.assert_allclose(jax.grad(mean(kind))(z), forward[1], rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(jax.grad(mean("k3"))(z), reverse, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(jax.grad(mean("k1"))(z), 0, atol=1e-14)


@pytest.mark.parametrize("dtype", ("float32", "float64", "bfloat16"))
@pytest.mark.parametrize("chunk", (None, 4))
def test_log_probabilities_and_entropies_are_those_of_float64(dtype, chunk):
    random = np.random.default_rng(0)
    options = dict(temperature=0.7, chunk=chunk)
    with jax.enable_x64(dtype == "float64"):
        z = jnp.asarray(100 + 3 * random.standard_normal((3, 5, 11)), dtype)
        z = z.at[0, 0, 2].set(-jnp.inf)
        tokens = jnp.asarray(random.integers(3, 11, (3, 5)))
        logp = lambda z: rl.logprobs_from_logits(z, tokens, **options)  # noqa: E731
        entropy = lambda z: rl.entropy_from_logits(z, **options)  # noqa: E731
        exact = scipy.special.log_softmax(np.asarray(z, np.float64) / 0.7, -1)
        p = np.exp(exact)
        onehot = np.asarray(tokens)[..., None] == np.arange(11)
        h = -np.sum(p * np.where(p > 0, exact, 0), -1)
        slope = -p * (np.where(p > 0, exact, 0) + h[..., None]) / 0.7
        for fn, value, grad in (
            (logp, np.sum(np.where(onehot, exact, 0), -1), (onehot - p) / 0.7),
            (entropy, h, slope),
        ):
            got, vjp = jax.vjp(jax.jit(fn), z)
            (got_grad,) = vjp(jnp.ones_like(got))
            assert got.dtype == ("float64" if dtype == "float64" else "float32")
            assert got_grad.dtype == dtype
            tolerance = 1e-12 if dtype == "float64" else 1e-5
            np.testing.assert_allclose(got, value, rtol=tolerance, atol=tolerance)
            tolerance = 1e-2 if dtype == "bfloat16" else tolerance
            np.testing.assert_allclose(
                np.asarray(got_grad, np.float64), grad, rtol=tolerance, atol=tolerance
            )


def test_a_token_beyond_the_vocabulary_is_nan_and_harms_no_loss_where_it_is_masked():
    logits = jnp.zeros((1, 2, 3))
    logp = rl.logprobs_from_logits(logits, jnp.array([[1, 7]]))
    assert np.isfinite(logp[0, 0]) and np.isnan(logp[0, 1])

    def loss(z):
        logp = rl.logprobs_from_logits(z, jnp.array([[1, 7]]))
        batch = dict(logp_old=jnp.full((1, 2), -1.0), adv=jnp.ones(1), mask=jnp.array([[1, 0]]))
        return rl.rl_loss(logp, batch, rl.RLConfig())[0]

    grad = jax.grad(loss)(logits)
    assert np.all(np.isfinite(grad)) and np.any(grad[0, 0] != 0) and np.all(grad[0, 1] == 0)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda z: rl.logprobs_from_logits(z, jnp.zeros((2, 4), int)), "tokens"),
        (
            lambda z: rl.logprobs_from_logits(z, jnp.zeros((2, 3), int), temperature=0),
            "temperature",
        ),
        (lambda z: rl.entropy_from_logits(z, temperature=-1.0), "temperature"),
        (lambda z: rl.entropy_from_logits(z, chunk=0), "chunk"),
        (lambda z: rl.entropy_from_logits(z[..., :0]), "logits"),
        (lambda z: rl.kl_tokens(z, z, "k5"), "k5"),
        (lambda z: rl.kl_tokens(z, z[0]), "logp_ref"),
        (lambda z: rl.kl_tokens(z, z, clamp=0), "clamp"),
    ],
)
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call(jnp.zeros((2, 3, 4)))
