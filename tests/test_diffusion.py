"""Schedules, forward process, posteriors and losses of discrete diffusion against the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion_oracle import forward, nelbo, nelbo_release, posterior, prior_vector, psi
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify
from jax.test_util import check_grads

from jaxlab import diffusion as d

PRIORS = {"uniform": None, "masked": 1}
every_prior = pytest.mark.parametrize("prior", PRIORS)
every_width = pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])


def clean_laws(k, prior, seed=0):
    """Random laws [k, V] and the one-hot ones, none of them on the mask."""
    random = np.random.default_rng(seed)
    p = np.concatenate([np.eye(k), random.dirichlet(np.ones(k), 3)])
    return p if prior == "uniform" else np.insert(p, PRIORS["masked"], 0, axis=1)


@every_prior
@every_width
@pytest.mark.parametrize("k", [2, 5])
def test_psi_is_its_definition_and_keeps_the_marginals(prior, x64, k):
    """Properties 1 and 2: q_t then Psi is q_s, of every clean law, for any kappa."""
    mask, tolerance = PRIORS[prior], 1e-12 if x64 else 1e-6
    with jax.enable_x64(x64):
        run = jax.jit(d.psi_probs, static_argnames=("prior", "mask_id"))
        for alpha_s, alpha_t in [(1.0, 0.3), (0.9, 0.8999), (0.5, 0.5), (0.7, 1e-5), (1e-3, 1e-6)]:
            for kappa in (0.0, 0.37, 1.0):
                for p in clean_laws(k, prior):
                    vocab = len(p)
                    rows = jnp.asarray(np.tile(p, (vocab, 1)))
                    got = run(rows, jnp.arange(vocab), alpha_s, alpha_t, kappa, prior, mask)
                    want = [psi(p, z, alpha_s, alpha_t, kappa, prior, mask) for z in range(vocab)]
                    np.testing.assert_allclose(got, want, atol=tolerance)
                    chained = forward(p, alpha_t, prior, mask) @ np.asarray(got, np.float64)
                    after = forward(p, alpha_s, prior, mask)
                    np.testing.assert_allclose(chained, after, atol=tolerance)


@every_prior
def test_limits_of_psi(prior):
    """Property 3."""
    mask = PRIORS[prior]
    p = jnp.asarray(clean_laws(4, prior)[-1])
    z = jnp.arange(len(p))
    rows = jnp.tile(p, (len(p), 1))
    at = lambda s, t, kappa: d.psi_probs(rows, z, s, t, kappa, prior, mask)  # noqa: E731
    q = d.posterior_probs(rows, z, 0.8, 0.3, prior, mask)
    np.testing.assert_array_equal(at(0.8, 0.3, 1.0), q)
    want = [posterior(np.asarray(p, np.float64), i, 0.8, 0.3, prior, mask) for i in range(len(p))]
    np.testing.assert_allclose(q, want, atol=1e-6)
    clean = d.posterior_probs(rows, z, 1.0, 0.3, prior, mask)
    level = d.Level(0.8, 0.2, -1.0)
    np.testing.assert_allclose(at(0.8, 0.3, 0.0), d.q_probs(clean, level, prior, mask), atol=1e-6)
    np.testing.assert_allclose(at(0.6, 0.6, 1.0), np.eye(len(p)), atol=1e-6)
    # Nothing is noise: z stays, also where the guess excludes it.
    np.testing.assert_allclose(at(1.0, 1.0, 1.0)[0], np.eye(len(p))[0], atol=1e-6)
    impossible = d.posterior_probs(jnp.eye(len(p))[3:4], z[:1], 1.0, 1.0, prior, mask)
    np.testing.assert_allclose(impossible[0], np.eye(len(p))[0], atol=1e-6)


def test_levels_broadcast_against_the_tokens():
    p = jax.random.dirichlet(jax.random.key(0), jnp.ones(5), (2, 3))
    z = jnp.array([[0, 1, 2], [3, 4, 0]])
    s, t = jnp.array([[0.9], [0.4]]), jnp.array([[0.5, 0.6, 0.7], [0.1, 0.2, 0.3]])
    got = d.psi_probs(p, z, s, t, 0.3, "uniform")
    for i, j in np.ndindex(2, 3):
        q = np.asarray(p[i, j], np.float64)
        want = psi(q, z[i, j], float(s[i, 0]), float(t[i, j]), 0.3, "uniform")
        np.testing.assert_allclose(got[i, j], want, atol=1e-6)


def test_weights_make_the_mixture():
    """Property 5, exact part."""
    p = jax.random.dirichlet(jax.random.key(1), jnp.ones(7), (7,))
    z = jnp.arange(7)
    w_x, w_z, w_u = d.psi_weights(jnp.diagonal(p), 0.8, 0.5, 0.4, 7)
    np.testing.assert_allclose(w_x + w_z + w_u, 1, atol=1e-6)
    mixed = w_x[:, None] * p + w_z[:, None] * jnp.eye(7) + w_u[:, None] / 7
    np.testing.assert_allclose(mixed, d.psi_probs(p, z, 0.8, 0.5, 0.4, "uniform"), atol=1e-6)
    w_x, w_z, w_m = d.psi_weights_masked(z == 2, 0.8, 0.5, 0.4)
    p = p.at[:, 2].set(0) / (1 - p[:, 2:3])
    mixed = w_x[:, None] * p + w_z[:, None] * jnp.eye(7) + w_m[:, None] * jnp.eye(7)[2]
    np.testing.assert_allclose(mixed, d.psi_probs(p, z, 0.8, 0.5, 0.4, "masked", 2), atol=1e-6)
    assert not np.any(w_z[2]) and not np.any(np.delete(w_x, 2))


def test_masked_psi_is_remdm():
    """Property 4."""
    p = clean_laws(4, "masked")[-1]
    alpha_s, alpha_t, kappa, mask = 0.7, 0.4, 0.6, 1
    sigma = float(d.kappa_to_remdm_sigma(kappa, alpha_s))
    np.testing.assert_allclose(sigma, 0.4 * 0.3, rtol=1e-6)
    np.testing.assert_allclose(d.remdm_sigma_to_kappa(sigma, alpha_s), kappa, rtol=1e-5)
    z = np.array([0, mask])
    got = d.psi_probs(jnp.tile(p, (2, 1)), z, alpha_s, alpha_t, kappa, "masked", mask)
    kept = (1 - sigma) * np.eye(5)[0] + sigma * np.eye(5)[mask]
    new = (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t) * p
    new = new + (1 - alpha_s - sigma * alpha_t) / (1 - alpha_t) * np.eye(5)[mask]
    np.testing.assert_allclose(got, [kept, new], atol=1e-6)
    with pytest.raises(ValueError, match="sigma=0.4"):
        d.remdm_sigma_to_kappa(0.4, alpha_s)


def test_guidance():
    a, b = np.random.default_rng(0).dirichlet(np.ones(5), (2, 3))
    a[0, 2] = 0
    for weight in (0.0, 1.0, 2.5, -0.3):
        want = np.where(b * a > 0, np.where(a > 0, a, 1) ** weight * b ** (1 - weight), 0)
        got = jax.jit(d.guided_probs)(jnp.asarray(a), jnp.asarray(b), weight)
        np.testing.assert_allclose(got, want / want.sum(-1, keepdims=True), rtol=2e-6)
    assert not np.any(d.guided_probs(jnp.eye(2)[:1], jnp.eye(2)[1:], 1.5))


@every_prior
def test_forward_draws_follow_the_marginal(prior):
    mask, n = PRIORS[prior], 200_000
    x0 = jnp.full((n,), 3)
    level = d.log_linear(jnp.float32(0.6))
    z = d.q_sample(jax.random.key(0), x0, level, prior, mask, None if mask else 5)
    want = forward(np.eye(5)[3], float(level.alpha), prior, mask)
    np.testing.assert_allclose(d.q_probs(jnp.eye(5)[3:4], level, prior, mask)[0], want, atol=1e-7)
    counts = np.bincount(z, minlength=5) / n
    assert np.all(np.abs(counts - want) <= 4 * np.sqrt(want * (1 - want) / n))
    assert prior_vector(prior, mask, 5).sum() == pytest.approx(1)


@pytest.mark.parametrize("name", ["log_linear", "cosine"])
def test_schedules(name):
    """Property 9, schedules: float32 keeps the relative precision of alpha and of 1 - alpha."""
    fn = getattr(d, name)
    t = np.concatenate([np.linspace(0, 1, 101), [1e-6, 1 - 1e-6]]).astype(np.float32)
    got = jax.jit(fn)(t)
    wide = t.astype(np.float64)
    hat = (1 - 1e-3) * wide
    angle = np.pi / 2 * hat
    exact = {
        "log_linear": (1 - hat, hat, np.full_like(hat, -(1 - 1e-3))),
        "cosine": (1 - np.sin(angle), np.sin(angle), -(1 - 1e-3) * np.pi / 2 * np.cos(angle)),
    }[name]
    for x, want in zip(got, exact, strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, want, rtol=2e-6)
    slope = jax.vmap(jax.grad(lambda t: fn(t).alpha))(t)
    np.testing.assert_allclose(slope, got.dalpha, rtol=1e-4, atol=1e-6)
    inverse = getattr(d, f"inverse_{name}")
    inner = t[(t > 0.05) & (t < 0.95)]
    np.testing.assert_allclose(inverse(fn(inner, eps=0.0).alpha), inner, rtol=1e-5)
    if name == "cosine":
        release = d.cosine(t, exact_derivative=False).dalpha
        np.testing.assert_allclose(release * (1 - 1e-3), got.dalpha, rtol=1e-6)


@given(n=st.integers(1, 40), seed=st.integers(0, 9))
@settings(max_examples=10)
def test_times_are_stratified(n, seed):
    u = np.random.default_rng(seed).uniform(size=n)
    t = np.asarray(d.times_from_uniforms(u, eps=0.01))
    np.testing.assert_array_equal(np.floor((t - 0.01) / 0.99 * n + 1e-4 * (u - 0.5)), np.arange(n))
    np.testing.assert_allclose(d.times_from_uniforms(u, 0.01, False), 0.99 * u + 0.01, rtol=1e-6)
    t = d.sample_times(jax.random.key(seed), n)
    assert t.shape == (n,) and np.all((t >= 1e-3) & (t <= 1)) and np.all(np.diff(t) > 0)


def random_case(k, n, seed=0, spread=4.0):
    random = np.random.default_rng(seed)
    logits = spread * random.standard_normal((1, n, k))
    x0 = random.integers(0, k, (1, n))
    z = np.where(random.uniform(size=(1, n)) < 0.5, x0, random.integers(0, k, (1, n)))
    return logits, z, x0


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("form", [nelbo, nelbo_release])
def test_uniform_loss_is_its_definition(form):
    """Property 6: forms A, B and C, and that no term is negative."""
    logits, z, x0 = random_case(11, 40)
    with jax.enable_x64(True):
        for t in (0.05, 0.4, 0.9):
            level = d.log_linear(jnp.float64(t))
            got = jax.jit(d.uniform_nelbo)(logits, z, x0, level)[0]
            p = softmax(logits)[0]
            want = [
                form(p[i], z[0, i], x0[0, i], float(level.alpha), -0.999) for i in range(len(p))
            ]
            np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)
            assert np.all(got >= 0)


@pytest.mark.parametrize("k, n", [(17, 64), (50257, 8)])
@pytest.mark.parametrize("schedule", ["log_linear", "cosine"])
def test_float32_loss_and_gradient(k, n, schedule):
    """Property 6: relative 1e-5 from t = 1e-3 to 0.999, gradients 1.5e-5 of the largest of a row."""
    run = jax.jit(
        jax.vmap(jax.value_and_grad(lambda *x: jnp.sum(d.uniform_nelbo(*x))), (1, 1, 1, None))
    )
    for i, t in enumerate((1e-3, 0.03, 0.5, 0.97, 0.999)):
        logits, z, x0 = random_case(k, n, i)
        # Networks sure of x0, and sure of a wrong z.
        logits[0, 0, x0[0, 0]] += 40
        logits[0, 1, (z[0, 1], x0[0, 1])] += (60, 20)
        logits = logits.astype(np.float32)[:, :, None]
        z, x0 = z[:, :, None], x0[:, :, None]
        level = getattr(d, schedule)(np.float32(t))
        value, grad = run(logits, z, x0, level)
        with jax.enable_x64(True):
            exact = getattr(d, schedule)(jnp.float64(np.float32(t)))
            true, slope = run(logits.astype(np.float64), z, x0, exact)
            true, slope = np.asarray(true), np.asarray(slope)
        np.testing.assert_allclose(value, true, rtol=1e-5)
        most = np.max(np.abs(slope), -1, keepdims=True)
        assert np.max(np.abs(np.asarray(grad) - slope) / most) < 1.5e-5


def test_gradients_along_logits_and_level():
    """Property 6: the closed form is that of finite differences, forward and backward."""
    logits, z, x0 = random_case(6, 8, spread=1.0)
    with jax.enable_x64(True):
        for t in (0.02, 0.5, 0.95):
            fn = lambda logits, t: d.uniform_nelbo(logits, z, x0, d.log_linear(t))  # noqa: B023, E731
            check_grads(fn, (jnp.asarray(logits), jnp.float64(t)), 1, eps=1e-5)


def test_losses_are_finite_at_every_end():
    """Property 6: logits of 1e4, alpha of 0 and 1, float32."""
    k = 9
    logits = jnp.array([[[1e4] + [0] * 8, [0] * 8 + [-1e4], [-1e4] * 4 + [1e4] * 5, [0.0] * 9]])
    z = jnp.array([[0, 8, 3, 2]])
    for x0 in (z, (z + 4) % k):
        for level in (
            d.Level(1.0, 0.0, -1.0),
            d.Level(0.0, 1.0, -1.0),
            d.log_linear(jnp.float32(0.5)),
        ):
            for loss in (d.uniform_nelbo, lambda *x: d.masked_nelbo(*x, 3)):
                value, grad = jax.value_and_grad(lambda x: jnp.sum(loss(x, z, x0, level)))(logits)  # noqa: B023
                assert np.isfinite(value) and np.all(np.isfinite(grad))
    same = d.uniform_nelbo(1e4 * jax.nn.one_hot(z, k), z, z, d.log_linear(jnp.float32(0.5)))
    np.testing.assert_allclose(same, 0, atol=1e-7)


def losses_of(p, x, prior, levels, vocab):
    """E_z[f] of a constant guess p, at every level."""
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p)), (len(levels.alpha), vocab, vocab))
    z = jnp.broadcast_to(jnp.arange(vocab), logits.shape[:2])
    x0 = jnp.full_like(z, x)
    level = d.Level(*(a[:, None] for a in levels))
    if prior == "uniform":
        f = d.uniform_nelbo(logits, z, x0, level)
    else:
        f = d.masked_nelbo(logits, z, x0, level, PRIORS["masked"])
    law = d.q_probs(jax.nn.one_hot(x0[:, 0], vocab, dtype=f.dtype), levels, prior, PRIORS[prior])
    return jnp.sum(law * f, -1)


@every_prior
@pytest.mark.parametrize("schedule", ["log_linear", "cosine"])
def test_the_bound_is_exact_for_one_token(prior, schedule):
    """Property 6, identity 4.4: the integral over time is -log p[x]."""
    node, weight = np.polynomial.legendre.leggauss(400)
    with jax.enable_x64(True):
        levels = getattr(d, schedule)(jnp.asarray((node + 1) / 2), eps=0.0)
        p = np.random.default_rng(1).dirichlet(np.ones(4))
        vocab = 4 if prior == "uniform" else 5
        guess = p if prior == "uniform" else np.insert(p, PRIORS[prior], 1e-9)
        x = 2
        got = np.sum(weight / 2 * np.asarray(losses_of(guess, x, prior, levels, vocab)))
        true = guess[x] if prior == "uniform" else guess[x] / p.sum()
    # 400 nodes leave 5e-6.
    np.testing.assert_allclose(got, -np.log(true), atol=1e-5)


def test_the_loss_is_the_limit_of_kl():
    """Property 6: N KL(q_{s|t}(z, x) || q_{s|t}(z, guess)) with s = t - 1/N."""
    p, t, n = np.random.default_rng(2).dirichlet(np.ones(5)), 0.4, 1e6
    with jax.enable_x64(True):
        at, before = d.log_linear(jnp.float64(t)), d.log_linear(jnp.float64(t - 1 / n))
        for z in (1, 3):
            args = (1, float(before.alpha), float(at.alpha), "uniform")
            true = posterior(np.eye(5)[1], z, *args[1:])
            guess = posterior(p, z, *args[1:])
            kl = n * np.sum(true * np.log(true / guess))
            logits = jnp.log(jnp.asarray(p))[None, None]
            got = d.uniform_nelbo(logits, jnp.array([[z]]), jnp.array([[1]]), at)
            np.testing.assert_allclose(got[0, 0], kl, rtol=1e-4)


def test_subs_and_the_masked_loss():
    logits = 3 * jax.random.normal(jax.random.key(0), (1, 3, 5))
    z, x0 = jnp.array([[1, 2, 1]]), jnp.array([[0, 2, 4]])
    logp = np.asarray(d.subs(logits, z, 1))
    q = softmax(np.delete(np.asarray(logits, np.float64), 1, -1))
    np.testing.assert_allclose(np.delete(logp[0, ::2], 1, -1), np.log(q[0, ::2]), rtol=1e-5)
    assert np.all(logp[0, ::2, 1] <= -1e5)
    np.testing.assert_array_equal(np.exp(logp[0, 1]), np.eye(5)[2])
    level = d.log_linear(jnp.float32(0.3))
    want = -0.999 / 0.2997 * logp[0, (0, 2), (0, 4)]
    np.testing.assert_allclose(d.masked_nelbo(logits, z, x0, level, 1)[0, ::2], want, rtol=1e-5)
    assert d.masked_nelbo(logits, z, x0, level, 1)[0, 1] == 0


def test_the_mean_counts_valid_tokens():
    f = jnp.array([[1.0, 2.0, jnp.nan]])
    loss, aux = d.nelbo_mean(f, jnp.array([[1, 1, 0]]))
    assert (loss, *aux["nll"]) == (1.5, 3.0, 2.0)
    assert d.nelbo_mean(f, jnp.zeros((1, 3), bool))[0] == 0


P, Z, LEVEL = jnp.ones((1, 2, 4)) / 4, jnp.zeros((1, 2), int), d.Level(0.5, 0.5, -1.0)
WRONG = {
    "z has dtype": lambda: d.posterior_probs(P, 1.0 * Z, 0.5, 0.4, "uniform"),
    "z has shape": lambda: d.posterior_probs(P, Z[:, :1], 0.5, 0.4, "uniform"),
    "vocabulary of 1": lambda: d.posterior_probs(P[..., :1], Z, 0.5, 0.4, "uniform"),
    "mask_id=4": lambda: d.posterior_probs(P, Z, 0.5, 0.4, "masked", 4),
    "mask_id=None": lambda: d.posterior_probs(P, Z, 0.5, 0.4, "masked"),
    "kappa=1.5": lambda: d.psi_probs(P, Z, 0.5, 0.4, 1.5, "uniform"),
    "alpha_s=0.3": lambda: d.psi_probs(P, Z, 0.3, 0.4, 0.5, "uniform"),
    "alpha_t=0.0": lambda: d.psi_probs(P, Z, 0.3, 0.0, 0.5, "uniform"),
    "alpha_s=1.1": lambda: d.psi_weights(P[..., 0], 1.1, 0.4, 0.5, 4),
    "prior='gauss'": lambda: d.q_probs(P, LEVEL, "gauss"),
    "K=None": lambda: d.q_sample(jax.random.key(0), Z, LEVEL, "uniform"),
    "K=1 ": lambda: d.q_sample(jax.random.key(0), Z, LEVEL, "uniform", K=1),
    "x0 has shape": lambda: d.uniform_nelbo(P, Z, Z[0], LEVEL),
    "x0 has dtype": lambda: d.uniform_nelbo(P, Z, P[..., 0], LEVEL),
    "logits has dtype": lambda: d.subs(P.astype(int), Z, 0),
    "valid has shape": lambda: d.nelbo_mean(P[..., 0], Z[0]),
    "n=0": lambda: d.sample_times(jax.random.key(0), 0),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_are_named(message):
    with pytest.raises((ValueError, TypeError), match=message):
        WRONG[message]()


def test_numbers_of_arrays_are_checked_where_they_are_known():
    """At once outside jit, lists too; inside only under checkify."""
    p, z = np.full((1, 3), 1 / 3), np.zeros(1, int)
    call = lambda kappa: d.psi_probs(p, z, 0.5, 0.3, kappa, "uniform")  # noqa: E731
    for kappa in (2.0, [2.0], np.array([-1.0]), jnp.float32(2.0)):
        with pytest.raises(ValueError, match="kappa"):
            call(kappa)
    with pytest.raises(ValueError, match="at least alpha_t"):
        d.posterior_probs(p, z, jnp.float32(0.2), jnp.float32(0.3), "uniform")
    traced = jax.jit(call)
    assert np.all(np.isfinite(traced(2.0)))
    checked = checkify.checkify(traced)
    assert checked(0.5)[0].get() is None
    assert "kappa must be in [0, 1]" in checked(2.0)[0].get()
