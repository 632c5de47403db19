"""The operator from Gaussian to uniform diffusion: argmax of a noisy one-hot vector, its alpha.

Source: Sahoo et al., 2025 (arXiv 2506.10892), section 3; note on Psi-samplers, section 5.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.arguments import check_choice, wide
from jaxlab.diffusion.arguments import check_count
from jaxlab.diffusion.schedules import Level

KINDS = ("exact", "series", "poly9", "table")
NODES = 2048  # of a window: cubic interpolation errs by 1e-12 there
POINTS = 100_000  # of the release's table and of its least-squares fit
TERMS = 150  # of the release's series
_erfc = np.frompyfunc(math.erfc, 1, 1)


def _normal(x):
    return np.exp(-np.square(x) / 2) / math.sqrt(2 * math.pi)


def _log_cdf(x):
    tail = np.asarray(_erfc(np.abs(x) / math.sqrt(2)), np.float64) / 2
    with np.errstate(divide="ignore"):
        return np.where(x > 0, np.log1p(-tail), np.log(tail))


_nodes = functools.cache(np.polynomial.legendre.leggauss)  # eigenvalues of an n x n matrix


def _quadrature(low: float, high: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    x, w = _nodes(n)
    return (high - low) / 2 * x + (high + low) / 2, (high - low) / 2 * w


def _integrals(gamma: np.ndarray, K: int) -> tuple[np.ndarray, ...]:
    """(P, 1 - P, I, dI/dmu) with dP/dmu = (K - 1) I, float64; each without cancellation."""
    x, w = _quadrature(-10, 10, 500)
    mu = np.exp(-gamma / 2)
    out = np.empty((4, mu.size))
    for start in range(0, mu.size, 256):  # 500 values a gamma exist for this many at a time
        part = mu.ravel()[start : start + 256]
        z = part[:, None] + x
        log_cdf = _log_cdf(z)
        both = _normal(x) * _normal(z) * np.exp((K - 2) * log_cdf)
        values = np.exp((K - 1) * log_cdf), -np.expm1((K - 1) * log_cdf)
        sums = [(_normal(x) * v) @ w for v in values] + [both @ w, (x * both) @ w]
        out[:, start : start + 256] = sums
    return tuple(out.reshape(4, *mu.shape))


def winner_probability(gamma: np.ndarray, K: int) -> tuple[np.ndarray, np.ndarray]:
    """(P, dP/dgamma): the probability that the shifted one of K normal coordinates is the largest.

    Host only: NumPy in, float64 out, of the shape of `gamma` = log(noise variance / signal
    variance); right to 1e-10. ValueError unless K is at least 2.
    Source: note on Psi-samplers, section 5.1.
    """
    check_count("K", K, 2)
    gamma = np.asarray(gamma, np.float64)
    p, _, slope, _ = _integrals(gamma, K)
    return p, -np.exp(-gamma / 2) / 2 * (K - 1) * slope


@functools.cache
def gamma_of_alpha(alpha: float, K: int) -> float:
    """The gamma at which the argmax keeps a share `alpha` of tokens: the inverse of the operator.

    Host only, by bisection, right to 1e-9 in gamma. ValueError unless 0 < alpha < 1 and K is at least 2,
    and for an alpha beyond gamma = -30 or 30.
    """
    check_count("K", K, 2)
    low, high = -30.0, 30.0
    at = lambda gamma: (K * winner_probability(np.asarray(gamma), K)[0] - 1) / (K - 1)  # noqa: E731
    if not 0 < alpha < 1 or at(high) > alpha:
        raise ValueError(f"alpha={alpha} must be in (0, 1), and not below {at(high):.1e}")
    while high - low > 1e-10:
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle) > alpha else (low, middle)
    return middle


def _exact(gamma: np.ndarray, K: int) -> tuple[np.ndarray, ...]:
    """(alpha, 1 - alpha, dalpha/dgamma, its derivative)."""
    p, rest, i, di = _integrals(gamma, K)
    mu = np.exp(-gamma / 2)
    return (
        (K * p - 1) / (K - 1),
        K * rest / (K - 1),
        -mu / 2 * K * i,
        mu / 4 * K * (i + mu * di),
    )


def _series(gamma: np.ndarray, K: int) -> tuple[np.ndarray, ...]:
    """`_exact` by the release's series in powers of mu."""
    z, w = _quadrature(-12, 14, 2000)
    density = w * _normal(z) * np.exp((K - 1) * _log_cdf(z))
    n = np.arange(TERMS)
    moments = np.array([density @ z**i for i in range(TERMS + 2)])
    mu = np.exp(-gamma / 2)[:, None]
    log_factorial = np.array([math.lgamma(i + 1) for i in n])
    poisson = np.exp(n * np.log(mu) - log_factorial - np.square(mu) / 2)
    m0, m1, m2 = moments[:-2], moments[1:-1], moments[2:]
    p = poisson @ m0
    slope = np.sum(poisson * (m1 - mu * m0), 1)
    bend = np.sum(poisson * (m2 - 2 * mu * m1 + (np.square(mu) - 1) * m0), 1)
    mu, to_alpha = mu[:, 0], K / (K - 1)
    return (
        (K * p - 1) / (K - 1),
        to_alpha * (1 - p),
        -mu / 2 * to_alpha * slope,
        mu / 4 * to_alpha * (slope + mu * bend),
    )


