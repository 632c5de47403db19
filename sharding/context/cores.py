"""Attention of one device, by name: the same result from each, fast where it belongs.

A core is `core(q, k, v, *, causal, scale, segment_ids, window, softcap) -> out` on q [b, t, h, k] and
k, v [b, t, hk, k] of contiguous tokens, with a derivative of its own. Source: papers' note on UPipe,
sections 7.7 and 9.2.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxlab.attention import blockwise_attention, dense_attention
from jaxlab.masks import Rule
from sharding.context.splash import splash_attention, splash_problem


def find_core(
    core: str | Callable, platform: str, devices: int, q, rule: Rule, segment_ids
) -> tuple[Callable, bool]:
    """The core for q [b, t, h, k] on devices of `platform`; whether its types inside shard_map check.

    'auto' is splash on TPUs and cudnn on GPUs where they can do what is asked, blockwise elsewhere,
    and also where `devices` > 1 outside of shard_map: compilers do not split kernels. ValueError,
    with the reason, for a core named that cannot.
    """
    if callable(core):
        # What a stranger's loops carry need not be typed as varying.
        return core, False
    problems = {
        "splash": lambda: splash_problem(q),
        "cudnn": lambda: _cudnn_problem(platform, q, rule, segment_ids),
    }
    if core == "auto":
        core = {"tpu": "splash", "gpu": "cudnn"}.get(platform, "blockwise")
        if core in problems and (devices > 1 or problems[core]()):
            core = "blockwise"
    elif core in problems and (why := problems[core]()):
        raise ValueError(f"core={core!r} cannot be used: {why}; use core='blockwise' or 'auto'")
    cores: dict[str, tuple[Any, bool]] = {
        "dense": (dense_attention, True),
        "blockwise": (blockwise_attention, True),
        # Kernels do not say how their results vary over the mesh.
        "splash": (splash_attention if platform == "tpu" else _interpreted, False),
        "cudnn": (_cudnn, False),
    }
    return cores[core]


# A name: what is made anew at every call is compiled anew.
_interpreted = functools.partial(splash_attention, interpret=True)


def _cudnn_problem(platform: str, q, rule: Rule, segment_ids) -> str:
    """Why cuDNN's kernel cannot do it; '' if it can."""
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
