"""The Gaussian side of discrete diffusion: operator, curriculum, distillation, metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxlab import diffusion as d


def test_operator_of_two_tokens_is_the_closed_form():
    """Property 7: T = 2 Phi(mu / sqrt 2) - 1."""
    gamma = np.linspace(-6, 6, 301)
    mu = np.exp(-gamma / 2)
    p, slope = d.winner_probability(gamma, 2)
    assert p.dtype == slope.dtype == np.float64
    np.testing.assert_allclose(p, special.ndtr(mu / np.sqrt(2)), atol=1e-12)
    true = -mu / 2 * np.exp(-np.square(mu) / 4) / np.sqrt(4 * np.pi)
    np.testing.assert_allclose(slope, true, atol=1e-12)
    level = jax.jit(d.make_operator(2, -6, 6))(jnp.asarray(gamma, jnp.float32))
    np.testing.assert_allclose(level.alpha, 2 * special.ndtr(mu / np.sqrt(2)) - 1, atol=1e-6)
    np.testing.assert_allclose(
        level.one_minus_alpha, 2 * special.ndtr(-mu / np.sqrt(2)), rtol=2e-5, atol=1e-9
    )
    np.testing.assert_allclose(level.dalpha, 2 * 12 * true, atol=1e-5)


REFERENCE = {
    50257: {-3.55: (0.945474, -0.310529), -3.21: (0.764372, None), -2.87: (0.488839, -0.807112),
            -2.53: (0.254034, None), -2.19: (0.115436, None), -1.85: (0.049318, -0.124917)},
    30522: {-3.5: (0.941706, None), -2.8: (0.477217, None), -1.75: (0.048683, None)},
}  # fmt: skip


@pytest.mark.parametrize("K", [50257, pytest.param(30522, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["exact", "series", "poly9", "table"])
def test_operator_has_the_reference_values(K, kind):
    """Property 7: 1e-6 for the exact kinds, the approximations to what they are known for."""
    gammas = list(REFERENCE[K])
    level = d.make_operator(K, gammas[0], gammas[-1], kind)(jnp.array(gammas))
    alphas, slopes = zip(*REFERENCE[K].values(), strict=True)
    tolerance = 1e-6 if kind in ("exact", "series") else 4e-5
    np.testing.assert_allclose(level.alpha, alphas, atol=tolerance)
    np.testing.assert_allclose(level.alpha + level.one_minus_alpha, 1, atol=1e-6)
    for i, slope in enumerate(slopes):
        if slope is not None:
            width = gammas[-1] - gammas[0]
            loose = 3e-6 if kind in ("exact", "series") else 0.05
            np.testing.assert_allclose(level.dalpha[i] / width, slope, rtol=loose)


def test_approximations_say_where_they_end():
    """The release's first window: 150 terms do not reach it, and a polynomial leaves (0, 1) in a wide one."""
    with pytest.raises(ValueError, match="gamma_min=-5"):
        d.make_operator(50257, -5.0, -1.0, "series")
    level = d.make_operator(30522, -4.0, 6.0, "poly9")(jnp.linspace(-4, 6, 99))
    assert np.all(level.alpha > 0) and np.all(level.alpha <= 1)


def test_poly9_is_the_polynomial_of_the_release():
    t = jnp.linspace(0, 1, 11)
    release = [
        0.94548,
        -0.52857,
        -1.80157,
        -1.47020,
        2.76529,
        22.27457,
        -60.6564,
        65.29868,
        -33.74783,
        6.96988,
    ]
    operator = d.make_operator(50257, -3.55, -1.85, "poly9")
    level = operator(-3.55 + 1.7 * t)
    expected = np.polynomial.Polynomial(release)
    np.testing.assert_allclose(level.alpha, expected(np.asarray(t, np.float64)), atol=3e-5)
    np.testing.assert_allclose(level.dalpha, expected.deriv()(np.asarray(t, np.float64)), atol=2e-4)


