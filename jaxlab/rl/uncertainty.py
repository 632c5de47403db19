"""How uncertain a policy was of the tokens, steps and trajectories that it sampled.

No gradient flows through anything here. Shapes: R response tokens of a step; N trajectories of T steps,
padded on the right. Source: SELAUR (arXiv 2602.21158), sections 2 and 3 of the note on it.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxlab.arguments import check_choice, check_shape, wide
from jaxlab.rl.arguments import check_axes, check_number, demand, flags
from jaxlab.rl.groups import backward_sums, following
from jaxlab.rl.logits import entropy_from_logits, logprobs_from_logits

TRANSFORMS = ("linear", "neg", "exp")
SUMMARIES = ("mean_smoothed", "exp_late")
# Rounding of a log-softmax in bfloat16 may end above 0.
ROUNDING = 1e-2
stop = jax.lax.stop_gradient


def check_margin(bias, temp) -> None:
    """ValueError unless the margin's bias is finite and its temperature positive."""
    check_number("margin_bias", bias, -math.inf)
    check_number("margin_temp", temp, 0, above=True)


def token_signals(
    logp: Float[Array, "*b R"],
    logp2: Float[Array, "*b R"],
    *,
    margin_bias: float = 1.0,
    margin_temp: float = 1.0,
) -> Float[Array, "*b R 3"]:
    """-p log p of the sampled token, 1 - p, and sigmoid((bias - (logp - logp2)) / temp).

    `logp2` is the log-probability of the token of rank 2, -inf if there is none (margin signal 0).
    ValueError for shapes, logp above 0 and a temperature that is not positive.
    """
    check_margin(margin_bias, margin_temp)
    check_shape("logp2", logp2, jnp.shape(logp))
    demand(lambda xp, x: ~(x > ROUNDING), "logp must not be above 0", logp)
    lp, lp2 = stop(wide(logp)), stop(wide(logp2))
    p = jnp.exp(lp)
    spread = jnp.where(p > 0, -p * lp, 0)
    # The margin over a token that cannot be sampled is infinite.
    margin = jax.nn.sigmoid((margin_bias - (lp - lp2)) / margin_temp)
    return jnp.stack([spread, -jnp.expm1(lp), jnp.where(lp2 == -jnp.inf, 0, margin)], -1)


def second_logprobs(logits: Float[Array, "*b V"]) -> Float[Array, "*b"]:
    """Log-probability of the token of rank 2 under softmax(logits), -inf if V is 1; no gradient flows."""
    z = stop(wide(logits))
    best = jnp.arange(z.shape[-1]) == jnp.argmax(z, -1)[..., None]
    return jnp.max(jnp.where(best, -jnp.inf, z), -1) - jax.nn.logsumexp(z, -1)


def token_signals_from_logits(
    logits: Float[Array, "*b R V"],
    tokens: Int[Array, "*b R"],
    *,
    full_entropy: bool = False,
    margin_bias: float = 1.0,
    margin_temp: float = 1.0,
) -> Float[Array, "*b R 3"]:
    """`token_signals` of logits: rank 2 is that of the vocabulary.

    `full_entropy` puts the entropy of the whole vocabulary over ln V (0 for V = 1) in the place of
    -p log p. ValueError as there.
    """
    logits = stop(logits)
    logp = logprobs_from_logits(logits, tokens)
    options = dict(margin_bias=margin_bias, margin_temp=margin_temp)
    signals = token_signals(jnp.minimum(logp, 0), second_logprobs(logits), **options)
    if full_entropy:
        share = entropy_from_logits(logits) / (math.log(jnp.shape(logits)[-1]) or 1)
        signals = signals.at[..., 0].set(share)
    return signals


def check_weights(weights, rho) -> None:
    """ValueError unless there are three weights, none negative, not all 0, and rho in [0, 1]."""
    if (
        len(weights) != 3
        or not all(w >= 0 and math.isfinite(w) for w in weights)
        or not any(weights)
    ):
        raise ValueError(f"weights={weights!r} must be three numbers, none negative, not all 0")
    check_number("rho", rho, 0, 1)


def step_uncertainty(
    signals: Float[Array, "*b R 3"],
    mask: Num[Array, "*b R"],
    weights: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3),
    rho: float = 1.0,
) -> Float[Array, "*b"]:
    """rho weights . U + (1 - rho) max U, with U the means of the signals over valid tokens; 0 if none is.

    ValueError for shapes, weights and rho out of range.
    """
    check_weights(weights, rho)
    shape = jnp.shape(signals)
    check_shape("signals", signals, (*shape[:-1], 3))
    kept = flags("mask", mask, shape[:-1])
    x = jnp.where(kept[..., None], stop(wide(signals)), 0)
    means = jnp.sum(x, -2) / jnp.maximum(jnp.sum(kept, -1, keepdims=True), 1)
    blend = sum(w * means[..., i] for i, w in enumerate(weights))
    return rho * blend + (1 - rho) * jnp.max(means, -1)


