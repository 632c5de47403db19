"""One affine map a chunk: what every method of this package becomes, and how the maps are run.

A chunk reads out = local + read @ S and leaves S' = carry S + write, with S the state that enters
it. Whatever is quadratic in the chunk or reads its tokens is a product batched over a group of chunks;
only S' = carry S + write is sequential. Arrays: [n, b, h, c, k], n chunks of c tokens first.
The gradient stores inputs and states between groups, and makes the rest again, group by group.
Source: note on TTT as linear attention, sections 5.3, 6 and 9.
"""

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from jaxlab import affine
from jaxlab.varying import vary_like

# Chunks whose maps are in memory at once.
GROUP = 4


class AffineChunks(NamedTuple):
    """The maps of n chunks."""

    carry: jax.Array  # [n, b, h, ...], whatever `times` of the method takes
    write: jax.Array  # [n, b, h, k, v]
    read: jax.Array  # [n, b, h, c, k]
    local: jax.Array  # [n, b, h, c, v]

    def walk(self, times: Callable, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(state after the chunk, what `out` takes of it)."""
        return times(self.carry, state) + self.write, state

    def out(self, entering: jax.Array) -> jax.Array:
        return self.local + self.read @ entering

    def affine(self) -> "AffineChunks":
        return self


class DeltaChunks(NamedTuple):
    """The maps of n chunks of a delta rule, which writes u = solved_v - solved_k @ S.

    Walked one after another they need no carry [k, k], a third of the work; `affine` has it.
    """

    whole: jax.Array  # [n, b, h, 1 or k, 1], the decay of the chunk
    inner: jax.Array  # [n, b, h, c, c]
    read: jax.Array  # [n, b, h, c, k]
    write: jax.Array  # [n, b, h, c, k]
    solved_v: jax.Array  # [n, b, h, c, v]
    solved_k: jax.Array  # [n, b, h, c, k]

    def walk(self, times: Callable, state: jax.Array) -> tuple[jax.Array, tuple]:
        """(state after the chunk, what `out` takes of it)."""
        u = self.solved_v - self.solved_k @ state
        return self.whole * state + self.write.mT @ u, (state, u)

    def out(self, walked: tuple) -> jax.Array:
        entering, u = walked
        return self.read @ entering + self.inner @ u

    def affine(self) -> AffineChunks:
        eye = jnp.eye(self.read.shape[-1], dtype=self.read.dtype)
        carry = eye * self.whole - self.write.mT @ self.solved_k
        read = self.read - self.inner @ self.solved_k
        return affine_chunks(carry, self.inner, read, self.write, self.solved_v)


def affine_chunks(carry, inner, read, write, v) -> AffineChunks:
    """From inner [c, c] (what token t reads of value i), and read and write [c, k] of each token."""
    return AffineChunks(carry, write.mT @ v, read, inner @ v)


scale_rows: Callable = operator.mul  # carry [..., 1 or k, 1]: a decay for each row of the state
compose: Callable = jnp.matmul  # carry [..., k, k]


def mix_buffers(carry: jax.Array, state: jax.Array) -> jax.Array:
    """carry [..., 2, 2] on two matrices stacked in the rows of the state, [..., 2k, v]."""
    rows, columns = state.shape[-2:]
    out = carry @ state.reshape(*state.shape[:-2], 2, rows // 2 * columns)
    return out.reshape(*out.shape[:-2], rows, columns)


def run_chunks(
    prepare: Callable, times: Callable, chunks, start: jax.Array, impl: str
) -> tuple[jax.Array, jax.Array]:
    """(out [n, b, h, c, v], state after the last chunk) of chunks entered with `start`.

    `prepare(chunks of a group) -> AffineChunks | DeltaChunks`; `times` multiplies a carry with a state or with
    another carry. The gradient makes one group of maps after another again.
    """
    n = jax.tree.leaves(chunks)[0].shape[0]
    groups = -(-n // GROUP)
    chunks = jax.tree.map(lambda x: x.reshape(groups, n // groups, *x.shape[1:]), chunks)
    start = vary_like(start, chunks)
    flat = lambda x: x.reshape(n, *x.shape[2:])  # noqa: E731

    def group(state, part):
        maps = prepare(part)
        state, walked = jax.lax.scan(lambda s, chunk: chunk.walk(times, s), state, maps)
        return state, maps.out(walked)

    if impl != "scan":
        final, out = jax.lax.scan(jax.checkpoint(group, prevent_cse=False), start, chunks)
        return flat(out), final

    # Made again too: the gradient of an associative scan in shard_map crashes jaxlib 0.11.2.
    @jax.checkpoint
    def states(carry, write, start):
        total = jax.lax.associative_scan(functools.partial(affine.compose, times), (carry, write))
        return jnp.concatenate([start[None], times(total[0], start) + total[1]])

    as_affine = jax.checkpoint(lambda part: prepare(part).affine(), prevent_cse=False)
    maps = jax.tree.map(flat, jax.lax.map(as_affine, chunks))
    entered = states(maps.carry, maps.write, start)
    return maps.out(entered[:-1]), entered[-1]


def cut(x: jax.Array, size: int, fill: float = 0.0) -> jax.Array:
    """[b, t, h, ...] as [n, b, h, size, ...], filled up with `fill` to groups of as many chunks."""
    n = -(-x.shape[1] // size)
    groups = -(-n // GROUP)
    n = groups * -(-n // groups)
    widths = [(0, 0), (0, n * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
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
