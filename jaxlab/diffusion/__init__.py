"""Discrete diffusion of tokens: Duo, its curricula, losses and distillation, and Psi-samplers.

Sources: arXiv 2506.10892 and arXiv 2602.21185; note on Psi-samplers, section 12.
"""

from jaxlab.diffusion.curriculum import (
    dense_from_noise,
    dense_relaxation,
    distinct_ids,
    gaussian_topk,
    ids_from_draws,
    log10_tau,
    log_mean_exp_truncated,
    mix_embeddings,
    sparse_from_draws,
    sparse_relaxation,
    sparse_weights,
)  # fmt: skip
from jaxlab.diffusion.distill import (
    dcd_delta,
    dcd_loss,
    dcd_pair,
    dcd_pair_from_noise,
)  # fmt: skip
from jaxlab.diffusion.forward import (
    q_probs,
    q_sample,
)  # fmt: skip
from jaxlab.diffusion.hmm import (
    HMM,
    hmm_denoiser,
    hmm_log_prob,
    hmm_sample,
)  # fmt: skip
from jaxlab.diffusion.losses import (
    masked_nelbo,
    nelbo_mean,
    subs,
    uniform_nelbo,
)  # fmt: skip
from jaxlab.diffusion.metrics import (
    frechet_distance,
    gen_ppl_mask,
    unigram_entropy,
)  # fmt: skip
from jaxlab.diffusion.operator import (
    gamma_of_alpha,
    make_operator,
    winner_probability,
)  # fmt: skip
from jaxlab.diffusion.posterior import (
    guided_probs,
    kappa_to_remdm_sigma,
    posterior_probs,
    psi_probs,
    psi_weights,
    psi_weights_masked,
    remdm_sigma_to_kappa,
)  # fmt: skip
from jaxlab.diffusion.samplers import (
    PsiSpec,
    SamplerConfig,
    StepCoef,
    categorical_step,
    inverse_cdf_step,
    kappa_schedule,
    nucleus,
    race_categorical,
    sample,
    sample_from_uniforms,
    step_coefs,
    time_profile,
)  # fmt: skip
from jaxlab.diffusion.schedules import (
    Level,
    cosine,
    inverse_cosine,
    inverse_log_linear,
    log_linear,
    sample_times,
    times_from_uniforms,
)  # fmt: skip

__all__ = [
    "HMM",
    "Level",
    "PsiSpec",
    "SamplerConfig",
    "StepCoef",
    "categorical_step",
    "cosine",
    "dcd_delta",
    "dcd_loss",
    "dcd_pair",
    "dcd_pair_from_noise",
    "dense_from_noise",
    "dense_relaxation",
    "distinct_ids",
    "frechet_distance",
    "gamma_of_alpha",
    "gaussian_topk",
    "gen_ppl_mask",
    "guided_probs",
    "hmm_denoiser",
    "hmm_log_prob",
    "hmm_sample",
    "ids_from_draws",
    "inverse_cdf_step",
    "inverse_cosine",
    "inverse_log_linear",
    "kappa_schedule",
    "kappa_to_remdm_sigma",
    "log10_tau",
    "log_linear",
    "log_mean_exp_truncated",
    "make_operator",
    "masked_nelbo",
    "mix_embeddings",
    "nelbo_mean",
    "nucleus",
    "posterior_probs",
    "psi_probs",
    "psi_weights",
    "psi_weights_masked",
    "q_probs",
    "q_sample",
    "race_categorical",
    "remdm_sigma_to_kappa",
    "sample",
    "sample_from_uniforms",
    "sample_times",
    "sparse_from_draws",
    "sparse_relaxation",
    "sparse_weights",
    "step_coefs",
    "subs",
    "time_profile",
    "times_from_uniforms",
    "uniform_nelbo",
    "unigram_entropy",
    "winner_probability",
]
