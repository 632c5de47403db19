"""One affine map a chunk: what every method of this package becomes, and how the maps are run.

A chunk reads out = local + read @ S and leaves S' = carry S + write, with S the state that enters
it. Whatever is quadratic in the chunk or reads its tokens is a product batched over all chunks;
only S' = carry S + write is sequential. Arrays: [n, b, h, c, k], n chunks of c tokens first.
The gradient stores the inputs and the states between chunks, and recomputes the rest.
Source: note on TTT as linear attention, sections 5.3, 6 and 9.
"""

import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from jaxlab.varying import vary_like

STATE_NAME = "linear_attention_state"


class AffineChunks(NamedTuple):
    """The maps of all chunks; `times` multiplies a carry with a state or with another carry."""

    times: Callable
    carry: jax.Array  # [n, b, h, ...], whatever `times` takes
    write: jax.Array  # [n, b, h, k, v]
    read: jax.Array  # [n, b, h, c, k]
    local: jax.Array  # [n, b, h, c, v]


def affine_chunks(times, carry, inner, read, write, v) -> AffineChunks:
    """From inner [c, c] (what token t reads of value i), and read and write [c, k] of each token."""
    return AffineChunks(times, carry, write.mT @ v, read, inner @ v)


scale_rows: Callable = operator.mul  # carry [..., 1 or k, 1]: a decay for each row of the state
compose: Callable = jnp.matmul  # carry [..., k, k]


def mix_buffers(carry: jax.Array, state: jax.Array) -> jax.Array:
    """carry [..., 2, 2] on two matrices stacked in the rows of the state, [..., 2k, v]."""
    rows, columns = state.shape[-2:]
    out = carry @ state.reshape(*state.shape[:-2], 2, rows // 2 * columns)
    return out.reshape(*out.shape[:-2], rows, columns)


def run_chunks(maps: AffineChunks, start: jax.Array, impl: str) -> tuple[jax.Array, jax.Array]:
    """(out [n, b, h, c, v], state after the last chunk) of chunks entered with `start`."""
    start = vary_like(start, maps.carry, maps.write)
    if impl == "scan":

        def combine(first, second):
            (a1, x1), (a2, x2) = first, second
            return maps.times(a2, a1), maps.times(a2, x1) + x2

        total = jax.lax.associative_scan(combine, (maps.carry, maps.write))
        after = maps.times(total[0], start) + total[1]
        entering = checkpoint_name(jnp.concatenate([start[None], after[:-1]]), STATE_NAME)
        final = after[-1]
    else:

        def body(state, step):
            state = checkpoint_name(state, STATE_NAME)
            return maps.times(step[0], state) + step[1], state

        final, entering = jax.lax.scan(body, start, (maps.carry, maps.write))
    return maps.local + maps.read @ entering, final


def remat(fn: Callable) -> Callable:
    """`fn` whose gradient keeps its arguments and the states between chunks only.

    Besides memory, this avoids a crash of jaxlib 0.11.2: the gradient of an associative scan inside
    shard_map.
    """
    keep = jax.checkpoint_policies.save_only_these_names(STATE_NAME)
    return jax.checkpoint(fn, policy=keep)


def cut(x: jax.Array, size: int, fill: float = 0.0) -> jax.Array:
    """[b, t, h, ...] as [n, b, h, size, ...], the last chunk filled up with `fill`."""
    widths = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, widths, constant_values=fill)
    return rearrange(x, "b (n c) h ... -> n b h c ...", c=size)


def uncut(x: jax.Array, length: int) -> jax.Array:
    """[n, b, h, c, v] as [b, t, h, v], the first `length` tokens."""
    return rearrange(x, "n b h c v -> b (n c) h v")[:, :length]


def run_tokens(token: Callable, start, inputs):
    """(out [b, t, h, v], last state) of `token(state, inputs of a token) -> (state, out)`."""
    start = jax.tree.map(lambda x: vary_like(x, inputs), start)
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), inputs)
    final, out = jax.lax.scan(token, start, by_time)
    return jnp.moveaxis(out, 0, 1), final
