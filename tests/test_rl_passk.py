"""pass@k of jaxlab.rl: exact rationals, subsets by enumeration, and expectations over binomial counts."""

import functools
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from scipy.special import gammaln

from jaxlab import rl

VARIANTS = ("none", "loo", "loo1", "wrloo")


def rational(n, c, k):
    """1 - C(n-c, k) / C(n, k), exactly."""
    miss = Fraction(1)
    for i in range(min(k, c) if n - c >= k else 0):
        # k factors with c, or c factors with k: the same number.
        miss *= Fraction(n - max(c, k) - i, n - i)
    return 1 - miss if n - c >= k else Fraction(1)


def counts(number, seed=0):
    random = np.random.default_rng(seed)
    n = random.choice([1, 2, 7, 64, 1000, 5000, 10000], number)
    part = lambda low: np.floor(low + (n + 1 - low) * random.uniform(size=number) ** 4).astype(int)  # noqa: E731
    return n, part(0), part(1)


def test_pass_at_k_is_the_exact_rational_in_float32():
    n, c, k = counts(300)
    exact = np.array([float(rational(*map(int, x))) for x in zip(n, c, k, strict=True)])
    got = rl.pass_at_k(n, c, k)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=0, atol=1e-7)
    with jax.enable_x64(True):
        wide = rl.pass_at_k(n, jnp.asarray(c, jnp.float64), k)
    assert wide.dtype == jnp.float64
    np.testing.assert_allclose(wide, exact, rtol=0, atol=1e-14)
    for k in (1, 4, 100):
        n, c, _ = counts(100, seed=k)
        n = np.maximum(n, k)
        exact = [float(rational(int(a), int(b), k)) for a, b in zip(n, c, strict=True)]
        got = jax.jit(lambda n, c: rl.pass_at_k(n, c, k))(n, c)  # noqa: B023
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=0, atol=1e-7)


def test_the_case_that_log_gammas_get_wrong():
    assert abs(float(rl.pass_at_k(10000, 2, 4)) - float(rational(10000, 2, 4))) < 1e-8


def test_pass_at_k_on_a_whole_grid():
    """Monotone, and exact where that is simple."""
    n = 30
    table = np.asarray(rl.pass_at_k(n, np.arange(n + 1)[:, None], np.arange(1, n + 1)))
    exact = [[float(rational(n, c, k)) for k in range(1, n + 1)] for c in range(n + 1)]
    np.testing.assert_allclose(table, exact, atol=1e-7)
    assert np.all(np.diff(table, axis=0) >= 0) and np.all(np.diff(table, axis=1) >= 0)
    np.testing.assert_allclose(table[:, 0], np.arange(n + 1) / n, rtol=1e-6)
    np.testing.assert_array_equal(table[0], 0)
    np.testing.assert_array_equal(table[n], 1)
    np.testing.assert_array_equal(table[1:, -1], 1)


def test_curves_maxima_and_counts_agree():
    random = np.random.default_rng(0)
    correct = random.uniform(size=(3, 4, 12)) < random.uniform(size=(3, 4, 1))
    ks = (1, 2, 5, 12)
    curve = jax.jit(lambda x: rl.pass_at_k_curve(x, ks))(correct)
    assert curve.shape == (3, 4, 4) and curve.dtype == jnp.float32
    for i, k in enumerate(ks):
        np.testing.assert_allclose(curve[..., i], rl.pass_at_k(12, correct.sum(-1), k), atol=2e-7)
        np.testing.assert_allclose(curve[..., i], rl.max_at_k(correct, k), atol=2e-7)


def subsets(g, k, variant):
    """The weights by their definitions, from every subset."""
    n = len(g)

    def raw(indices, k):
        out = dict.fromkeys(indices, 0.0)
        for chosen in itertools.combinations(indices, k):
            for i in chosen:
                out[i] += max(g[j] for j in chosen) / math.comb(len(indices), k)
        return out

    s = raw(range(n), k)
    if variant == "none":
        return [s[i] for i in range(n)]
    if variant == "loo":
        rest = [raw([j for j in range(n) if j != i], k) for i in range(n)]
        return [s[i] - sum(rest[i].values()) / (n - 1) for i in range(n)]
    out = [0.0] * n
    for chosen in itertools.combinations(range(n), k):
        for i in chosen:
            second = max(g[j] for j in chosen if j != i)
            out[i] += (max(g[j] for j in chosen) - second) / math.comb(n, k)
    return out


