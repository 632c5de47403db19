"""Bad input of `jaxlab.uncertainty` ends before anything is compiled, in an error that names it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from jaxlab import uncertainty as un

P = np.full((3, 5, 4), 0.25, np.float32)
SAFE, CRITICAL = (0, 1), (2, 3)
Y, YHAT, SCORE, ERROR = np.array([0, 1, 2, 3]), np.array([0, 1, 1, 3]), np.arange(4.0), [0, 0, 1, 0]
C = np.ones((4, 3), np.float32)
FEATURES, KERNEL, BIAS = np.ones((6, 2)), np.ones((2, 3)), np.ones(3)
LAPLACE = un.laplace_last_layer_fit(FEATURES, KERNEL, BIAS)
OF_SAMPLES = {
    "moments": un.moments,
    "contributions": un.contributions,
    "contribution_bounds": un.contribution_bounds,
    "fisher_covariance": un.fisher_covariance,
    "cbec": functools.partial(un.cbec, safe=SAFE, critical=CRITICAL),
    "epistemic_confusion_matrix": un.epistemic_confusion_matrix,
    "predictive_entropy": un.predictive_entropy,
    "expected_entropy": un.expected_entropy,
    "mutual_information": un.mutual_information,
    "disagreement": un.disagreement,
    "labelwise": un.labelwise,
    "one_vs_all_mi": un.one_vs_all_mi,
    "missed_critical_mass": functools.partial(
        un.missed_critical_mass, safe=SAFE, critical=CRITICAL
    ),
    "critical_scores": functools.partial(un.critical_scores, safe=SAFE, critical=CRITICAL),
}
NAN, NEGATIVE, LARGE = (P.copy() for _ in range(3))
NAN[0, 0, 0] = np.nan
NEGATIVE[1, 2] = [-0.1, 0.6, 0.25, 0.25]
LARGE[2, 4, 3] += 2e-4
BAD_SAMPLES = {
    "one axis": (P[0, 0], "at least 2 axes"),
    "one class": (P[..., :1], "at least 2 classes"),
    "one sample": (P[:1], "at least 2 samples.*undefined"),
    "nan": (NAN, "holds NaN"),
    "negative": (NEGATIVE, "negative.*-0.1"),
    "sum": (LARGE, "sum to 1 within.*1.0002"),
}


@pytest.mark.parametrize("fn", OF_SAMPLES.values(), ids=OF_SAMPLES)
@pytest.mark.parametrize("p,message", BAD_SAMPLES.values(), ids=BAD_SAMPLES)
def test_samples_that_are_no_probabilities(fn, p, message):
    with pytest.raises(ValueError, match=f"p.*{message}"):
        fn(p)


@pytest.mark.parametrize("fn", [OF_SAMPLES["contributions"], OF_SAMPLES["critical_scores"]])
def test_values_are_checked_under_checkify_in_jit(fn):
    jitted = jax.jit(fn)
    jitted(NAN)  # nothing is known of the values
    checked = checkify.checkify(jitted)
    for p, message in ((NAN, "holds NaN"), (NEGATIVE, "negative"), (LARGE, "sum to 1 within")):
        with pytest.raises(checkify.JaxRuntimeError, match=message):
            checked(p)[0].throw()
    checked(P)[0].throw()


curve = functools.partial(un.selective_curve, num_classes=4)
KEY = jax.random.key(0)
ERRORS = {
    "complex p": (lambda: un.contributions(P + 0j), TypeError, "p has dtype complex"),
    "logits nan": (lambda: un.contributions(NAN, from_logits=True), ValueError, "logits p"),
    "method": (lambda: un.contributions(P, "taylor5"), ValueError, "method='taylor5'.*taylor2"),
    "no moments of exact": (
        lambda: un.contributions_from_moments(un.moments(P), "exact"), ValueError, "method='exact'"),
    "eps": (lambda: un.contributions(P, eps=-1e-3), ValueError, "eps=-0.001"),
    "eps of moments": (
        lambda: un.contributions_from_moments(un.moments(P), eps=-1), ValueError, "eps=-1"),
    "eps of rho": (lambda: un.skewness_ratio(C, C, C, eps=-1), ValueError, "eps=-1"),
    "eps of signed rho": (lambda: un.signed_skewness_ratio(C, C, C, eps=-1), ValueError, "eps=-1"),
    "eps of cbec": (lambda: un.cbec(P, SAFE, CRITICAL, eps=-1), ValueError, "eps=-1"),
    "eps of matrix": (lambda: un.epistemic_confusion_matrix(P, eps=np.nan), ValueError, "eps=nan"),
    "ddof": (lambda: un.moments(P, ddof=3), ValueError, "ddof=3.*at most 2"),
    "ddof of c": (lambda: un.contributions(P, ddof=-1), ValueError, "ddof=-1"),
    "ddof type": (lambda: un.contributions(P, ddof=0.5), TypeError, "ddof=0.5"),
    "kind": (lambda: un.labelwise(P, "log"), ValueError, "kind='log'"),
    "form": (lambda: un.cbec(P, SAFE, CRITICAL, form="x"), ValueError, "form='x'"),
    "form of matrix": (lambda: un.epistemic_confusion_matrix(P, form="x"), ValueError, "form='x'"),
    "overlap": (lambda: un.cbec(P, (0, 2), (2,)), ValueError, "safe=.*critical=.*share"),
    "empty": (lambda: un.cbec(P, (), (2,)), ValueError, r"safe=\(\)"),
    "range": (lambda: un.critical_scores(P, (0,), (4,)), ValueError, "critical=.4,.*below 4"),
    "negative class": (lambda: un.missed_critical_mass(P, (-1,), (2,)), ValueError, "safe=.-1"),
    "twice": (lambda: un.cbec(P, (0,), (2, 2)), ValueError, "critical=.2, 2.*different"),
    "no tuple": (lambda: un.cbec(P, 0, (2,)), TypeError, "safe=0"),
    "no index": (lambda: un.cbec(P, (0.5,), (2,)), TypeError, "safe=.0.5"),
    "weights": (
        lambda: un.cbec(P, (0,), (1, 2), weights=np.ones((2, 1))), ValueError, r"weights=\(2, 1\).*\(1, 2\)"),
    "alpha 0": (lambda: un.dirichlet_uncertainty([1.0, 0]), ValueError, "alpha must be positive"),
    "alpha shape": (lambda: un.dirichlet_uncertainty(2.0), ValueError, "alpha=.*classes"),
    "stream shape": (
        lambda: un.moments_update(un.moments_init((5,), 4), P[0, :2]), ValueError, r"p_one=\(2, 4\)"),
    "stream values": (
        lambda: un.moments_update(un.moments_init((5,), 4), NEGATIVE[1]), ValueError, "p_one.*negative"),
    "merge": (
        lambda: un.moments_merge(un.moments_init((5,), 4), un.moments_init((4,), 4)), ValueError, "one shape"),
    "short stream": (
        lambda: un.moments_finish(un.moments_update(un.moments_init((5,), 4), P[0])), ValueError, "1 samples"),
    "init": (lambda: un.moments_init((5,), 1), ValueError, "num_classes=1"),
    "c": (lambda: un.epistemic_profiles(C[0], Y, 4), ValueError, r"c=\(3,\)"),
    "c length": (lambda: un.error_signatures(C, Y[:3], YHAT, 4), ValueError, r"y=\(3,\).*\(4,\)"),
    "c label": (lambda: un.epistemic_profiles(C, Y, 3), ValueError, "y must be labels.*below 3"),
    "batches": (lambda: un.drift(C, YHAT, 4, 5), ValueError, "num_batches=5.*at most 4"),
    "coverage 0": (lambda: curve(Y, YHAT, SCORE, (2,), (0.0, 0.5)), ValueError, "coverages="),
    "coverage 2": (lambda: curve(Y, YHAT, SCORE, (2,), (1.1,)), ValueError, "coverages="),
    "coverage nan": (lambda: curve(Y, YHAT, SCORE, (2,), (np.nan,)), ValueError, "coverages="),
    "coverage traced": (
        lambda: jax.jit(lambda c: curve(Y, YHAT, SCORE, (2,), c))(np.ones(2)), TypeError, "coverages.*static"),
    "one coverage": (lambda: un.risk_at_coverage(SCORE, ERROR, 1.5), ValueError, "^coverage=.*1.5"),
    "one coverage traced": (
        lambda: jax.jit(lambda c: un.risk_at_coverage(SCORE, ERROR, c))(0.5), TypeError, "^coverage.*static"),
    "bootstrap scalar": (
        lambda: un.bootstrap(np.array([[1]]), jnp.sum, 1.0), ValueError, "arrays must have samples"),
    "list of keys": (
        lambda: un.mc_predict(lambda p, x, k: x, 0, P[0], [KEY, KEY]), ValueError, "keys=.*split"),
    "vmapped state": (
        lambda: un.moments_finish(
            jax.vmap(lambda _: un.moments_init((5,), 4))(np.ones(2)), ddof=1
        ), ValueError, r"state.count=\(2,\).*vmap moments_finish"),
    "label": (lambda: curve(Y + 1, YHAT, SCORE, (2,), (1.0,)), ValueError, "y must be labels.*below 4.*4"),
    "negative label": (lambda: un.ausc(Y, YHAT - 1, SCORE, (2,)), ValueError, "yhat must be labels"),
    "float label": (lambda: un.ausc(Y * 1.0, YHAT, SCORE, (2,)), TypeError, "y has dtype float"),
    "score length": (lambda: un.ausc(Y, YHAT, SCORE[:3], (2,)), ValueError, r"score=\(3,\).*\(4,\)"),
    "yhat length": (lambda: un.ausc(Y, YHAT[:3], SCORE, (2,)), ValueError, r"yhat=\(3,\).*\(4,\)"),
    "score nan": (lambda: un.aurc(SCORE * np.nan, ERROR), ValueError, "score holds NaN"),
    "score axes": (lambda: un.auroc(C, ERROR), ValueError, r"score=\(4, 3\)"),
    "error length": (lambda: un.eaurc(SCORE, ERROR[:3]), ValueError, r"error=\(3,\)"),
    "error values": (lambda: un.augrc(SCORE, [0, 1, 2, 0]), ValueError, "error must hold 0 and 1"),
    "positive": (lambda: un.aupr(SCORE, [0, 1, 0.5, 0]), ValueError, "positive must hold 0 and 1"),
    "critical of curve": (lambda: curve(Y, YHAT, SCORE, (4,), (1.0,)), ValueError, "critical=.4"),
    "critical of ausc": (lambda: un.ausc(Y, YHAT, SCORE, ()), ValueError, r"critical=\(\)"),
    "metric": (lambda: un.ausc(Y, YHAT, SCORE, (2,), metric="fnr"), ValueError, "metric='fnr'"),
    "low": (lambda: un.ausc(Y, YHAT, SCORE, (2,), low=0.0), ValueError, "low and high"),
    "order": (lambda: un.ausc(Y, YHAT, SCORE, (2,), low=0.5, high=0.5), ValueError, "low=0.5 must be below"),
    "num": (lambda: un.ausc(Y, YHAT, SCORE, (2,), num=1), ValueError, "num=1"),
    "kind of aurc": (lambda: un.aurc(SCORE, ERROR, kind="sum"), ValueError, "kind='sum'"),
    "risk": (lambda: un.coverage_at_risk(SCORE, ERROR, np.nan), ValueError, "risk=nan"),
    "tpr": (lambda: un.fpr_at_tpr(SCORE, ERROR, 0.0), ValueError, "tpr=0.0"),
    "bootstrap": (lambda: un.bootstrap(np.array([[4]]), jnp.sum, SCORE), ValueError, "below the length 4"),
    "bootstrap type": (lambda: un.bootstrap(np.ones(3), jnp.sum, SCORE), ValueError, r"indices=\(3,\)"),
    "bootstrap num": (lambda: un.bootstrap_indices(KEY, 0, 3), ValueError, "num=0"),
    "conformal alpha": (lambda: un.conformal_threshold(SCORE, ERROR, 0.0), ValueError, "alpha=0.0"),
    "conformal loss": (lambda: un.conformal_threshold(SCORE, SCORE, 0.1), ValueError, "loss must be from 0"),
    "conformal bound": (
        lambda: un.conformal_threshold(SCORE, ERROR, 0.1, bound=0), ValueError, "bound=0"),
    "conformal include": (
        lambda: un.conformal_threshold(SCORE, ERROR, 0.1, include=[True]), ValueError, r"include=\(1,\)"),
    "conformal labels": (
        lambda: un.critical_fnr_threshold(Y, YHAT[:2], SCORE, (2,), 0.1), ValueError, r"yhat=\(2,\)"),
    "probs": (lambda: un.brier(NEGATIVE[1], np.zeros(5, int)), ValueError, "probs.*negative"),
    "probs axes": (lambda: un.ece(P, np.zeros(5, int)), ValueError, r"probs=\(3, 5, 4\)"),
    "probs labels": (lambda: un.brier(P[0], np.full(5, 4)), ValueError, "y must be labels.*below 4"),
    "bins": (lambda: un.reliability_curve(P[0], np.zeros(5, int), num_bins=0), ValueError, "num_bins=0"),
    "no array": (lambda: un.moments("abc"), TypeError, "p='abc' must be an array"),
    "no score": (lambda: un.aurc(None, ERROR), TypeError, "score='None' must be an array"),
    "no error": (lambda: un.aurc(SCORE, None), TypeError, "error='None' must be an array"),
    "no labels": (lambda: un.brier(P[0], None), TypeError, "y='None' must be an array"),
    "eps none": (lambda: un.contributions(P, eps=None), ValueError, "eps=None"),
    "coverage text": (lambda: curve(Y, YHAT, SCORE, (2,), ("a",)), ValueError, "coverages=.'a'"),
    "weights nan": (lambda: un.cbec(P, (0,), (1,), weights=[[np.nan]]), ValueError, "weights must be finite"),
    "no distribution": (lambda: un.epistemic_confusion_matrix(P[:, :0]), ValueError, "at least 1 distribution"),
    "no state": (lambda: un.moments_update(None, P[0]), TypeError, "state='None' must be a MomentsState"),
    "no states": (lambda: un.moments_merge(1, 2), TypeError, "a='1' must be a MomentsState"),
    "no moments": (lambda: un.contributions_from_moments((1, 2)), TypeError, "m=.* must be a Moments"),
    "init batch": (lambda: un.moments_init(5, 4), TypeError, "batch_shape='5' must be a tuple"),
    "init size": (lambda: un.moments_init((-1,), 4), ValueError, "batch_shape=-1"),
    "skewness": (lambda: un.skewness_ratio(SCORE, SCORE, SCORE[:3]), ValueError, r"m3=\(3,\) must be of one"),
    "threshold": (lambda: un.reliable_mask(SCORE, -1), ValueError, "threshold=-1"),
    "dominance": (lambda: un.dominance([np.nan, 1]), ValueError, "c holds NaN"),
    "no key": (lambda: un.mc_predict(lambda p, x, k: x, 0, P[0], None), ValueError, "keys="),
    "one key": (lambda: un.mc_predict(lambda p, x, k: x, 0, P[0], KEY), ValueError, "keys="),
    "chunk": (lambda: un.ensemble_predict(lambda p, x: x, np.ones(2), P[0], chunk=0), ValueError, "chunk=0"),
    "members": (
        lambda: un.ensemble_predict(lambda p, x: x, [np.ones(2), np.ones(3)], P[0]), ValueError,
        "stacked_params"),
    "scalar member": (
        lambda: un.ensemble_predict(lambda p, x: x, [np.ones(2), 1.0], P[0]), ValueError, "stacked_params"),
    "tau": (
        lambda: un.laplace_last_layer_fit(FEATURES, KERNEL, BIAS, prior_precision=0), ValueError,
        "prior_precision=0"),
    "kernel": (lambda: un.laplace_last_layer_fit(FEATURES, KERNEL, BIAS[:2]), ValueError, r"bias=\(2,\)"),
    "features": (lambda: un.laplace_last_layer_predict(LAPLACE, FEATURES.T), ValueError, r"features=\(2, 6\)"),
    "finite": (
        lambda: un.laplace_last_layer_fit(FEATURES * np.inf, KERNEL, BIAS), ValueError, "features must"),
    "samples": (
        lambda: un.laplace_last_layer_sample(LAPLACE, FEATURES, KEY, 0), ValueError, "num_samples=0"),
    "laplace labels": (
        lambda: un.laplace_last_layer_log_marginal(LAPLACE, FEATURES, np.full(6, 3)), ValueError,
        "labels must be labels"),
    "rank": (lambda: un.lowrank_vi_init(KEY, 3, 4, 0), ValueError, "rank=0"),
    "std": (lambda: un.lowrank_vi_init(KEY, 3, 4, 2, std=0.0), ValueError, "std=0.0"),
    "prior std": (
        lambda: un.lowrank_vi_kl(un.lowrank_vi_init(KEY, 3, 4, 2), prior_std=-1), ValueError, "prior_std=-1"),
}  # fmt: skip


@pytest.mark.parametrize("call,kind,message", ERRORS.values(), ids=ERRORS)
def test_errors_name_what_is_wrong(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
