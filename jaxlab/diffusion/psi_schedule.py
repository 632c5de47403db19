"""What a Psi-sampler does at each step: time profiles, kappa schedules, coefficients, on the host.

Source: arXiv 2602.21185; ReMDM (Wang et al., 2025); note on Psi-samplers, sections 7.4 and 7.5.
"""

import dataclasses
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlab.arguments import check_choice, check_number, wide_type
from jaxlab.diffusion.arguments import check_count, check_prior, check_range
from jaxlab.diffusion.posterior import StepCoef
from jaxlab.diffusion.schedules import SCHEDULES, host_level, host_time

REMOVALS = ("ancestral", "greedy", "none")


class PsiSpec(NamedTuple):
    """A time profile, and a mode of kappa on each of three consecutive parts of the time grid.

    profile: "linear", "linear-constant-linear-<c>" with c a time, or the same with "-inv" and c an
    alpha. Modes: "pure-posterior", "pure-pc", "constant-<c>", "max-capped-<eta>",
    "max-rescale-<eta>", "max-rescale-release-<eta>", "constant-remdm-<eta>".
    """

    profile: str = "linear"
    high: str = "pure-posterior"
    middle: str = "pure-posterior"
    low: str = "pure-posterior"
    high_frac: float = 0.0
    middle_frac: float = 0.0


LOOP, INVERSE = "linear-constant-linear-", "-inv"
# Remasking probability from eta and (1 - alpha_s) / alpha_t.
SIGMAS = {
    "max-capped-": np.minimum,
    "max-rescale-release-": lambda eta, most: eta * np.minimum(eta, most),
    "max-rescale-": lambda eta, most: eta * np.minimum(1, most),
    "constant-remdm-": lambda eta, most: np.full_like(most, eta),
}


def _number(name: str, value: str, prefix: str, suffix: str = "") -> float:
    """What stands between prefix and suffix, a number from 0 to 1; ValueError for anything else."""
    try:
        x = float(value[len(prefix) : len(value) - len(suffix)])
    except ValueError:
        x = math.nan
    if not 0 <= x <= 1:
        raise ValueError(f"{name}={value!r} must have a number from 0 to 1 after {prefix!r}")
    return x


def _mode(name: str, mode: str):
    """(rule of sigma or None, its eta or the constant kappa)."""
    if mode in ("pure-posterior", "pure-pc"):
        return None, float(mode == "pure-posterior")
    for prefix, rule in sorted(SIGMAS.items(), reverse=True):  # the longer of two first
        if mode.startswith(prefix):
            return rule, _number(name, mode, prefix)
    if mode.startswith("constant-"):
        return None, _number(name, mode, "constant-")
    known = ("pure-posterior", "pure-pc", "constant-", *SIGMAS)
    raise ValueError(f"{name}={mode!r} must be, or start with, one of {', '.join(known)}")


def _joint(profile: str, schedule: str) -> float | None:
    """The time at which the profile stands still; None if it is linear."""
    if profile == "linear":
        return None
    if not profile.startswith(LOOP):
        raise ValueError(f"profile={profile!r} must be 'linear' or start with {LOOP!r}")
    if not profile.endswith(INVERSE):
        return _number("profile", profile, LOOP)
    return host_time(_number("profile", profile, LOOP, INVERSE), schedule)


def check_spec(spec: PsiSpec, schedule: str = "log-linear") -> None:
    """TypeError unless a PsiSpec; ValueError for unknown names and fractions out of [0, 1]."""
    if not isinstance(spec, PsiSpec):
        raise TypeError(f"spec={spec!r} must be a PsiSpec")
    for name in ("profile", "high", "middle", "low"):
        if not isinstance(getattr(spec, name), str):
            raise TypeError(f"{name}={getattr(spec, name)!r} must be a string")
    _joint(spec.profile, schedule)
    for name in ("high", "middle", "low"):
        _mode(name, getattr(spec, name))
    for name in ("high_frac", "middle_frac"):
        check_number(name, getattr(spec, name), 0, 1)
    check_range("high_frac + middle_frac", spec.high_frac + spec.middle_frac, 0, 1 + 1e-9)


def _points(spec: PsiSpec, n: int) -> tuple[int, int]:
    """Points of the first two parts, of n; halves round to even."""
    high = round(spec.high_frac * n)
    return high, min(round(spec.middle_frac * n), n - high)


def time_profile(
    spec: PsiSpec, N: int, eps: float = 1e-5, schedule: str = "log-linear"
) -> np.ndarray:
    """N + 1 times from 1 to `eps`, float64 on the host.

    With a loop the time is linear, constant, linear over the parts of the spec; with few points the
    last part may be one point, and the times end where they stood. ValueError for N below 1, eps out
    of [0, 1] or an unknown profile. Source: note on Psi-samplers, section 7.5.
    """
    check_count("N", N, 1)
    check_spec(spec, schedule)
    check_range("eps", eps, 0, 1)
    stand = _joint(spec.profile, schedule)
    if stand is None:
        return np.linspace(1, eps, N + 1)
    high, middle = _points(spec, N + 1)
    parts = (
        np.linspace(1, stand, high),
        np.full(middle, stand),
        np.linspace(stand, eps, N + 1 - high - middle),
    )
    return np.concatenate(parts)


