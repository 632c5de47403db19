"""Advantages: what each token is worth, from rewards of groups of samples or of tokens.

All are data for a loss: 0 where masked or invalid, and without gradient. What masked positions and
invalid rows hold, NaN included, changes nothing else. Shapes: N rows, T tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxlab.arguments import check_choice, check_count, check_shape, wide
from jaxlab.rl.arguments import check_axes, check_ids, check_number, demand, flags
from jaxlab.rl.groups import backward_sums, following, group_moments

KINDS = ("grpo", "drgrpo", "rloo", "batch_std", "reinforce_pp_baseline")


def group_advantage(
    rewards: Num[Array, "N"],
    group: Int[Array, "N"],
    num_groups: int,
    *,
    kind: str = "grpo",
    eps: float = 1e-6,
    ddof: int = 1,
    singleton: str = "zero",
    valid: Num[Array, "N"] | None = None,
    mask: Num[Array, "N T"] | None = None,
) -> Float[Array, "N"]:
    """Advantage [N] of each sample over the samples of its group (of its prompt).

    With m and s the mean and the std (n - ddof) of the group: "grpo" (R - m) / (s + eps); "drgrpo"
    R - m; "rloo" R minus the mean of the others; "batch_std" (R - m) / (std of all rows + eps);
    "reinforce_pp_baseline" R - m, whitened with each row counted as often as `mask` has tokens in it.
    `group` holds ids in [0, num_groups) in any order.

    A group of one valid row: "zero" makes R - m 0, "keep" sets m = 0 and s = 1. Rows with valid 0 have
    no part in statistics, whatever they hold, and get 0. A group of equal rewards gets exact zeros.
    ValueError for unknown names, shapes, and ids out of range (traced ids: NaN in that row).
    Sources: GRPO 2402.03300, Dr.GRPO 2503.20783, RLOO 2402.14740, REINFORCE++ 2501.03262.
    """
    check_choice("kind", kind, *KINDS)
    check_choice("singleton", singleton, "zero", "keep")
    check_choice("ddof", ddof, 0, 1)
    check_number("eps", eps, 0)
    number = check_count("num_groups", num_groups, 1)
    check_axes("rewards", rewards, "N")
    shape = jnp.shape(rewards)
    check_shape("group", group, shape)
    group = jnp.asarray(group)
    given = jnp.ones(shape, bool) if valid is None else flags("valid", valid, shape)
    inside = check_ids("group", group, True if valid is None else valid, number)
    counted = given & inside
    r = wide(rewards)
    own = group_moments(r, group, counted, number, ddof)
    alone = own.count == 1
    lone = jnp.where(alone, r if singleton == "keep" else 0, own.centred)
    if kind == "grpo":
        scale = jnp.where(alone, 1, jnp.sqrt(own.variance)) + eps
        out = lone / jnp.where(scale > 0, scale, 1)
    elif kind == "drgrpo":
        out = lone
    elif kind == "rloo":
        out = jnp.where(alone, lone, own.centred * own.count / jnp.maximum(own.count - 1, 1))
    elif kind == "batch_std":
        every = group_moments(r, jnp.zeros_like(group), counted, 1, ddof)
        scale = jnp.sqrt(every.variance) + eps
        out = lone / jnp.where(scale > 0, scale, 1)
    else:
        if mask is None or jnp.ndim(mask) != 2:
            raise ValueError("mask [N, T] must be given for kind='reinforce_pp_baseline'")
        tokens = flags("mask", mask, (*shape, jnp.shape(mask)[1])) & counted[:, None]
        white = whiten(jnp.broadcast_to(lone[:, None], tokens.shape), tokens)
        first = jnp.argmax(tokens, 1, keepdims=True)
        out = jnp.take_along_axis(white, first, 1)[:, 0]
    out = jnp.where(counted, out, jnp.where(given, jnp.nan, 0))
    return jax.lax.stop_gradient(out)


def whiten(
    x: Num[Array, "*n"], mask: Num[Array, "*n"], *, shift_mean: bool = True, eps: float = 1e-8
) -> Float[Array, "*n"]:
    """(x - mean) / sqrt(var + eps) with the unbiased variance, over `mask`; 0 outside.

    `shift_mean` False adds the mean again. One position, or none, has variance 0. No gradient.
    """
    check_number("eps", eps, 0)
    kept = flags("mask", mask, jnp.shape(x)).reshape(-1)
    moments = group_moments(wide(x).reshape(-1), jnp.zeros(kept.shape, jnp.int32), kept, 1)
    # With eps 0, equal numbers are 0 too.
    scale = jnp.sqrt(moments.variance + eps)
    out = moments.centred / jnp.where(scale > 0, scale, 1)
    out = jnp.where(kept, out if shift_mean else out + moments.mean, 0)
    return jax.lax.stop_gradient(out.reshape(jnp.shape(x)))


_whiten = whiten  # `gae` has an argument of that name


def _tokens(name, x, mask):
    check_axes(name, x, "N T")
    return wide(x), flags("mask", mask, jnp.shape(x))


def reinforce_pp(
    token_rewards: Num[Array, "N T"], mask: Num[Array, "N T"], gamma: float = 1.0
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """(advantages, returns) of REINFORCE++: returns-to-go, whitened over all valid tokens.

    R_t = r_t + gamma mask_{t+1} R_{t+1}, so a masked token ends what flows back. Returns are not
    masked. ValueError unless gamma is in [0, 1] and the shapes agree. Source: 2501.03262; verl.
    """
    check_number("gamma", gamma, 0, 1)
    r, kept = _tokens("token_rewards", token_rewards, mask)
    inner = backward_sums(jnp.where(kept, r, 0), gamma * following(kept.astype(r.dtype)))
    # The recurrence reads valid positions only; a masked one adds its own reward at the end.
    returns = jax.lax.stop_gradient(jnp.where(kept, inner, inner + r))
    return whiten(returns, mask), returns


def gae(
    token_rewards: Num[Array, "N T"],
    values: Num[Array, "N T"],
    mask: Num[Array, "N T"],
    gamma: float,
    lam: float,
    whiten: bool = True,
) -> tuple[Float[Array, "N T"], Float[Array, "N T"]]:
    """(advantages, returns) by generalised advantage estimation.

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}. Masked tokens (tool output)
    are skipped: the next valid token's V and A are carried through them. returns = A + values, before
    `whiten` and not masked. ValueError unless gamma and lam are in [0, 1] and the shapes agree.
    Source: 1506.02438; verl.
    """
    check_number("gamma", gamma, 0, 1)
    check_number("lam", lam, 0, 1)
    r, kept = _tokens("token_rewards", token_rewards, mask)
    check_shape("values", values, r.shape)
    v = wide(values)
    seen = jnp.where(kept, v, 0)
    skipped = (~kept).astype(v.dtype)
    after = following(backward_sums(seen, skipped))
    delta = jnp.where(kept, jnp.where(kept, r, 0) + gamma * after - seen, 0)
    keep = jnp.where(kept, gamma * lam, 1).astype(delta.dtype)
    adv = jax.lax.stop_gradient(backward_sums(delta, keep))
    returns = adv + jax.lax.stop_gradient(v)
    return (_whiten(adv, mask) if whiten else jnp.where(kept, adv, 0)), returns


def dynamic_sampling_mask(
    rewards: Num[Array, "N"], group: Int[Array, "N"], num_groups: int
) -> Float[Array, "N"]:
    """1 on the rows of groups whose rewards are not all equal, 0 elsewhere. Source: DAPO 2503.14476.

    ValueError for shapes and ids out of range (traced ids: 0 in that row).
    """
    number = check_count("num_groups", num_groups, 1)
    check_axes("rewards", rewards, "N")
    check_shape("group", group, jnp.shape(rewards))
    counted = check_ids("group", group, True, number)
    r, ids = wide(rewards), jnp.clip(jnp.asarray(group), 0, number - 1)
    least, most = jnp.where(counted, r, jnp.inf), jnp.where(counted, r, -jnp.inf)
    least = jax.ops.segment_min(least, ids, number)[ids]
    most = jax.ops.segment_max(most, ids, number)[ids]
    return (counted & (least < most)).astype(r.dtype)


def overlong_penalty(
    lengths: Num[Array, "N"], max_len: int, buffer: int, penalty: float = 1.0
) -> Float[Array, "N"]:
    """penalty * clip((max_len - buffer - length) / buffer, -1, 0), lengths in tokens.

    ValueError unless 1 <= buffer <= max_len and lengths are not negative. Source: DAPO 2503.14476.
    """
    check_count("buffer", buffer, 1)
    check_count("max_len", max_len, buffer)
    check_number("penalty", penalty, 0)
    demand(lambda xp, x: x >= 0, "lengths must not be negative", lengths)
    return penalty * jnp.clip((max_len - buffer - wide(lengths)) / buffer, -1, 0)
