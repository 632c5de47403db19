"""What the functions of this package demand of their arguments: ValueError and TypeError by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxlab import arguments
from jaxlab.arguments import check_choice, demand, wide

PRIORS = ("uniform", "masked")
HOST = (int, float, np.ndarray, np.generic)

check_count = functools.partial(arguments.check_count, wrong_type=TypeError)


def level_part(x):
    """A level as given: host values stay NumPy float64, so that differences of them are exact."""
    return np.asarray(x, np.float64) if isinstance(x, HOST) else wide(x)


def per_token(x, dtype, extra: int = 0) -> jax.Array:
    """A level in `dtype`, with `extra` axes at its end for the vocabulary or the k."""
    x = jnp.asarray(x, dtype)
    return x.reshape(x.shape + (1,) * extra)


def check_range(name: str, value, low: float, high: float, *, open_low: bool = False) -> None:
    """ValueError for values out of [low, high], or (low, high]; of traced ones as `demand`."""
    shown = "" if isinstance(value, Tracer) else f"={value}"
    message = f"{name}{shown} must be in {'(' if open_low else '['}{low:g}, {high:g}]"
    demand(lambda xp, x: (x > low if open_low else x >= low) & (x <= high), message, value)


def check_alphas(alpha_s, alpha_t) -> None:
    """ValueError for levels out of (0, 1], or a later one above an earlier one; traced ones as `demand`."""
    check_range("alpha_s", alpha_s, 0, 1, open_low=True)
    check_range("alpha_t", alpha_t, 0, 1, open_low=True)
    traced = any(isinstance(x, Tracer) for x in (alpha_s, alpha_t))
    shown = "alpha_s must be at least alpha_t" if traced else (
        f"alpha_s={alpha_s} must be at least alpha_t={alpha_t}"
    )  # fmt: skip
    demand(lambda xp, s, t: s >= t, shown, alpha_s, alpha_t)


def check_prior(prior: str, mask_id: int | None, vocab: int) -> None:
    """ValueError unless the prior is known, the vocabulary holds 2 and the mask fits both."""
    check_choice("prior", prior, *PRIORS)
    least = 2 if prior == "uniform" else 3  # the mask is one more
    if vocab < least:
        raise ValueError(f"a vocabulary of {vocab} must be at least {least} with prior={prior!r}")
    if prior == "uniform" and mask_id is not None:
        raise ValueError(f"mask_id={mask_id} must be None with prior='uniform'")
    if prior == "masked":
        check_mask_id(mask_id, vocab)


def check_mask_id(mask_id, vocab: int | None) -> None:
    """ValueError or TypeError unless `mask_id` is a token of a vocabulary (None: of any size)."""
    if mask_id is None:
        raise ValueError("mask_id=None must be a token with prior='masked'")
    check_count("mask_id", mask_id, 0, None if vocab is None else vocab - 1)


def tokens(name: str, x, shape: tuple[int, ...] | None = None) -> jax.Array:
    """`x` as int32 tokens; TypeError unless integers, ValueError unless of `shape`."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} has dtype {x.dtype}; it must hold integers")
    if shape is not None and x.shape != shape:
        raise ValueError(f"{name} has shape {x.shape}; expected {shape}")
    return x.astype(jnp.int32)


def floats(name: str, x, ndim: int | None = None) -> jax.Array:
    """`x` as a floating array of at least float32; TypeError for integers, ValueError for its rank."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} has dtype {x.dtype}; it must be a floating-point type")
    if x.ndim == 0 or (ndim is not None and x.ndim != ndim):
        raise ValueError(f"{name} has shape {x.shape}; expected {ndim or 'at least 1'} axes")
    return wide(x)
