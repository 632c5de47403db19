"""TTT with key-value binding over a sequence: one operator, several implementations, one state."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jaxlab.arguments import check_choice, wide_type
from jaxlab.ttt.arguments import batched_weights, check_gate, check_rates, check_tokens
from jaxlab.ttt.causal import token_causal, why_not_token
from jaxlab.ttt.config import FastWeights, InnerConfig
from jaxlab.ttt.net import minus_grads, read
from jaxlab.ttt.parallel import affine, parallel, why_not_affine, why_not_parallel
from jaxlab.ttt.state import (
    Chunk,
    Moving,
    TTTState,
    keeps_open_chunk,
    learn,
    moving_part,
    state_of,
    take_step,
    with_moved,
)
from jaxlab.varying import vary_like

DEFAULT = InnerConfig()


def recurrent(
    cfg: InnerConfig, state: TTTState, moving: Moving, chunks: Chunk
) -> tuple[Moving, jax.Array]:
    """Chunk after chunk; the backward pass keeps the weights at chunk starts and nothing per token."""

    def body(moving: Moving, chunk: Chunk):
        entry, moving = moving, learn(cfg, state, moving, chunk)
        seen = entry if cfg.visibility == "exclusive" else moving
        return moving, read(cfg.net, state.fw._replace(**seen.read), chunk.q)

    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), moving, chunks)


WALKS = {"recurrent": recurrent, "parallel": parallel, "affine": affine}


def _choose(impl: str, cfg: InnerConfig, momentum: bool) -> str:
    """The implementation meant by `impl`; ValueError saying why if it cannot compute `cfg`."""
    check_choice("impl", impl, "recurrent", "parallel", "affine", "auto")
    if impl == "affine" or cfg.visibility != "token":
        reasons = {
            "parallel": why_not_parallel(cfg, momentum),
            "affine": why_not_affine(cfg, momentum),
        }
        if impl == "auto":
            return "recurrent" if reasons["parallel"] else "parallel"
        if reasons.get(impl):
            raise ValueError(f"impl={impl!r} is impossible: {reasons[impl]}")
    if cfg.visibility == "token" and (why := why_not_token(cfg)):
        raise ValueError(f"visibility='token' is impossible: {why}")
    return impl


def _check_state(state: TTTState, cfg: InnerConfig, b: int, h: int, dk: int, dv: int, wide):
    """`state` in type `wide`, if it is of this configuration and of these sizes."""
    fw = batched_weights(state.fw, cfg.net, b, h, dk, dv, wide, "state.fw")
    expected = jax.eval_shape(lambda fw: state_of(fw, cfg), fw)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)  # noqa: E731
    if jax.tree.structure(state) != jax.tree.structure(expected) or shapes(state) != shapes(
        expected
    ):
        raise ValueError(
            f"state was made for another cfg or other sizes: its shapes are {shapes(state)}, "
            f"expected {shapes(expected)}"
        )
    return jax.tree.map(lambda x, like: jnp.asarray(x).astype(like.dtype), state, expected)


def _learn_open(cfg: InnerConfig, state: TTTState, momentum: bool) -> Moving:
    """The step that the open chunk of `state`, now full, makes."""
    gate = state.gate / cfg.chunk_size if momentum and state.gate is not None else None
    return take_step(cfg, state.norms, moving_part(state, cfg), state.grads or {}, gate)


def _count(state: TTTState) -> int:
    """Tokens in the open chunk; 0 where they are traced: there the caller's word must do."""
    try:
        return int(state.count)
    except jax.errors.ConcretizationTypeError:
        return 0


def _continue(state: TTTState, cfg: InnerConfig, momentum: bool) -> TTTState:
    """`state` at a chunk's start: the open chunk, if there is one, is learnt now."""
    if cfg.steps > 1:
        raise ValueError(f"fw is a TTTState, which steps={cfg.steps} cannot continue; use steps=1")
    if cfg.visibility == "token":
        return state
    count = _count(state)
    if count not in (0, cfg.chunk_size):
        raise ValueError(
            f"fw is a TTTState {count} tokens into a chunk of chunk_size={cfg.chunk_size}; "
            "continue at a multiple, or with ttt_step"
        )
    if state.grads is None:
        return state
    before, after = moving_part(state, cfg), _learn_open(cfg, state, momentum)
    choose = lambda new, old: jnp.where(state.count == cfg.chunk_size, new, old)  # noqa: E731
    return with_moved(state, jax.tree.map(choose, after, before))


