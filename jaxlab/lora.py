"""Low-rank adapters of a parameter tree (Hu et al., 2022): W + (alpha / rank) A B, the tree pure data.

A weight is a stack of matrices whose sides may be several axes each: `wq` [layers, d, h, k] is `layers`
matrices d x (h k). Its adapter is {"a": [*stack, *inputs, rank], "b": [*stack, rank, *outputs]}, so
both lie on a mesh as the weight does. Adapters form a tree like the parameters', targets only.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.paths import Tree, flatten, unflatten

Adapter = dict[str, jax.Array]


class Sides(NamedTuple):
    """How a weight is read as matrices: `stack` leading axes, then `inputs` axes; the rest is output."""

    stack: int = 0
    inputs: int = 1


Target = Callable[[str, Any], bool | Sides]


def lora_init(
    key: jax.Array,
    params: Tree,
    *,
    rank: int,
    target: Target,
    dtype: Any = None,
    init: Literal["normal", "kaiming"] = "normal",
) -> Tree:
    """Adapters of the leaves that `target(path, leaf)` names, the identity at first: B is zero.

    A ~ N(0, 1 / fan_in), or uniform in +-1 / sqrt(fan_in) for `kaiming` (what PEFT calls
    kaiming_uniform with a = sqrt(5)). `path` is "blocks/mixer_0/wq"; the target answers True for a
    plain [in, out] matrix and `Sides` for others. `dtype` is that of the adapters, None: the leaf's.
    ValueError for rank < 1, an unknown init, no target, or a target that is not a matrix.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    if init not in ("normal", "kaiming"):
        raise ValueError(f"init={init!r} must be 'normal' or 'kaiming'")
    chosen = [(path, leaf, target(path, leaf)) for path, leaf in flatten(params).items()]
    chosen = [c for c in chosen if c[2]]
    if not chosen:
        raise ValueError(f"target matches none of the parameters {sorted(flatten(params))}")
    for path, leaf, how in chosen:
        if how is True and leaf.ndim > 2:
            raise ValueError(
                f"target {path} of shape {leaf.shape}: say how it is a matrix by Sides"
            )
        sides = how if isinstance(how, Sides) else Sides()
        if sides.inputs < 1 or leaf.ndim - sum(sides) < 1:
            raise ValueError(f"target {path} of shape {leaf.shape} is no matrix under {sides}")
    fixed = [(path, leaf, how if isinstance(how, Sides) else Sides()) for path, leaf, how in chosen]
    out = {}
    for one, (path, leaf, how) in zip(jax.random.split(key, len(fixed)), fixed, strict=True):
        stack, rest = leaf.shape[: how.stack], leaf.shape[how.stack :]
        a_shape = (*stack, *rest[: how.inputs], rank)
        scale, kind = math.prod(rest[: how.inputs]) ** -0.5, dtype or leaf.dtype
        if init == "normal":
            a = scale * jax.random.normal(one, a_shape, kind)
        else:
            a = jax.random.uniform(one, a_shape, kind, -scale, scale)
        b = jnp.zeros((*stack, rank, *rest[how.inputs :]), kind)
        out[path] = {"a": a.astype(kind), "b": b}
    return unflatten(out)


def lora_delta(adapter: Adapter) -> Float[Array, "..."]:
    """A B of one adapter without stacked axes, in its weight's shape and float32 (or wider).

    The product is over the adapter's own axes: [*inputs, rank] and [rank, *outputs].
    """
    wide = jnp.promote_types(adapter["a"].dtype, jnp.float32)
    return jnp.tensordot(adapter["a"].astype(wide), adapter["b"].astype(wide), 1)


def lora_product(x: Float[Array, "..."], adapter: Adapter, inputs: int = 1) -> Float[Array, "..."]:
    """(x A) B over the last `inputs` axes of x, in x.dtype; the weight-sized A B is never formed."""
    low = jnp.tensordot(x, adapter["a"].astype(x.dtype), inputs)
    return jnp.tensordot(low, adapter["b"].astype(x.dtype), 1)


def lora_scale(lora: Tree, *, alpha: float) -> Tree:
    """The adapters with alpha / rank folded into B, as `lora_delta` and `lora_product` expect."""
    each = {p: {"a": x["a"], "b": x["b"] * (alpha / x["a"].shape[-1])} for p, x in pairs(lora)}
    return unflatten(each)


def lora_merge(params: Tree, lora: Tree, *, alpha: float) -> Tree:
    """Parameters with W + (alpha / rank) A B at every target, summed in float32, in W's type.

    Leaves without an adapter are the same arrays. Adapters merge one after another; a negative alpha
    takes one out again. ValueError for an adapter that fits no leaf.
    """
    flat = flatten(params)
    for path, adapter in pairs(lora_scale(lora, alpha=alpha)):
        a, b, w = adapter["a"], adapter["b"], flat.get(path)
        if w is None:
            raise ValueError(f"adapter {path} belongs to none of the parameters {sorted(flat)}")
        stack = a.ndim + b.ndim - 2 - w.ndim
        inputs = a.ndim - 1 - stack
        fits = 0 <= stack and (*a.shape[:-1], *b.shape[stack + 1 :]) == w.shape
        if not fits or inputs < 1 or a.shape[:stack] != b.shape[:stack]:
            raise ValueError(
                f"adapter {path} of shapes {a.shape}, {b.shape} does not fit {w.shape}"
            )
        delta = lora_delta
        for _ in range(stack):
            delta = jax.vmap(delta)
        change = delta(adapter)
        flat[path] = (w.astype(change.dtype) + change).astype(w.dtype)
    return unflatten(flat)


def lora_unmerge(params: Tree, lora: Tree, *, alpha: float) -> Tree:
    """Inverse of `lora_merge`, up to rounding in the type of the parameters."""
    return lora_merge(params, lora, alpha=-alpha)


def lora_stack(loras: Sequence[Tree]) -> Tree:
    """Several adapters of equal shapes as one tree with a leading axis: index it, or vmap over it."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *loras)


def lora_num_params(lora: Tree) -> int:
    """Number of trained values."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(lora))


def pairs(lora: Tree, prefix: str = "") -> list[tuple[str, Adapter]]:
    """(path of the weight, its adapter) of every target."""
    if set(lora) == {"a", "b"} and not isinstance(lora["a"], dict):
        return [(prefix, lora)]
    return [pair for k, v in lora.items() for pair in pairs(v, f"{prefix}/{k}" if prefix else k)]
