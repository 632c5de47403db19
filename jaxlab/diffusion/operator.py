"""The diffusion transformation operator: from Gaussian noise to the uniform noise of its argmax.

With w = alpha x + sigma eps and z = argmax w, z is x with probability P(mu), mu = alpha / sigma =
exp(-gamma / 2): z has uniform noise of level T = (K P - 1) / (K - 1). Source: Duo 2506.10892; note on
Psi-samplers, section 5.
"""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jaxlab.diffusion.checks import wide
from jaxlab.diffusion.schedules import Level

KINDS = ("exact", "series", "poly9", "table")
NODES, POINTS, TERMS = 2048, 100_000, 150


@functools.cache
def _quadrature() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes z, weights and log Phi(z) on [-10, 60]: panels of one, 20 Gauss-Legendre nodes each.

    Above that P is 1 to all digits.
    """
    x, w = np.polynomial.legendre.leggauss(20)
    z = (np.arange(-10, 60)[:, None] + (x + 1) / 2).ravel()
    tail = np.array([0.5 * math.erfc(abs(a) / math.sqrt(2)) for a in z])  # of the nearer side
    return z, np.tile(w / 2, 70), np.where(z > 0, np.log1p(-tail), np.log(tail))


def _density(z):
    return np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def _moments(gamma: np.ndarray, K: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P, 1 - P and dP/dgamma at `gamma` [n], float64."""
    z, w, log_cdf = _quadrature()
    mu = np.exp(-gamma / 2)[:, None]
    shifted = _density(z - mu) * w
    win = shifted @ np.exp((K - 1) * log_cdf)
    lose = shifted @ -np.expm1((K - 1) * log_cdf)
    far = mu[:, 0] > 45
    slope = shifted @ (_density(z) * np.exp((K - 2) * log_cdf))
    slope = -mu[:, 0] / 2 * (K - 1) * slope
    return np.where(far, 1, win), np.where(far, 0, lose), np.where(far, 0, slope)


def winner_probability(gamma, K: int) -> tuple[np.ndarray, np.ndarray]:
    """(P, dP/dgamma) in float64, gamma of any shape; on the host, right to 1e-10.

    P is the probability that the shifted one of K Gaussians is the largest. ValueError for K < 2.
    """
    gamma = np.asarray(gamma, np.float64)
    win, _, slope = _all(gamma.ravel(), K)
    return win.reshape(gamma.shape), slope.reshape(gamma.shape)


