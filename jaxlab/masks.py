"""What every form of attention agrees on: argument checks, the mask rule and the logits.

logit = scale * q.k, then softcap * tanh(logit / softcap) if given. Query i may see key j iff
(not causal or j <= i) and (window is None or |i - j| < window) and their segment ids are equal,
where i and j are positions. Source: papers' note on UPipe, section 9.1.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxlab.arguments import check_count, wide_type


class Rule(NamedTuple):
    """The static part of attention."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None


class Mask(NamedTuple):
    """The part made of arrays. Positions None: 0, 1, 2..."""

    q_positions: Int[Array, "#b t"] | None
    k_positions: Int[Array, "#b s"] | None
    q_segments: Int[Array, "b t"] | None
    k_segments: Int[Array, "b s"] | None


def check_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s hk k"],
    v: Float[Array, "b s hk kv"],
    *,
    causal: bool,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    segment_ids: Int[Array, "b t"] | None,
    k_segment_ids: Int[Array, "b s"] | None,
    q_positions: Int[Array, "#b t"] | None,
    k_positions: Int[Array, "#b s"] | None,
) -> tuple[Rule, Mask]:
    """The static rule and the mask of these arguments; ValueError for those that do not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(
                f"{name} must be [batch, length, heads, head dim], none 0, got {x.shape}"
            )
    b, t, h, d = q.shape
    s, hk = k.shape[1:3]
    if k.shape != (b, s, hk, d) or v.shape[:3] != (b, s, hk):
        raise ValueError(
            f"k must be [{b}, length, heads, {d}] as q is {q.shape}, and v begin as k does; "
            f"got k {k.shape}, v {v.shape}"
        )
    if h % hk:
        raise ValueError(f"query heads {h} must be a multiple of key/value heads {hk}")
    if not isinstance(causal, bool | np.bool_):
        raise ValueError(f"causal={causal!r} must be True or False")
    for name, number in (("scale", scale), ("softcap", softcap)):
        if isinstance(number, Tracer):
            raise ValueError(
                f"{name} must be known while tracing, got {number}: scale q by it instead"
            )
    if window is not None:
        window = check_count("window", window, 1)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be positive or None")
    if (q_positions is None) != (k_positions is None):
        raise ValueError("q_positions and k_positions must be given together")
    if q_positions is None and t != s:
        raise ValueError(f"lengths {t} of q and {s} of k differ: give q_positions and k_positions")
    if segment_ids is None and k_segment_ids is not None:
        raise ValueError("k_segment_ids needs segment_ids, those of the queries")
    if k_segment_ids is None:
        k_segment_ids = segment_ids
    for name, x, batches, length in (
        ("segment_ids", segment_ids, (b,), t),
        ("k_segment_ids", k_segment_ids, (b,), s),
        ("q_positions", q_positions, (b, 1), t),
        ("k_positions", k_positions, (b, 1), s),
    ):
        legal = [(batch, length) for batch in batches]
        if x is not None and x.shape not in legal:
            raise ValueError(f"{name} must be {' or '.join(map(str, legal))}, got {x.shape}")
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name} must be integers, got {x.dtype}")
    rule = Rule(bool(causal), float(d**-0.5 if scale is None else scale), window, softcap)
    return rule, Mask(q_positions, k_positions, segment_ids, k_segment_ids)


def allowed_pairs(
    rule: Rule,
    qp: Int[Array, "#b t"],
    kp: Int[Array, "#b s"],
    qs: Int[Array, "b t"] | None,
    ks: Int[Array, "b s"] | None,
) -> Bool[Array, "#b 1 1 t s"] | None:
    """Who may see whom, from positions and segment ids of both sides; None: everyone."""
    tests = []
    if rule.causal:
        tests.append(kp[:, None, :] <= qp[:, :, None])
    if rule.window is not None:
        tests.append(jnp.abs(qp[:, :, None] - kp[:, None, :]) < rule.window)
    if qs is not None and ks is not None:
        tests.append(qs[:, :, None] == ks[:, None, :])
    return functools.reduce(jnp.logical_and, tests)[:, None, None] if tests else None


def group_heads(q: Float[Array, "b t h k"], kv_heads: int) -> Float[Array, "b hk g t k"]:
    """Queries beside the key head they read, i // g; tokens last, as batched matmuls want them."""
    return rearrange(q, "b t (h g) k -> b h g t k", h=kv_heads)


def logits(
    rule: Rule, q: Float[Array, "b hk g t k"], k: Float[Array, "b hk s k"]
) -> Float[Array, "b hk g t s"]:
    """Scaled and soft-capped, in the wide type."""
    z = jnp.einsum("bhgtk,bhsk->bhgts", q, k, preferred_element_type=wide_type(q)) * rule.scale
    return z if rule.softcap is None else rule.softcap * jnp.tanh(z / rule.softcap)
