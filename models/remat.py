"""What a block of a decoder keeps for the backward pass, by name."""

from collections.abc import Callable

import jax


def _offloaded(*names: str) -> Callable:
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


# What a block keeps for the backward pass; `None` recomputes everything. 'attn_y' alone lets what is
# recomputed skip attention; 'offload' keeps it, and the block's input, in the host's memory, and
# 'offload_input' the input alone: half of that memory, and one more forward pass of attention.
REMAT: dict[str, Callable | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attn_out", "attn_lse"),
    "attn_y": jax.checkpoint_policies.save_only_these_names("attn_y"),
    "offload": _offloaded("blk_in", "attn_y"),
    "offload_input": _offloaded("blk_in"),
}
