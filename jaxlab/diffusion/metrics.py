"""What samples are judged by: unigram entropy, and the tokens that a perplexity counts.

Source: note on Psi-samplers, section 9.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.arguments import wide_type
from jaxlab.diffusion.arguments import check_count
from jaxlab.diffusion.arguments import tokens as as_tokens


def _two_axes(tokens) -> jax.Array:
    tokens = as_tokens("tokens", tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens has shape {tokens.shape}; expected axes (b, t)")
    return tokens


def unigram_entropy(tokens: Int[Array, "b t"], K: int) -> Float[Array, "b"]:
    """Entropy in nats of the token frequencies of each row; tokens in [0, K).

    JAX's default floating type. ValueError unless [b, t] and K at least 2; TypeError unless integers.
    """
    check_count("K", K, 2)
    tokens = _two_axes(tokens)
    one_row = lambda row: jnp.zeros(K, jnp.int32).at[row].add(1)  # noqa: E731
    share = jax.vmap(one_row)(tokens).astype(wide_type(1.0)) / tokens.shape[1]
    return -jnp.sum(jax.scipy.special.xlogy(share, share), -1)


def gen_ppl_mask(tokens: Int[Array, "b t"], eos: int) -> Bool[Array, "b t"]:
    """True where a token counts: every one but `eos`, and the first `eos` of its row.

    ValueError unless [b, t]; TypeError unless integers.
    """
    is_end = _two_axes(tokens) == eos
    return ~is_end | (jnp.cumsum(is_end, -1) == 1)
