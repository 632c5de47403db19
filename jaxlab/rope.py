"""Rotary positions (Su et al., 2021): the rotation, its frequencies, the ways in use to stretch them."""

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def _check_stretch(factor: float, original: int = 1) -> None:
    if not 0 < factor < math.inf:
        raise ValueError(f"factor={factor} must be positive and finite")
    if original < 1:
        raise ValueError(f"original_max_position_embeddings={original} must be at least 1")


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by `factor` (Chen et al., 2023)."""

    factor: Annotated[float, "how many times longer the context becomes"] = 1.0

    def __post_init__(self):
        _check_stretch(self.factor)


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between."""

    factor: Annotated[float, "what long wavelengths are divided by"] = 8.0
    low_freq_factor: Annotated[float, "turns of the old context below which all is divided"] = 1.0
    high_freq_factor: Annotated[float, "turns above which nothing is"] = 4.0
    original_max_position_embeddings: Annotated[int, "context before stretching"] = 8192

    def __post_init__(self):
        _check_stretch(self.factor, self.original_max_position_embeddings)
        low, high = self.low_freq_factor, self.high_freq_factor
        if not low < high:
            raise ValueError(f"low_freq_factor={low} must be below high_freq_factor={high}")


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): a ramp over dimensions, counted in turns of the original context."""

    factor: Annotated[float, "how many times longer the context becomes"] = 4.0
    beta_fast: Annotated[float, "turns of the old context above which nothing is divided"] = 32.0
    beta_slow: Annotated[float, "turns below which all is"] = 1.0
    original_max_position_embeddings: Annotated[int, "context before stretching"] = 32_768
    attention_factor: Annotated[float | None, "of cos and sin; none: 0.1 ln(factor) + 1"] = None
    truncate: Annotated[bool, "round the ramp's ends to whole dimensions"] = True

    def __post_init__(self):
        _check_stretch(self.factor, self.original_max_position_embeddings)
        slow, fast = self.beta_slow, self.beta_fast
        if not 0 < slow < fast:
            raise ValueError(f"beta_slow={slow} must be below beta_fast={fast}, both positive")


Scaling = LinearScaling | Llama3Scaling | YarnScaling


def rope_frequencies(head_dim: int, theta: float, scaling: Scaling | None = None) -> np.ndarray:
    """Angle per position of each pair of dimensions: float32 [head_dim / 2].

    theta^(-2 i / head_dim) for pair i, stretched by `scaling`. YaRN also wants the result of
    `yarn_attention_factor` on queries and keys. ValueError for an odd head_dim or theta <= 1.
    """
    if head_dim % 2 or head_dim < 2:
        raise ValueError(f"head_dim={head_dim} must be even and positive")
    if not theta > 1:
        raise ValueError(f"theta={theta} must be above 1")
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
        legal = "LinearScaling, Llama3Scaling, YarnScaling, None"
        raise ValueError(f"scaling={scaling!r} is not one of {legal}")
    return frequency


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


def rope_factor(scaling: Scaling | None) -> float:
    """What `apply_rope` multiplies cos and sin by: 1 for every scaling but YaRN."""
    return yarn_attention_factor(scaling) if isinstance(scaling, YarnScaling) else 1.0


def yarn_attention_factor(scaling: YarnScaling) -> float:
    """What YaRN multiplies cos and sin by: 0.1 ln(factor) + 1 unless given."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 1.0 if scaling.factor <= 1 else 0.1 * math.log(scaling.factor) + 1.0


def apply_rope(
    x: Float[Array, "b t h k"],
    positions: Int[Array, "#b t"],
    inv_freq: Float[Array, "half"] | None,
    factor: float = 1.0,
) -> Float[Array, "b t h k"]:
    """Rotates pairs (x1, x2) of the two halves of the head by position * inv_freq.

    [x1, x2] -> [x1 cos - x2 sin, x2 cos + x1 sin], cos and sin times `factor`, computed in float32
    (float64 if x is), returned in x.dtype; `inv_freq` [k / 2], None is the identity. ValueError for
    shapes that do not fit.
    """
    if inv_freq is None:
        return x
    if x.shape[-1] != 2 * inv_freq.shape[-1]:
        raise ValueError(f"inv_freq {inv_freq.shape} must be half the head dim of x {x.shape}")
    b, t = x.shape[:2]
    if positions.shape not in ((b, t), (1, t)):
        raise ValueError(f"positions must be {(b, t)} or {(1, t)}, got {positions.shape}")
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angle = positions[..., None].astype(wide) * jnp.asarray(inv_freq, wide)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    # Halves are widened after they are cut and narrowed before they are joined: compilers keep what is
    # cut or joined in memory, forward and backward.
    x1, x2 = (half.astype(wide) for half in jnp.split(x, 2, -1))
    halves = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    return jnp.concatenate([half.astype(x.dtype) for half in halves], -1)
