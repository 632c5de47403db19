"""Per-class uncertainty: against float64 NumPy, closed forms, exact identities and brute force."""

import functools
from decimal import Decimal, localcontext
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import uncertainty as un

# Most of the time of this file is compilation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
SAFE, CRITICAL = (0, 2), (1, 3)
both_types = pytest.mark.parametrize("dtype", ["float32", "float64"])
few = settings(max_examples=5)
seeds = given(st.integers(0, 2**32 - 1))


def posteriors(seed, s, n, k, dtype="float64"):
    """[s, n, k] samples of n Dirichlets whose parameters lie between 1e-2 and 1e2; then the float64 of it."""
    random = np.random.default_rng(seed)
    alpha = 10 ** random.uniform(-2, 2, (n, k))
    alpha[0] = 0.01
    gamma = random.standard_gamma(alpha, (s, n, k)) + 1e-300
    p = (gamma / gamma.sum(-1, keepdims=True)).astype(dtype)
    return p, p.astype(np.float64)


def xlogx(x):
    return np.where(x > 0, x * np.log(np.where(x > 0, x, 1)), 0)


def oracle(p):
    """Everything from its definition, in float64."""
    mu = p.mean(0)
    dev = p - mu
    var, m3, m4 = ((dev**n).mean(0) for n in (2, 3, 4))
    cov = np.einsum("s...i,s...j->...ij", dev, dev) / len(p)
    inverse = np.where(mu > 0, 1 / np.where(mu > 0, mu, 1), 0)
    d = xlogx(p).mean(0) - xlogx(mu)
    fisher = cov * np.sqrt(inverse)[..., :, None] * np.sqrt(inverse)[..., None, :]
    return dict(mu=mu, var=var, m3=m3, m4=m4, cov=cov, c=var * inverse / 2, d=d, fisher=fisher,
                binary=d + xlogx(1 - p).mean(0) - xlogx(1 - mu))  # fmt: skip


def close(got, expected, tolerance, **options):
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, tolerance, tolerance, **options
    )


def groups(k):
    """Safe and critical classes of k."""
    return (SAFE, CRITICAL) if k > 3 else ((0,), (1,))


def all_of(p):
    """The functions of samples in one program."""
    safe, critical = groups(p.shape[-1])
    return {
        "m": un.moments(p),
        "m1": un.moments(p, ddof=1),
        "c": un.contributions(p),
        "c1": un.contributions(p, ddof=1),
        "d": un.contributions(p, "exact"),
        "bounds": un.contribution_bounds(p),
        "fisher": un.fisher_covariance(p),
        "mi": un.mutual_information(p),
        "h": un.predictive_entropy(p),
        "eh": un.expected_entropy(p),
        "variance": un.labelwise(p),
        "entropy": un.labelwise(p, "entropy"),
        "ova": un.one_vs_all_mi(p),
        "matrix": un.epistemic_confusion_matrix(p),
        "scores": un.critical_scores(p, safe, critical),
        "rho": un.skewness_ratio(*un.moments(p)[:3]),
        "reference": un.cbec(p, safe, critical, form="reference"),
        "disagreement": un.disagreement(p),
    }


every = quick_jit(all_of)
STATIC = ("method", "eps", "ddof", "from_logits", "safe", "critical", "form")


class quick:  # noqa: N801
    """Functions compiled as a whole: one by one, their operations take ten times as long."""

    contributions = jax.jit(un.contributions, static_argnames=STATIC[:4])
    moments = jax.jit(un.moments, static_argnames=STATIC[2:4])
    cbec = jax.jit(un.cbec, static_argnames=STATIC[4:] + ("eps",))
    matrix = jax.jit(un.epistemic_confusion_matrix, static_argnames=("form", "eps"))
    fisher_covariance = jax.jit(un.fisher_covariance)
    mutual_information = jax.jit(un.mutual_information)
    dirichlet_uncertainty = jax.jit(un.dirichlet_uncertainty)


SIZES = {(2, 4): 40, (40, 4): 30, (5, 10): 30, (3, 2): 30}


@both_types
@pytest.mark.parametrize(
    "size",
    [pytest.param(x, marks=pytest.mark.slow if x == (2, 4) else (), id=str(x)) for x in SIZES],
)
def test_all_functions_match_their_definitions(size, dtype):
    check_definitions(size, SIZES[size], dtype)


@pytest.mark.slow
@both_types
@few
@given(st.tuples(st.integers(2, 40), st.integers(2, 10)))
def test_functions_of_drawn_sizes_match_their_definitions(dtype, size):
    check_definitions(size, 20, dtype)


