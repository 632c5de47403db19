"""Means over valid tokens: as numerator and denominator, so that they reduce over any mesh.

Shapes: N rows, T tokens. What a masked position holds, NaN and inf included, adds exactly 0 to value
and gradient.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxlab.arguments import check_choice, check_count, check_shape, wide
from jaxlab.rl.arguments import check_axes, flags

MODES = (
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_scale",
    "token_sum_scale",
)
ROWS = ("nonempty", "all")
Metrics = dict[str, tuple[Float[Array, ""], Float[Array, ""]]]
stop = jax.lax.stop_gradient


def mean_of(numerator: Float[Array, ""], denominator: Float[Array, ""]) -> Float[Array, ""]:
    """numerator / denominator, 0 where the denominator is 0."""
    some = denominator > 0
    return jnp.where(some, numerator / jnp.where(some, denominator, 1), 0)


def clip(x, low, high):
    """`x` in [low, high] with slope 1 on the bounds, where jnp.clip has 1/2."""
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def valid_tokens(mask, **arrays) -> tuple[jax.Array, ...]:
    """(mask as booleans, arrays [N, T] of their type, 0 where masked)."""
    for name, x in arrays.items():
        check_axes(name, x, "N T")
        check_shape(name, x, jnp.shape(next(iter(arrays.values()))))
    kept = flags("mask", mask, *(jnp.shape(x) for x in arrays.values()))
    return kept, *(jnp.where(kept, wide(x), 0) for x in arrays.values())


def lengths(kept):
    """Valid tokens of each row [N, 1]."""
    return jnp.sum(kept, 1, keepdims=True)


def row_mean(x, kept):
    """Mean over the valid tokens of each row [N, 1], 0 for an empty row; `x` is 0 where masked."""
    return jnp.sum(x, 1, keepdims=True) / jnp.maximum(lengths(kept), 1)


def token_metrics(kept, dtype, **values) -> Metrics:
    """{name: (sum over valid tokens, their number)} without gradient.

    A value is [N, T], or [N, 1] if the tokens of a row share it, or a tuple of such factors.
    """
    length = lengths(kept).astype(dtype)
    tokens, rows = {}, {}
    for name, value in values.items():
        factors = [stop(x) for x in (value if isinstance(value, tuple) else (value,))]
        shared = [jnp.where(length > 0, x, 0).astype(dtype) for x in factors if x.shape[1] == 1]
        rows[name] = math.prod(shared, start=jnp.ones_like(length))
        if each := [x.astype(dtype) for x in factors if x.shape[1] > 1]:
            tokens[name] = jnp.where(kept, math.prod(each), 0)
    sums = dict(zip(tokens, _row_sums(list(tokens.values())), strict=True))
    return {n: (jnp.sum(x * sums.get(n, length)), jnp.sum(length)) for n, x in rows.items()}


def _row_sums(arrays):
    """Sums [N, 1] of the rows of each array, in one pass: XLA:CPU would write what single sums read."""
    if not arrays:
        return []
    zeros = [jnp.zeros((), x.dtype) for x in arrays]
    add = lambda a, b: [x + y for x, y in zip(a, b, strict=True)]  # noqa: E731
    return [x[:, None] for x in jax.lax.reduce(arrays, zeros, add, (1,))]


def check_mode(mode, rows, max_len) -> None:
    """ValueError for unknown names, and where `mode` needs a max_len that is not there."""
    check_choice("mode", mode, *MODES)
    check_choice("rows", rows, *ROWS)
    if max_len is None and mode in ("seq_mean_token_scale", "token_sum_scale"):
        raise ValueError(f"max_len=None must be an integer of at least 1 for mode={mode!r}")
    if max_len is not None:
        check_count("max_len", max_len, 1)


def aggregate(
    x: Float[Array, "N T"],
    mask: Num[Array, "N T"],
    mode: str,
    *,
    max_len: int | None = None,
    rows: str = "nonempty",
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(numerator, denominator) of a mean over tokens; the mean is their quotient, 0 if nothing counts.

    With R the rows that have a valid token (or all, `rows` "all"): "token_mean" (sum, valid tokens),
    "seq_mean_token_mean" (sum of row means, R), "seq_mean_token_sum" (sum, R), "seq_mean_token_scale"
    (sum, R max_len), "token_sum_scale" (sum, max_len). Inside shard_map with rows split over
    `axis_name`, both are those of the whole batch. ValueError for names and shapes.
    """
    check_mode(mode, rows, max_len)
    kept, x = valid_tokens(mask, x=x)
    value = row_mean(x, kept) if mode == "seq_mean_token_mean" else x
    length = lengths(kept)
    counted = length if mode == "token_mean" else ((length > 0) | (rows == "all"))
    count = jnp.sum(counted, dtype=x.dtype)
    numerator = jnp.sum(value)
    if axis_name is not None:
        numerator, count = jax.lax.psum((numerator, count), axis_name)
    scale = max_len or 1
    if mode == "token_sum_scale":
        return numerator, jnp.full_like(count, scale)
    return numerator, count * scale if mode == "seq_mean_token_scale" else count
