"""Psi-samplers: the exact two-token chain, laws of their draws, schedules of kappa, the loop."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_oracle import posterior, prior_vector, psi
from scipy import special, stats

from jaxlab import diffusion as d
from jaxlab.diffusion.draws import draw_and_mass

JOINT = np.array([[0.30, 0.02, 0.03], [0.02, 0.25, 0.03], [0.05, 0.05, 0.25]])
CAP, WINDOW = d.PsiSpec(high="max-capped-0.05", high_frac=1.0), "window"
COLUMNS = [0, 0.95, 0.5, 0.0, CAP, WINDOW]  # the first is kappa = 1
# Total variation to JOINT: the table of section 13.
TABLE = {
    ("uniform", False, 8): (0.083701, 0.085470, 0.103322, 0.126099, 0.093359, 0.086076),
    ("uniform", False, 128): (0.004771, 0.006708, 0.016346, 0.023597, 0.020660, 0.008114),
    ("uniform", False, 512): (0.001184, 0.002628, 0.007649, 0.011007, 0.010942, 0.003988),
    ("uniform", True, 32): (0.028085, 0.025911, 0.037822, 0.053071, 0.037095, 0.025745),
    ("uniform", True, 128): (0.013239, 0.007178, 0.016346, 0.023597, 0.020665, 0.008171),
    ("uniform", True, 512): (0.009644, 0.002632, 0.007649, 0.011007, 0.010942, 0.003988),
    ("masked", False, 8): (0.058249, 0.058448, 0.069580, 0.086687, 0.060054, 0.058430),
    ("masked", False, 512): (0.000910, 0.002161, 0.006547, 0.009279, 0.008391, 0.003501),
    ("masked", True, 32): (0.082297, 0.065727, 0.029980, 0.039515, 0.044064, 0.058788),
    ("masked", True, 128): (0.076627, 0.031011, 0.013394, 0.018901, 0.014708, 0.020384),
    ("masked", True, 512): (0.075538, 0.006160, 0.006547, 0.009279, 0.008394, 0.003544),
}


def guess(alpha, prior, corrupted):
    """The leave-one-out denoiser at every pair of tokens: [pairs, 2, V]."""
    vocab = 3 if prior == "uniform" else 4
    lik = (
        np.eye(3) * alpha + (1 - alpha) / 3
        if prior == "uniform"
        else np.r_[np.eye(3), np.ones((1, 3))]
    )
    z0, z1 = np.divmod(np.arange(vocab**2), vocab)
    p = np.stack([lik[z1] @ JOINT.T, lik[z0] @ JOINT], 1)
    p /= p.sum(-1, keepdims=True)
    if corrupted and alpha < 0.5:
        j, position = np.arange(3), np.arange(2)
        place = (z0 + 2 * z1)[:, None, None] + j + position[:, None]
        u = 1.0 + place % 3
        p = p / 2 + u / u.sum(-1, keepdims=True) / 2
    return (p if prior == "uniform" else np.pad(p, ((0, 0), (0, 0), (0, 1)))), np.stack([z0, z1], 1)


def kappas(column, times, index):
    if index == 0:
        return np.ones(len(times))
    if column is WINDOW:
        return np.where((times > 0.1) & (times <= 0.5), 0.9, 1.0)
    if isinstance(column, d.PsiSpec):
        return d.kappa_schedule(column, times)
    return np.full(len(times), float(column))


@pytest.fixture(scope="module")
def transition():
    """z, p [pairs, 2, V] and levels -> the transition matrix of pairs, from `psi_probs`."""

    def matrix(p, z, alpha_s, alpha_t, kappa, prior, mask):
        law = d.psi_probs(p, z, alpha_s, alpha_t, kappa, prior, mask)
        return (law[:, 0, :, None] * law[:, 1, None, :]).reshape(len(p), -1)

    over = jax.vmap(matrix, (0, None, 0, 0, 0, None, None))
    return jax.jit(over, static_argnums=(5, 6))


@pytest.mark.parametrize(
    "row", TABLE, ids=lambda r: f"{r[0]}-{'corrupted' if r[1] else 'exact'}-{r[2]}"
)
def test_the_two_token_chain(row, transition):
    """Property 11, to 6 digits: matrices of all steps, multiplied; ancestral removal last."""
    prior, corrupted, n = row
    mask, vocab = (None, 3) if prior == "uniform" else (3, 4)
    times = d.time_profile(d.PsiSpec(), n)
    alpha = 1 - (1 - 1e-3) * times
    after = np.append(alpha[1:], 1.0)
    p = np.stack([guess(a, prior, corrupted)[0] for a in alpha])
    z = guess(0.5, prior, corrupted)[1]
    start = prior_vector(prior, mask, vocab)
    start = np.outer(start, start).ravel()
    for index, (column, want) in enumerate(zip(COLUMNS, TABLE[row], strict=True)):
        kappa = np.append(kappas(column, times, index)[:-1], 1.0)
        with jax.enable_x64(True):
            steps = np.asarray(transition(p, z, after, alpha, kappa, prior, mask))
        law = start
        for step in steps:
            law = law @ step
        law = law.reshape(vocab, vocab)
        assert law[3:].sum() + law[:, 3:].sum() < 1e-12
        variation = np.abs(law[:3, :3] - JOINT).sum() / 2
        assert abs(variation - want) < 6e-7, (column, variation)


def mode_sigma(mode, eta, most):
    """The table of section 7.4; None where the mode names kappa itself."""
    if mode.startswith("max-capped"):
        return min(eta, most)
    if mode.startswith("max-rescale"):
        return eta * min(eta if "release" in mode else 1, most)
    return eta if mode.startswith("constant-remdm") else None


MODES = [
    "pure-posterior",
    "constant-0.6",
    "max-capped-0.05",
    "max-rescale-0.3",
    "max-rescale-release-0.3",
    "constant-remdm-0.1",
    "pure-pc",
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("schedule", ["log-linear", "cosine"])
def test_kappa_modes(mode, schedule):
    """Property 9: three segments, their last points, clipping."""
    n, spec = 12, d.PsiSpec("linear", "constant-0.25", mode, "pure-pc", 0.27, 0.5)
    times = d.time_profile(spec, n, schedule=schedule)
    got = d.kappa_schedule(spec, times, schedule)
    assert got.dtype == np.float64
    high, middle = round(0.27 * 13), round(0.5 * 13)  # 4 and 6: halves go to the even number
    assert (high, middle) == (4, 6)
    np.testing.assert_array_equal(got[:high], 0.25)
    np.testing.assert_array_equal(got[high + middle :], 0)
    hat = (1 - 1e-3) * times
    alpha = 1 - hat if schedule == "log-linear" else 1 - np.cos(np.pi / 2 * (1 - hat))
    segment = alpha[high : high + middle]
    want = []
    for a_t, a_s in zip(segment[:-1], segment[1:], strict=True):
        most = (1 - a_s) / a_t
        eta = float(mode.rsplit("-", 1)[1]) if mode[-1].isdigit() else None
        sigma = mode_sigma(mode, eta, most)
        if sigma is not None:
            want.append(min(max(1 - sigma / (1 - a_s), 0), 1))
        else:
            want.append({"pure-posterior": 1.0, "constant-0.6": 0.6, "pure-pc": 0.0}[mode])
    ends = want[-1] if mode in ("pure-posterior", "constant-0.6", "pure-pc") else 1.0
    np.testing.assert_allclose(got[high : high + middle], [*want, ends], atol=1e-12)


def test_time_profiles():
    """Property 9: joints of the loop, its inverse, the single last point."""
    np.testing.assert_array_equal(d.time_profile(d.PsiSpec(), 4), np.linspace(1, 1e-5, 5))
    spec = d.PsiSpec("linear-constant-linear-2.5e-1", high_frac=0.45, middle_frac=0.5)
    t = d.time_profile(spec, 99)
    assert len(t) == 100 and t[0] == 1 and t[-1] == 1e-5
    np.testing.assert_array_equal(
        t[44:96], 0.25
    )  # 45 points down, 50 there, the last part starts there
    assert t[43] > 0.25 > t[96]
    assert d.time_profile(spec, 9)[-1] == 0.25  # a last part of one point
    inverse = d.PsiSpec("linear-constant-linear-0.9-inv", high_frac=0.5, middle_frac=0.25)
    assert d.time_profile(inverse, 19)[12] == pytest.approx(0.1)
    assert d.time_profile(inverse, 19, schedule="cosine")[12] == pytest.approx(
        1 - 2 / np.pi * np.arccos(0.1)
    )
    # Both parts round up beyond all points: no more than there are.
    assert (
        len(
            d.time_profile(
                d.PsiSpec("linear-constant-linear-.5", high_frac=0.5, middle_frac=0.5), 2
            )
        )
        == 3
    )


def test_kappa_where_nothing_is_noise():
    np.testing.assert_array_equal(
        d.kappa_schedule(d.PsiSpec(low="max-capped-0.1"), [1.0, 0.5, 0.0, 0.0], schedule_eps=0.0),
        [1 - 0.1 / 0.5, 0, 0, 1],
    )


def coef(alpha_s, alpha_t, kappa):
    return d.StepCoef(alpha_s, alpha_t, 1 - alpha_s, 1 - alpha_t, alpha_s - alpha_t, kappa, 0.0)


@pytest.mark.parametrize("prior, mask", [("uniform", None), ("masked", 2)])
@pytest.mark.parametrize("step", ["draw", "cdf"])
def test_draws_have_the_law_of_psi(prior, mask, step):
    """Property 5: chi-square of 1e5 draws, K = 7."""
    logits = 2 * np.random.default_rng(0).standard_normal(7)
    if mask is not None:
        logits[mask] = -np.inf
    p, row = special.softmax(logits), coef(0.7, 0.3, 0.4)
    for z in (2, 4):
        x = np.eye(7)[z] if mask is not None and z != mask else p
        want = psi(x, z, 0.7, 0.3, 0.4, prior, mask)
        shape = (1000, 100)
        given = (
            jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (*shape, 7)),
            jnp.full(shape, z),
            row,
        )
        if step == "draw":
            got = jax.jit(d.categorical_step, static_argnums=(4, 5))(
                jax.random.key(z), *given, prior, mask
            )
        else:
            u = jax.random.uniform(jax.random.key(z), shape)
            got = jax.jit(d.inverse_cdf_step, static_argnums=(4, 5))(u, *given, prior, mask)
        counts = np.bincount(np.ravel(got), minlength=7)
        some = want > 0
        assert counts[~some].sum() == 0
        if some.sum() > 1:
            assert stats.chisquare(counts[some], want[some] * counts.sum()).pvalue > 1e-3


def test_inverse_cdf_counts_the_sums_below():
    logits = np.random.default_rng(0).standard_normal((2, 50, 9))
    z, u = (
        np.random.default_rng(1).integers(0, 9, (2, 50)),
        np.random.default_rng(2).uniform(size=(2, 50)),
    )
    got = d.inverse_cdf_step(u, logits, z, coef(0.6, 0.2, 0.3))
    for i, j in np.ndindex(2, 50):
        law = psi(special.softmax(logits[i, j]), z[i, j], 0.6, 0.2, 0.3, "uniform")
        assert got[i, j] == np.sum(np.cumsum(law) < u[i, j] * law.sum())


def test_two_levels_draw_from_a_large_vocabulary():
    """Rare tokens of several blocks, a vocabulary that no block divides, entries of probability 0."""
    vocab, n = 50257, 200_000
    chosen = np.array([0, 255, 256, 30_000, 50_256])
    share = np.array([0.5, 0.3, 0.19, 0.0099, 1e-4])
    logits = jnp.full((1, 1, vocab), -jnp.inf).at[0, 0, chosen].set(jnp.log(share))
    run = jax.jit(
        lambda u: jax.lax.map(lambda u: draw_and_mass(logits, jnp.zeros((1, 1), int), u)[0], u)
    )
    got = run(jax.random.uniform(jax.random.key(0), (n // 100, 2, 1, 1)))
    # The uniforms at their ends stay on tokens that exist.
    ends = run(jnp.array([0.0, 1 - 2.0**-24]).reshape(2, 1, 1, 1) * jnp.ones((2, 2, 1, 1)))
    assert ends.ravel().tolist() == [0, 50_256]
    assert set(np.unique(got)) <= set(chosen)
    counts = np.array([np.sum(got == c) for c in chosen[:4]])
    assert stats.chisquare(counts, share[:4] / share[:4].sum() * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("p", [1e-3, 0.3, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("x64", [False, True])
def test_nucleus_is_the_sorted_rule(p, x64):
    """Property 12: kept iff strictly earlier tokens have at most p."""
    with jax.enable_x64(x64):
        logits = 3 * jax.random.normal(jax.random.key(0), (40, 1000))
        got = np.asarray(jax.jit(d.nucleus, static_argnums=1)(logits, p))
        assert d.nucleus(logits, 1.0) is logits
        logits = np.asarray(logits)
        probs = special.softmax(np.asarray(logits, np.float64), -1)
    order = np.argsort(-probs, -1)
    ranked = np.take_along_axis(probs, order, -1)
    kept = np.cumsum(ranked, -1) - ranked <= p
    want = np.zeros_like(kept)
    np.put_along_axis(want, order, kept, -1)
    # A token whose rank sum is within a rounding of p may fall on either side.
    near = np.zeros_like(probs)
    np.put_along_axis(near, order, np.abs(np.cumsum(ranked, -1) - ranked - p), -1)
    clear = near > (1e-12 if x64 else 1e-6)
    assert np.mean(clear) > 0.999
    np.testing.assert_array_equal((got > -np.inf)[clear], want[clear])
    np.testing.assert_array_equal(got[got > -np.inf], np.asarray(logits)[got > -np.inf])


def test_race():
    p, u = np.random.default_rng(0).uniform(size=(2, 5, 9))
    want = np.argmax(p / (1e-10 - np.log(u + 1e-10)), -1)
    np.testing.assert_array_equal(d.race_categorical(p, u), want)


TABLE_LOGITS = np.random.default_rng(3).standard_normal((6, 6))
CFG = d.SamplerConfig(vocab=6, steps=5, psi=d.PsiSpec(low="constant-0.5"), nucleus=0.9)
SHORT = dataclasses.replace(CFG, steps=1, nucleus=1.0)
MASKED = dataclasses.replace(CFG, prior="masked", mask_id=4)


def denoise(z, sigma):
    assert z.ndim == 2 and sigma.shape == z.shape[:1]
    context = jnp.roll(z, 1, -1)
    return jnp.asarray(TABLE_LOGITS, sigma.dtype)[context] * (1 + sigma[:, None, None])


@pytest.mark.parametrize("cfg", [CFG, MASKED], ids=["uniform", "masked"])
@pytest.mark.parametrize("removal", ["ancestral", "greedy", "none"])
def test_trajectories_from_given_uniforms(cfg, removal):
    """The loop against the same loop in NumPy, token for token, in float64."""
    cfg = dataclasses.replace(cfg, removal=removal)
    n, shape, mask = cfg.steps, (3, 8), cfg.mask_id
    random = np.random.default_rng(0)
    u = random.uniform(size=(n + 1, *shape))
    z = np.full(shape, mask) if mask else random.integers(0, 6, shape)
    with jax.enable_x64(True):
        run = jax.jit(lambda z, u: d.sample_from_uniforms(denoise, z, u, cfg))
        got, trajectory = run(z, u)
        assert got.dtype == jnp.int32 and trajectory.shape == (n, *shape)
    times = d.time_profile(cfg.psi, n)
    kappa = np.append(d.kappa_schedule(cfg.psi, times)[:-1], 1)
    alpha = 1 - (1 - 1e-3) * times
    after = np.append(alpha[1:], 1)
    for i in range(n + 1):
        sigma = 0.0 if mask else -np.log(alpha[i])
        logits = TABLE_LOGITS[np.roll(z, 1, -1)] * (1 + sigma)
        if mask:
            logits[..., mask] = -np.inf
        if i == n and removal == "none":
            break
        new = z.copy()
        for at in np.ndindex(*shape):
            p = special.softmax(logits[at])
            known = mask is not None and z[at] != mask
            p = np.eye(6)[z[at]] if known else p
            if i == n and removal == "greedy":
                new[at] = np.argmax(p)
                continue
            order = np.argsort(-p, kind="stable")
            keep = order[np.cumsum(p[order]) - p[order] <= 0.9]
            q = np.zeros(6)
            q[keep] = p[keep] / p[keep].sum()
            law = psi(q, z[at], after[i], alpha[i], kappa[i], cfg.prior, mask)
            new[at] = np.sum(np.cumsum(law) < u[i][at] * law.sum())
        z = new
        if i < n:
            np.testing.assert_array_equal(trajectory[i], z)
    np.testing.assert_array_equal(got, z)


@functools.cache
def sampler(cfg, shape):
    return jax.jit(lambda key: d.sample(key, denoise, cfg, shape))


def run(cfg, key=0, shape=(4, 8)):
    return sampler(cfg, shape)(jax.random.key(key))


def test_sampling_is_reproducible_and_each_row_alone():
    """Property 10."""
    with jax.disable_jit():
        plain = d.sample(jax.random.key(0), denoise, SHORT, (1, 3))
    np.testing.assert_array_equal(plain, run(SHORT, shape=(1, 3)))
    for cfg in (CFG, MASKED):
        got = run(cfg)
        assert got.dtype == jnp.int32 and np.any(got != run(cfg, key=1))
        np.testing.assert_array_equal(got[:2], run(cfg, shape=(2, 8)))
    mesh = jax.make_mesh((4,), ("data",), (jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data", None))

    def spread(z, sigma):
        return jax.lax.with_sharding_constraint(
            denoise(z, sigma), jax.NamedSharding(mesh, jax.P("data"))
        )

    sharded = jax.jit(lambda key: d.sample(key, spread, CFG, (4, 8)), out_shardings=rows)
    np.testing.assert_array_equal(sharded(jax.random.key(0)), run(CFG))


@pytest.mark.parametrize("removal", ["ancestral", "greedy"])
@pytest.mark.parametrize("steps", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_no_mask_is_left(removal, steps):
    """Property 10."""
    got = run(dataclasses.replace(MASKED, removal=removal, steps=steps))
    assert not np.any(got == 4) and np.all((got >= 0) & (got < 6))
    raw = run(dataclasses.replace(MASKED, removal="none", steps=2, eps=0.5))
    assert np.any(raw == 4)


def test_one_compilation_serves_all_kappas_and_times():
    """Property 10 and section 14."""
    counted = jax.jit(
        chex.assert_max_traces(lambda key, c: d.sample(key, denoise, CFG, (2, 4), c), n=1)
    )
    specs = [d.PsiSpec(low=f"max-capped-{eta}") for eta in (0.01, 0.1)] + [
        d.PsiSpec("linear-constant-linear-0.5", high_frac=0.3, middle_frac=0.3),
    ]
    outs = [
        counted(jax.random.key(0), d.step_coefs(dataclasses.replace(CFG, psi=spec)))
        for spec in specs
    ]
    assert len({np.asarray(x).tobytes() for x in outs}) > 1
    chex.clear_trace_counter()
    jaxpr = jax.make_jaxpr(lambda key: d.sample(key, denoise, CFG, (2, 4)))(jax.random.key(0))
    loops = [e for e in jaxpr.eqns if e.primitive.name in ("scan", "while")]
    # The last is the nucleus of the removal.
    assert [e.params["length"] for e in loops] == [CFG.steps, 30] and "callback" not in str(jaxpr)


@pytest.mark.parametrize("prior", ["uniform", "masked"])
def test_a_constant_guess_is_exact_for_any_steps(prior):
    """Section 3.1: one position, the guess is the law of the data; 1e5 tokens."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    wide = p if prior == "uniform" else np.append(p, 0)
    logits = jnp.log(jnp.asarray(wide, jnp.float32))
    cfg = d.SamplerConfig(
        len(wide), 4, prior, None if prior == "uniform" else 4, psi=d.PsiSpec(low="constant-0.7")
    )
    constant = lambda z, sigma: jnp.broadcast_to(logits, (*z.shape, len(wide)))  # noqa: E731
    got = jax.jit(lambda key: d.sample(key, constant, cfg, (100, 1000)))(jax.random.key(0))
    counts = np.bincount(np.ravel(got), minlength=4)
    assert stats.chisquare(counts, p * counts.sum()).pvalue > 1e-3