def check_definitions(size, n, dtype):
    with jax.enable_x64(dtype == "float64"):
        tolerance = {"float32": 2e-6, "float64": 1e-12}[dtype]
        p, wide = posteriors(len(size) + size[0], size[0], n, size[1], dtype)
        found, want = every(jnp.asarray(p)), oracle(wide)
        assert {str(x.dtype) for x in jax.tree.leaves(found)} == {dtype}
        factor = size[0] / (size[0] - 1)
        entropy = -xlogx(wide).sum(-1).mean(0)
        total = -xlogx(want["mu"]).sum(-1)
        binary = lambda x: -xlogx(x) - xlogx(1 - x)  # noqa: E731
        pairs = np.maximum(0, -want["fisher"]) / 2 * (1 - np.eye(size[1]))
        m, m1 = found["m"], found["m1"]
        for got, expected in [
            (m.mean, want["mu"]), (m.var, want["var"]), (m.m3, want["m3"]), (m.m4, want["m4"]),
            (m.cov, want["cov"]), (m1.var, factor * want["var"]), (m1.cov, factor * want["cov"]),
            (m1.m3, want["m3"]), (m1.m4, want["m4"]),
            (found["c"], want["c"]), (found["c1"], factor * want["c"]), (found["d"], want["d"]),
            (found["fisher"], want["fisher"]),
            (found["h"], total), (found["eh"], entropy), (found["ova"], want["binary"]),
            (found["variance"].total, want["mu"] * (1 - want["mu"])),
            (found["variance"].aleatoric, (wide * (1 - wide)).mean(0)),
            (found["variance"].epistemic, want["var"]),
            (found["entropy"].total, binary(want["mu"])),
            (found["entropy"].aleatoric, binary(wide).mean(0)),
            (found["entropy"].epistemic, want["binary"]),
            (found["matrix"], pairs.mean(0)),
        ]:  # fmt: skip
            close(got, expected, tolerance)
        close(found["mi"], total - entropy, min(tolerance, 1e-6))
        # Identities: the trace, the kernel of M, the symmetry.
        close(jnp.trace(found["fisher"], axis1=-2, axis2=-1) / 2, want["c"].sum(-1), tolerance)
        close(found["fisher"] @ jnp.sqrt(m.mean)[..., None], 0, tolerance)
        close(found["fisher"].mT, np.asarray(found["fisher"], np.float64), tolerance)
        # Bounds, with the rounding of the sum as their only slack.
        lower, upper = (np.asarray(x, np.float64) for x in found["bounds"])
        d, slack = np.asarray(found["d"], np.float64), 1 + 20 * np.finfo(dtype).eps
        assert np.all(d >= 0) and np.all(found["c"] >= 0)
        assert np.all(lower <= d * slack) and np.all(d <= upper * slack)
        close(upper, 2 * want["c"], tolerance)
        mi = np.asarray(found["mi"], np.float64)
        assert np.all(mi <= np.log1p(2 * want["c"].sum(-1)) + tolerance)
        assert np.all(want["c"].sum(-1) <= (size[1] - 1) / 2 + tolerance)

        safe, critical = map(np.array, groups(size[1]))
        block = np.maximum(0, -want["fisher"])[..., safe, :][..., critical].sum((-2, -1)) / 2
        is_safe = np.isin(want["mu"].argmax(-1), safe)
        scores = {
            "entropy": total, "mi": total - entropy, "maxprob": 1 - want["mu"].max(-1),
            "var_critical_max": want["var"][:, critical].max(-1), "eu_var": want["var"].sum(-1),
            "eu_var_critical": want["var"][:, critical].sum(-1),
            "ova_mi_critical": want["binary"][:, critical].sum(-1), "c_sum": want["c"].sum(-1),
            "c_critical_sum": want["c"][:, critical].sum(-1),
            "c_critical_max": want["c"][:, critical].max(-1),
            "d_critical_sum": want["d"][:, critical].sum(-1),
            "d_critical_max": want["d"][:, critical].max(-1), "cbec": block,
            "missed_critical_mass": want["mu"][:, critical].sum(-1) * is_safe,
            "c_critical_max_gated": want["c"][:, critical].max(-1) * is_safe,
        }  # fmt: skip
        assert set(found["scores"]) == set(scores)
        for name, expected in scores.items():
            close(found["scores"][name], expected, tolerance, err_msg=name)


def test_scores_have_the_values_of_the_functions_they_are_named_after():
    p = jnp.asarray(posteriors(3, 40, 30, 4, "float32")[0])
    scores = every(p)["scores"]
    for name, expected in {
        "cbec": quick.cbec(p, SAFE, CRITICAL),
        "missed_critical_mass": un.missed_critical_mass(p, SAFE, CRITICAL),
        "mi": quick.mutual_information(p),
    }.items():
        close(scores[name], np.asarray(expected), 1e-6)