def _cubic(nodes, slopes, index, frac):
    """Cubic Hermite interpolation; `slopes` are per cell."""
    left, right = nodes[index], nodes[index + 1]
    s0, s1 = slopes[index], slopes[index + 1]
    step = right - left
    # left plus what it grows by, in powers of frac.
    return left + frac * (s0 + frac * (3 * step - 2 * s0 - s1 + frac * (s0 + s1 - 2 * step)))


def _interpolated(parts, width: float) -> Callable:
    """place in [0, 1] of the window -> (alpha, 1 - alpha, dalpha/dgamma), from values at the nodes."""
    alpha, rest, slope, bend = parts
    cell = width / (len(alpha) - 1)
    tables = ((alpha, slope), (rest, -slope), (slope, bend))

    def read(place, xp):
        x = place * (len(alpha) - 1)
        index = xp.clip(xp.floor(x), 0, len(alpha) - 2).astype(np.int32)
        asarray = lambda a: xp.asarray(a, x.dtype)  # noqa: E731
        return tuple(
            _cubic(asarray(v), asarray(cell * d), index, x - index.astype(x.dtype))
            for v, d in tables
        )

    return read


def _polynomial(alphas: np.ndarray) -> Callable:
    """Least squares of degree 9 over the window, in x = 2 place - 1, where float32 keeps its digits."""
    fit = np.polynomial.Polynomial.fit(np.linspace(-1, 1, len(alphas)), alphas, 9, domain=[-1, 1])
    powers, slopes = (np.asarray(f.coef, np.float64) for f in (fit, 2 * fit.deriv()))

    def horner(coefficients, x):
        total = coefficients[-1] + 0 * x
        for c in coefficients[-2::-1]:
            total = c + x * total
        return total

    def read(place):
        x = 2 * place - 1
        alpha = jnp.clip(
            horner(powers.tolist(), x), 1e-6, 1
        )  # it may leave (0, 1) in a wide window
        return alpha, 1 - alpha, horner(slopes.tolist(), x)

    return read


def _table(alphas: np.ndarray, rests: np.ndarray, width: float) -> Callable:
    """The release: the nearest point, and a forward difference over 1e-3 of gamma, past the window too."""

    def read(place):
        values, others = jnp.asarray(alphas, place.dtype), jnp.asarray(rests, place.dtype)

        def nearest(place):
            return jnp.clip(jnp.round(place * (POINTS - 1)), 0, len(alphas) - 1).astype(jnp.int32)

        here, ahead = nearest(place), nearest(place + 1e-3 / width)
        return values[here], others[here], width * 1000 * (values[ahead] - values[here])

    return read


@functools.cache
def make_operator(
    K: int, gamma_min: float, gamma_max: float, kind: str = "exact"
) -> Callable[[Float[Array, "*b"]], Level]:
    """A function of gamma [...] that gives the Level of the uniform diffusion: alpha = T(gamma).

    It may be traced; gamma is clamped to the window, over which time runs from 0 to 1, and dalpha is
    d alpha / dt. float32 to 1e-6 (float64 if gamma is). `kind`: "exact" and "series" (150 terms),
    read from 2048 nodes by cubic interpolation; "poly9" and "table" as the releases approximate them,
    to 4e-5 in the papers' windows and worse in wider ones. Seconds of host time, once for given
    arguments. ValueError unless K is at least 2, the window is not empty, the kind known, and the
    terms reach gamma_min.
    Source: note on Psi-samplers, section 5.1.
    """
    check_count("K", K, 2)
    check_choice("kind", kind, *KINDS)
    if not (math.isfinite(gamma_min) and math.isfinite(gamma_max) and gamma_min < gamma_max):
        raise ValueError(f"gamma_min={gamma_min} must be below gamma_max={gamma_max}, both finite")
    width = gamma_max - gamma_min
    values = _series if kind == "series" else _exact
    if kind == "series":
        most = np.array([gamma_min])
        if not abs(_series(most, K)[0] - _exact(most, K)[0]) < 1e-8:
            raise ValueError(
                f"gamma_min={gamma_min} is more than {TERMS} terms reach with K={K}: take a larger one, or "
                f"kind='exact'"
            )
    smooth = _interpolated(values(np.linspace(gamma_min, gamma_max, NODES), K), width)
    if kind in ("exact", "series"):

        def read(place):
            alpha, rest, slope = smooth(place, jnp)
            return alpha, rest, width * slope

    else:
        alphas, rests, _ = smooth(np.linspace(0, 1, POINTS), np)
        if kind == "poly9":
            read = _polynomial(alphas)
        else:
            step = width / (POINTS - 1)
            more, less, *_ = _exact(gamma_max + step * np.arange(1, 2 + int(1e-3 / step)), K)
            read = _table(np.append(alphas, more), np.append(rests, less), width)

    def operator(gamma: Float[Array, "*b"]) -> Level:
        gamma = wide(gamma)
        return Level(*read((jnp.clip(gamma, gamma_min, gamma_max) - gamma_min) / width))

    return operator
