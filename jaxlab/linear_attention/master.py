"""Linear attention with decay, momentum and rates: the recurrence that serves them all.

M = mu M + k^T (ein v); S = lam S + eout M; out = q S, or q times the S before this token.
Source: note on TTT as linear attention, section 5; linear attention: Katharopoulos et al., 2020;
scalar decay: RetNet, Mamba-2.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.arguments import wide_type
from jaxlab.linear_attention.chunks import (
    AffineChunks,
    affine_chunks,
    cut,
    mix_buffers,
    run_chunks,
    run_tokens,
    scale_rows,
    uncut,
)  # fmt: skip
from jaxlab.linear_attention.features import SIGNED, feature_map
from jaxlab.linear_attention.state import (
    LinAttnState,
    check_form,
    check_inputs,
    first_tokens,
    start_state,
)
from jaxlab.linear_attention.triangular import decay_logs, momentum_coefficients

VISIBILITY = ("token", "exclusive")


class Tokens(NamedTuple):
    """One or all tokens, ready for the recurrence: mapped, scaled, rates without momentum in v."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None
    momentum: jax.Array | None
    rate_out: jax.Array | None  # None without momentum


def linear_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h kv"],
    *,
    log_decay: Float[Array, "b t h"] | None = None,
    momentum: Float[Array, "b t h"] | None = None,
    rate_in: Float[Array, "b t h"] | None = None,
    rate_out: Float[Array, "b t h"] | None = None,
    scale: float | None = None,
    initial_state: Float[Array, "b h k kv"] | LinAttnState | None = None,
    visibility: str = "token",
    impl: str = "chunkwise",
    chunk_size: int = 64,
    segment_ids: Int[Array, "b t"] | None = None,
    feature_map: str | Callable = "identity",
    normalize: bool = False,
    return_state: bool = True,
) -> tuple[Float[Array, "b t h kv"], LinAttnState | None]:
    """(out in v.dtype, final state) of linear attention on phi(q) * scale, phi(k), v.

    M = momentum M + k^T (rate_in v), S = exp(log_decay) S + rate_out M, out = q S; what is absent
    is no decay, no momentum and rates 1. `scale` None is k**-0.5. Visibility "exclusive" reads the
    state before the token. All is computed and carried in float32, float64 when v is.

    `impl` changes speed, not numbers: "chunkwise" (a scan over chunk states), "scan" (an associative
    scan over them), "parallel" (a single chunk: quadratic), "recurrent" (token by token). A gradient
    stores a state every few chunks, "scan" every chunk, "recurrent" every token. Any
    chunk_size >= 1 will do.

    `initial_state` is S or a LinAttnState, whose structure is kept; a z that no normaliser reads is
    handed back as it came. Where `segment_ids` changes, the state is zeroed before the token.
    `normalize` divides by q . z + 1e-10, z = exp(log_decay) z + phi(k), for a non-negative map.
    A positive log_decay is legal, nothing is clamped. ValueError for shapes, names and combinations
    that do not fit, TypeError unless q, k, v are floating. Source: the note, sections 5 and 10.1.
    """
    gates = dict(log_decay=log_decay, momentum=momentum, rate_in=rate_in, rate_out=rate_out)
    check_inputs(q, k, v, token_gates=gates, optional=True)
    check_form(q, impl, ("recurrent", "chunkwise", "scan", "parallel"), chunk_size, segment_ids)
    phi = _check_reading(visibility, feature_map, normalize, gates)
    dtype = wide_type(v)
    state = _start(initial_state, q, k, v, phi, momentum, normalize)
    length = q.shape[1]
    size = max(length if impl == "parallel" else min(chunk_size, length), 1)
    exclusive = visibility == "exclusive"

    def run(q, k, v, gates, segment_ids, state):
        tokens = _tokens(q, k, v, gates, scale, phi, state, normalize, dtype)
        tokens = _reset(tokens, segment_ids, exclusive)
        buffers = _pack(state, tokens, normalize)
        if impl == "recurrent":
            out, buffers = run_tokens(_token_step(exclusive), buffers, tokens)
        else:
            out, buffers = _by_chunks(tokens, buffers, impl, size, exclusive)
        return _unpack(out, buffers, state, normalize, v.dtype)

    if not length:
        return jnp.zeros_like(v), state if return_state else None
    out, state = run(q, k, v, gates, segment_ids, state)
    return out, state if return_state else None


