"""Linear attention and its relatives on a sharded sequence.

A recurrence is run by every shard from a zero state, the first from the initial one. What a shard does
to the state that enters it is a linear map, and only these maps are exchanged: a matrix or two a head,
however long the sequence. Source: note on TTT as linear attention, sections 6 and 8.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab import linear_attention as la
from jaxlab.arguments import wide_type
from jaxlab.linear_attention import LinAttnState
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
PER_TOKEN = ("log_decay", "beta", "momentum", "rate_in", "rate_out", "segment_ids")


class Shard(NamedTuple):
    """A shard's tokens as a map of the state h that enters: out + read(h), and through h + left."""

    out: jax.Array  # [b, t, h, v]
    left: jax.Array  # [b, h, n, v]
    through: jax.Array  # [b, h, n, n], or [b, h, n, 1] if diagonal
    matrix: bool
    read: Callable[[jax.Array], jax.Array]


def context_recurrence(
    method: str,
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h kv"],
    *,
    mesh: Any = None,
    segment_ids: Int[Array, "b t"] | None = None,
    initial_state: Float[Array, "b h k kv"] | LinAttnState | None = None,
    return_state: bool = True,
    **options: Any,
) -> tuple[Float[Array, "b t h kv"], LinAttnState | None]:
    """A method of RECURRENCES on global arrays, tokens sharded in natural order: (out, final state).

    Arguments, options, results and errors are the method's own in jaxlab.linear_attention; None is
    absent. `mesh` None is that of `jax.set_mesh`, and where no axis splits the sequence the method is
    simply called. Each shard sends the state of its tokens and its map ceil(log2(shards)) times: [k, kv]
    and a decay a head; with momentum two such and four numbers; for the delta rules a [k, k] matrix
    beside [k, kv], and they run on values of width kv + k. The final state is one sum more. ValueError
    for an unknown method or option, a missing gate, and sizes that the mesh does not divide.
    """
    if method not in RECURRENCES:
        raise ValueError(f"method={method!r} must be one of {list(RECURRENCES)}")
    run, _ = RECURRENCES[method]
    options = {name: x for name, x in options.items() if x is not None}
    _check_options(method, run, options)
    more = {"segment_ids": segment_ids, "initial_state": initial_state}
    place = find_place(mesh)
    if place is None or q.shape[1] == 0:
        return run(q, k, v, **options, **more, return_state=return_state)
    check_divides(place, *q.shape[:3])
    # The method's own errors, of the global shapes; and what its state consists of.
    after = jax.eval_shape(lambda: run(q, k, v, **options, **more)[1])
    start = _start(initial_state, after)
    arrays = {name: x for name, x in (options | more).items() if name in PER_TOKEN}
    static = {name: x for name, x in options.items() if name not in PER_TOKEN}
    summarise = {"linear_attention": _master, "gla": _channels}.get(method, _delta)
    last = place.size(place.tokens) - 1

    def local(q, k, v, arrays, start: LinAttnState):
        index = jax.lax.axis_index(place.tokens)
        begin = jax.tree.map(lambda x: jnp.where(index == 0, x, 0), start)
        shard = summarise(run, q, k, v.astype(wide_type(v)), arrays, static, begin)
        goes_on = jnp.ones(len(q), bool)
        ids = arrays["segment_ids"]
        if ids is not None:  # a document that begins a shard starts from zero
            goes_on = halo_exchange(ids, 1, place.tokens)[:, 0] == ids[:, 0]
        keep = goes_on[:, None, None, None]
        through = jnp.where(keep, shard.through, 0)
        entered = prefix_state_exchange(through, shard.left, place.tokens, matrix=shard.matrix)
        entered = jnp.where(keep, entered, 0)
        out, state = shard.out + shard.read(entered), None
        if return_state:
            passed = through @ entered if shard.matrix else through * entered
            final = jnp.where(index == last, shard.left + passed, 0)
            state = jax.lax.psum(final, place.tokens)
        normalize = static.get("normalize", False)
        if normalize:
            out = out[..., :-1] / (out[..., -1:] + 1e-10)
        if state is not None:
            state = _unpack(state, start, v.shape[-1] + normalize, normalize)
        return out.astype(v.dtype), state

    return place.shard(local, q, k, v, arrays, start, state=True)


def _check_options(method: str, run: Callable, options: dict[str, Any]) -> None:
    names = inspect.signature(run).parameters
    allowed = [n for n in names if n not in ("q", "k", "v")]
    needed = [n for n in allowed if names[n].default is inspect.Parameter.empty]
    for name in options:
        if name not in allowed:
            raise ValueError(f"method={method!r} has no argument {name}; allowed: {allowed}")
    for name in needed:
        if name not in options:
            raise ValueError(f"{name} is missing: method={method!r} needs {needed}")


