"""Rows of `jaxlab.diffusion` for test_contract.py: probabilities are made from logits."""

import jax
import jax.numpy as jnp
from contract_cases import Case
from contract_cases import _normal as normal

from jaxlab import diffusion as d

KEY, Z, X0 = jax.random.key(3), jnp.array([[0, 4, 2], [1, 1, 3]]), jnp.array([[0, 1, 2], [4, 1, 0]])
WARM = jnp.float32(0.3)  # a number of the host above 0.02 is warned of
unit = jax.nn.sigmoid


def _logits(key, dtype):
    return normal(key, dtype, (2, 3, 5))


def _two(key, dtype):
    return normal(key, dtype, (2, 3, 5), (2, 3, 5))


def _number(key, dtype):
    return normal(key, dtype, (2, 1))


def _topk(key, dtype):
    values, own = normal(key, dtype, (2, 3, 2), (2, 3))
    return -jnp.sort(-values, -1), own


def _probs(x):
    return jax.nn.softmax(x.astype(jnp.promote_types(x.dtype, "float32")), -1)


def _coef(x):
    alpha = unit(x.reshape(-1)[:1])
    return d.StepCoef(alpha, alpha / 2, 1 - alpha, 1 - alpha / 2, alpha / 2, 0.5, 0.0)


def row(call, args, grad=True):
    return Case(call, args, out="wide", grad=grad)


def _level(x):
    return d.log_linear(unit(x))


def chain(*logits):
    return d.HMM(*map(_probs, logits))


def _features(key, dtype):
    return normal(key, dtype, (6, 3), (5, 3))


def _chain_logits(key, dtype):
    return normal(key, dtype, (3,), (3, 3), (3, 4))


