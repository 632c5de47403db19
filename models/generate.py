"""Sampling from a decoder: a fixed window slides over the text, one compilation in all."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.jit, static_argnames=("apply", "new", "window"))
def sample(
    apply,
    params,
    prompt: Int[Array, "b p"],
    key: jax.Array,
    temperature: Float[Array, ""] | float,
    *,
    new: int,
    window: int,
) -> Int[Array, "b n"]:
    """`new` tokens after each prompt; temperature 0 is greedy.

    Each token is one forward pass over the last `window` tokens, so the cost is new * window tokens.
    """
    b, p = prompt.shape
    prompt = prompt[:, -window:]
    p = prompt.shape[1]
    buffer = jnp.zeros((b, window), prompt.dtype).at[:, :p].set(prompt)

    def step(carry, key):
        buffer, length = carry
        logits = apply(params, buffer)
        last = jnp.take_along_axis(logits, (length - 1)[None, None, None], 1)[:, 0]
        cold = temperature <= 0
        drawn = jax.random.categorical(key, last / jnp.where(cold, 1.0, temperature))
        token = jnp.where(cold, jnp.argmax(last, -1), drawn).astype(buffer.dtype)
        full = length == window
        buffer = jnp.where(full, jnp.roll(buffer, -1, 1), buffer)
        at = jnp.where(full, window - 1, length)
        buffer = jnp.where(jnp.arange(window) == at, token[:, None], buffer)
        return (buffer, jnp.minimum(length + 1, window)), token

    start = (buffer, jnp.asarray(p, jnp.int32))
    _, tokens = jax.lax.scan(step, start, jax.random.split(key, new))
    return tokens.T
