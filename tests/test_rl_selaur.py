"""Uncertainty and agent advantages of jaxlab.rl against loops over trajectories in float64."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from jax.sharding import AxisType, PartitionSpec

from jaxlab import rl

few = settings(max_examples=6)
B, R = 24, 4


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def signals_of(lp, lp2, bias=1.0, temp=1.0):
    p = np.exp(lp)
    return np.stack([-p * lp, 1 - p, sigmoid((bias - (lp - lp2)) / temp)], -1)


def drawn(seed, padded=True):
    """A batch of trajectories of several tasks, rows shuffled, the last rows padding with junk."""
    random = np.random.default_rng(seed)
    rows = []
    traj = 0
    while len(rows) < B - 3:
        task, length, won = random.integers(0, 3), random.integers(1, 6), random.uniform() < 0.5
        for t in range(length):
            rows.append((task, traj, 2 * t + 1, random.integers(-1, 2), won))
        traj += 1
    rows = rows[: B - 3] if padded else rows[:B]
    valid = np.arange(B) < len(rows)
    rows += [(99, -5, 0, 7, True)] * (B - len(rows))
    group, traj, t, anchor, won = (np.array(x) for x in zip(*rows, strict=True))
    mask = random.uniform(size=(B, R)) < 0.7
    mask[:, 0] |= ~mask.any(1)
    hide = lambda x: np.where(mask & valid[:, None], x, np.nan)  # noqa: E731
    lp = -random.exponential(size=(B, R))
    rewards = np.where(valid, random.standard_normal(B), np.nan)
    scores = np.where(valid, random.standard_normal(B), np.nan)
    order = random.permutation(B)
    batch = {
        "logp": hide(lp), "logp2": hide(lp + random.standard_normal((B, R))), "mask": mask * 1.0,
        "group": group, "traj": traj, "t": t, "anchor": anchor, "success": won * 1.0,
        "reward": rewards, "score": scores, "valid": valid * 1.0,
        "step_penalty": 0.1 * (random.uniform(size=B) < 0.3),
    }  # fmt: skip
    return {name: x[order] for name, x in batch.items()}


def center(x, keys, counted, rows, std, singleton, eps=1e-6):
    out = np.zeros(len(x))
    for i in rows:
        mates = [x[j] for j in rows if keys[j] == keys[i] and counted[j]]
        mean, spread = np.mean(mates), np.std(mates, ddof=1) if len(mates) > 1 else 1.0
        if len(mates) == 1 and singleton == "zero":
            mean = 0.0
        out[i] = (x[i] - mean) / (spread + eps if std else 1)
    return out


def oracle(b, c):
    """AgentAdvantage by loops, as a dictionary."""
    rows = np.flatnonzero(b["valid"])
    names = ("u_step", "u_smooth", "u_traj", "step_term", "episode_term", "G")
    out = {name: np.zeros(B) for name in names}
    runs = {}
    for i in rows:
        runs.setdefault(b["traj"][i], []).append(i)
        kept = b["mask"][i] == 1
        U = signals_of(b["logp"][i], b["logp2"][i], c.margin_bias, c.margin_temp)[kept].mean(0)
        out["u_step"][i] = c.rho * np.dot(c.weights, U) + (1 - c.rho) * U.max()
    first = np.zeros(B, bool)
    won = {}
    for key, run in runs.items():
        run.sort(key=lambda i: b["t"][i])
        first[run[0]], won[key] = True, b["success"][run[0]]
        num = den = back = 0.0
        for i in reversed(run):
            num, den = out["u_step"][i] + c.decay * num, 1 + c.decay * den
            out["u_smooth"][i] = num / den
            back = b["reward"][i] + c.gamma * back
            out["G"][i] = back - b["step_penalty"][i]
        bar = out["u_smooth"][run].mean()
        if c.summary == "exp_late":
            w = c.decay ** np.arange(len(run))[::-1]
            bar = np.sum(w * out["u_step"][run]) / w.sum()
        out["u_traj"][run] = bar
    gate = c.transform != "none" and np.mean(list(won.values())) > c.gate
    E = b["score"].copy()
    for i in rows:
        s, e = c.step_weight * out["u_smooth"][i], out["u_traj"][i]
        if c.transform == "exp":
            s, e = (np.exp(-s), np.exp(-e)) if b["success"][i] else (1.0, 1.0)
        elif c.transform == "none":
            s = e = 0.0
        else:
            sign = 0.0 if b["success"][i] else (1.0 if c.transform == "linear" else -1.0)
            s, e = sign * s, sign * e
        out["step_term"][i], out["episode_term"][i] = s, e
        if gate and c.transform == "exp":
            E[i], out["G"][i] = E[i] * e, out["G"][i] * s
        elif gate:
            E[i], out["G"][i] = E[i] + c.scale * e, out["G"][i] + c.scale * s
    counted = first if c.over_trajectories else np.ones(B, bool)
    groups, pairs = b["group"].tolist(), list(zip(b["group"], b["anchor"], strict=True))
    out["adv_episode"] = center(E, groups, counted, rows, c.std, "zero")
    out["adv_step"] = center(out.pop("G"), pairs, np.ones(B, bool), rows, c.std, "self")
    total = out["adv_episode"] + c.omega * out["adv_step"]
    return out | {"adv": total[:, None] * b["mask"], "gate": gate}


CONFIGS = {
    "main": {},
    "gigpo": dict(transform="none"),
    "gigpo, std": dict(transform="none", std=True),
    "neg": dict(transform="neg", scale=3.0),
    "exp": dict(transform="exp"),
    "exp, std": dict(transform="exp", std=True, over_trajectories=True),
    "gate closed": dict(gate=1.0),
    "grpo": dict(transform="none", omega=0.0),
    "max": dict(rho=0.3, weights=(0.0, 1.0, 0.5), margin_bias=0.5, margin_temp=2.0),
    "late": dict(summary="exp_late", decay=0.5),
    "no smoothing": dict(decay=0.0),
    "late, no smoothing": dict(summary="exp_late", decay=0.0, gamma=0.0),
    "over trajectories": dict(over_trajectories=True, omega=0.5, gamma=1.0),
}
QUICK = dict(static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})
RUN = jax.jit(rl.selaur_advantage, **QUICK)  # most of the time of this file is compilation
MAIN = rl.AgentConfig()
GIGPO = jax.jit(rl.gigpo_advantage, **QUICK)
SLOW = (
    "gigpo, std",
    "neg",
    "gate closed",
    "late, no smoothing",
    "no smoothing",
    "exp",
    "gigpo",
    "grpo",
)


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in CONFIGS]
)
def test_advantages_are_those_of_the_loops(case):
    config = rl.AgentConfig(**CONFIGS[case])
    for seed in range(2):
        batch = drawn(seed)
        expected = oracle(batch, config)
        with jax.enable_x64(True):
            wide = RUN(batch, config)
            wide = {k: np.asarray(v) for k, v in wide._asdict().items()}
        narrow = RUN(
            {k: v.astype(np.float32) if v.dtype == float else v for k, v in batch.items()}, config
        )  # noqa: E501
        assert narrow.adv.dtype == jnp.float32 and narrow.gate.dtype == bool
        for name, value in expected.items():
            assert wide[name].dtype == (bool if name == "gate" else np.float64)
            np.testing.assert_allclose(wide[name], value, rtol=1e-9, atol=1e-11, err_msg=name)
            if not config.std:  # tiny spreads are blown up
                np.testing.assert_allclose(
                    getattr(narrow, name), value, rtol=1e-4, atol=1e-5, err_msg=name
                )  # noqa: E501


def test_gigpo_needs_no_log_probabilities_and_is_selaur_with_its_gate_closed():
    batch = drawn(0)
    plain = GIGPO({k: v for k, v in batch.items() if k not in ("logp", "logp2")}, MAIN)
    assert not plain.gate and not np.any(plain.u_step) and not np.any(plain.u_traj)
    closed = RUN(batch, rl.AgentConfig(gate=1.0))
    for name in ("adv", "adv_episode", "adv_step"):
        np.testing.assert_array_equal(getattr(closed, name), getattr(plain, name))
    assert np.any(closed.episode_term != 0)
    won = batch | {"success": np.ones(B)}
    linear = RUN(won, MAIN)
    assert linear.gate
    np.testing.assert_array_equal(linear.adv, plain.adv)


def test_the_gate_is_strict():
    batch = drawn(0)
    trajectories = {
        t: s for t, s, v in zip(batch["traj"], batch["success"], batch["valid"], strict=True) if v
    }  # noqa: E501
    rate = np.mean(list(trajectories.values()))
    assert 0 < rate < 1
    assert not RUN(batch, rl.AgentConfig(gate=float(np.float32(rate)))).gate
    assert RUN(batch, rl.AgentConfig(gate=float(rate) - 1e-6)).gate


def test_a_failed_task_teaches_only_with_uncertainty():
    batch = drawn(0)
    runs = lambda task: len(set(batch["traj"][batch["group"] == task]))  # noqa: E731
    task = max(range(3), key=runs)
    assert runs(task) > 1
    rows = batch["group"] == task
    batch |= {"score": np.where(rows, 0.0, batch["score"]), "success": np.where(rows, 0.0, 1.0)}
    plain, shaped = GIGPO(batch, MAIN), RUN(batch, MAIN)
    assert not np.any(np.asarray(plain.adv_episode)[rows])
    assert np.all(np.asarray(shaped.adv_episode)[rows] != 0) and shaped.gate
    opposite = RUN(batch, rl.AgentConfig(transform="neg"))
    np.testing.assert_array_equal(opposite.step_term, -shaped.step_term)
    np.testing.assert_array_equal(opposite.episode_term, -shaped.episode_term)


def test_orders_names_and_constants_change_nothing():
    batch, config = drawn(3), MAIN
    base = RUN(batch, config)
    order = np.random.default_rng(1).permutation(B)
    moved = RUN({k: v[order] for k, v in batch.items()}, config)
    for x, y in zip(moved[:-1], base[:-1], strict=True):
        np.testing.assert_allclose(x, y[order], rtol=1e-5, atol=1e-6)
    names = np.random.default_rng(2).permutation(B)
    inside = lambda x: names[np.clip(x, 0, B - 1)]  # noqa: E731
    renamed = batch | {"group": inside(batch["group"]), "traj": inside(batch["traj"])}
    renamed |= {"anchor": 1000 - 7 * batch["anchor"], "t": 3 * batch["t"] + 2}
    for x, y in zip(RUN(renamed, config)[:-1], base[:-1], strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    lifted = RUN(batch | {"score": batch["score"] + 2.0 * batch["group"]}, config)
    many = [
        i for i in range(B) if batch["valid"][i] and sum(batch["group"] == batch["group"][i]) > 1
    ]
    np.testing.assert_allclose(np.array(lifted.adv)[many], np.array(base.adv)[many], atol=1e-5)


def test_rows_split_over_devices_have_the_same_advantages():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    batch = {k: v.astype(np.float32) if v.dtype == float else v for k, v in drawn(0).items()}
    put = lambda x: jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("data")))  # noqa: E731
    one, eight = RUN(batch, MAIN), RUN(jax.tree.map(put, batch), MAIN)
    for x, y in zip(eight, one, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@few
@given(st.integers(0, 2**32 - 1), st.sampled_from((0.0, 0.5, 0.95, 1.0)))
def test_smoothing_returns_and_summaries_are_the_loops(seed, decay):
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 8, 4)
    mask = np.arange(7) < lengths[:, None]
    u = random.uniform(size=(4, 7))
    smooth, returns, mean, late = np.zeros((4, 7)), np.zeros((4, 7)), np.zeros(4), np.zeros(4)
    for i, n in enumerate(lengths):
        for t in range(n):
            w = decay ** np.arange(n - t)
            smooth[i, t], returns[i, t] = w @ u[i, t:n] / w.sum(), w @ u[i, t:n]
        w = decay ** np.arange(n)[::-1]
        mean[i], late[i] = smooth[i, :n].mean(), w @ u[i, :n] / w.sum()
    junk = np.where(mask, u, np.nan)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7)
    close(rl.smooth_backward(junk, mask, decay), smooth)
    close(rl.discounted_returns(junk, mask, decay), returns)
    close(rl.trajectory_uncertainty(junk, mask, decay), mean)
    close(rl.trajectory_uncertainty(junk, mask, decay, "exp_late"), late)
    close(rl.smooth_backward(np.full((4, 7), 0.3), mask, decay), 0.3 * mask)
    last = (np.arange(4), lengths - 1)
    close(np.asarray(rl.smooth_backward(u, mask, decay))[last], u[last])


def test_the_weights_of_a_summary_are_those_printed():
    mask, steps = np.ones((1, 5)), np.eye(5)[:, None]
    printed = {
        0.95: (0.0442, 0.0959, 0.1612, 0.2557, 0.4429),
        1.0: (0.04, 0.09, 0.1567, 0.2567, 0.4567),
        0.0: (0.2,) * 5,
    }
    for decay, weights in printed.items():
        got = [float(rl.trajectory_uncertainty(u, mask, decay)[0]) for u in steps]
        np.testing.assert_allclose(got, weights, atol=5.1e-5)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("float64", 1e-13)])
def test_token_signals_are_the_formulas(dtype, tolerance):
    random = np.random.default_rng(0)
    z, tokens = 3 * random.standard_normal((2, 3, 9)), random.integers(0, 9, (2, 3))
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(z, dtype)
        exact = scipy.special.log_softmax(np.asarray(logits, np.float64), -1)
        lp = np.take_along_axis(exact, tokens[..., None], -1)[..., 0]
        lp2 = np.sort(exact, -1)[..., -2]
        expected = signals_of(lp, lp2, 0.5, 2.0)
        options = dict(margin_bias=0.5, margin_temp=2.0)
        got = rl.token_signals(jnp.asarray(lp, dtype), jnp.asarray(lp2, dtype), **options)
        whole = jax.jit(lambda z: rl.token_signals_from_logits(z, tokens, **options))(logits)
        full = rl.token_signals_from_logits(logits, tokens, full_entropy=True, **options)
        assert got.dtype == whole.dtype == full.dtype == dtype
        got, whole, full = map(np.asarray, (got, whole, full))
    for x in (got, whole):
        np.testing.assert_allclose(x, expected, rtol=tolerance * 10, atol=tolerance)
    share = -np.sum(np.exp(exact) * exact, -1) / np.log(9)
    np.testing.assert_allclose(full[..., 0], share, rtol=tolerance * 10)
    np.testing.assert_allclose(full[..., 1:], whole[..., 1:], rtol=tolerance)


def test_limits_of_token_signals():
    inf = jnp.inf
    lp, lp2 = jnp.array([0.0, -1e-8, -inf, -1.0]), jnp.array([-inf, -100.0, -0.1, -inf])
    got = rl.token_signals(lp, lp2)
    np.testing.assert_allclose(got[0], [0, 0, 0], atol=0)
    np.testing.assert_allclose(got[1], [1e-8, 1e-8, 0], rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(got[2], [0, 1, 1], atol=0)
    np.testing.assert_allclose(got[3], [np.exp(-1), 1 - np.exp(-1), 0], rtol=1e-6)
    uniform = rl.token_signals_from_logits(jnp.zeros((1, 8)), jnp.array([3]), full_entropy=True)
    np.testing.assert_allclose(uniform[0], [1, 1 - 1 / 8, sigmoid(1)], rtol=1e-6)
    alone = rl.token_signals_from_logits(jnp.zeros((1, 1)), jnp.array([0]), full_entropy=True)
    np.testing.assert_array_equal(alone[0], [0, 0, 0])
    p = np.linspace(0.01, 0.99, 99)
    u = np.asarray(rl.token_signals(np.log(p), np.full(99, -3.0)))
    assert np.all(np.diff(u[:, 1]) < 0) and np.all(np.diff(u[:, 2]) < 0)
    assert abs(p[np.argmax(u[:, 0])] - np.exp(-1)) < 0.01
    half = rl.token_signals(jnp.bfloat16([-0.5]), jnp.bfloat16([-1.0]))
    assert half.dtype == jnp.float32


def test_a_step_takes_means_first():
    signals = np.random.default_rng(0).uniform(size=(2, 5, 3))
    mask = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    junk = np.where(mask[..., None], signals, np.nan)
    means = signals[0][mask[0] == 1].mean(0)
    got = rl.step_uncertainty(junk, mask, (0.2, 0.3, 0.4), 0.6)
    expected = 0.6 * np.dot((0.2, 0.3, 0.4), means) + 0.4 * means.max()
    np.testing.assert_allclose(got, [expected, 0], rtol=1e-6)
    for i in range(3):
        weights = tuple(float(i == j) for j in range(3))
        np.testing.assert_allclose(rl.step_uncertainty(junk, mask, weights)[0], means[i], rtol=1e-6)


def test_shaping_terms_and_scores():
    u, bar, won = np.array([[0.2, 0.4], [0.6, 0.0]]), np.array([0.3, 0.5]), np.array([0, 1])
    step, episode = rl.shaping_terms(u, bar, won)
    np.testing.assert_allclose(step, [[0.17, 0.34], [0, 0]], rtol=1e-6)
    np.testing.assert_allclose(episode, [0.3, 0], rtol=1e-6)
    step, episode = rl.shaping_terms(u, bar, won, transform="exp", step_weight=0.5)
    np.testing.assert_allclose(step, [[1, 1], np.exp([-0.3, 0])], rtol=1e-6)
    np.testing.assert_allclose(episode, [1, np.exp(-0.5)], rtol=1e-6)
    np.testing.assert_allclose(rl.reshape_scores(np.ones(2), episode, "exp"), episode)
    np.testing.assert_allclose(rl.reshape_scores(np.ones(2), bar), [4, 6], rtol=1e-6)


def test_groups_are_centred_over_the_rows_that_count():
    random = np.random.default_rng(0)
    x, ids = random.standard_normal(12), np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3, 4, -1])
    valid = np.array([1] * 10 + [0, 0])
    weights = np.array([1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1])
    junk = np.where(valid, x, np.nan)
    for std, singleton, w in itertools.product((False, True), ("zero", "self"), (None, weights)):
        counted = np.ones(12, int) if w is None else w
        expected = center(x, ids.tolist(), counted, np.flatnonzero(valid), std, singleton)
        got = rl.group_center(junk, ids, valid, 5, std=std, singleton=singleton, weights=w)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    plain = np.asarray(rl.group_center(junk, ids, valid, 5))
    np.testing.assert_allclose([plain[:3].sum(), plain[3:5].sum(), plain[6:10].sum()], 0, atol=1e-6)
    same = rl.group_center(np.full(12, 0.1), ids, valid, 5, std=True, singleton="self", eps=0.0)
    np.testing.assert_array_equal(same, np.zeros(12))


def test_anchors_are_equal_iff_task_and_observation_are():
    got = rl.anchor_ids(["a", "b", "a", "a", ("x", 1)], [0, 0, 1, 0, 1])
    assert got.dtype == np.int32 and got.min() >= 0 and got.max() < 5
    assert got[0] == got[3] and len(set(got.tolist())) == 4


def test_no_gradient_flows():
    batch = {k: jnp.asarray(v) for k, v in drawn(0).items()}

    def total(lp, reward, score):
        out = rl.selaur_advantage(batch | dict(logp=lp, reward=reward, score=score))
        return sum(jnp.sum(x) for x in out[:-1])

    inputs = (batch["logp"], batch["reward"], batch["score"])
    for grad in jax.jit(jax.grad(total, (0, 1, 2)))(*inputs):
        np.testing.assert_array_equal(grad, jnp.zeros_like(grad))


def test_checkify_tells_of_success_that_varies():
    batch = drawn(0)
    run = checkify.checkify(jax.jit(functools.partial(rl.selaur_advantage)))
    assert run(batch)[0].get() is None
    broken = batch | {"success": np.arange(B) % 2.0}
    assert "success must be constant" in run(broken)[0].get()


def wrong(**change):
    batch = {k: v for k, v in (drawn(0) | change).items() if v is not None}
    return lambda: rl.selaur_advantage(batch)


U, OK = np.ones((2, 3)) / 2, np.ones((2, 3))
CONFIG_ERRORS = [
    ("transform", "log"), ("summary", "last"), ("weights", (1.0, -1.0, 1.0)), ("weights", (0.0, 0.0, 0.0)),
    ("weights", (1.0, 1.0)), ("rho", 1.5), ("decay", -0.1), ("gamma", 1.1), ("margin_temp", 0.0),
    ("step_weight", -1.0), ("eps", -1.0), ("gate", float("nan")), ("std", "yes"),
]  # fmt: skip


@pytest.mark.parametrize("field, value", CONFIG_ERRORS)
def test_a_wrong_configuration_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        rl.AgentConfig(**{field: value})


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: rl.token_signals(-U, -U[0]), "logp2"),
        (lambda: rl.token_signals(U, -U), "logp"),
        (lambda: rl.token_signals(-U, -U, margin_temp=0.0), "margin_temp"),
        (lambda: rl.step_uncertainty(U, OK), "mask"),
        (lambda: rl.step_uncertainty(U[..., :2], OK[0, :2]), "signals"),
        (lambda: rl.step_uncertainty(U, OK[:, 0], (-1, 1, 1)), "weights"),
        (lambda: rl.smooth_backward(U, OK, 1.1), "decay"),
        (lambda: rl.smooth_backward(U[0], OK[0], 0.5), "u "),
        (lambda: rl.trajectory_uncertainty(U, OK, 0.5, "max"), "summary"),
        (lambda: rl.discounted_returns(U, OK, -1.0), "gamma"),
        (lambda: rl.shaping_terms(U, U, OK, transform="none"), "transform"),
        (lambda: rl.reshape_scores(U, U, "log"), "transform"),
        (lambda: rl.group_center(U[0], np.zeros(3, int), OK[0], 1, singleton="keep"), "singleton"),
        (lambda: rl.group_center(U[0], np.ones(3, int), OK[0], 1), "ids"),
        (lambda: rl.group_center(U[0], np.zeros(3, int), 2 * OK[0], 1), "valid"),
        (lambda: rl.anchor_ids(["a"], [0, 1]), "group"),
        (wrong(logp=None), "logp"),
        (wrong(anchor=None), "anchor"),
        (wrong(mask=np.zeros((B, R))), "mask"),
        (wrong(group=np.full(B, B)), "group"),
        (wrong(traj=np.full(B, -1)), "traj"),
        (wrong(success=np.arange(B) % 2), "success"),
        (wrong(score=np.zeros(B - 1)), "score"),
        (wrong(logp=np.ones((B, R))), "logp"),
    ],
)
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


def test_a_config_is_frozen_and_hashable():
    config = rl.AgentConfig(weights=(1.0, 0.0, 0.0))
    assert hash(config) == hash(dataclasses.replace(config))