@both_types
def test_taylor_forms_of_samples_and_of_moments(dtype):
    with jax.enable_x64(dtype == "float64"):
        tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
        random = np.random.default_rng(0)
        p = random.dirichlet([3, 2, 4, 1], (30, 20)).astype(dtype)
        want = oracle(p.astype(np.float64))
        for eps in (0.0, 0.05):
            mu = want["mu"] + eps
            series = [want["var"] / (2 * mu)]
            series.append(series[0] - want["m3"] / (6 * mu**2))
            series.append(series[1] + want["m4"] / (12 * mu**3))
            for method, expected in zip(("taylor2", "taylor3", "taylor4"), series, strict=True):
                close(quick.contributions(p, method, eps=eps), expected, tolerance)
                got = un.contributions_from_moments(quick.moments(p), method, eps=eps)
                close(got, expected, tolerance)
        exact = quick.contributions(p, "exact")
        close(quick.contributions(p, "exact", eps=0.5, ddof=1), np.asarray(exact, np.float64), 0)
        rho = np.abs(want["m3"]) / (3 * (want["mu"] + 0.1) * (want["var"] + 0.1))
        args = [jnp.asarray(want[x], dtype) for x in ("mu", "var", "m3")]
        close(un.skewness_ratio(*args, eps=0.1), rho, tolerance)
        signed = want["m3"] / (3 * want["mu"] * want["var"])
        close(un.signed_skewness_ratio(*args), signed, tolerance)
        mask = np.asarray(un.reliable_mask(un.skewness_ratio(*args)))
        np.testing.assert_array_equal(mask, np.abs(signed) < 0.3)
        assert 0 < mask.mean() < 1


def test_float32_keeps_the_digits_of_a_small_spread_and_of_a_rare_class():
    """The difference of entropies has none left: shown beside it."""
    random = np.random.default_rng(0)
    for rare, spread in ((1e-4, 1e-6), (0.3, 1e-4), (1e-12, 1e-13)):
        d = random.normal(0, spread, (200, 1))
        p = np.concatenate([rare + d, 0.5 - d, np.full_like(d, 0.5 - rare)], 1).astype(np.float32)
        wide = p.astype(np.float64)
        u = wide / wide.mean(0) - 1
        want = (wide.mean(0) * ((1 + u) * np.log1p(u) - u).mean(0))[0]
        c = (0.5 * wide.var(0) / wide.mean(0))[0]
        np.testing.assert_allclose(float(quick.contributions(p, "exact")[0]), want, 1e-3)
        np.testing.assert_allclose(float(quick.contributions(p)[0]), c, 1e-4)
        if rare == 0.3:
            naive = jnp.mean(p * jnp.log(p), 0) - p.mean(0) * jnp.log(p.mean(0))
            assert abs(float(naive[0]) / want - 1) > 0.1


def test_float32_keeps_the_digits_of_what_is_left_below_one():
    """1 - mean would lose four of them."""
    for left in (1e-4, 1e-6):
        rest = left / 5 + np.random.default_rng(0).exponential(left, (50, 20, 1))
        p = np.concatenate([1 - rest, rest], -1).astype(np.float32)
        q = 1 - p[..., :1].astype(np.float64)
        mu = q.mean(0)
        gap = lambda q: (q.mean(0) * curved(q / q.mean(0) - 1).mean(0))[:, 0]  # noqa: E731
        first, total = 1 - q, -(mu * np.log(mu) + (1 - mu) * np.log1p(-mu))[:, 0]
        found = {kind: jax.jit(un.labelwise, static_argnums=1)(p, kind) for kind in KINDS}
        for got, want in (
            (jax.jit(un.one_vs_all_mi)(p), gap(first) + gap(q)),
            (found["entropy"].total, total),
            (found["variance"].total, (mu * (1 - mu))[:, 0]),
            (found["variance"].aleatoric, (q * first).mean(0)[:, 0]),
        ):
            np.testing.assert_allclose(got[:, 0], want, 1e-5, 0)
        maxprob = jax.jit(lambda p: un.critical_scores(p, (0,), (1,))["maxprob"])(p)
        np.testing.assert_allclose(maxprob, mu[:, 0], 1e-5, 0)


KINDS = ("variance", "entropy")


def curved(u):
    """(1 + u) log(1 + u) - u."""
    small = u**2 / 2 - u**3 / 6 + u**4 / 12
    return np.where(abs(u) < 1e-3, small, (1 + u) * np.log1p(u) - u)


def test_third_order_is_negative_for_a_rare_class():
    """Beta posterior of a rare class: the series is no score."""
    p = np.random.default_rng(0).beta(0.02, 5, (4000, 1))
    p = np.concatenate([p, 1 - p], 1)
    assert quick.contributions(p, "taylor3")[0] < -10 * quick.contributions(p, "exact")[0] < 0