@pytest.mark.parametrize("prior, mask", [("uniform", None), ("masked", 5)])
def test_guidance_with_a_nucleus_writes_what_the_class_allows(prior, mask):
    """The two nuclei, of one token each, have none in common."""
    logits = 9.0 * jnp.asarray(np.eye(6)[[2, 3]]) - 4.5

    def network(z, sigma, labels):
        return jnp.broadcast_to(logits[labels][:, None], (*z.shape, 6))

    cfg = d.SamplerConfig(
        6, 3, prior, mask, nucleus=0.9, guidance=1.5, num_classes=1
    )  # class 0, or none
    labels, key = jnp.zeros(4, int), jax.random.key(0)
    call = jax.jit(lambda key: d.sample(key, network, cfg, (4, 8), labels=labels, trajectory=True))
    tokens, seen = call(key)
    np.testing.assert_array_equal(tokens, 2)
    assert seen.shape == (3, 4, 8) and np.any(seen != 2)


@pytest.mark.slow
def test_guided_sampling():
    """Weight 1 is the class alone, 0 none; between, a law of the guided posteriors."""
    by_label = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6)))

    def network(z, sigma, labels):
        return jnp.broadcast_to(by_label[labels][:, None], (*z.shape, 6)).astype(jnp.float32)

    cfg = d.SamplerConfig(6, 3, psi=d.PsiSpec(low="constant-0.5"), guidance=1.0, num_classes=2)
    labels, shape = jnp.array([0, 1]), (2, 20_000)
    go = lambda cfg, fn=network, labels=labels: jax.jit(  # noqa: E731
        lambda key: d.sample(key, fn, cfg, shape, labels=labels)
    )(jax.random.key(0))
    none = dataclasses.replace(cfg, guidance=None)
    np.testing.assert_array_equal(go(cfg), go(none))
    np.testing.assert_array_equal(
        go(dataclasses.replace(cfg, guidance=0.0)), go(none, labels=jnp.array([2, 2]))
    )
    # One step: kappa = 1 from the prior; then the law of the removal, by enumeration.
    one = dataclasses.replace(cfg, guidance=2.0, steps=1, psi=d.PsiSpec(), removal="none", eps=0.5)
    got = go(one)
    alpha = 1 - (1 - 1e-3) * np.array([1.0, 0.5])
    for row in range(2):
        law = np.zeros(6)
        for z in range(6):
            q = [
                posterior(special.softmax(by_label[i]), z, alpha[1], alpha[0], "uniform")
                for i in (row, 2)
            ]
            mix = q[0] ** 2 / q[1]
            law += mix / mix.sum() / 6
        counts = np.bincount(got[row], minlength=6)
        assert stats.chisquare(counts, law * counts.sum()).pvalue > 1e-3
    # kappa = 0 mixes the guided law of the clean token with the prior.
    pc = dataclasses.replace(one, psi=d.PsiSpec(low="pure-pc"))
    got = go(pc)
    law = np.zeros(6)
    for z in range(6):
        q = [posterior(special.softmax(by_label[i]), z, 1.0, alpha[0], "uniform") for i in (0, 2)]
        mix = q[0] ** 2 / q[1]
        law += (alpha[1] * mix / mix.sum() + (1 - alpha[1]) / 6) / 6
    counts = np.bincount(got[0], minlength=6)
    assert stats.chisquare(counts, law * counts.sum()).pvalue > 1e-3
    assert go(dataclasses.replace(one, removal="greedy")).shape == shape


