"""Attention on a sequence sharded over the mesh: the public calls, each one `shard_map`.

Heads are in natural order in every argument and result, so that a checkpoint knows nothing of the
method. Source: papers' note on UPipe, section 9.2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from jaxlab.varying import vary_like
from sharding.context.checks import METHODS, STAGED
from sharding.context.cores import without_kernel
from sharding.context.plan import Plan, make_plan
from sharding.context.stages import Layer, Rotation, Weights, staged, whole
from sharding.mesh import AXES


def attention_layer(
    x: Float[Array, "b S D"],
    wq: Float[Array, "D H d"],
    wk: Float[Array, "D Hkv d"],
    wv: Float[Array, "D Hkv d"],
    wo: Float[Array, "H d D"],
    *,
    mesh: Any = None,
    method: str = "none",
    heads_per_stage: int | None = None,
    positions: Int[Array, "b S"] | None = None,
    segment_ids: Int[Array, "b S"] | None = None,
    inv_freq: Float[Array, "half"] | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    layout: str = "contiguous",
    core: str | Callable = "auto",
    stage_policy: str = "nothing",
    rope_factor: float = 1.0,
    q_norm: Float[Array, "d"] | None = None,
    k_norm: Float[Array, "d"] | None = None,
    norm_eps: float = 1e-6,
) -> Float[Array, "b S D"]:
    """Projections, rotary positions, attention and output projection, tokens sharded by `method`.

    Returns y [b, S, D] in x.dtype, named 'attn_y' for remat policies; weights are used in x.dtype.
    `mesh` None is that of `jax.set_mesh`. `heads_per_stage` None is the smallest legal number.
    `positions` (default: natural token index) turn queries and keys by `inv_freq` and mean nothing to
    the mask; `rope_factor` is YaRN's, `q_norm` and `k_norm` gains of RMSNorm before the rotation. With
    layout 'zigzag' the tokens of every argument are in the order of `zigzag_permutation`. A function
    `core` replaces the attention of one device; see sharding.context.cores: methods with a ring of
    more than one device have their own, whatever its name. `stage_policy` is for staged methods,
    others take no notice. ValueError, before anything runs, for what cannot work. Source: UPipe
    (arXiv 2602.21196), sections 3 and 9.2 of the papers' note.
    """
    x, wq, wk, wv, wo = (jnp.asarray(a) for a in (x, wq, wk, wv, wo))
    given = (segment_ids, inv_freq, q_norm, k_norm)
    segment_ids, inv_freq, q_norm, k_norm = (_array_or_none(a) for a in given)
    _check_weights(x, wq, wk, wv, wo, inv_freq, q_norm, k_norm)
    b, s, _ = x.shape
    (_, h, d), hk = wq.shape, wk.shape[1]
    q = jax.ShapeDtypeStruct((b, s, h, d), x.dtype)
    kv = jax.ShapeDtypeStruct((b, s, hk, d), x.dtype)
    plan = make_plan(
        q, kv, kv, mesh=mesh, method=method, layout=layout, core=core, policy=stage_policy,
        heads_per_stage=heads_per_stage, segment_ids=segment_ids, rope_factor=rope_factor,
        norm_eps=norm_eps, causal=causal, scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    if positions is not None:
        positions = jnp.asarray(positions)
        whole = jnp.issubdtype(positions.dtype, jnp.integer)
        if positions.shape not in ((b, s), (1, s)) or not whole:
            raise ValueError(
                f"positions must be integers {(b, s)} or {(1, s)}, got {positions.dtype} "
                f"{positions.shape}"
            )
        positions = jnp.broadcast_to(positions, (b, s))
    weights = Weights(*(w.astype(x.dtype) for w in (wq, wk, wv, wo)))
    y = _traced(_layer, core)(plan, x, weights, positions, segment_ids, inv_freq, q_norm, k_norm)
    return checkpoint_name(y, "attn_y")


def _array_or_none(value: Any) -> Any:
    return None if value is None else jnp.asarray(value)


def _traced(function: Callable, core: str | Callable) -> Callable:
    """`function` of a plan and arrays, compiled once a plan; with a `core` of the caller's, once a call,
    for that may count its calls, depend on more than its arguments, or have no hash."""
    if isinstance(core, str):
        return functools.partial(_compiled, function)
    return lambda plan, *arrays: jax.jit(functools.partial(function, plan), inline=True)(*arrays)


@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _compiled(function: Callable, plan: Plan, *arrays):
    return function(plan, *arrays)


def _layer(plan: Plan, x, weights: Weights, positions, segment_ids, inv_freq, q_norm, k_norm):
    def local(x, weights, positions, segment_ids, inv_freq, q_norm, k_norm):
        # One type for all: sums over devices are then taken once, not in every stage.
        floats = x, weights, inv_freq, q_norm, k_norm
        x, weights, inv_freq, q_norm, k_norm = jax.tree.map(lambda a: vary_like(a, floats), floats)
        if positions is None:
            positions = plan.positions(x.shape[1])
        rotation = Rotation(positions, inv_freq, plan.rope_factor, q_norm, k_norm, plan.norm_eps)
        layer = Layer(functools.partial(plan.attend, segment_ids), plan.exchange, rotation)
        if plan.schedule is None:
            y = whole(layer, x, weights)
        else:
            y = staged(layer, plan.schedule, plan.policy, x, weights)
        split = plan.mesh is not None and "tensor" in plan.mesh.axis_names
        return jax.lax.psum(y, "tensor") if split else y

    specs: tuple[Any, ...] = ()
    if plan.mesh is not None:
        tokens, segments, heads, out_heads = plan.specs()
        weight_specs: Any = (P(None, heads[2]),) * 3 + (out_heads,)
        specs = (tokens, Weights(*weight_specs), tokens, segments, P(), P(), P())
    run = plan.shard(local, specs, specs[0] if specs else None)
    return run(x, weights, positions, segment_ids, inv_freq, q_norm, k_norm)


def context_attention(
    q: Float[Array, "b S H d"],
    k: Float[Array, "b S Hkv d"],
    v: Float[Array, "b S Hkv d"],
    *,
    mesh: Any = None,
    method: str = "none",
    segment_ids: Int[Array, "b S"] | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    layout: str = "contiguous",
    core: str | Callable = "auto",
) -> Float[Array, "b S H d"]:
    """`jaxlab.attention.dense_attention` of projected, rotated q, k, v, tokens sharded by `method`.

    Keywords are those of `attention_layer`. ValueError, before anything runs, for what cannot work,
    the upipe methods among it, which save memory only if they project within a stage.
    """
    if method in STAGED:
        raise ValueError(
            f"method={method!r} needs attention_layer: its saving comes from projecting heads "
            f"inside a stage; here use one of {[m for m in METHODS if m not in STAGED]}"
        )
    q, k, v = (jnp.asarray(a) for a in (q, k, v))
    segment_ids = _array_or_none(segment_ids)
    plan = make_plan(
        q, k, v, mesh=mesh, method=method, layout=layout, core=core, segment_ids=segment_ids,
        causal=causal, scale=scale, window=window, softcap=softcap,
    )  # fmt: skip
    return _traced(_attention, core)(plan, q, k, v, segment_ids)


def automatic_attention(
    q: Float[Array, "b S H d"],
    k: Float[Array, "b S Hkv d"],
    v: Float[Array, "b S Hkv d"],
    *,
    segment_ids: Int[Array, "b S"] | None = None,
    core: str = "auto",
) -> Float[Array, "b S H d"]:
    """Causal `context_attention` by method 'none', rows and lengths as they come.

    By a kernel where the platform has one and every device of the mesh of `jax.set_mesh` can have
    whole rows and heads; else, on meshes of other axes and inside shard_map without one.
    """
    around = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in around.axis_types or set(around.axis_names) - set(AXES):
        return without_kernel(core)(q, k, v, causal=True, segment_ids=segment_ids)
    mask: dict[str, Any] = dict(causal=True, scale=None, window=None, softcap=None)
    plan = make_plan(
        q, k, v, mesh=None, method="none", core=core, segment_ids=segment_ids, strict=False, **mask
    )
    return _traced(_attention, core)(plan, q, k, v, segment_ids)


def _attention(plan: Plan, q, k, v, segment_ids):
    def local(q, k, v, segment_ids):
        swap = plan.exchange
        out = plan.attend(segment_ids, swap.to_heads(q), swap.keys(k), swap.keys(v))
        return swap.to_tokens(out)

    specs: tuple[Any, ...] = ()
    if plan.mesh is not None:
        _, segments, heads, _ = plan.specs()
        specs = (heads, heads, heads, segments)
    return plan.shard(local, specs, specs[0] if specs else None)(q, k, v, segment_ids)


def _check_weights(x, wq, wk, wv, wo, inv_freq, q_norm, k_norm) -> None:
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x must be [batch, length, width], none 0, got {x.shape}")
    for name, w in (("wq", wq), ("wk", wk)):
        if w.ndim != 3 or w.shape[0] != x.shape[2]:
            raise ValueError(f"{name} must be [{x.shape[2]}, heads, head dim], got {w.shape}")
    (width, h, d), hk = wq.shape, wk.shape[1]
    for name, w, shape in (
        ("wk", wk, (width, hk, d)),
        ("wv", wv, (width, hk, d)),
        ("wo", wo, (h, d, width)),
        ("inv_freq", inv_freq, (d // 2,)),
        ("q_norm", q_norm, (d,)),
        ("k_norm", k_norm, (d,)),
    ):
        if w is not None and w.shape != shape:
            raise ValueError(f"{name} must be {shape} for wq {wq.shape}, got {w.shape}")