def linear_attention_step(
    state: LinAttnState,
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h kv"],
    *,
    log_decay: Float[Array, "b h"] | None = None,
    momentum: Float[Array, "b h"] | None = None,
    rate_in: Float[Array, "b h"] | None = None,
    rate_out: Float[Array, "b h"] | None = None,
    scale: float | None = None,
    visibility: str = "token",
    feature_map: str | Callable = "identity",
    normalize: bool = False,
) -> tuple[LinAttnState, Float[Array, "b h kv"]]:
    """(state, out) after one token: `linear_attention` for decoding, with constant memory.

    Arguments, types and errors are those of `linear_attention`, without t.
    """
    gates = dict(log_decay=log_decay, momentum=momentum, rate_in=rate_in, rate_out=rate_out)
    check_inputs(q, k, v, token_gates=gates, optional=True, steps=True)
    phi = _check_reading(visibility, feature_map, normalize, gates)
    dtype = wide_type(v)
    state = _start(state, q, k, v, phi, momentum, normalize)
    tokens = _tokens(q, k, v, gates, scale, phi, state, normalize, dtype)
    buffers = _pack(state, tokens, normalize)
    buffers, out = _token_step(visibility == "exclusive")(buffers, tokens)
    out, state = _unpack(out, buffers, state, normalize, v.dtype)
    return state, out


def _check_reading(visibility, name, normalize, gates) -> Callable:
    if visibility not in VISIBILITY:
        raise ValueError(f"visibility={visibility!r} must be one of {list(VISIBILITY)}")
    phi = feature_map(name)
    if normalize:
        if name in SIGNED:
            raise ValueError(
                f"normalize=True needs a non-negative feature_map, not {name!r}: "
                "with signs the sum of the weights can be zero"
            )
        used = [x for x in ("momentum", "rate_in", "rate_out") if gates[x] is not None]
        if used:
            raise ValueError(f"normalize=True has no meaning with {', '.join(used)}: leave it None")
    return phi


def _start(initial, q, k, v, phi, momentum, normalize) -> LinAttnState:
    """The state before the first token; a map may change the width of the keys."""
    dtype = wide_type(v)
    width = jax.eval_shape(phi, jax.ShapeDtypeStruct(k.shape, dtype)).shape[-1]
    return start_state(
        initial, q, v, width, dtype, momentum=momentum is not None, normalize=normalize
    )


def _tokens(q, k, v, gates, scale, phi, state, normalize, dtype) -> Tokens:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    gates = {name: x if x is None else jnp.asarray(x, dtype) for name, x in gates.items()}
    rate_in, rate_out, momentum = gates["rate_in"], gates["rate_out"], gates["momentum"]
    q, k = phi(q) * scale, phi(k)
    v = v if rate_in is None else v * rate_in[..., None]
    if normalize:  # z is the state of a value that is always 1
        return Tokens(q, k, _with_ones(v), gates["log_decay"], None, None)
    if momentum is None and state.M is not None:  # M then holds the last write
        momentum = jnp.zeros(q.shape[:-1], dtype)
    if momentum is not None:
        rate_out = jnp.ones_like(momentum) if rate_out is None else rate_out
        return Tokens(q, k, v, gates["log_decay"], momentum, rate_out)
    v = v if rate_out is None else v * rate_out[..., None]
    return Tokens(q, k, v, gates["log_decay"], None, None)


def _with_ones(v: jax.Array) -> jax.Array:
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)


def _reset(tokens: Tokens, segment_ids, exclusive: bool) -> Tokens:
    if segment_ids is None:
        return tokens
    first = first_tokens(segment_ids)
    decay = jnp.zeros(tokens.q.shape[:-1], tokens.q.dtype)
    decay = jnp.where(first, -jnp.inf, decay if tokens.log_decay is None else tokens.log_decay)
    mu = None if tokens.momentum is None else jnp.where(first, 0, tokens.momentum)
    # The state before the first token of a segment is zero, not the end of the last segment.
    q = jnp.where(first[..., None], 0, tokens.q) if exclusive else tokens.q
    return tokens._replace(q=q, log_decay=decay, momentum=mu)


