"""Noise schedules alpha(t) and the times of a batch. Source: note on Psi-samplers, section 2."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxlab.diffusion.checks import wide


class Level(NamedTuple):
    """Probability that a token is kept, that it is not, and the derivative of the former by time.

    1 - alpha is carried, for it loses its digits when formed from alpha near time 0.
    """

    alpha: Float[Array, "*b"]
    one_minus_alpha: Float[Array, "*b"]
    dalpha: Float[Array, "*b"]


def log_linear(t: Float[Array, "*b"], eps: float = 1e-3) -> Level:
    """alpha = 1 - (1 - eps) t."""
    t = jnp.asarray(t, wide(t))
    return Level((1 - t) + eps * t, (1 - eps) * t, jnp.full_like(t, eps - 1))


def cosine(t: Float[Array, "*b"], eps: float = 1e-3, exact_derivative: bool = True) -> Level:
    """alpha = 1 - cos(pi/2 (1 - (1 - eps) t)).

    `exact_derivative` False is the release's, which lacks the factor 1 - eps.
    """
    t = jnp.asarray(t, wide(t))
    rest = (1 - t) + eps * t
    slope = -jnp.pi / 2 * jnp.sin(jnp.pi / 2 * rest)
    return Level(
        2 * jnp.sin(jnp.pi / 4 * rest) ** 2,
        jnp.sin(jnp.pi / 2 * (1 - eps) * t),
        slope * (1 - eps) if exact_derivative else slope,
    )


def inverse_log_linear(alpha: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The time of `alpha`, eps neglected."""
    return 1 - jnp.asarray(alpha, wide(alpha))


def inverse_cosine(alpha: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The time of `alpha`, eps neglected."""
    alpha = jnp.asarray(alpha, wide(alpha))
    return 1 - 4 / jnp.pi * jnp.arcsin(jnp.sqrt(alpha / 2))


class HostSchedule(NamedTuple):
    """A schedule in float64 NumPy, for tables made before tracing."""

    level: object  # (t, eps) -> (alpha, one_minus_alpha)
    inverse: object  # alpha -> t


def _host_cosine(t, eps):
    return 2 * np.sin(np.pi / 4 * ((1 - t) + eps * t)) ** 2, np.sin(np.pi / 2 * (1 - eps) * t)


HOST = {
    "log-linear": HostSchedule(
        lambda t, eps: ((1 - t) + eps * t, (1 - eps) * t), lambda alpha: 1 - alpha
    ),
    "cosine": HostSchedule(
        _host_cosine, lambda alpha: 1 - 4 / np.pi * np.arcsin(np.sqrt(alpha / 2))
    ),
}


def host_schedule(name: str) -> HostSchedule:
    """The schedule called `name`; ValueError for an unknown one."""
    if name not in HOST:
        raise ValueError(f"schedule={name!r} must be one of {list(HOST)}")
    return HOST[name]


def times_from_uniforms(
    u: Float[Array, "n"], eps: float = 1e-3, antithetic: bool = True
) -> Float[Array, "n"]:
    """Times in [eps, 1) of n examples from `u` in [0, 1); antithetic: one in each of n equal strata.

    Source: note on Psi-samplers, section 2.2. `n` is the global batch.
    """
    u = jnp.asarray(u, wide(u))
    if antithetic:
        n = u.shape[0]
        u = (u / n + jnp.arange(n, dtype=u.dtype) / n) % 1
    return (1 - eps) * u + eps


def sample_times(
    key: Key[Array, ""], n: int, eps: float = 1e-3, antithetic: bool = True
) -> Float[Array, "n"]:
    """`times_from_uniforms` of random numbers; ValueError for n < 1."""
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    return times_from_uniforms(jax.random.uniform(key, (n,)), eps, antithetic)
