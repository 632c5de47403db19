"""Sampling: filters against their definitions, token by token in float64; draws against their law."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.sampling import (
    Sampling,
    draw,
    entropy,
    keep_best,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sampling_logits,
)

# Quarters are exact, tie often, and keep sums of probabilities away from the thresholds below.
quarters = st.lists(st.integers(-12, 12), min_size=1, max_size=12).map(lambda x: np.array(x) / 4)
chances = st.floats(0.013, 0.987)


def probabilities(logits) -> list[float]:
    weights = [math.exp(z - max(logits)) for z in logits]
    return [w / math.fsum(weights) for w in weights]


def top_k_oracle(logits, k):
    return [sum(other > z for other in logits) < k for z in logits]


def top_p_oracle(logits, p):
    chance = probabilities(logits)
    above = [math.fsum(q for q, y in zip(chance, logits, strict=True) if y > z) for z in logits]
    near = any(abs(a - p) < 1e-6 for a in above)
    return None if near else [a < p for a in above]


def min_p_oracle(logits, p):
    chance = probabilities(logits)
    near = any(abs(q / max(chance) - p) < 1e-6 for q in chance)
    return None if near else [q >= p * max(chance) for q in chance]


def assert_keeps(got, logits, kept):
    got = np.asarray(got)
    np.testing.assert_array_equal(got[kept], np.float32(logits)[kept])
    assert np.all(np.isneginf(got[~np.asarray(kept)]))


@settings(max_examples=40, deadline=None)
@given(quarters, st.integers(1, 14))
def test_top_k_keeps_what_fewer_than_k_exceed(logits, k):
    kept = top_k_oracle(logits, k)
    assert_keeps(keep_top_k(jnp.asarray(logits, jnp.float32), k), logits, np.array(kept))


@settings(max_examples=40, deadline=None)
@given(quarters, chances)
def test_top_p_keeps_what_less_than_p_exceeds(logits, p):
    if (kept := top_p_oracle(logits, p)) is not None:
        assert_keeps(keep_top_p(jnp.asarray(logits, jnp.float32), p), logits, np.array(kept))


@settings(max_examples=40, deadline=None)
@given(quarters, chances)
def test_min_p_compares_with_the_most_probable(logits, p):
    if (kept := min_p_oracle(logits, p)) is not None:
        assert_keeps(keep_min_p(jnp.asarray(logits, jnp.float32), p), logits, np.array(kept))


def test_the_limits_of_filters_keep_everything_or_the_best():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((3, 50_000)) * 4, jnp.float32)
    for same in (keep_top_k(logits, 50_000), keep_top_p(logits, 1.0), keep_min_p(logits, 0.0)):
        np.testing.assert_array_equal(same, logits)
    for best in (keep_top_k(logits, 1), keep_top_p(logits, 1e-9), keep_min_p(logits, 1.0)):
        np.testing.assert_array_equal(best, keep_best(logits))
    first = keep_best(jnp.array([1.0, 3.0, 3.0]))
    np.testing.assert_array_equal(first, [-np.inf, 3.0, -np.inf])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([None, 3, 9]), st.sampled_from([None, 0.7]),
       st.sampled_from([None, 0.05]), st.sampled_from([0.5, 1.0, 2.5]))  # fmt: skip
def test_filters_compose_in_their_order(seed, k, p, least, heat):
    logits = np.random.default_rng(seed).standard_normal(11)
    kept, warm = np.ones(11, bool), logits / heat
    for oracle, value in ((top_k_oracle, k), (top_p_oracle, p), (min_p_oracle, least)):
        if value is not None:
            found = oracle(warm[kept], value)
            if found is None:
                return
            kept[kept] = found
    expected = np.full(11, -np.inf)
    expected[kept] = warm[kept]
    got = sampling_logits(jnp.asarray(logits, jnp.float32), Sampling(heat, k, p, least))
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_arrays_of_settings_act_row_by_row_and_under_jit():
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((4, 30)), jnp.float32)
    heat, p, least = jnp.array([0.0, 0.5, 1, 2]), jnp.array([0.9, 0.5, 1, 0.3]), jnp.full(4, 0.1)
    run = jax.jit(lambda z, t, p, m: sampling_logits(z, Sampling(t, 20, p, m)))
    rows = run(logits, heat, p, least)
    for i in range(4):
        single = sampling_logits(
            logits[i], Sampling(float(heat[i]), 20, float(p[i]), float(least[i]))
        )
        np.testing.assert_allclose(rows[i], single, rtol=1e-6)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.6), Sampling(1.5, top_k=4), Sampling(1.2, None, 0.8, 0.02)],
)
def test_frequencies_follow_the_distribution(sampling):
    """Chi-square over 40 000 draws; the keys are fixed, so this passes or fails once for all."""
    logits = np.random.default_rng(2).standard_normal(9) * 1.5
    n = 40_000
    keys = jax.random.split(jax.random.key(5), n)
    many = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (n, 9))
    drawn = jax.jit(functools.partial(draw, sampling=sampling))(keys, many)
    z = np.asarray(sampling_logits(jnp.asarray(logits, jnp.float32), sampling), np.float64)
    chance = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    counts = np.bincount(np.asarray(drawn.tokens), minlength=9)
    assert not np.any(counts[chance == 0])
    some = chance > 0
    assert scipy.stats.chisquare(counts[some], n * chance[some]).pvalue > 1e-3
    taken = np.log(chance[drawn.tokens])
    np.testing.assert_allclose(drawn.sampling_logprobs, taken, rtol=1e-5)
    model = np.log(probabilities(logits))
    np.testing.assert_allclose(drawn.logprobs, model[drawn.tokens], rtol=1e-5)
    np.testing.assert_allclose(drawn.entropies, -np.sum(np.exp(model) * model), rtol=1e-5)


def test_a_row_depends_on_its_own_key_only():
    logits = jnp.asarray(np.random.default_rng(3).standard_normal((6, 40)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 6)
    whole = draw(keys, logits, Sampling(2.0))
    parts = [draw(keys[i : i + 1], logits[i : i + 1], Sampling(2.0)) for i in range(6)]
    np.testing.assert_array_equal(whole.tokens, [int(p.tokens[0]) for p in parts])


@pytest.mark.parametrize("static", [True, False])
def test_temperature_0_takes_the_best_with_certainty(static):
    logits = jnp.asarray(np.random.default_rng(4).standard_normal((5, 17)), jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 5)
    heat = 0.0 if static else jnp.zeros(())
    drawn = draw(keys, logits, Sampling(heat, top_p=0.5))
    np.testing.assert_array_equal(drawn.tokens, np.argmax(np.asarray(logits, np.float32), -1))
    np.testing.assert_array_equal(drawn.sampling_logprobs, np.zeros(5))


def test_entropy_of_known_distributions():
    with np.errstate(divide="ignore"):
        logs = np.log(np.array([[0.25] * 4, [1, 0, 0, 0], [0.5, 0.5, 0, 0]], np.float32))
    got = entropy(jnp.asarray(logs))
    np.testing.assert_allclose(got, [math.log(4), 0, math.log(2)], rtol=1e-6)


@pytest.mark.parametrize(
    "sampling, message",
    [
        (Sampling(-1.0), "temperature=-1.0 must be at least 0"),
        (Sampling(float("nan")), "temperature=nan must be at least 0"),
        (Sampling(top_k=0), "top_k=0 must be an integer of at least 1"),
        (Sampling(top_p=0.0), "top_p=0.0 must be above 0 and at most 1"),
        (Sampling(min_p=1.5), "min_p=1.5 must be from 0 to 1"),
    ],
)
def test_settings_out_of_range_are_named(sampling, message):
    with pytest.raises(ValueError, match=message):
        sampling.check()


def test_temperatures_near_zero_draw_the_likeliest():
    logits = jnp.array([[1.0, 2.0, 3.0], [-jnp.inf, 200.0, -jnp.inf]])
    for temperature in (1e-39, jnp.float32(1e-37)):
        got = sampling_logits(logits, Sampling(temperature=temperature))
        assert [int(i) for i in jnp.argmax(got, -1)] == [2, 1]
        assert not np.any(np.isnan(got))


@pytest.mark.parametrize("bad", [True, 0, 2.0])
def test_top_k_is_a_whole_number(bad):
    with pytest.raises(ValueError, match="top_k="):
        Sampling(top_k=bad).check()
    assert Sampling(top_k=np.int64(4)).check().top_k == 4
