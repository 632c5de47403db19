"""Text environments of agents: the protocol, the text-house, games, and processes that step them."""
