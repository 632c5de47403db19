"""Rows of `jaxlab.uncertainty` for test_contract.py: samples of probabilities are made from logits."""

import jax
import jax.numpy as jnp
from contract_cases import Case, _normal

from jaxlab import uncertainty as un

SAFE, CRITICAL = (0, 1), (2, 3)
LABELS, PREDICTED = jnp.array([0, 1, 2, 3, 2, 3, 0, 1]), jnp.array([0, 1, 2, 0, 1, 3, 2, 1])
WRONG = jnp.array([0, 1, 0, 1, 0, 0, 1, 0])
TARGETS = jnp.array([[0, 4, 2, -1], [1, 1, -1, 3]])
STATIC = dict(from_logits=True)
POSITIVE, SIGMOID = jax.nn.softplus, jax.nn.sigmoid


def shapes(*all_shapes):
    return lambda key, dtype: _normal(key, dtype, *all_shapes)


def of_samples(fn, *more, grad=True, **options):
    """Row of a function of logits [5 samples, 3, 4 classes]."""
    return Case(lambda z: fn(z, *more, **STATIC, **options), shapes((5, 3, 4)), "wide", grad)


def of_scores(fn):
    """Row of a function of 8 scores: sorting has no gradient."""
    return Case(fn, shapes((8,)), "wide", grad=False)


def scan(z):
    state = un.moments_init((3,), 4)
    for one in z:
        state = un.moments_update(state, one, **STATIC)
    return state


def posterior(features, kernel, bias):
    return un.laplace_last_layer_fit(features, kernel, bias, prior_precision=2.0)


def lowrank(*arrays):
    return un.LowRankPosterior(*arrays)


def walk(points):
    state = un.swag_init(points[0], 2)
    for point in points:
        state = un.swag_update(state, point)
    return state


