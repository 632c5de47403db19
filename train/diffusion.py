"""Objectives of discrete diffusion: the NELBO of masked and of uniform noise, and its curricula.

Source: MDLM 2406.07524, UDLM 2412.10193, Duo 2506.10892, Duo++ 2602.21185.
"""

import dataclasses
import math
import warnings
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jaxlab.diffusion.curriculum import MOST_TAU, dense_relaxation, log10_tau, sparse_relaxation
from jaxlab.diffusion.forward import q_sample
from jaxlab.diffusion.losses import masked_nelbo, uniform_nelbo
from jaxlab.diffusion.operator import gamma_of_alpha, make_operator
from jaxlab.diffusion.schedules import cosine, log_linear, sample_times

SCHEDULES = {"log-linear": log_linear, "cosine": cosine}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window:
    """Levels of Gaussian noise by what their argmax keeps, so that they suit a vocabulary of any size."""

    alpha_max: Annotated[float, "share of tokens that are kept at time 0"]
    alpha_min: Annotated[float, "share of tokens that are kept at time 1"]

    def gammas(self, vocab: int) -> tuple[float, float]:
        """log(noise/signal) at times 0 and 1."""
        return gamma_of_alpha(self.alpha_max, vocab), gamma_of_alpha(self.alpha_min, vocab)

    def check_window(self, name: str) -> None:
        """ValueError that names the fields of `name` unless one can be solved for, and lies below."""
        if not 1e-6 <= self.alpha_min < self.alpha_max <= 1 - 1e-6:
            raise ValueError(
                f"{name}.alpha_min={self.alpha_min} must be below {name}.alpha_max={self.alpha_max}, "
                f"both from 1e-6 to 1 - 1e-6"
            )


