"""Objectives: one function `(apply, params, batch, key) -> (loss, metrics)` each.

`loss` is a float32 sum, what is minimised; `metrics` maps names to (sum, weight) pairs. The weight of
`metrics["loss"]` is what the trainer divides the gradient by, after summing over every microbatch. A
microbatch gets a key of its own, so noise depends on `accumulate`, but never on the mesh. In training,
and only there, `batch["step"]` is the number of steps done: for curricula, and for dropout.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.tiled import tiled_cross_entropy
from sharding.tokens import over_tokens

Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
Batch = dict[str, jax.Array]


class Objective(Protocol):
    """What the trainer knows of an objective: it can be called, and checked against a run."""

    def __call__(
        self, apply: Callable, params, batch: Batch, key: jax.Array
    ) -> tuple[Float[Array, ""], Metrics]:
        """The summed loss of a microbatch and its metrics."""
        ...

    def check(self, model, source) -> None:
        """ValueError when the model or the source cannot serve this objective."""
        ...


@dataclasses.dataclass(frozen=True)
class NextToken:
    """Cross-entropy of the next token, in nats per token that has a target. Dropout is on in training."""

    tiles: Annotated[int, "sequence tiles of the loss; more tiles, less memory for logits"] = 1
    z_loss: Annotated[float, "weight of logsumexp^2, keeps logits from drifting"] = 0.0

    def __call__(self, apply, params, batch, key):
        noise = {"rngs": {"dropout": key}} if "step" in batch else {}
        hidden = apply(params, *inputs_of(batch), method="hidden", **noise)
        head = apply(params, method="unembedding")

        def sums(tokens, head):
            return tiled_cross_entropy(
                tokens[0], head, tokens[1], n_tiles=self.tiles, z_loss=self.z_loss, parts=True,
                consecutive=True,
            )  # fmt: skip

        tokens = hidden, batch["targets"]
        if self.tiles == 1:
            loss, count, nll = sums(tokens, head)
        else:
            loss, count, nll = over_tokens(sums, tokens, head, pieces=self.tiles, total=True)
        # What is reported is in nats, whatever is added to what is minimised.
        metrics = {"loss": (nll, count)}
        return loss, metrics | ({"z_loss": (loss - nll, count)} if self.z_loss else {})

    def check(self, model, source) -> None:
        if not 0 <= self.z_loss < float("inf"):
            raise ValueError(f"objective.z_loss={self.z_loss} must be finite and >= 0")
        if not hasattr(model, "vocab"):
            raise ValueError(f"objective next-token needs a language model, got {model}")
        needed = source.vocab_size()
        if needed is not None and model.vocab < needed:
            raise ValueError(
                f"model.vocab={model.vocab} does not match source.tokenizer={source.tokenizer!r}, "
                f"which has {needed} ids: use model.vocab={needed} or more"
            )
        if self.tiles < 1 or source.seq_len % self.tiles:
            legal = [n for n in range(1, source.seq_len + 1) if source.seq_len % n == 0]
            raise ValueError(
                f"objective.tiles={self.tiles} must divide source.seq_len={source.seq_len}: "
                f"use one of {legal}"
            )


@dataclasses.dataclass(frozen=True)
class Classify:
    """Cross-entropy of the class of an image or a row, in nats, and the share of classes got right.

    Dropout is on in training. Logits [members, b, classes] of an ensemble count as the mean of the
    members' losses, but the class got right is that of their mean probability.
    """

    def __call__(self, apply, params, batch, key):
        labels = batch["labels"]
        training = {"deterministic": False, "rngs": {"dropout": key}} if "step" in batch else {}
        logits = apply(params, *inputs_of(batch), **training)
        logs = jax.nn.log_softmax(logits.astype(jnp.float32)).reshape(-1, *logits.shape[-2:])
        loss = -jnp.sum(jnp.take_along_axis(logs, labels[None, :, None], 2)) / len(logs)
        mean = jnp.mean(jnp.exp(logs), 0)
        right = jnp.sum(jnp.argmax(mean, -1) == labels, dtype=jnp.float32)
        count = jnp.float32(len(labels))
        return loss, {"loss": (loss, count), "accuracy": (right, count)}

    def check(self, model, source) -> None:
        for which, config in (("model", model), ("source", source)):
            if getattr(config, "classes", None) is None:
                raise ValueError(f"objective classify needs labels: {which} has no classes")
        # A model says the side and channels of its images or the values of a row.
        images = getattr(model, "image", None) is not None
        for name in ("classes", "image", "channels") if images else ("classes", "features"):
            ours, theirs = (
                getattr(x, name, 1 if name == "channels" else None) for x in (model, source)
            )
            if theirs is None:
                raise ValueError(f"objective classify: model has {name}, but source has no {name}")
            if ours != theirs:
                raise ValueError(f"model.{name}={ours} must equal source.{name}={theirs}")


def inputs_of(batch: Mapping[str, Any]) -> tuple[jax.Array, ...]:
    """What a model is applied to: images, features, or tokens with positions and segments."""
    if "tokens" in batch:
        return batch["tokens"], batch["positions"], batch["segment_ids"]
    return (batch["images" if "images" in batch else "features"],)