@pytest.mark.parametrize("K", [2, pytest.param(16, marks=pytest.mark.slow), 50257])
def test_operator_is_monotone_and_its_derivative_true(K):
    gamma, h = np.linspace(-4.9, 3, 80), 1e-4
    p, slope = d.winner_probability(gamma, K)
    after, before = (d.winner_probability(gamma + s, K)[0] for s in (h, -h))
    np.testing.assert_allclose(slope, (after - before) / (2 * h), atol=1e-8)
    operator = jax.jit(d.make_operator(K, -5.0, 3.0))
    with jax.enable_x64(True):
        level = operator(jnp.asarray(gamma))
        np.testing.assert_allclose(level.alpha, (K * p - 1) / (K - 1), atol=1e-10)
        np.testing.assert_allclose(level.dalpha, 8 * K / (K - 1) * slope, atol=1e-9)
        assert np.all(np.diff(level.alpha) < 0)
        np.testing.assert_array_equal(operator(gamma - 9).alpha, operator(0 * gamma - 5).alpha)
    sure, blank = d.winner_probability(np.array([-20.0, 60.0]), K)[0]
    np.testing.assert_allclose([sure, blank], [1, 1 / K], atol=1e-12)


@pytest.mark.parametrize("alpha", [1 - 1e-6, 0.945, 0.049, 1e-5])
@pytest.mark.parametrize("K", [2, 256, 50257])
def test_gamma_of_a_share_is_the_inverse_of_the_operator(K, alpha):
    gamma = d.gamma_of_alpha(alpha, K)
    p, _ = d.winner_probability(np.array(gamma), K)
    assert abs((K * p - 1) / (K - 1) - alpha) < 1e-9
    if (K, alpha) == (2, 0.049):
        assert abs(2 * special.ndtr(np.exp(-gamma / 2) / 2**0.5) - 1 - alpha) < 1e-9