def _start(initial, after: LinAttnState) -> LinAttnState:
    """The initial state in the structure and types of the final one, what is absent as zeros."""
    given = initial if isinstance(initial, LinAttnState) else LinAttnState(initial)  # type: ignore[arg-type]

    def part(x, like) -> Any:
        if like is None:
            return None
        return jnp.zeros(like.shape, like.dtype) if x is None else jnp.asarray(x, like.dtype)

    return LinAttnState(*map(part, given, after))


def _master(run, q, k, v, arrays, static, begin: LinAttnState) -> Shard:
    """Linear attention: the state is S or, with momentum, S and M, mixed by a 2 x 2 matrix a head."""
    options = {"visibility": "token", "feature_map": "identity", **static}
    normalize = options.pop("normalize", False)
    factor = options.pop("scale", q.shape[-1] ** -0.5)
    phi = la.feature_map(options["feature_map"])
    if normalize:  # z is the state of a value that is always 1
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
        begin = LinAttnState(jnp.concatenate([begin.S, begin.z[..., None]], -1))  # type: ignore[index]
    out, state = run(
        q, k, v, **arrays, **options, scale=factor, initial_state=begin._replace(z=None)
    )
    parts = [x for x in state[:2] if x is not None]
    left = jnp.stack(parts, 2)
    # The map is what the recurrence itself makes of the states (1, 0) and (0, 1), nothing written.
    n = len(parts)
    wide = v.dtype
    unit = jnp.ones_like(q[..., :1], wide)
    eye = jnp.broadcast_to(
        jnp.eye(n, dtype=wide)[:, None, None, None], (n, *begin.S.shape[:2], 1, n)
    )
    into, end = run(
        unit, unit, jnp.zeros((*q.shape[:3], n), wide), **arrays,
        **options | {"feature_map": "identity"}, scale=1.0, initial_state=LinAttnState(*eye),
    )  # fmt: skip
    through = jnp.concatenate([x for x in end[:2] if x is not None], 2)

    def read(entered):
        entered = entered.reshape(left.shape)
        return jnp.einsum("bthk,bthn,bhnkv->bthv", phi(q.astype(wide)) * factor, into, entered)

    return Shard(out, rearrange(left, "b h n k v -> b h n (k v)"), through, True, read)


def _unpack(state, start: LinAttnState, width: int, normalize: bool) -> LinAttnState:
    """The final state [b, h, n, v], or [b, h, buffers, k * v], in the structure of the initial one."""
    if state.shape[2:] != start.S.shape[2:] or normalize:
        s, *m = jnp.moveaxis(state.reshape(*state.shape[:3], -1, width), 2, 0)
        if normalize:
            return start._replace(S=s[..., :-1], z=s[..., -1])
        return start._replace(S=s, M=m[0] if m else start.M)
    return start._replace(S=state)


def _channels(run, q, k, v, arrays, static, begin: LinAttnState) -> Shard:
    """GLA: a decay for each row of the state."""
    out, state = run(q, k, v, **arrays, **static, initial_state=begin.S)
    g = arrays["log_decay"].astype(v.dtype)
    if arrays["segment_ids"] is not None:
        g = jnp.where(first_tokens(arrays["segment_ids"])[..., None], -jnp.inf, g)
    into = jnp.exp(jnp.cumsum(g, 1))
    reads = q.astype(v.dtype) * into * static.get("scale", q.shape[-1] ** -0.5)
    read = lambda entered: jnp.einsum("bthk,bhkv->bthv", reads, entered)  # noqa: E731
    return Shard(out, state.S, into[:, -1][..., None], False, read)


def _delta(run, q, k, v, arrays, static, begin: LinAttnState) -> Shard:
    """Delta rules: the map itself is the state of values 0 that began as the identity."""
    dk, dv = q.shape[-1], v.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(dk, dtype=v.dtype), (*begin.S.shape[:3], dk))
    both = jnp.concatenate([v, jnp.zeros_like(k, v.dtype)], -1)
    start = jnp.concatenate([begin.S, eye], -1)
    out, state = run(q, k, both, **arrays, **static, initial_state=start)
    out, reads = jnp.split(out, [dv], -1)
    left, through = jnp.split(state.S, [dv], -1)
    read = lambda entered: jnp.einsum("bthk,bhkv->bthv", reads, entered)  # noqa: E731
    return Shard(out, left, through, True, read)
