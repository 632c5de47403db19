"""One loss for them all: the policy term, KL, entropy and importance correction of a configuration."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.arguments import check_choice, check_shape
from jaxlab.rl.arguments import check_number
from jaxlab.rl.kl import check_kl, kl_tokens
from jaxlab.rl.logits import entropy_from_logits, logprobs_from_logits
from jaxlab.rl.losses import advantage_of, check_policy, policy_terms, ratio
from jaxlab.rl.reduce import (
    Metrics,
    aggregate,
    check_mode,
    mean_of,
    row_mean,
    stop,
    token_metrics,
    valid_tokens,
)  # fmt: skip

POLICY = (
    "kind",
    "ratio_level",
    "eps_low",
    "eps_high",
    "dual_clip",
    "ratio_cap",
    "tau_pos",
    "tau_neg",
    "log_ratio_clamp",
)


@dataclasses.dataclass(frozen=True)
class RLConfig:
    """Everything static of `rl_loss`; ValueError on construction for values out of range.

    Fields up to log_ratio_clamp are the arguments of `policy_loss_tokens`, mode, rows and max_len
    those of `aggregate`, kl and kl_clamp those of `kl_tokens`.
    """

    kind: Annotated[str, "policy loss: pg, ppo, cispo, sapo, gmpo"] = "ppo"
    ratio_level: Annotated[str, "token, sequence, sequence_sum or sequence_token_grad"] = "token"
    eps_low: Annotated[float, "the ratio is clipped below at 1 - eps_low"] = 0.2
    eps_high: Annotated[float, "the ratio is clipped above at 1 + eps_high"] = 0.2
    dual_clip: Annotated[float | None, "bound of the loss where the advantage is negative"] = None
    ratio_cap: Annotated[float | None, "largest ratio in the unclipped branch of ppo"] = None
    tau_pos: Annotated[float, "steepness of sapo where the advantage is positive"] = 1.0
    tau_neg: Annotated[float, "steepness of sapo elsewhere"] = 1.05
    log_ratio_clamp: Annotated[float | None, "bound of the log-ratio that is exponentiated"] = 20.0
    mode: Annotated[str, "how tokens are averaged, as in `aggregate`"] = "token_mean"
    rows: Annotated[str, "rows that count in a mean over rows: nonempty or all"] = "nonempty"
    max_len: Annotated[int | None, "tokens that the scale modes divide by"] = None
    kl_coef: Annotated[float, "weight of the KL to the reference"] = 0.0
    kl: Annotated[str, "its estimator: k1, k2, k3, abs, k1_st, k3_st"] = "k3"
    kl_clamp: Annotated[float | None, "bound of a token's KL"] = None
    kl_times_ratio: Annotated[bool, "the KL token times the ratio, gradient through both"] = False
    entropy_coef: Annotated[float, "weight of the entropy bonus"] = 0.0
    sampler_cap: Annotated[float | None, "truncation of exp(logp_old - logp_sampler)"] = None
    temperature: Annotated[float, "of the logits, in `rl_objective`"] = 1.0

    def __post_init__(self):
        check_policy(**self.policy)
        check_mode(self.mode, self.rows, self.max_len)
        check_kl(self.kl, self.kl_clamp)
        check_number("kl_coef", self.kl_coef, 0)
        check_number("entropy_coef", self.entropy_coef, -math.inf)
        check_number("temperature", self.temperature, 0, above=True)
        check_choice("kl_times_ratio", self.kl_times_ratio, True, False)
        if self.sampler_cap is not None:
            check_number("sampler_cap", self.sampler_cap, 0, above=True)

    @property
    def policy(self) -> dict:
        """The arguments of `policy_loss_tokens`."""
        return {name: getattr(self, name) for name in POLICY}


def rl_loss(
    logp: Float[Array, "N T"],
    batch: dict[str, Array],
    cfg: RLConfig,
    *,
    entropy: Float[Array, "N T"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """(loss, metrics) of logp [N, T], the log-probabilities of the sampled tokens; 0 if all is masked.

    batch: logp_old [N, T], adv [N], [N, 1] or [N, T], mask [N, T]; logp_ref [N, T] if kl_coef;
    logp_sampler [N, T] if sampler_cap; denominator [] replaces that of `aggregate`, for an update in
    microbatches. A token is worth its policy loss, times min(exp(logp_old - logp_sampler), sampler_cap)
    without gradient, plus kl_coef KL, minus entropy_coef `entropy`.

    Metrics are (sum, weight): loss (numerator, denominator), those of `policy_loss_tokens`, kl (0
    without a reference), advantage and, if given, entropy. ValueError for what is missing or does not
    fit. Source: note on RL objectives, sections B and C.
    """
    for name in ("logp_old", "adv", "mask"):
        if name not in batch:
            raise ValueError(f"batch lacks {name!r}; it holds {sorted(batch)}")
    needs = {"logp_ref": ("kl_coef", cfg.kl_coef > 0)}
    needs["logp_sampler"] = ("sampler_cap", cfg.sampler_cap is not None)
    for name, (field, needed) in needs.items():
        if needed and name not in batch:
            raise ValueError(
                f"{field}={getattr(cfg, field)} needs batch[{name!r}], which is absent"
            )
    if cfg.entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef={cfg.entropy_coef} needs entropy=, which is None")

    optional = {name: batch[name] for name in ("logp_ref", "logp_sampler") if name in batch}
    optional |= {} if entropy is None else {"entropy": entropy}
    arrays = {"logp": logp, "logp_old": batch["logp_old"], **optional}
    kept, *values = valid_tokens(batch["mask"], **arrays)
    a = dict(zip(arrays, values, strict=True))
    adv = advantage_of(batch["adv"], kept)
    loss, values = policy_terms(a["logp"], a["logp_old"], adv, kept, **cfg.policy)
    if cfg.sampler_cap is not None:
        mismatch = jnp.exp(stop(a["logp_old"] - a["logp_sampler"]))
        loss *= jnp.minimum(mismatch, cfg.sampler_cap)
    kl = jnp.zeros((len(loss), 1), loss.dtype)
    if "logp_ref" in a:
        kl = kl_tokens(a["logp"], a["logp_ref"], cfg.kl, cfg.kl_clamp)
        if cfg.kl_times_ratio:
            kl *= ratio(a["logp"], a["logp_old"], kept, cfg.ratio_level, cfg.log_ratio_clamp)
    loss += cfg.kl_coef * kl if cfg.kl_coef else 0
    loss -= cfg.entropy_coef * a["entropy"] if cfg.entropy_coef else 0
    numerator, denominator = aggregate(loss, kept, cfg.mode, max_len=cfg.max_len, rows=cfg.rows)
    if "denominator" in batch:
        check_shape("denominator", batch["denominator"], ())
        denominator = stop(jnp.asarray(batch["denominator"], denominator.dtype))
    values |= {"kl": kl if kl.shape[1] == 1 else row_mean(kl, kept), "advantage": adv}
    values |= {"entropy": a["entropy"]} if entropy is not None else {}
    metrics = token_metrics(kept, loss.dtype, **values) | {"loss": (numerator, denominator)}
    return mean_of(numerator, denominator), metrics


def rl_objective(cfg: RLConfig) -> Callable:
    """objective(apply, params, batch, key) -> (loss, metrics): `rl_loss` of a model's logits.

    `apply(params, tokens, positions, segment_ids) -> logits [N, L, V]` gets these from the batch,
    without those at the end that it lacks; the rest of the batch is that of `rl_loss`. The tokens that
    are scored, [N, T] as the mask, are batch["targets"], aligned with the logits; without targets, the
    last T < L of tokens, each by the logits before it. The loss is the mean; metrics["loss"] holds it as
    (sum, weight), for a trainer that sums over microbatches. `key` is not used.
    """

    def objective(apply, params, batch, key):
        inputs = [batch.get(name) for name in ("tokens", "positions", "segment_ids")]
        while inputs[-1] is None:
            inputs.pop()
        logits = apply(params, *inputs)
        if "targets" in batch:
            targets = jnp.maximum(batch["targets"], 0)
        else:
            length, t = inputs[0].shape[1], jnp.shape(batch["mask"])[1]
            if t >= length:
                raise ValueError(
                    f"mask has {t} tokens; without targets at most {length - 1} of {length}"
                )
            logits, targets = logits[:, length - 1 - t : length - 1], inputs[0][:, length - t :]
        logp = logprobs_from_logits(logits, targets, temperature=cfg.temperature)
        entropy = None
        if cfg.entropy_coef:
            entropy = entropy_from_logits(logits, temperature=cfg.temperature)
        return rl_loss(logp, batch, cfg, entropy=entropy)

    return objective