ALPHAS = [(1, 1, 1), (2, 3, 1), (40, 900, 7), (1, 1, 2000),
          (1e-4, 2), (1e-6, 2), (0.01, 5), (32, 0.017), (1e-8, 1e-8), (1e-6, 1e6)]  # fmt: skip
GAMMA = Decimal("0.57721566490153286060651209008240243104215933593992")


EVEN_BERNOULLI = "1/6 -1/30 1/42 -1/30 5/66 -691/2730 7/6 -3617/510 43867/798 -174611/330".split()


def decimal(x):
    return Decimal(x.numerator) / Decimal(x.denominator)


def excess(x):
    """psi(x + 1) - log x with 40 digits, by 200 steps of the recurrence and Stirling's series."""
    y, x = decimal(x + 200), decimal(x)
    terms = (decimal(Fraction(b)) / (2 * n * y ** (2 * n)) for n, b in enumerate(EVEN_BERNOULLI, 1))
    return y.ln() + 1 / (2 * y) - sum(terms) - sum(1 / (x + i) for i in range(1, 201)) - x.ln()


def test_the_digamma_of_the_oracle_is_the_harmonic_numbers():
    with localcontext() as context:
        context.prec = 45
        for n in (1, 7, 900):
            harmonic = sum((Fraction(1, i) for i in range(1, n + 1)), Fraction(0))
            want = decimal(harmonic) - GAMMA - Decimal(n).ln()
            assert abs(excess(Fraction(n)) - want) < Decimal("1e-40")


@both_types
@pytest.mark.parametrize("alpha", ALPHAS, ids=str)
def test_dirichlet_against_forty_digits(alpha, dtype):
    alpha = [Fraction(float(np.asarray(a, dtype))) for a in alpha]  # the rounded numbers, exactly
    total, k = sum(alpha, Fraction(0)), len(alpha)
    with localcontext() as context:
        context.prec = 45
        d = [float(decimal(a / total) * (excess(a) - excess(total))) for a in alpha]
    rational = lambda f: [float(f(a, total)) for a in alpha]  # noqa: E731
    want = {
        "mean": rational(lambda a, t: a / t),
        "var": rational(lambda a, t: a * (t - a) / (t * t * (t + 1))),
        "contribution": rational(lambda a, t: (t - a) / (2 * t * (t + 1))),
        "rho": rational(lambda a, t: 2 * abs(t - 2 * a) / (3 * a * (t + 2))),
        "exact": d,
        "cbec": [
            [
                0 if i == j else np.sqrt(float(a * b)) / float(2 * total * (total + 1))
                for j, b in enumerate(alpha)
            ]
            for i, a in enumerate(alpha)
        ],
    }
    with jax.enable_x64(dtype == "float64"):
        tolerance = {"float32": 2e-6, "float64": 1e-12}[dtype]
        found = quick.dirichlet_uncertainty(jnp.asarray([float(a) for a in alpha], dtype))
        for name, expected in want.items():
            np.testing.assert_allclose(getattr(found, name), expected, tolerance, 0, err_msg=name)
        share = float((k - 1) / (2 * (total + 1)))
        np.testing.assert_allclose(float(found.contribution.sum()), share, tolerance)


def test_samples_of_a_dirichlet_converge_to_its_closed_form():
    """Within 3 standard errors of 20 batches; Beta too, and boundary suppression as mu falls."""
    random = np.random.default_rng(1)
    with jax.enable_x64(True):
        for alpha in ([2.0, 3, 1], [0.5, 4.0]):
            p = random.dirichlet(alpha, (3000, 20))
            want = quick.dirichlet_uncertainty(jnp.asarray(alpha))
            m = quick.moments(p, ddof=1)
            pairs = jnp.maximum(0, -quick.fisher_covariance(p)) / 2 * (1 - jnp.eye(len(alpha)))
            found = [m.mean, m.var, quick.contributions(p, ddof=1), quick.contributions(p, "exact"),
                     un.signed_skewness_ratio(m.mean, m.var, m.m3), pairs]  # fmt: skip
            for got, expected in zip(found, want, strict=True):
                got = np.asarray(got)
                error = 3 * got.std(0, ddof=1) / np.sqrt(len(got)) + 1e-12  # 0 on diagonals
                assert np.all(np.abs(np.abs(got.mean(0)) - expected) < error)
        mu, n = np.array([0.5, 1e-2, 1e-4]), 9.0
        beta = quick.dirichlet_uncertainty(jnp.asarray(np.stack([mu * n, (1 - mu) * n], -1)))
        close(beta.contribution[:, 0], (1 - mu) / (2 * (n + 1)), 1e-12)
        close(beta.rho[:, 0], 2 * (1 - 2 * mu) / (3 * mu * (n + 2)), 1e-12)
        assert np.all(np.diff(beta.var[:, 0]) < 0) and beta.var[2, 0] < 1e-4


