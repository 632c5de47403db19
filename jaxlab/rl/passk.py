"""pass@k: its unbiased estimators from n samples, and its weight on a prompt.

Results are float32 (float64 for float64 input), without gradient. The number of samples n and k are
static, leading axes are free. C(n - c, k) / C(n, k) is never a difference of log-gamma functions,
which in float32 is off by 2.6e-2 at n = 10000. Source: note on pass@k interference (arXiv 2602.21189),
sections 1 and 4; pass@k: Chen et al., 2021.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Num

from jaxlab.arguments import check_count, wide
from jaxlab.rl.arguments import demand


def check_k(k, most: int | None = None, least: int = 1) -> int:
    """`k` as an int in [least, most], else ValueError."""
    k = check_count("k", k, least)
    if most is not None and k > most:
        raise ValueError(f"k={k} must be at most {most}")
    return k


def samples(name: str, x, least: int = 1) -> int:
    """Length of the last axis of `x`, at least `least`."""
    if jnp.ndim(x) < 1 or jnp.shape(x)[-1] < least:
        raise ValueError(
            f"{name} has shape {jnp.shape(x)}; expected (..., n) with n of at least {least}"
        )
    return jnp.shape(x)[-1]


def binary(name: str, x) -> jax.Array:
    """0/1 array as numbers; NaN where a traced value is neither."""
    demand(lambda xp, x: (x == 0) | (x == 1), f"{name} must hold 0 and 1 only", x)
    x = wide(x)
    return jnp.where((x == 0) | (x == 1), x, jnp.nan)


def misses(n: int, k: int) -> np.ndarray:
    """C(n - c, k) / C(n, k) for c = 0..n in float64: the chance that k of n samples miss c of them."""
    c = np.arange(n)
    return np.concatenate([[1.0], np.cumprod(np.maximum(n - c - k, 0) / (n - c))])


def look_up(table: np.ndarray, c: Num[Array, "*b"], like: jax.Array) -> Float[Array, "*b"]:
    """table[c] in the type of `like`, for whole numbers c; NaN where c is NaN or beyond the table."""
    inside = (c >= 0) & (c < len(table))
    index = jnp.where(inside, c, 0).astype(jnp.int32)
    return jnp.where(inside, jnp.asarray(table.astype(like.dtype))[index], jnp.nan)


def pass_at_k(
    n: int | Int[Array, "*#b"], c: int | Int[Array, "*#b"], k: int | Int[Array, "*#b"]
) -> Float[Array, "*b"]:
    """1 - C(n - c, k) / C(n, k): the unbiased estimate of pass@k when c of n samples are correct.

    n, c and k broadcast; n and c may be traced, k is an int or a concrete integer array. ValueError
    unless 1 <= k <= n and 0 <= c <= n; where these are traced, NaN.
    """
    if isinstance(k, Tracer):
        raise ValueError(
            f"k={k} must be an int or a concrete array: the number of terms depends on it"
        )
    ks = np.asarray(k)
    if not np.issubdtype(ks.dtype, np.integer) or np.any(ks < 1):
        raise ValueError(f"k={k!r} must be integers of at least 1")
    for name, x in {"n": n, "c": c}.items():
        demand(lambda xp, x: x == xp.floor(x), f"{name} must hold whole numbers", x)
    demand(lambda xp, n: n >= ks, f"k={k} must be at most n", n)
    demand(lambda xp, n, c: (c >= 0) & (c <= n), "c must be in [0, n]", n, c)
    some = (jnp.asarray(n) >= ks) & (jnp.asarray(c) >= 0) & (jnp.asarray(c) <= n)
    terms = 1 << int(np.max(ks, initial=1) - 1).bit_length()  # few lengths, few compilations
    miss = _log_miss(n, c, ks, terms, jnp.result_type(wide(n), wide(c)))
    return jax.lax.stop_gradient(jnp.where(some, -jnp.expm1(miss), jnp.nan))


@functools.partial(jax.jit, static_argnames=("terms", "dtype"))
def _log_miss(n, c, k, terms, dtype):
    """log(C(n - c, k) / C(n, k)), -inf where n - c < k: `terms` >= k quotients of whole numbers."""
    n, c, k = (jnp.asarray(x)[..., None] for x in (n, c, k))
    certain = (n - c < k)[..., 0]  # decided on whole numbers
    i = jnp.arange(terms)
    left, of = n - c - i, n - i
    counts = (i < k) & (left > 0)
    left, of, c = (jnp.where(counts, x, 1).astype(dtype) for x in (left, of, c))
    small = 2 * c < of
    logs = jnp.where(small, jnp.log1p(-jnp.where(small, c / of, 0)), jnp.log(left / of))
    logs = jnp.where(counts, logs, 0)
    while logs.shape[-1] > 1:  # by halves, as a sum in order would lose digits
        logs = logs[..., : logs.shape[-1] // 2] + logs[..., logs.shape[-1] // 2 :]
    return jnp.where(certain, -jnp.inf, logs[..., 0])


def pass_at_k_curve(correct: Num[Array, "*b n"], ks: tuple[int, ...]) -> Float[Array, "*b ks"]:
    """pass@k for every k in `ks` from 0/1 samples; ValueError unless each k is an int in [1, n]."""
    n = samples("correct", correct)
    tables = [1 - misses(n, check_k(k, n)) for k in ks]
    right = binary("correct", correct)
    out = [look_up(table, jnp.sum(right, -1), right) for table in tables]
    return jax.lax.stop_gradient(jnp.stack(out, -1) if out else jnp.zeros((*right.shape[:-1], 0)))


def max_at_k(rewards: Num[Array, "*b n"], k: int) -> Float[Array, "*b"]:
    """Unbiased estimate of the expected maximum of k rewards; for 0/1 rewards it is pass@k.

    ValueError unless k is an int in [1, n], and for NaN. Source: PKPO, 2505.15062.
    """
    n = samples("rewards", rewards)
    k = check_k(k, n)
    demand(lambda xp, x: ~xp.isnan(x), "rewards must not be NaN", rewards)
    ascending = jnp.sort(wide(rewards), -1)
    # Steps between neighbours, each with the chance of a sample beyond it: a constant stays itself.
    beyond = (1 - misses(n, k))[n - 1 : 0 : -1].astype(ascending.dtype)
    steps = ascending[..., 1:] - ascending[..., :-1]
    return jax.lax.stop_gradient(ascending[..., 0] + jnp.sum(steps * beyond, -1))


def log_passk_weight(p: Num[Array, "*b"], k: int) -> Float[Array, "*b"]:
    """log of `passk_weight`, finite for every p < 1; 0 at k = 1, else -inf at p = 1. No gradient."""
    k = check_k(k)
    demand(lambda xp, p: (p >= 0) & (p <= 1), "p must be in [0, 1]", p)
    p = jax.lax.stop_gradient(wide(p))
    return np.log(k) + (k - 1) * jnp.log1p(-p) if k > 1 else jnp.zeros_like(p)


def passk_weight(p: Num[Array, "*b"], k: int) -> Float[Array, "*b"]:
    """k (1 - p)^(k - 1), how much a prompt of pass@1 p counts in the gradient of pass@k; 0^0 = 1.

    ValueError unless k is an int of at least 1 and p in [0, 1]. No gradient. Source: the note, section 1.
    """
    k = check_k(k)
    return k * jnp.exp(log_passk_weight(p, k) - np.log(k))


def passk_weight_loo(correct: Num[Array, "*b n"], k: int) -> Float[Array, "*b n"]:
    """Unbiased passk_weight of each sample from the others: k C(n-1-c_i, k-1) / C(n-1, k-1).

    c_i counts the correct ones among the others. ValueError unless k is an int in [1, n] and `correct` 0/1.
    """
    n = samples("correct", correct)
    k = check_k(k, n)
    right = binary("correct", correct)
    others = jnp.sum(right, -1, keepdims=True) - right
    return jax.lax.stop_gradient(look_up(k * misses(n - 1, k - 1), others, right))
