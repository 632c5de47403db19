"""Log-probabilities and entropies of logits, some positions at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.arguments import check_count, check_shape, wide
from jaxlab.rl.arguments import check_number
from jaxlab.sampling import entropy


def _positions(fn, chunk, logits, *others):
    """`fn(logits [v], others of a position)` at every position, `chunk` of them at a time."""
    if chunk is None:
        for _ in range(logits.ndim - 1):
            fn = jax.vmap(fn)
        return fn(logits, *others)
    flat = (logits.reshape(-1, logits.shape[-1]), *(x.reshape(-1) for x in others))
    fn = jax.checkpoint(fn, prevent_cse=False)
    out = jax.lax.map(lambda args: fn(*args), flat, batch_size=chunk)
    return out.reshape(logits.shape[:-1])


def _check_logits(logits, temperature, chunk) -> None:
    check_number("temperature", temperature, 0, above=True)
    if jnp.ndim(logits) < 1 or not jnp.shape(logits)[-1]:
        raise ValueError(f"logits has shape {jnp.shape(logits)}; expected axes (..., V) with V > 0")
    if chunk is not None:
        check_count("chunk", chunk, 1)


def logprobs_from_logits(
    logits: Float[Array, "*n V"],
    tokens: Int[Array, "*n"],
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Float[Array, "*n"]:
    """log softmax(logits / temperature) at `tokens`, in float32 (float64 for float64 logits).

    `chunk` positions are worked on at a time and made again for the gradient, so that no second array
    of the size of `logits` exists but its gradient; the numbers are the same. A token that is not below V
    gives NaN. ValueError for numbers and shapes.
    """
    _check_logits(logits, temperature, chunk)
    check_shape("tokens", tokens, jnp.shape(logits)[:-1])

    def one(z, token):
        return jax.nn.log_softmax(wide(z) / temperature).at[token].get(mode="fill")

    return _positions(one, chunk, jnp.asarray(logits), jnp.asarray(tokens))


def entropy_from_logits(
    logits: Float[Array, "*n V"], *, temperature: float = 1.0, chunk: int | None = None
) -> Float[Array, "*n"]:
    """Entropy of softmax(logits / temperature) in nats; all else as in `logprobs_from_logits`."""
    _check_logits(logits, temperature, chunk)
    one = lambda z: entropy(jax.nn.log_softmax(wide(z) / temperature))  # noqa: E731
    return _positions(one, chunk, jnp.asarray(logits))
