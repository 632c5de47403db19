"""Zigzag order of tokens, with which every rank of a causal ring has the same work.

The sequence is cut into 2 * ring blocks; rank r holds blocks r and 2 * ring - 1 - r. Source: papers'
note on UPipe, section 3.1.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Shaped


def natural_index(places: Any, seq_len: int, ring: int) -> Any:
    """Natural index of the tokens at `places` of the zigzag order; integers, NumPy's or JAX's."""
    block = seq_len // (2 * ring)
    rank, within = places // (2 * block), places % (2 * block)
    # Numbers 0 and 1 for the first and the second block of a rank, to choose by arithmetic.
    second = within // block
    start = rank + second * (2 * ring - 1 - 2 * rank)
    return start * block + within % block


def zigzag_permutation(seq_len: int, ring: int) -> np.ndarray:
    """int32 [seq_len]: the natural index of the token at every place; ValueError unless 2 * ring divides."""
    check_zigzag(seq_len, ring)
    return natural_index(np.arange(seq_len, dtype=np.int32), seq_len, ring)


def zigzag_shard(x: Shaped[Array, "..."], ring: int, *, axis: int = 1) -> Shaped[Array, "..."]:
    """`x` put into zigzag order along `axis`. ValueError unless 2 * ring divides its length."""
    check_zigzag(x.shape[axis], ring)
    blocks = rearrange(jnp.moveaxis(x, axis, 0), "(n c) ... -> n c ...", n=2 * ring)
    # Pairs (r, 2 ring - 1 - r): the first half beside the second, turned round.
    pairs = jnp.stack([blocks[:ring], blocks[: ring - 1 : -1]], 1)
    return jnp.moveaxis(rearrange(pairs, "r two c ... -> (r two c) ..."), 0, axis)


def zigzag_unshard(x: Shaped[Array, "..."], ring: int, *, axis: int = 1) -> Shaped[Array, "..."]:
    """`x` taken out of zigzag order: the inverse of `zigzag_shard`."""
    check_zigzag(x.shape[axis], ring)
    pairs = rearrange(jnp.moveaxis(x, axis, 0), "(r two c) ... -> r two c ...", r=ring, two=2)
    blocks = jnp.concatenate([pairs[:, 0], pairs[::-1, 1]])
    return jnp.moveaxis(rearrange(blocks, "n c ... -> (n c) ..."), 0, axis)


def check_zigzag(seq_len: int, ring: int, context: int = 1) -> None:
    """ValueError, naming what would work, unless 2 * ring * context divides the length."""
    if ring < 1:
        raise ValueError(f"ring={ring} must be at least 1")
    whole = 2 * ring * context
    if seq_len < 1 or seq_len % whole:
        by = f"2 * ring={ring}" + (f" * context={context}" if context > 1 else "")
        raise ValueError(
            f"seq_len={seq_len} is not divisible by {by} = {whole} (zigzag order); "
            f"nearest: {nearest_multiples(seq_len, whole)}"
        )


def nearest_multiples(size: int, of: int) -> list[int]:
    """The multiples of `of` on both sides of `size`, positive ones."""
    return sorted({max(size // of, 1) * of, (size // of + 1) * of})