def test_ddof_removes_the_bias_of_few_samples():
    p = np.random.default_rng(0).dirichlet([2, 3, 1], (5, 20000))
    truth = float(quick.dirichlet_uncertainty(jnp.array([2.0, 3, 1])).contribution.sum())
    biased, corrected = (float(quick.contributions(p, ddof=ddof).sum(-1).mean()) for ddof in (0, 1))
    assert abs(biased / (0.8 * truth) - 1) < 0.03 and abs(corrected / truth - 1) < 0.03


@pytest.mark.parametrize("symmetric", [False, True])
def test_order_of_the_approximation(symmetric):
    """|MI - sum C| is of third order in the spread, of fourth when it is symmetric."""
    mu = np.array([0.5, 0.3, 0.2])
    delta = np.array([[2.0, -1, -1], [-1, 2, -1], [-1, -1, 2]]) / 30
    delta = np.concatenate([delta, -delta]) if symmetric else delta
    with jax.enable_x64(True):
        errors = []
        for t in (1.0, 0.5, 0.25, 0.125):
            p = mu + t * delta
            errors.append(abs(float(quick.mutual_information(p) - quick.contributions(p).sum())))
        slope = np.log2(errors[-2] / errors[-1])
        assert abs(slope - (4 if symmetric else 3)) < 0.15


@both_types
def test_edges_of_the_simplex(dtype):
    with jax.enable_x64(dtype == "float64"):
        tolerance = {"float32": 1e-6, "float64": 1e-15}[dtype]
        found = every(jnp.eye(4, dtype=dtype))
        close(found["c"].sum(), 1.5, tolerance)
        close(found["mi"], np.log(4), tolerance)
        close(found["d"], np.log(4) / 4, tolerance)
        row = np.random.default_rng(0).dirichlet([1, 1, 1, 1]).astype(dtype)
        for same in (np.tile(row, (4, 1)), np.tile(np.eye(4, dtype=dtype)[1], (4, 1))):
            found = every(jnp.asarray(same))
            m = found["m"]
            zero = [m.var, m.m3, m.m4, m.cov, found["c"], found["d"], found["fisher"], found["mi"],
                    found["rho"], found["disagreement"], found["ova"],
                    found["scores"]["cbec"], found["reference"]]  # fmt: skip
            assert all(bool(jnp.all(x == 0)) for x in zero)
            assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(found))


EDGES = {
    "one-hot": np.eye(4),
    "identical": np.tile([0.1, 0.2, 0.3, 0.4], (4, 1)),
    "identical one-hot": np.tile([0.0, 1, 0, 0], (4, 1)),
    "zeros": np.array([[0.5, 0.5, 0, 0], [0, 0.3, 0.7, 0], [0.2, 0.2, 0.6, 0], [1, 0, 0, 0]]),
    "tiny": np.array(
        [[1e-38, 1, 0, 1e-42], [1e-30, 1, 1e-20, 0], [1e-25, 1, 1e-16, 0], [0, 1, 0, 0]]
    ),
}


@quick_jit
@jax.value_and_grad
def value_and_slope(p):
    extra = [
        quick.contributions(p, "taylor4"),
        quick.cbec(p, SAFE, CRITICAL, form="reference", eps=0.0),
        un.dominance(quick.contributions(p))[1:],
    ]
    return sum(jnp.sum(x) for x in jax.tree.leaves((all_of(p), extra)))


@both_types
@pytest.mark.parametrize("edge", EDGES)
def test_gradients_are_finite_at_the_edges(edge, dtype):
    with jax.enable_x64(dtype == "float64"):
        value, grad = value_and_slope(jnp.asarray(EDGES[edge], dtype))
        assert bool(jnp.isfinite(value)) and bool(jnp.all(jnp.isfinite(grad)))


@both_types
def test_gradient_of_the_exact_form(dtype):
    """(log p - log mu) / S inside; at p = 0 the slope of p log p is taken as 0."""
    with jax.enable_x64(dtype == "float64"):
        tolerance = {"float32": 1e-6, "float64": 1e-14}[dtype]
        p, s = EDGES["zeros"], 4
        mu = np.where(p.mean(0) > 0, p.mean(0), 1)
        slope = np.where(p > 0, np.log(np.where(p > 0, p, 1)) + 1, 0) - (np.log(mu) + 1)
        slope[:, 3] = 0
        slope_of = quick_jit(jax.grad(lambda p: un.contributions(p, "exact").sum()))
        close(slope_of(jnp.asarray(p, dtype)), slope / s, tolerance)
        # From close samples, where log p - log mu cancels.
        step = np.random.default_rng(0).normal(0, 1e-5, (s, 1))
        p = (np.array([0.3, 0.7]) + step * [1, -1]).astype(dtype)
        wide = p.astype(np.float64)
        want = np.log1p((wide - wide.mean(0)) / wide.mean(0)) / s
        np.testing.assert_allclose(
            slope_of(jnp.asarray(p)), want, 1e-6 if dtype == "float32" else 1e-9
        )


