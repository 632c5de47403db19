"""Vector decay and the delta rule: GLA, DeltaNet, Gated DeltaNet and KDA as one recurrence.

S = exp(g) S, a factor for each row or for all; then S += k^T u with u = v, or by the delta rule
u = beta (v - k S): one gradient step on |k S - v|^2 / 2 with rate beta. out = q S.
Source: note on TTT as linear attention, section 6; GLA: Yang et al., 2312.06635; DeltaNet: 2406.06484;
Gated DeltaNet: 2412.06464; KDA: 2510.26692.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.arguments import wide_type
from jaxlab.linear_attention.chunks import (
    AffineChunks,
    DeltaChunks,
    affine_chunks,
    compose,
    cut,
    run_chunks,
    run_tokens,
    scale_rows,
    uncut,
)  # fmt: skip
from jaxlab.linear_attention.state import (
    LinAttnState,
    check_form,
    check_inputs,
    first_tokens,
    start_state,
)
from jaxlab.linear_attention.triangular import (
    decay_logs,
    decayed_products,
    tri_inverse_unit_lower,
)  # fmt: skip

State = Float[Array, "b h k kv"] | LinAttnState | None


class Tokens(NamedTuple):
    """One or all tokens in the wide type, q scaled."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    log_decay: jax.Array | None  # [...] or [..., k]
    beta: jax.Array | None  # None: no delta rule


def gla(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h kv"],
    log_decay: Float[Array, "b t h k"],
    *,
    scale: float | None = None,
    initial_state: State = None,
    impl: str = "chunkwise",
    chunk_size: int = 64,
    segment_ids: Int[Array, "b t"] | None = None,
    return_state: bool = True,
) -> tuple[Float[Array, "b t h kv"], LinAttnState | None]:
    """(out in v.dtype, final state) of gated linear attention: S = diag(exp(g)) S + k^T v.

    `scale` None is k**-0.5; `impl` "recurrent", "chunkwise" or "scan"; initial_state, segment_ids,
    types and errors as in `linear_attention`. Source: Yang et al., 2312.06635, section 4.
    """
    channel = {"log_decay": log_decay}
    options = (scale, initial_state, impl, chunk_size, segment_ids, return_state)
    return _attend(q, k, v, {}, channel, *options)


def delta_rule(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h kv"],
    beta: Float[Array, "b t h"],
    *,
    scale: float | None = None,
    initial_state: State = None,
    impl: str = "chunkwise",
    chunk_size: int = 64,
    segment_ids: Int[Array, "b t"] | None = None,
    return_state: bool = True,
) -> tuple[Float[Array, "b t h kv"], LinAttnState | None]:
    """(out in v.dtype, final state) of the delta rule: S += k^T beta (v - k S).

    Stable for beta |k|^2 in (0, 2): normalise the keys. Options, types and errors as in `gla`.
    Source: Yang et al., 2406.06484, section 3.
    """
    options = (scale, initial_state, impl, chunk_size, segment_ids, return_state)
    return _attend(q, k, v, {"beta": beta}, {}, *options)


def gated_delta_rule(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h kv"],
    log_decay: Float[Array, "b t h"],
    beta: Float[Array, "b t h"],
    *,
    scale: float | None = None,
    initial_state: State = None,
    impl: str = "chunkwise",
    chunk_size: int = 64,
    segment_ids: Int[Array, "b t"] | None = None,
    return_state: bool = True,
) -> tuple[Float[Array, "b t h kv"], LinAttnState | None]:
    """(out in v.dtype, final state) of: S = exp(g) S, then S += k^T beta (v - k S).

    Options, types and errors as in `gla`. Source: Yang et al., 2412.06464, section 3.
    """
    token = {"log_decay": log_decay, "beta": beta}
    options = (scale, initial_state, impl, chunk_size, segment_ids, return_state)
    return _attend(q, k, v, token, {}, *options)


def kda(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h kv"],
    log_decay: Float[Array, "b t h k"],
    beta: Float[Array, "b t h"],
    *,
    scale: float | None = None,
    initial_state: State = None,
    impl: str = "chunkwise",
    chunk_size: int = 64,
    segment_ids: Int[Array, "b t"] | None = None,
    return_state: bool = True,
) -> tuple[Float[Array, "b t h kv"], LinAttnState | None]:
    """(out in v.dtype, final state) of: S = diag(exp(g)) S, then S += (beta k)^T (v - k S).

    Options, types and errors as in `gla`. Source: Kimi Delta Attention, 2510.26692, section 3.
    """
    options = (scale, initial_state, impl, chunk_size, segment_ids, return_state)
    return _attend(q, k, v, {"beta": beta}, {"log_decay": log_decay}, *options)


def gla_step(
    state: LinAttnState,
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h kv"],
    log_decay: Float[Array, "b h k"],
    *,
    scale: float | None = None,
) -> tuple[LinAttnState, Float[Array, "b h kv"]]:
    """(state, out) after one token of `gla`."""
    return _attend_step(state, q, k, v, {}, {"log_decay": log_decay}, scale)


