"""Soft inputs of the Gaussian curriculum: dense, and sparse without any array of the vocabulary.

A clean token is a one-hot vector scaled by alpha, plus normal noise of width sigma; the network
sees its softmax at temperature tau, the loss its argmax. The sparse form keeps the k largest
coordinates and the mean of what the others add. Sources: arXiv 2506.10892; arXiv 2602.21185;
note on Psi-samplers, section 6.
"""

import math
import numbers
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, ndtri
from jaxtyping import Array, Float, Int, Key

from jaxlab.arguments import check_choice, wide_type
from jaxlab.diffusion.arguments import HOST, check_count, check_range, floats, per_token, tokens

RULES = ("exact", "release")
MOST_TAU = 0.02  # of the sparse form
Number = float | Float[Array, "#*b"]


def _check_levels(alpha, sigma, tau) -> None:
    check_range("alpha", alpha, 0, 1)
    check_range("sigma", sigma, 0, 1, open_low=True)
    check_range("tau", tau, 0, math.inf, open_low=True)


def _warn_of(tau) -> None:
    """Above, most of the mass lies beyond the k largest: 84 % at 0.1, K = 50257, k = 5."""
    if isinstance(tau, HOST) and np.any(np.asarray(tau) > MOST_TAU):
        warnings.warn(
            f"tau={tau} is above {MOST_TAU}: the sparse form drops most of it", stacklevel=3
        )


def _check_k(k: int, K: int) -> None:
    check_count("K", K, 3)
    check_count("k", k, 2, K - 1)


def gaussian_topk(uniforms: Float[Array, "*b k"], n: int, sigma: Number) -> Float[Array, "*b k"]:
    """The k largest of n normal draws of width `sigma`, in decreasing order, from k uniforms in (0, 1].

    `sigma` broadcasts against the axes before k. Relative precision up to the largest n (float64 if
    uniforms are). ValueError unless 1 <= k <= n. Source: note on Psi-samplers, section 6.1, step 1.
    """
    uniforms = floats("uniforms", uniforms)
    k = uniforms.shape[-1]
    check_count("n", n, 1)
    check_count("the last axis of uniforms", k, 1, n)
    log_u = jnp.cumsum(jnp.log(uniforms) / (n - jnp.arange(k, dtype=uniforms.dtype)), -1)
    # A draw of exactly 1 stands for the half step below it: the largest value stays finite.
    info = jnp.finfo(log_u.dtype)
    log_u = jnp.clip(log_u, math.log(info.tiny) + 1, -info.eps / 4 / n)
    upper = log_u > -math.log(2)
    # From the nearer tail, where the probability has its digits.
    tail = jnp.where(upper, -jnp.expm1(log_u), jnp.exp(log_u))
    return per_token(sigma, uniforms.dtype, 1) * ndtri(tail) * jnp.where(upper, -1, 1)


