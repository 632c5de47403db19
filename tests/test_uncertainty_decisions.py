"""Decisions by a score: every function against a loop over samples in float64, ties and edges included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import uncertainty as un

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
few, seeds = settings(max_examples=8), given(st.integers(0, 2**32 - 1))
CRITICAL, CLASSES = (3, 1), 5
COVERAGES = (0.01, 0.1, 0.29, 0.5, 0.7, 1.0)
N = 40


def close(got, expected, tolerance=1e-6, **options):
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, tolerance, tolerance, **options
    )


def draw(seed, n=N, ties=True):
    """Labels, predictions that are often right, and scores with ties."""
    random = np.random.default_rng(seed)
    y = random.integers(0, 4, n)  # class 4 is only ever predicted
    yhat = np.where(random.uniform(size=n) < 0.6, y, random.integers(0, CLASSES, n))
    score = random.integers(0, 9, n) / 8 if ties else random.normal(size=n)
    return y, yhat, score.astype(np.float32)


def kept_by_loop(y, yhat, score, kept, critical=CRITICAL):
    """Rates of the kept part, by counting."""
    order = sorted(range(len(y)), key=lambda i: score[i])  # stable
    t, p = y[order[:kept]], yhat[order[:kept]]
    is_critical = [a in critical for a in t]
    missed = [a in critical and b not in critical for a, b in zip(t, p, strict=True)]
    wrong = [c and a != b for a, b, c in zip(t, p, is_critical, strict=True)]
    f1 = []
    for c in sorted(set(t) | set(p)):
        hit = sum((t == c) & (p == c))
        f1.append(2 * hit / (sum(t == c) + sum(p == c)))
    total, n = sum(a in critical for a in y), sum(is_critical)
    return un.SelectiveCurve(
        kept, np.mean(t == p), np.mean(f1), np.mean(t != p), sum(missed) / max(n, 1),
        sum(wrong) / max(n, 1), n, (total - n) / max(total, 1),
    )  # fmt: skip


@pytest.fixture(scope="module")
def programs():
    """Compiled once for all examples."""
    return {
        "curve": quick_jit(
            lambda y, yhat, s: un.selective_curve(y, yhat, s, CRITICAL, COVERAGES, num_classes=CLASSES)
        ),
        "ausc": quick_jit(
            lambda y, yhat, s: {m: un.ausc(y, yhat, s, CRITICAL, metric=m) for m in METRICS}
        ),
        "areas": quick_jit(
            lambda s, e: (
                un.aurc(s, e), un.aurc(s, e, kind="mean"), un.augrc(s, e), un.eaurc(s, e),
                un.coverage_at_risk(s, e, 0.25), un.risk_at_coverage(s, e, 0.29),
            )
        ),
        "conformal": quick_jit(
            lambda y, yhat, s, missed, graded, alpha: (
                un.conformal_threshold(s, missed, alpha),
                un.conformal_threshold(s, graded, alpha, bound=2.0),
                un.critical_fnr_threshold(y, yhat, s, CRITICAL, alpha),
            )
        ),
        "calibration": quick_jit(
            lambda p, y: (
                un.brier(p, y), un.reliability_curve(p, y, num_bins=10), un.ece(p, y, num_bins=10)
            )
        ),
        "detection": quick_jit(
            lambda s, y: (un.auroc(s, y), un.aupr(s, y), un.fpr_at_tpr(s, y), un.fpr_at_tpr(s, y, 0.5))
        ),
    }  # fmt: skip


METRICS = ("critical_fnr", "critical_error", "error_rate")


@few
@seeds
def test_selective_curve_and_ausc_are_the_loop(programs, seed):
    y, yhat, score = draw(seed)
    found = programs["curve"](y, yhat, score)
    for i, coverage in enumerate(COVERAGES):
        kept = max(1, int(np.ceil(coverage * N - 1e-9)))
        want = kept_by_loop(y, yhat, score, kept)
        for name, x, expected in zip(found._fields, found, want, strict=True):
            close(x[i], expected, err_msg=name)
    assert found.kept.dtype == found.kept_critical.dtype == jnp.int32
    grid = np.linspace(0.05, 1, 200)
    want = [kept_by_loop(y, yhat, score, max(1, int(np.ceil(c * N - 1e-9)))) for c in grid]
    for metric, got in programs["ausc"](y, yhat, score).items():
        close(got, np.trapezoid([getattr(x, metric) for x in want], grid), err_msg=metric)


def test_a_float64_threshold_neither_widens_nor_shifts_the_comparison():
    """np.float64(0.1) is below the float32 of 3 / 30, though 3 errors of 30 are a risk of 0.1."""
    score, error = np.arange(30, dtype=np.float32), np.repeat([0, 1], [27, 3])
    positive = np.repeat([1, 0, 1], [1, 1, 19])
    falling = np.r_[0.0, 1.0, 20:1:-1].astype(np.float32)
    p = np.random.default_rng(0).dirichlet([1, 2, 3], (4, 5)).astype(np.float32)
    posterior = un.lowrank_vi_init(jax.random.key(0), 3, 2, 1)
    with jax.enable_x64(True):
        for number in (float, np.float64, jnp.asarray):
            assert float(un.coverage_at_risk(score, error, number(0.1))) == 1
            assert float(un.fpr_at_tpr(falling, positive, number(0.95))) == 0
            eps, m = number(1e-10), un.moments(p)
            for x in (
                un.contributions(p, eps=eps),
                un.contributions_from_moments(m, eps=eps),
                un.skewness_ratio(*m[:3], eps=eps),
                un.cbec(p, (0,), (1,), form="reference", eps=eps),
                un.epistemic_confusion_matrix(p, form="reference", eps=eps),
                un.conformal_threshold(score, error, number(0.1), bound=number(1.0)),
                un.lowrank_vi_kl(posterior, prior_std=number(0.5)),
            ):
                assert x.dtype == jnp.float32


def test_kept_sizes_do_not_round_up_past_an_integer():
    """c N in float32 is 7.0000005 for 0.07 x 100, 29.000002 for 0.29 x 100."""
    n = 100
    y = np.arange(n) % 2
    found = un.selective_curve(
        y, y, np.arange(n), (1,), tuple(i / n for i in range(1, n + 1)), num_classes=2
    )
    np.testing.assert_array_equal(found.kept, np.arange(1, n + 1))


def test_curve_at_the_edges():
    y, yhat = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    curve = functools.partial(un.selective_curve, critical=(1,), num_classes=2)
    deferred = curve(y, yhat, [0, 1, 2, 3], coverages=(0.5,))
    assert [float(x[0]) for x in deferred[4:]] == [0, 0, 0, 1]  # no critical sample is kept
    none = curve(y * 0, yhat, [0, 1, 2, 3], coverages=(1.0,))
    assert [float(x[0]) for x in none[4:]] == [0, 0, 0, 0]
    # A constant score keeps the order of the data, signed zeros are equal.
    constant = curve(y, yhat, [0.0, -0.0, 0.0, -0.0], coverages=(0.25, 0.75))
    np.testing.assert_array_equal(constant.error_rate, np.float32([0, 2 / 3]))
    # At coverage 1 no score matters.
    whole = [curve(y, yhat, s, coverages=(1.0,)) for s in ([0, 1, 2, 3], [5, 5, 1, -np.inf])]
    assert all(bool(jnp.all(a == b)) for a, b in zip(*whole, strict=True))


def areas_by_loop(score, error):
    order = sorted(range(len(score)), key=lambda i: score[i])
    e = np.asarray(error, np.float64)[order]
    n = len(e)
    k = np.arange(1, n + 1)
    risk = np.cumsum(e) / k
    best = np.cumsum(np.sort(e)) / k
    trapezoid = lambda r: np.trapezoid(r, k / n) / (1 - 1 / n)  # noqa: E731
    under = k[risk <= 0.25]
    return (
        trapezoid(risk), risk.mean(), trapezoid(risk * k / n), risk.mean() - best.mean(),
        under.max() / n if under.size else np.nan, risk[int(np.ceil(0.29 * n - 1e-9)) - 1],
    )  # fmt: skip


@few
@seeds
def test_areas_and_operating_points_are_the_loop(programs, seed):
    y, yhat, score = draw(seed)
    for error in (y != yhat, np.zeros(N, bool), np.ones(N, bool)):
        for got, want in zip(
            programs["areas"](score, error), areas_by_loop(score, error), strict=True
        ):
            close(got, want)


def test_a_perfect_score_is_minimal_and_single_samples():
    error = np.array([0, 1, 0, 0, 1, 1, 0])
    scores = np.random.default_rng(0).normal(size=(200, 7))
    several = jax.jit(
        jax.vmap(lambda s: (un.aurc(s, error), un.augrc(s, error), un.eaurc(s, error)))
    )
    perfect = [float(x[0]) for x in several(error[None].astype(np.float32))]
    assert perfect[2] == 0
    for least, found in zip(perfect, several(jnp.asarray(scores)), strict=True):
        assert least <= float(found.min()) + 1e-6 and float(found.max()) > least + 0.1
    assert float(un.aurc([1.0], [1], kind="mean")) == 1
    for fn in (un.aurc, un.augrc):
        with pytest.raises(ValueError, match="at least 2 samples"):
            fn([1.0], [1])
    # 3 of 30 is a risk of 0.1, not above it.
    error = np.arange(30) % 10 == 0
    assert float(un.coverage_at_risk(np.arange(30), error[::-1], 0.1)) == 1


def detection_by_loop(score, positive):
    pos, neg = score[positive == 1], score[positive == 0]
    wins = [(a > b) + 0.5 * (a == b) for a in pos for b in neg]
    rates, precision, recall = [], 0.0, 0.0
    for t in sorted(set(score), reverse=True):
        tp, fp = sum(pos >= t), sum(neg >= t)
        rates.append((tp / len(pos), fp / len(neg)))
        precision += tp / (tp + fp) * (tp / len(pos) - recall)
        recall = tp / len(pos)
    at = lambda tpr: next(fpr for hit, fpr in rates if hit >= tpr)  # noqa: E731
    return np.mean(wins), precision, at(0.95), at(0.5)


@few
@seeds
def test_detection_is_the_loop_with_ties(programs, seed):
    y, _, score = draw(seed, ties=seed % 4 > 0)
    positive = (y == 0).astype(int)
    want = detection_by_loop(score, positive)
    for got, expected in zip(programs["detection"](score, positive), want, strict=True):
        close(got, expected)
    # Threshold rates that are met exactly: 19 of 20.
    score, positive = np.arange(40.0), np.repeat([0, 1], 20)
    score[0], score[20] = 50, -1
    assert float(un.fpr_at_tpr(score, positive)) == pytest.approx(1 / 20)


def test_detection_without_positives_or_negatives_is_nan():
    for positive in ([0, 0, 0], [1, 1, 1]):
        assert np.isnan(un.auroc([1.0, 2, 3], positive))
        assert np.isnan(un.fpr_at_tpr([1.0, 2, 3], positive))
    assert np.isnan(un.aupr([1.0, 2, 3], [0, 0, 0]))


def test_float64_scores_stay_apart_in_x64():
    """Scores that are equal in float32."""
    with jax.enable_x64(True):
        score, positive = 1 + np.arange(6) * 1e-12, np.array([0, 1, 0, 1, 0, 1])
        found, area = quick_jit(
            lambda s: (un.auroc(s, positive), un.aurc(s, positive, kind="mean"))
        )(score)
        assert found.dtype == area.dtype == jnp.float64
        close(found, detection_by_loop(score, positive)[0], 1e-15)
        close(area, areas_by_loop(score, positive)[1], 1e-15)


def test_bootstrap_is_a_loop():
    y, yhat, score = draw(0)
    indices = un.bootstrap_indices(jax.random.key(0), 50, N)
    assert indices.shape == (50, N) and indices.dtype == jnp.int32
    assert set(np.unique(indices)) == set(range(N))
    np.testing.assert_array_equal(indices, un.bootstrap_indices(jax.random.key(0), 50, N))

    def both(y, yhat, score):
        return un.ausc(y, yhat, score, CRITICAL), {"aurc": un.aurc(score, y != yhat)}

    area, other = jax.jit(lambda i: un.bootstrap(i, both, y, yhat, score))(indices)
    for row, a, b in zip(np.asarray(indices)[:5], area, other["aurc"], strict=False):
        close(b, areas_by_loop(score[row], (y != yhat)[row])[0])
        grid = np.linspace(0.05, 1, 200)
        kept = [max(1, int(np.ceil(c * N - 1e-9))) for c in grid]
        rates = [kept_by_loop(y[row], yhat[row], score[row], k).critical_fnr for k in kept]
        close(a, np.trapezoid(rates, grid))


def threshold_by_loop(score, loss, alpha, bound=1.0):
    """The largest of all useful thresholds that meets the condition."""
    n, best = len(score), -np.inf
    for t in [*sorted(set(score)), np.inf]:
        spent = sum(x for s, x in zip(score, loss, strict=True) if s < t)
        if (spent + bound) / (n + 1) <= alpha + 1e-12:
            best = t
    return best


@few
@seeds
def test_conformal_thresholds_are_the_loop(programs, seed):
    y, yhat, score = draw(seed, 23)
    missed = np.isin(y, CRITICAL) & ~np.isin(yhat, CRITICAL)
    graded = np.random.default_rng(seed).integers(0, 5, 23) / 2  # 0 to 2
    critical = np.isin(y, CRITICAL)
    for alpha in (0.02, 0.125, 0.5, 1.0):
        plain, of_graded, of_critical = programs["conformal"](y, yhat, score, missed, graded, alpha)
        assert float(plain) == threshold_by_loop(score, missed, alpha)
        assert float(of_graded) == threshold_by_loop(score, graded, alpha, 2.0)
        assert float(of_critical) == threshold_by_loop(score[critical], missed[critical], alpha)


def test_a_conformal_threshold_keeps_its_promise():
    """Over many calibrations: P(missed | critical) is at most alpha, and not far below it."""
    random, alpha, n = np.random.default_rng(0), 0.1, 60
    y = np.ones((4000, n), np.int32)
    score = random.normal(size=(4000, n)).astype(np.float32)
    yhat = (random.uniform(size=(4000, n)) > 0.3).astype(np.int32)  # 3 in 10 are predicted safe
    find = jax.jit(jax.vmap(lambda y, yhat, s: un.critical_fnr_threshold(y, yhat, s, (1,), alpha)))
    found = np.asarray(find(y, yhat, score))
    new_score = random.normal(size=(4000, 200))
    missed = (random.uniform(size=(4000, 200)) < 0.3) & (new_score < found[:, None])
    risk, error = missed.mean(), missed.mean(1).std() / np.sqrt(4000)
    assert alpha - 2 / (n + 1) - 3 * error < risk < alpha + 3 * error
    # 0.1 x 20 pays for the bound and one miss.
    score, loss = np.arange(19.0), np.ones(19)
    assert float(un.conformal_threshold(score, loss, 0.1)) == 1


@few
@seeds
def test_calibration_is_the_loop(programs, seed):
    random = np.random.default_rng(seed)
    p = random.dirichlet([0.4, 0.3, 0.3], 50).astype(np.float32)
    p[:3] = np.eye(3)
    p[3:5] = [0.6, 0.3, 0.1]  # on an edge of the bins
    y = random.integers(0, 3, 50)
    brier, curve, ece = programs["calibration"](p, y)
    close(brier, np.mean(np.sum((p - np.eye(3)[y]) ** 2, -1)))
    confidence, hit, gap = p.max(-1), p.argmax(-1) == y, 0.0
    for b in range(10):
        inside = (confidence > np.float32(b / 10)) & (confidence <= np.float32((b + 1) / 10))
        assert int(curve.count[b]) == inside.sum()
        want = (confidence[inside].mean(), hit[inside].mean()) if inside.any() else (np.nan,) * 2
        close([curve.confidence[b], curve.accuracy[b]], want)
        if inside.any():
            gap += inside.mean() * abs(want[0] - want[1])
    close(ece, gap)


def test_a_calibrated_predictor_has_a_small_error():
    random = np.random.default_rng(0)
    p = random.dirichlet([1, 1], 20000).astype(np.float32)
    y = (random.uniform(size=20000) < p[:, 1]).astype(int)
    sharp = p**2 / (p**2).sum(-1, keepdims=True)
    both = quick_jit(lambda p: (un.ece(p, y), un.brier(p, y)))
    (ece, brier), (ece_sharp, brier_sharp) = both(p), both(sharp)
    assert ece < 0.02 < 0.08 < ece_sharp and brier < brier_sharp