CASES = {
    "frechet_distance": row(d.frechet_distance, _features),
    "cosine": row(lambda x: d.cosine(unit(x)), _number),
    "log_linear": row(_level, _number),
    "inverse_cosine": row(lambda x: d.inverse_cosine(unit(x)), _number),
    "inverse_log_linear": row(lambda x: d.inverse_log_linear(unit(x)), _number),
    "times_from_uniforms": row(
        lambda x: d.times_from_uniforms(unit(x)), lambda key, dtype: normal(key, dtype, (6,))
    ),
    "q_probs": row(
        lambda x, t: d.q_probs(_probs(x), _level(t), "uniform"),
        lambda key, dtype: (*_logits(key, dtype), *_number(key, dtype)),
    ),
    "q_sample": row(lambda x: d.q_sample(KEY, X0, _level(x), "uniform", K=5), _number, False),
    "posterior_probs": row(lambda x: d.posterior_probs(_probs(x), Z, 0.8, 0.3, "uniform"), _logits),
    "psi_probs": row(lambda x: d.psi_probs(_probs(x), Z, 0.8, 0.3, 0.5, "masked", 4), _logits),
    "psi_weights": row(lambda x: d.psi_weights(unit(x), 0.8, 0.3, 0.5, 5), _number),
    "psi_weights_masked": row(
        lambda x: d.psi_weights_masked(Z == 4, unit(x), unit(x) / 2, 0.5), _number
    ),
    "guided_probs": row(lambda x, y: d.guided_probs(_probs(x), _probs(y), 1.5), _two),
    "remdm_sigma_to_kappa": row(
        lambda x: d.remdm_sigma_to_kappa((1 - unit(x)) / 2, unit(x) / 2), _number
    ),
    "kappa_to_remdm_sigma": row(lambda x: d.kappa_to_remdm_sigma(unit(x), unit(x)), _number),
    "subs": row(lambda x: jnp.exp(d.subs(x, Z, 4)), _logits),
    "uniform_nelbo": row(lambda x: d.uniform_nelbo(x, Z, X0, d.log_linear(0.5)), _logits),
    "masked_nelbo": row(lambda x: d.masked_nelbo(x, Z, X0, d.log_linear(0.5), 4), _logits),
    "nelbo_mean": row(lambda x: d.nelbo_mean(x, Z[:, :1] == 0), _number),
    "gaussian_topk": row(
        lambda x: d.gaussian_topk(unit(x), 9, 0.3), lambda key, dtype: normal(key, dtype, (2, 3, 2))
    ),
    "log_mean_exp_truncated": row(
        lambda x, y: d.log_mean_exp_truncated(x, 0.3, unit(y)),
        lambda key, dtype: normal(key, dtype, (2, 3), (2, 1)),
    ),
    "sparse_weights": row(
        lambda v, own: d.sparse_weights(v, own, own > v[..., 1], 0.5, 0.5, 9), _topk
    ),
    "sparse_from_draws": row(
        lambda u, n: d.sparse_from_draws(unit(u), n, jnp.stack([X0, Z], -1), X0, 0.9, 0.4, WARM, 9),
        lambda key, dtype: normal(key, dtype, (2, 3, 2), (2, 3)),
    ),
    "sparse_relaxation": row(
        lambda x: d.sparse_relaxation(KEY, X0, unit(x), 0.4, WARM, 2, 9), _number
    ),
    "dense_from_noise": row(lambda x: d.dense_from_noise(x, X0, 0.9, 0.4, 0.3), _logits),
    "dense_relaxation": row(lambda x: d.dense_relaxation(KEY, X0, unit(x), 0.4, 0.3, 5), _number),
    "mix_embeddings": row(
        lambda table, x: d.mix_embeddings(table, x),
        lambda key, dtype: normal(key, dtype, (5, 4), (2, 3, 5)),
    ),
    "log10_tau": row(lambda x: d.log10_tau(3, x, x - 1, 0, 10), _number),
    "nucleus": row(lambda x: jnp.maximum(d.nucleus(x, 0.7), -99), _logits),
    "race_categorical": row(lambda x, u: d.race_categorical(_probs(x), unit(u)), _two, False),
    "categorical_step": row(
        lambda x, a: d.categorical_step(KEY, x, Z, _coef(a)),
        lambda key, dtype: (*_logits(key, dtype), *_number(key, dtype)),
        False,
    ),
    "inverse_cdf_step": row(
        lambda x, u: d.inverse_cdf_step(unit(u), x, Z, _coef(u)),
        lambda key, dtype: normal(key, dtype, (2, 3, 5), (2, 3)),
        False,
    ),
    "sample": row(
        lambda x: d.sample(KEY, lambda z, sigma: x[z], d.SamplerConfig(5, 2), (2, 3)),
        lambda key, dtype: normal(key, dtype, (5, 5)),
        False,
    ),
    "sample_from_uniforms": row(
        lambda x, u: d.sample_from_uniforms(lambda z, s: x[z], Z, unit(u), d.SamplerConfig(5, 2)),
        lambda key, dtype: normal(key, dtype, (5, 5), (3, 2, 3)),
        False,
    ),
    "dcd_pair_from_noise": row(lambda x: d.dcd_pair_from_noise(x, X0, 1.0, -2.0), _logits, False),
    "dcd_pair": row(lambda x: d.dcd_pair(KEY, X0, x, x - 1, 5), _number, False),
    "dcd_loss": row(d.dcd_loss, _two),
    "hmm_log_prob": row(lambda *x: d.hmm_log_prob(chain(*x), Z % 4), _chain_logits),
    "hmm_denoiser": row(
        lambda *x: d.hmm_denoiser(chain(*x))(Z % 4, jnp.full(len(Z), 0.7)), _chain_logits
    ),
}
CASES = {f"jaxlab.diffusion.{name}": case for name, case in CASES.items()}

EXEMPT = {
    f"jaxlab.diffusion.{name}": why
    for name, why in {
        "hmm_sample": "integers, tested in test_diffusion_hmm.py",
        "sample_times": "numbers from a key, tested in test_diffusion.py",
        "ids_from_draws": "integers, tested in test_diffusion_curriculum.py",
        "distinct_ids": "integers, tested in test_diffusion_curriculum.py",
        "make_operator": "makes a function on the host, tested in test_diffusion_curriculum.py",
        "gamma_of_alpha": "host only, tested in test_diffusion_curriculum.py",
        "winner_probability": "host only, tested in test_diffusion_curriculum.py",
        "dcd_delta": "a number from an integer, tested in test_diffusion_curriculum.py",
        "unigram_entropy": "of integers, tested in test_diffusion_curriculum.py",
        "gen_ppl_mask": "of integers, tested in test_diffusion_curriculum.py",
        "step_coefs": "host tables, tested in test_diffusion_samplers.py",
        "time_profile": "host only, tested in test_diffusion_samplers.py",
        "kappa_schedule": "host only, tested in test_diffusion_samplers.py",
    }.items()
}