def test_second_derivatives_and_the_complement():
    """Hessian of D: delta / p / S - 1 / (S^2 mu), in p; binary MI adds the same of 1 - p."""
    with jax.enable_x64(True):
        p = posteriors(5, 3, 1, 4)[0][:, 0] * 0.5 + 0.125
        s, mu = 3, p.mean(0)
        for fn, terms in (
            (lambda p: quick.contributions(p, "exact").sum(), [(p, mu)]),
            (lambda p: un.one_vs_all_mi(p).sum(), [(p, mu), (1 - p, 1 - mu)]),
        ):
            found = np.asarray(quick_jit(jax.hessian(fn))(jnp.asarray(p)))
            for i in range(s):
                for j in range(s):
                    same = [(i == j) / q[i] / s - 1 / (s * s * m) for q, m in terms]
                    close(found[i, :, j], np.diag(sum(same)), 1e-10)


@few
@seeds
def test_symmetries(seed):
    with jax.enable_x64(True):
        p, _ = posteriors(seed, 20, 30, 4)
        random = np.random.default_rng(seed)
        classes, samples = random.permutation(4), random.permutation(20)
        found = every(jnp.asarray(p))
        moved = every(jnp.asarray(p[..., classes]))
        for name in ("c", "d", "ova"):
            close(moved[name], np.asarray(found[name])[..., classes], 1e-12)
        close(moved["matrix"], np.asarray(found["matrix"])[classes][:, classes], 1e-12)
        corrected = {"m1", "c1", "disagreement"}  # what knows how many samples there are
        for other, names in ((p[samples], set()), (np.concatenate([p, p]), corrected)):
            same = every(jnp.asarray(other))
            for name in set(found) - names:
                jax.tree.map(lambda x, y: close(x, np.asarray(y), 1e-12), same[name], found[name])
        close(quick.cbec(p, SAFE, CRITICAL), np.asarray(quick.cbec(p, CRITICAL, SAFE)), 1e-12)


@few
@seeds
def test_merging_and_splitting_classes(seed):
    """Log-sum inequality; a proportional split tells nothing new."""
    with jax.enable_x64(True):
        p, _ = posteriors(seed, 6, 8, 4)
        d = quick.contributions(p, "exact")
        merged = quick.contributions(
            np.concatenate([p[..., :2].sum(-1, keepdims=True), p[..., 2:]], -1), "exact"
        )
        assert np.all(merged[:, 0] <= d[:, :2].sum(-1) + 1e-14)
        split = np.concatenate([p[..., :1] * 0.3, p[..., :1] * 0.7, p[..., 1:]], -1)
        close(quick.mutual_information(split), np.asarray(d.sum(-1)), 1e-12)


def test_two_classes():
    with jax.enable_x64(True):
        p = np.random.default_rng(0).beta(2, 5, (9, 1, 1))
        p = np.concatenate([p, 1 - p], -1)
        c, m = quick.contributions(p)[0], quick.moments(p)
        close(c[0] * m.mean[0, 0], float(c[1] * m.mean[0, 1]), 1e-14)
        want = m.var[0, 0] / (2 * np.sqrt(m.mean[0, 0] * m.mean[0, 1]))
        close(quick.cbec(p, (0,), (1,)), float(want), 1e-14)


def test_axioms_hold_and_fail_as_stated():
    """A0, A1 above; A3: a mean-preserving spread raises C and D. Neither A2 nor A5 holds."""
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        p, _ = posteriors(2, 5, 30, 3)
        p = 0.5 * p + 0.5 / 3
        away = random.uniform(-0.1, 0.1, (5, 30, 3))
        away -= away.mean(-1, keepdims=True)
        spread = np.concatenate([p + away, p - away])
        for method in ("taylor2", "exact"):
            assert np.all(quick.contributions(spread, method) > quick.contributions(p, method))
            # A2: the uniform second-order distribution is not the maximum.
            uniform = random.dirichlet([1, 1, 1], 20000)
            top = quick.contributions(np.eye(3), method)
            assert np.all(top > 1.5 * quick.contributions(uniform, method))
            # A5: the same deviations about another mean count for more near the boundary.
            dev = np.array([[0.05, -0.05], [-0.05, 0.05]])
            centre, edge = (
                quick.contributions(np.array(mean) + dev, method)[0]
                for mean in ([0.5, 0.5], [0.1, 0.9])
            )
            assert edge > 4 * centre


