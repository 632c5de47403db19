"""Softened noisy tokens: all of softmax(w / tau), or its k largest without a vector over the vocabulary.

Here alpha and sigma are signal and noise of the Gaussian w = alpha onehot(x0) + sigma eps. Source: Duo
2506.10892 (dense), Duo++ 2602.21185 (sparse); note on Psi-samplers, section 6.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtri
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab.diffusion.checks import check_range, check_tokens, wide

RULES = ("exact", "release")
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def gaussian_topk(uniforms: Float[Array, "*b k"], n: int, sigma: Any) -> Float[Array, "*b k"]:
    """The k largest of n draws of N(0, sigma^2), decreasing, from k numbers in (0, 1].

    ValueError for n < k.
    """
    dtype = wide(uniforms, sigma)
    k = uniforms.shape[-1]
    if not 1 <= k <= n:
        raise ValueError(f"n={n} draws must be at least the k={k} that are asked for")
    u = jnp.asarray(uniforms, dtype)
    logs = jnp.cumsum(jnp.log(u) / jnp.arange(n, n - k, -1, dtype=dtype), -1)
    # The nearer tail keeps its digits; 1 itself would be infinitely large.
    tail = jnp.maximum(-jnp.expm1(logs), jnp.finfo(dtype).tiny)
    low = logs < math.log(0.5)
    draws = jnp.where(low, ndtri(jnp.exp(logs)), -ndtri(jnp.where(low, 0.5, tail)))
    return jnp.asarray(sigma, dtype)[..., None] * draws


def log_mean_exp_truncated(c: Any, sigma: Any, tau: Any) -> Float[Array, "*b"]:
    """log E[exp(X / tau) | X < c], X ~ N(0, sigma^2), without the cancelling sigma^2 / (2 tau^2)."""
    check_range("tau", tau, 1e-300, math.inf, "(0, inf)")
    dtype = wide(c, sigma, tau)
    c, sigma, tau = (jnp.asarray(x, dtype) for x in (c, sigma, tau))
    u = c / sigma
    m = sigma / tau - u
    # Mills' ratio: log_ndtr and m^2 / 2 cancel for large m, where the asymptotic series serves.
    limit = 6.0 if dtype == jnp.float32 else 30.0
    near, far = jnp.minimum(m, limit), jnp.maximum(m, limit)
    y = far**-2.0
    series = 1 - y * (1 - y * (3 - y * (15 - y * (105 - y * 945))))
    mills = jnp.where(
        m > limit, jnp.log(series) - jnp.log(far), log_ndtr(-near) + near**2 / 2 + HALF_LOG_2PI
    )
    return c / tau - u**2 / 2 - HALF_LOG_2PI + mills - log_ndtr(u)


def ids_from_draws(
    draws: Int[Array, "*b k"], K: int, exclude: Int[Array, "*b"]
) -> Int[Array, "*b k"]:
    """k distinct tokens of K, never `exclude`: draws[i] in [0, K-1-i) is a rank among those still free."""
    check_tokens(draws=draws, exclude=exclude)
    _check_k(draws.shape[-1], K)
    chosen: list[jax.Array] = []
    for i in range(draws.shape[-1]):
        rank = draws[..., i].astype(jnp.int32)
        for id_ in _increasing(chosen):
            rank = rank + (rank >= id_)
        chosen.append(rank)
    ids = jnp.stack(chosen, -1)
    return (ids + (ids >= exclude[..., None])).astype(jnp.int32)


def _increasing(ids: list[jax.Array]) -> list[jax.Array]:
    if len(ids) < 2:
        return ids
    stacked = jnp.sort(jnp.stack(ids, -1), -1)
    return [stacked[..., i] for i in range(len(ids))]


def distinct_ids(
    key: Key[Array, ""], shape: tuple[int, ...], k: int, K: int, exclude: Int[Array, "*b"]
) -> Int[Array, "*b k"]:
    """`ids_from_draws` of random draws: uniform over tokens and their order. `exclude` has `shape`."""
    return ids_from_draws(_draws(key, tuple(shape), k, K), K, jnp.broadcast_to(exclude, shape))


def _draws(key, shape, k: int, K: int) -> Int[Array, "*b k"]:
    _check_k(k, K)
    keys = jax.random.split(key, k)
    return jnp.stack([jax.random.randint(keys[i], shape, 0, K - 1 - i) for i in range(k)], -1)


def sparse_weights(
    values: Float[Array, "*b k"],
    own: Float[Array, "*b"],
    in_topk: Bool[Array, "*b"],
    sigma: Any,
    tau: Any,
    K: int,
) -> Float[Array, "*b k"]:
    """Weights of the k largest in softmax(w / tau), the others by the mean of their truncated tail.

    `values` are decreasing but for the last, which is `own` where `in_topk`. They sum to less than 1.
    """
    k = values.shape[-1]
    _check_k(k, K)
    check_range("tau", tau, 1e-300, math.inf, "(0, inf)")
    dtype = wide(values, own, sigma, tau)
    values, own = values.astype(dtype), own.astype(dtype)
    tau = jnp.asarray(tau, dtype)
    edge = jnp.where(in_topk, values[..., k - 2], values[..., k - 1])
    rest = jnp.log(jnp.where(in_topk, K - k, K - k - 1).astype(dtype))
    tail = rest + log_mean_exp_truncated(edge, sigma, tau)
    top = jnp.maximum(values[..., 0], own) / tau
    largest = jnp.exp(values / tau[..., None] - top[..., None])
    mine = jnp.where(in_topk, 0, jnp.exp(own / tau - top))
    weights = largest / (jnp.sum(largest, -1) + mine + jnp.exp(tail - top))[..., None]
    lost = jnp.sum(weights, -1, keepdims=True) == 0
    return jnp.where(lost & (jnp.arange(k) == 0), 1, weights)


def sparse_from_draws(
    uniforms: Float[Array, "b t k"],
    normals: Float[Array, "b t"],
    draws: Int[Array, "b t k"],
    x0: Int[Array, "b t"],
    alpha: Any,
    sigma: Any,
    tau: Any,
    K: int,
    argmax_rule: str = "exact",
) -> tuple[Int[Array, "b t k"], Float[Array, "b t k"], Int[Array, "b t"]]:
    """(ids, weights, z) of `sparse_relaxation` from its draws; see there."""
    check_tokens(x0=x0)
    if argmax_rule not in RULES:
        raise ValueError(f"argmax_rule={argmax_rule!r} must be one of {list(RULES)}")
    k = uniforms.shape[-1]
    _check_k(k, K)
    if draws.shape != uniforms.shape or normals.shape != uniforms.shape[:-1]:
        raise ValueError(
            f"uniforms [..., k], normals [...] and draws [..., k] must agree, got "
            f"{uniforms.shape}, {normals.shape} and {draws.shape}"
        )
    dtype = wide(uniforms, normals, alpha, sigma, tau)
    alpha, sigma, tau = (
        jnp.broadcast_to(jnp.asarray(x, dtype), x0.shape) for x in (alpha, sigma, tau)
    )
    values = gaussian_topk(uniforms.astype(dtype), K - 1, sigma)
    own = alpha + sigma * normals.astype(dtype)
    in_topk = own > values[..., -1]
    ids = ids_from_draws(draws, K, x0)
    first, wins = ids[..., 0], own > values[..., 0] if argmax_rule == "exact" else in_topk
    z = jnp.where(wins, x0, first).astype(jnp.int32)
    ids = ids.at[..., -1].set(jnp.where(in_topk, x0, ids[..., -1]))
    values = values.at[..., -1].set(jnp.where(in_topk, own, values[..., -1]))
    return ids, sparse_weights(values, own, in_topk, sigma, tau, K), z


def sparse_relaxation(
    key: Key[Array, ""],
    x0: Int[Array, "b t"],
    alpha: Any,
    sigma: Any,
    tau: Any,
    k: int,
    K: int,
    argmax_rule: str = "exact",
) -> tuple[Int[Array, "b t k"], Float[Array, "b t k"], Int[Array, "b t"]]:
    """(ids, weights, z): the k largest of softmax(w / tau) and the argmax of w.

    Memory does not depend on K. Ids, order, argmax have the law of the dense vector; weights stand
    for it but for the others' sum, whose mean is taken: of no use for tau above 0.02 or so. Rule
    "release" takes x0 for the argmax whenever it is among the k, which is too often. ValueError for k
    outside [2, K-1], tau <= 0 or an unknown rule; TypeError for tokens that are not integers.
    """
    check_tokens(x0=x0)
    _check_k(k, K)
    check_range("tau", tau, 1e-300, math.inf, "(0, inf)")
    dtype = wide(alpha, sigma, tau)
    keys = jax.random.split(key, 3)
    uniforms = 1 - jax.random.uniform(keys[0], (*x0.shape, k), dtype)
    normals = jax.random.normal(keys[1], x0.shape, dtype)
    draws = _draws(keys[2], x0.shape, k, K)
    return sparse_from_draws(uniforms, normals, draws, x0, alpha, sigma, tau, K, argmax_rule)


def relaxed_noise(noise, x0, alpha, sigma) -> Float[Array, "b t v"]:
    """w = alpha onehot(x0) + sigma noise; levels broadcast against x0."""
    here = jnp.arange(noise.shape[-1]) == x0[..., None]
    return jnp.where(here, alpha[..., None], 0) + sigma[..., None] * noise


def dense_from_noise(
    noise: Float[Array, "b t v"], x0: Int[Array, "b t"], alpha: Any, sigma: Any, tau: Any
) -> tuple[Float[Array, "b t v"], Int[Array, "b t"]]:
    """(softmax(w / tau), argmax w) of given Gaussian noise."""
    check_tokens(x0=x0)
    check_range("tau", tau, 1e-300, math.inf, "(0, inf)")
    dtype = wide(noise, alpha, sigma, tau)
    alpha, sigma, tau = (jnp.asarray(x, dtype) for x in (alpha, sigma, tau))
    w = relaxed_noise(noise.astype(dtype), x0, alpha, sigma)
    return jax.nn.softmax(w / tau[..., None]), jnp.argmax(w, -1).astype(jnp.int32)


def dense_relaxation(
    key: Key[Array, ""], x0: Int[Array, "b t"], alpha: Any, sigma: Any, tau: Any, K: int
) -> tuple[Float[Array, "b t v"], Int[Array, "b t"]]:
    """`dense_from_noise` of random noise over K tokens."""
    if K < 2:
        raise ValueError(f"K={K} must be at least 2")
    noise = jax.random.normal(key, (*x0.shape, K), wide(alpha, sigma, tau))
    return dense_from_noise(noise, x0, alpha, sigma, tau)


def mix_embeddings(
    table: Float[Array, "v d"],
    x: Int[Array, "b t"] | Int[Array, "b t k"] | Float[Array, "b t v"],
    weights: Float[Array, "b t k"] | None = None,
) -> Float[Array, "b t d"]:
    """Rows of `table`; their sum with `weights`, for ids [b, t, k]; softmax(x) @ table, for floats.

    ValueError for weights with floats or of another shape than the ids.
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        if weights is not None:
            raise ValueError("weights belong to tokens, but x holds floats: give one of them")
        if x.shape[-1] != table.shape[0]:
            raise ValueError(f"x {x.shape} must end in the {table.shape[0]} rows of table")
        dtype = wide(table, x)
        return jax.nn.softmax(x.astype(dtype)) @ table.astype(dtype)
    check_tokens(x=x)
    if weights is None:
        return table[x]
    if weights.shape != x.shape:
        raise ValueError(f"weights {weights.shape} must have the shape of x {x.shape}")
    dtype = wide(table, weights)
    return jnp.einsum("...k,...kd->...d", weights.astype(dtype), table[x].astype(dtype))


def log10_tau(step: Any, start: Any, end: Any, start_step: Any, end_step: Any) -> Float[Array, ""]:
    """`start` up to `start_step`, `end` from `end_step` on, linear between them."""
    dtype = wide(start, end) if hasattr(start, "dtype") else jnp.float32
    step, start_step, end_step = (jnp.asarray(x, dtype) for x in (step, start_step, end_step))
    part = (step - start_step) / jnp.maximum(end_step - start_step, 1)
    part = jnp.where(step >= end_step, 1, jnp.clip(part, 0, 1))
    return jnp.asarray(start + (end - start) * part, dtype)


def _check_k(k: int, K: int) -> None:
    if not 2 <= k <= K - 1:
        raise ValueError(f"k={k} must be in [2, K - 1] with K={K}")
