"""The inner net f(x) = phi(x) w1: its features, its read-out and the gradients of its loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.arguments import check_choice, check_shape, wide_type
from jaxlab.ttt.arguments import batched_weights, check_tokens
from jaxlab.ttt.config import NAMES, FastWeights, InnerConfig


def kernel(fw: FastWeights) -> tuple[jax.Array, jax.Array]:
    """(w0, w2) of a swiglu net, whose weights have been checked."""
    assert fw.w0 is not None and fw.w2 is not None
    return fw.w0, fw.w2


def features(net: str, fw: FastWeights, x: jax.Array) -> jax.Array:
    """phi(x): silu(x w0) * (x w2), or x itself for the linear net."""
    if net == "linear":
        return x
    w0, w2 = kernel(fw)
    return jax.nn.silu(x @ w0) * (x @ w2)


def read(net: str, fw: FastWeights, x: jax.Array) -> jax.Array:
    """f(x) for x [..., L, Dk] and weights [..., in, out]."""
    return features(net, fw, x) @ fw.w1


def outer_sum(left: jax.Array, right: jax.Array) -> jax.Array:
    """sum over tokens of left^T right: [..., L, m], [..., L, n] -> [..., m, n]."""
    return jnp.swapaxes(left, -1, -2) @ right


def minus_grads(
    net: str,
    loss: str,
    names: tuple[str, ...],
    fw: FastWeights,
    k: jax.Array,
    v: jax.Array,
    rates: jax.Array | None,
) -> dict[str, jax.Array]:
    """Minus the gradients of sum_i rate_i loss_i for the matrices `names`, each with its rate.

    In closed form, so that one matrix costs one product; `rates` [..., L, 3] or None.
    """
    weigh = lambda i, x: x if rates is None else rates[..., i : i + 1] * x  # noqa: E731
    if net == "linear":
        h = k
    else:
        a, b = (k @ w for w in kernel(fw))
        sigma = jax.nn.sigmoid(a)
        s = a * sigma
        h = s * b
    u = v if loss == "dot" else v - h @ fw.w1
    found = {"w1": outer_sum(h, weigh(1, u))} if "w1" in names else {}
    if "w0" in names or "w2" in names:
        p = u @ jnp.swapaxes(fw.w1, -1, -2)
        slope = sigma * (1 + a * (1 - sigma))
        if "w0" in names:
            found["w0"] = outer_sum(k, weigh(0, p * b * slope))
        if "w2" in names:
            found["w2"] = outer_sum(k, weigh(2, p * s))
    return found


def swiglu_minus_grads(
    fw: FastWeights,
    k: Float[Array, "*b c k"],
    v: Float[Array, "*b c v"],
    rates: Float[Array, "*b c 3"] | None = None,
    loss: str = "dot",
) -> FastWeights:
    """Minus the gradients of sum_i rate_i loss(f(k_i), v_i) over one chunk, to be added to `fw`.

    f is the swiglu net; each matrix has its own rate, in the order w0, w1, w2, None being 1.
    `fw` [..., in, out] has the leading axes of k, or broadcasts to them. The result is float32,
    float64 when v is. ValueError for an unknown loss or shapes that do not fit.
    Source: 2602.21204, section 3; 2505.23884.
    """
    check_choice("loss", loss, "dot", "squared")
    k, v = jnp.asarray(k), jnp.asarray(v)
    for name, x in {"k": k, "v": v}.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating-point type")
        if x.ndim < 2:
            raise ValueError(f"{name} has shape {x.shape}; expected axes (..., L, D)")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v has shape {v.shape}; expected {k.shape[:-1]} and one axis more")
    for name, x in zip(NAMES, fw, strict=True):
        if x is None or jnp.ndim(x) < 2:
            got = None if x is None else jnp.shape(x)
            raise ValueError(f"fw.{name} has shape {got}; expected axes (..., in, out)")
    inner = jnp.shape(fw.w1)[-2]
    ends = {"w0": (k.shape[-1], inner), "w1": (inner, v.shape[-1]), "w2": (k.shape[-1], inner)}
    for name, x in zip(NAMES, fw, strict=True):
        lead = jnp.shape(jnp.asarray(x))[:-2]
        check_shape(f"fw.{name}", x, (*lead, *ends[name]))
        try:
            fits = jnp.broadcast_shapes(lead, k.shape[:-2]) == k.shape[:-2]
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(f"fw.{name} has leading axes {lead}; those of k are {k.shape[:-2]}")
    if rates is not None:
        check_shape("rates", rates, (*k.shape[:-1], 3))
    wide = wide_type(v)
    fw, k, v, rates = jax.tree.map(lambda x: jnp.asarray(x).astype(wide), (fw, k, v, rates))
    return FastWeights(**minus_grads("swiglu", loss, NAMES, fw, k, v, rates))


def ttt_apply(
    fw: FastWeights, q: Float[Array, "b t h k"], cfg: InnerConfig
) -> Float[Array, "b t h v"]:
    """f(q; fw): reads and learns nothing; `fw` per head or per sequence and head.

    Computed in float32, or float64 when q is; the result has the type of q. With the `fw` of a
    state this reads what a run has learnt. ValueError for shapes that do not fit, TypeError for q
    that is not floating. Source: 2602.21204, section 3.
    """
    q, _, _ = check_tokens(q, q, q, "B T H Dk")
    wide = wide_type(q)
    fw = batched_weights(fw, cfg.net, q.shape[0], q.shape[2], q.shape[3], None, wide)
    x = jnp.swapaxes(q.astype(wide), 1, 2)
    return jnp.swapaxes(read(cfg.net, fw, x), 1, 2).astype(q.dtype)