def delta_rule_step(
    state: LinAttnState,
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h kv"],
    beta: Float[Array, "b h"],
    *,
    scale: float | None = None,
) -> tuple[LinAttnState, Float[Array, "b h kv"]]:
    """(state, out) after one token of `delta_rule`."""
    return _attend_step(state, q, k, v, {"beta": beta}, {}, scale)


def gated_delta_rule_step(
    state: LinAttnState,
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h kv"],
    log_decay: Float[Array, "b h"],
    beta: Float[Array, "b h"],
    *,
    scale: float | None = None,
) -> tuple[LinAttnState, Float[Array, "b h kv"]]:
    """(state, out) after one token of `gated_delta_rule`."""
    return _attend_step(state, q, k, v, {"log_decay": log_decay, "beta": beta}, {}, scale)


def kda_step(
    state: LinAttnState,
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h kv"],
    log_decay: Float[Array, "b h k"],
    beta: Float[Array, "b h"],
    *,
    scale: float | None = None,
) -> tuple[LinAttnState, Float[Array, "b h kv"]]:
    """(state, out) after one token of `kda`."""
    return _attend_step(state, q, k, v, {"beta": beta}, {"log_decay": log_decay}, scale)


def _attend(
    q, k, v, token, channel, scale, initial_state, impl, chunk_size, segment_ids, return_state
):
    check_inputs(q, k, v, token_gates=token, channel_gates=channel)
    check_form(q, impl, ("recurrent", "chunkwise", "scan"), chunk_size, segment_ids)
    state = start_state(initial_state, q, v, k.shape[-1], wide_type(v))
    length, size = q.shape[1], max(min(chunk_size, q.shape[1]), 1)

    def run(q, k, v, gates, segment_ids, start):
        tokens = _reset(_tokens(q, k, v, gates, scale), segment_ids)
        if impl == "recurrent":
            out, final = run_tokens(_token_step, start, tokens)
        else:
            cuts = jax.tree.map(lambda x: cut(x, size), tokens)
            times = scale_rows if tokens.beta is None else compose
            out, final = run_chunks(_maps, times, cuts, start, impl)
            out = uncut(out, length)
        return out.astype(v.dtype), final

    if not length:
        return jnp.zeros_like(v), state if return_state else None
    out, final = run(q, k, v, {**token, **channel}, segment_ids, state.S)
    return out, state._replace(S=final) if return_state else None


def _attend_step(state, q, k, v, token, channel, scale):
    check_inputs(q, k, v, token_gates=token, channel_gates=channel, steps=True)
    state = start_state(state, q, v, k.shape[-1], wide_type(v))
    final, out = _token_step(state.S, _tokens(q, k, v, {**token, **channel}, scale))
    return state._replace(S=final), out.astype(v.dtype)


def _tokens(q, k, v, gates, scale) -> Tokens:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype = wide_type(v)
    wide = {name: jnp.asarray(x, dtype) for name, x in gates.items()}
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    return Tokens(q * scale, k, v, wide.get("log_decay"), wide.get("beta"))


def _reset(tokens: Tokens, segment_ids) -> Tokens:
    if segment_ids is None:
        return tokens
    first, g = first_tokens(segment_ids), tokens.log_decay
    if g is None:
        g = jnp.zeros(tokens.q.shape[:-1], tokens.q.dtype)
    first = first if g.ndim == 3 else first[..., None]
    return tokens._replace(log_decay=jnp.where(first, -jnp.inf, g))


def _token_step(s: jax.Array, token: Tokens) -> tuple[jax.Array, jax.Array]:
    q, k, u, g, beta = token
    if g is not None:
        s = jnp.exp(g[..., None] if g.ndim == k.ndim else g[..., None, None]) * s
    if beta is not None:
        u = beta[..., None] * (u - jnp.einsum("bhk,bhkv->bhv", k, s))
    s = s + k[..., :, None] * u[..., None, :]
    return s, jnp.einsum("bhk,bhkv->bhv", q, s)


def _maps(chunk: Tokens) -> AffineChunks | DeltaChunks:
    """The affine map of each chunk, arrays [n, b, h, c, ...]; padding has k = v = g = beta = 0."""
    q, k, v, g, beta = chunk
    strong_k = k if beta is None else beta[..., None] * k
    queries = (q,) if beta is None else (q, strong_k)
    if g is not None and g.ndim == k.ndim:
        products, into, after = decayed_products(queries, k, g)
    else:
        logs, total = decay_logs(
            jnp.zeros((q.shape[0], 1, 1, q.shape[3]), q.dtype) if g is None else g
        )
        decay = jnp.exp(logs)
        products = tuple(x @ k.mT * decay for x in queries)
        into, after = jnp.exp(total)[..., None], decay[..., -1, :, None]
    whole = into[..., -1, :, None]  # the decay of the chunk, [..., 1 or k, 1]
    read, write, inner = q * into, k * after, products[0]
    if beta is None:
        return affine_chunks(whole, inner, read, write, v)
    # u = solved_v - solved_k S: what the delta rule writes, the chunk's own writes accounted for.
    both = jnp.concatenate([beta[..., None] * v, strong_k * into], -1)
    solved = tri_inverse_unit_lower(products[1]) @ both
    solved_v, solved_k = jnp.split(solved, [v.shape[-1]], -1)
    return DeltaChunks(whole, inner, read, write, solved_v, solved_k)
