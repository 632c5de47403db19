"""What a recurrent layer on a sharded sequence exchanges: its state, and a few tokens before its own.

Both are called inside `jax.shard_map`, on tokens in natural order. Source: papers' note on UPipe,
sections 7.10 and 9.2; the prefix is that of Hillis and Steele, 1986.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.affine import compose
from jaxlab.varying import vary_like

AxisName = str | tuple[str, ...]


def prefix_state_exchange(
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    axis_name: AxisName,
    *,
    matrix: bool = False,
) -> Float[Array, "..."]:
    """The state that enters this shard when every shard maps its state h to a * h + b (matrix: a @ h + b).

    Zeros enter the first shard of `axis_name`. `a` broadcasts against `b`; with `matrix` it is
    [..., k, k] and `b` [..., k, v]. The result has the shape and type of `b`. One pair moves
    ceil(log2(shards)) times, however long the sequence. ValueError for shapes that do not fit.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    _check_map(a.shape, b.shape, matrix)
    n = jax.lax.axis_size(axis_name)
    a, b = (vary_like(x, a, b, jax.lax.axis_index(axis_name)) for x in (a, b))
    times = _matmul if matrix else jnp.multiply
    # `through` maps over this shard and those before it, `before` over the latter only. ppermute
    # gives zeros where nothing is: the map to the state 0, with which the sequence begins.
    through, before, hop = (a, b), None, 1
    while hop < n:
        moves = [(i, i + hop) for i in range(n - hop)]
        received = tuple(jax.lax.ppermute(x, axis_name, moves) for x in through)
        before = received if before is None else compose(times, received, before)
        through = compose(times, received, through)
        hop *= 2
    return vary_like(jnp.zeros_like(b), b) if before is None else before[1].astype(b.dtype)


def _matmul(x, y):
    # States are sums over many tokens: not for the low precision that TPUs use by default.
    return jnp.matmul(x, y, precision="highest")


def _check_map(a: tuple[int, ...], b: tuple[int, ...], matrix: bool) -> None:
    if matrix:
        k = b[-2] if len(b) > 1 else 0
        if a[-2:] != (k, k):
            raise ValueError(f"a {a} must be [..., k, k] for b {b} [..., k, v] (matrix=True)")
        a, b = a[:-2], b[:-2]
    try:
        fits = jnp.broadcast_shapes(a, b) == b
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"a {a} must broadcast to b {b}")


def halo_exchange(
    x: Float[Array, "..."], width: int, axis_name: AxisName, *, axis: int = 1
) -> Float[Array, "..."]:
    """`x` with the last `width` entries of the shard before it in front, along `axis`.

    The first shard of `axis_name` gets zeros: what a causal convolution of width + 1 taps needs.
    ValueError unless 0 <= width <= the length of `axis` in a shard.
    """
    length = x.shape[axis]
    if not 0 <= width <= length:
        raise ValueError(f"width={width} must be between 0 and the {length} entries a shard has")
    n = jax.lax.axis_size(axis_name)
    x = vary_like(x, x, jax.lax.axis_index(axis_name))
    if not width:
        return x
    last = jax.lax.slice_in_dim(x, length - width, length, axis=axis)
    moved = jax.lax.ppermute(last, axis_name, [(i, i + 1) for i in range(n - 1)])
    return jnp.concatenate([moved, x], axis)