def cbec_by_loops(p, safe, critical, weights, eps):
    """The authors' formula, pair by pair and sample by sample."""
    w = oracle(p)
    out = np.zeros(p.shape[1])
    for a, i in enumerate(safe):
        for b, j in enumerate(critical):
            sd = np.sqrt(w["var"] + eps)
            r = w["cov"][:, i, j] / (sd[:, i] * sd[:, j] + eps)
            geometric = np.sqrt(w["c"][:, i] * w["c"][:, j] + eps)
            out += weights[a, b] * geometric * np.maximum(0, -r)
    return out


@pytest.mark.parametrize("safe,critical", [((0, 1), (2, 3)), ((3,), (0, 2))])
def test_cross_boundary_confusion(safe, critical):
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        p = random.dirichlet([2, 1, 3, 0.5], (12, 25))
        weights = random.uniform(0, 2, (len(safe), len(critical)))
        for w in (None, weights):
            plain = np.ones_like(weights) if w is None else w
            got = quick.cbec(p, safe, critical, weights=w, form="reference", eps=1e-4)
            close(got, cbec_by_loops(p, safe, critical, plain, 1e-4), 1e-12)
            fisher = quick.cbec(p, safe, critical, weights=w)
            close(fisher, cbec_by_loops(p, safe, critical, plain, 0.0), 1e-12)
            got = quick.cbec(p, safe, critical, weights=w, form="reference")
            close(got, cbec_by_loops(p, safe, critical, plain, 1e-10), 1e-12)
            assert np.abs(np.asarray(fisher - got)).max() < 1e-4
        more = quick.cbec(p, safe, critical, weights=weights + 0.1)
        assert np.all(more >= quick.cbec(p, safe, critical, weights=weights))
        matrix = quick.matrix(p[:, :, None], form="reference", eps=1e-4)
        ones = np.ones((1, 1))
        for i, j in np.ndindex(4, 4):
            want = 0 if i == j else cbec_by_loops(p, (i,), (j,), ones, 1e-4).mean()
            close(matrix[i, j], want, 1e-12)


def test_disagreement_is_a_count_of_pairs():
    p = posteriors(4, 9, 30, 3, "float32")[0]
    votes = p.argmax(-1)
    pairs = [(a, b) for a in range(9) for b in range(a)]
    want = np.mean([votes[a] != votes[b] for a, b in pairs], 0)
    close(un.disagreement(p), want, 1e-6)


def test_logits_masked_classes_and_narrow_types():
    logits = np.random.default_rng(0).normal(0, 3, (4, 6, 4)).astype(np.float32)
    logits[..., 3] = -np.inf
    p = jax.nn.softmax(jnp.asarray(logits), -1)
    scores = functools.partial(un.critical_scores, safe=SAFE, critical=CRITICAL)
    found, want = quick_jit(lambda z, p: (scores(z, from_logits=True), scores(p)))(logits, p)
    for name in want:
        close(found[name], np.asarray(want[name]), 1e-6, err_msg=name)
    grad = jax.grad(lambda z: quick.contributions(z, "exact", from_logits=True).sum())(
        jnp.asarray(logits)
    )
    assert bool(jnp.all(jnp.isfinite(grad)))
    # Probabilities of 16 bits do not sum to 1; moments are float32.
    half = p.astype(jnp.bfloat16)
    exact = oracle(np.asarray(half, np.float64))
    found = quick.moments(half)
    assert found.var.dtype == jnp.float32
    close(found.var, exact["var"], 1e-6)
    ints = np.eye(3, dtype=np.int32)
    assert quick.contributions(ints).dtype == jnp.float32


def streamed(p):
    state = un.moments_init(p.shape[1:-1], p.shape[-1], dtype=p.dtype)
    state, _ = jax.lax.scan(lambda s, one: (un.moments_update(s, one), None), state, p)
    return state


@both_types
def test_streaming_moments_are_those_of_the_batch(dtype):
    with jax.enable_x64(dtype == "float64"):
        tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
        p, _ = posteriors(0, 40, 6, 4, dtype)

        @functools.partial(quick_jit, static_argnums=1)
        def run(p, ddof):
            """Whole; and in parts, between empty states."""
            empty = un.moments_init((6,), 4, dtype=p.dtype)
            parts = un.moments_merge(streamed(p[:11]), streamed(p[11:]))
            parts = un.moments_merge(un.moments_merge(empty, parts), empty)
            return [un.moments_finish(x, ddof=ddof) for x in (streamed(p), parts)], parts.count

        for ddof in (0, 1):
            want = quick.moments(p, ddof=ddof)
            found, count = run(jnp.asarray(p), ddof)
            assert float(count) == 40
            for m in found:
                for name, x, y in zip(m._fields, m, want, strict=True):
                    scale = max(float(jnp.max(jnp.abs(y))), 1e-3)
                    close(x / scale, np.asarray(y) / scale, tolerance, err_msg=name)


