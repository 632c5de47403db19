"""Attention of one device, by name: the same result from each, fast where it belongs.

A core is `core(q, k, v, *, causal, scale, segment_ids, window, softcap) -> out` on q [b, t, h, k] and
k, v [b, t, hk, k] of contiguous tokens, with a derivative of its own. Source: papers' note on UPipe,
sections 7.7 and 9.2.
"""

from collections.abc import Callable
from typing import Any

from jaxlab.attention import blockwise_attention, dense_attention


def find_core(core: str | Callable, platform: str) -> tuple[Callable, bool]:
    """The function named `core` and whether its types inside shard_map can be checked."""
    if callable(core):
        # What a stranger's loops carry need not be typed as varying.
        return core, False
    cores: dict[str, Any] = {"dense": dense_attention, "blockwise": blockwise_attention}
    return cores.get(core, blockwise_attention), True
