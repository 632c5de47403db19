"""Advantages of agents over many steps: GiGPO, and SELAUR's failure-aware scores in it.

Arrays are flat: B steps of all trajectories in any order, R response tokens of a step. Everything has
the static size B, and no gradient flows. Sources: SELAUR (arXiv 2602.21158) with its code, sections 1 to 4 of
the note on it; GiGPO: 2505.10978.
"""

import dataclasses
import math
from collections.abc import Hashable, Sequence
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jaxlab.arguments import check_choice, check_count, check_shape, wide
from jaxlab.rl.arguments import check_axes, check_ids, check_number, demand, flags
from jaxlab.rl.groups import backward_sums, group_moments
from jaxlab.rl.uncertainty import (
    SUMMARIES,
    TRANSFORMS,
    check_margin,
    check_weights,
    late_weights,
    reshape_scores,
    shaping_terms,
    smoothed,
    step_uncertainty,
    token_signals,
)  # fmt: skip


def group_center(
    x: Num[Array, "B"],
    ids: Int[Array, "B"],
    valid: Num[Array, "B"],
    num_segments: int,
    *,
    std: bool = False,
    singleton: str = "zero",
    eps: float = 1e-6,
    weights: Num[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """x minus the mean of its segment, over (its unbiased std + eps) if `std`; 0 on invalid rows.

    Rows with valid * weights = 1 make the statistics, every valid row is centred. A segment with one
    such row has std 1 and mean 0 ("zero") or its own value ("self"). ValueError for shapes, names
    and ids outside [0, num_segments) (traced: NaN in that row). No gradient.
    """
    check_choice("singleton", singleton, "zero", "self")
    check_number("eps", eps, 0)
    number = check_count("num_segments", num_segments, 1)
    check_axes("x", x, "B")
    shape = jnp.shape(x)
    check_shape("ids", ids, shape)
    given = flags("valid", valid, shape)
    inside = check_ids("ids", ids, valid, number)
    counted = given & inside
    if weights is not None:
        counted &= flags("weights", weights, shape)
    x = jax.lax.stop_gradient(wide(x))
    moments = group_moments(x, jnp.asarray(ids), counted, number)
    alone = moments.count <= 1
    out = jnp.where(alone, x, moments.centred) if singleton == "zero" else moments.centred
    if std:
        scale = jnp.where(alone, 1, jnp.sqrt(moments.variance)) + eps
        out = out / jnp.where(scale > 0, scale, 1)
    return jnp.where(given & inside, out, jnp.where(given, jnp.nan, 0))


def anchor_ids(observations: Sequence[Hashable], group: Sequence[int]) -> np.ndarray:
    """Ids [B] int32 in [0, B) on the host: equal iff group and observation are equal.

    ValueError unless there is one group a row.
    """
    groups = np.asarray(group)
    if groups.shape != (len(observations),):
        raise ValueError(f"group has shape {groups.shape}; expected ({len(observations)},)")
    seen: dict[Hashable, int] = {}
    pairs = zip(groups.tolist(), observations, strict=True)
    return np.array([seen.setdefault(pair, len(seen)) for pair in pairs], np.int32)


@dataclasses.dataclass(frozen=True)
class AgentConfig:
    """Everything static of the advantages of agents; ValueError on construction for values out of range."""

    transform: Annotated[
        str, "how failed or won episodes are reshaped: linear, neg, exp; none: GiGPO"
    ] = "linear"
    weights: Annotated[
        tuple[float, float, float], "of entropy term, least confidence and margin"
    ] = (1 / 3, 1 / 3, 1 / 3)
    rho: Annotated[float, "share of the weighted sum of signals; the rest is their maximum"] = 1.0
    margin_bias: Annotated[float, "margin whose signal is a half, in nats"] = 1.0
    margin_temp: Annotated[float, "softness of the margin's signal"] = 1.0
    decay: Annotated[float, "of the smoothing over later steps"] = 0.95
    summary: Annotated[str, "of an episode's steps: mean_smoothed or exp_late"] = "mean_smoothed"
    step_weight: Annotated[float, "of uncertainty in the returns of steps"] = 0.85
    scale: Annotated[float, "of what uncertainty adds; that of the reward of success"] = 10.0
    gate: Annotated[float, "shape only where the success rate over trajectories is above"] = 0.0
    gamma: Annotated[float, "discount of the returns of steps"] = 0.95
    omega: Annotated[float, "weight of the advantages of steps; 0 is GRPO"] = 1.0
    std: Annotated[bool, "divide by the standard deviation of the group"] = False
    over_trajectories: Annotated[bool, "episode statistics from one row a trajectory"] = False
    eps: Annotated[float, "added to the standard deviation"] = 1e-6

    def __post_init__(self):
        check_choice("transform", self.transform, "none", *TRANSFORMS)
        check_choice("summary", self.summary, *SUMMARIES)
        check_weights(self.weights, self.rho)
        check_margin(self.margin_bias, self.margin_temp)
        for name in ("decay", "gamma"):
            check_number(name, getattr(self, name), 0, 1)
        for name in ("step_weight", "eps"):
            check_number(name, getattr(self, name), 0)
        for name in ("scale", "gate", "omega"):
            check_number(name, getattr(self, name), -math.inf)
        for name in ("std", "over_trajectories"):
            check_choice(name, getattr(self, name), True, False)


class AgentAdvantage(NamedTuple):
    """Advantages and what they are made of, in the order of the rows; 0 on invalid rows."""

    adv: Float[Array, "B R"]  # (adv_episode + omega adv_step) * mask
    adv_episode: Float[Array, "B"]
    adv_step: Float[Array, "B"]
    u_step: Float[Array, "B"]
    u_smooth: Float[Array, "B"]
    u_traj: Float[Array, "B"]
    step_term: Float[Array, "B"]  # whether the gate is open or not
    episode_term: Float[Array, "B"]
    gate: Bool[Array, ""]


ROWS = ("group", "traj", "t", "anchor", "success", "reward", "score")


class _Steps(NamedTuple):
    """The rows ordered by trajectory and time, invalid ones last."""

    order: Int[Array, "B"]
    back: Int[Array, "B"]  # the inverse
    first: Bool[Array, "B"]  # valid, and the first of its trajectory
    linked: Bool[Array, "B"]  # valid, as is the next row, which is of the same trajectory


def _steps(traj, t, valid) -> _Steps:
    order = jnp.lexsort((t, traj, ~valid))
    traj, valid = traj[order], valid[order]
    linked = valid[1:] & (traj[1:] == traj[:-1])
    edge = jnp.zeros(1, bool)
    first = valid & ~jnp.concatenate([edge, linked])
    return _Steps(order, jnp.argsort(order), first, jnp.concatenate([linked, edge]))


def _clusters(group, anchor, valid):
    """Ids in [0, B), equal iff group and anchor are; those of invalid rows mean nothing."""
    order = jnp.lexsort((anchor, group, ~valid))
    group, anchor = group[order], anchor[order]
    new = (group[1:] != group[:-1]) | (anchor[1:] != anchor[:-1])
    return jnp.pad(jnp.cumsum(new), (1, 0))[jnp.argsort(order)]


def _checked(batch, shaped: bool):
    """(mask, valid) as booleans, after everything that can be wrong with `batch`."""
    needed = ("mask", *ROWS, *(("logp", "logp2") if shaped else ()))
    for name in needed:
        if name not in batch:
            raise ValueError(f"batch lacks {name!r}; it holds {sorted(batch)}")
    check_axes("mask", batch["mask"], "B R")
    b, r = jnp.shape(batch["mask"])
    for name in ROWS:
        check_shape(name, batch[name], (b,))
    mask = flags("mask", batch["mask"], (b, r))
    valid = batch.get("valid", np.ones(b, bool))
    given = flags("valid", valid, (b,))
    for name in ("group", "traj"):
        check_ids(name, batch[name], valid, b)
    for name in ("logp", "logp2"):
        if name in batch:
            check_shape(name, batch[name], (b, r))
    if "step_penalty" in batch:
        check_shape("step_penalty", batch["step_penalty"], (b,))
    answered = lambda xp, m, v: xp.any(m != 0, 1) | (v == 0)  # noqa: E731
    demand(answered, "mask must have a token in every valid row", batch["mask"], valid)

    def constant(xp, success, traj, v):
        order = xp.lexsort((traj, v == 0))
        success, traj, v = success[order], traj[order], v[order] != 0
        return (success[1:] == success[:-1]) | (traj[1:] != traj[:-1]) | ~v[1:]

    arrays = [batch["success"], batch["traj"], valid]
    demand(constant, "success must be constant in every trajectory", *arrays)
    return mask & given[:, None], given


def selaur_advantage(batch: dict[str, Array], cfg: AgentConfig = AgentConfig()) -> AgentAdvantage:
    """Episode and step advantages with scores reshaped by the uncertainty of failed episodes.

    batch: logp, logp2 (rank 2), mask [B, R]; group (task), traj, t, anchor (observation) [B] integers,
    group and traj in [0, B); success, reward, score [B], where score is the episode's on every row;
    optional valid [B] (0: padding) and step_penalty [B], subtracted from the row's own return. Rows in any
    order, time is (traj, t). Episode: score minus the mean over the task's rows; step: discounted return
    minus the mean over the rows of the task with the same anchor. ValueError for what is missing, does not
    fit or is out of range, for an empty response, and for success that varies in a trajectory.
    """
    shaped = cfg.transform != "none"
    mask, valid = _checked(batch, shaped)
    b = valid.shape[0]
    row = lambda name: jnp.where(valid, jax.lax.stop_gradient(wide(batch[name])), 0)  # noqa: E731
    traj, success = jnp.clip(jnp.asarray(batch["traj"]), 0, b - 1), row("success") > 0
    steps = _steps(traj, jnp.asarray(batch["t"]), valid)
    linked = lambda x: steps.linked.astype(x.dtype)  # noqa: E731
    zero = jnp.zeros(b, row("score").dtype)
    u_step = u_smooth = u_traj = step_term = episode_term = zero
    if "logp" in batch and "logp2" in batch:
        known = (jnp.where(mask, wide(batch[name]), -1) for name in ("logp", "logp2"))
        signals = token_signals(*known, margin_bias=cfg.margin_bias, margin_temp=cfg.margin_temp)
        u_step = step_uncertainty(signals, mask, cfg.weights, cfg.rho)
        u, present = u_step[steps.order], valid[steps.order].astype(u_step.dtype)
        u_smooth = smoothed(u, present, linked(u), cfg.decay)
        late = cfg.summary == "exp_late"
        values = u if late else u_smooth
        weights = present * (late_weights(present, linked(u), cfg.decay) if late else 1)
        total = lambda x: jax.ops.segment_sum(x, traj[steps.order], b)  # noqa: E731
        weight = total(weights)
        u_traj = (total(values * weights) / jnp.where(weight > 0, weight, 1))[traj]
        u_smooth = u_smooth[steps.back]
    penalty = row("step_penalty") if "step_penalty" in batch else 0
    score, reward = row("score"), row("reward")[steps.order]
    returns = backward_sums(reward, cfg.gamma * linked(reward))[steps.back] - penalty
    gate = jnp.zeros((), bool)
    if shaped:
        first = steps.first[steps.back]
        rate = jnp.sum(first & success) / jnp.maximum(jnp.sum(first), 1)
        gate = rate > cfg.gate
        step_term, episode_term = shaping_terms(
            u_smooth, u_traj, success, transform=cfg.transform, step_weight=cfg.step_weight
        )
        shape = lambda x, term: jnp.where(  # noqa: E731
            gate, reshape_scores(x, term, cfg.transform, cfg.scale), x
        )
        score, returns = shape(score, episode_term), shape(returns, step_term)

    def centred(x, ids, singleton, counted=None):
        return group_center(
            x, ids, valid, b, std=cfg.std, singleton=singleton, eps=cfg.eps, weights=counted
        )

    counted = steps.first[steps.back] if cfg.over_trajectories else None
    group = jnp.asarray(batch["group"])
    episode = centred(score, group, "zero", counted)
    step = centred(returns, _clusters(group, jnp.asarray(batch["anchor"]), valid), "self")
    adv = jnp.where(mask, (episode + cfg.omega * step)[:, None], 0)
    keep = lambda x: jnp.where(valid, x, 0)  # noqa: E731
    return AgentAdvantage(
        adv=adv,
        adv_episode=episode,
        adv_step=step,
        u_step=keep(u_step),
        u_smooth=keep(u_smooth),
        u_traj=keep(u_traj),
        step_term=keep(step_term),
        episode_term=keep(episode_term),
        gate=gate,
    )


def gigpo_advantage(batch: dict[str, Array], cfg: AgentConfig = AgentConfig()) -> AgentAdvantage:
    """`selaur_advantage` with transform "none": logp and logp2 may be absent (then u_* are 0)."""
    return selaur_advantage(batch, dataclasses.replace(cfg, transform="none"))