def test_streams_keep_three_digits_of_a_small_spread_in_float32():
    """mu = 1e-4, sd = 1e-6: powers would have none left."""
    d = np.random.default_rng(0).normal(0, 1e-6, (2000, 1))
    p = np.concatenate([1e-4 + d, 1 - 1e-4 - d], 1).astype(np.float32)
    want = oracle(p.astype(np.float64))
    found = un.moments_finish(quick_jit(streamed)(jnp.asarray(p)))
    halves = un.moments_merge(*(quick_jit(streamed)(jnp.asarray(x)) for x in (p[:1200], p[1200:])))
    for m in (found, halves.moments, quick.moments(p)):
        np.testing.assert_allclose(m.var[0], want["var"][0], 1e-3)
        np.testing.assert_allclose(m.m4[0], want["m4"][0], 1e-3)
        np.testing.assert_allclose(m.mean[0], want["mu"][0], 1e-6)
    assert abs(float(jnp.mean(p[:, 0] ** 2) - jnp.mean(p[:, 0]) ** 2) / want["var"][0] - 1) > 1e-3


def test_sharded_samples_and_batches_give_the_same():
    mesh = jax.make_mesh((4, 2), ("s", "n"), (jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("s", "n")
    p = jnp.asarray(posteriors(0, 16, 6, 4, "float32")[0])
    sharded = jax.device_put(p, jax.sharding.NamedSharding(mesh, spec))
    scores = jax.jit(functools.partial(un.critical_scores, safe=SAFE, critical=CRITICAL))
    for x, y in zip(*(scores(x).values() for x in (sharded, p)), strict=True):
        close(x, np.asarray(y), 1e-6)

    def local(p):
        """Each shard streams its samples; then all states are merged on each."""
        states = jax.lax.all_gather(streamed_from(p), "s")
        parts = [jax.tree.map(lambda x: x[i], states) for i in range(4)]  # noqa: B023
        return un.moments_finish(functools.reduce(un.moments_merge, parts))

    def streamed_from(p):
        first = un.moments_update(un.moments_init(p.shape[1:-1], p.shape[-1]), p[0])
        step = lambda s, one: (un.moments_update(s, one), None)  # noqa: E731
        return jax.lax.scan(step, first, p[1:])[0]

    out = jax.sharding.PartitionSpec("n")
    with jax.set_mesh(mesh):
        found = jax.jit(jax.shard_map(local, in_specs=spec, out_specs=out, check_vma=False))(p)
    for x, y in zip(found, quick.moments(p), strict=True):
        close(x, np.asarray(y), 2e-6)


def test_dominance_profiles_signatures_and_drift():
    random = np.random.default_rng(0)
    n, k, classes = 50, 4, 5
    c = random.exponential(size=(n, k)).astype(np.float32)
    c[3] = 0
    y, yhat = random.integers(0, 4, n), random.integers(1, 5, n)  # class 4 is never true
    found, profiles, signatures, drifted = jax.jit(
        lambda c: (
            un.dominance(c), un.epistemic_profiles(c, y, classes),
            un.error_signatures(c, y, yhat, classes), un.drift(c, yhat, classes, 7),
        )
    )(c)  # fmt: skip
    share = np.divide(
        c, c.sum(-1, keepdims=True), out=np.zeros_like(c), where=c.sum(-1, keepdims=True) > 0
    )
    np.testing.assert_array_equal(found.index, c.argmax(-1))
    close(found.fraction, share.max(-1), 1e-6)
    close(found.entropy, -xlogx(share).sum(-1), 1e-6)
    assert [float(x[3]) for x in found] == [0, 0, 0]

    def mean(mask):
        return c[mask].mean(0) if mask.any() else np.full(k, np.nan)

    close(profiles, [mean(y == i) for i in range(classes)], 1e-6)
    want = [[mean((y == i) & (yhat == j)) for j in range(classes)] for i in range(classes)]
    close(signatures, want, 1e-6)
    found, size = drifted, n // 7
    for t in range(7):
        part, labels = c[t * size : (t + 1) * size], yhat[t * size : (t + 1) * size]
        close(found.mean[t], part.mean(0), 1e-6)
        close(found.std[t], part.std(0), 1e-6)
        close(found.median[t], np.median(part, 0), 1e-6)
        for j in range(classes):
            want = part[labels == j].mean(0) if (labels == j).any() else np.full(k, np.nan)
            close(found.by_prediction[t, j], want, 1e-6)
