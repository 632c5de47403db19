"""The objective of reinforcement learning: every policy loss of `jaxlab.rl`, for the one trainer."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from jaxlab.rl import RLConfig, rl_objective, value_loss

# Columns [rows] of a batch whose means are logged beside the loss; sources have some of them.
LOGGED = ("reward", "length", "informative", "steps", "invalid", "uncertainty", "gate", "anchors")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Policy loss of sampled answers, from a source of rollouts; `loss` says which one.

    PPO has a value network besides, a head of the same model: source.advantage.kind=gae and
    model.value_head=true.
    """

    loss: RLConfig = RLConfig()
    value_coef: Annotated[float, "weight of the value head's loss (PPO); 0: no value head"] = 0.0
    value_clip: Annotated[float, "how far a value may move from the one when sampled"] = 0.2

    def __call__(self, apply, params, batch, key):
        forward = apply
        if self.value_coef:
            inputs = batch["tokens"], batch["positions"], batch["segment_ids"]
            hidden = apply(params, *inputs, method="hidden")
            forward = lambda params, *_: apply(params, hidden, method="logits")  # noqa: E731
        _, metrics = rl_objective(self.loss)(forward, params, batch, key)
        total = metrics["loss"][0]
        if self.value_coef:
            how = {name: getattr(self.loss, name) for name in ("mode", "max_len", "rows")}
            values = apply(params, hidden, method="values")
            old, target, mask = (batch[name] for name in ("values_old", "returns", "mask"))
            found = value_loss(values, old, target, mask, clip=self.value_clip, **how)[1]
            metrics |= {"value_loss": found["loss"], "value_clip_frac": found["value_clip_frac"]}
            # It has the weight of the policy loss, by which the trainer divides the sum.
            total += self.value_coef * found["loss"][0]
        rows = jnp.float32(len(batch["reward"]))
        metrics |= {name: (jnp.sum(batch[name]), rows) for name in LOGGED if name in batch}
        return total, metrics

    def reference(self, apply, params, batch, key):
        """The loss that pass@1 alone would have, (sum, metrics): what `optimizer.protect` guards."""
        plain = RLConfig(kind="pg", mode=self.loss.mode, rows=self.loss.rows,
                         max_len=self.loss.max_len, temperature=self.loss.temperature)  # fmt: skip
        batch = batch | {"adv": batch["adv_reference"]}
        metrics = rl_objective(plain)(apply, params, batch, key)[1]
        return metrics["loss"][0], metrics

    def check(self, model, source) -> None:
        """ValueError when the model or the source cannot serve this loss."""
        from train.rollout.source import Sampled

        if not isinstance(source, Sampled):
            raise ValueError(f"objective policy needs a source of rollouts, got {source}")
        needed = source.vocab_size()
        if not hasattr(model, "vocab") or (needed is not None and model.vocab < needed):
            raise ValueError(f"objective policy needs a language model of {needed} or more tokens")
        if self.loss.temperature != source.temperature:
            raise ValueError(
                f"objective.loss.temperature={self.loss.temperature} must equal "
                f"source.temperature={source.temperature}"
            )
        if not (0 <= self.value_coef < float("inf") and 0 < self.value_clip < float("inf")):
            raise ValueError(
                f"objective.value_coef={self.value_coef} must be at least 0 and "
                f"objective.value_clip={self.value_clip} above 0, both finite"
            )
        head = getattr(model, "value_head", False)
        kind = getattr(source.advantage, "kind", None)
        if not (self.value_coef > 0) == (kind == "gae") == head:
            raise ValueError(
                f"objective.value_coef={self.value_coef}, source.advantage.kind={kind} and "
                f"model.value_head={head}: PPO needs a value_coef above 0, gae and the head; other "
                f"objectives none of them"
            )
        if (self.loss.kl_coef > 0) != source.reference:
            raise ValueError(
                f"objective.loss.kl_coef={self.loss.kl_coef} and source.reference={source.reference}: "
                f"a KL needs its reference, and only a KL does"
            )
        if getattr(getattr(model, "context", None), "layout", "contiguous") != "contiguous":
            raise ValueError("objective policy needs model.context.layout=contiguous")
