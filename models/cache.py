"""The decoding states of softmax attention: keys and values of the tokens seen, all or the last."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab.attention import cached_attention
from sharding.rules import constrain

# A position after every query's, so that the causal rule hides the slot.
NOWHERE = jnp.iinfo(jnp.int32).max


class KVCache(NamedTuple):
    """Slots filled in order, a step the same slots in all rows, so that appending is one slice."""

    keys: Float[Array, "b hk s k"]
    values: Float[Array, "b hk s k"]
    positions: Int[Array, "b s"]  # NOWHERE in slots without a token
    used: Int[Array, ""]  # slots

    @classmethod
    def empty(cls, batch: int, heads: int, length: int, head_dim: int, dtype) -> "KVCache":
        """`length` slots without a token."""
        zeros = jnp.zeros((batch, heads, length, head_dim), dtype)
        nowhere = jnp.full((batch, length), NOWHERE, jnp.int32)
        return cls(zeros, zeros, nowhere, jnp.zeros((), jnp.int32))

    def append(
        self,
        keys: Float[Array, "b t hk k"],
        values: Float[Array, "b t hk k"],
        positions: Int[Array, "b t"],
    ) -> "KVCache":
        """With t tokens more; position NOWHERE is padding."""

        def put(cache, new, axis):
            new = new.astype(cache.dtype)
            return jax.lax.dynamic_update_slice_in_dim(cache, new, self.used, axis)

        place = lambda x: constrain(x, "batch", "act_kv_heads", "cache", None)  # noqa: E731
        keys, values = (rearrange(x, "b t h k -> b h t k") for x in (keys, values))
        return KVCache(
            place(put(self.keys, keys, 2)),
            place(put(self.values, values, 2)),
            put(self.positions, positions, 1),
            self.used + positions.shape[1],
        )

    def attend(
        self, attention: Callable, q: Float[Array, "b t h k"], positions: Int[Array, "b t"]
    ) -> Float[Array, "b t h k"]:
        """Causal attention to all it holds: by `attention`, or for one token in the cache's layout."""
        if q.shape[1] == 1:
            return cached_attention(q, self.keys, self.values, positions, self.positions)
        keys, values = (rearrange(x, "b h s k -> b s h k") for x in (self.keys, self.values))
        return attention(
            q, keys, values, causal=True, q_positions=positions, k_positions=self.positions
        )


class RingCache(NamedTuple):
    """The last keys and values of each row, the one of position p in slot p mod size.

    Rows may have different numbers of tokens; their positions follow each other without a gap.
    """

    keys: Float[Array, "b hk s k"]
    values: Float[Array, "b hk s k"]
    positions: Int[Array, "b s"]  # NOWHERE in slots without a token

    @classmethod
    def empty(cls, batch: int, heads: int, size: int, head_dim: int, dtype) -> "RingCache":
        """`size` slots without a token."""
        zeros = jnp.zeros((batch, heads, size, head_dim), dtype)
        return cls(zeros, zeros, jnp.full((batch, size), NOWHERE, jnp.int32))

    def append(
        self,
        keys: Float[Array, "b t hk k"],
        values: Float[Array, "b t hk k"],
        positions: Int[Array, "b t"],
    ) -> "RingCache":
        """With t tokens more, of which it keeps the last; position NOWHERE is padding."""
        size = self.positions.shape[1]
        real = positions != NOWHERE
        newest = jnp.max(jnp.where(real, positions, -1), 1, keepdims=True)
        kept = real & (positions > newest - size)
        slot = jnp.where(kept, positions % size, size)  # slot `size` does not exist: dropped
        rows = jnp.arange(len(slot))[:, None]

        def put(cache, new):
            return cache.at[rows, :, slot].set(new.astype(cache.dtype), mode="drop")

        place = lambda x: constrain(x, "batch", "act_kv_heads", "cache", None)  # noqa: E731
        return RingCache(
            place(put(self.keys, keys)),
            place(put(self.values, values)),
            self.positions.at[rows, slot].set(positions, mode="drop"),
        )

    def attend(
        self,
        attention: Callable,
        q: Float[Array, "b t h k"],
        keys: Float[Array, "b t hk k"],
        values: Float[Array, "b t hk k"],
        positions: Int[Array, "b t"],
        seen: Int[Array, "b t"],
    ) -> tuple[Float[Array, "b t h k"], "RingCache"]:
        """Causal attention of new tokens to the `size` last ones, themselves included; the cache after.

        `seen` are their positions as keys: NOWHERE for padding.
        """
        after = self.append(keys, values, seen)
        if q.shape[1] == 1:
            return cached_attention(q, after.keys, after.values, positions, after.positions), after
        old = (rearrange(x, "b h s k -> b s h k") for x in (self.keys, self.values))
        keys, values = (
            jnp.concatenate([a, b.astype(a.dtype)], 1)
            for a, b in zip(old, (keys, values), strict=True)
        )
        out = attention(
            q, keys, values, causal=True, window=self.positions.shape[1], q_positions=positions,
            k_positions=jnp.concatenate([self.positions, seen], 1),
        )  # fmt: skip
        return out, after