def _log_mills(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """log of (1 - cdf(x)) / density(x) of a standard normal."""
    far = x > (19 if x.dtype == jnp.float64 else 6)
    big, small = jnp.where(far, x, 20), jnp.where(far, 0, x)
    y = 1 / jnp.square(big)
    series = -y * (1 - y * (3 - y * (15 - y * (105 - y * (945 - y * 10395)))))
    near = log_ndtr(-small) + jnp.square(small) / 2 + math.log(2 * math.pi) / 2
    return jnp.where(far, jnp.log1p(series) - jnp.log(big), near)


def _log_tail(u, width):
    """log E[exp((X - c) / tau) | X < c] with u = c / sigma and width = sigma / tau."""
    return _log_mills(width - u) - _log_mills(-u)


def log_mean_exp_truncated(c: Number, sigma: Number, tau: Number) -> Float[Array, "*b"]:
    """log E[exp(X / tau) | X < c] of X normal of width `sigma`; the three broadcast.

    Floating type of the arguments, at least float32. ValueError for a host tau or sigma of 0 or less.
    Source: note on Psi-samplers, section 6.1, step 5.
    """
    check_range("sigma", sigma, 0, math.inf, open_low=True)
    check_range("tau", tau, 0, math.inf, open_low=True)
    dtype = wide_type(c, sigma, tau, 1.0)
    c, sigma, tau = (jnp.asarray(x, dtype) for x in (c, sigma, tau))
    return c / tau + _log_tail(c / sigma, sigma / tau)


def ids_from_draws(
    draws: Int[Array, "*b k"], K: int, exclude: Int[Array, "*b"]
) -> Int[Array, "*b k"]:
    """k distinct tokens of K without `exclude`: draws[..., i] in [0, K-1-i) ranks the free ones.

    int32. ValueError unless 1 <= k <= K - 1 and the shapes fit; TypeError unless integers.
    Source: note on Psi-samplers, section 6.1, step 4.
    """
    draws = tokens("draws", draws)
    exclude = tokens("exclude", exclude, draws.shape[:-1])
    check_count("K", K, 2)
    check_count("the last axis of draws", draws.shape[-1], 1, K - 1)
    ids, taken = [], []  # in order of choice, and sorted
    for i in range(draws.shape[-1]):
        new = draws[..., i]
        for other in taken:
            new = new + (new >= other)
        ids.append(new)
        for j, other in enumerate(taken):
            taken[j], new = jnp.minimum(other, new), jnp.maximum(other, new)
        taken.append(new)
    ids = jnp.stack(ids, -1)
    return ids + (ids >= exclude[..., None])


def _rank_draws(key, shape, k: int, K: int) -> Int[Array, "*b k"]:
    return jax.random.randint(key, (*shape, k), 0, K - 1 - jnp.arange(k), jnp.int32)


def distinct_ids(
    key: Key[Array, ""], shape: tuple[int, ...], k: int, K: int, exclude: Int[Array, "*b"]
) -> Int[Array, "*b k"]:
    """`ids_from_draws` of draws from `key`: every ordered choice is equally probable.

    `exclude` has `shape`. ValueError unless 2 <= k <= K - 1.
    """
    _check_k(k, K)
    return ids_from_draws(
        _rank_draws(key, shape, k, K), K, tokens("exclude", exclude, tuple(shape))
    )


def sparse_weights(
    values: Float[Array, "*b k"],
    own: Float[Array, "*b"],
    in_topk: Array,
    sigma: Number,
    tau: Number,
    K: int,
) -> Float[Array, "*b k"]:
    """Softmax weights of the k coordinates kept, the others counted by their mean; sum at most 1.

    `values` in decreasing order but for slot k, which is `own` where `in_topk`; `own` is the
    coordinate of the clean token. Levels broadcast against `own`. float32 (float64 if values are).
    ValueError for k, K or tau out of range. Source: note on Psi-samplers, section 6.1, step 5.
    """
    values = floats("values", values)
    k, dtype = values.shape[-1], values.dtype
    _check_k(k, K)
    _check_levels(0, sigma, tau)
    own, sigma, tau = (per_token(x, dtype) for x in (own, sigma, tau))
    cut = jnp.where(in_topk, values[..., k - 2], values[..., k - 1])
    top = jnp.maximum(values[..., 0], own)
    # Differences first: a quotient by tau of 1e-3 leaves four digits of float32.
    kept = jnp.exp((values - top[..., None]) / tau[..., None])
    count = jnp.where(in_topk, K - k, K - k - 1).astype(dtype)
    rest = count * jnp.exp((cut - top) / tau + _log_tail(cut / sigma, sigma / tau))
    total = jnp.sum(kept, -1) + jnp.where(in_topk, 0, jnp.exp((own - top) / tau)) + rest
    weights = kept / total[..., None]
    none = jnp.sum(weights, -1, keepdims=True) <= 0
    return jnp.where(none, (jnp.arange(k) == 0).astype(dtype), weights)


def sparse_from_draws(
    uniforms: Float[Array, "b t k"],
    normals: Float[Array, "b t"],
    draws: Int[Array, "b t k"],
    x0: Int[Array, "b t"],
    alpha: Number,
    sigma: Number,
    tau: Number,
    K: int,
    argmax_rule: str = "exact",
) -> tuple[Int[Array, "b t k"], Float[Array, "b t k"], Int[Array, "b t"]]:
    """(ids, weights, z): the k largest coordinates of the relaxed token, and the argmax of all K.

    Nothing has the size of the vocabulary. `uniforms` in (0, 1] for `gaussian_topk`, `normals` the
    noise of the clean token, `draws` for `ids_from_draws`. With the rule "release" z is x0 whenever x0
    is among the k largest, which is too often. ids and z int32; weights float32 (float64 if uniforms
    are). ValueError for k, K, levels or shapes out of range. Source: section 6.1 of the note.
    """
    check_choice("argmax_rule", argmax_rule, *RULES)
    uniforms, x0 = floats("uniforms", uniforms), tokens("x0", x0)
    k, dtype = uniforms.shape[-1], uniforms.dtype
    _check_k(k, K)
    _check_levels(alpha, sigma, tau)
    for name, x, shape in (
        ("uniforms", uniforms, (*x0.shape, k)),
        ("draws", draws, (*x0.shape, k)),
        ("normals", normals, x0.shape),
    ):
        if jnp.shape(x) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(x)}; expected {shape}")
    _warn_of(tau)
    values = gaussian_topk(uniforms, K - 1, sigma)
    own = per_token(alpha, dtype) + per_token(sigma, dtype) * jnp.asarray(normals, dtype)
    in_topk = own > values[..., -1]
    others = ids_from_draws(draws, K, x0)
    wins = own > values[..., 0] if argmax_rule == "exact" else in_topk
    z = jnp.where(wins, x0, others[..., 0])
    last = (jnp.arange(k) == k - 1) & in_topk[..., None]
    values = jnp.where(last, own[..., None], values)
    weights = sparse_weights(values, own, in_topk, sigma, tau, K)
    return jnp.where(last, x0[..., None], others), weights, z