def allowed(variant, n, k):
    return not (variant == "loo" and k == n or variant == "loo1" and k == 1)


@pytest.mark.parametrize("n", (2, 3, 5, 7, pytest.param(10, marks=pytest.mark.slow)))
def test_weights_are_those_of_all_subsets(n):
    random = np.random.default_rng(n)
    kinds = {
        "continuous": random.standard_normal(n),
        "ties": random.integers(0, 3, n).astype(float),
        "binary": random.integers(0, 2, n).astype(float),
        "equal": np.full(n, 0.7),
    }
    for (name, g), k in itertools.product(kinds.items(), range(1, n + 1)):
        largest = [max(x) for x in itertools.combinations(g, k)]
        np.testing.assert_allclose(rl.max_at_k(g, k), np.mean(largest), rtol=1e-6, atol=1e-7)
        for variant in VARIANTS[:3]:
            if not allowed(variant, n, k):
                continue
            expected = subsets(g, k, variant)
            with jax.enable_x64(True):
                got = np.asarray(rl.pkpo_weights(g, k, variant))
                closed = rl.pkpo_weights(g, k, variant, binary=True) if name == "binary" else got
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(closed, expected, rtol=1e-12, atol=1e-14)
            for value in set(g.tolist()):
                assert np.ptp(got[g == value]) <= 1e-15


def binomial(n, p):
    c = np.arange(n + 1)
    return np.array([math.comb(n, int(i)) for i in c]) * p**c * (1 - p) ** (n - c)


@pytest.mark.parametrize("p, n, k", [(0.02, 16, 8), (0.1, 16, 16), (0.3, 16, 4), (0.6, 6, 3)])
def test_every_weight_makes_the_gradient_of_pass_at_k_and_the_table_of_its_spread(p, n, k):
    """Exact expectation over c of the gradient of a one-logit policy; spreads printed in the note."""
    printed = {
        (0.02, 16, 8): (0.2412, 0.2213, 0.2205, 0.2206),
        (0.1, 16, 16): (0.9369, None, 0.4230, 0.4230),
        (0.3, 16, 4): (0.2783, 0.1178, 0.0587, 0.0859),
    }
    true = k * (1 - p) ** (k - 1) * p * (1 - p)
    chance = binomial(n, p)
    correct = (np.arange(n) < np.arange(n + 1)[:, None]).astype(float)
    score = np.where(correct == 1, 1 - p, -p)
    for column, variant in enumerate(VARIANTS):
        if not allowed(variant, n, k):
            continue
        with jax.enable_x64(True):
            weights = np.asarray(rl.pkpo_weights(correct, k, variant, binary=True))
        sample = np.sum(weights * score, 1)
        mean = chance @ sample
        np.testing.assert_allclose(mean, true, rtol=1e-10)
        spread = np.sqrt(chance @ (sample - mean) ** 2)
        if (p, n, k) in printed:
            np.testing.assert_allclose(spread, printed[p, n, k][column], atol=5e-5)


@pytest.mark.parametrize("k", (1, 2, 5, 8))
def test_estimates_of_pass_at_k_and_its_weight_are_unbiased(k):
    p, n = 0.3, 8
    chance = binomial(n, p)
    correct = np.arange(n) < np.arange(n + 1)[:, None]
    rho = np.asarray(rl.pass_at_k_curve(correct, (k,)), np.float64)[:, 0]
    np.testing.assert_allclose(chance @ rho, 1 - (1 - p) ** k, rtol=1e-6)
    # Left out, the others estimate the weight: unbiased beside any function of the sample itself.
    weight = np.asarray(rl.passk_weight_loo(correct, k), np.float64)
    for value in (0, 1):
        part = chance @ np.mean(weight * (correct == value), 1)
        expected = k * (1 - p) ** (k - 1) * (p if value else 1 - p)
        np.testing.assert_allclose(part, expected, rtol=1e-6)