LAYER = shapes((6, 3), (3, 4), (4,))
FACTORS = shapes((4, 2), (4, 2), (3, 2), (3, 2))
ROWS = {
    "moments": of_samples(un.moments, ddof=1),
    "moments_update": Case(lambda z: scan(z).moments, shapes((5, 3, 4)), "wide"),
    "moments_merge": Case(
        lambda z: un.moments_merge(scan(z[:2]), scan(z[2:])).moments, shapes((5, 3, 4)), "wide"
    ),
    "moments_finish": Case(lambda z: un.moments_finish(scan(z), ddof=1), shapes((5, 3, 4)), "wide"),
    "swag_update": Case(lambda x: walk(x)[1:], shapes((5, 3)), "wide"),
    "swag_sample": Case(
        lambda x: un.swag_sample(jax.random.key(1), walk(x)), shapes((5, 3)), "wide"
    ),
    "contributions": of_samples(un.contributions, "exact"),
    "contributions_from_moments": Case(
        lambda z: un.contributions_from_moments(un.moments(z, **STATIC), "taylor4"),
        shapes((5, 3, 4)),
        "wide",
    ),
    "contribution_bounds": of_samples(un.contribution_bounds),
    "mutual_information": of_samples(un.mutual_information),
    "skewness_ratio": Case(
        lambda mu, var, m3: un.skewness_ratio(POSITIVE(mu), POSITIVE(var), m3),
        shapes((3, 4), (3, 4), (3, 4)),
        "wide",
    ),
    "signed_skewness_ratio": Case(
        lambda mu, var, m3: un.signed_skewness_ratio(POSITIVE(mu), POSITIVE(var), m3),
        shapes((3, 4), (3, 4), (3, 4)),
        "wide",
    ),
    "reliable_mask": Case(un.reliable_mask, shapes((3, 4)), grad=False),
    "dirichlet_uncertainty": Case(
        lambda a: un.dirichlet_uncertainty(POSITIVE(a)), shapes((3, 4)), "wide"
    ),
    "fisher_covariance": of_samples(un.fisher_covariance),
    "cbec": of_samples(un.cbec, SAFE, CRITICAL, weights=jnp.array([[1, 2], [3, 4.0]])),
    "epistemic_confusion_matrix": of_samples(un.epistemic_confusion_matrix, form="reference"),
    "predictive_entropy": of_samples(un.predictive_entropy),
    "expected_entropy": of_samples(un.expected_entropy),
    "disagreement": of_samples(un.disagreement, grad=False),
    "labelwise": of_samples(un.labelwise, "entropy"),
    "one_vs_all_mi": of_samples(un.one_vs_all_mi),
    "missed_critical_mass": of_samples(un.missed_critical_mass, SAFE, CRITICAL),
    "critical_scores": of_samples(un.critical_scores, SAFE, CRITICAL),
    "dominance": Case(lambda c: un.dominance(POSITIVE(c)), shapes((3, 4)), "wide"),
    "epistemic_profiles": Case(
        lambda c: un.epistemic_profiles(c, LABELS, 4), shapes((8, 4)), "wide"
    ),
    "error_signatures": Case(
        lambda c: jnp.nan_to_num(un.error_signatures(c, LABELS, PREDICTED, 4)),
        shapes((8, 4)),
        "wide",
    ),
    "drift": Case(
        lambda c: jax.tree.map(jnp.nan_to_num, un.drift(c, PREDICTED, 4, 3)), shapes((8, 4)), "wide"
    ),
    "selective_curve": of_scores(
        lambda s: un.selective_curve(LABELS, PREDICTED, s, CRITICAL, (0.3, 1.0), num_classes=4)
    ),
    "ausc": of_scores(lambda s: un.ausc(LABELS, PREDICTED, s, CRITICAL)),
    "aurc": of_scores(lambda s: un.aurc(s, WRONG)),
    "eaurc": of_scores(lambda s: un.eaurc(s, WRONG)),
    "augrc": of_scores(lambda s: un.augrc(s, WRONG)),
    "coverage_at_risk": of_scores(
        lambda s: jnp.nan_to_num(un.coverage_at_risk(s, WRONG, 0.4), nan=-1.0)
    ),
    "risk_at_coverage": of_scores(lambda s: un.risk_at_coverage(s, WRONG, 0.4)),
    "bootstrap": of_scores(
        lambda s: un.bootstrap(
            jnp.array([[0, 1, 1, 2], [5, 4, 3, 7]]), lambda s, e: un.aurc(s, e), s, WRONG
        )
    ),
    "auroc": of_scores(lambda s: un.auroc(s, WRONG)),
    "aupr": of_scores(lambda s: un.aupr(s, WRONG)),
    "fpr_at_tpr": of_scores(lambda s: un.fpr_at_tpr(s, WRONG)),
    "conformal_threshold": of_scores(lambda s: un.conformal_threshold(s, WRONG, 0.3)),
    "critical_fnr_threshold": of_scores(
        lambda s: un.critical_fnr_threshold(LABELS, PREDICTED, s, CRITICAL, 0.5)
    ),
    "brier": Case(lambda z: un.brier(_softmax(z), LABELS), shapes((8, 4)), "wide"),
    "ece": Case(lambda z: un.ece(_softmax(z), LABELS, num_bins=3), shapes((8, 4)), "wide"),
    "reliability_curve": Case(
        lambda z: jax.tree.map(
            jnp.nan_to_num, un.reliability_curve(_softmax(z), LABELS, num_bins=3)
        ),
        shapes((8, 4)),
        "wide",
    ),
    "mc_predict": Case(
        lambda w, x: un.mc_predict(
            lambda w, x, key: (x * jax.random.bernoulli(key, 0.7, x.shape)) @ w,
            w,
            x,
            jax.random.split(jax.random.key(0), 3),
        ),
        shapes((3, 4), (5, 3)),
        "wide",
    ),
    "ensemble_predict": Case(
        lambda w, x: un.ensemble_predict(lambda w, x: x @ w, w, x),
        shapes((2, 3, 4), (5, 3)),
        "wide",
    ),
    "laplace_last_layer_fit": Case(posterior, LAYER, "wide"),
    "laplace_last_layer_predict": Case(
        lambda *x: un.laplace_last_layer_predict(posterior(*x), x[0]), LAYER, "wide"
    ),
    "laplace_last_layer_probit": Case(
        lambda *x: un.laplace_last_layer_probit(posterior(*x), x[0]), LAYER, "wide"
    ),
    "laplace_last_layer_sample": Case(
        lambda *x: un.laplace_last_layer_sample(posterior(*x), x[0], jax.random.key(0), 3),
        LAYER,
        "wide",
    ),
    "laplace_last_layer_log_marginal": Case(
        lambda *x: un.laplace_last_layer_log_marginal(posterior(*x), x[0], LABELS[:6]),
        LAYER,
        "wide",
    ),
    "token_uncertainty": Case(
        lambda h, w: un.token_uncertainty(h, w, TARGETS, (1, 4), n_tiles=2),
        shapes((3, 2, 4, 3), (3, 5)),
        "wide",
    ),
    "lowrank_vi_sample": Case(
        lambda *x: un.lowrank_vi_sample(jax.random.key(0), lowrank(*x)), FACTORS
    ),
    "lowrank_vi_kl": Case(lambda *x: un.lowrank_vi_kl(lowrank(*x)), FACTORS),
}


def _softmax(z):
    return jax.nn.softmax(z.astype(jnp.float32), -1)


CASES = {f"jaxlab.uncertainty.{name}": row for name, row in ROWS.items()}
EXEMPT = {
    "jaxlab.uncertainty.swag_init": "zeros of sizes, tested in test_classifier.py",
    "jaxlab.uncertainty.moments_init": "zeros of sizes, tested in test_uncertainty.py",
    "jaxlab.uncertainty.bootstrap_indices": "integers, tested in test_uncertainty_decisions.py",
    "jaxlab.uncertainty.lowrank_vi_init": "random of sizes, tested in test_uncertainty_sources.py",
}