def _chunks(n: int, q, k, v, rates, momentum) -> Chunk:
    """Tokens [b, t, h, ...] as `n` chunks, their gate being the mean over their own tokens."""
    cut = lambda x: rearrange(x, "b (n c) h ... -> n b h c ...", n=n)  # noqa: E731
    q, k, v, rates, gates = jax.tree.map(cut, (q, k, v, rates, momentum))
    return Chunk(q, k, v, rates, None if gates is None else jnp.mean(gates, -1))


def ttt(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    fw: FastWeights | TTTState,
    rates: Float[Array, "b t h 3"] | Float[Array, "b t h"] | None = None,
    momentum: Float[Array, "b t h"] | None = None,
    cfg: InnerConfig = DEFAULT,
    *,
    impl: str = "auto",
    return_state: bool = True,
) -> tuple[Float[Array, "b t h v"], TTTState | None]:
    """Trains the inner net on k -> v chunk after chunk and reads it with q.

    A chunk makes W <- norm(W + NS(D)), D <- G + mean(momentum) D, where -G is the gradient of the
    sum over its tokens of rate * loss. "exclusive": a chunk reads before it learns, and the last is
    learnt only when a next token comes; "inclusive_chunk": it learns first, a short last one too;
    "token": causal linear attention on the features. `rates` are (eta0, eta1, eta2) of w0, w1, w2 or
    one for all, None 1; `momentum` are gates in (0, 1), None none.

    `impl`: "recurrent"; "parallel" over chunks (only w1 moves, dot loss, no post-norm); "affine"
    (linear net, squared error, neither momentum nor norm nor orthogonalisation); "auto" is parallel
    where legal, else recurrent. All give the same output, of v's type, and state, of float32 or v's
    wider type. A `TTTState` in place of `fw` continues its run where a chunk begins (steps=1).
    ValueError for shapes and combinations that do not fit, TypeError for tokens that are not
    floating. Sources: 2602.21204, sections 3 to 5; LaCT, 2505.23884.
    """
    q, k, v = check_tokens(q, k, v, "B T H Dk")
    (b, t, h, dk), dv, wide, out_type = q.shape, v.shape[-1], wide_type(v), v.dtype
    rates = check_rates("rates", rates, (b, t, h), wide) if cfg.token_rates else None
    momentum = check_gate("momentum", momentum, (b, t, h), wide) if cfg.momentum else None
    impl = _choose(impl, cfg, momentum is not None)
    if isinstance(fw, TTTState):
        state = given = _check_state(fw, cfg, b, h, dk, dv, wide)
        state = _continue(given, cfg, momentum is not None)
    else:
        state = given = state_of(batched_weights(fw, cfg.net, b, h, dk, dv, wide), cfg)
    if t == 0:
        return jnp.zeros((b, 0, h, dv), out_type), given if return_state else None

    q, k, v = (x.astype(wide) for x in (k if cfg.query == "k" else q, k, v))
    tokens = (q, k, v, rates, momentum)
    if cfg.visibility == "token":
        out, state = token_causal(impl, cfg, state, *tokens)
        return out.astype(out_type), state if return_state else None

    size, exclusive = cfg.chunk_size, cfg.visibility == "exclusive"
    n = (t - 1) // size if exclusive else t // size  # chunks that are read and learnt alike
    head = jax.tree.map(lambda x: x[:, : n * size], tokens)
    tail = jax.tree.map(lambda x: x[:, n * size :], tokens)
    moving = moving_part(state, cfg)
    moving = jax.tree.map(lambda x: vary_like(x, tokens, state), moving)
    outs = []
    if n:
        moving, out = WALKS[impl](cfg, state, moving, _chunks(n, *head))
        outs.append(rearrange(out, "n b h c v -> b (n c) h v"))
    if t > n * size:
        last: Chunk = jax.tree.map(lambda x: x[0], _chunks(1, *tail))
        if not exclusive:
            moving = learn(cfg, state, moving, last)
        out = read(cfg.net, state.fw._replace(**moving.read), last.q)
        outs.append(rearrange(out, "b h c v -> b c h v"))
        if keeps_open_chunk(cfg) and return_state:
            fw = state.fw._replace(**moving.read)
            grads = minus_grads(cfg.net, cfg.loss, cfg.moving, fw, last.k, last.v, last.rates)
            zero = jax.tree.map(jnp.zeros_like, state.gate)
            gate = zero if momentum is None else jnp.sum(tail[-1], 1)
            state = state._replace(grads=grads, gate=gate)
    out = jnp.concatenate(outs, 1).astype(out_type)
    if not return_state:
        return out, None
    count = jnp.full_like(state.count, t - n * size or size)
    return out, with_moved(state, moving)._replace(count=count)


