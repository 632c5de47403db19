"""Noise schedules: levels of a discrete diffusion at a time, and times of low variance.

Source: Sahoo et al., 2025 (arXiv 2506.10892); note on Psi-samplers, section 2.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxlab.arguments import check_choice, wide, wide_type
from jaxlab.diffusion.arguments import check_count


class Level(NamedTuple):
    """How much of a clean token is left: three fields of equal shape."""

    alpha: Float[Array, "*b"]  # probability that the token is kept
    one_minus_alpha: Float[Array, "*b"]  # its own field: 1 - alpha loses all digits near t = 0
    dalpha: Float[Array, "*b"]  # d alpha / dt


def _log_linear(t, eps: float, xp) -> Level:
    # (1 - t) + eps t, not 1 - (1 - eps) t: -log alpha keeps its digits near t = 1.
    return Level((1 - t) + eps * t, (1 - eps) * t, xp.full_like(t, -(1 - eps)))


def _cosine(t, eps: float, xp, exact_derivative: bool = True) -> Level:
    left = np.pi / 2 * ((1 - t) + eps * t)
    slope = -np.pi / 2 * (1 - eps if exact_derivative else 1)
    # Half angles and sines, not 1 - cos and cos: each part keeps its digits where it is near 0.
    alpha, rest = 2 * xp.square(xp.sin(left / 2)), xp.sin(np.pi / 2 * (1 - eps) * t)
    return Level(alpha, rest, slope * xp.sin(left))


SCHEDULES = {"log-linear": _log_linear, "cosine": _cosine}


def log_linear(t: Float[Array, "*b"], eps: float = 1e-3) -> Level:
    """alpha = 1 - (1 - eps) t, the schedule of text; fields of the shape of `t` in [0, 1].

    float32 (float64 if t is). Source: note on Psi-samplers, section 2.1.
    """
    return _log_linear(wide(t), eps, jnp)


def cosine(t: Float[Array, "*b"], eps: float = 1e-3, exact_derivative: bool = True) -> Level:
    """alpha = 1 - cos(pi/2 (1 - (1 - eps) t)), the schedule of images; fields of the shape of `t`.

    float32 (float64 if t is). With `exact_derivative` False the derivative lacks its factor
    1 - eps, as in the release. Source: note on Psi-samplers, section 2.1.
    """
    return _cosine(wide(t), eps, jnp, exact_derivative)


def host_level(t: np.ndarray, schedule: str, eps: float) -> Level:
    """The level at times known on the host, float64 NumPy. ValueError for an unknown schedule."""
    check_choice("schedule", schedule, *SCHEDULES)
    return SCHEDULES[schedule](np.asarray(t, np.float64), eps, np)


def inverse_log_linear(alpha: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Time at which the log-linear schedule without eps has this alpha: 1 - alpha."""
    return 1 - wide(alpha)


def inverse_cosine(alpha: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """Time at which the cosine schedule without eps has this alpha: 1 - 2/pi acos(1 - alpha)."""
    return 1 - 2 / np.pi * jnp.arccos(1 - wide(alpha))


def host_time(alpha: float, schedule: str) -> float:
    """The inverse schedule of a number, in float64. ValueError for an unknown schedule."""
    check_choice("schedule", schedule, *SCHEDULES)
    return 1 - alpha if schedule == "log-linear" else 1 - 2 / np.pi * float(np.arccos(1 - alpha))


def times_from_uniforms(
    u: Float[Array, "n"], eps: float = 1e-3, antithetic: bool = True
) -> Float[Array, "n"]:
    """Times in [eps, 1) from uniforms in [0, 1), one a stratum of [0, 1) if `antithetic`.

    The strata run over the whole vector: give it the global batch. ValueError unless u is [n].
    Source: note on Psi-samplers, section 2.2.
    """
    u = wide(u)
    if u.ndim != 1:
        raise ValueError(f"u has shape {u.shape}; expected axes (n,)")
    if antithetic:
        n = u.shape[0]
        u = (u / n + jnp.arange(n, dtype=u.dtype) / n) % 1
    return (1 - eps) * u + eps


def sample_times(
    key: Key[Array, ""], n: int, eps: float = 1e-3, antithetic: bool = True
) -> Float[Array, "n"]:
    """`times_from_uniforms` of `n` draws from `key`: derive the whole global batch from one key.

    ValueError unless n is at least 1. Source: note on Psi-samplers, section 2.2.
    """
    check_count("n", n, 1)
    return times_from_uniforms(jax.random.uniform(key, (n,), wide_type(1.0)), eps, antithetic)
