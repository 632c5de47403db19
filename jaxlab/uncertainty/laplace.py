"""Laplace approximation of the last layer: a Gaussian about its weights, full covariance.

Logits are features @ kernel + bias. The precision is the generalised Gauss-Newton matrix of the softmax
likelihood, sum_n (diag p - p p^T) x phi phi^T, plus that of the prior. Source: Daxberger et al., 2106.14806.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Float, Int, Key

from jaxlab.uncertainty.checks import check_count, check_labels, check_number, check_values, real
from jaxlab.uncertainty.safe import HIGHEST


class LastLayerLaplace(NamedTuple):
    """Posterior over P = K D + K parameters: class 0's D weights, class 1's, ..., then K biases."""

    kernel: Float[Array, "d k"]
    bias: Float[Array, "k"]
    precision: Float[Array, "p p"]
    covariance: Float[Array, "p p"]
    prior_precision: Float[Array, ""]


def laplace_last_layer_fit(
    features: Float[Array, "n d"],
    kernel: Float[Array, "d k"],
    bias: Float[Array, "k"],
    *,
    prior_precision: float = 1.0,
) -> LastLayerLaplace:
    """Posterior about the trained (kernel, bias), from the features of all N training samples.

    `prior_precision` is that of the Gaussian prior of every parameter, bias included. In the widest
    type of the inputs, at least float32. ValueError for shapes that do not fit, features that are not
    finite, and prior_precision <= 0.
    """
    check_number("prior_precision", prior_precision, "finite and above 0", lambda x: 0 < x < np.inf)
    kernel, bias = real("kernel", kernel), real("bias", bias)
    if kernel.ndim != 2 or kernel.shape[1] < 2 or bias.shape != kernel.shape[1:]:
        raise ValueError(
            f"kernel={kernel.shape} and bias={bias.shape} must be [d, k] and [k], k at least 2"
        )
    phi = _augmented(features, kernel.shape[0])
    dtype = jnp.result_type(phi, kernel, bias)
    phi, kernel, bias = (x.astype(dtype) for x in (phi, kernel, bias))
    d, k = kernel.shape
    p = jax.nn.softmax(_logits(phi, kernel, bias), -1)
    likelihood = p[:, :, None] * jnp.eye(k, dtype=dtype) - p[:, :, None] * p[:, None, :]

    def block(weight):
        return jnp.matmul((phi * weight[:, None]).T, phi, precision=HIGHEST)

    # One pair of classes after another: [n, k, k, d] never exists.
    blocks = jax.lax.map(block, likelihood.reshape(-1, k * k).T).reshape(k, k, d + 1, d + 1)
    full = blocks.transpose(0, 2, 1, 3).reshape(k * (d + 1), k * (d + 1))
    order = np.argsort(_places(d, k).ravel())
    full = full[order][:, order]
    tau = jnp.asarray(prior_precision, dtype)
    precision = (full + full.T) / 2 + tau * jnp.eye(full.shape[0], dtype=dtype)
    half = solve_triangular(
        jnp.linalg.cholesky(precision), jnp.eye(k * (d + 1), dtype=dtype), lower=True
    )
    covariance = jnp.matmul(half.T, half, precision=HIGHEST)
    return LastLayerLaplace(kernel, bias, precision, covariance, tau)


def laplace_last_layer_predict(
    post: LastLayerLaplace, features: Float[Array, "m d"]
) -> tuple[Float[Array, "m k"], Float[Array, "m k k"]]:
    """Mean and covariance of the logits of features [M, D]. ValueError for another D than that of fit."""
    d, k = post.kernel.shape
    phi = _augmented(features, d).astype(post.kernel.dtype)
    places = _places(d, k)
    blocks = post.covariance[places[:, None, :, None], places[None, :, None, :]]

    def pair(block):
        return jnp.sum(jnp.matmul(phi, block, precision=HIGHEST) * phi, -1)

    cov = jax.lax.map(pair, blocks.reshape(k * k, d + 1, d + 1))
    return _logits(phi, post.kernel, post.bias), cov.T.reshape(-1, k, k)


def laplace_last_layer_probit(
    post: LastLayerLaplace, features: Float[Array, "m d"]
) -> Float[Array, "m k"]:
    """Probabilities softmax(mean / sqrt(1 + pi / 8 variance)). ValueError as in `..._predict`.

    Source: MacKay, 1992; Daxberger et al., 2106.14806, appendix B.
    """
    mean, cov = laplace_last_layer_predict(post, features)
    variance = jnp.diagonal(cov, axis1=-2, axis2=-1)
    return jax.nn.softmax(mean / jnp.sqrt(1 + jnp.pi / 8 * variance), -1)


def laplace_last_layer_sample(
    post: LastLayerLaplace, features: Float[Array, "m d"], key: Key[Array, ""], num_samples: int
) -> Float[Array, "s m k"]:
    """Probabilities [S, M, K] under S draws of the parameters, each for all M samples.

    ValueError as in `laplace_last_layer_predict`, and for num_samples below 1.
    """
    d, k = post.kernel.shape
    phi = _augmented(features, d).astype(post.kernel.dtype)
    shape = (check_count("num_samples", num_samples, 1), k * (d + 1))
    noise = jax.random.normal(key, shape, post.kernel.dtype)
    root = jnp.linalg.cholesky(post.precision)
    theta = _theta(post) + solve_triangular(root, noise.T, lower=True, trans="T").T
    weights = theta[:, _places(d, k)]
    logits = jnp.einsum("md,skd->smk", phi, weights, precision=HIGHEST)
    return jax.nn.softmax(logits, -1)


def laplace_last_layer_log_marginal(
    post: LastLayerLaplace, features: Float[Array, "n d"], labels: Int[Array, "n"]
) -> Float[Array, ""]:
    """Log marginal likelihood of the training samples, for choosing prior_precision; nats.

    log-likelihood - (logdet precision - P log prior_precision + prior_precision |theta|^2) / 2.
    ValueError as in `laplace_last_layer_predict`, and for labels that do not fit.
    """
    d, k = post.kernel.shape
    phi = _augmented(features, d).astype(post.kernel.dtype)
    labels = check_labels("labels", labels, k, phi.shape[0])
    log_p = jax.nn.log_softmax(_logits(phi, post.kernel, post.bias), -1)
    fit = jnp.sum(jnp.take_along_axis(log_p, labels[:, None], -1))
    root = jnp.diagonal(jnp.linalg.cholesky(post.precision))
    tau, theta = post.prior_precision, _theta(post)
    penalty = 2 * jnp.sum(jnp.log(root / jnp.sqrt(tau))) + tau * jnp.sum(theta**2)
    return fit - penalty / 2


def _augmented(features, d: int) -> jax.Array:
    """Features with a 1 for the bias."""
    features = real("features", features)
    if features.ndim != 2 or features.shape[1] != d:
        raise ValueError(f"features={features.shape} must have the shape [samples, {d}]")
    check_values(jnp.isfinite(features), "features must be finite")
    return jnp.pad(features, ((0, 0), (0, 1)), constant_values=1)


def _logits(phi, kernel, bias) -> jax.Array:
    return jnp.matmul(phi[:, :-1], kernel, precision=HIGHEST) + bias


def _places(d: int, k: int) -> np.ndarray:
    """[k, d + 1]: where the weights of a class, then its bias, are in the order of the parameters."""
    weights = np.arange(k * d).reshape(k, d)
    return np.concatenate([weights, k * d + np.arange(k)[:, None]], 1)


def _theta(post: LastLayerLaplace) -> jax.Array:
    return jnp.concatenate([post.kernel.T.ravel(), post.bias])
