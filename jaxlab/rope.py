"""Rotary frequencies (Su et al., 2021) and the ways in use to stretch them."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor` (Chen et al., 2023)."""

    factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): a ramp over dimensions, counted in turns of the original context."""

    factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_max_position_embeddings: int = 32_768
    attention_factor: float | None = None
    truncate: bool = True


Scaling = LinearScaling | Llama3Scaling | YarnScaling


def rope_frequencies(head_dim: int, theta: float, scaling: Scaling | None = None) -> np.ndarray:
    """Angle per position of each pair of dimensions: float32 [head_dim / 2]."""
    if head_dim % 2 or head_dim < 2:
        raise ValueError(f"head_dim={head_dim} must be even and positive")
    if not theta > 0:
        raise ValueError(f"theta={theta} must be positive")
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if isinstance(scaling, LinearScaling):
        frequency = frequency / scaling.factor
    elif isinstance(scaling, Llama3Scaling):
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    elif isinstance(scaling, YarnScaling):
        keep = 1 - _yarn_ramp(head_dim, theta, scaling)
        frequency = keep * frequency + (1 - keep) * frequency / scaling.factor
    elif scaling is not None:
        raise ValueError(f"scaling={scaling!r} is not one of {Scaling}")
    return frequency.astype(np.float32)


def _yarn_ramp(head_dim: int, theta: float, scaling: YarnScaling) -> np.ndarray:
    """0 where a dimension turns more than beta_fast times in the original context, 1 below beta_slow."""

    def dimension(turns: float) -> float:
        period = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(period) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)


def yarn_attention_factor(scaling: YarnScaling) -> float:
    """What YaRN multiplies cos and sin by: 0.1 ln(factor) + 1 unless given."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0
