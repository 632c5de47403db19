"""What each sampled answer is worth: the choice of an advantage by configuration."""

import dataclasses
from typing import Annotated, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab import rl

GROUPED = ("grpo", "drgrpo", "rloo", "batch_std", "reinforce_pp_baseline")
Kind = Literal[
    "grpo", "drgrpo", "rloo", "batch_std", "reinforce_pp_baseline",
    "gae", "pkpo", "pkpo_loo", "pkpo_loo1", "pkpo_wrloo", "passk_analytic", "best_minus_second",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Advantage:
    """From rewards of n answers a prompt to advantages."""

    kind: Annotated[
        Kind,
        "a group's statistics; a value head's (gae); weights of pass@k: pkpo..., passk_analytic",
    ] = "grpo"
    k: Annotated[int, "of pass@k, for the kinds that train on it"] = 1
    dynamic: Annotated[bool, "leave groups of equal rewards out of the loss (DAPO)"] = False
    overlong: Annotated[int, "tokens before the limit that are penalised (DAPO); 0: none"] = 0
    gamma: Annotated[float, "discount of a token's later rewards, for kind=gae"] = 1.0
    lam: Annotated[float, "trust in later rewards over the value head, for kind=gae"] = 0.95

    def check(self, samples: int, new: int) -> None:
        """ValueError naming the field that cannot work with n=`samples` answers of `new` tokens."""
        if self.kind not in get_args(Kind):
            raise ValueError(
                f"source.advantage.kind={self.kind!r} must be one of {list(get_args(Kind))}"
            )
        least = 2 if self.kind == "pkpo_loo1" else 1
        most = samples - 1 if self.kind == "pkpo_loo" else samples
        if not least <= self.k <= most:
            raise ValueError(
                f"source.advantage.k={self.k} must be from {least} to {most} for kind={self.kind} and "
                f"source.samples={samples}"
            )
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"source.advantage.{name}={getattr(self, name)} must be in [0, 1]")
        if self.k > 1 and self.kind in (*GROUPED, "gae", "best_minus_second"):
            raise ValueError(
                f"source.advantage.k={self.k} means nothing to kind={self.kind}: use a pkpo kind"
            )
        if not 0 <= self.overlong <= new:
            raise ValueError(f"source.advantage.overlong={self.overlong} must be from 0 to {new}")
        if self.overlong and self.kind in ("pkpo_wrloo", "passk_analytic"):
            raise ValueError(f"source.advantage.overlong: kind={self.kind} needs rewards of 0 or 1")


def advantages(
    rewards: Float[Array, "p n"], mask: Float[Array, "r t"], config: Advantage
) -> Float[Array, "p n"]:
    """Advantages of n answers to each of p prompts; `mask` of their p * n rows counts tokens.

    Weights of pass@k are multiplied by n: the mean over rows of -advantage * log-probability is then
    minus an estimate of the objective whose gradient the weights are.
    """
    p, n = rewards.shape
    if config.kind in GROUPED:
        group = jnp.repeat(jnp.arange(p), n)
        return rl.group_advantage(
            rewards.reshape(-1), group, p, kind=config.kind, mask=mask
        ).reshape(p, n)  # fmt: skip
    if config.kind == "passk_analytic":
        return rl.passk_analytic_advantage(rewards, config.k)
    if config.kind == "best_minus_second":
        return rl.best_minus_second_advantage(rewards)
    variant = config.kind.partition("_")[2] or "none"
    return n * rl.pkpo_weights(rewards, config.k, variant, binary=variant == "wrloo")


def by_value(rewards, values, mask, config: Advantage) -> tuple[jax.Array, jax.Array]:
    """(advantages, returns) [r, t] of rewards [r], each due at the last token of its row."""
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], 1, keepdims=True)
    at_token = jnp.where(jnp.arange(mask.shape[1]) == last, rewards[:, None], 0)
    adv, returns = rl.gae(at_token, values, mask, config.gamma, config.lam)
    return adv, mask * returns


def shape(
    correct, lengths, mask, values=None, *, config: Advantage, new: int
) -> dict[str, jax.Array]:
    """What rewards decide of a batch; correct and lengths [p, n], mask and values [p * n, t].

    adv [p * n], or for kind=gae adv and returns [p * n, t]; adv_reference, the advantage of pass@1;
    informative: 1 where the group's rewards differ.
    """
    correct = jnp.asarray(correct, jnp.float32)
    rewards = correct
    if config.overlong:
        rewards = rewards + rl.overlong_penalty(lengths, new, config.overlong)
    informative = jnp.any(rewards != rewards[:, :1], -1, keepdims=True) & (rewards == rewards)
    plain = Advantage("rloo")
    if config.kind == "gae":
        adv, returns = by_value(rewards.reshape(-1), values, mask, config)
        own = {"adv": adv, "returns": returns}
    else:
        own = {"adv": advantages(rewards, mask, config).reshape(-1)}
    return own | {
        "adv_reference": advantages(correct, mask, plain).reshape(-1),
        "informative": informative.astype(jnp.float32).reshape(-1),
    }
