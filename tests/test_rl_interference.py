"""Interference of prompts in jaxlab.rl: identities on enumerated policies, the toys, and protection."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, PartitionSpec
from scipy.stats import norm

from jaxlab import rl
from train.optim import protect_reference

M, ANSWERS, FEATURES = 6, 5, 4


@functools.cache
def softmax_model():
    """A linear softmax policy: (parameters, batch, pass@1 of a prompt as a function, q)."""
    random = np.random.default_rng(0)
    batch = {
        "x": random.standard_normal((M, FEATURES)),
        "right": (random.uniform(size=(M, ANSWERS)) < 0.3).astype(float),
    }
    batch["right"][:, 0] = 1
    params = {
        "b": random.standard_normal(ANSWERS),
        "w": random.standard_normal((FEATURES, ANSWERS)),
    }
    q = random.uniform(0.5, 1.5, M)

    def passed(params, example):
        policy = jax.nn.softmax(example["x"] @ params["w"] + params["b"])
        return jnp.sum(policy * example["right"])

    return params, batch, passed, q / q.sum()


def objective(k):
    params, batch, passed, q = softmax_model()

    def value(params):
        p = jax.vmap(lambda e: passed(params, e))(batch)
        return jnp.sum(q * (1 - (1 - p) ** k))

    return value


def test_the_kernel_gives_the_gradients_of_every_pass_at_k():
    params, batch, passed, q = softmax_model()
    with jax.enable_x64(True):
        p = jax.vmap(lambda e: passed(params, e))(batch)
        G = rl.prompt_gradients(passed, params, batch)
        K = G @ G.T
        g1 = ravel_pytree(jax.grad(objective(1))(params))[0]
        np.testing.assert_allclose(rl.agreement(K, q), G @ g1, rtol=1e-10, atol=1e-14)
        for k in (1, 5):
            gk = ravel_pytree(jax.grad(objective(k))(params))[0]
            report = jax.jit(lambda K, q, p: rl.interference_report(K, q, p, k, k_max=40))(K, q, p)  # noqa: B023
            close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-14)
            close(report["inner_product"], gk @ g1)
            close(rl.passk_inner_product(K, q, p, k), gk @ g1)
            close(report["cosine"], gk @ g1 / jnp.linalg.norm(gk) / jnp.linalg.norm(g1))
            close(report["grad_j1_sq"], g1 @ g1)
            w = k * (1 - p) ** (k - 1)
            close(report["mean_weight"], q @ w)
            close(report["cov"], q @ (w * (G @ g1)) - (q @ w) * (g1 @ g1))
            close(report["inner_product"], report["mean_weight"] * g1 @ g1 + report["cov"])
            close(report["negative_fraction"], q @ (G @ g1 < 0))
            close(report["weight_decades"], np.log10(w.max() / w.min()) if k > 1 else 0)
            assert all(x.shape == () for x in report.values())


def two_clusters(seed):
    """K, q, p of easy prompts and hard ones that go against them."""
    random = np.random.default_rng(seed)
    hard = np.arange(20) < 6
    along = np.where(hard, -0.5, 1.0)[:, None]
    G = along * np.array([1.0, 0, 0, 0]) + 0.1 * random.standard_normal((20, 4))
    return G @ G.T, np.full(20, 1 / 20), np.where(hard, 0.1, 0.7) + 0.1 * random.uniform(size=20)


@pytest.mark.parametrize("seed", range(3))
def test_critical_k_is_where_a_scan_finds_it_and_within_the_bound(seed):
    K, q, p = two_clusters(seed)
    a = K @ q
    products = [(q * k * (1 - p) ** (k - 1)) @ a for k in range(1, 61)]
    first = next(k for k, x in enumerate(products, 1) if x < 0)
    got = rl.critical_k(K, q, p, 60)
    assert got == first > 1 and got.dtype == jnp.int32
    assert rl.critical_k(K, q, p, first - 1) == first
    against = a < 0
    mass, alpha = q[against].sum(), -a[against].max()
    low, high = p[against].max(), p[~against].min()
    odds = np.log((1 - mass) * a[~against].max() / (mass * alpha))
    assert first <= 1 + max(odds, 0) / np.log((1 - low) / (1 - high)) + 1


def test_critical_k_and_cosine_survive_weights_below_floats():
    K, q, p = two_clusters(0)
    with jax.enable_x64(True):
        expected = rl.passk_cosine(K, q, p, 200)
    np.testing.assert_allclose(rl.passk_cosine(K, q, p, 200), expected, rtol=1e-5)
    # All prompts are nearly solved: every weight of k = 64 is 0 in float32.
    p = 1 - (1 - p) * 1e-3
    assert rl.passk_weight(p, 64).max() == 0 and rl.passk_cosine(K, q, p, 64) < 0
    assert 1 < rl.critical_k(K, q, p, 64) < 65
    solved = np.ones(20)
    assert rl.critical_k(K, q, solved, 9) == 10 and rl.passk_cosine(K, q, solved, 4) == 0


def gaussian_toy():
    """The toy of section 6.1 with its normal draws at their quantiles: psi, hard, theta."""
    place = lambda n: norm.ppf((np.arange(n) + 0.5) / n)  # noqa: E731
    s = np.concatenate([0.5 + 0.5 * place(1400), -0.5 + 0.5 * place(600)])
    return np.stack([np.ones(2000), s], 1), np.arange(2000) >= 1400, np.array([2.0, 0.5])


def toy_pass(theta, example):
    psi, hard = example
    return jax.nn.sigmoid(jnp.where(hard, -1, 1) * psi @ theta)


TOY = {1: 1, 2: 0.163, 3: 0.021, 4: -0.006, 8: -0.067, 16: -0.183, 32: -0.402, 64: -0.698}
DECADES = {2: 1.3, 3: 2.7, 4: 4, 8: 9.3, 16: 20, 32: 41.5, 64: 84.3}


def test_the_gaussian_toy_is_that_of_the_note():
    """Its draw is not ours, hence tolerances of a few standard errors; exact against float64 here."""
    psi, hard, theta = gaussian_toy()
    q = np.full(2000, 1 / 2000, np.float32)
    batch = (jnp.float32(psi), jnp.asarray(hard))
    p = jax.vmap(lambda e: toy_pass(jnp.float32(theta), e))(batch)
    G = rl.prompt_gradients(toy_pass, jnp.float32(theta), batch, chunk=600)
    K = G @ G.T
    z = psi @ theta
    exact_p = 1 / (1 + np.exp(np.where(hard, z, -z)))
    exact_G = psi * (exact_p * (1 - exact_p) * np.where(hard, -1, 1))[:, None]
    np.testing.assert_allclose(p[~hard].mean(), 0.9026, atol=2e-3)
    np.testing.assert_allclose(p[hard].mean(), 0.1491, atol=3e-3)
    np.testing.assert_allclose(p.mean(), 0.6765, atol=2e-3)
    g1 = exact_G.mean(0)
    for k, printed in TOY.items():
        gk = (exact_G * (k * (1 - exact_p) ** (k - 1))[:, None]).mean(0)
        exact = gk @ g1 / np.linalg.norm(gk) / np.linalg.norm(g1)
        report = rl.interference_report(K, q, p, k, k_max=16)
        np.testing.assert_allclose(report["cosine"], exact, atol=2e-5)
        np.testing.assert_allclose(report["cosine"], printed, atol=0.09)
        np.testing.assert_allclose(report["weight_decades"], DECADES.get(k, 0), atol=0.05 * k)
    np.testing.assert_allclose(report["grad_j1_sq"], 2.636e-3, rtol=0.05)
    np.testing.assert_allclose(report["negative_fraction"], 0.174, atol=0.02)
    # The note's draw, whose cosine at 4 is -0.006, has 4.
    a = exact_G @ g1
    products = [np.mean((1 - exact_p) ** (k - 1) * a) for k in range(1, 17)]
    assert report["critical_k"] == next(k for k, x in enumerate(products, 1) if x < 0)


@functools.partial(jax.jit, static_argnames=("k", "protected"))
def climb(theta, batch, k, protected):
    """300 steps of gradient ascent on J_k of the toy, at rate 0.5: (J_1, J_8)."""
    mean = lambda theta, k: jnp.mean(  # noqa: E731
        1 - (1 - jax.vmap(lambda e: toy_pass(theta, e))(batch)) ** k
    )

    def step(theta, _):
        g = jax.grad(mean)(theta, k)
        if protected:
            g = rl.gradient_surgery(g, jax.grad(mean)(theta, 1))
        return theta + 0.5 * g, None

    theta, _ = jax.lax.scan(step, theta, length=300)
    return mean(theta, 1), mean(theta, 8)


def test_climbing_pass_at_8_lowers_pass_at_1_unless_protected():
    psi, hard, theta = gaussian_toy()
    batch, start = (jnp.float32(psi), jnp.asarray(hard)), jnp.float32(theta)
    for k, protected, one, eight in (
        (1, False, 0.812, 0.961), (8, False, 0.595, 0.998), (8, True, 0.6765, 0.995),
    ):  # fmt: skip
        got = climb(start, batch, k, protected)
        np.testing.assert_allclose(
            got, (one, eight), atol=0.01
        )  # standard errors of that draw: 0.003


def test_one_step_within_the_bound_raises_j_k_and_lowers_j_1():
    with jax.enable_x64(True):
        psi, hard, theta = gaussian_toy()
        batch, k = (psi, hard), 16
        mean = lambda theta, k: jnp.mean(  # noqa: E731
            1 - (1 - jax.vmap(lambda e: toy_pass(theta, e))(batch)) ** k
        )
        g1, gk = jax.grad(mean)(theta, 1), jax.grad(mean)(theta, k)
        conflict = -g1 @ gk
        assert conflict > 0
        squares = np.sum(psi**2, 1)
        smooth1 = np.mean(squares) / (6 * np.sqrt(3))
        smooth_k = np.mean(k * squares / (6 * np.sqrt(3)) + k * (k - 1) * squares / 16)
        rate = min(1 / smooth_k, conflict / (smooth1 * gk @ gk))
        moved = theta + rate * gk
        assert mean(moved, k) > mean(theta, k) and mean(moved, 1) < mean(theta, 1)


ALIASED = {
    2: (0.7000, 0.5800, 0.7900), 4: (0.5701, 0.5281, 0.9444),
    8: (0.5302, 0.5121, 0.9965), 16: (0.5141, 0.5056, 1.0000),
}  # fmt: skip


@pytest.mark.parametrize("k", ALIASED)
def test_aliased_prompts_have_the_printed_optimum(k):
    """Prompts that look alike and want other answers: where grad J_k is 0, and what J_1 and J_k are."""
    with jax.enable_x64(True):
        q, odds = np.array([0.7, 0.3]), (0.7 / 0.3) ** (1 / (k - 1))
        logit = jnp.log(odds)
        passed = lambda logit, sign: jax.nn.sigmoid(sign * logit)  # noqa: E731
        signs = np.array([1.0, -1.0])
        p = jax.vmap(lambda s: passed(logit, s))(signs)
        G = rl.prompt_gradients(passed, logit, signs)
        np.testing.assert_allclose(q * rl.passk_weight(p, k) @ G, 0, atol=1e-14)
        values = p[0], q @ p, q @ (1 - (1 - p) ** k)
        np.testing.assert_allclose(values, ALIASED[k], atol=5.1e-5)
        np.testing.assert_allclose(rl.passk_inner_product(G @ G.T, q, p, k), 0, atol=1e-14)


def test_prompt_gradients_are_the_rows_of_the_jacobian_in_any_chunk():
    params, batch, passed, _ = softmax_model()
    to32 = lambda tree: jax.tree.map(jnp.float32, tree)  # noqa: E731
    params, batch = to32(params), to32(batch)
    flat, back = ravel_pytree(params)
    jacobian = jax.jacobian(lambda x: jax.vmap(lambda e: passed(back(x), e))(batch))(flat)
    for chunk in (None, 4):
        got = jax.jit(lambda p, b: rl.prompt_gradients(passed, p, b, chunk=chunk))(params, batch)  # noqa: B023
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, jacobian, rtol=1e-5, atol=1e-7)


def test_a_sketch_keeps_inner_products_on_average():
    params, batch, passed, _ = softmax_model()
    G = rl.prompt_gradients(passed, params, batch)
    exact, width = G @ G.T, 16
    run = jax.jit(
        jax.vmap(lambda k: rl.prompt_gradients(passed, params, batch, sketch=width, key=k, chunk=4))
    )
    rows = run(jax.random.split(jax.random.key(0), 400))
    assert rows.shape == (400, M, width)
    products = jnp.einsum("rmd,rnd->rmn", rows, rows)
    norms = jnp.diag(exact)
    bound = 2 * norms[:, None] * norms / width
    error = jnp.mean((products - exact) ** 2, 0)
    assert np.all(error <= 1.3 * bound)
    assert np.all(np.abs(products.mean(0) - exact) <= 5 * jnp.sqrt(bound / 400))


def test_cross_fitting_is_unbiased_where_the_same_samples_are_not():
    """Two halves of noisy gradients; the product of one half with itself adds the covariance."""
    random = np.random.default_rng(0)
    g_k, g_1 = np.array([1.0, -0.5, 0.2]), np.array([-0.4, 0.3, 0.5])
    noise = random.standard_normal((4000, 2, 3))  # the same noise in g_k and g_1 of a half
    halves = lambda i: ({"w": g_k + noise[:, i]}, {"w": g_1 + noise[:, i]})  # noqa: E731
    values = jax.vmap(rl.crossfit_inner_product)(halves(0), halves(1))
    error = np.std(values) / np.sqrt(4000)
    exact = g_k @ g_1
    assert abs(np.mean(values) - exact) < 3 * error
    same = jax.vmap(rl.crossfit_inner_product)(halves(0), halves(0))
    np.testing.assert_allclose(np.mean(same), exact + 3, rtol=0.05)


def trees(dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    make = lambda sign: {  # noqa: E731
        "w": jnp.asarray(random.standard_normal((3, 4)), dtype),
        "b": (jnp.asarray(sign * random.uniform(1, 2, 5), dtype),),
    }
    return make(1), make(-1)


@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
def test_surgery_takes_out_exactly_what_conflicts(dtype):
    g, ref = trees(dtype)
    inner = lambda a, b: float(  # noqa: E731
        np.asarray(ravel_pytree(a)[0], np.float64) @ np.asarray(ravel_pytree(b)[0], np.float64)
    )
    assert inner(g, ref) < 0
    cut = jax.jit(rl.gradient_surgery)(g, ref)
    assert jax.tree.structure(cut) == jax.tree.structure(g)
    assert all(x.dtype == dtype for x in jax.tree.leaves(cut))
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    assert inner(cut, ref) >= -tolerance * inner(ref, ref)
    again = rl.gradient_surgery(cut, ref)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), again, cut)
    expected = inner(g, g) - inner(g, ref) ** 2 / inner(ref, ref)
    np.testing.assert_allclose(inner(cut, g), expected, rtol=max(1e-5, tolerance))
    agreeing = jax.tree.map(lambda x: -x, ref)
    jax.tree.map(np.testing.assert_array_equal, rl.gradient_surgery(g, agreeing), g)
    zero = jax.tree.map(jnp.zeros_like, g)
    jax.tree.map(np.testing.assert_array_equal, rl.gradient_surgery(g, zero, 0.0), g)


def test_the_largest_safe_mixing_is_orthogonal():
    g, ref = trees()
    best = rl.safe_mixing(g, ref)
    mixed = jax.tree.map(lambda a, b: best * a + (1 - best) * b, g, ref)
    product = rl.crossfit_inner_product((mixed, mixed), (ref, ref))
    assert 0 < best < 1 and abs(product) < 1e-5
    assert rl.safe_mixing(ref, ref) == 1


@pytest.mark.parametrize("mode", ("update", "gradient"))
def test_a_protected_optimiser_does_not_step_against_the_reference(mode):
    """Steps are taken by Adam, whose scales turn a projected gradient back: only "update" holds."""
    scales = {"a": jnp.array([1.0, 30.0, 0.1]), "b": jnp.float32(2.0)}
    random = np.random.default_rng(0)
    plain, guarded = optax.adam(0.1), protect_reference(optax.adam(0.1), mode)
    state, free = guarded.init(scales), plain.init(scales)
    step = jax.jit(lambda g, s, r: guarded.update(g, s, scales, reference_grads=r))
    products, unprotected = [], []
    for _ in range(20):
        noise = lambda s: s * jnp.float32(random.standard_normal(jnp.shape(s)))  # noqa: E731
        grads = jax.tree.map(noise, scales)
        # Descending on the gradients lowers the reference.
        reference = jax.tree.map(lambda g, s: g + noise(s), grads, scales)  # noqa: B023
        updates, state = step(grads, state, reference)
        raw, free = plain.update(grads, free, scales)
        product = lambda u: float(rl.crossfit_inner_product((u, u), (reference, reference)))  # noqa: B023, E731
        size = max(product(u) for u in (reference, reference))
        products.append(product(updates) / size)
        unprotected.append(product(raw) / size)
    assert min(unprotected) < -1e-4
    if mode == "update":
        assert min(products) >= -1e-6
    else:
        assert min(products) < -1e-4


def test_a_protected_gradient_reaches_a_plain_optimiser_unconflicting():
    grads, reference = trees(seed=1)
    reference = jax.tree.map(lambda x: -x, reference)  # descending lowers the reference
    tx = protect_reference(optax.sgd(1.0), "gradient")
    updates, _ = tx.update(grads, tx.init(grads), reference_grads=reference)
    assert rl.crossfit_inner_product((updates, updates), (reference, reference)) >= -1e-5
    both = protect_reference(optax.sgd(1.0))
    other, _ = both.update(grads, both.init(grads), reference_grads=reference)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), updates, other)
    with pytest.raises(ValueError, match="mode"):
        protect_reference(optax.sgd(1.0), "loss")


def test_prompts_and_samples_split_over_devices_are_those_of_one():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    put = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    g = np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32)
    run = jax.jit(lambda g: rl.pkpo_weights(g, 4))
    np.testing.assert_allclose(run(put(g, None, "data")), run(g), atol=1e-6)
    K, q, p = (x.astype(np.float32) for x in two_clusters(0))
    report = jax.jit(lambda *args: rl.interference_report(*args, 4, k_max=32))
    size = slice(0, 16)
    args = K[size, size], np.full(16, 1 / 16, np.float32), p[size]
    one, eight = report(*args), report(*(put(x, "data") for x in args))
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)


K3, Q3, P3 = np.eye(3), np.full(3, 1 / 3), np.full(3, 0.5)


@pytest.mark.parametrize(
    "call, name",
    [
        (lambda: rl.agreement(K3[:2], Q3), "K"),
        (lambda: rl.agreement(K3, Q3[:2]), "q"),
        (lambda: rl.agreement(K3, np.zeros(3)), "q must"),
        (lambda: rl.agreement(K3, 2 * Q3), "q must"),
        (lambda: rl.agreement(K3, np.array([1.5, -0.5, 0])), "q must"),
        (lambda: rl.passk_inner_product(K3, Q3, P3, 0), "k="),
        (lambda: rl.passk_inner_product(K3, Q3, P3[:2], 2), "p has"),
        (lambda: rl.passk_cosine(K3, Q3, P3 + 1, 2), "p must"),
        (lambda: rl.critical_k(K3, Q3, P3, 0), "k_max"),
        (lambda: rl.interference_report(K3, Q3, P3, 2.0), "k="),
        (lambda: rl.gradient_surgery({"a": K3}, {"b": K3}), "g and g_ref"),
        (lambda: rl.gradient_surgery({"a": K3}, {"a": Q3}), "g and g_ref"),
        (lambda: rl.gradient_surgery(K3, K3, -1.0), "eps"),
        (lambda: rl.crossfit_inner_product((K3, K3), (K3, Q3)), "g_a and g_b"),
        (lambda: rl.safe_mixing(K3, Q3), "g_k and g_1"),
        (lambda: rl.prompt_gradients(lambda p, e: p @ e, Q3, K3, sketch=4), "key"),
        (lambda: rl.prompt_gradients(lambda p, e: p @ e, Q3, K3, chunk=0), "chunk"),
        (lambda: rl.prompt_gradients(lambda p, e: p @ e, Q3, K3, sketch=0), "sketch"),
        (lambda: rl.prompt_gradients(lambda p, e: p @ e[0], Q3, (K3, K3[:2])), "batch"),
    ],
)
def test_wrong_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
