"""Sequences of a hidden Markov chain, whose denoiser is known exactly: sampler error without model error.

Source: Rabiner, 1989 (forward-backward); note on Psi-samplers, sections 3.1 and 16.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlab.arguments import wide
from jaxlab.diffusion.arguments import check_prior, tokens


class HMM(NamedTuple):
    """Laws of the first hidden state, of the next given a state, and of the token given a state."""

    initial: Float[Array, "h"]
    transition: Float[Array, "h h"]
    emission: Float[Array, "h v"]


def check_hmm(hmm: HMM) -> None:
    """ValueError for shapes that do not fit, and for host values that are no probabilities."""
    h, v = np.shape(hmm.emission) if np.ndim(hmm.emission) == 2 else (0, 0)
    shapes = {"initial": (h,), "transition": (h, h), "emission": (h, v)}
    for name, shape in shapes.items():
        value = getattr(hmm, name)
        if np.shape(value) != shape or not h or v < 2:
            raise ValueError(
                f"{name} has shape {np.shape(value)}; expected initial [h], transition [h, h], "
                "emission [h, v] with v at least 2"
            )
        if isinstance(value, np.ndarray):
            off = np.abs(value.sum(-1) - 1).max()
            if value.min() < 0 or not off < 1e-5:
                raise ValueError(f"{name} must be laws: rows >= 0 that sum to 1, off by {off}")


def hmm_sample(key: Key[Array, ""], hmm: HMM, shape: tuple[int, int]) -> Int[Array, "b t"]:
    """Tokens int32 of `shape` (batch, length). ValueError as `check_hmm`."""
    check_hmm(hmm)
    batch, length = shape
    log = jax.tree.map(lambda p: jnp.log(jnp.asarray(p)), hmm)
    first, rest = jax.random.split(key)
    state = jax.random.categorical(first, log.initial, shape=(batch,))

    def step(state, key):
        emit, move = jax.random.split(key)
        token = jax.random.categorical(emit, log.emission[state])
        return jax.random.categorical(move, log.transition[state]), token

    return jax.lax.scan(step, state, jax.random.split(rest, length))[1].T.astype(jnp.int32)


def hmm_log_prob(hmm: HMM, x: Int[Array, "b t"]) -> Float[Array, "b"]:
    """log p(x) of whole rows, in nats. ValueError as `check_hmm`, TypeError unless integers."""
    check_hmm(hmm)
    initial, transition, emission = (wide(p) for p in hmm)

    def step(carry, token):
        before, total = carry
        joint = before * emission[:, token].T
        evidence = jnp.sum(joint, -1)
        return (joint / evidence[:, None] @ transition, total + jnp.log(evidence)), None

    x = tokens("x", x)
    start = jnp.broadcast_to(initial, (len(x), len(initial))), jnp.zeros(len(x), emission.dtype)
    return jax.lax.scan(step, start, x.T)[0][1]


def hmm_denoiser(hmm: HMM, prior: str = "uniform", mask_id: int | None = None) -> Callable:
    """`denoise_fn(z int[b, t], sigma f[b]) -> logits f[b, t, v]` of the samplers, exact at every level.

    The law of a clean token given all other noisy ones, which is what makes the posterior of one
    position exact; sigma = -log alpha is not read with the masked prior, whose mask must be the last
    id. Two scans over t with states of size h. ValueError as `check_hmm`.
    """
    check_hmm(hmm)
    initial, transition, emission = (wide(p) for p in hmm)
    vocab = emission.shape[1]
    check_prior(prior, mask_id, vocab + (prior == "masked"))
    if prior == "masked" and mask_id != vocab:
        raise ValueError(f"mask_id={mask_id} must be {vocab}, after the tokens of the chain")

    def denoise(z, sigma):
        if prior == "masked":
            known = jnp.concatenate([emission.T, jnp.ones((1, len(initial)), emission.dtype)])
            seen = known[z]
        else:
            sigma = sigma.astype(emission.dtype)[:, None, None]
            seen = jnp.exp(-sigma) * emission.T[z] - jnp.expm1(-sigma) / vocab

        def forward(message, seen):
            after = (message * seen) @ transition
            return after / jnp.sum(after, -1, keepdims=True), message

        def backward(message, seen):
            before = (message * seen) @ transition.T
            return before / jnp.sum(before, -1, keepdims=True), message

        seen = jnp.swapaxes(seen, 0, 1)
        start = jnp.broadcast_to(initial, seen.shape[1:])
        ahead = jax.lax.scan(forward, start, seen)[1]
        behind = jax.lax.scan(backward, jnp.ones_like(start), seen, reverse=True)[1]
        state = jnp.swapaxes(ahead * behind, 0, 1)
        logits = jnp.log((state / jnp.sum(state, -1, keepdims=True)) @ emission)
        if prior == "masked":
            logits = jnp.pad(logits, ((0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)
        return logits

    return denoise