def _all(gamma: np.ndarray, K: int) -> list[np.ndarray]:
    if K < 2:
        raise ValueError(f"K={K} must be at least 2")
    parts = [_moments(g, K) for g in np.array_split(gamma, max(1, len(gamma) // 2048))]
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _series(gamma: np.ndarray, K: int) -> list[np.ndarray]:
    """`_all` by the power series in mu, 150 terms (Duo++)."""
    z, w, log_cdf = _quadrature()
    base = w * _density(z) * np.exp((K - 1) * log_cdf)
    m = np.stack([np.sum(z**n * base) for n in range(TERMS + 1)])
    mu, n = np.exp(-gamma / 2)[:, None], np.arange(TERMS)
    log_factorials = np.array([math.lgamma(i + 1) for i in n])
    terms = np.exp(n * np.log(mu) - log_factorials - mu**2 / 2)
    win = terms @ m[:-1]
    slope = np.sum(terms * (m[1:] - mu * m[:-1]), -1) * -mu[:, 0] / 2
    return [win, 1 - win, slope]


def make_operator(K: int, gamma_min: float, gamma_max: float, kind: str = "exact") -> Callable:
    """Function gamma -> Level, traceable; `dalpha` is by time, gamma = gamma_min + t (max - min).

    Tables are made here, on the host. "exact": quadrature, cubic Hermite between 2048 nodes;
    "series": the same of the power series; "poly9": a polynomial of degree 9 (what Duo++ trains
    with); "table": the nearest of 100 000 points and a difference (Duo). gamma is clamped. ValueError
    for K < 2, an empty range or an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {list(KINDS)}")
    if not gamma_min < gamma_max:
        raise ValueError(f"gamma_min={gamma_min} must be below gamma_max={gamma_max}")
    nodes = np.linspace(gamma_min, gamma_max, NODES)
    win, lose, slope = (_all if kind == "exact" else _series)(nodes, K)
    scale, width = K / (K - 1), gamma_max - gamma_min
    # Rounding of 1/K leaves alpha at or below 0 for gamma far above the useful range.
    cubic = _hermite((K * win - 1) / (K - 1), scale * slope, width / (NODES - 1))
    rest = cubic * -1.0
    rest[:, 0] = (scale * lose)[:-1]
    if kind in ("poly9", "table"):
        x = np.linspace(0, 1, POINTS)
        points = _evaluate(cubic, x * (NODES - 1))
        return (_poly9 if kind == "poly9" else _table)(points, gamma_min, gamma_max)

    def operator(gamma) -> Level:
        t, dtype = _time(gamma, gamma_min, gamma_max)
        at = t * (NODES - 1)
        i = jnp.clip(at.astype(jnp.int32), 0, NODES - 2)
        u = at - i
        a, b = (jnp.asarray(c, dtype)[i] for c in (cubic, rest))
        value = lambda c: c[..., 0] + u * (c[..., 1] + u * (c[..., 2] + u * c[..., 3]))  # noqa: E731
        slope = a[..., 1] + u * (2 * a[..., 2] + u * 3 * a[..., 3])
        return Level(value(a), value(b), slope * (NODES - 1))

    return operator


def _time(gamma, gamma_min: float, gamma_max: float):
    """Time in [0, 1] of `gamma`, and the type to compute in."""
    dtype = wide(gamma)
    gamma = jnp.clip(jnp.asarray(gamma, dtype), gamma_min, gamma_max)
    return (gamma - gamma_min) / (gamma_max - gamma_min), dtype


def _hermite(y: np.ndarray, slope: np.ndarray, step: float) -> np.ndarray:
    """Coefficients [n - 1, 4] of the cubic in u in [0, 1] between neighbours."""
    a, b, rise = slope[:-1] * step, slope[1:] * step, np.diff(y)
    return np.stack([y[:-1], a, 3 * rise - 2 * a - b, a + b - 2 * rise], -1)


def _evaluate(cubic: np.ndarray, at: np.ndarray) -> np.ndarray:
    i = np.clip(at.astype(int), 0, len(cubic) - 1)
    u = at - i
    c = cubic[i].T
    return c[0] + u * (c[1] + u * (c[2] + u * c[3]))


def _poly9(points: np.ndarray, gamma_min: float, gamma_max: float) -> Callable:
    # In x on [-1, 1] the coefficients are small, which float32 needs.
    x = np.linspace(-1, 1, len(points))
    fit = np.linalg.lstsq(np.vander(x, 10, increasing=True), points, rcond=None)[0]

    def operator(gamma) -> Level:
        t, _ = _time(gamma, gamma_min, gamma_max)
        x, value, slope = 2 * t - 1, jnp.zeros_like(t), jnp.zeros_like(t)
        for n in range(9, 0, -1):
            slope = slope * x + n * fit[n]
            value = value * x + fit[n]
        value = value * x
        return Level(value + fit[0], (1 - fit[0]) - value, 2 * slope)

    return operator


def _table(points: np.ndarray, gamma_min: float, gamma_max: float) -> Callable:
    width = gamma_max - gamma_min

    def operator(gamma) -> Level:
        t, dtype = _time(gamma, gamma_min, gamma_max)
        last = len(points) - 1
        look = lambda t, column: jnp.asarray(column, dtype)[  # noqa: E731
            jnp.clip(jnp.round(t * last).astype(jnp.int32), 0, last)
        ]
        # A difference of float32 numbers has no digits left: take that of the table.
        ahead = round(1e-3 / width * last)
        rise = points[np.minimum(np.arange(last + 1) + ahead, last)] - points
        return Level(look(t, points), look(t, 1 - points), look(t, rise * 1000 * width))

    return operator
