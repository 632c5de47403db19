"""Drawing tokens from V logits: nucleus without a sort, inverse cdf in two levels, exponential race.

Source: note on Psi-samplers, sections 7.7, 7.9 and 14.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxlab.arguments import wide
from jaxlab.diffusion.arguments import check_range, floats

BLOCK = 256


def nucleus(logits: Float[Array, "*b v"], p: float) -> Float[Array, "*b v"]:
    """Keeps a token iff those more probable than it have at most probability `p` together.

    Dropped entries are -inf, kept ones unchanged. The threshold is found by bisection on the bits of
    a probability: 30 sums (62 in float64), exact, no sort. ValueError unless p is in (0, 1].
    Source: note on Psi-samplers, section 7.7.
    """
    logits = floats("logits", logits)
    check_range("p", p, 0, 1, open_low=True)
    if p == 1:
        return logits
    mass = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    enough = p * jnp.sum(mass, -1)
    word = jnp.int64 if mass.dtype == jnp.float64 else jnp.int32
    # Floats from 0 to 1 are ordered as their bits. Above `high` lies at most p, above `low` more.
    high = jax.lax.bitcast_convert_type(jnp.ones_like(enough), word)
    low = jnp.full_like(high, -1)

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        least = jax.lax.bitcast_convert_type(middle, mass.dtype)[..., None]
        above = jnp.sum(jnp.where(mass > least, mass, 0), -1)
        fits = (above <= enough) & (middle >= 0)
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    steps = 62 if word == jnp.int64 else 30
    _, high = jax.lax.fori_loop(0, steps, halve, (low, high))
    least = jax.lax.bitcast_convert_type(high, mass.dtype)[..., None]
    return jnp.where(mass >= least, logits, -jnp.inf)


def race_categorical(
    probs: Float[Array, "*b v"], uniforms: Float[Array, "*b v"]
) -> Int[Array, "*b"]:
    """argmax p / E with E = 1e-10 - log(u + 1e-10): the draw of the release. int32.

    ValueError for different shapes. Source: note on Psi-samplers, section 7.9.
    """
    probs, uniforms = floats("probs", probs), floats("uniforms", uniforms)
    if uniforms.shape != probs.shape:
        raise ValueError(f"uniforms has shape {uniforms.shape}; expected {probs.shape}")
    return jnp.argmax(probs / (1e-10 - jnp.log(uniforms + 1e-10)), -1).astype(jnp.int32)


def fine_uniform(key: Key[Array, ""], shape: tuple[int, ...], dtype) -> Float[Array, "..."]:
    """Uniforms in [0, 1) whose small values have all their digits: 32 bits, not 23."""
    if dtype == jnp.float64:
        return jax.random.uniform(key, shape, dtype)
    bits = jax.random.bits(key, shape, jnp.uint32).astype(dtype)
    return jnp.minimum(bits * 2.0**-32, 1 - jnp.finfo(dtype).epsneg)


def draw_and_mass(
    logits: Float[Array, "*b v"], z: Int[Array, "*b"], u: Float[Array, "2 *b"]
) -> tuple[Int[Array, "*b"], Float[Array, "*b"]]:
    """(a token drawn from softmax(logits), the probability of z), from two uniforms a token.

    Sums of blocks choose the block, its own cumulative sum the token: float32 is right to 1e-7 for
    any vocabulary, and nothing of its size is kept.
    """
    logits = wide(logits)
    vocab = logits.shape[-1]
    top = jnp.max(logits, -1, keepdims=True)
    blocks = -(-vocab // BLOCK)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, blocks * BLOCK - vocab)]
    mass = jnp.pad(jnp.exp(logits - top), padding)
    sums = jnp.sum(mass.reshape(*mass.shape[:-1], blocks, BLOCK), -1)
    block = _pick(jnp.cumsum(sums, -1), u[0])
    ids = block[..., None] * BLOCK + jnp.arange(BLOCK)
    inside = jnp.take_along_axis(logits, jnp.minimum(ids, vocab - 1), -1)
    inside = jnp.where(ids < vocab, jnp.exp(inside - top), 0)
    token = block * BLOCK + _pick(jnp.cumsum(inside, -1), u[1])
    at_z = jnp.exp(jnp.take_along_axis(logits, z[..., None], -1) - top)[..., 0]
    return token, at_z / jnp.sum(sums, -1)


def _pick(cumulative, u):
    """Index of the first sum above u times the last: never one of mass 0, u being below 1."""
    return jnp.sum(cumulative <= (u * cumulative[..., -1])[..., None], -1, dtype=jnp.int32)