def ttt_step(
    state: TTTState,
    q: Float[Array, "b h k"],
    k: Float[Array, "b h k"],
    v: Float[Array, "b h v"],
    rate: Float[Array, "b h 3"] | Float[Array, "b h"] | None = None,
    mu: Float[Array, "b h"] | None = None,
    cfg: InnerConfig = DEFAULT,
) -> tuple[TTTState, Float[Array, "b h v"]]:
    """One token of `ttt` with constant memory, equal to a run over all tokens so far.

    A full chunk is learnt when the next token comes, then that token reads, then its gradient joins
    the open chunk. The state keeps its types; the output has v's. Only visibility "exclusive" and
    steps=1; ValueError otherwise and for shapes that do not fit. Source: 2602.21204, section 3.
    """
    if cfg.visibility != "exclusive" or cfg.steps > 1:
        raise ValueError(
            "ttt_step is possible with visibility='exclusive' and steps=1 only; "
            f"got {cfg.visibility!r} and {cfg.steps}"
        )
    q, k, v = check_tokens(q, k, v, "B H Dk")
    (b, h, dk), dv, wide, out_type = q.shape, v.shape[-1], wide_type(v), v.dtype
    rate = check_rates("rate", rate, (b, h), wide) if cfg.token_rates else None
    mu = check_gate("mu", mu, (b, h), wide) if cfg.momentum else None
    kept = state
    state = _check_state(state, cfg, b, h, dk, dv, wide)
    if _count(state) > cfg.chunk_size:
        raise ValueError(
            f"state is {_count(state)} tokens into a chunk, at most chunk_size={cfg.chunk_size} are "
            "allowed: it is from a run with another chunk_size"
        )
    q, k, v = (x.astype(wide)[:, :, None] for x in (k if cfg.query == "k" else q, k, v))
    rate = None if rate is None else rate[:, :, None]
    count = state.count
    state = jax.tree.map(lambda x: vary_like(x, q, k, v, rate, mu, state), state)
    state = state._replace(count=count)

    def commit(state: TTTState) -> TTTState:
        moved = _learn_open(cfg, state, mu is not None)
        empty = lambda tree: jax.tree.map(jnp.zeros_like, tree)  # noqa: E731
        state = state._replace(grads=empty(state.grads), gate=empty(state.gate))
        return with_moved(state, moved)._replace(count=jnp.zeros_like(state.count))

    full = count == cfg.chunk_size
    state = jax.lax.cond(full, commit, lambda state: state, state)
    out = read(cfg.net, state.fw, q)[:, :, 0].astype(out_type)
    grads = minus_grads(cfg.net, cfg.loss, cfg.moving, state.fw, k, v, rate)
    state = state._replace(
        grads=jax.tree.map(jnp.add, state.grads, grads),
        gate=state.gate if mu is None or state.gate is None else state.gate + mu,
        count=state.count + 1,
    )
    return jax.tree.map(lambda x, like: x.astype(like.dtype), state, kept), out
