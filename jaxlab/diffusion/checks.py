"""What the functions of diffusion share: types, and errors for what is known before tracing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PRIORS = ("uniform", "masked")


def wide(*xs: Any) -> Any:
    """The type to compute and answer in: that of the floats among `xs`, at least float32."""
    kept = [x for x in xs if x is not None and not _whole(x)]
    return jnp.promote_types(jnp.result_type(*kept) if kept else float, jnp.float32)


def _whole(x: Any) -> bool:
    return hasattr(x, "dtype") and not jnp.issubdtype(x.dtype, jnp.floating)


def known(x: Any) -> np.ndarray | None:
    """`x` as NumPy when its values are known now, None while tracing."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def check_range(name: str, x: Any, low: float, high: float, legal: str) -> None:
    """ValueError when a known `x` has values outside [low, high], or not numbers."""
    values = known(x)
    if values is not None and not np.all((values >= low) & (values <= high)):
        worst = values[~((values >= low) & (values <= high))].flat[0]
        raise ValueError(f"{name}={worst} must be in {legal}")


def check_tokens(**tokens: Any) -> None:
    """TypeError for tokens that are not integers."""
    for name, x in tokens.items():
        if not jnp.issubdtype(jnp.result_type(x), jnp.integer):
            raise TypeError(f"{name} must hold integers, got {jnp.result_type(x)}")


def check_prior(prior: str, mask_id: int | None, vocab: int) -> None:
    """ValueError for an unknown prior, a mask that is missing, superfluous or no token, v < 2."""
    if prior not in PRIORS:
        raise ValueError(f"prior={prior!r} must be one of {list(PRIORS)}")
    if vocab < 2:
        raise ValueError(f"the vocabulary has {vocab} tokens; it must have at least 2")
    if prior == "uniform" and mask_id is not None:
        raise ValueError(f"mask_id={mask_id} must be None with prior='uniform'")
    if prior == "masked" and (mask_id is None or not 0 <= mask_id < vocab):
        raise ValueError(f"mask_id={mask_id} must be in [0, {vocab}) with prior='masked'")


def check_levels(alpha_s: Any, alpha_t: Any, kappa: Any = 1.0) -> None:
    """ValueError for alphas outside (0, 1], alpha_s < alpha_t or kappa outside [0, 1], where known."""
    tiny = np.nextafter(0, 1)
    check_range("alpha_s", alpha_s, tiny, 1, "(0, 1]")
    check_range("alpha_t", alpha_t, tiny, 1, "(0, 1]")
    check_range("kappa", kappa, 0, 1, "[0, 1]")
    s, t = known(alpha_s), known(alpha_t)
    if s is not None and t is not None and np.any(s < t):
        raise ValueError(f"alpha_s={alpha_s} must be at least alpha_t={alpha_t}")
