"""Epistemic uncertainty by class, and the decisions made with it.

Samples of probabilities [S, ..., K] come from a network (`mc_predict`, `ensemble_predict`, the
`laplace_`, `lowrank_vi_` and `swag_` functions); contributions and scores are made of them; selective
prediction, detection, calibration and conformal thresholds judge the scores. Shape letters here:
s posterior samples, b any batch axes, n inputs, k classes, c classes of labels or coverages.
Source: arXiv 2602.21160; each function names its own beside it.
"""

from jaxlab.uncertainty.calibration import ReliabilityCurve, brier, ece, reliability_curve
from jaxlab.uncertainty.conformal import conformal_threshold, critical_fnr_threshold
from jaxlab.uncertainty.confusion import cbec, epistemic_confusion_matrix, fisher_covariance
from jaxlab.uncertainty.decomposition import (
    contribution_bounds,
    contributions,
    contributions_from_moments,
    mutual_information,
    reliable_mask,
    signed_skewness_ratio,
    skewness_ratio,
)
from jaxlab.uncertainty.detection import aupr, auroc, fpr_at_tpr
from jaxlab.uncertainty.dirichlet import DirichletUncertainty, dirichlet_uncertainty
from jaxlab.uncertainty.laplace import (
    LastLayerLaplace,
    laplace_last_layer_fit,
    laplace_last_layer_log_marginal,
    laplace_last_layer_predict,
    laplace_last_layer_probit,
    laplace_last_layer_sample,
)
from jaxlab.uncertainty.lowrank import (
    LowRankPosterior,
    lowrank_vi_init,
    lowrank_vi_kl,
    lowrank_vi_sample,
)
from jaxlab.uncertainty.moments import (
    Moments,
    MomentsState,
    moments,
    moments_finish,
    moments_init,
    moments_merge,
    moments_update,
)
from jaxlab.uncertainty.predict import ensemble_predict, mc_predict
from jaxlab.uncertainty.profiles import (
    Dominance,
    DriftStats,
    dominance,
    drift,
    epistemic_profiles,
    error_signatures,
)
from jaxlab.uncertainty.scores import (
    Labelwise,
    critical_scores,
    disagreement,
    expected_entropy,
    labelwise,
    missed_critical_mass,
    one_vs_all_mi,
    predictive_entropy,
)
from jaxlab.uncertainty.selective import (
    SelectiveCurve,
    augrc,
    aurc,
    ausc,
    bootstrap,
    bootstrap_indices,
    coverage_at_risk,
    eaurc,
    risk_at_coverage,
    selective_curve,
)
from jaxlab.uncertainty.swag import SwagState, swag_init, swag_sample, swag_update
from jaxlab.uncertainty.tokens import TokenUncertainty, token_uncertainty

__all__ = [
    "DirichletUncertainty",
    "Dominance",
    "DriftStats",
    "Labelwise",
    "LastLayerLaplace",
    "LowRankPosterior",
    "Moments",
    "MomentsState",
    "ReliabilityCurve",
    "SelectiveCurve",
    "SwagState",
    "TokenUncertainty",
    "augrc",
    "aupr",
    "aurc",
    "auroc",
    "ausc",
    "bootstrap",
    "bootstrap_indices",
    "brier",
    "cbec",
    "conformal_threshold",
    "contribution_bounds",
    "contributions",
    "contributions_from_moments",
    "coverage_at_risk",
    "critical_fnr_threshold",
    "critical_scores",
    "dirichlet_uncertainty",
    "disagreement",
    "dominance",
    "drift",
    "eaurc",
    "ece",
    "ensemble_predict",
    "epistemic_confusion_matrix",
    "epistemic_profiles",
    "error_signatures",
    "expected_entropy",
    "fisher_covariance",
    "fpr_at_tpr",
    "labelwise",
    "laplace_last_layer_fit",
    "laplace_last_layer_log_marginal",
    "laplace_last_layer_predict",
    "laplace_last_layer_probit",
    "laplace_last_layer_sample",
    "lowrank_vi_init",
    "lowrank_vi_kl",
    "lowrank_vi_sample",
    "mc_predict",
    "missed_critical_mass",
    "moments",
    "moments_finish",
    "moments_init",
    "moments_merge",
    "moments_update",
    "mutual_information",
    "one_vs_all_mi",
    "predictive_entropy",
    "reliability_curve",
    "reliable_mask",
    "risk_at_coverage",
    "selective_curve",
    "signed_skewness_ratio",
    "skewness_ratio",
    "swag_init",
    "swag_sample",
    "swag_update",
    "token_uncertainty",
]
