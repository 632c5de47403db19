"""Weights and advantages of single samples for training on pass@k and max@k.

Every estimator of PKPO is linear in rewards of a fixed order, so it is a sum over the steps between
neighbours in that order; a step splits the samples into c above it and n - c below, and what it adds
to each side is the closed form for c correct samples. Those depend on (n, c, k) only: float64 tables.
Source: note on pass@k interference, section 4; PKPO: 2505.15062; analytic advantage: 2508.10751;
best minus second: 2503.19595.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from jaxlab.arguments import check_choice, wide
from jaxlab.rl.arguments import check_number, demand
from jaxlab.rl.passk import binary, check_k, look_up, misses, samples

VARIANTS = ("none", "loo", "loo1", "wrloo")


def _tables(n: int, k: int, variant: str) -> tuple[np.ndarray, np.ndarray]:
    """(weight of a correct sample, of a wrong one) for c = 0..n correct, float64."""
    c = np.arange(n + 1)
    rest = lambda n, k: np.append(misses(n, k), 0.0)  # noqa: E731
    if variant == "wrloo":
        # C(n-c, k-1) / C(n-1, k-1) is what is missed by the c - 1 other correct ones.
        hit, miss = np.roll(rest(n - 1, k - 1), 1), rest(n - 1, k - 1)
        return k / n * hit * (n - c) / (n - 1), -k / n * miss * c / (n - 1)
    if variant == "loo1":
        # C(n-c, k-1) / C(n, k), from C(n, k) = C(n, k-1) (n - k + 1) / k.
        return misses(n, k - 1) * k / (n - k + 1), np.zeros(n + 1)
    right, wrong = np.full(n + 1, k / n), k / n * (1 - rest(n - 1, k - 1))
    if variant == "loo":
        passed = 1 - rest(n - 1, k)
        right = right - k / (n - 1) * np.roll(passed, 1)
        wrong = wrong - k / (n - 1) * passed
    return right, wrong


def pkpo_weights(
    rewards: Num[Array, "*b n"], k: int, variant: str = "loo1", *, binary: bool = False
) -> Float[Array, "*b n"]:
    """Weight of each sample, in input order, in a loss -sum_i w_i log pi(y_i): 1/n is inside.

    "none": s_i, the mean over k-subsets of their maximum, of those with i, times k / n; "loo": s_i minus
    the mean s_j of the others among themselves (k < n); "loo1": what i adds to the maxima (k >= 2), never
    negative; "wrloo": weighted RLOO, for binary rewards. All make the gradient of max@k without bias.
    `binary` takes 0/1 rewards by their number alone, with the same values and no sort. Tied rewards get
    equal weights. No gradient. ValueError for names, k out of range, n < 2 with a baseline, NaN, and
    rewards other than 0 and 1 (traced: NaN) where they must be binary.
    """
    check_choice("variant", variant, *VARIANTS)
    n = samples("rewards", rewards, 1 if variant == "none" else 2)
    k = check_k(k, n - 1 if variant == "loo" else n, 2 if variant == "loo1" else 1)
    if variant == "wrloo" and not binary:
        raise ValueError("variant='wrloo' needs binary=True: it is for rewards of 0 and 1")
    right, wrong = _tables(n, k, variant)
    if binary:
        r = _binary("rewards", rewards)
        c = jnp.sum(r, -1, keepdims=True)
        return jax.lax.stop_gradient(jnp.where(r == 1, look_up(right, c, r), look_up(wrong, c, r)))
    demand(lambda xp, x: ~xp.isnan(x), "rewards must not be NaN", rewards)
    r = wide(rewards)
    order = jnp.argsort(r, -1)
    ascending = jnp.take_along_axis(r, order, -1)
    steps = ascending[..., 1:] - ascending[..., :-1]
    # Step m, from sample m - 1 to sample m, has c = n - m samples above it.
    above = jnp.cumsum(steps * right[n - 1 : 0 : -1].astype(r.dtype), -1)
    below = jax.lax.cumsum(steps * wrong[n - 1 : 0 : -1].astype(r.dtype), r.ndim - 1, reverse=True)
    edge = [(0, 0)] * (r.ndim - 1)
    out = jnp.pad(above, [*edge, (1, 0)]) + jnp.pad(below, [*edge, (0, 1)])
    out += ascending[..., :1] * right[n].astype(r.dtype)
    return jax.lax.stop_gradient(jnp.take_along_axis(out, jnp.argsort(order, -1), -1))


_binary = binary  # `pkpo_weights` has an argument of that name


def passk_analytic_advantage(
    correct: Num[Array, "*b n"], k: int, eps: float = 1e-6
) -> Float[Array, "*b n"]:
    """Advantage of each sample in the normalised pass@k of all k-subsets, R = pass_at_k.

    Correct: (1 - R) / (sqrt(R (1 - R)) + eps); wrong: what makes the group's sum 0; all 0 where R is 0
    or 1. Not an unbiased gradient of pass@k. No gradient. ValueError unless k is an int in [1, n] and
    `correct` 0/1. Source: 2508.10751.
    """
    n = samples("correct", correct)
    k = check_k(k, n)
    check_number("eps", eps, 0)
    fail = misses(n, k)
    c = np.arange(n + 1)
    live = (fail > 0) & (c > 0)
    scale = np.where(live, np.sqrt((1 - fail) * fail) + eps, 1)
    right = np.where(live, fail, 0) / scale
    r = _binary("correct", correct)
    count = jnp.sum(r, -1, keepdims=True)
    wrong = -right * c / np.maximum(n - c, 1)
    out = jnp.where(r == 1, look_up(right, count, r), look_up(wrong, count, r))
    return jax.lax.stop_gradient(out)


def best_minus_second_advantage(
    rewards: Num[Array, "*b n"], normalize: bool = False, eps: float = 1e-6
) -> Float[Array, "*b n"]:
    """Best reward minus the second on the best sample, 0 on the others; the first of several best gets 0.

    `normalize` divides by the unbiased std of the group plus eps. No gradient. ValueError for fewer
    than 2 samples and NaN. Source: 2503.19595, as `grpo_passk` of verl.
    """
    n = samples("rewards", rewards, 2)
    check_number("eps", eps, 0)
    demand(lambda xp, x: ~xp.isnan(x), "rewards must not be NaN", rewards)
    r = wide(rewards)
    best = jax.lax.top_k(r, 2)[0]
    gain = best[..., :1] - best[..., 1:]
    if normalize:
        spread = jnp.std(r, -1, keepdims=True, ddof=1) + eps
        gain = gain / jnp.where(spread > 0, spread, 1)
    out = jnp.where(jnp.arange(n) == jnp.argmax(r, -1)[..., None], gain, 0)
    return jax.lax.stop_gradient(out)
