"""Times and mixing coefficients kappa of a sampler, on the host. Source: note, sections 7.4 and 7.5."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxlab.diffusion.schedules import host_schedule

LOOP = "linear-constant-linear-"


class PsiSpec(NamedTuple):
    """A sampler: how times fall, and kappa at high, middle and low noise.

    `high`, `middle`, `low`: "pure-posterior" (1), "pure-pc" (0), "constant-<c>", and four of ReMDM,
    "max-capped-<e>", "max-rescale-<e>", "constant-remdm-<e>" and "max-rescale-release-<e>", whose
    rescaling is by e^2. `profile`: "linear", or "linear-constant-linear-<c>", which stays at time c
    for the middle, with "-inv" at the time where alpha is c. Fractions are those of the points.
    """

    profile: str = "linear"
    high: str = "pure-posterior"
    middle: str = "pure-posterior"
    low: str = "pure-posterior"
    high_frac: float = 0.0
    middle_frac: float = 0.0


def _segments(spec: PsiSpec, points: int) -> tuple[int, int, int]:
    """Points at high, middle and low noise, Python's rounding."""
    for name in ("high_frac", "middle_frac"):
        if not 0 <= getattr(spec, name) <= 1:
            raise ValueError(f"{name}={getattr(spec, name)} must be in [0, 1]")
    if spec.high_frac + spec.middle_frac > 1 + 1e-9:
        raise ValueError(
            f"high_frac={spec.high_frac} and middle_frac={spec.middle_frac} must sum to at most 1"
        )
    high = round(spec.high_frac * points)
    middle = min(round(spec.middle_frac * points), points - high)
    return high, middle, points - high - middle


def time_profile(
    spec: PsiSpec, N: int, eps: float = 1e-5, schedule: str = "log-linear"
) -> np.ndarray:
    """The N + 1 times of N steps, from 1 to `eps`, float64. ValueError for what cannot be."""
    spec = PsiSpec(*spec)
    if N < 1:
        raise ValueError(f"N={N} must be at least 1")
    inverse = host_schedule(schedule).inverse
    high, middle, low = _segments(spec, N + 1)
    if spec.profile == "linear":
        return np.linspace(1, eps, N + 1)
    if not spec.profile.startswith(LOOP):
        raise ValueError(f"profile={spec.profile!r} must be 'linear' or begin with {LOOP!r}")
    text = spec.profile.removeprefix(LOOP)
    c = _number("profile", spec.profile, text.removesuffix("-inv"))
    if not 0 <= c <= 1:
        raise ValueError(f"profile={spec.profile!r} must stay at a number in [0, 1]")
    c = float(inverse(np.float64(c))) if text.endswith("-inv") else c
    parts = np.linspace(1, c, high), np.full(middle, c), np.linspace(c, eps, low)
    return np.concatenate(parts)


def _number(name: str, whole: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name}={whole!r}: {text!r} is not a number") from None


def _constant(c: float) -> Callable:
    if not 0 <= c <= 1:
        raise ValueError(f"kappa={c} must be in [0, 1]")
    return lambda alpha_t, alpha_s, noise_s: np.full(len(alpha_t), c)


def _remdm(sigma: Callable) -> Callable:
    """Kappa of ReMDM's remasking probability, `sigma` a function of (1 - alpha_s) / alpha_t."""

    def kappa(alpha_t, alpha_s, noise_s):
        ratio = np.where(alpha_t > 0, noise_s / np.where(alpha_t > 0, alpha_t, 1), np.inf)
        remask, some = sigma(ratio), noise_s > 0
        return np.clip(np.where(some, 1 - remask / np.where(some, noise_s, 1), 0), 0, 1)

    return kappa


_REMDM: dict[str, Callable] = {
    "max-capped-": lambda e: lambda ratio: np.minimum(e, ratio),
    "max-rescale-release-": lambda e: lambda ratio: e * np.minimum(e, ratio),
    "max-rescale-": lambda e: lambda ratio: e * np.minimum(1, ratio),
    "constant-remdm-": lambda e: lambda ratio: np.full_like(ratio, e),
}


def _mode(name: str, text: str) -> tuple[Callable, bool]:
    """Function (alpha_t, alpha_s, 1 - alpha_s) -> kappa, and whether it needs pairs of points."""
    fixed = {"pure-posterior": 1.0, "pure-pc": 0.0}
    if text in fixed:
        return _constant(fixed[text]), False
    for prefix, rule in _REMDM.items():
        if text.startswith(prefix):
            e = _number(name, text, text.removeprefix(prefix))
            if not e >= 0:
                raise ValueError(f"{name}={text!r} must end in a number of at least 0")
            return _remdm(rule(e)), True
    if text.startswith("constant-"):
        return _constant(_number(name, text, text.removeprefix("constant-"))), False
    modes = [*fixed, "constant-<c>", *(f"{prefix}<e>" for prefix in _REMDM)]
    raise ValueError(f"{name}={text!r} must be one of {modes}")


def kappa_schedule(
    spec: PsiSpec, times: np.ndarray, schedule: str = "log-linear", schedule_eps: float = 1e-3
) -> np.ndarray:
    """kappa at each of the N + 1 `times`, float64; the last is not used.

    Modes that look at pairs of times take them within their part, whose last kappa is 1. ValueError
    for unknown modes, kappa outside [0, 1] or fractions that cannot be.
    """
    spec = PsiSpec(*spec)
    times = np.asarray(times, np.float64)
    alpha, noise = host_schedule(schedule).level(times, schedule_eps)
    kappa, start = np.ones(len(times)), 0
    counts = _segments(spec, len(times))
    for name, count in zip(("high", "middle", "low"), counts, strict=True):
        rule, pairs = _mode(name, getattr(spec, name))
        stop = start + count
        if count:
            end = stop - 1 if pairs else stop
            alpha_t, alpha_s, noise_s = alpha[start:end], alpha[start + 1 :], noise[start + 1 :]
            if pairs:
                alpha_s, noise_s = alpha_s[: end - start], noise_s[: end - start]
            kappa[start:end] = rule(alpha_t, alpha_s, noise_s)
        start = stop
    return kappa
