"""TTT-Linear and TTT-MLP: mini-batches of tokens, LayerNorm inside (Sun et al., 2024, 2407.04620).

The inner net maps k to LN(net(k)), trained on v - k. In a mini-batch all gradients are taken at its
start; token t reads the weights after the gradients of tokens up to t, with rates
eta[t, i] = rate_out_t * rate_in_i. The dual form never makes these weights, the primal one does.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.ttt.net import outer_sum

Layers = tuple[tuple[jax.Array, jax.Array], ...]  # (w [b, h, in, out], b [b, h, 1, out])


class TTTLinearParams(NamedTuple):
    """z = x w1 + b1; w1, b1 may carry a batch axis in front."""

    w1: Float[Array, "*b h k k"]
    b1: Float[Array, "*b h 1 k"]
    gamma: Float[Array, "h k"]
    beta: Float[Array, "h k"]


class TTTMLPParams(NamedTuple):
    """z = gelu(x w1 + b1) w2 + b2, hidden width 4k; w*, b* may carry a batch axis in front."""

    w1: Float[Array, "*b h k 4*k"]
    b1: Float[Array, "*b h 1 4*k"]
    w2: Float[Array, "*b h 4*k k"]
    b2: Float[Array, "*b h 1 k"]
    gamma: Float[Array, "h k"]
    beta: Float[Array, "h k"]


Params = TTTLinearParams | TTTMLPParams


class MiniBatchState(NamedTuple):
    """Weights at the start of the open mini-batch, its sums of gradients, its last rate_out."""

    params: Params
    sums: Layers
    rate_out: Float[Array, "b h"]
    count: Int[Array, ""]


class Static(NamedTuple):
    """What a mini-batch is compiled for."""

    kind: type[Params]
    chunk_size: int
    residual: str
    eps: float


gelu = functools.partial(jax.nn.gelu, approximate=True)


def layers_of(params: Params) -> Layers:
    """(weights, bias) of each layer of the inner net."""
    if isinstance(params, TTTMLPParams):
        return (params.w1, params.b1), (params.w2, params.b2)
    return ((params.w1, params.b1),)


def with_layers(params: Params, layers: Layers) -> Params:
    """`params` with the inner net's `layers`, as `layers_of` gives them."""
    flat = (x for layer in layers for x in layer)
    return params._replace(**dict(zip(params._fields, flat, strict=False)))


def _standardise(z: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    sd = jnp.sqrt(jnp.var(z, -1, keepdims=True) + eps)
    return (z - jnp.mean(z, -1, keepdims=True)) / sd, sd


def _norm_of(params: Params) -> tuple[jax.Array, jax.Array]:
    return params.gamma[:, None], params.beta[:, None]


def inner_gradients(params: Params, k, v, eps: float) -> tuple[list[jax.Array], list[jax.Array]]:
    """Of each layer its inputs, and the gradients of |LN(net(k)) - (v - k)|^2 / 2 at its outputs."""
    layers, (gamma, beta) = layers_of(params), _norm_of(params)
    inputs, pulls = [k], []
    for w, b in layers[:-1]:
        x, pull = jax.vjp(gelu, inputs[-1] @ w + b)
        inputs.append(x)
        pulls.append(pull)
    w, b = layers[-1]
    z, sd = _standardise(inputs[-1] @ w + b, eps)
    r = (gamma * z + beta - (v - k)) * gamma
    along = jnp.mean(r * z, -1, keepdims=True)
    grads = [(r - jnp.mean(r, -1, keepdims=True) - z * along) / sd]
    for pull, (w, _) in zip(reversed(pulls), reversed(layers), strict=False):
        grads.insert(0, pull(grads[0] @ jnp.swapaxes(w, -1, -2))[0])
    return inputs, grads


def output(params: Params, q, z, static: Static) -> jax.Array:
    """What a token reads: LayerNorm of the net's output z, beside the query or z itself."""
    gamma, beta = _norm_of(params)
    return (q if static.residual == "query" else z) + gamma * _standardise(z, static.eps)[0] + beta


def dual(static: Static, params: Params, chunk) -> tuple[Params, jax.Array]:
    """(params after a mini-batch, its outputs) without weights per token."""
    q, k, v, rate_in, rate_out = chunk
    inputs, grads = inner_gradients(params, k, v, static.eps)
    eta = jnp.tril(rate_out[..., :, None] * rate_in[..., None, :])
    last = eta[..., -1, :, None]
    x = z = q
    layers = []
    for (w, b), y, g in zip(layers_of(params), inputs, grads, strict=True):
        x = gelu(z) if layers else q
        z = x @ w - (eta * (x @ jnp.swapaxes(y, -1, -2))) @ g + b - eta @ g
        layers.append((w - outer_sum(last * y, g), b - jnp.sum(last * g, -2, keepdims=True)))
    return with_layers(params, tuple(layers)), output(params, q, z, static)


def commit(state: MiniBatchState) -> Params:
    """Parameters after the open mini-batch, learnt with its last rate_out."""
    rate = state.rate_out[..., None, None]
    layers = jax.tree.map(lambda w, s: w - rate * s, layers_of(state.params), state.sums)
    return with_layers(state.params, layers)


def step(static: Static, state: MiniBatchState, token) -> tuple[MiniBatchState, jax.Array]:
    """One token [b, h, k] (rates [b, h]): reads the weights after its own gradient."""
    q, k, v = (x[..., None, :] for x in token[:3])
    rate_in, rate_out = (x[..., None, None] for x in token[3:])
    full = state.count == static.chunk_size
    params = jax.tree.map(lambda new, old: jnp.where(full, new, old), commit(state), state.params)
    inputs, grads = inner_gradients(params, k, v, static.eps)
    sums, x = [], q
    z = q
    for (w, b), (dw, db), y, g in zip(layers_of(params), state.sums, inputs, grads, strict=True):
        dw = jnp.where(full, 0, dw) + outer_sum(rate_in * y, g)
        db = jnp.where(full, 0, db) + rate_in * g
        x = gelu(z) if sums else q
        z = x @ (w - rate_out * dw) + b - rate_out * db
        sums.append((dw, db))
    count = jnp.where(full, 0, state.count) + 1
    state = MiniBatchState(params, tuple(sums), token[4], count.astype(state.count.dtype))
    return state, output(params, q, z, static)[..., 0, :]
