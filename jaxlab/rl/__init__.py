"""Reinforcement learning after pre-training: advantages, losses, pass@k, interference, agents.

Sources: notes on RL objectives, on pass@k interference (arXiv 2602.21189) and on SELAUR (2602.21158).
"""

from jaxlab.rl.advantages import (
    dynamic_sampling_mask,
    gae,
    group_advantage,
    overlong_penalty,
    reinforce_pp,
    whiten,
)
from jaxlab.rl.interference import (
    agreement,
    critical_k,
    crossfit_inner_product,
    gradient_surgery,
    interference_report,
    passk_cosine,
    passk_inner_product,
    prompt_gradients,
    safe_mixing,
)
from jaxlab.rl.kl import kl_tokens
from jaxlab.rl.logits import entropy_from_logits, logprobs_from_logits
from jaxlab.rl.losses import policy_loss_tokens, ratio, value_loss
from jaxlab.rl.objective import RLConfig, rl_loss, rl_objective
from jaxlab.rl.passk import (
    log_passk_weight,
    max_at_k,
    pass_at_k,
    pass_at_k_curve,
    passk_weight,
    passk_weight_loo,
)
from jaxlab.rl.pkpo import best_minus_second_advantage, passk_analytic_advantage, pkpo_weights
from jaxlab.rl.reduce import aggregate
from jaxlab.rl.selaur import (
    AgentAdvantage,
    AgentConfig,
    anchor_ids,
    gigpo_advantage,
    group_center,
    selaur_advantage,
)
from jaxlab.rl.uncertainty import (
    discounted_returns,
    reshape_scores,
    second_logprobs,
    shaping_terms,
    smooth_backward,
    step_uncertainty,
    token_signals,
    token_signals_from_logits,
    trajectory_uncertainty,
)

__all__ = [
    "AgentAdvantage",
    "AgentConfig",
    "RLConfig",
    "aggregate",
    "agreement",
    "anchor_ids",
    "best_minus_second_advantage",
    "critical_k",
    "crossfit_inner_product",
    "discounted_returns",
    "dynamic_sampling_mask",
    "entropy_from_logits",
    "gae",
    "gigpo_advantage",
    "gradient_surgery",
    "group_advantage",
    "group_center",
    "interference_report",
    "kl_tokens",
    "log_passk_weight",
    "logprobs_from_logits",
    "max_at_k",
    "overlong_penalty",
    "pass_at_k",
    "pass_at_k_curve",
    "passk_analytic_advantage",
    "passk_cosine",
    "passk_inner_product",
    "passk_weight",
    "passk_weight_loo",
    "pkpo_weights",
    "policy_loss_tokens",
    "prompt_gradients",
    "ratio",
    "reinforce_pp",
    "reshape_scores",
    "rl_loss",
    "rl_objective",
    "safe_mixing",
    "second_logprobs",
    "selaur_advantage",
    "shaping_terms",
    "smooth_backward",
    "step_uncertainty",
    "token_signals",
    "token_signals_from_logits",
    "trajectory_uncertainty",
    "value_loss",
    "whiten",
]