def test_operator_is_the_law_of_the_argmax():
    """Property 7: simulation at K = 16, 1e6 draws, 4 sigma."""
    gamma, n = -0.7, 1_000_000
    alpha, sigma = np.sqrt(special.expit(-gamma)), np.sqrt(special.expit(gamma))
    level = d.make_operator(16, -3, 3)(gamma)
    run = jax.jit(
        lambda key: d.dense_relaxation(key, jnp.full(n // 10, 3), alpha, sigma, 0.1, 16)[1]
    )
    z = np.concatenate([run(jax.random.key(i)) for i in range(10)])
    want = float(level.alpha) * np.eye(16)[3] + float(level.one_minus_alpha) / 16
    counts = np.bincount(z, minlength=16) / n
    assert np.all(np.abs(counts - want) <= 4 * np.sqrt(want * (1 - want) / n))


def test_order_statistics():
    """Property 8: those of dense draws, and right in float32 up to the largest vocabulary."""
    n, k, sigma = 63, 3, 0.4
    u = 1 - jax.random.uniform(jax.random.key(0), (20_000, k))
    values = np.asarray(d.gaussian_topk(u, n, sigma))
    assert np.all(np.diff(values) < 0)
    dense = sigma * np.random.default_rng(0).standard_normal((20_000, n))
    dense = -np.sort(-dense, -1)[:, :k]
    for i in range(k):
        assert stats.ks_2samp(values[:, i], dense[:, i]).pvalue > 1e-3
    for n in (3, 50256):
        u = np.asarray(u, np.float32)
        log_u = np.cumsum(np.log(u.astype(np.float64)) / (n - np.arange(k)), -1)
        true = -special.ndtri(-np.expm1(log_u)) if n > 3 else special.ndtri(np.exp(log_u))
        np.testing.assert_allclose(d.gaussian_topk(u, n, 1.0), true, rtol=2e-6, atol=2e-6)
    ends = d.gaussian_topk(jnp.array([[1.0, 1.0], [1e-30, 1e-30]]), 2, 1.0)
    assert np.all(np.isfinite(ends))


@pytest.mark.parametrize("x64", [False, True])
def test_truncated_mean(x64):
    c, sigma, tau = np.meshgrid([-0.3, 0.0, 0.5, 0.9], [0.05, 0.2, 1.0], [1e-3, 1e-2, 0.3, 5.0])
    # A numerically safe closed form: log_ndtr of SciPy in float64.
    u, m = c / sigma, sigma / tau - c / sigma
    mills = np.log(special.erfcx(m / np.sqrt(2))) + np.log(np.pi / 2) / 2
    true = c / tau - u**2 / 2 - np.log(2 * np.pi) / 2 + mills - special.log_ndtr(u)
    with jax.enable_x64(x64):
        got = jax.jit(d.log_mean_exp_truncated)(*map(jnp.asarray, (c, sigma, tau)))
        # In float32 the quotient c / tau has an ulp of 6e-5.
        np.testing.assert_allclose(
            got, true, atol=1e-10 if x64 else 3e-5, rtol=1e-10 if x64 else 2e-7
        )


def test_ids_are_distinct_and_every_order_equally_frequent():
    """Property 8: K = 8, all ordered triples."""
    K, k, n = 8, 3, 84_000
    exclude = jnp.full((n,), 5)
    ids = np.asarray(d.distinct_ids(jax.random.key(0), (n,), k, K, exclude))
    assert ids.dtype == np.int32 and not np.any(ids == 5)
    assert np.all(np.diff(np.sort(ids, -1)) > 0) and np.all((ids >= 0) & (ids < K))
    _, counts = np.unique(ids @ [64, 8, 1], return_counts=True)
    assert len(counts) == 7 * 6 * 5
    assert stats.chisquare(counts).pvalue > 1e-3
    for i in range(2):  # the core enumerated: ranks among those that are free
        free = [x for x in range(K) if x != 5]
        rank = [3, 5 - i, 0]
        want = [free.pop(r) for r in rank]
        assert list(d.ids_from_draws(jnp.array(rank), K, jnp.array(5))) == want


def relaxed(k, K, n, alpha, sigma, tau=1e-3, rule="exact", seed=0):
    x0 = jax.random.randint(jax.random.key(99), (n // 100, 100), 0, K)
    run = jax.jit(d.sparse_relaxation, static_argnums=(5, 6, 7))
    return x0, *run(jax.random.key(seed), x0, alpha, sigma, tau, k, K, rule)


@pytest.mark.parametrize(
    "k, K, gamma", [(2, 50257, -3.0), (3, 50257, -3.0), (5, 50257, -3.0), (3, 8, 0.0)]
)
def test_argmax_has_the_marginal_law(k, K, gamma):
    """Property 8: P(z = x0) = alpha + (1 - alpha) / K; the release's rule fails it."""
    n = 200_000
    alpha, sigma = np.sqrt(special.expit(-gamma)), np.sqrt(special.expit(gamma))
    want = d.winner_probability(np.array(gamma), K)[0]
    wide = 4 * np.sqrt(want * (1 - want) / n)
    x0, ids, weights, z = relaxed(k, K, n, alpha, sigma)
    assert abs(np.mean(z == x0) - want) < wide
    assert np.all((weights >= 0) & (weights <= 1)) and np.all(np.sum(weights, -1) <= 1 + 1e-6)
    assert np.all(np.diff(np.sort(ids, -1)) > 0) and np.all((ids >= 0) & (ids < K))
    x0, _, _, z = relaxed(k, K, n, alpha, sigma, rule="release")
    assert np.mean(z == x0) - want > 3 * wide


def test_where_the_clean_token_stands():
    """Only the last slot holds x0, and the largest weight is that of z."""
    x0, ids, weights, z = relaxed(3, 50257, 20_000, 0.976, 0.218)
    assert not np.any(ids[..., :2] == x0[..., None])
    winner = np.take_along_axis(np.asarray(ids), np.argmax(weights, -1)[..., None], -1)[..., 0]
    inside = np.any(np.asarray(ids) == np.asarray(z)[..., None], -1)
    assert np.all(inside) and np.all(winner == z)
    _, _, cold, _ = relaxed(3, 50257, 20_000, 0.976, 0.218, tau=1e-5)
    np.testing.assert_allclose(np.mean(np.sum(cold, -1)), 1, atol=1e-6)


def test_weights_against_dense_draws():
    """Property 8: coupled with dense draws the error falls with k; K = 64."""
    K, n, alpha, sigma, tau = 64, 4000, 0.98, 0.2, 1e-2
    random = np.random.default_rng(0)
    others, own = (
        sigma * random.standard_normal((n, K - 1)),
        alpha * 0.55 + sigma * random.standard_normal(n),
    )
    largest = np.maximum(others.max(-1), own)
    z = np.exp((others - largest[:, None]) / tau).sum(-1) + np.exp((own - largest) / tau)
    ordered, errors = -np.sort(-others, -1), []
    for k in (2, 3, 5):
        values = ordered[:, :k].copy()
        inside = own > values[:, -1]
        values[inside, -1] = own[inside]
        got = d.sparse_weights(values, own, inside, sigma, tau, K)
        true = np.exp((values - largest[:, None]) / tau) / z[:, None]
        errors.append(np.mean(np.abs(got - true)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[0] < 0.02


@pytest.mark.parametrize("k", [2, 5])
def test_float32_weights(k):
    """Those of float64 SciPy formulas as they are written."""
    K, alpha, sigma, tau = 50257, 0.98, 0.2, 1e-3
    x0 = jnp.zeros((1, 3000), int)
    u = 1 - jax.random.uniform(jax.random.key(0), (1, 3000, k))
    normals = jax.random.normal(jax.random.key(1), (1, 3000)) - 1
    draws = jnp.zeros((1, 3000, k), int)
    run = jax.jit(d.sparse_from_draws, static_argnums=7)
    got = np.asarray(run(u, normals, draws, x0, alpha, sigma, tau, K)[1])
    log_u = np.cumsum(np.log(np.asarray(u, np.float64)) / (K - 1 - np.arange(k)), -1)
    v = -sigma * special.ndtri(-np.expm1(log_u))
    own = alpha + sigma * np.asarray(normals, np.float64)
    inside = own > v[..., -1]
    c = np.where(inside, v[..., -2], v[..., -1])
    rest = np.where(inside, K - k, K - k - 1)
    v[..., -1] = np.where(inside, own, v[..., -1])
    top = np.maximum(v[..., 0], own)
    tail = (
        sigma**2 / (2 * tau**2)
        + special.log_ndtr(c / sigma - sigma / tau)
        - special.log_ndtr(c / sigma)
    )
    total = np.exp((v - top[..., None]) / tau).sum(-1) + rest * np.exp(tail - top / tau)
    total += np.where(inside, 0, np.exp((own - top) / tau))
    true = np.exp((v - top[..., None]) / tau) / total[..., None]
    # v has an ulp of 6e-8, divided by tau.
    np.testing.assert_allclose(got, true, atol=1.5e-4)
    with jax.enable_x64(True):
        u, normals = np.asarray(u, np.float64), np.asarray(normals, np.float64)
        wide = run(u, normals, draws, x0, alpha, sigma, tau, K)[1]
        np.testing.assert_allclose(wide, true, atol=1e-10)


def test_sparse_is_dense_when_all_others_are_kept():
    """k = K - 1 with the own coordinate below: nothing is left to a mean. The temperature is warned of."""
    random, shape = np.random.default_rng(0), (1, 300, 3)
    uniforms, normals = 1 - random.uniform(size=shape), random.standard_normal(shape[:2])
    draws = np.stack([random.integers(0, 3 - i, shape[:2]) for i in range(3)], -1)
    x0 = random.integers(0, 4, shape[:2])

    @jax.jit
    def run():
        parts = d.sparse_from_draws(uniforms, normals, draws, x0, 0.2, 0.7, 0.2, 4)
        return *parts, d.gaussian_topk(uniforms, 3, 0.7)

    with pytest.warns(UserWarning, match="tau=0.2 is above"):
        ids, weights, z, values = map(np.asarray, run())
    own = 0.2 + 0.7 * normals
    below = own < values[..., -1] - 1e-6
    all_of_them = np.exp(np.concatenate([values, own[..., None]], -1) / 0.2)
    want = all_of_them / all_of_them.sum(-1, keepdims=True)
    assert 20 < below.sum() < 280
    np.testing.assert_allclose(weights[below], want[below][:, :3], rtol=2e-6)
    np.testing.assert_array_equal(z[below], ids[below][:, 0])
    every = np.concatenate([ids, x0[..., None]], -1)[below]
    np.testing.assert_array_equal(np.sort(every, -1), np.arange(4) + np.zeros_like(every))


def test_dense_relaxation_and_embeddings():
    noise = np.random.default_rng(0).standard_normal((2, 3, 7))
    x0 = np.array([[0, 1, 2], [3, 4, 5]])
    alpha = np.array([[0.9], [0.5]])
    soft, z = d.dense_from_noise(noise, x0, alpha, 0.4, 0.1)
    w = alpha[..., None] * np.eye(7)[x0] + 0.4 * noise
    e = np.exp((w - w.max(-1, keepdims=True)) / 0.1)
    np.testing.assert_allclose(soft, e / e.sum(-1, keepdims=True), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(z, w.argmax(-1))
    table = np.random.default_rng(1).standard_normal((7, 4))
    np.testing.assert_allclose(d.mix_embeddings(table, x0), table[x0], rtol=1e-6)
    np.testing.assert_allclose(d.mix_embeddings(table, w / 0.1), soft @ table, atol=1e-5)
    ids, weights = x0[..., None] + np.arange(2), np.array([0.7, 0.2]) * np.ones((2, 3, 2))
    rows = jax.jit(d.mix_embeddings)(table, ids, weights)
    np.testing.assert_allclose(rows, 0.7 * table[x0] + 0.2 * table[x0 + 1], rtol=1e-5)
    grad = jax.grad(lambda t: jnp.sum(d.mix_embeddings(t, ids[:1, :1], weights[:1, :1])))(
        jnp.asarray(table)
    )
    np.testing.assert_allclose(
        grad, np.array([0.7, 0.2, 0, 0, 0, 0, 0])[:, None] * np.ones(4), rtol=1e-6
    )
    assert d.mix_embeddings(jnp.asarray(table, jnp.bfloat16), x0).dtype == jnp.float32


def test_nothing_of_the_sparse_form_grows_with_the_vocabulary():
    """Section 14: temporaries of the compiled relaxation, K = 1e3 and 1e6."""
    x0 = jnp.zeros((4, 64), int)
    size = {
        K: jax.jit(lambda key, K=K: d.sparse_relaxation(key, x0, 0.9, 0.4, 1e-3, 3, K))
        .lower(jax.random.key(0)).compile().memory_analysis().temp_size_in_bytes
        for K in (10**3, 10**6)
    }  # fmt: skip
    assert size[10**3] == size[10**6] < 200_000


def test_temperature():
    got = [float(d.log10_tau(s, -1, -2, 100, 200)) for s in (0, 100, 150, 200, 999)]
    np.testing.assert_allclose(got, [-1, -1, -1.5, -2, -2])
    assert jax.jit(lambda s: d.log10_tau(s, -3, -4, 5, 5))(5) == -4


def test_distillation():
    """Property 13."""
    x0 = jax.random.randint(jax.random.key(0), (4, 500), 0, 30)
    same, again = jax.jit(d.dcd_pair, static_argnums=4)(jax.random.key(1), x0, -2.0, -2.0, 30)
    np.testing.assert_array_equal(same, again)
    noise = np.random.default_rng(0).standard_normal((4, 500, 30))
    z_t, z_s = d.dcd_pair_from_noise(noise, x0, jnp.full((4, 1), 1.0), -3.0)
    for z, gamma in ((z_t, 1.0), (z_s, -3.0)):
        a, s = np.sqrt(special.expit(-gamma)), np.sqrt(special.expit(gamma))
        np.testing.assert_array_equal(z, (a * np.eye(30)[x0] + s * noise).argmax(-1))
    a, b = np.random.default_rng(1).standard_normal((2, 1, 3, 9))
    p, q = special.softmax(a, -1), special.softmax(b, -1)
    np.testing.assert_allclose(d.dcd_loss(a, b), np.sum(p * np.log(p / q), -1), rtol=1e-5)
    np.testing.assert_allclose(d.dcd_loss(a, b, "kl-fwd"), np.sum(q * np.log(q / p), -1), rtol=1e-5)
    np.testing.assert_array_equal(d.dcd_loss(a, a), 0)
    steps = [0, 9999, 10000, 45000]
    assert [d.dcd_delta(s) for s in steps] == [1 / 512, 1 / 512, 2 / 512, 16 / 512]
    np.testing.assert_array_equal(
        jax.jit(d.dcd_delta)(jnp.array(steps)), [d.dcd_delta(s) for s in steps]
    )


def test_metrics():
    """Property 14."""
    tokens = jnp.array([[3] * 6, [0, 1, 2, 3, 4, 5], [1, 1, 1, 2, 2, 7]])
    want = stats.entropy([3, 2, 1])
    np.testing.assert_allclose(d.unigram_entropy(tokens, 8), [0, np.log(6), want], atol=1e-6)
    mask = d.gen_ppl_mask(jnp.array([[1, 0, 2, 0, 0], [1, 2, 3, 4, 5]]), 0)
    np.testing.assert_array_equal(mask, [[True, True, True, False, False], [True] * 5])


X0, U = jnp.zeros((1, 2), int), jnp.full((1, 2, 3), 0.5)
WRONG = {
    "k=1 ": lambda: d.sparse_relaxation(jax.random.key(0), X0, 0.9, 0.4, 1e-3, 1, 9),
    "k=9 ": lambda: d.sparse_relaxation(jax.random.key(0), X0, 0.9, 0.4, 1e-3, 9, 9),
    "tau=0": lambda: d.dense_from_noise(U, X0, 0.9, 0.4, 0),
    "argmax_rule='x'": lambda: d.sparse_relaxation(jax.random.key(0), X0, 0.9, 0.4, 1, 2, 9, "x"),
    "x0 has dtype": lambda: d.dense_relaxation(jax.random.key(0), U[0], 0.9, 0.4, 1.0, 9),
    "normals has shape": lambda: d.sparse_from_draws(U, U, U.astype(int), X0, 0.9, 0.4, 1.0, 9),
    "weights must be None": lambda: d.mix_embeddings(U[0], U, U),
    "K=1 ": lambda: d.make_operator(1, 0, 1),
    "gamma_min=1": lambda: d.make_operator(9, 1, 1),
    "kind='spline'": lambda: d.make_operator(9, 0, 1, "spline"),
    "direction='kl'": lambda: d.dcd_loss(U, U, "kl"),
    "teacher_logits has shape": lambda: d.dcd_loss(U, U[:, :1]),
    "tokens has dtype": lambda: d.unigram_entropy(U[0], 9),
    "T=0": lambda: d.dcd_delta(0, 0),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError), match=message):
        WRONG[message]()