def _pack(state: LinAttnState, tokens: Tokens, normalize: bool):
    """(S, M or None) of the recurrence: z is a column of S."""
    if normalize and state.z is not None:
        return jnp.concatenate([state.S, state.z[..., None]], -1), None
    return state.S, None if tokens.momentum is None else state.M


def _unpack(out, buffers, state: LinAttnState, normalize: bool, dtype):
    s, m = buffers
    if normalize:
        out = out[..., :-1] / (out[..., -1:] + 1e-10)
        state = state._replace(S=s[..., :-1], z=s[..., -1])
    else:
        state = state._replace(S=s, M=state.M if m is None else m)
    return out.astype(dtype), state


def _token_step(exclusive: bool) -> Callable:
    def step(buffers, token: Tokens):
        before, m = buffers
        new = token.k[..., :, None] * token.v[..., None, :]
        s = before
        if token.log_decay is not None:
            s = jnp.exp(token.log_decay)[..., None, None] * s
        if token.momentum is not None and token.rate_out is not None:
            m = token.momentum[..., None, None] * m + new
            new = token.rate_out[..., None, None] * m
        s = s + new
        out = jnp.einsum("bhk,bhkv->bhv", token.q, before if exclusive else s)
        return (s, m), out

    return step


def _by_chunks(tokens: Tokens, buffers, impl: str, size: int, exclusive: bool):
    length = tokens.q.shape[1]
    # Padding writes nothing and keeps both buffers: k = v = log_decay = 0, momentum 1.
    chunks = jax.tree.map(lambda x: cut(x, size), tokens)
    s, m = buffers
    if tokens.momentum is None:
        prepare, times, start = _decay_maps, scale_rows, s
    else:
        chunks = chunks._replace(momentum=cut(tokens.momentum, size, 1.0))
        prepare, times, start = _momentum_maps, mix_buffers, jnp.concatenate([s, m], -2)
    out, final = run_chunks(functools.partial(prepare, exclusive), times, chunks, start, impl)
    s, m = (final, None) if m is None else jnp.split(final, 2, -2)
    return uncut(out, length), (s, m)


def _decay_maps(exclusive: bool, chunk: Tokens) -> AffineChunks:
    g = chunk.log_decay
    if g is None:
        g = jnp.zeros((chunk.q.shape[0], 1, 1, chunk.q.shape[3]), chunk.q.dtype)
    logs, total = decay_logs(g)
    inner, reads = jnp.exp(logs), [jnp.exp(total)]
    carry = reads[0][..., -1, None, None]
    return _maps(exclusive, chunk, carry, inner, reads, [inner[..., -1, :]])


def _momentum_maps(exclusive: bool, chunk: Tokens) -> AffineChunks:
    mu, eout, g = chunk.momentum, chunk.rate_out, chunk.log_decay
    assert mu is not None and eout is not None  # `_tokens` makes the two together
    lam = jnp.ones_like(mu) if g is None else jnp.exp(g)
    inner, push, psi, pi, lam = momentum_coefficients(lam, mu, eout)
    ends = (lam, psi, jnp.zeros_like(pi), pi)
    carry = jnp.stack([x[..., -1] for x in ends], -1)
    carry = carry.reshape(*carry.shape[:-1], 2, 2)
    writes = [inner[..., -1, :], push[..., -1, :]]
    return _maps(exclusive, chunk, carry, inner, [lam, psi], writes)


def _maps(exclusive: bool, chunk: Tokens, carry, inner, reads, writes) -> AffineChunks:
    """From what each token reads of a buffer, and what its write leaves in it, [..., c] a buffer."""
    if exclusive:  # the row of the token before; before the first, only S
        shift = [(0, 0)] * (inner.ndim - 2) + [(1, 0)]
        inner = jnp.pad(inner[..., :-1, :], [*shift, (0, 0)])
        reads = [jnp.pad(x[..., :-1], shift, constant_values=1 - n) for n, x in enumerate(reads)]
    read, write = (
        jnp.concatenate([x * w[..., None] for w in rows], -1)
        for x, rows in ((chunk.q, reads), (chunk.k, writes))
    )
    return affine_chunks(carry, (chunk.q @ chunk.k.mT) * inner, read, write, chunk.v)
