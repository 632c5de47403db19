"""Environments as pure functions of arrays: `reset` and `step` run under jit, vmap and scan."""

from jaxlab.envs.house import (
    HouseConfig,
    HouseState,
    HouseStep,
    house_admissible,
    house_oracle,
    house_reset,
    house_step,
    house_won,
)
from jaxlab.envs.house_text import house_fields, house_observe, house_words

__all__ = [
    "HouseConfig",
    "HouseState",
    "HouseStep",
    "house_admissible",
    "house_fields",
    "house_observe",
    "house_oracle",
    "house_reset",
    "house_step",
    "house_won",
    "house_words",
]
