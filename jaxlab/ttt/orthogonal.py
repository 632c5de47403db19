"""Newton-Schulz orthogonalisation, as Muon applies it to momentum (Jordan et al., 2024)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.arguments import check_count

Triple = tuple[float, float, float]

# Five different steps, used in order (LaCT, 2505.23884); one step, repeated (Muon).
LACT: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
MUON: Triple = (3.4445, -4.7750, 2.0315)


def safe_norm(x: jax.Array, axis: int | tuple[int, ...]) -> jax.Array:
    """2-norm along `axis`, kept as size 1, whose gradient at zero is zero instead of NaN."""
    square = jnp.sum(jnp.square(x), axis, keepdims=True)
    some = jnp.where(square > 0, square, 1)
    return jnp.where(square > 0, jnp.sqrt(some), 0)


def _triples(coeffs: str | Sequence[Triple], steps: int) -> Sequence[Triple]:
    if isinstance(coeffs, str):
        if coeffs not in ("lact", "muon"):
            raise ValueError(f"coeffs={coeffs!r} must be 'lact', 'muon' or a sequence of (a, b, c)")
        if coeffs == "muon":
            return (MUON,) * steps
        if steps > len(LACT):
            raise ValueError(f"steps={steps} must be at most {len(LACT)} for coeffs='lact'")
        coeffs = LACT
    try:
        triples = [(float(a), float(b), float(c)) for a, b, c in coeffs]
    except (TypeError, ValueError) as error:
        raise ValueError(f"coeffs={coeffs!r} must be a sequence of triples (a, b, c)") from error
    if len(triples) < steps:
        raise ValueError(f"coeffs={coeffs!r} must have a triple for each of steps={steps}")
    return triples[:steps]


def newton_schulz(
    G: Float[Array, "*b m n"],
    coeffs: str | Sequence[Triple] = "lact",
    steps: int = 5,
    *,
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "*b m n"]:
    """`G` with its singular values moved near 1 by `steps` odd polynomials X <- aX + (bA + cA^2)X.

    A = X X^T, X_0 = G / (|G|_F + 1e-7): with 0 steps the result is X_0, not G, and zero stays zero,
    with finite gradients. `coeffs`: "lact" (at most 5 steps), "muon", or a sequence of (a, b, c) of
    which the first `steps` are used. The iteration runs in `dtype`, None being float32 or the wider
    type of G; the result has the type of G. Each step costs 2 m n min(m, n) twice and
    2 min(m, n)^3 FLOPs. ValueError for an unknown name or too few axes. Source: 2505.23884, 3.
    """
    G = jnp.asarray(G)
    if G.ndim < 2:
        raise ValueError(f"G has shape {G.shape}; expected axes (..., m, n)")
    triples = _triples(coeffs, check_count("steps", steps, 0))
    X = G.astype(jnp.promote_types(G.dtype, jnp.float32))
    tall = X.shape[-2] > X.shape[-1]
    X = jnp.swapaxes(X, -1, -2) if tall else X  # X X^T is then the smaller of the two squares
    # The norm is wide whatever `dtype`, and of numbers up to 1, so that squares do not overflow.
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(X), (-2, -1), keepdims=True, initial=0))
    top = jnp.where(top > 0, top, 1)
    X = X / (top * safe_norm(X / top, (-2, -1)) + 1e-7)
    X = X if dtype is None else X.astype(dtype)
    for a, b, c in triples:
        A = X @ jnp.swapaxes(X, -1, -2)
        X = a * X + (b * A + c * (A @ A)) @ X
    return (jnp.swapaxes(X, -1, -2) if tall else X).astype(G.dtype)
