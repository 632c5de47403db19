"""Choosing the next token: filters of logits as pure functions, the draw, and what it is worth.

A filter maps logits to logits of the same shape, -inf for what is excluded; log_softmax of the
result is the distribution that is drawn from. Tokens of equal logits share their fate, so that no
filter depends on the order of the vocabulary. Values may be numbers or arrays that broadcast
against the leading axes. Sources: top-k, Fan et al., 2018, section 5.4; top-p, Holtzman et al.,
2020, section 3.1; min-p, Nguyen et al., 2024, section 3.
"""

import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Sampling(NamedTuple):
    """How tokens are drawn; None leaves a filter out. `top_k` is static, the others may be arrays."""

    temperature: float | Float[Array, "#*b"] = 1.0
    top_k: int | None = None
    top_p: float | Float[Array, "#*b"] | None = None
    min_p: float | Float[Array, "#*b"] | None = None

    def check(self) -> "Sampling":
        """Itself; ValueError for static values out of range, naming them."""
        _check("temperature", self.temperature, "at least 0", lambda x: 0 <= x < float("inf"))
        whole = isinstance(self.top_k, numbers.Integral) and not isinstance(self.top_k, bool)
        if self.top_k is not None and not (whole and self.top_k >= 1):
            raise ValueError(f"top_k={self.top_k!r} must be an integer of at least 1, or None")
        _check("top_p", self.top_p, "above 0 and at most 1, or None", lambda x: 0 < x <= 1)
        _check("min_p", self.min_p, "from 0 to 1, or None", lambda x: 0 <= x <= 1)
        return self

    @property
    def greedy(self) -> bool:
        """Whether it is known before computing that the temperature is 0."""
        return isinstance(self.temperature, int | float) and self.temperature == 0


PLAIN = Sampling()  # the model's own distribution
GREEDY = Sampling(temperature=0.0)


def _check(name: str, value, legal: str, test) -> None:
    if isinstance(value, numbers.Real) and not test(value):
        raise ValueError(f"{name}={value} must be {legal}")


def keep_top_k(logits: Float[Array, "*b v"], k: int) -> Float[Array, "*b v"]:
    """Keeps the logits that are at least the k-th largest; all when k exceeds the vocabulary."""
    if k >= logits.shape[-1]:
        return logits
    least = jax.lax.top_k(logits, k)[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(
    logits: Float[Array, "*b v"], p: float | Float[Array, "#*b"]
) -> Float[Array, "*b v"]:
    """Keeps a token iff the tokens more probable than it have a probability below p together.

    That is the smallest set of the most probable tokens whose probability reaches p, with every
    token that ties with its last one. The most probable token always stays.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    above = jnp.cumsum(jax.nn.softmax(ordered, -1), -1)
    above = jnp.pad(above[..., :-1], [(0, 0)] * (logits.ndim - 1) + [(1, 0)])
    p = jnp.asarray(p)[..., None]
    # Sums of float32 may reach 1 before the last token.
    inside = ((above < p) | (p >= 1)).at[..., 0].set(True)
    least = jnp.min(jnp.where(inside, ordered, jnp.inf), -1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_min_p(
    logits: Float[Array, "*b v"], p: float | Float[Array, "#*b"]
) -> Float[Array, "*b v"]:
    """Keeps the tokens at least p times as probable as the most probable one."""
    floor = jnp.max(logits, -1, keepdims=True) + jnp.log(jnp.asarray(p, logits.dtype))[..., None]
    return jnp.where(logits >= floor, logits, -jnp.inf)


def keep_best(logits: Float[Array, "*b v"]) -> Float[Array, "*b v"]:
    """Keeps the largest logit, the first of several that tie: the limit of temperature 0."""
    best = jnp.argmax(logits, -1)[..., None]
    return jnp.where(jnp.arange(logits.shape[-1]) == best, logits, -jnp.inf)


def sampling_logits(logits: Float[Array, "*b v"], sampling: Sampling) -> Float[Array, "*b v"]:
    """Logits of the distribution that is drawn from: temperature, then top-k, top-p and min-p.

    float32 (float64 if the logits are). Temperature 0 is `keep_best`, whatever the filters.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    if sampling.greedy:
        return keep_best(logits)
    temperature = jnp.asarray(sampling.temperature, logits.dtype)[..., None]
    # Below 1e-30 quotients overflow, and the draw is that of the largest logit long before.
    warm = logits / jnp.where(temperature > 0, jnp.maximum(temperature, 1e-30), 1)
    if sampling.top_k is not None:
        warm = keep_top_k(warm, sampling.top_k)
    if sampling.top_p is not None:
        warm = keep_top_p(warm, sampling.top_p)
    if sampling.min_p is not None:
        warm = keep_min_p(warm, sampling.min_p)
    if isinstance(sampling.temperature, int | float):
        return warm
    return jnp.where(temperature > 0, warm, keep_best(logits))


class Drawn(NamedTuple):
    """Tokens with natural logarithms of their probability, float32 (float64 if the logits are)."""

    tokens: Int[Array, "b"]
    logprobs: Float[Array, "b"]  # under the model: temperature 1, no filter
    entropies: Float[Array, "b"]  # of the model's distribution, nats
    sampling_logprobs: Float[Array, "b"]  # under the distribution that was drawn from


def draw(keys: Key[Array, "b"], logits: Float[Array, "b v"], sampling: Sampling) -> Drawn:
    """One token for each row, row i from key i alone, so that rows do not depend on each other."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), -1)
    filtered = sampling_logits(logits, sampling)
    if sampling.greedy:
        tokens = jnp.argmax(filtered, -1)
    else:
        tokens = jax.vmap(jax.random.categorical)(keys, filtered)
    pick = lambda x: jnp.take_along_axis(x, tokens[:, None], -1)[:, 0]  # noqa: E731
    return Drawn(
        tokens.astype(jnp.int32),
        pick(logprobs),
        entropy(logprobs),
        pick(filtered) - jax.nn.logsumexp(filtered, -1),
    )


def entropy(logprobs: Float[Array, "*b v"]) -> Float[Array, "*b"]:
    """-sum p log p in nats; -inf entries, probability 0, count nothing."""
    some = jnp.where(logprobs > -jnp.inf, logprobs, 0)
    return -jnp.sum(jnp.exp(logprobs) * some, -1)