def _segment(name: str, mode: str, times: np.ndarray, schedule: str, eps: float) -> np.ndarray:
    rule, number = _mode(name, mode)
    if rule is None:
        return np.full(len(times), number)
    kappa = np.ones(len(times))  # the last point has no successor in its part
    level = host_level(times, schedule, eps)
    alpha_t, rest = level.alpha[:-1], level.one_minus_alpha[1:]
    most = np.where(alpha_t > 0, rest / np.where(alpha_t > 0, alpha_t, 1), np.inf)
    sigma = rule(number, most)
    # Without noise left every kappa gives the same step; 0 is the limit of max-capped.
    share = np.where(rest > 0, sigma / np.where(rest > 0, rest, 1), 1)
    kappa[:-1] = np.clip(1 - share, 0, 1)
    return kappa


def kappa_schedule(
    spec: PsiSpec,
    times: np.ndarray,
    schedule: str = "log-linear",
    schedule_eps: float = 1e-3,
) -> np.ndarray:
    """kappa at each time of a grid of N + 1, float64 on the host; the last is not used.

    ValueError for an unknown mode or schedule, or fractions out of [0, 1].
    Source: note on Psi-samplers, section 7.4.
    """
    check_spec(spec, schedule)
    times = np.asarray(times, np.float64)
    if times.ndim != 1 or times.size < 2:
        raise ValueError(f"times has shape {times.shape}; expected (N + 1,) with N at least 1")
    check_range("times", times, 0, 1)
    if np.any(np.diff(times) > 0):
        raise ValueError(f"times={times} must not increase")
    high, middle = _points(spec, len(times))
    parts = np.split(times, [high, high + middle])
    modes = zip(("high", "middle", "low"), parts, strict=True)
    return np.concatenate(
        [_segment(name, getattr(spec, name), t, schedule, schedule_eps) for name, t in modes]
    )


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """What a sampler does, static; ValueError or TypeError for values that do not fit together."""

    vocab: int  # V, the mask included
    steps: int  # N
    prior: str = "uniform"
    mask_id: int | None = None
    schedule: str = "log-linear"
    psi: PsiSpec = PsiSpec()
    nucleus: float = 1.0
    removal: str = "ancestral"  # or "greedy", "none": what is done after the last step
    time_conditioning: bool | None = None  # None: iff uniform; without, the network is given 0
    eps: float = 1e-5  # end of the time profile
    schedule_eps: float = 1e-3
    guidance: float | None = None  # weight of the class posterior against the one without; None: 1
    num_classes: int | None = None  # also the label that says "no class"

    def __post_init__(self):
        check_count("vocab", self.vocab, 2)
        check_count("steps", self.steps, 1)
        check_prior(self.prior, self.mask_id, self.vocab)
        check_choice("schedule", self.schedule, *SCHEDULES)
        check_choice("removal", self.removal, *REMOVALS)
        check_spec(self.psi, self.schedule)
        check_choice("time_conditioning", self.time_conditioning, None, False, True)
        check_number("nucleus", self.nucleus, 0, 1, above=True)
        check_number("eps", self.eps, 0, 1)
        # At 0 a network that is told the level would be told infinity; at 1 nothing is ever noise.
        check_number("schedule_eps", self.schedule_eps, 0, 0.999, above=self.told)
        if self.num_classes is not None:
            check_count("num_classes", self.num_classes, 1)
        if self.guidance is not None:
            check_number("guidance", self.guidance, -math.inf)
            if self.num_classes is None:
                raise ValueError(f"num_classes=None must be given with guidance={self.guidance}")

    @property
    def told(self) -> bool:
        """Whether the network is given the level of noise."""
        given = self.time_conditioning
        return self.prior == "uniform" if given is None else given


def step_coefs(cfg: SamplerConfig) -> StepCoef:
    """Coefficients of all steps: row i < N of step i, row N of the removal; every leaf [N + 1].

    Formed on the host in float64, then cast to JAX's default floating type.
    Source: note on Psi-samplers, section 7.10.
    """
    times = time_profile(cfg.psi, cfg.steps, cfg.eps, cfg.schedule)
    kappa = kappa_schedule(cfg.psi, times, cfg.schedule, cfg.schedule_eps)
    level = host_level(times, cfg.schedule, cfg.schedule_eps)
    after = lambda x, last: np.append(x[1:], last)  # noqa: E731
    alpha_s = after(level.alpha, 1.0)
    rest_s = after(level.one_minus_alpha, 0.0)
    rows = {
        "alpha_s": alpha_s,
        "alpha_t": level.alpha,
        "one_minus_alpha_s": rest_s,
        "one_minus_alpha_t": level.one_minus_alpha,
        "gap": level.one_minus_alpha - rest_s,
        "kappa": np.append(kappa[:-1], 1.0),
        "sigma": -np.log(level.alpha) if cfg.told else np.zeros_like(level.alpha),
    }
    return StepCoef(**{name: jnp.asarray(x, wide_type(1.0)) for name, x in rows.items()})
