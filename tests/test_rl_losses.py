"""Losses of jaxlab.rl: values, gradients and metrics against plain Python, and their properties."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rl_oracle
from jax.sharding import AxisType, PartitionSpec

from jaxlab import rl

KINDS = ("pg", "ppo", "cispo", "sapo", "gmpo")
LEVELS = ("token", "sequence", "sequence_sum", "sequence_token_grad")
MODES = (
    "token_mean",
    "seq_mean_token_mean",
    "seq_mean_token_sum",
    "seq_mean_token_scale",
    "token_sum_scale",
)
every_level = pytest.mark.parametrize(
    "level", [*LEVELS[:2], *(pytest.param(x, marks=pytest.mark.slow) for x in LEVELS[2:])]
)
N, T = 4, 5
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0]])

# What a case changes in RLConfig; "clip" cases use wide clips, where few tokens are clipped.
CONFIGS = {
    **{f"{kind} {level}": dict(kind=kind, ratio_level=level) for kind in KINDS for level in LEVELS},
    "clip higher, dual": dict(eps_high=0.28, dual_clip=1.3),
    "delta": dict(ratio_cap=1.1, log_ratio_clamp=None),
    "delta inside the clip, dual": dict(ratio_cap=1.05, dual_clip=1.5, eps_high=0.5),
    "no lower clip": dict(kind="cispo", eps_low=1.0, eps_high=4.0),
    "tau": dict(kind="sapo", tau_pos=0.7, tau_neg=2.0, ratio_level="sequence"),
    "gmpo, no clamp": dict(kind="gmpo", log_ratio_clamp=None, eps_low=0.4, eps_high=0.4),
    "narrow clamp": dict(log_ratio_clamp=0.15),
    "sequence, narrow clamp": dict(log_ratio_clamp=0.15, ratio_level="sequence_token_grad"),
    **{f"kl {kind}": dict(kl_coef=0.3, kl=kind) for kind in ("k1", "k2", "k3", "abs")},
    **{f"kl {kind}": dict(kl_coef=0.3, kl=kind, kl_clamp=0.1) for kind in ("k1_st", "k3_st")},
    "kl clamped": dict(kl_coef=0.3, kl="k3", kl_clamp=0.02),
    "kl times ratio": dict(kl_coef=0.3, kl_times_ratio=True, ratio_level="sequence"),
    "everything": dict(
        kl_coef=0.1, entropy_coef=0.2, sampler_cap=1.1, dual_clip=3.0, ratio_level="token"
    ),
    **{
        f"{mode} {rows}": dict(mode=mode, rows=rows, max_len=7)
        for mode, rows in itertools.product(MODES, ("nonempty", "all"))
    },
}


def draw(seed, adv="row"):
    """logp, batch and entropy in float64; masked positions hold junk."""
    random = np.random.default_rng(seed)
    normal = lambda scale: scale * random.standard_normal((N, T))  # noqa: E731
    logp = -1 - np.abs(normal(1.0))
    junk = np.where(random.uniform(size=(N, T)) < 0.5, np.nan, np.inf)
    hide = lambda x: np.where(MASK, x, junk)  # noqa: E731
    batch = {
        "logp_old": hide(logp + normal(0.3)),
        "logp_ref": hide(logp + normal(0.3)),
        "logp_sampler": hide(logp + normal(0.3)),
        "mask": MASK,
        "adv": random.standard_normal(N) if adv == "row" else hide(normal(1.0)),
    }
    return hide(logp), batch, hide(np.abs(normal(1.0)))


def reference(case, seed, adv="row", **extra):
    """(config, inputs, loss, gradients in logp and entropy, metric sums)."""
    config = rl.RLConfig(**CONFIGS[case])
    logp, batch, entropy = draw(seed, adv)
    batch |= extra
    if not config.kl_coef:
        del batch["logp_ref"]
    if not config.entropy_coef:
        entropy = None
    value, sums, parts = rl_oracle.loss(logp, logp, batch, config, entropy)
    of_logp = lambda x: rl_oracle.loss(x, logp, batch, config, entropy)[0]  # noqa: E731
    inside = np.where(MASK, logp, 0)
    grad = rl_oracle.slope(lambda x: of_logp(np.where(MASK, x, logp)), inside) * MASK
    return config, (logp, batch, entropy), value, grad, sums, parts


def measured(config, logp, batch, entropy, jit):
    def total(logp, entropy):
        return rl.rl_loss(logp, batch, config, entropy=entropy)

    run = jax.value_and_grad(total, argnums=0, has_aux=True)
    return (jax.jit(run) if jit else run)(jnp.asarray(logp), entropy)


SLOW = {f"{kind} {level}" for kind in ("pg", "sapo", "gmpo") for level in LEVELS[1:]}
SLOW |= {f"{mode} all" for mode in MODES} | {"kl k1", "kl abs", "tau", "sequence, narrow clamp"}


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in CONFIGS]
)
def test_loss_gradient_and_metrics_are_those_of_the_formulas(case):
    for seed, adv in ((0, "row"), (1, "token")):
        config, inputs, value, grad, sums, parts = reference(case, seed, adv)
        with jax.enable_x64(True):
            (got, metrics), slope = measured(config, *inputs, jit=False)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, value, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(slope, grad, rtol=1e-6, atol=1e-8)
        for name, total in sums.items():
            np.testing.assert_allclose(
                metrics[name][0], total, rtol=1e-10, atol=1e-12, err_msg=name
            )
            assert float(metrics[name][1]) == MASK.sum()
        np.testing.assert_allclose(metrics["loss"], parts, rtol=1e-12)
    cast = lambda x: None if x is None else jnp.asarray(x, jnp.float32)  # noqa: E731
    logp, batch, entropy = inputs
    batch = {name: cast(x) if name != "mask" else x for name, x in batch.items()}
    (got, metrics), slope = measured(config, cast(logp), batch, cast(entropy), jit=True)
    assert got.dtype == slope.dtype == jnp.float32
    np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(slope, grad, rtol=1e-5, atol=1e-6)


def test_the_oracle_has_cases_of_every_branch():
    """Clipped, dually clipped, capped: each happens in its case, or the test above proves less."""
    for case, name in {
        "ppo token": "clip_frac_high",
        "cispo token": "clip_frac_low",
        "gmpo token": "clip_frac",
        "clip higher, dual": "dual_clip_frac",
    }.items():
        assert sum(reference(case, seed, adv)[4][name] for seed, adv in ((0, "row"), (1, "token")))


def test_a_given_denominator_replaces_the_count():
    config, (logp, batch, _), value, *_, parts = reference("ppo token", 0, denominator=40.0)
    got, metrics = rl.rl_loss(logp, batch, config)
    np.testing.assert_allclose(got, parts[0] / 40, rtol=1e-5)
    assert metrics["loss"][1] == 40


@every_level
@pytest.mark.parametrize("kind", KINDS)
def test_on_policy_every_kind_has_the_gradient_of_the_policy_gradient(kind, level):
    logp, batch, _ = draw(0)
    batch = {"logp_old": logp, "adv": batch["adv"], "mask": MASK}
    if level == "sequence_sum" and kind in ("ppo", "sapo"):
        pytest.skip("the sum's ratio weighs a row by its length")
    loss = lambda kind, level: jax.value_and_grad(  # noqa: E731
        lambda x: rl.rl_loss(
            x,
            batch,
            rl.RLConfig(kind=kind, ratio_level=level, mode="seq_mean_token_mean", eps_high=0),
        )[0]
    )(jnp.asarray(logp, jnp.float32))
    value, grad = loss(kind, level)
    np.testing.assert_allclose(grad, loss("pg", "token")[1], rtol=2e-6, atol=1e-7)
    a, valid = batch["adv"][[0, 1, 3]], 3
    if kind in ("ppo", "gmpo"):
        np.testing.assert_allclose(value, -a.sum() / valid, rtol=1e-6)
    if kind == "sapo":
        np.testing.assert_allclose(value, np.sum(-2 * a / np.where(a > 0, 1, 1.05)) / 3, rtol=1e-6)


@pytest.mark.parametrize("kind", ("ppo", "cispo", "sapo", "gmpo"))
@every_level
def test_ratios_beyond_floats_have_finite_gradients_where_they_are_clipped(kind, level):
    far = jnp.array([[200.0, 150.0], [-200.0, -150.0], [200.0, 200.0]])
    adv = jnp.array([1.0, -1.0, 0.0])

    def total(x):
        tokens, _ = rl.policy_loss_tokens(
            x, jnp.zeros((3, 2)), adv, jnp.ones((3, 2)), kind=kind, ratio_level=level,
            log_ratio_clamp=None,
        )  # fmt: skip
        return jnp.sum(tokens)

    value, grad = jax.jit(jax.value_and_grad(total))(far)
    assert np.isfinite(value) and np.all(np.isfinite(grad))
    if kind == "ppo":
        assert np.all(grad == 0)
    if kind == "cispo":  # keeps what PPO drops
        np.testing.assert_allclose(grad[:, 0], [-1.2, 0.8, 0], rtol=1e-6)


def test_a_dual_clip_bounds_the_loss_of_a_huge_ratio():
    run = lambda x: rl.policy_loss_tokens(  # noqa: E731
        x, jnp.zeros((1, 1)), jnp.array([-2.0]), jnp.ones((1, 1)), dual_clip=3, log_ratio_clamp=None
    )[0][0, 0]
    value, grad = jax.value_and_grad(run)(jnp.full((1, 1), 500.0))
    assert value == 6 and grad == 0


def test_with_one_token_gspo_is_ppo():
    logp, batch, _ = draw(3, "token")
    column = lambda x: x[:, :1] if np.ndim(x) == 2 else x  # noqa: E731
    args = [column(x) for x in (logp, batch["logp_old"], batch["adv"], MASK)]
    for x, y in itertools.combinations(LEVELS, 2):
        a, b = (rl.policy_loss_tokens(*args, ratio_level=level)[0] for level in (x, y))
        np.testing.assert_array_equal(a, b)


def test_what_is_masked_counts_for_nothing_in_value_and_gradient():
    config = rl.RLConfig(kl_coef=0.1, entropy_coef=0.1, sampler_cap=2.0, mode="seq_mean_token_mean")
    logp, batch, entropy = draw(0, "token")
    clean = lambda x: np.where(MASK, x, 0) if np.shape(x) == (N, T) else x  # noqa: E731
    junk = measured(config, logp, batch, entropy, True)
    tidy = measured(
        config, clean(logp), {k: clean(v) for k, v in batch.items()}, clean(entropy), True
    )
    jax.tree.map(np.testing.assert_array_equal, junk, tidy)
    assert np.all(junk[1][MASK == 0] == 0) and np.all(junk[1][MASK == 1] != 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_valid_tokens_has_loss_and_gradient_0(mode):
    logp, batch, _ = draw(0)
    batch["mask"] = np.zeros((N, T))
    (value, metrics), grad = measured(
        rl.RLConfig(mode=mode, max_len=3, kl_coef=1.0), logp, batch, None, True
    )
    assert value == 0 and np.all(grad == 0)
    assert metrics["clip_frac"] == (0, 0)


def test_padding_and_the_order_of_rows_change_nothing():
    config = rl.RLConfig(mode="seq_mean_token_mean", kind="gmpo", kl_coef=0.1)
    logp, batch, _ = draw(0)
    (value, _), grad = measured(config, logp, batch, None, True)
    order = np.array([2, 0, 3, 1])
    wide = lambda x, fill: np.pad(x, ((0, 1), (0, 2)), constant_values=fill)  # noqa: E731
    padded = {k: wide(v[order], np.nan) for k, v in batch.items() if k not in ("mask", "adv")}
    padded |= {"mask": wide(MASK[order], 0), "adv": np.append(batch["adv"][order], 9.0)}
    (again, _), slope = measured(config, wide(logp[order], np.nan), padded, None, True)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    np.testing.assert_allclose(slope[:N, :T], grad[order], rtol=1e-5, atol=1e-7)


def test_rows_packed_into_one_lose_nothing_where_tokens_are_what_counts():
    logp, batch, _ = draw(1, "token")
    config = rl.RLConfig(kl_coef=0.1, dual_clip=3.0, eps_high=0.28)
    both = jax.value_and_grad(lambda x, b: rl.rl_loss(x, b, config)[0])
    value, grad = both(jnp.asarray(logp), batch)
    pack = lambda x: jnp.reshape(jnp.asarray(x), (1, -1))  # noqa: E731
    packed = {name: pack(x) for name, x in batch.items()}
    packed_value, packed_grad = both(pack(logp), packed)
    np.testing.assert_allclose(packed_value, value, rtol=1e-6)
    np.testing.assert_allclose(packed_grad, pack(grad), rtol=1e-6, atol=1e-8)


def test_microbatches_with_the_global_count_add_up():
    config = rl.RLConfig()
    logp, batch, _ = draw(0)
    whole = measured(config, logp, batch, None, True)
    batch["denominator"] = np.float32(MASK.sum())
    halves = []
    for part in (slice(0, 2), slice(2, 4)):
        cut = {k: v[part] if np.ndim(v) else v for k, v in batch.items()}
        halves.append(measured(config, logp[part], cut, None, True))
    np.testing.assert_allclose(sum(h[0][0] for h in halves), whole[0][0], rtol=1e-6)
    np.testing.assert_allclose(np.concatenate([h[1] for h in halves]), whole[1], rtol=1e-6)


@functools.cache
def mesh():
    return jax.make_mesh((8,), ("data",), (AxisType.Auto,))


@pytest.mark.parametrize("mode", MODES)
def test_eight_devices_have_the_mean_of_one(mode):
    random = np.random.default_rng(0)
    x = random.standard_normal((16, 6)).astype(np.float32)
    mask = (np.arange(6) < random.integers(0, 7, (16, 1))).astype(np.float32)
    mask[:2] = 0
    options = dict(mode=mode, max_len=6)
    rows = PartitionSpec("data")

    @functools.partial(jax.shard_map, mesh=mesh(), in_specs=(rows, rows), out_specs=PartitionSpec())
    def sharded(x, mask):
        return rl.aggregate(x, mask, **options, axis_name="data")

    for one, eight in zip(rl.aggregate(x, mask, **options), jax.jit(sharded)(x, mask), strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-6)


def test_loss_and_gradient_of_rows_split_over_devices_are_those_of_one():
    random = np.random.default_rng(0)
    logp = -random.exponential(size=(16, 6)).astype(np.float32)
    batch = {
        "logp_old": logp + 0.3 * random.standard_normal((16, 6)).astype(np.float32),
        "adv": random.standard_normal(16).astype(np.float32),
        "mask": (np.arange(6) < random.integers(1, 7, (16, 1))).astype(np.float32),
    }
    config = rl.RLConfig(ratio_level="sequence", mode="seq_mean_token_mean")
    run = jax.jit(jax.value_and_grad(lambda x, b: rl.rl_loss(x, b, config)[0]))
    put = lambda x: jax.device_put(x, jax.NamedSharding(mesh(), PartitionSpec("data")))  # noqa: E731
    one, eight = run(logp, batch), run(*jax.tree.map(put, (logp, batch)))
    np.testing.assert_allclose(eight[0], one[0], rtol=1e-6)
    np.testing.assert_allclose(eight[1], one[1], rtol=1e-5, atol=1e-8)


def test_ratio_is_that_of_the_oracle_and_1_on_policy():
    logp, batch, _ = draw(0)
    for level, clamp in itertools.product(LEVELS, (20.0, 0.1, None)):
        got = rl.ratio(logp, batch["logp_old"], MASK, level, clamp)
        for i in (0, 1, 3):
            valid = np.flatnonzero(MASK[i])
            z = rl_oracle.log_ratios(logp[i], logp[i], batch["logp_old"][i], valid, level, clamp)
            np.testing.assert_allclose(got[i, valid], np.exp(z), rtol=1e-6)
        assert np.all(got[MASK == 0] == 0)
        np.testing.assert_array_equal(rl.ratio(logp, logp, MASK, level, clamp), MASK)


@pytest.mark.parametrize("dtype", ("float32", "float64"))
def test_value_loss_is_that_of_the_formula(dtype):
    random = np.random.default_rng(0)
    v, old, target = (random.standard_normal((N, T)) for _ in range(3))
    old = v + 0.4 * old
    options = dict(clip=0.2, mode="seq_mean_token_mean")

    def formula(v):
        far = np.clip(v, old - 0.2, old + 0.2)
        worst = 0.5 * np.maximum((v - target) ** 2, (far - target) ** 2)
        return sum(worst[i][MASK[i] == 1].mean() for i in (0, 1, 3)) / 3

    hide = lambda x: np.where(MASK, x, np.nan)  # noqa: E731
    with jax.enable_x64(dtype == "float64"):
        run = jax.jit(
            jax.value_and_grad(
                lambda v: rl.value_loss(v, hide(old), hide(target), MASK, **options), has_aux=True
            )
        )
        (loss, metrics), grad = run(jnp.asarray(hide(v), dtype))
    assert loss.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 1e-8
    np.testing.assert_allclose(loss, formula(v), rtol=tolerance)
    np.testing.assert_allclose(grad, rl_oracle.slope(formula, v) * MASK, rtol=tolerance, atol=1e-6)
    far = np.clip(v, old - 0.2, old + 0.2)
    clipped = ((far - target) ** 2 > (v - target) ** 2) & (MASK == 1)
    got = tuple(map(float, metrics["value_clip_frac"]))
    assert got == (clipped.sum(), MASK.sum()) and clipped.any()


def test_values_that_are_not_clipped_count_as_not_clipped():
    v = jnp.float32(np.random.default_rng(0).standard_normal((50, 20)))
    _, metrics = rl.value_loss(v, v + 0.05, 3 * v, jnp.ones_like(v))
    assert metrics["value_clip_frac"][0] == 0


GOOD = dict(logp=np.zeros((N, T)), logp_old=np.zeros((N, T)), adv=np.zeros(N), mask=MASK)


@pytest.mark.parametrize(
    "field, value",
    [
        ("kind", "trpo"), ("ratio_level", "word"), ("mode", "mean"), ("rows", "some"), ("kl", "k4"),
        ("eps_low", -0.1), ("eps_low", 1.1), ("eps_low", "0.2"), ("eps_high", -0.1),
        ("eps_high", float("nan")), ("dual_clip", 1.0), ("ratio_cap", 0.0), ("tau_pos", 0.0),
        ("tau_neg", -1.0), ("log_ratio_clamp", 0.0), ("kl_coef", -0.1), ("kl_clamp", 0.0),
        ("entropy_coef", float("inf")), ("sampler_cap", 0.0), ("temperature", 0.0), ("temperature", -1.0),
        ("max_len", 0), ("max_len", 2.5), ("kl_times_ratio", 1),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_named(field, value):
    name = {"log_ratio_clamp": "clamp", "kl_clamp": "clamp", "kl": "kl"}.get(field, field)
    with pytest.raises(ValueError, match=name):
        rl.RLConfig(**{field: value})


@pytest.mark.parametrize("mode", ("seq_mean_token_scale", "token_sum_scale"))
def test_a_mode_that_needs_max_len_says_so(mode):
    with pytest.raises(ValueError, match="max_len"):
        rl.RLConfig(mode=mode)
    with pytest.raises(ValueError, match="max_len"):
        rl.aggregate(np.zeros((N, T)), MASK, mode)


@pytest.mark.parametrize(
    "change, config, name",
    [
        (dict(adv=np.zeros(T)), {}, "adv"),
        (dict(adv=np.zeros((1, T))), {}, "adv"),
        (dict(adv=np.zeros((N, T, 1))), {}, "adv"),
        (dict(mask=2 * MASK), {}, "mask"),
        (dict(mask=0.5 * MASK), {}, "mask"),
        (dict(mask=MASK[:, 1:]), {}, "mask"),
        (dict(logp_old=np.zeros((N, 1))), {}, "logp_old"),
        (dict(logp=np.zeros(N)), {}, "logp"),
        (dict(mask=None), {}, "mask"),
        ({}, dict(kl_coef=0.1), "logp_ref"),
        ({}, dict(sampler_cap=2.0), "logp_sampler"),
        ({}, dict(entropy_coef=0.1), "entropy"),
        (dict(denominator=np.ones(2)), {}, "denominator"),
    ],
)
def test_arrays_that_do_not_fit_are_named_before_anything_is_computed(change, config, name):
    batch = {k: v for k, v in (GOOD | change).items() if v is not None}
    logp = batch.pop("logp")
    with pytest.raises(ValueError, match=name):
        rl.rl_loss(logp, batch, rl.RLConfig(**config))


def test_a_row_of_advantages_may_be_a_column():
    logp, batch, _ = draw(0)
    config = rl.RLConfig()
    wide = batch | {"adv": batch["adv"][:, None]}
    full = batch | {"adv": np.broadcast_to(batch["adv"][:, None], (N, T))}
    losses = {float(rl.rl_loss(logp, b, config)[0]) for b in (batch, wide, full)}
    assert len(losses) == 1


def apply(params, tokens):
    return params["table"][tokens] @ params["out"]


@pytest.mark.parametrize("aligned", (True, False))
def test_the_objective_is_the_loss_of_the_model_s_logits(aligned):
    random = np.random.default_rng(0)
    params = {"table": random.standard_normal((7, 3)), "out": random.standard_normal((3, 7))}
    tokens = random.integers(0, 7, (N, T + 2))
    config = rl.RLConfig(temperature=0.7, entropy_coef=0.1, kl_coef=0.1)
    _, batch, _ = draw(0)
    batch["tokens"] = jnp.asarray(tokens)
    if aligned:
        targets = np.where(MASK, random.integers(0, 7, (N, T)), -1)
        batch |= {"tokens": batch["tokens"][:, :T], "targets": jnp.asarray(targets)}
    objective = rl.rl_objective(config)
    key = jax.random.key(0)
    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(lambda p: objective(apply, p, batch, key), has_aux=True))
        (loss, metrics), grad = run(params)

    def by_hand(params):
        z = params["table"][np.asarray(batch["tokens"])] @ params["out"] / 0.7
        logs = z - np.log(np.sum(np.exp(z), -1, keepdims=True))
        entropy = -np.sum(np.exp(logs) * logs, -1)
        if aligned:
            chosen = np.asarray(batch["targets"])
        else:
            logs, entropy, chosen = logs[:, 1:-1], entropy[:, 1:-1], tokens[:, 2:]
        logp = np.take_along_axis(logs, np.maximum(chosen, 0)[..., None], -1)[..., 0]
        return rl_oracle.loss(logp, logp, batch, config, entropy)[0]

    np.testing.assert_allclose(loss, by_hand(params), rtol=1e-10)
    numerator, denominator = metrics["loss"]
    np.testing.assert_allclose(numerator / denominator, loss, rtol=1e-12)
    slope = rl_oracle.slope(lambda x: by_hand(params | {"out": x}), params["out"])
    np.testing.assert_allclose(grad["out"], slope, rtol=1e-5, atol=1e-8)


def test_an_objective_without_room_for_the_scored_tokens_says_so():
    batch = {k: v for k, v in GOOD.items() if k != "logp"} | {"tokens": np.zeros((N, T), int)}
    params = {"table": np.zeros((7, 3)), "out": np.zeros((3, 7))}
    with pytest.raises(ValueError, match="mask"):
        rl.rl_objective(rl.RLConfig())(apply, params, batch, None)


def test_a_config_is_hashable_and_equal_to_its_copy():
    config = rl.RLConfig(kind="gmpo")
    assert hash(config) == hash(dataclasses.replace(config)) and config != rl.RLConfig()
