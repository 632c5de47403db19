"""Policy and value losses of each token.

Shapes: N rows, T tokens. What a masked position holds, NaN and inf included, adds exactly 0 to value
and gradient. logp is differentiated; logp_old, adv and returns are data. Where a ratio is clipped, the
exponential behind it is not differentiated at all: 0 times its overflow would be NaN.
Source: note on RL objectives, section B; the peers verl, TRL and Tunix by the table in section C.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jaxlab.arguments import check_choice, check_shape, wide
from jaxlab.rl.arguments import check_number
from jaxlab.rl.reduce import (
    Metrics,
    aggregate,
    clip,
    lengths,
    mean_of,
    row_mean,
    stop,
    token_metrics,
    valid_tokens,
)  # fmt: skip

KINDS = ("pg", "ppo", "cispo", "sapo", "gmpo")
LEVELS = ("token", "sequence", "sequence_sum", "sequence_token_grad")


def advantage_of(adv, kept) -> jax.Array:
    """`adv` [N] or [N, 1] as [N, 1], or [N, T] as it is; 0 where masked, without gradient."""
    n, t = kept.shape
    check_shape("adv", adv, (n,), (n, 1), (n, t))
    adv = wide(adv).reshape(n, -1)
    counted = kept if adv.shape[1] == t else lengths(kept) > 0
    return stop(jnp.where(counted, adv, 0))


def _log_ratio(delta, kept, level, clamp):
    """[N, T], or [N, 1] if the tokens of a row share it, as what is computed of a row is cheap."""
    if level == "sequence_sum":
        z = jnp.sum(delta, 1, keepdims=True)
    else:
        z = delta if level == "token" else row_mean(delta, kept)
    if level == "sequence_token_grad":
        z = stop(z) + (delta - stop(delta))
    return z if clamp is None else clip(z, -clamp, clamp)


def check_ratio(level, clamp) -> None:
    """ValueError for an unknown level or a clamp that is no positive number or None."""
    check_choice("ratio level", level, *LEVELS)
    if clamp is not None:
        check_number("clamp of the log ratio", clamp, 0, above=True)


def ratio(
    logp: Float[Array, "N T"],
    logp_old: Float[Array, "N T"],
    mask: Num[Array, "N T"],
    level: str = "token",
    clamp: float | None = 20.0,
) -> Float[Array, "N T"]:
    """Importance ratio exp(logp - logp_old) at each token, 0 where masked.

    `level`: "token"; "sequence", exp of the mean over the row's valid tokens (GSPO); "sequence_sum",
    exp of the sum; "sequence_token_grad" has the value of "sequence" and the gradient
    ratio * grad logp at each token. A sequence's value is repeated on its tokens. `clamp` limits what is
    exponentiated to [-clamp, clamp]; None does not. ValueError for names, numbers and shapes.
    """
    check_ratio(level, clamp)
    kept, logp, old = valid_tokens(mask, logp=logp, logp_old=logp_old)
    z = _log_ratio(logp - stop(old), kept, level, clamp)
    return jnp.where(kept, jnp.exp(z), 0)


def check_policy(
    kind, ratio_level, eps_low, eps_high, dual_clip, ratio_cap, tau_pos, tau_neg, log_ratio_clamp
) -> None:
    """ValueError for unknown names and numbers out of range."""
    check_choice("kind", kind, *KINDS)
    check_choice("ratio_level", ratio_level, *LEVELS)
    check_number("eps_low", eps_low, 0, 1)
    check_number("eps_high", eps_high, 0)
    check_number("tau_pos", tau_pos, 0, above=True)
    check_number("tau_neg", tau_neg, 0, above=True)
    optional = {"ratio_cap": (ratio_cap, 0), "dual_clip": (dual_clip, 1)}
    for name, (value, low) in (optional | {"log_ratio_clamp": (log_ratio_clamp, 0)}).items():
        if value is not None:
            check_number(name, value, low, above=True)


def policy_loss_tokens(
    logp: Float[Array, "N T"],
    logp_old: Float[Array, "N T"],
    adv: Num[Array, "N"] | Num[Array, "N 1"] | Num[Array, "N T"],
    mask: Num[Array, "N T"],
    *,
    kind: str = "ppo",
    ratio_level: str = "token",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_cap: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    log_ratio_clamp: float | None = 20.0,
) -> tuple[Float[Array, "N T"], Metrics]:
    """(loss of each token, metrics); r is `ratio` at `ratio_level`, A the advantage.

    "pg" -A logp; "ppo" max(-A min(r, ratio_cap), -A clip(r, 1 - eps_low, 1 + eps_high)), and where A < 0
    at most -A dual_clip; "cispo" -sg(clip(r)) A logp; "sapo" -A sigmoid(tau (r - 1)) 4 / tau, tau_pos
    where A > 0 and tau_neg elsewhere; "gmpo" -mean(A) times the geometric mean of the ratios, each
    clipped on the pessimistic side, on every token of the row (token ratios, whatever `ratio_level`).
    eps_low 1 is no lower clip.

    Metrics are (sum, number of valid tokens), without gradient: clip_frac, clip_frac_low (A < 0),
    clip_frac_high (A > 0), dual_clip_frac, approx_kl (mean of logp_old - logp, clamped) and ratio.
    ValueError for names, numbers and shapes. Sources: PPO 1707.06347, dual clip 1912.09729, DAPO
    2503.14476, GSPO 2507.18071, CISPO 2506.13585, SAPO 2511.20347, GMPO 2507.20673.
    """
    check_policy(
        kind,
        ratio_level,
        eps_low,
        eps_high,
        dual_clip,
        ratio_cap,
        tau_pos,
        tau_neg,
        log_ratio_clamp,
    )
    kept, logp, old = valid_tokens(mask, logp=logp, logp_old=logp_old)
    cfg = dict(
        kind=kind, ratio_level=ratio_level, eps_low=eps_low, eps_high=eps_high, dual_clip=dual_clip,
        ratio_cap=ratio_cap, tau_pos=tau_pos, tau_neg=tau_neg, log_ratio_clamp=log_ratio_clamp,
    )  # fmt: skip
    loss, values = policy_terms(logp, old, advantage_of(adv, kept), kept, **cfg)
    return loss, token_metrics(kept, logp.dtype, **values)


def policy_terms(
    logp, old, a, kept, *, kind, ratio_level, eps_low, eps_high, dual_clip, ratio_cap,
    tau_pos, tau_neg, log_ratio_clamp,
):  # fmt: skip
    """(loss of each token, what `token_metrics` sums) of checked arrays, logp and old 0 where masked."""
    delta = logp - stop(old)
    z = _log_ratio(delta, kept, ratio_level, log_ratio_clamp)
    r = stop(jnp.exp(z))
    clipped = dual = jnp.zeros((len(kept), 1), bool)
    if kind == "pg":
        loss = -a * logp
        # A sum of its own: inside the one of all metrics, XLA:CPU does not vectorise the exponential.
        r = row_mean(jnp.where(kept, r, 0), kept)
    elif kind == "ppo":
        loss, clipped, dual = _ppo(a, z, r, 1 - eps_low, 1 + eps_high, dual_clip, ratio_cap)
    elif kind == "cispo":
        bounded = clip(r, 1 - eps_low, 1 + eps_high)
        loss, clipped = -bounded * a * logp, bounded != r
    elif kind == "sapo":
        tau = jnp.where(a > 0, tau_pos, tau_neg)
        # Far beyond where the sigmoid is 1 with slope 0, the exponential would overflow.
        bounded = jnp.exp(jnp.minimum(z, 0.9 * np.log(jnp.finfo(z.dtype).max)))
        loss, r = -a * jax.nn.sigmoid(tau * (bounded - 1)) * 4 / tau, stop(bounded)
    else:
        # Bounded above for A > 0 and below for A < 0; a token with A = 0 counts nothing.
        bounded = jnp.where(a > 0, clip(delta, -jnp.inf, eps_high), clip(delta, -eps_low, jnp.inf))
        mean = row_mean(jnp.where(a == 0, 0, bounded), kept)
        z = _log_ratio(mean, kept, "token", log_ratio_clamp)
        own = a if a.shape[1] == 1 else row_mean(a, kept)
        loss, r = -own * jnp.exp(z), stop(jnp.exp(z))
        clipped = (delta < -eps_low) | (delta > eps_high)
    drift = delta if log_ratio_clamp is None else clip(delta, -log_ratio_clamp, log_ratio_clamp)
    values = {
        "clip_frac": clipped,
        "clip_frac_low": (clipped, a < 0),
        "clip_frac_high": (clipped, a > 0),
        "dual_clip_frac": dual,
        "approx_kl": -drift,
        "ratio": r,
    }
    return jnp.where(kept, loss, 0), values


def _ppo(a, z, r, low, high, dual_clip, ratio_cap):
    """(loss, clipped, dual clipped) [N, T]; z the log ratio, r its exponential without gradient."""
    free = -a * (r if ratio_cap is None else jnp.minimum(r, ratio_cap))
    bounded = -a * clip(r, low, high)
    clipped = bounded > free
    loss = jnp.maximum(free, bounded)
    moves = jnp.where(
        clipped, (r >= low) & (r <= high), True if ratio_cap is None else r <= ratio_cap
    )
    dual = jnp.zeros_like(clipped)
    if dual_clip is not None:
        dual = (a < 0) & (loss > -a * dual_clip)
        loss = jnp.where(dual, -a * dual_clip, loss)
    # Where A is 0 the ratio may be infinite.
    moves &= ~dual & (a != 0)
    loss = jnp.where(moves, -a * jnp.exp(jnp.where(moves, z, 0)), loss)
    return jnp.where(a == 0, 0, loss), clipped, dual


_clip = clip  # `value_loss` has an argument of that name


def value_loss(
    values: Float[Array, "N T"],
    values_old: Float[Array, "N T"],
    returns: Float[Array, "N T"],
    mask: Num[Array, "N T"],
    *,
    clip: float = 0.2,
    mode: str = "token_mean",
    max_len: int | None = None,
    rows: str = "nonempty",
) -> tuple[Float[Array, ""], Metrics]:
    """(loss, metrics): 0.5 mean(max((V - R)^2, (V within `clip` of V_old - R)^2)).

    Mean by `aggregate`. metrics: loss (numerator, denominator) and value_clip_frac, the tokens where
    the second is larger. ValueError for names, numbers and shapes. Source: PPO; verl.
    """
    check_number("clip", clip, 0, above=True)
    arrays = dict(values=values, values_old=values_old, returns=returns)
    kept, v, old, target = valid_tokens(mask, **arrays)
    old, target = stop(old), stop(target)
    near = _clip(v, old - clip, old + clip)
    free, bounded = (v - target) ** 2, (near - target) ** 2
    clipped = bounded > free
    numerator, denominator = aggregate(
        0.5 * jnp.where(clipped, bounded, free), mask, mode, max_len=max_len, rows=rows
    )
    metrics = {"loss": (numerator, denominator)}
    metrics |= token_metrics(kept, v.dtype, value_clip_frac=clipped)
    return mean_of(numerator, denominator), metrics
