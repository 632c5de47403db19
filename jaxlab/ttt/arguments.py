"""What every layer of this package demands of its arrays: ValueError and TypeError by name."""

import jax
import jax.numpy as jnp

from jaxlab.arguments import check_shape
from jaxlab.ttt.config import FastWeights


def check_tokens(q, k, v, layout: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v as arrays, their axes named by the words of `layout`; v alone may end differently."""
    arrays = {name: jnp.asarray(x) for name, x in {"q": q, "k": k, "v": v}.items()}
    axes = layout.split()
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating-point type")
        if x.ndim != len(axes):
            raise ValueError(f"{name} has shape {x.shape}; expected axes ({', '.join(axes)})")
    q, k, v = arrays.values()
    if k.shape != q.shape:
        raise ValueError(f"k has shape {k.shape}; expected that of q, {q.shape}")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(
            f"v has shape {v.shape}; expected ({', '.join(map(str, q.shape[:-1]))}, *)"
        )
    return q, k, v


def check_gate(name: str, x, per_token: tuple[int, ...], wide, *more: tuple[int, ...]):
    """Gate `x` as an array of type `wide`, or None; its shape is `per_token` or among `more`."""
    if x is None:
        return None
    check_shape(name, x, per_token, *more)
    return jnp.asarray(x).astype(wide)


def check_rates(name: str, x, per_token: tuple[int, ...], wide):
    """Rates per token, one for all matrices or one each, as [*per_token, 3] of type `wide`, or None."""
    x = check_gate(name, x, per_token, wide, (*per_token, 3))
    if x is None or x.ndim > len(per_token):
        return x
    return jnp.broadcast_to(x[..., None], (*per_token, 3))


def batched(name: str, x, shape: tuple[int, ...], batch: int, wide) -> jax.Array:
    """Weight `x` of `shape`, which may lack its batch axis, as an array [batch, *shape].

    `wide` None keeps its type.
    """
    check_shape(name, x, shape, (batch, *shape))
    return jnp.broadcast_to(jnp.asarray(x, wide), (batch, *shape))


def batched_weights(
    fw: FastWeights,
    net: str,
    batch: int,
    heads: int | None,
    dk: int | None,
    dv: int | None,
    wide,
    name: str = "fw",
) -> FastWeights:
    """Fast weights of a swiglu or linear net as arrays [batch, heads, in, out] of type `wide`.

    `heads`, `dk`, `dv` None take any number; errors call the weights `name`. A linear
    net has w1 only, and w0, w2 become None.
    """
    if not isinstance(fw, FastWeights):
        raise TypeError(f"{name} is a {type(fw).__name__}; it must be FastWeights")

    def sizes(which, x):
        if x is None or jnp.ndim(x) not in (3, 4):
            got = "None" if x is None else f"shape {jnp.shape(x)}"
            raise ValueError(
                f"{name}.{which} has {got}; expected axes (H, in, out) or (B, H, in, out)"
            )
        return jnp.shape(x)[-3:]

    h, inner, out = sizes("w1", fw.w1)
    h = h if heads is None else heads
    dv = out if dv is None else dv
    if net == "linear":
        w1 = batched(f"{name}.w1 of a linear net", fw.w1, (h, dk or inner, dv), batch, wide)
        return FastWeights(None, w1, None)
    dk = sizes("w0", fw.w0)[1] if dk is None else dk
    w0 = batched(f"{name}.w0", fw.w0, (h, dk, inner), batch, wide)
    w2 = batched(f"{name}.w2", fw.w2, (h, dk, inner), batch, wide)
    return FastWeights(w0, batched(f"{name}.w1", fw.w1, (h, inner, dv), batch, wide), w2)
