"""Advantages of jaxlab.rl against loops in float64, with junk where rows and tokens do not count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from jaxlab import rl

KINDS = ("grpo", "drgrpo", "rloo", "batch_std", "reinforce_pp_baseline")
few = settings(max_examples=8)
# Jitted once, as most of the time of these tests is compilation.
QUICK = {"xla_backend_optimization_level": 0}
GROUP = jax.jit(
    rl.group_advantage,
    compiler_options=QUICK,
    static_argnames=("num_groups", "kind", "eps", "ddof", "singleton"),
)
GAE = jax.jit(rl.gae, static_argnums=(3, 4, 5), compiler_options=QUICK)
REINFORCE = jax.jit(rl.reinforce_pp, static_argnums=2, compiler_options=QUICK)
WHITEN = jax.jit(rl.whiten, static_argnames="shift_mean")


def oracle(rewards, group, kind, eps, ddof, singleton, valid, mask):
    """Row by row, from the definitions."""
    out = np.zeros(len(rewards))
    rows = np.flatnonzero(valid)
    std = lambda x: np.std(x, ddof=ddof) if len(x) > ddof else 0.0  # noqa: E731
    centred, spread, number = out.copy(), out.copy(), out.copy()
    for i in rows:
        mates = rewards[[j for j in rows if group[j] == group[i]]]
        others = rewards[[j for j in rows if group[j] == group[i] and j != i]]
        number[i], spread[i] = len(mates), std(mates)
        centred[i] = rewards[i] - np.mean(mates)
        if kind == "rloo" and len(others):
            centred[i] = rewards[i] - np.mean(others)
        if len(mates) == 1:
            centred[i], spread[i] = (rewards[i] if singleton == "keep" else 0.0), 1.0
    if kind == "grpo":
        out[rows] = centred[rows] / (spread[rows] + eps)
    elif kind == "batch_std":
        out[rows] = centred[rows] / (std(rewards[rows]) + eps)
    elif kind == "reinforce_pp_baseline":
        lengths = np.where(valid, mask.sum(1), 0).astype(int)
        tokens = np.repeat(centred, lengths)
        variance = np.var(tokens, ddof=1) if len(tokens) > 1 else 0.0
        out = np.where(lengths > 0, (centred - tokens.mean()) / np.sqrt(variance + 1e-8), 0)
    else:
        out[rows] = centred[rows]
    return out


@pytest.mark.parametrize(
    "singleton, ddof",
    [("zero", 1), ("keep", 1), pytest.param("zero", 0, marks=pytest.mark.slow)],
)
@few
@given(seed=st.integers(0, 2**32 - 1))
def test_group_advantages_are_those_of_the_definitions(seed, singleton, ddof):
    random = np.random.default_rng(seed)
    n, groups = 12, 5
    rewards = random.choice([0.0, 1.0, 0.3], n) if seed % 2 else 7 + random.standard_normal(n)
    group, valid = random.integers(0, groups, n), random.uniform(size=n) < 0.8
    valid[0] = True
    mask = random.uniform(size=(n, 4)) < 0.6
    mask[0] = True
    junk = np.where(valid, rewards, np.nan)
    for kind in KINDS:
        options = dict(kind=kind, eps=1e-4, ddof=ddof, singleton=singleton, valid=valid, mask=mask)
        expected = oracle(rewards, group, kind, 1e-4, ddof, singleton, valid, mask)
        with jax.enable_x64(True):
            got = GROUP(junk, group, num_groups=groups, **options)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11, err_msg=kind)
        arrays = dict(valid=valid, mask=mask)
        got = GROUP(jnp.float32(junk), group, num_groups=groups, **options | arrays)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5, err_msg=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reward", (0.1, -3.7, 1e6, 0.0))
def test_a_group_of_equal_rewards_has_exact_zeros(kind, reward):
    rewards = np.full(12, reward, np.float32)
    got = rl.group_advantage(
        rewards, np.arange(12) // 6, 2, kind=kind, eps=0.0, mask=np.ones((12, 3))
    )
    np.testing.assert_array_equal(got, np.zeros(12))


def test_sums_scales_and_orders():
    random = np.random.default_rng(0)
    rewards, group = random.standard_normal(20).astype(np.float32), np.repeat(np.arange(4), 5)
    call = lambda r=rewards, g=group, **k: np.asarray(rl.group_advantage(r, g, 4, **k))  # noqa: E731
    for kind in ("grpo", "drgrpo", "rloo", "batch_std"):
        np.testing.assert_allclose(call(kind=kind).reshape(4, 5).sum(1), 0, atol=2e-6)
    np.testing.assert_allclose(call(kind="rloo"), call(kind="drgrpo") * 5 / 4, rtol=1e-6)
    np.testing.assert_allclose(call(1000 * rewards), call(), rtol=1e-4)
    np.testing.assert_allclose(call(1000 + rewards, kind="drgrpo"), call(kind="drgrpo"), atol=2e-4)
    order = random.permutation(20)
    np.testing.assert_allclose(call(rewards[order], group[order]), call()[order], rtol=1e-6)


def test_traced_ids_out_of_range_are_nan_and_checkify_tells():
    run = jax.jit(lambda g: rl.group_advantage(jnp.arange(4.0), g, 2))
    got = run(jnp.array([0, 0, 2, -1]))
    np.testing.assert_array_equal(np.isnan(got), [False, False, True, True])
    error, _ = checkify.checkify(run)(jnp.array([0, 0, 2, 1]))
    assert "group must be in [0, 2)" in error.get()
    error, _ = checkify.checkify(run)(jnp.array([0, 0, 1, 1]))
    assert error.get() is None


@few
@given(st.integers(0, 2**32 - 1))
def test_whitening_is_that_of_the_valid_values(seed):
    random = np.random.default_rng(seed)
    x, mask = 5 + random.standard_normal((4, 6)), random.uniform(size=(4, 6)) < 0.6
    mask[0, :2] = True
    inside = x[mask]
    for shift in (True, False):
        expected = (inside - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8)
        expected += 0 if shift else inside.mean()
        got = WHITEN(np.where(mask, x, np.nan), mask, shift_mean=shift)
        np.testing.assert_allclose(got[mask], expected, rtol=1e-4, atol=1e-5)
        assert np.all(got[~mask] == 0)


def test_whitening_one_value_or_none_gives_zeros():
    x = jnp.full((2, 2), 0.3)
    for mask in (np.zeros((2, 2)), np.eye(2) * [1, 0], np.ones((2, 2))):
        np.testing.assert_array_equal(rl.whiten(x, mask), np.zeros((2, 2)))


def drawn(seed, holes):
    """Token rewards, values and a mask [3, 9] with holes of tool output or right padding only."""
    random = np.random.default_rng(seed)
    shape = (3, 9)
    mask = np.arange(9) < random.integers(1, 10, (3, 1))
    if holes:
        mask &= random.uniform(size=shape) < 0.6
    mask[0, 0] = mask[1, 0] = True
    return random.standard_normal(shape), random.standard_normal(shape), mask


@few
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from((0.7, 1.0)))
def test_gae_is_the_loop_over_tokens(seed, holes, lam):
    rewards, values, mask = drawn(seed, holes)
    gamma = 0.9
    adv = np.zeros_like(values)
    for i in range(len(mask)):
        after, carried = 0.0, 0.0
        for t in reversed(range(mask.shape[1])):
            if mask[i, t]:
                carried = rewards[i, t] + gamma * after - values[i, t] + gamma * lam * carried
                after = values[i, t]
            adv[i, t] = carried
    hide = lambda x: np.where(mask, x, np.nan)  # noqa: E731
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-5)):
        with jax.enable_x64(dtype == "float64"):
            args = [jnp.asarray(hide(x), dtype) for x in (rewards, values)]
            plain, returns = GAE(*args, mask, gamma, lam, False)
            white, _ = GAE(*args, mask, gamma, lam)
            expected = WHITEN(jnp.asarray(np.where(mask, adv, 0), dtype), mask)
        assert plain.dtype == white.dtype == returns.dtype == dtype
        plain, returns, white, expected = map(np.asarray, (plain, returns, white, expected))
        np.testing.assert_allclose(plain, adv * mask, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(
            returns[mask], (adv + values)[mask], rtol=tolerance, atol=tolerance
        )
        np.testing.assert_allclose(white, expected, rtol=20 * tolerance, atol=20 * tolerance)
        assert np.all(white[~mask] == 0)


@few
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from((0.9, 1.0)))
def test_reinforce_pp_is_the_loop_over_tokens(seed, holes, gamma):
    rewards, _, mask = drawn(seed, holes)
    returns = np.zeros_like(rewards)
    for i in range(len(mask)):
        running = 0.0
        for t in reversed(range(mask.shape[1])):
            returns[i, t] = rewards[i, t] + gamma * running
            running = returns[i, t] * mask[i, t]
    with jax.enable_x64(True):
        adv, got = REINFORCE(rewards, mask, gamma)
    np.testing.assert_allclose(got, returns, rtol=1e-12, atol=1e-12)
    inside = returns[mask]
    expected = (returns - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8) * mask
    np.testing.assert_allclose(adv, expected, rtol=1e-10, atol=1e-10)
    adv32, got32 = REINFORCE(np.where(mask, rewards, np.nan), mask, gamma)
    np.testing.assert_allclose(got32[mask], returns[mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(adv32, expected, rtol=1e-3, atol=1e-4)


def test_dynamic_sampling_keeps_groups_of_unequal_rewards():
    rewards = np.array([1, 1, 1, 0, 0.1, 0.1, 0.1, 5, 0.0])
    group = np.array([3, 3, 1, 1, 0, 0, 0, 2, 3])
    expected = [1, 1, 1, 1, 0, 0, 0, 0, 1]
    np.testing.assert_array_equal(rl.dynamic_sampling_mask(rewards, group, 4), expected)
    tiny = rl.dynamic_sampling_mask(np.float32([0, 1e-30]), np.zeros(2, int), 1)
    np.testing.assert_array_equal(tiny, [1, 1])


def test_overlong_penalty_is_a_ramp():
    lengths = np.array([0, 80, 81, 90, 100, 120])
    got = rl.overlong_penalty(lengths, 100, 20, 0.5)
    np.testing.assert_allclose(got, [0, 0, -0.025, -0.25, -0.5, -0.5], rtol=1e-6)


def test_no_gradient_flows():
    x, mask, group = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3)), jnp.zeros(3, int)

    @jax.jit
    @jax.grad
    def slope(x):
        parts = (
            rl.group_advantage(x[0], group, 1),
            rl.whiten(x, mask),
            *rl.reinforce_pp(x, mask),
            *rl.gae(x, x, mask, 0.9, 0.9, False),
        )
        return sum(jnp.sum(jnp.square(part)) for part in parts)

    np.testing.assert_array_equal(slope(x), jnp.zeros_like(x))


R, G = np.arange(4.0), np.zeros(4, int)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: rl.group_advantage(R, G, 1, kind="ppo"), "kind"),
        (lambda: rl.group_advantage(R, G, 1, singleton="one"), "singleton"),
        (lambda: rl.group_advantage(R, G, 1, ddof=2), "ddof"),
        (lambda: rl.group_advantage(R, G, 1, eps=-1.0), "eps"),
        (lambda: rl.group_advantage(R, G, 0), "num_groups"),
        (lambda: rl.group_advantage(R, G + 1, 1), "group"),
        (lambda: rl.group_advantage(R, G - 1, 1), "group"),
        (lambda: rl.group_advantage(R, G[1:], 1), "group"),
        (lambda: rl.group_advantage(R, G.astype(float), 1), "group"),
        (lambda: rl.group_advantage(R[None], G[None], 1), "rewards"),
        (lambda: rl.group_advantage(R, G, 1, valid=np.full(4, 2)), "valid"),
        (lambda: rl.group_advantage(R, G, 1, kind="reinforce_pp_baseline"), "mask"),
        (
            lambda: rl.group_advantage(R, G, 1, kind="reinforce_pp_baseline", mask=np.ones((3, 2))),
            "mask",
        ),
        (lambda: rl.whiten(R, np.ones(3)), "mask"),
        (lambda: rl.whiten(R, R), "mask"),
        (lambda: rl.reinforce_pp(R[None], np.ones((1, 4)), 1.5), "gamma"),
        (lambda: rl.reinforce_pp(R, np.ones(4)), "token_rewards"),
        (lambda: rl.gae(R[None], R[None], np.ones((1, 4)), 0.9, -0.1), "lam"),
        (lambda: rl.gae(R[None], R[None, 1:], np.ones((1, 4)), 0.9, 0.9), "values"),
        (lambda: rl.dynamic_sampling_mask(R, G + 5, 5), "group"),
        (lambda: rl.overlong_penalty(R, 10, 0), "buffer"),
        (lambda: rl.overlong_penalty(R, 10, 11), "max_len"),
        (lambda: rl.overlong_penalty(-R, 10, 5), "lengths"),
    ],
)
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_ids_of_invalid_rows_may_be_anything():
    got = rl.group_advantage(R, np.array([0, 0, -1, 99]), 1, valid=np.array([1, 1, 0, 0]))
    np.testing.assert_allclose(got, [-0.70710578, 0.70710578, 0, 0], rtol=1e-5)
