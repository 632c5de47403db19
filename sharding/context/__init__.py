"""Sequences sharded over the mesh: attention by several methods, and what recurrent layers exchange."""

from sharding.context.prefix import halo_exchange, prefix_state_exchange

__all__ = ["halo_exchange", "prefix_state_exchange"]
