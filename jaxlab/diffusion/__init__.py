"""Discrete diffusion: forward noise, posteriors, losses, the Gaussian duality, samplers, distillation.

Tokens are integers [b, t]; v is the size of the vocabulary, with the mask where there is one. Source:
Duo 2506.10892, Duo++ 2602.21185 and their note, whose sections the docstrings name.
"""

from jaxlab.diffusion import (
    curriculum,
    distill,
    forward,
    losses,
    metrics,
    operator,
    posterior,
    samplers,
    schedules,
)

__all__ = [
    "curriculum",
    "distill",
    "forward",
    "losses",
    "metrics",
    "operator",
    "posterior",
    "samplers",
    "schedules",
]