@dataclasses.dataclass(frozen=True)
class Curriculum(Window):
    """The first steps see softened tokens: Gaussian noise through softmax(w / tau) (Duo, section 4).

    Temperature 10^log10_start up to `start`, from there log-linear to 10^log10_end, plain from `end` on.
    The shares are those of the papers' windows: gamma from -3.5 to -1.75 with 30,522 tokens.
    """

    kind: Annotated[
        Literal["sparse", "dense"], "sparse: the k largest (Duo++); dense: all (Duo)"
    ] = "sparse"
    k: Annotated[int, "tokens that are mixed, where sparse"] = 2
    end: Annotated[int, "the first step without it"] = 500
    start: Annotated[int, "the step from which the temperature moves"] = 0
    log10_start: Annotated[float, "log10 of the temperature before"] = -3.0
    log10_end: Annotated[float, "log10 of the temperature at the end"] = -3.0
    _: dataclasses.KW_ONLY
    alpha_max: Annotated[float, "share of tokens that are kept at time 0"] = 0.945
    alpha_min: Annotated[float, "share of tokens that are kept at time 1"] = 0.049


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Negative evidence lower bound of discrete diffusion, nats per token, one time a sequence.

    With prior 'masked' the last id of the model's vocabulary is the mask. Times are stratified over the
    whole batch, however it is cut. A model with classes is told the labels, in training most of them:
    the rest teach it what guidance needs. Evaluation is without curriculum and dropout.
    """

    prior: Annotated[Literal["masked", "uniform"], "what tokens turn into"] = "uniform"
    curriculum: Annotated[Curriculum | None, "softened tokens at first; none: without"] = None
    schedule: Annotated[Literal["log-linear", "cosine"], "of alpha over time"] = "log-linear"
    classes: Annotated[int | None, "classes that the model is told; none: none"] = None
    hide: Annotated[float, "share of labels that are not told, in training"] = 0.1

    def prepare(self, batch, key):
        """The times of all rows."""
        return {"time": sample_times(jax.random.split(key, 3)[0], len(batch["tokens"]))}

    def __call__(self, apply, params, batch, key):
        x0, step = batch["tokens"], batch.get("step")
        where = {name: batch[name] for name in ("positions", "segment_ids") if name in batch}
        _, noise_key, dropout_key = jax.random.split(key, 3)
        if self.classes is not None:
            hidden = jax.random.bernoulli(jax.random.fold_in(key, 3), self.hide, (len(x0),))
            hidden &= step is not None
            where["labels"] = jnp.where(hidden, self.classes, batch["labels"])
        t = batch["time"] if "time" in batch else self.prepare(batch, key)["time"]

        def denoise(inputs, alpha, weights=None):
            sigma = -jnp.log(alpha[:, 0]) * (self.prior == "uniform")
            training = step is not None
            rngs = {"dropout": dropout_key} if training else None
            how = where | {"weights": weights, "deterministic": not training, "rngs": rngs}
            return apply(params, inputs, sigma, **how)

        vocab = jax.eval_shape(lambda: denoise(x0, jnp.ones((len(x0), 1)))).shape[-1]

        def plain():
            level = jax.tree.map(lambda a: a[:, None], SCHEDULES[self.schedule](t))
            if self.prior == "masked":
                z = q_sample(noise_key, x0, level, "masked", mask_id=vocab - 1)
                return masked_nelbo(denoise(z, level.alpha), z, x0, level, vocab - 1)
            z = q_sample(noise_key, x0, level, "uniform", K=vocab)
            return uniform_nelbo(denoise(z, level.alpha), z, x0, level)

        c = self.curriculum
        if c is None or step is None:
            loss = plain()
        else:

            def relaxed():
                low, high = c.gammas(vocab)
                gamma = (low + t * (high - low))[:, None]
                level = make_operator(vocab, low, high)(gamma)
                signal, noise = (jnp.sqrt(jax.nn.sigmoid(s * gamma)) for s in (-1, 1))
                tau = 10 ** log10_tau(step, c.log10_start, c.log10_end, c.start, c.end)
                if c.kind == "dense":
                    x, z = dense_relaxation(noise_key, x0, signal, noise, tau, vocab)
                    x, weights = jnp.log(x), None
                else:
                    x, weights, z = sparse_relaxation(noise_key, x0, signal, noise, tau, c.k, vocab)
                return uniform_nelbo(denoise(x, level.alpha, weights), z, x0, level)

            loss = jax.lax.cond(step < c.end, relaxed, plain)
        # Images fill their rows.
        valid = (batch.get("segment_ids", jnp.ones_like(x0)) > 0).astype(jnp.float32)
        total, count = jnp.sum(loss * valid), jnp.sum(valid)
        return total, {"loss": (total, count)}

    def check(self, model, source) -> None:
        """ValueError when the model, the source or the curriculum cannot serve."""
        c = self.curriculum
        if c is not None and self.prior != "uniform":
            raise ValueError(f"objective.curriculum needs prior='uniform', got {self.prior!r}")
        needed = source.vocab_size() if hasattr(source, "vocab_size") else None
        if not hasattr(model, "takes"):
            raise ValueError(
                f"objective diffusion needs a denoiser, DiTConfig or UNetConfig, got {model}"
            )
        spare = int(self.prior == "masked")
        if needed is not None and model.vocab < needed + spare:
            mask = " and a mask" if spare else ""
            whose = f"source.tokenizer={getattr(source, 'tokenizer', type(source).__name__)!r}"
            raise ValueError(
                f"model.vocab={model.vocab} does not hold the {needed} ids of {whose}{mask}: use "
                f"model.vocab={needed + spare} or more"
            )
        told, there = (getattr(c, "classes", None) for c in (model, source))
        if told != self.classes or (told is not None and told != there):
            raise ValueError(
                f"objective.classes={self.classes} must equal model.classes={told}, and where it is "
                f"not none source.classes={there}"
            )
        if not 0 <= self.hide < 1:
            raise ValueError(f"objective.hide={self.hide} must be in [0, 1)")
        if getattr(model, "side", None) != getattr(source, "side", None):
            raise ValueError(
                f"model.side={getattr(model, 'side', None)} must equal "
                f"source.side={getattr(source, 'side', None)}: images need UNetConfig, text DiTConfig"
            )
        if c is None:
            return
        if model.takes != "mixtures":
            raise ValueError(
                f"objective.curriculum must be none: a {type(model).__name__} takes no mixed tokens"
            )
        if not 2 <= c.k < model.vocab:
            raise ValueError(f"objective.curriculum.k={c.k} must be in [2, {model.vocab - 1}]")
        if not 0 <= c.start <= c.end:
            raise ValueError(f"objective.curriculum.start={c.start} must be in [0, end={c.end}]")
        c.check_window("objective.curriculum")
        most = max(c.log10_start, c.log10_end)
        if c.kind == "sparse" and most > math.log10(MOST_TAU):
            warnings.warn(
                f"objective.curriculum: at temperature 10^{most}, above {MOST_TAU}, the sparse form drops "
                f"most of the mass; use kind=dense",
                stacklevel=2,
            )


def mdlm() -> Diffusion:
    """Masked diffusion (MDLM)."""
    return Diffusion("masked")


def udlm() -> Diffusion:
    """Uniform diffusion (UDLM)."""
    return Diffusion("uniform")


def duo(end: int) -> Diffusion:
    """Uniform diffusion whose steps before `end` see soft tokens (Duo)."""
    return Diffusion("uniform", Curriculum("dense", end=end))


def duo_pp(end: int, k: int = 2) -> Diffusion:
    """Duo whose soft tokens mix the `k` largest (Duo++)."""
    return Diffusion("uniform", Curriculum("sparse", k, end))
