"""Sequences sharded over the mesh: attention by several methods, and what recurrent layers exchange."""

from sharding.context.linear import context_recurrence
from sharding.context.prefix import halo_exchange, prefix_state_exchange
from sharding.context.ttt import context_ttt

__all__ = ["context_recurrence", "context_ttt", "halo_exchange", "prefix_state_exchange"]