@functools.cache
def long_case(n, k, variant):
    """(float32 rewards, weights in float64 from the sorted formulas of the note)."""
    g = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    order = np.argsort(g)
    x = g[order].astype(np.float64)
    i = np.arange(n)

    def choose(a, b):
        with np.errstate(invalid="ignore"):
            logs = gammaln(a + 1) - gammaln(b + 1) - gammaln(a - b + 1)
        return np.where((a >= b) & (b >= 0), np.exp(logs - total), 0)

    total = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
    own, shared = choose(i, k - 1), choose(i - 1, k - 2)
    after = np.append(np.cumsum((x * shared)[::-1])[::-1][1:], 0)
    s = x * own + after
    if variant == "loo1":
        below = choose(i, k - 2)  # pairs of maximum i and second j
        s = x * np.append(0, np.cumsum(below)[:-1]) - np.append(0, np.cumsum(x * below)[:-1])
    out = np.empty(n)
    out[order] = s
    return g, out


@pytest.mark.parametrize("variant", ("none", "loo1"))
@pytest.mark.parametrize("n, k", [(5000, 8), (5000, 500), (2000, 1999)])
def test_float32_keeps_six_digits_for_thousands_of_samples(n, k, variant):
    g, expected = long_case(n, k, variant)
    got = jax.jit(lambda g: rl.pkpo_weights(g, k, variant))(g)
    assert got.dtype == jnp.float32
    assert np.max(np.abs(got - expected)) <= 1e-6 * np.max(np.abs(expected))


def test_shifts_scales_orders_and_sums():
    random = np.random.default_rng(0)
    g, n, k, b = random.standard_normal(9), 9, 4, 2.5
    with jax.enable_x64(True):
        call = lambda g, variant, **more: np.asarray(rl.pkpo_weights(g, k, variant, **more))  # noqa: E731
        close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-13)
        close(call(g, "none").sum(), k * rl.max_at_k(g, k))
        close(rl.pkpo_weights(g, 1, "none"), g / n)
        assert np.all(call(g, "loo1") >= 0)
        close(call(g + b, "loo1"), call(g, "loo1"))
        close(call(g + b, "loo") - call(g, "loo"), b * (k / n - k / (n - 1)))
        order = random.permutation(n)
        binary = (g > 0).astype(float)
        for variant in VARIANTS:
            x, more = (binary, dict(binary=True)) if variant == "wrloo" else (g, {})
            close(call(x[order], variant, **more), call(x, variant, **more)[order])
            if variant != "wrloo":
                close(call(3 * x, variant), 3 * call(x, variant))
        rloo = rl.group_advantage(binary, np.zeros(n, int), 1, kind="rloo")
        close(rl.pkpo_weights(binary, 1, "wrloo", binary=True), rloo / n)


def test_weights_of_prompts():
    p = np.array([0.0, 0.1, 0.5, 1 - 1e-7, 1.0], np.float32)
    exact = np.asarray(p, np.float64)
    for k in (1, 2, 8, 64):
        np.testing.assert_allclose(
            rl.passk_weight(p, k), k * (1 - exact) ** (k - 1), 2e-6, atol=1e-37
        )
    np.testing.assert_array_equal(rl.log_passk_weight(p, 1), np.zeros(5))
    logs = np.asarray(rl.log_passk_weight(p, 4096))
    assert np.all(np.isfinite(logs[:-1])) and logs[-1] == -np.inf
    np.testing.assert_allclose(logs[:-1], np.log(4096) + 4095 * np.log1p(-exact[:-1]), rtol=1e-6)
    np.testing.assert_allclose(jnp.sum(jax.nn.softmax(logs)), 1, rtol=1e-6)
    np.testing.assert_array_equal(rl.passk_weight(p, 2)[-1], 0)
    for k, cross in ((2, 0.5), (4, 0.370), (8, 0.257), (16, 0.169)):
        assert rl.passk_weight(cross - 1e-3, k) > 1 > rl.passk_weight(cross + 1e-3, k)


def test_analytic_advantages_are_the_closed_form():
    for n, k in ((8, 3), (8, 8), (8, 1), (16, 4)):
        correct = (np.arange(n) < np.arange(n + 1)[:, None]).astype(float)
        got = np.asarray(jax.jit(lambda x: rl.passk_analytic_advantage(x, k))(correct))  # noqa: B023
        for c in range(n + 1):
            r = float(rational(n, c, k))
            scale = math.sqrt(r * (1 - r)) + 1e-6
            fail = Fraction(math.comb(max(n - c - 1, 0), k - 1), math.comb(n - 1, k - 1))
            wrong = float(1 - rational(n, c, k) - fail) / scale
            expected = np.where(correct[c] == 1, (1 - r) / scale, wrong)
            expected = expected if 0 < c and r < 1 else np.zeros(n)
            np.testing.assert_allclose(got[c], expected, rtol=2e-6, atol=1e-9)
        np.testing.assert_allclose(got.sum(1), 0, atol=1e-5)


