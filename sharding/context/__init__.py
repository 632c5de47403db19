"""Sequences sharded over the mesh: attention by several methods, and what recurrent layers exchange."""

from sharding.context.checks import LAYOUTS, METHODS, ContextConfig, check_context
from sharding.context.layer import attention_layer, automatic_attention, context_attention
from sharding.context.linear import context_recurrence
from sharding.context.prefix import halo_exchange, prefix_state_exchange
from sharding.context.schedule import HeadSchedule, head_schedule, legal_heads_per_stage
from sharding.context.ttt import context_ttt
from sharding.context.zigzag import zigzag_permutation, zigzag_shard, zigzag_unshard

__all__ = [
    "LAYOUTS",
    "METHODS",
    "ContextConfig",
    "HeadSchedule",
    "attention_layer",
    "automatic_attention",
    "check_context",
    "context_attention",
    "context_recurrence",
    "context_ttt",
    "halo_exchange",
    "head_schedule",
    "legal_heads_per_stage",
    "prefix_state_exchange",
    "zigzag_permutation",
    "zigzag_shard",
    "zigzag_unshard",
]
