"""What samples are judged by: entropy, the tokens that a perplexity counts, a distance of features.

Source: note on Psi-samplers, section 9.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.arguments import wide_type
from jaxlab.diffusion.arguments import check_count, floats
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


def frechet_distance(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, ""]:
    """Squared Frechet distance of the normal laws fitted to two sets of features.

    |mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), covariances over n - 1. It falls with n
    even for sets of one law. ValueError unless [n, d] and [m, d] with 2 rows each; TypeError for
    integers. Source: Heusel et al., 1706.08500.
    """
    x, y = floats("x", x, 2), floats("y", y, 2)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"x has shape {x.shape} and y {y.shape}; expected [n, d] and [m, d] with 2 rows or more"
        )

    def root(a):
        """R with R^T R the covariance."""
        return jnp.linalg.qr((a - jnp.mean(a, 0)) / (len(a) - 1) ** 0.5, mode="r")

    r, s = root(x), root(y)
    # The trace of the root is a sum of singular values: no root of a rounding error is taken.
    shared = jnp.sum(jnp.linalg.svd(r @ s.T, compute_uv=False))
    apart = jnp.sum((jnp.mean(x, 0) - jnp.mean(y, 0)) ** 2)
    return apart + jnp.sum(r**2) + jnp.sum(s**2) - 2 * shared
