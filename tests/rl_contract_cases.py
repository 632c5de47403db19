"""Rows of `jaxlab.rl` for test_contract.py."""

import jax
import jax.numpy as jnp
from contract_cases import Case, _normal

from jaxlab import rl

MASK = jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
ROWS, IDS = MASK[:, 0], jnp.array([0, 1, 1, 0])
CONFIG = rl.RLConfig(kl_coef=0.1, entropy_coef=0.1, sampler_cap=2.0, ratio_level="sequence")
AGENT = rl.AgentConfig()
EPISODES = {
    "group": IDS,
    "traj": jnp.array([2, 0, 0, 2]),
    "t": jnp.array([1, 0, 1, 0]),
    "anchor": jnp.array([-5, 3, 3, -5]),
    "success": jnp.array([1, 0, 0, 1]),
    "valid": ROWS,
}


def shapes(*all_shapes):
    return lambda key, dtype: _normal(key, dtype, *all_shapes)


def data(call, *all_shapes):
    """Row of what makes data: no gradient flows."""
    return Case(call, shapes(*all_shapes), "wide", grad=False)


def loss(call, number, *more):
    """Row of a function of `number` arrays [4, 3] and more."""
    return Case(call, shapes(*[(4, 3)] * number, *more), "wide")


def batch(old, ref, sampler, adv):
    return dict(logp_old=old, logp_ref=ref, logp_sampler=sampler, adv=adv, mask=MASK)


def agent(call):
    def run(lp, lp2, reward, score):
        logs = dict(logp=-jnp.abs(lp), logp2=-jnp.abs(lp2))
        return call({**logs, "mask": MASK, "reward": reward, "score": score, **EPISODES}, AGENT)

    return data(run, (4, 3), (4, 3), (4,), (4,))


def kernel(call):
    """Row of a function of the kernel of four prompts and their pass@1."""
    uniform = jnp.full(4, 0.25)
    return data(lambda g, p: call(g @ g.T, uniform, jax.nn.sigmoid(p)), (4, 6), (4,))


def prompts(w, x):
    return rl.prompt_gradients(lambda w, e: jnp.sum(jnp.tanh(e @ w)), w, x, chunk=2)


