"""Where samples come from: dropout, ensembles, last-layer Laplace, low-rank variational posteriors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from jaxlab import uncertainty as un

D, K, N, TAU = 3, 4, 30, 0.7
P = K * D + K


def close(got, expected, tolerance=1e-10):
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, tolerance, tolerance)


def layer(seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(N, D)), random.normal(size=(D, K)), random.normal(size=K)


def logits_of(theta, features):
    """The order of the parameters: class 0's weights, class 1's, ..., biases."""
    return features @ theta[: K * D].reshape(K, D).T + theta[K * D :]


def jacobian(phi):
    """[K, P]: row by row, from the definition of the logits."""
    return np.stack([logits_of(e, phi[None])[0] for e in np.eye(P)], 1)


def laplace_oracle(features, kernel, bias, tau):
    theta = np.concatenate([kernel.T.ravel(), bias])
    precision = tau * np.eye(P)
    for phi in features:
        p = softmax(logits_of(theta, phi[None])[0])
        j = jacobian(phi)
        precision += j.T @ (np.diag(p) - np.outer(p, p)) @ j
    return theta, precision


fit = jax.jit(un.laplace_last_layer_fit)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 2e-4), ("float64", 1e-10)])
def test_laplace_is_its_definition(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        features, kernel, bias = (x.astype(dtype) for x in layer())
        theta, precision = laplace_oracle(*layer(), TAU)
        covariance = np.linalg.inv(precision)
        post = fit(features, kernel, bias, prior_precision=TAU)
        assert {str(x.dtype) for x in post} == {dtype}
        close(post.precision, precision, tolerance)
        close(post.covariance, covariance, tolerance)
        np.testing.assert_array_equal(post.precision, post.precision.T)
        assert np.linalg.eigvalsh(np.asarray(post.covariance, np.float64)).min() > 0

        new = np.random.default_rng(1).normal(size=(5, D)).astype(dtype)
        mean, cov = jax.jit(un.laplace_last_layer_predict)(post, new)
        want_cov = np.stack([jacobian(x) @ covariance @ jacobian(x).T for x in new])
        close(mean, logits_of(theta, new), tolerance)
        close(cov, want_cov, tolerance)
        spread = np.sqrt(1 + np.pi / 8 * np.diagonal(want_cov, axis1=1, axis2=2))
        close(
            un.laplace_last_layer_probit(post, new),
            softmax(logits_of(theta, new) / spread, -1),
            tolerance,
        )

        labels = np.random.default_rng(2).integers(0, K, N)
        likelihood = log_softmax(logits_of(theta, features), -1)[np.arange(N), labels].sum()
        logdet = np.linalg.slogdet(precision)[1]
        want = likelihood - (logdet - P * np.log(TAU) + TAU * theta @ theta) / 2
        close(un.laplace_last_layer_log_marginal(post, features, labels), want, tolerance)


def test_precision_is_the_hessian_of_the_loss():
    """At any labels: the Gauss-Newton matrix of a linear layer is exact."""
    with jax.enable_x64(True):
        features, kernel, bias = layer()
        labels = np.random.default_rng(2).integers(0, K, N)

        def loss(theta):
            log_p = jax.nn.log_softmax(logits_of(theta, jnp.asarray(features)), -1)
            return -log_p[jnp.arange(N), labels].sum() + TAU / 2 * theta @ theta

        theta = jnp.asarray(np.concatenate([kernel.T.ravel(), bias]))
        close(fit(*layer(), prior_precision=TAU).precision, np.asarray(jax.hessian(loss)(theta)))


def test_samples_have_the_moments_of_the_posterior():
    """Draws of parameters, not of logits: one draw serves all inputs."""
    with jax.enable_x64(True):
        post = fit(*layer(), prior_precision=50.0)
        new = np.random.default_rng(1).normal(size=(6, D))
        s = 20000
        draw = jax.jit(un.laplace_last_layer_sample, static_argnums=3)
        p = np.asarray(draw(post, new, jax.random.key(0), s))
        assert p.shape == (s, 6, K)
        close(p.sum(-1), 1)
        mean, cov = un.laplace_last_layer_predict(post, new)
        contrast = np.log(p) - np.log(p[..., :1])  # logits but for a constant
        against = np.eye(K) - np.eye(K)[0]
        want = np.einsum("ic,mcd,jd->mij", against, cov, against)
        found = np.stack([np.cov(contrast[:, m].T) for m in range(6)])
        np.testing.assert_allclose(found, want, 0, 5 * want.max() / np.sqrt(s / 2))
        error = 5 * np.sqrt(np.diagonal(want, axis1=1, axis2=2) / s)
        shift = np.abs(contrast.mean(0) - np.asarray(mean @ against.T))
        assert np.all(shift <= error + 1e-12)
        # 6 inputs, 4 features with the bias: the logits of a draw lie in a space of 4 dimensions.
        assert (
            np.linalg.matrix_rank(contrast[:50, :, 1] - contrast[:50, :, 1].mean(0), 1e-8) == D + 1
        )


def test_a_strong_prior_leaves_the_trained_layer_alone():
    with jax.enable_x64(True):
        features, kernel, bias = layer()
        plain = softmax(features @ kernel + bias, -1)
        previous = np.inf
        for tau in (1.0, 1e3, 1e8):
            post = fit(features, kernel, bias, prior_precision=tau)
            p = un.laplace_last_layer_sample(post, features, jax.random.key(0), 30)
            c = float(un.contributions(p).sum(-1).max())
            assert c < previous / 10
            previous = c
        close(p.mean(0), plain, 1e-3)
        close(un.laplace_last_layer_probit(post, features), plain, 1e-7)
        # The evidence can be differentiated in the strength of the prior.
        labels = plain.argmax(-1)

        def evidence(tau):
            post = un.laplace_last_layer_fit(features, kernel, bias, prior_precision=tau)
            return un.laplace_last_layer_log_marginal(post, features, labels)

        h = 1e-5
        slope = (evidence(TAU + h) - evidence(TAU - h)) / (2 * h)
        close(jax.jit(jax.grad(evidence))(TAU), float(slope), 1e-6)


def dropout_net(params, x, key):
    w1, w2 = params
    h = jax.nn.relu(x @ w1)
    keep = jax.random.bernoulli(key, 0.7, h.shape)
    return jnp.where(keep, h / 0.7, 0) @ w2


def test_mc_predict_and_ensembles_are_loops():
    random = np.random.default_rng(0)
    stacked = [jnp.asarray(random.normal(size=s), jnp.float32) for s in ((5, 3, 16), (5, 16, 4))]
    x = jnp.asarray(random.normal(size=(7, 3)), jnp.float32)
    params = [w[0] for w in stacked]
    keys = jax.random.split(jax.random.key(0), 6)
    found = jax.jit(lambda keys: un.mc_predict(dropout_net, params, x, keys))(keys)
    assert found.shape == (6, 7, 4) and len(np.unique(found[:, 0, 0])) == 6
    for p, key in zip(found, keys, strict=True):
        close(p, softmax(np.asarray(dropout_net(params, x, key)), -1), 1e-6)
    close(un.mc_predict(dropout_net, params, x, jax.random.key_data(keys)), np.asarray(found), 1e-6)
    by_four = jax.jit(lambda keys: un.mc_predict(dropout_net, params, x, keys, chunk=4))(keys)
    close(by_four, np.asarray(found), 1e-6)

    def net(params, x):
        return (jax.nn.relu(x @ params[0]) @ params[1]).astype(jnp.bfloat16)

    found = un.ensemble_predict(net, stacked, x)
    assert found.shape == (5, 7, 4) and found.dtype == jnp.float32
    for i, p in enumerate(found):
        close(p, softmax(np.asarray(net([w[i] for w in stacked], x), np.float32), -1), 1e-2)


def test_low_rank_posterior():
    post = un.lowrank_vi_init(jax.random.key(0), 200, 30, 7, std=0.1)
    assert [x.shape for x in post] == [(200, 7), (200, 7), (30, 7), (30, 7)]
    # Weights of variance 2 / d_in; deviations as asked for.
    w = np.asarray(post.a_mean @ post.b_mean.T)
    assert 0.5 < w.var() / (2 / 200) < 2
    close(jax.nn.softplus(post.a_rho), 0.1, 1e-6)
    kl = 0.0
    for mean, rho in (post[:2], post[2:]):
        mean, std = np.asarray(mean, np.float64), np.log1p(np.exp(np.asarray(rho, np.float64)))
        kl += np.sum(np.log(2 / std) + (std**2 + mean**2) / (2 * 2**2) - 0.5)
    np.testing.assert_allclose(un.lowrank_vi_kl(post, prior_std=2.0), kl, 1e-5)
    # Draws of independent factors: E W = A B^T, Var W = sum of a^2 t^2 + s^2 b^2 + s^2 t^2.
    small = un.LowRankPosterior(*(x[:4, :] for x in post))
    draws = jax.jit(jax.vmap(lambda key: un.lowrank_vi_sample(key, small)))(
        jax.random.split(jax.random.key(1), 20000)
    )
    a, b, s2 = np.asarray(small.a_mean), np.asarray(small.b_mean), 0.01
    variance = s2 * (np.sum(a**2, 1)[:, None] + np.sum(b**2, 1) + 7 * s2)
    error = np.asarray(draws).mean(0) - a @ b.T
    assert np.all(np.abs(error) < 5 * np.sqrt(variance / 20000))
    np.testing.assert_allclose(np.asarray(draws).var(0), variance, 0.08)
    grad = jax.grad(lambda p: un.lowrank_vi_sample(jax.random.key(2), p).sum())(post)
    assert all(bool(jnp.any(g != 0)) for g in grad)
