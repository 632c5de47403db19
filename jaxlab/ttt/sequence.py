"""TTT-Linear and TTT-MLP as functions of whole sequences and of single tokens (2407.04620)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jaxlab.arguments import check_choice, check_count, check_shape, wide_type
from jaxlab.ttt.arguments import batched, check_gate, check_tokens
from jaxlab.ttt.minibatch import (
    MiniBatchState,
    Params,
    Static,
    TTTLinearParams,
    TTTMLPParams,
    commit,
    dual,
    layers_of,
    step,
)
from jaxlab.varying import vary_like


def checked_params(kind, params, batch: int, h: int, f: int, wide) -> Params:
    """`params` of `kind` as arrays of type `wide`, weights and biases with the batch in front."""
    if not isinstance(params, kind):
        raise TypeError(f"params is a {type(params).__name__}; it must be {kind.__name__}")
    hidden = 4 * f if kind is TTTMLPParams else f
    shapes = {"w1": (h, f, hidden), "b1": (h, 1, hidden), "w2": (h, hidden, f), "b2": (h, 1, f)}
    found = {}
    for name, x in params._asdict().items():
        if name in shapes:
            found[name] = batched(f"params.{name}", x, shapes[name], batch, wide)
        else:
            check_shape(f"params.{name}", x, (h, f))
            found[name] = jnp.asarray(x).astype(wide)
    return kind(**found)


def _init(kind, params, batch: int) -> MiniBatchState:
    batch = check_count("batch", batch, 0)
    if not isinstance(params, kind):
        raise TypeError(f"params is a {type(params).__name__}; it must be {kind.__name__}")
    if jnp.ndim(params.gamma) != 2:
        raise ValueError(f"params.gamma has shape {jnp.shape(params.gamma)}; expected (H, f)")
    (h, f), wide = jnp.shape(params.gamma), wide_type(jnp.asarray(params.w1))
    params = checked_params(kind, params, batch, h, f, wide)
    sums = jax.tree.map(jnp.zeros_like, layers_of(params))
    return MiniBatchState(params, sums, jnp.zeros((batch, h), wide), jnp.zeros((), jnp.int32))


def checked_tokens(static: Static, q, k, v, rate_in, rate_out, layout: str):
    """((q, k, v, rate_in, rate_out) in the wide type, type of the output); errors name the argument."""
    check_count("chunk_size", static.chunk_size, 1)
    check_choice("residual", static.residual, "query", "output")
    q, k, v = check_tokens(q, k, v, layout)
    if v.shape != q.shape:
        raise ValueError(f"v has shape {v.shape}; expected that of q, {q.shape}")
    wide, gate = wide_type(v), v.shape[:-1]
    rates = (
        check_gate("rate_in", rate_in, gate, wide),
        check_gate("rate_out", rate_out, gate, wide),
    )
    rates = (jnp.ones(gate, wide) if rate is None else rate for rate in rates)
    return (*(x.astype(wide) for x in (q, k, v)), *rates), v.dtype


def _run(static: Static, impl: str, q, k, v, params, rate_in, rate_out) -> tuple[jax.Array, Any]:
    check_choice("impl", impl, "dual", "primal")
    tokens, out_type = checked_tokens(static, q, k, v, rate_in, rate_out, "B T H f")
    (b, t, h, f), wide = tokens[0].shape, tokens[0].dtype
    given = checked_params(static.kind, params, b, h, f, wide)
    params = jax.tree.map(lambda x: vary_like(x, tokens, given), given)
    if impl == "primal":
        state = jax.tree.map(lambda x: vary_like(x, tokens, given), _init(static.kind, params, b))
        state = state._replace(count=jnp.zeros((), jnp.int32))
        xs = tuple(jnp.moveaxis(x, 1, 0) for x in tokens)
        state, out = jax.lax.scan(functools.partial(step, static), state, xs)
        params, out = commit(state), jnp.moveaxis(out, 0, 1)
    else:
        n = t // static.chunk_size
        at, outs = n * static.chunk_size, [jnp.zeros((b, 0, h, f), wide)]
        if n:
            cut = lambda x: rearrange(x[:, :at], "b (n c) h ... -> n b h c ...", n=n)  # noqa: E731
            body = jax.checkpoint(functools.partial(dual, static), prevent_cse=False)
            params, out = jax.lax.scan(body, params, tuple(cut(x) for x in tokens))
            outs.append(rearrange(out, "n b h c f -> b (n c) h f"))
        if at < t:
            tail = tuple(jnp.swapaxes(x[:, at:], 1, 2) for x in tokens)
            params, out = dual(static, params, tail)
            outs.append(jnp.swapaxes(out, 1, 2))
        out = jnp.concatenate(outs, 1)
    return out.astype(out_type), params._replace(gamma=given.gamma, beta=given.beta)


def _token(static: Static, state: MiniBatchState, q, k, v, rate_in, rate_out):
    token, out_type = checked_tokens(static, q, k, v, rate_in, rate_out, "B H f")
    (b, h, f), wide = token[0].shape, token[0].dtype
    params = checked_params(static.kind, state.params, b, h, f, wide)
    check_shape("state.rate_out", state.rate_out, (b, h))
    moved, out = step(static, state._replace(params=params), token)
    return jax.tree.map(lambda x, like: x.astype(like.dtype), moved, state), out.astype(out_type)


def ttt_linear(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    params: TTTLinearParams,
    rate_in: Float[Array, "b t h"] | None = None,
    rate_out: Float[Array, "b t h"] | None = None,
    *,
    chunk_size: int = 16,
    residual: str = "query",
    eps: float = 1e-6,
    impl: str = "dual",
) -> tuple[Float[Array, "b t h k"], TTTLinearParams]:
    """TTT-Linear in mini-batches of `chunk_size`: (outputs, parameters after the last of them).

    `rate_in` belongs to the source token, `rate_out` to the reading one, None being 1; a mini-batch
    is learnt with its last `rate_out`, a short last one too. q, k come after their rotation.
    `residual`: "query" gives q + LN(z), "output" z + LN(z). The returned weights have a batch axis
    and, given back, continue the run at a multiple of `chunk_size`. `impl`: "dual", or "primal",
    token by token. Float32 inside (float64 if v is); the output has v's type. ValueError for shapes
    and names that do not fit, TypeError for tokens that are not floating.
    Source: 2407.04620, section 2.
    """
    static = Static(TTTLinearParams, chunk_size, residual, eps)
    return _run(static, impl, q, k, v, params, rate_in, rate_out)


def ttt_mlp(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    params: TTTMLPParams,
    rate_in: Float[Array, "b t h"] | None = None,
    rate_out: Float[Array, "b t h"] | None = None,
    *,
    chunk_size: int = 16,
    residual: str = "query",
    eps: float = 1e-6,
    impl: str = "dual",
) -> tuple[Float[Array, "b t h k"], TTTMLPParams]:
    """TTT-MLP: `ttt_linear` with a net of two layers, gelu (tanh form) between them."""
    static = Static(TTTMLPParams, chunk_size, residual, eps)
    return _run(static, impl, q, k, v, params, rate_in, rate_out)


def ttt_linear_init(params: TTTLinearParams, batch: int) -> MiniBatchState:
    """State of `ttt_linear_step` before the first token; float32, or the wider type of w1."""
    return _init(TTTLinearParams, params, batch)


def ttt_mlp_init(params: TTTMLPParams, batch: int) -> MiniBatchState:
    """State of `ttt_mlp_step` before the first token; float32, or the wider type of w1."""
    return _init(TTTMLPParams, params, batch)


def ttt_linear_step(
    state: MiniBatchState,
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h k"],
    rate_in: Float[Array, "b h"] | None,
    rate_out: Float[Array, "b h"] | None,
    *,
    chunk_size: int = 16,
    residual: str = "query",
    eps: float = 1e-6,
) -> tuple[MiniBatchState, Float[Array, "b h k"]]:
    """One token of `ttt_linear`, with constant memory; `chunk_size` is the same at every call."""
    static = Static(TTTLinearParams, chunk_size, residual, eps)
    return _token(static, state, q, k, v, rate_in, rate_out)


def ttt_mlp_step(
    state: MiniBatchState,
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h k"],
    rate_in: Float[Array, "b h"] | None,
    rate_out: Float[Array, "b h"] | None,
    *,
    chunk_size: int = 16,
    residual: str = "query",
    eps: float = 1e-6,
) -> tuple[MiniBatchState, Float[Array, "b h k"]]:
    """One token of `ttt_mlp`, with constant memory; `chunk_size` is the same at every call."""
    static = Static(TTTMLPParams, chunk_size, residual, eps)
    return _token(static, state, q, k, v, rate_in, rate_out)