def test_best_minus_second():
    g = np.array([[1.0, 4.0, 2.5], [3.0, 3.0, 1.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(
        rl.best_minus_second_advantage(g), [[0, 1.5, 0], [0, 0, 0], [0, 0, 1]]
    )
    expected = 1.5 / (np.std(g[0], ddof=1) + 1e-6)
    np.testing.assert_allclose(
        rl.best_minus_second_advantage(g[0], True), [0, expected, 0], rtol=1e-6
    )
    np.testing.assert_array_equal(
        rl.best_minus_second_advantage(np.ones(3), True, 0.0), np.zeros(3)
    )


def test_no_gradient_flows():
    def total(x):
        one = (rl.pkpo_weights(x, 2, v) for v in ("none", "loo", "loo1"))
        two = (rl.max_at_k(x, 2), rl.passk_weight(x, 3), rl.best_minus_second_advantage(x, True))
        return sum(jnp.sum(y) for y in (*one, *two))

    x = jnp.array([0.1, 0.7, 0.3])
    np.testing.assert_array_equal(jax.grad(total)(x), jnp.zeros(3))


def test_traced_values_out_of_range_are_nan_and_checkify_tells():
    run = jax.jit(lambda c: rl.pass_at_k(5, c, 2))
    np.testing.assert_array_equal(np.isnan(run(jnp.array([-1, 0, 5, 6]))), [1, 0, 0, 1])
    assert "c must be in [0, n]" in checkify.checkify(run)(jnp.array([6]))[0].get()
    got = jax.jit(lambda x: rl.pkpo_weights(x, 2, "wrloo", binary=True))(jnp.array([0, 0.5, 1]))
    assert np.all(np.isnan(got))


X, B = np.array([0.3, 0.1, 0.2]), np.array([0, 1, 1])


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: rl.pass_at_k(5, 1, 0), "k="),
        (lambda: rl.pass_at_k(5, 1, 6), "k="),
        (lambda: rl.pass_at_k(5, 1, 2.0), "k="),
        (lambda: rl.pass_at_k(5, 6, 2), "c must"),
        (lambda: rl.pass_at_k(5, -1, 2), "c must"),
        (lambda: rl.pass_at_k(5, 1.5, 2), "c must"),
        (lambda: jax.jit(lambda k: rl.pass_at_k(5, 1, k))(2), "k="),
        (lambda: rl.pass_at_k_curve(B, (1, 4)), "k="),
        (lambda: rl.pass_at_k_curve(X, (1,)), "correct"),
        (lambda: rl.max_at_k(X, 4), "k="),
        (lambda: rl.max_at_k(X, True), "k="),
        (lambda: rl.max_at_k(np.array([1, np.nan]), 1), "rewards"),
        (lambda: rl.max_at_k(np.float32(1), 1), "rewards"),
        (lambda: rl.passk_weight(0.5, 0), "k="),
        (lambda: rl.passk_weight(0.5, 1.5), "k="),
        (lambda: rl.log_passk_weight(1.5, 2), "p must"),
        (lambda: rl.passk_weight_loo(X, 2), "correct"),
        (lambda: rl.passk_weight_loo(B, 4), "k="),
        (lambda: rl.pkpo_weights(X, 2, "best"), "variant"),
        (lambda: rl.pkpo_weights(X, 3, "loo"), "k="),
        (lambda: rl.pkpo_weights(X, 1, "loo1"), "k="),
        (lambda: rl.pkpo_weights(X[:1], 1, "loo"), "rewards"),
        (lambda: rl.pkpo_weights(B, 2, "wrloo"), "binary"),
        (lambda: rl.pkpo_weights(X, 2, "wrloo", binary=True), "rewards"),
        (lambda: rl.pkpo_weights(np.array([np.nan, 1]), 1, "none"), "rewards"),
        (lambda: rl.passk_analytic_advantage(B, 4), "k="),
        (lambda: rl.passk_analytic_advantage(X, 2), "correct"),
        (lambda: rl.best_minus_second_advantage(X[:1]), "rewards"),
        (lambda: rl.best_minus_second_advantage(X, eps=-1.0), "eps"),
    ],
)
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
