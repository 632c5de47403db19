"""Linear attention and its relatives on a sharded sequence.

A recurrence is run by every shard from a zero state. What a shard does to the state that enters it is
a linear map, and only these maps are exchanged: a matrix or two a head, however long the sequence.
Source: note on TTT as linear attention, sections 6 and 8.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab import linear_attention as la
from jaxlab.arguments import wide_type
from jaxlab.linear_attention.state import first_tokens
from sharding.context.place import check_divides, find_place
from sharding.context.prefix import halo_exchange, prefix_state_exchange

# Methods of jaxlab.linear_attention by name, and the gates they take.
RECURRENCES: dict[str, tuple[Callable, tuple[str, ...]]] = {
    "linear_attention": (la.linear_attention, ("log_decay",)),
    "gla": (la.gla, ("log_decay",)),
    "delta_rule": (la.delta_rule, ("beta",)),
    "gated_delta_rule": (la.gated_delta_rule, ("log_decay", "beta")),
    "kda": (la.kda, ("log_decay", "beta")),
}


def context_recurrence(
    method: str,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h kv"],
    *,
    log_decay: Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
    beta: Float[Array, "b t h"] | None = None,
    mesh: Any = None,
    segment_ids: Int[Array, "b t"] | None = None,
    scale: float | None = None,
    chunk_size: int = 64,
) -> Float[Array, "b t h kv"]:
    """A method of RECURRENCES on global arrays, tokens sharded in natural order: out in v.dtype.

    Arguments as the method's own in jaxlab.linear_attention; `mesh` None is that of `jax.set_mesh`,
    and where no axis splits the sequence the method is simply called. Each shard sends the state of
    its tokens and its map, [k, kv] and a decay or, for the delta rules, a [k, k] matrix a head,
    ceil(log2(shards)) times. The delta rules run on values of width kv + k. ValueError for an unknown
    method, gates it lacks or does not take, and sizes that the mesh does not divide.
    """
    if method not in RECURRENCES:
        raise ValueError(f"method={method!r} must be one of {list(RECURRENCES)}")
    run, names = RECURRENCES[method]
    gates = {"log_decay": log_decay, "beta": beta}
    for name, gate in gates.items():
        missing = gate is None and name in names and method != "linear_attention"
        if missing or (gate is not None and name not in names):
            raise ValueError(f"method={method!r} takes the gates {list(names)}: {name} is wrong")
    options = {"scale": scale, "chunk_size": chunk_size}
    place = find_place(mesh)
    if place is None or q.shape[1] == 0:
        given = {name: gates[name] for name in names}
        return run(q, k, v, **given, segment_ids=segment_ids, **options, return_state=False)[0]
    check_divides(place, *q.shape[:3])
    factor = q.shape[-1] ** -0.5 if scale is None else scale

    def local(q, k, v, log_decay, beta, segment_ids):
        wide, dk = wide_type(v), q.shape[-1]
        given = {n: g for n, g in {"log_decay": log_decay, "beta": beta}.items() if n in names}
        given |= {"segment_ids": segment_ids, "scale": scale, "chunk_size": chunk_size}
        if beta is None:
            out, state = run(q, k, v.astype(wide), **given)
            into = _decay_so_far(q, log_decay, segment_ids, wide)
            reads = q.astype(wide) * (factor * into)
            through, left = into[:, -1][..., None], state.S
        else:  # the map itself is the state of values 0 that began as the identity
            zero = jnp.zeros_like(k, wide)
            start = jnp.zeros((*k.shape[:1], *k.shape[2:], v.shape[-1]), wide)
            eye = jnp.broadcast_to(jnp.eye(dk, dtype=wide), (*start.shape[:3], dk))
            start = jnp.concatenate([start, eye], -1)
            both = jnp.concatenate([v.astype(wide), zero], -1)
            out, state = run(q, k, both, **given, initial_state=start)
            out, reads = jnp.split(out, [v.shape[-1]], -1)
            left, through = jnp.split(state.S, [v.shape[-1]], -1)
        goes_on = jnp.ones(len(q), bool)
        if segment_ids is not None:  # a document that begins a shard starts from zero
            goes_on = halo_exchange(segment_ids, 1, place.tokens)[:, 0] == segment_ids[:, 0]
        keep = goes_on[:, None, None, None]
        through = jnp.where(keep, through, 0)
        entered = prefix_state_exchange(through, left, place.tokens, matrix=beta is not None)
        out = out + jnp.einsum("bthk,bhkv->bthv", reads, jnp.where(keep, entered, 0))
        return out.astype(v.dtype)

    return place.shard(local, q, k, v, log_decay, beta, segment_ids)


def _decay_so_far(q, log_decay, segment_ids, wide) -> jax.Array:
    """[b, t, h, 1 or k]: what is left, at each token, of the state that entered the shard."""
    g = jnp.zeros(q.shape[:3], wide) if log_decay is None else log_decay.astype(wide)
    g = g[..., None] if g.ndim == 3 else g
    if segment_ids is not None:
        g = jnp.where(first_tokens(segment_ids)[..., None], -jnp.inf, g)
    return jnp.exp(jnp.cumsum(g, 1))
