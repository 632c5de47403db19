"""TTT for any inner net by automatic differentiation, and the theorems as executable forms.

Slow and obvious: what the closed forms of this package are held against. One sequence; vmap outside.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.arguments import check_choice, check_count, wide_type
from jaxlab.linear_attention import momentum_coefficients
from jaxlab.ttt.arguments import check_gate, check_tokens
from jaxlab.varying import vary_like

Loss = Callable[[jax.Array, jax.Array], jax.Array]  # (pred [L, Dv], target [L, Dv]) -> [L]
LOSSES: dict[str, Loss] = {
    "dot": lambda pred, target: -jnp.sum(pred * target, -1),
    "squared": lambda pred, target: jnp.sum(jnp.square(pred - target), -1) / 2,
}


class LinearForm(NamedTuple):
    """o = q_eff S0 + ((q_eff k_eff^T) * coeff) v_eff: TTT written as linear attention."""

    q_eff: Float[Array, "t c"]
    k_eff: Float[Array, "t c"]
    v_eff: Float[Array, "t v"]
    S0: Float[Array, "c v"]
    coeff: Float[Array, "t t"]


def _loss(loss: str | Loss) -> Loss:
    if callable(loss):
        return loss
    check_choice("loss", loss, *LOSSES)
    return LOSSES[loss]


def _prepare(q, k, v, params, gates: dict):
    """(tokens and gates of one wide type, absent gates filled in; params of that type; v's type)."""
    q, k, v = check_tokens(q, k, v, "T D")
    wide = wide_type(v)
    absent = {"rates": 1, "rate_out": 1, "momentum": 0}
    found = {name: check_gate(name, gates[name], v.shape[:1], wide) for name in absent}
    filled = [jnp.full(v.shape[:1], absent[n], wide) if x is None else x for n, x in found.items()]
    tokens = (*(x.astype(wide) for x in (q, k, v)), *filled)
    params = jax.tree.map(lambda x: vary_like(jnp.asarray(x).astype(wide), tokens, params), params)
    return tokens, params, v.dtype


def ttt_autodiff(
    q: Float[Array, "t k"],
    k: Float[Array, "t k"],
    v: Float[Array, "t v"],
    params: Any,
    apply_fn: Callable[[Any, Float[Array, "c k"]], Float[Array, "c v"]],
    loss: str | Loss = "squared",
    *,
    rates: Float[Array, "t"] | None = None,
    rate_out: Float[Array, "t"] | None = None,
    momentum: Float[Array, "t"] | None = None,
    chunk_size: int = 1,
    visibility: str = "inclusive_chunk",
    steps: int = 1,
) -> tuple[Float[Array, "t v"], Any]:
    """TTT of the net `apply_fn(params, x)` on one sequence: (outputs, params of the last read).

    A chunk and step make D <- grad(sum_i rates_i loss_i) + mean(momentum) D and then
    params <- params - mean(rate_out) D, D being 0 at first. "inclusive_chunk" learns, then reads;
    "exclusive" reads, then learns, the last chunk never being learnt. `loss`: "dot", "squared" (half
    the squared error) or a function (pred, target) -> [L]. Float32 inside, float64 if v is; the
    output has v's type. ValueError for shapes and names that do not fit, TypeError for tokens that
    are not floating. Source: 2602.21204, section 3.
    """
    size, steps = check_count("chunk_size", chunk_size, 1), check_count("steps", steps, 1)
    check_choice("visibility", visibility, "inclusive_chunk", "exclusive")
    loss_fn, exclusive = _loss(loss), visibility == "exclusive"
    gates = {"rates": rates, "rate_out": rate_out, "momentum": momentum}
    tokens, params, out_type = _prepare(q, k, v, params, gates)
    t, wide = len(tokens[0]), tokens[2].dtype

    def learn(carry, chunk):
        _, key, value, rate, out, mu = chunk

        def objective(params):
            return jnp.sum(rate * loss_fn(apply_fn(params, key), value))

        for _ in range(steps):
            params, delta = carry
            grads = jax.grad(objective)(params)
            delta = jax.tree.map(lambda g, d: g + jnp.mean(mu) * d, grads, delta)
            carry = jax.tree.map(lambda p, d: p - jnp.mean(out) * d, params, delta), delta
        return carry

    def visit(carry, chunk):
        seen, carry = carry, learn(carry, chunk)
        return carry, apply_fn((seen if exclusive else carry)[0], chunk[0])

    carry = params, jax.tree.map(jnp.zeros_like, params)
    n = max(t - 1, 0) // size if exclusive else t // size
    outs = [jnp.zeros((0, v.shape[-1]), wide)]
    if n:
        chunks = tuple(x[: n * size].reshape(n, size, *x.shape[1:]) for x in tokens)
        carry, out = jax.lax.scan(visit, carry, chunks)
        outs.append(out.reshape(n * size, -1))
    if n * size < t:
        tail = tuple(x[n * size :] for x in tokens)
        carry = carry if exclusive else learn(carry, tail)
        outs.append(apply_fn(carry[0], tail[0]))
    return jnp.concatenate(outs).astype(out_type), carry[0]


def to_linear_attention(
    q: Float[Array, "t k"],
    k: Float[Array, "t k"],
    v: Float[Array, "t v"],
    params: dict[str, Any],
    phi: Callable[[Any, Float[Array, "l k"]], Float[Array, "l c"]],
    *,
    loss: str | Loss = "squared",
    rates: Float[Array, "t"] | None = None,
    rate_out: Float[Array, "t"] | None = None,
    momentum: Float[Array, "t"] | None = None,
) -> LinearForm:
    """The linear attention that TTT of f(x) = phi(theta, x) w is, token by token (theorems 1 to 3).

    `params` is {"theta": any tree, "w": [Dh, Dv]}; both learn from each token, which then reads, as
    in `ttt_autodiff` with chunks of one token. q_eff_t = phi(theta_{t+1}, q_t),
    k_eff_t = phi(theta_t, k_t), v_eff_t = -rates_t dloss/df, S0 = w, and
    coeff[t, i] = sum_{j=i..t} rate_out_j prod_{i<s<=j} momentum_s, 0 for i > t. ValueError for a
    further key, such as an output bias: the theorems need a linear, bias-free last layer.
    Source: 2602.21204, section 4.
    """
    if set(params) != {"theta", "w"}:
        raise ValueError(
            f"params has keys {sorted(params)}; it must have 'theta' and 'w' only: "
            "the last layer must be linear and bias-free"
        )
    loss_fn = _loss(loss)
    gates = {"rates": rates, "rate_out": rate_out, "momentum": momentum}
    tokens, params, _ = _prepare(q, k, v, params, gates)
    if params["w"].ndim != 2 or params["w"].shape[1] != tokens[2].shape[1]:
        raise ValueError(f"params['w'] has shape {params['w'].shape}; expected (Dh, {v.shape[-1]})")
    features = jax.eval_shape(phi, params["theta"], tokens[1][:1]).shape[-1]
    if params["w"].shape[0] != features:
        raise ValueError(
            f"params['w'] has shape {params['w'].shape}, but phi gives {features} features"
        )

    def visit(carry, token):
        params, delta = carry
        query, key, value, rate, out, mu = token
        feature = phi(params["theta"], key[None])
        error = lambda pred: rate * jnp.sum(loss_fn(pred, value[None]))  # noqa: E731
        objective = lambda p: error(phi(p["theta"], key[None]) @ p["w"])  # noqa: E731
        effective = -jax.grad(error)(feature @ params["w"])
        delta = jax.tree.map(lambda g, d: g + mu * d, jax.grad(objective)(params), delta)
        params = jax.tree.map(lambda p, d: p - out * d, params, delta)
        return (params, delta), (phi(params["theta"], query[None])[0], feature[0], effective[0])

    carry = params, jax.tree.map(jnp.zeros_like, params)
    _, effective = jax.lax.scan(visit, carry, tokens)
    *_, rate_out, momentum = tokens
    coeff = momentum_coefficients(jnp.ones_like(momentum), momentum, rate_out)[0]
    return LinearForm(*effective, params["w"], coeff)
