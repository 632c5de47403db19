"""What is said of samples of text. Source: note on Psi-samplers, section 9."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.diffusion.checks import check_tokens


def unigram_entropy(tokens: Int[Array, "b t"], K: int) -> Float[Array, "b"]:
    """Entropy of the tokens' frequencies in each row, nats; K is the size of the vocabulary.

    ValueError for K < 2, TypeError for tokens that are not integers.
    """
    check_tokens(tokens=tokens)
    if K < 2:
        raise ValueError(f"K={K} must be at least 2")
    counts = jax.vmap(lambda row: jnp.bincount(row, length=K))(tokens)
    share = counts / tokens.shape[-1]
    return -jnp.sum(share * jnp.log(jnp.where(counts > 0, share, 1)), -1)


def gen_ppl_mask(tokens: Int[Array, "b t"], eos: int) -> Bool[Array, "b t"]:
    """Tokens that count in generative perplexity: all but every end token after a row's first."""
    check_tokens(tokens=tokens)
    end = tokens == eos
    return ~end | (jnp.cumsum(end, -1) == 1)
