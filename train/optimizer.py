"""Optax optimisers from configuration: adamw, muon, sgd; schedules, clipping, decay masks."""

import dataclasses
import math
import re
from typing import Annotated, Literal

import jax
import optax

from jaxlab.paths import flatten, unflatten
from train.optim import protect_average

Schedule = Literal["cosine", "linear", "constant", "wsd"]


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What turns gradients into updates."""

    name: Annotated[Literal["adamw", "muon", "sgd"], "update rule"] = "adamw"
    lr: Annotated[float, "peak learning rate"] = 3e-3
    schedule: Annotated[Schedule, "shape after the warm-up; wsd: constant, then linear"] = "cosine"
    warmup: Annotated[int, "steps of linear warm-up"] = 20
    final: Annotated[float, "last learning rate as a fraction of lr"] = 0.1
    decay: Annotated[float, "fraction of the steps that wsd spends decaying"] = 0.2
    weight_decay: Annotated[float, "decoupled weight decay of matrices (norms have none)"] = 0.1
    b1: Annotated[float, "first-moment decay; momentum of muon and sgd"] = 0.9
    b2: Annotated[float, "second-moment decay"] = 0.95
    clip: Annotated[float, "clip the gradient to this global norm; 0: do not"] = 1.0
    ema: Annotated[float, "decay of an averaged copy of the parameters; 0: none"] = 0.0
    protect: Annotated[
        float, "decay of an average of reference gradients, against which no step goes; 0: none"
    ] = 0.0
    freeze: Annotated[str, "regular expression of parameter paths that stay as they are"] = ""

    def check(self) -> None:
        """ValueError for values out of range."""
        for name in ("lr", "weight_decay", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be finite and >= 0")
        for name in ("b1", "b2", "ema", "protect"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1)")
        for name in ("final", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must be in [0, 1]")
        if self.warmup < 0:
            raise ValueError(f"optimizer.warmup={self.warmup} must be at least 0")
        try:
            re.compile(self.freeze)
        except re.error as error:
            raise ValueError(f"optimizer.freeze={self.freeze!r}: {error}") from error


def split(tree: dict, freeze: str) -> tuple[dict, dict]:
    """(what trains, what is frozen) of a nested dict: frozen is what the regex `freeze` finds in a path.

    ValueError when it finds nothing or leaves nothing; "" freezes nothing.
    """
    if not freeze:
        return tree, {}
    flat = flatten(tree)
    parts = [{}, {}]
    for path, leaf in flat.items():
        parts[re.search(freeze, path) is not None][path] = leaf
    if not all(parts):
        what = "no parameter" if parts[0] else "every parameter"
        raise ValueError(f"optimizer.freeze={freeze!r} freezes {what} of {sorted(flat)}")
    return unflatten(parts[0]), unflatten(parts[1])


def join(train: dict, frozen: dict) -> dict:
    """Inverse of `split`."""
    return unflatten(flatten(train) | flatten(frozen))


def learning_rate(config: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step."""
    end, rest = config.lr * config.final, max(steps - config.warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(config.lr, rest, config.final)
    elif config.schedule == "linear":
        after = optax.linear_schedule(config.lr, end, rest)
    elif config.schedule == "wsd":
        tail = max(int(rest * config.decay), 1)
        flat = optax.constant_schedule(config.lr)
        fall = optax.linear_schedule(config.lr, end, tail)
        after = optax.join_schedules([flat, fall], [rest - tail])
    else:
        after = optax.constant_schedule(config.lr)
    # The first step already moves: warm-up runs over (1..warmup)/warmup.
    rise = lambda step: config.lr * (step + 1) / max(config.warmup, 1)  # noqa: E731
    return optax.join_schedules([rise, after], [config.warmup])


def make_optimizer(config: Optimizer, steps: int, axes) -> optax.GradientTransformation:
    """The optax transformation of the parameters that train; `axes` are their logical axis names."""
    lr = learning_rate(config, steps)
    is_axes = lambda x: isinstance(x, tuple)  # noqa: E731
    decays = jax.tree.map(lambda a: "norm" not in a, axes, is_leaf=is_axes)
    if config.name == "adamw":
        rule = optax.adamw(lr, config.b1, config.b2, weight_decay=config.weight_decay, mask=decays)
    elif config.name == "muon":
        dimensions = jax.tree.map(_muon_dimensions, axes, is_leaf=is_axes)
        rule = optax.contrib.muon(
            lr,
            beta=config.b1,
            weight_decay=config.weight_decay,
            weight_decay_mask=decays,
            adam_b1=config.b1,
            adam_b2=config.b2,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=dimensions,
            consistent_rms=0.2,
        )
    else:
        rule = optax.chain(
            optax.trace(config.b1),
            optax.add_decayed_weights(config.weight_decay, decays),
            optax.scale_by_learning_rate(lr),
        )
    clip = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    whole = optax.chain(*clip, rule)
    return protect_average(whole, config.protect) if config.protect else whole


def _muon_dimensions(axes: tuple[str | None, ...]):
    """How muon sees a parameter as a stack of matrices; None leaves it to adam.

    Embeddings, heads and norms go to adam (Jordan et al., 2024); elsewhere the residual-stream axis
    is one side of the matrix and all other axes but layers and members are the other.
    """
    sides = [i for i, name in enumerate(axes) if name not in ("layers", "members")]
    if "embed" not in axes or "vocab" in axes or len(sides) < 2:
        return None
    inner = axes.index("embed")
    rest = tuple(i for i in sides if i != inner)
    first = inner < rest[0]
    return optax.contrib.MuonDimensionNumbers(
        reduction_axis=(inner,) if first else rest, output_axis=rest if first else (inner,)
    )
