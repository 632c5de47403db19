"""The state of a linear-attention layer, and what is checked before anything is computed."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class LinAttnState(NamedTuple):
    """What a token leaves to the next: constant size, a scan carry and a decode cache."""

    S: Float[Array, "b h k kv"]
    M: Float[Array, "b h k kv"] | None = None  # momentum buffer
    z: Float[Array, "b h k"] | None = None  # normaliser: the sum of features of k, unscaled


def init_state(
    batch: int,
    heads: int,
    dk: int,
    dv: int,
    *,
    momentum: bool = False,
    normalize: bool = False,
    dtype=jnp.float32,
) -> LinAttnState:
    """Zeros: S and, if asked for, M [batch, heads, dk, dv] and z [batch, heads, dk]."""
    matrix = jnp.zeros((batch, heads, dk, dv), dtype)
    z = jnp.zeros((batch, heads, dk), dtype) if normalize else None
    return LinAttnState(matrix, matrix if momentum else None, z)


def start_state(initial, q, v, dk: int, dtype, *, momentum=False, normalize=False) -> LinAttnState:
    """`initial` (None, S, or a LinAttnState) in `dtype`, absent parts that are needed as zeros."""
    b, heads, dv = q.shape[0], q.shape[-2], v.shape[-1]
    state = LinAttnState(None) if initial is None else initial  # type: ignore[arg-type]
    if not isinstance(state, LinAttnState):
        state = LinAttnState(state)
    shape = {"S": (b, heads, dk, dv), "M": (b, heads, dk, dv), "z": (b, heads, dk)}
    needed = {"S": True, "M": momentum, "z": normalize}
    for name, x in state._asdict().items():
        if x is None and needed[name]:
            state = state._replace(**{name: jnp.zeros(shape[name], dtype)})
        elif x is not None and np.shape(x) != shape[name]:
            raise ValueError(f"initial_state.{name}={np.shape(x)} must be {shape[name]}")
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), state)


def check_inputs(
    q, k, v, *, token_gates=None, channel_gates=None, optional=False, steps=False
) -> None:
    """Ranks, shapes and types of q, k [b, t, h, k], v [b, t, h, v] and gates; no t if `steps`.

    Gates may be None if `optional`. TypeError unless q, k, v are floating;
    ValueError names the argument that does not fit.
    """
    axes, letters = (2, "b h") if steps else (3, "b t h")
    for name, x in {"q": q, "k": k, "v": v}.items():
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(f"{name} has dtype {jnp.result_type(x)}; it must be floating")
        if np.ndim(x) != axes + 1:
            raise ValueError(f"{name}={np.shape(x)} must have {axes + 1} axes: [{letters} width]")
    want = {"k": q.shape, "v": (*q.shape[:-1], v.shape[-1])}
    gates = {**(token_gates or {}), **(channel_gates or {})}
    want |= {name: q.shape[:-1] for name in token_gates or {}}
    want |= {name: q.shape for name in channel_gates or {}}
    for name, x in {"k": k, "v": v, **gates}.items():
        if x is None and optional:
            continue
        if x is None or np.shape(x) != want[name]:
            got = None if x is None else np.shape(x)
            raise ValueError(f"{name}={got} must be {want[name]} beside q={q.shape}")


def check_form(q, impl, allowed: tuple[str, ...], chunk_size, segment_ids) -> None:
    """ValueError for an unknown `impl`, a `chunk_size` below 1 or segments unlike [b, t]."""
    if impl not in allowed:
        raise ValueError(f"impl={impl!r} must be one of {list(allowed)}")
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int | np.integer):
        raise ValueError(f"chunk_size={chunk_size!r} must be an int, at least 1")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    if segment_ids is not None and np.shape(segment_ids) != q.shape[:2]:
        raise ValueError(f"segment_ids={np.shape(segment_ids)} must be {q.shape[:2]}")


def first_tokens(segment_ids) -> jax.Array:
    """[b, t, 1]: whether a token starts a new segment; the first token of all never does."""
    ids = jnp.asarray(segment_ids)
    changed = ids[:, 1:] != ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (1, 0)))[..., None]