CALLS: dict[str, Case] = {
    "group_advantage": data(
        lambda r: rl.group_advantage(r, IDS, 2, valid=jnp.array([1, 1, 1, 0])), (4,)
    ),
    "whiten": data(lambda x: rl.whiten(x, MASK), (4, 3)),
    "reinforce_pp": data(lambda r: rl.reinforce_pp(r, MASK, 0.9), (4, 3)),
    "gae": data(lambda r, v: rl.gae(r, v, MASK, 0.9, 0.8), (4, 3), (4, 3)),
    "dynamic_sampling_mask": data(lambda r: rl.dynamic_sampling_mask(r, IDS, 2), (4,)),
    "overlong_penalty": data(lambda n: rl.overlong_penalty(jnp.abs(n), 2, 1), (4,)),
    "ratio": loss(lambda a, b: rl.ratio(a, b, MASK, "sequence"), 2),
    "policy_loss_tokens": loss(
        lambda a, b, adv: rl.policy_loss_tokens(a, b, adv, MASK, kind="sapo")[0], 3
    ),
    "kl_tokens": loss(lambda a, b: rl.kl_tokens(a, b, clamp=2.0), 2),
    "aggregate": loss(lambda x: rl.aggregate(x, MASK, "seq_mean_token_mean"), 1),
    "value_loss": loss(lambda v, old, r: rl.value_loss(v, old, r, MASK)[0], 3),
    "logprobs_from_logits": Case(
        lambda z: rl.logprobs_from_logits(z, IDS, chunk=3), shapes((4, 7)), "wide"
    ),
    "entropy_from_logits": Case(rl.entropy_from_logits, shapes((4, 7)), "wide"),
    "rl_loss": loss(
        lambda lp, old, ref, sampler, h, adv: rl.rl_loss(
            lp, batch(old, ref, sampler, adv), CONFIG, entropy=h
        ),
        5,
        (4,),
    ),
    "pass_at_k": data(
        lambda c: rl.pass_at_k(8, jnp.clip(jnp.floor(8 * jnp.abs(c)), 0, 8), 3), (4,)
    ),
    "pass_at_k_curve": data(lambda x: rl.pass_at_k_curve(x > 0, (1, 3)), (4, 3)),
    "max_at_k": data(lambda x: rl.max_at_k(x, 2), (4, 3)),
    "passk_weight": data(lambda p: rl.passk_weight(jax.nn.sigmoid(p), 3), (4,)),
    "log_passk_weight": data(lambda p: rl.log_passk_weight(jax.nn.sigmoid(p), 3), (4,)),
    "passk_weight_loo": data(lambda x: rl.passk_weight_loo(x > 0, 2), (4, 3)),
    "pkpo_weights": data(lambda x: rl.pkpo_weights(x, 2), (4, 3)),
    "passk_analytic_advantage": data(lambda x: rl.passk_analytic_advantage(x > 0, 2), (4, 3)),
    "best_minus_second_advantage": data(
        lambda x: rl.best_minus_second_advantage(x, normalize=True), (4, 3)
    ),
    "agreement": kernel(lambda K, q, p: rl.agreement(K, q)),
    "passk_inner_product": kernel(lambda *x: rl.passk_inner_product(*x, 3)),
    "passk_cosine": kernel(lambda *x: rl.passk_cosine(*x, 3)),
    "critical_k": kernel(lambda *x: rl.critical_k(*x, 5)),
    "interference_report": kernel(lambda *x: rl.interference_report(*x, 3, k_max=5)),
    "prompt_gradients": Case(prompts, shapes((3, 2), (5, 3)), "wide"),
    "crossfit_inner_product": Case(
        lambda a, b: rl.crossfit_inner_product((a, a), (b, b)), shapes((4,), (4,)), "wide"
    ),
    "gradient_surgery": Case(
        lambda g, x: rl.gradient_surgery({"g": g}, {"g": x - 2 * g}), shapes((4,), (4,))
    ),
    "safe_mixing": Case(lambda g, x: rl.safe_mixing(g, x - 2 * g), shapes((4,), (4,)), "wide"),
    "token_signals": data(lambda a, b: rl.token_signals(-jnp.abs(a), -jnp.abs(b)), (4, 3), (4, 3)),
    "token_signals_from_logits": data(lambda z: rl.token_signals_from_logits(z, IDS), (4, 7)),
    "second_logprobs": data(rl.second_logprobs, (4, 7)),
    "step_uncertainty": data(lambda x: rl.step_uncertainty(x, MASK, rho=0.5), (4, 3, 3)),
    "smooth_backward": data(lambda u: rl.smooth_backward(u, MASK, 0.9), (4, 3)),
    "trajectory_uncertainty": data(lambda u: rl.trajectory_uncertainty(u, MASK, 0.9), (4, 3)),
    "discounted_returns": data(lambda u: rl.discounted_returns(u, MASK, 0.9), (4, 3)),
    "shaping_terms": data(lambda u, bar: rl.shaping_terms(u, bar, ROWS), (4, 3), (4,)),
    "reshape_scores": data(rl.reshape_scores, (4,), (4,)),
    "group_center": data(lambda x: rl.group_center(x, IDS, ROWS, 2, std=True), (4,)),
    "selaur_advantage": agent(rl.selaur_advantage),
    "gigpo_advantage": agent(rl.gigpo_advantage),
}
CASES = {f"jaxlab.rl.{name}": case for name, case in CALLS.items()}

EXEMPT = {
    "jaxlab.rl.anchor_ids": "strings on the host, tested in test_rl_selaur.py",
    "jaxlab.rl.rl_objective": "makes a function, tested in test_rl_losses.py",
}