C = d.SamplerConfig
LOGITS, Z = jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int)
WRONG = {
    "steps=0": lambda: C(4, 0),
    "vocabulary of 2|vocab=1": lambda: C(1, 4),
    "mask_id=None": lambda: C(4, 4, "masked"),
    "mask_id=9": lambda: C(4, 4, "masked", 9),
    "prior='x'": lambda: C(4, 4, "x"),
    "schedule='x'": lambda: C(4, 4, schedule="x"),
    "removal='x'": lambda: C(4, 4, removal="x"),
    "nucleus=0": lambda: C(4, 4, nucleus=0),
    "num_classes=None": lambda: C(4, 4, guidance=2.0),
    "low='max'": lambda: C(4, 4, psi=d.PsiSpec(low="max")),
    "profile='cubic'": lambda: C(4, 4, psi=d.PsiSpec("cubic")),
    "constant-2": lambda: C(4, 4, psi=d.PsiSpec(high="constant-2")),
    "number from 0 to 1": lambda: d.time_profile(d.PsiSpec("linear-constant-linear-x"), 4),
    "high_frac \\+ middle_frac": lambda: C(4, 4, psi=d.PsiSpec(high_frac=0.6, middle_frac=0.5)),
    "N=0": lambda: d.time_profile(d.PsiSpec(), 0),
    "times has shape": lambda: d.kappa_schedule(d.PsiSpec(), np.ones((2, 2))),
    "p=1.5": lambda: d.nucleus(LOGITS, 1.5),
    "labels=None": lambda: d.sample(jax.random.key(0), denoise, C(6, 2, guidance=2.0, num_classes=3), (1, 2)),
    "denoise_fn gave": lambda: d.sample(jax.random.key(0), denoise, C(7, 2), (1, 2)),
    "coefs.alpha_s has": lambda: d.sample(jax.random.key(0), denoise, C(6, 2), (1, 2), d.step_coefs(C(6, 3))),
    "u has shape": lambda: d.inverse_cdf_step(jnp.zeros(2), LOGITS, Z, coef(0.5, 0.4, 1.0)),
    "z has shape": lambda: d.categorical_step(jax.random.key(0), LOGITS, Z[0], coef(0.5, 0.4, 1.0)),
    "uniforms has shape": lambda: d.sample_from_uniforms(denoise, Z, jnp.zeros((2, 1, 2)), C(6, 2)),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError), match=message):
        WRONG[message]()
