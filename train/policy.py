"""The objective of reinforcement learning: every policy loss of `jaxlab.rl`, for the one trainer."""

import dataclasses

import jax.numpy as jnp

from jaxlab.rl import RLConfig, rl_objective

# Columns [rows] of a batch whose means are logged beside the loss; sources have some of them.
LOGGED = ("reward", "length", "informative", "steps", "invalid", "uncertainty", "gate", "anchors")


@dataclasses.dataclass(frozen=True)
class Policy:
    """Policy loss of sampled answers, from a source of rollouts; `loss` says which one."""

    loss: RLConfig = RLConfig()

    def __call__(self, apply, params, batch, key):
        _, metrics = rl_objective(self.loss)(apply, params, batch, key)
        rows = jnp.float32(len(batch["reward"]))
        metrics |= {name: (jnp.sum(batch[name]), rows) for name in LOGGED if name in batch}
        return metrics["loss"][0], metrics

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
        if (self.loss.kl_coef > 0) != source.reference:
            raise ValueError(
                f"objective.loss.kl_coef={self.loss.kl_coef} and source.reference={source.reference}: "
                f"a KL needs its reference, and only a KL does"
            )
        if getattr(getattr(model, "context", None), "layout", "contiguous") != "contiguous":
            raise ValueError("objective policy needs model.context.layout=contiguous")
