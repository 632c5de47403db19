"""TPU attention: JAX's splash kernel, with tables of blocks made by rule instead of by looking.

The kernel's own mask classes look at every pair of tokens on the host: minutes at 256K tokens. Which
blocks are empty, whole or neither follows from their first and last tokens alone.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab.masks import Rule

_LANES = 128  # of a TPU register: what lengths and head dims must be multiples of
_MOST_BLOCKS = 512  # a side: tables of more do not fit in the scalar memory


def splash_problem(q) -> str:
    """Why the kernel cannot take q [b, t, h, k]; '' if it can."""
    t, d = q.shape[1], q.shape[3]
    if d % _LANES or t % _LANES:
        return f"splash needs a length and a head dim divisible by {_LANES}, got {t} and {d}"
    if jnp.dtype(q.dtype).itemsize > 4:
        return f"splash computes in float32, got {q.dtype}"
    if _block(t) is None:
        return f"splash needs at most {_MOST_BLOCKS} blocks of 128 to 2048 tokens, got {t} tokens"
    return ""


def _block(length: int) -> int | None:
    """Tokens of a block. 2048, whose buffers need a larger xla_tpu_scoped_vmem_limit_kib, at need."""
    fitting = [b for b in (1024, 512, 256, 128, 2048) if length % b == 0]
    return next((b for b in fitting if length // b <= _MOST_BLOCKS), None)


def splash_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t hk k"],
    v: Float[Array, "b t hk k"],
    *,
    causal: bool,
    scale: float,
    segment_ids: Int[Array, "b t"] | None,
    window: int | None,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "b t h k"]:
    """`dense_attention` by the kernel; `interpret` runs it anywhere, slowly."""
    kernel = _kernel(Rule(causal, 1.0, window, softcap), q.shape[1], interpret)
    ids = importlib.import_module(_PACKAGE + "kernel").SegmentIds
    # Heads first, those that share keys together: the kernel is for one key head.
    q = rearrange(q * jnp.asarray(scale, q.dtype), "b t (h g) k -> b h g t k", h=k.shape[2])
    k, v = (rearrange(x, "b t h k -> b h t k") for x in (k, v))
    segments = None if segment_ids is None else ids(segment_ids, segment_ids)
    heads = jax.vmap(kernel, (0, 0, 0, None))
    out = jax.vmap(heads, (0, 0, 0, None if segments is None else 0))(q, k, v, segments)
    return rearrange(out, "b h g t k -> b t (h g) k")


_PACKAGE = "jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_"


def _kernel(rule: Rule, length: int, interpret: bool):
    """The kernel for one key/value head."""
    lib = importlib.import_module(_PACKAGE + "kernel")
    info = importlib.import_module(_PACKAGE + "mask_info").MaskInfo
    block = _block(length)
    assert block
    masked = rule.causal or rule.window is not None
    # Computed by the program: as a constant it would be megabytes of its text.
    places = jnp.arange(length, dtype=jnp.int32) if masked else None

    def allowed(i, j):
        """Of the positions of queries and keys."""
        tests = [j <= i] if rule.causal else []
        if rule.window is not None:
            tests += [i - j < rule.window, j - i < rule.window]
        return functools.reduce(jnp.logical_and, tests)

    by_queries, by_keys = (
        info(following[None], None, kinds[None], None, places)
        for kinds, following in _tables(rule, length, block)
    )
    sizes = lib.BlockSizes(
        block_q=block, block_kv=block, block_q_dq=block, block_kv_dq=block, block_q_dkv=block,
        block_kv_dkv=block,
    )  # fmt: skip
    return lib.SplashAttentionKernel(
        by_queries, by_queries, by_keys,
        block_sizes=sizes, is_mqa=True, save_residuals=False,
        mask_value=lib.DEFAULT_MASK_VALUE, attn_logits_soft_cap=rule.softcap,
        residual_checkpoint_name="attn_out", mask_function=allowed if masked else None,
        interpret=interpret,
    )  # fmt: skip


@functools.lru_cache(maxsize=16)
def _tables(rule: Rule, length: int, block: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Kinds of blocks and the blocks to fetch, walked by queries and by keys, in small types."""
    kinds = block_kinds(rule, length, block)
    small = np.int8 if len(kinds) < 128 else np.int16
    return tuple(
        (kinds.astype(np.int8), next_blocks(kinds, by_keys).astype(small))
        for by_keys in (False, True)
    )


def block_kinds(rule: Rule, length: int, block: int) -> np.ndarray:
    """int [n, n]: 0 where no query of the block sees a key of it, 2 where each sees all, else 1."""
    first = np.arange(0, length, block)
    # Of query minus key, in a block: the least and the most.
    least = first[:, None] - first[None] - (block - 1)
    most = least + 2 * (block - 1)
    low = 0 if rule.causal else -length
    high = length
    if rule.window is not None:
        low, high = max(low, 1 - rule.window), rule.window - 1
    some = (most >= low) & (least <= high)
    return some + (some & (least >= low) & (most <= high)).astype(int)


def next_blocks(kinds: np.ndarray, by_keys: bool) -> np.ndarray:
    """int [n, n]: at each place of the walk, the block to fetch for the next one that is not empty.

    A walk goes by queries, then by keys, and gives blocks of keys; `by_keys` the other way round.
    """
    walk = (kinds.T if by_keys else kinds).reshape(-1) > 0
    there = np.flatnonzero(walk)
    following = there[np.searchsorted(there, np.arange(walk.size)) % len(there)]
    blocks = (following % len(kinds)).reshape(kinds.shape)
    return blocks.T if by_keys else blocks
