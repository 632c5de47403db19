"""Scores of uncertainty: the higher, the earlier a sample is deferred. In nats where there is a log.

Sources: label-wise measures, Sale et al., UAI 2024; scores of critical classes and their baselines,
arXiv 2602.21160; the missed critical mass and the gate are controls of our own.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.arguments import check_choice
from jaxlab.uncertainty.checks import Classes, among, as_probabilities, class_groups
from jaxlab.uncertainty.confusion import pair_terms
from jaxlab.uncertainty.safe import Centered, center, jensen_gap, ratio, xlogx


class Labelwise(NamedTuple):
    """Uncertainty of each class against the rest: total = aleatoric + epistemic."""

    total: Float[Array, "*b k"]
    aleatoric: Float[Array, "*b k"]
    epistemic: Float[Array, "*b k"]


def predictive_entropy(
    p: Float[Array, "s *b k"], *, from_logits: bool = False
) -> Float[Array, "*b"]:
    """H(mu) of p [S, ..., K]: all uncertainty of the label. ValueError for p as in `moments`."""
    return -jnp.sum(xlogx(center(as_probabilities(p, from_logits)).mean), -1)


def expected_entropy(p: Float[Array, "s *b k"], *, from_logits: bool = False) -> Float[Array, "*b"]:
    """E[H(p)]: what remains when the posterior is known. ValueError for p as in `moments`."""
    return -jnp.mean(jnp.sum(xlogx(as_probabilities(p, from_logits)), -1), 0)


def disagreement(p: Float[Array, "s *b k"], *, from_logits: bool = False) -> Float[Array, "*b"]:
    """Share of pairs of samples that predict different classes. ValueError for p as in `moments`.

    Of classes that tie, a sample predicts the first.
    """
    p = as_probabilities(p, from_logits)
    votes = jnp.sum(jax.nn.one_hot(jnp.argmax(p, -1), p.shape[-1], dtype=p.dtype), 0)
    return jnp.sum(votes / p.shape[0] * ((p.shape[0] - votes) / (p.shape[0] - 1)), -1)


def labelwise(
    p: Float[Array, "s *b k"], kind: str = "variance", *, from_logits: bool = False
) -> Labelwise:
    """Uncertainty of each class [..., K] as a label of its own, by "variance" or binary "entropy".

    ValueError for p as in `moments` and an unknown kind. Source: Sale et al., UAI 2024.
    """
    check_choice("kind", kind, "variance", "entropy")
    c = center(as_probabilities(p, from_logits))
    rest = center(1 - c.p)
    if kind == "entropy":
        total, aleatoric = _binary(c.mean, rest.mean), jnp.mean(_binary(c.p, rest.p), 0)
        return Labelwise(total, aleatoric, _one_vs_all(c))
    return Labelwise(c.mean * rest.mean, jnp.mean(c.p * rest.p, 0), jnp.mean(c.dev**2, 0))


def _binary(x: jax.Array, rest: jax.Array) -> jax.Array:
    """Entropy of (x, rest) that sum to 1: the log of the larger is taken from the smaller."""

    def term(x, rest):
        large = rest < 0.5
        return jnp.where(large, x * jnp.log1p(-jnp.where(large, rest, 0)), xlogx(x))

    return -term(x, rest) - term(rest, x)


def one_vs_all_mi(p: Float[Array, "s *b k"], *, from_logits: bool = False) -> Float[Array, "*b k"]:
    """Mutual information [..., K] of each class against the rest. ValueError for p as in `moments`."""
    return _one_vs_all(center(as_probabilities(p, from_logits)))


def _one_vs_all(c: Centered) -> jax.Array:
    # 1 - mean would be rounded where p is near 1; 1 - p is exact there.
    return jensen_gap(*c) + jensen_gap(*center(1 - c.p))


def missed_critical_mass(
    p: Float[Array, "s *b k"], safe: Classes, critical: Classes, *, from_logits: bool = False
) -> Float[Array, "*b"]:
    """Probability of the critical classes where a safe one is predicted, 0 elsewhere.

    ValueError for p as in `moments` and groups as in `cbec`.
    """
    p = as_probabilities(p, from_logits)
    groups = class_groups(safe, critical, p.shape[-1])
    return _missed(center(p).mean, *groups)


def _missed(mean: jax.Array, safe: Classes, critical: Classes) -> jax.Array:
    mass = jnp.sum(mean[..., jnp.asarray(critical)], -1)
    return jnp.where(among(safe, jnp.argmax(mean, -1)), mass, 0)


def critical_scores(
    p: Float[Array, "s *b k"], safe: Classes, critical: Classes, *, from_logits: bool = False
) -> dict[str, Float[Array, "*b"]]:
    """Every deferral score of the comparison, by name, each [...].

    entropy, mi, maxprob (1 - max mu); over critical classes var_critical_max, eu_var_critical (sum of
    variances; eu_var over all), ova_mi_critical (sum), c_critical_sum and _max (c_sum over all),
    d_critical_sum and _max; cbec; missed_critical_mass; c_critical_max_gated, 0 unless a safe class is
    predicted. ValueError for p as in `moments` and groups as in `cbec`.
    """
    p = as_probabilities(p, from_logits)
    safe, critical = class_groups(safe, critical, p.shape[-1])
    centered = center(p)
    _, mean, dev = centered
    pick = jnp.asarray(critical)
    var = jnp.mean(dev**2, 0)
    c = jnp.mean(dev * ratio(dev, mean), 0) / 2
    d = jensen_gap(*centered)
    c_max = jnp.max(c[..., pick], -1)
    return {
        "entropy": -jnp.sum(xlogx(mean), -1),
        "mi": jnp.sum(d, -1),
        "maxprob": jnp.min(center(1 - p).mean, -1),
        "var_critical_max": jnp.max(var[..., pick], -1),
        "eu_var": jnp.sum(var, -1),
        "eu_var_critical": jnp.sum(var[..., pick], -1),
        "ova_mi_critical": jnp.sum(_one_vs_all(centered)[..., pick], -1),
        "c_sum": jnp.sum(c, -1),
        "c_critical_sum": jnp.sum(c[..., pick], -1),
        "c_critical_max": c_max,
        "d_critical_sum": jnp.sum(d[..., pick], -1),
        "d_critical_max": jnp.max(d[..., pick], -1),
        "cbec": jnp.sum(pair_terms(centered, safe, critical), (-2, -1)),
        "missed_critical_mass": _missed(mean, safe, critical),
        "c_critical_max_gated": jnp.where(among(safe, jnp.argmax(mean, -1)), c_max, 0),
    }
