"""Uncertainty of next-token distributions by token, without [samples, tokens, vocabulary] in memory.

Logits of all samples exist for one tile of the sequence at a time: with 100,000 tokens to choose from,
those of a whole row would not fit. Source: C_k of arXiv 2602.21160, applied to a vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab.uncertainty.checks import (
    Classes,
    as_array,
    check_count,
    check_values,
    class_indices,
    real,
)
from jaxlab.uncertainty.safe import center, jensen_gap, ratio, xlogx


class TokenUncertainty(NamedTuple):
    """Of the next token at every place; the last axis of c, exact and mean is `classes` in their order."""

    entropy: Float[Array, "b t"]
    mi: Float[Array, "b t"]  # sum of D over the vocabulary
    c_sum: Float[Array, "b t"]
    maxprob: Float[Array, "b t"]  # 1 - the largest mean probability
    nll: Float[Array, "b t"]  # of the target under the mean, 0 where there is none
    predicted: Int[Array, "b t"]  # the token of the largest mean probability
    dominant: Int[Array, "b t"]  # that of the largest C
    c: Float[Array, "b t k"]
    exact: Float[Array, "b t k"]  # D
    mean: Float[Array, "b t k"]


def token_uncertainty(
    hidden: Float[Array, "s b t d"],
    head: Float[Array, "d v"],
    targets: Int[Array, "b t"],
    classes: Classes = (),
    *,
    n_tiles: int = 1,
) -> TokenUncertainty:
    """Uncertainty of softmax(hidden @ head) over samples, at every place of [b, t], in nats.

    `hidden` [S, b, t, d] are the last activations of S samples of a language model, `head` [d, V] its
    output matrix, or [S, d, V] where samples differ in it too; targets are tokens, -1 for none. `classes`
    are the tokens of which C and D are given. At least float32. Memory grows with S t / n_tiles V.

    ValueError for shapes that do not fit, fewer than 2 samples or tokens, activations that are not
    finite, classes or targets outside the vocabulary, and n_tiles that does not divide t.
    """
    hidden, head = real("hidden", hidden), real("head", head)
    if hidden.ndim != 4 or hidden.shape[0] < 2:
        raise ValueError(f"hidden={hidden.shape} must be [samples, b, t, d], samples at least 2")
    s, b, t, d = hidden.shape
    if head.ndim not in (2, 3) or head.shape[:-1] not in ((d,), (s, d)) or head.shape[-1] < 2:
        raise ValueError(f"head={head.shape} must be [{d}, v] or [{s}, {d}, v], v at least 2")
    targets = as_array("targets", targets)
    if targets.shape != (b, t) or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(f"targets={targets.shape} {targets.dtype} must be integers ({b}, {t})")
    vocab = head.shape[-1]
    check_values(jnp.isfinite(hidden), "hidden must be finite")
    check_values(targets < vocab, f"targets must be below the vocabulary {vocab}", targets)
    picked = () if classes == () else class_indices("classes", classes, vocab)
    n_tiles = check_count("n_tiles", n_tiles, 1, t)
    if t % n_tiles:
        raise ValueError(f"n_tiles={n_tiles} must divide the {t} tokens of a row")
    pick = jnp.asarray(picked, jnp.int32)

    def tile(part):
        h, target = part
        einsum = "sbtd,dv->sbtv" if head.ndim == 2 else "sbtd,sdv->sbtv"
        centered = center(jax.nn.softmax(jnp.einsum(einsum, h, head), -1))
        _, mean, dev = centered
        c = jnp.mean(dev * ratio(dev, mean), 0) / 2
        exact = jensen_gap(*centered)
        chosen = jnp.take_along_axis(mean, jnp.maximum(target, 0)[..., None], -1)[..., 0]
        tiny = jnp.finfo(mean.dtype).tiny
        return TokenUncertainty(
            -jnp.sum(xlogx(mean), -1),
            jnp.sum(exact, -1),
            jnp.sum(c, -1),
            1 - jnp.max(mean, -1),
            jnp.where(target >= 0, -jnp.log(jnp.maximum(chosen, tiny)), 0),
            jnp.argmax(mean, -1).astype(jnp.int32),
            jnp.argmax(c, -1).astype(jnp.int32),
            *(x[..., pick] for x in (c, exact, mean)),
        )

    # Tile i holds tokens i, i + n, i + 2n...: a sequence sharded over devices stays where it is.
    tiles = (
        rearrange(hidden, "s b (t n) d -> n s b t d", n=n_tiles),
        rearrange(targets, "b (t n) -> n b t", n=n_tiles),
    )
    found = jax.lax.map(tile, tiles)
    return jax.tree.map(lambda x: rearrange(x, "n b t ... -> b (t n) ..."), found)