def _steps(name, x, mask):
    check_axes(name, x, "N T")
    kept = flags("mask", mask, jnp.shape(x))
    return jnp.where(kept, stop(wide(x)), 0), kept.astype(wide(x).dtype)


def smoothed(u: Float[Array, "*b t"], present, linked, decay: float) -> Float[Array, "*b t"]:
    """Means of u over the steps from here on, weights decay^distance; `linked` 1 where the next is of it."""
    keep = decay * linked
    weight = backward_sums(present, keep)
    return backward_sums(u, keep) / jnp.where(weight > 0, weight, 1)


def smooth_backward(
    u: Float[Array, "N T"], mask: Num[Array, "N T"], decay: float
) -> Float[Array, "N T"]:
    """sum_{j >= t} decay^(j - t) u_j / sum_{j >= t} decay^(j - t) over valid steps; 0 on padding.

    ValueError for shapes and a decay outside [0, 1].
    """
    check_number("decay", decay, 0, 1)
    u, kept = _steps("u", u, mask)
    return smoothed(u, kept, following(kept), decay) * kept


def trajectory_uncertainty(
    u: Float[Array, "N T"],
    mask: Num[Array, "N T"],
    decay: float,
    summary: str = "mean_smoothed",
) -> Float[Array, "N"]:
    """Summary of raw step uncertainties: the mean of `smooth_backward`, or "exp_late".

    "exp_late" weighs step j of T by decay^(T - 1 - j). 0 without a valid step. ValueError for names,
    shapes and a decay outside [0, 1].
    """
    check_choice("summary", summary, *SUMMARIES)
    check_number("decay", decay, 0, 1)
    u, kept = _steps("u", u, mask)
    if summary == "mean_smoothed":
        values, weights = smoothed(u, kept, following(kept), decay), kept
    else:
        values, weights = u, late_weights(kept, following(kept), decay) * kept
    total = jnp.sum(weights, -1)
    return jnp.sum(values * weights, -1) / jnp.where(total > 0, total, 1)


def late_weights(present, linked, decay: float):
    """decay to the power of the number of steps that follow in the trajectory."""
    after = backward_sums(present, linked) - present
    return jnp.power(jnp.asarray(decay, after.dtype), after)


def discounted_returns(
    rewards: Num[Array, "N T"], mask: Num[Array, "N T"], gamma: float
) -> Float[Array, "N T"]:
    """sum_j gamma^j r_{t+j} over the valid steps of a trajectory, 0 on padding; gamma in [0, 1]."""
    check_number("gamma", gamma, 0, 1)
    r, kept = _steps("rewards", rewards, mask)
    return backward_sums(r, gamma * following(kept)) * kept


def shaping_terms(
    u_smooth: Float[Array, "*b"],
    u_traj: Float[Array, "*b"],
    success: Num[Array, "*b"],
    *,
    transform: str = "linear",
    step_weight: float = 0.85,
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
    """(step term, episode term): what uncertainty adds to, or multiplies, a score.

    "linear" (step_weight u_smooth, u_traj) on failed episodes, "neg" minus that, 0 on the others; "exp"
    (exp(-step_weight u_smooth), exp(-u_traj)) on successful ones, 1 on the others. Elementwise; the
    axes of `success` are the leading ones of both. ValueError for names and a step_weight below 0.
    """
    check_choice("transform", transform, *TRANSFORMS)
    check_number("step_weight", step_weight, 0)
    success = jnp.asarray(success) > 0

    def term(u):
        won = success.reshape(success.shape + (1,) * (u.ndim - success.ndim))
        if transform == "exp":
            return jnp.where(won, jnp.exp(-u), 1)
        return jnp.where(won, 0, u if transform == "linear" else -u)

    return term(step_weight * stop(wide(u_smooth))), term(stop(wide(u_traj)))


def reshape_scores(
    score: Num[Array, "*b"],
    term: Float[Array, "*b"],
    transform: str = "linear",
    scale: float = 10.0,
) -> Float[Array, "*b"]:
    """score + scale term, or score times term for "exp". ValueError for an unknown transform."""
    check_choice("transform", transform, *TRANSFORMS)
    check_number("scale", scale, -math.inf)
    score, term = stop(wide(score)), stop(wide(term))
    return score * term if transform == "exp" else score + scale * term
