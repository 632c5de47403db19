"""Attention of one device, by name: the same result from each, fast where it belongs.

A core is `core(q, k, v, *, causal, scale, segment_ids, window, softcap) -> out` on q [b, t, h, k] and
k, v [b, t, hk, k] of contiguous tokens, with a derivative of its own. Source: papers' note on UPipe,
sections 7.7 and 9.2.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxlab.attention import blockwise_attention, dense_attention
from jaxlab.masks import Rule
from sharding.context.checks import STAGED, ring_axis
from sharding.context.splash import splash_attention, splash_problem


def find_core(
    core: str | Callable, platform: str, devices: int, q, rule: Rule, segment_ids
) -> tuple[Callable, bool, bool]:
    """The core for q [b, t, h, k] on devices of `platform`; whether its types inside shard_map check;
    whether it is a kernel.

    'auto' is splash on TPUs and cudnn on GPUs where they can do what is asked, blockwise elsewhere,
    and also where `devices` > 1 outside of shard_map: compilers do not split kernels. ValueError,
    with the reason, for a core named that cannot.
    """
    if callable(core):
        # What a stranger's loops carry need not be typed as varying.
        return core, False, False
    name = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "blockwise") if core == "auto" else core
    if name in ("splash", "cudnn"):
        why = _problem(name, platform, devices, q, rule, segment_ids)
        if not why:
            # Kernels do not say how their results vary over the mesh.
            return _kernel(name, platform), False, True
        if core != "auto":
            raise ValueError(f"core={core!r} cannot be used: {why}; use core='blockwise' or 'auto'")
    return without_kernel(name), True, False


def check_core(
    sizes: Mapping[str, int],
    platform: str,
    *,
    method: str,
    core: str,
    stage_policy: str,
    seq_len: int,
    head_dim: int,
    dtype: Any,
    packed: bool,
) -> None:
    """ValueError for a choice that `attention_layer` would refuse while tracing, or take no notice of.

    `platform` '' is not known yet; `packed`: with segment ids.
    """
    axis = ring_axis(method)
    if stage_policy != "nothing" and method not in STAGED:
        raise ValueError(
            f"stage_policy={stage_policy!r} is for the methods {list(STAGED)}, not {method!r}: use "
            f"'nothing'"
        )
    if stage_policy == "attn_out" and core == "cudnn":
        raise ValueError("stage_policy='attn_out' keeps nothing of core='cudnn': use 'nothing'")
    if axis and sizes.get(axis, 1) > 1:
        if core not in ("auto", "blockwise"):
            raise ValueError(
                f"core={core!r} is not used, {method!r} has attention of its own: use core='auto'"
            )
    elif platform:
        sequence = sizes.get("ring", 1) * sizes.get("context", 1)
        split = math.prod(sizes.values()) if method == "none" and sequence > 1 else 1
        q = jax.ShapeDtypeStruct((1, seq_len, 1, head_dim), dtype)
        segments = True if packed else None
        find_core(core, platform, split, q, Rule(True, 1.0, None, None), segments)


def without_kernel(core: str) -> Callable:
    """What goes for `core` where no kernel can: attention of a cache, at positions of its own."""
    return dense_attention if core == "dense" else blockwise_attention


def _kernel(name: str, platform: str) -> Callable:
    """Always the same object: what is made anew at every call is compiled anew."""
    if name == "cudnn":
        return _cudnn
    return splash_attention if platform == "tpu" else _interpreted


_interpreted = functools.partial(splash_attention, interpret=True)


def _problem(name: str, platform: str, devices: int, q, rule: Rule, segment_ids) -> str:
    """Why the kernel cannot do it; '' if it can."""
    if devices > 1:
        return (
            f"the compiler splits what {devices} devices do by method 'none', and splits no kernels"
        )
    if name == "splash":
        return splash_problem(q)
    if segment_ids is not None:
        return "cuDNN's kernel takes no segment_ids, and would let documents see each other"
    if rule.softcap is not None:
        return f"cuDNN's kernel has no softcap={rule.softcap}"
    if rule.window is not None and not rule.causal:
        return f"cuDNN's kernel has a window={rule.window} only to the left, for causal attention"
    if q.dtype not in ("bfloat16", "float16") or q.shape[3] % 8 or q.shape[3] > 128:
        return (
            f"cuDNN's kernel needs bfloat16 or float16 and a head dim of at most 128, divisible by 8, "
            f"got {q.dtype} and {q.shape[3]}"
        )
    return "" if platform == "gpu" else f"cuDNN needs GPUs, these devices are {platform}"


def _cudnn(q, k, v, *, causal, scale, segment_ids, window, softcap):
    assert segment_ids is None and softcap is None and (causal or window is None)
    reach = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, local_window_size=reach, implementation="cudnn"
    )