def sparse_relaxation(
    key: Key[Array, ""],
    x0: Int[Array, "b t"],
    alpha: Number,
    sigma: Number,
    tau: Number,
    k: int,
    K: int,
    argmax_rule: str = "exact",
) -> tuple[Int[Array, "b t k"], Float[Array, "b t k"], Int[Array, "b t"]]:
    """`sparse_from_draws` of draws from `key`. Meant for tau up to about 0.02: above, the k are few."""
    _check_k(k, K)
    x0, dtype = tokens("x0", x0), wide_type(alpha, sigma, 1.0)
    first, second, third = jax.random.split(key, 3)
    uniforms = 1 - jax.random.uniform(first, (*x0.shape, k), dtype)
    normals = jax.random.normal(second, x0.shape, dtype)
    draws = _rank_draws(third, x0.shape, k, K)
    return sparse_from_draws(uniforms, normals, draws, x0, alpha, sigma, tau, K, argmax_rule)


def noisy_one_hot(noise, x0, alpha, sigma) -> Float[Array, "*b v"]:
    """alpha onehot(x0) + sigma noise."""
    own = jnp.arange(noise.shape[-1]) == x0[..., None]
    alpha, sigma = (per_token(x, noise.dtype, 1) for x in (alpha, sigma))
    return jnp.where(own, alpha, 0) + sigma * noise


def dense_from_noise(
    noise: Float[Array, "b t v"], x0: Int[Array, "b t"], alpha: Number, sigma: Number, tau: Number
) -> tuple[Float[Array, "b t v"], Int[Array, "b t"]]:
    """(soft, z): softmax(w / tau) and argmax of w = alpha onehot(x0) + sigma noise.

    float32 (float64 if noise is); z int32. ValueError for levels or shapes out of range.
    """
    noise = floats("noise", noise)
    x0 = tokens("x0", x0, noise.shape[:-1])
    _check_levels(alpha, sigma, tau)
    w = noisy_one_hot(noise, x0, alpha, sigma)
    soft = jax.nn.softmax((w - jnp.max(w, -1, keepdims=True)) / per_token(tau, w.dtype, 1), -1)
    return soft, jnp.argmax(w, -1).astype(jnp.int32)


def dense_relaxation(
    key: Key[Array, ""], x0: Int[Array, "b t"], alpha: Number, sigma: Number, tau: Number, K: int
) -> tuple[Float[Array, "b t v"], Int[Array, "b t"]]:
    """`dense_from_noise` of K normal draws a token from `key`: the slow, obvious relaxation."""
    check_count("K", K, 2)
    x0 = tokens("x0", x0)
    noise = jax.random.normal(key, (*x0.shape, K), wide_type(alpha, sigma, 1.0))
    return dense_from_noise(noise, x0, alpha, sigma, tau)


def mix_embeddings(
    table: Float[Array, "v d"], x: Array, weights: Float[Array, "b t k"] | None = None
) -> Float[Array, "b t d"]:
    """Rows of `table` for tokens [b, t], weighted rows for [b, t, k], or softmax(x) @ table.

    The last is for floating x [b, t, v]. float32 (float64 if table is). ValueError for weights with
    floating x, or shapes that do not fit. Source: note on Psi-samplers, section 6.1, step 6.
    """
    table, x = floats("table", table, 2), jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.floating):
        if weights is not None:
            raise ValueError("weights must be None with floating-point x")
        if x.ndim < 1 or x.shape[-1] != table.shape[0]:
            raise ValueError(f"x has shape {x.shape}; its last axis must be {table.shape[0]}")
        return jax.nn.softmax(x.astype(wide_type(x, table)), -1) @ table
    x = tokens("x", x)
    if weights is None:
        if x.ndim > 2:
            raise ValueError(f"x has shape {x.shape}; with three axes it needs weights")
        return table[x]
    if jnp.shape(weights) != x.shape:
        raise ValueError(f"weights has shape {jnp.shape(weights)}; expected {x.shape}")
    return jnp.einsum("...k,...kd->...d", jnp.asarray(weights, table.dtype), table[x])


def log10_tau(step, start: float, end: float, start_step, end_step) -> Float[Array, "*b"]:
    """log10 of the temperature at a step: `start`, then a line, then `end` from `end_step` on.

    Floating type of start and end. ValueError for a host end_step below start_step.
    Source: note on Psi-samplers, section 6.
    """
    if all(isinstance(x, numbers.Number) for x in (start_step, end_step)) and end_step < start_step:
        raise ValueError(f"end_step={end_step} must be at least start_step={start_step}")
    dtype = wide_type(start, end, 1.0)
    step, first, last = (jnp.asarray(x, dtype) for x in (step, start_step, end_step))
    gone = (step - first) / jnp.where(last > first, last - first, 1)
    gone = jnp.where(step >= last, 1, jnp.clip(gone, 0, 1))
    return start + (end - start) * gone.astype(dtype)
