"""Whether training on pass@k works against pass@1: prompts that interfere, and protection of a gradient.

M prompts with probabilities q, pass@1 p and K[x, y] = <grad p(x), grad p(y)>, the kernel; J_k is the
mean pass@k, whose gradient weighs grad p(x) by w = k (1 - p)^(k - 1). ValueError for k below 1, shapes,
and q, p that are no probabilities (where known).
Source: note on pass@k interference (arXiv 2602.21189), sections 2 to 4.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, Key, Num, PyTree

from jaxlab.arguments import check_count, check_shape, wide
from jaxlab.rl.arguments import check_axes, check_number, demand
from jaxlab.rl.passk import log_passk_weight

# Rows of a sketch's random matrix that exist at a time.
BLOCK = 4096


def _kernel(K, q):
    check_axes("K", K, "M M")
    m = jnp.shape(K)[0]
    check_shape("K", K, (m, m))
    check_shape("q", q, (m,))
    whole = lambda xp, q: (q >= 0) & (xp.abs(xp.sum(q) - 1) <= 1e-4)  # noqa: E731
    demand(whole, "q must be probabilities that sum to 1", q)
    return jax.lax.stop_gradient(wide(K)), jax.lax.stop_gradient(wide(q))


def _product(K, x):
    return jnp.matmul(K, x, precision=jax.lax.Precision.HIGHEST)


def agreement(K: Float[Array, "M M"], q: Float[Array, "M"]) -> Float[Array, "M"]:
    """a = K q, diagonal included: <grad p(x), grad J_1>; a prompt with a < 0 works against the others."""
    return _product(*_kernel(K, q))


def passk_inner_product(
    K: Float[Array, "M M"], q: Float[Array, "M"], p: Num[Array, "M"], k: int
) -> Float[Array, ""]:
    """<grad J_k, grad J_1> = (q w)^T K q."""
    check_shape("p", p, jnp.shape(q))
    return jnp.sum(wide(q) * jnp.exp(log_passk_weight(p, k)) * agreement(K, q))


def _relative_weights(p, k):
    """passk_weight divided by its largest value, which may be too small for a float."""
    logs = log_passk_weight(p, k)
    top = jnp.max(logs)
    return jnp.exp(logs - jnp.where(top > -jnp.inf, top, 0))


def passk_cosine(
    K: Float[Array, "M M"], q: Float[Array, "M"], p: Num[Array, "M"], k: int
) -> Float[Array, ""]:
    """Cosine of grad J_k and grad J_1; 0 if one of them is 0. It does not underflow with the weights."""
    check_shape("p", p, jnp.shape(q))
    K, q = _kernel(K, q)
    u = q * _relative_weights(p, k)
    a = _product(K, q)
    squares = jnp.sum(u * _product(K, u)) * jnp.sum(q * a)
    return jnp.where(squares > 0, jnp.sum(u * a) / jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def critical_k(
    K: Float[Array, "M M"], q: Float[Array, "M"], p: Num[Array, "M"], k_max: int
) -> Int[Array, ""]:
    """Smallest k in 1..k_max at which grad J_k goes against grad J_1; k_max + 1 if none does."""
    check_shape("p", p, jnp.shape(q))
    k_max = check_count("k_max", k_max, 1)
    flow = wide(q) * agreement(K, q)
    log_miss = log_passk_weight(p, 2) - np.log(2)
    top = jnp.max(log_miss)
    steps = log_miss - jnp.where(top > -jnp.inf, top, 0)
    # From the largest weight down, the sign of the sum does not underflow; 0 times -inf is 0.
    conflict = lambda j: jnp.sum(flow * jnp.exp(jnp.where(j > 0, j * steps, 0))) < 0  # noqa: E731
    found = jax.lax.map(conflict, jnp.arange(k_max, dtype=flow.dtype))
    return jnp.where(jnp.any(found), jnp.argmax(found) + 1, k_max + 1).astype(jnp.int32)


def interference_report(
    K: Float[Array, "M M"], q: Float[Array, "M"], p: Num[Array, "M"], k: int, *, k_max: int = 256
) -> dict[str, Float[Array, ""]]:
    """Scalars: mean_weight E[w], cov Cov(w, a), inner_product, cosine, grad_j1_sq |grad J_1|^2,
    negative_fraction (mass of a < 0), weight_decades log10(max w / min w), critical_k.

    Expectations under q; inner_product = mean_weight grad_j1_sq + cov.
    """
    logs, a, q = log_passk_weight(p, k), agreement(K, q), wide(q)
    w = jnp.exp(logs)
    mean = jnp.sum(q * w)
    square = jnp.sum(q * a)
    return {
        "mean_weight": mean,
        "cov": jnp.sum(q * (w - mean) * (a - square)),
        "inner_product": passk_inner_product(K, q, p, k),
        "cosine": passk_cosine(K, q, p, k),
        "grad_j1_sq": square,
        "negative_fraction": jnp.sum(jnp.where(a < 0, q, 0)),
        "weight_decades": (jnp.max(logs) - jnp.min(logs)) / np.log(10),
        "critical_k": critical_k(K, q, p, k_max),
    }


def prompt_gradients(
    fn: Callable[[Any, Any], Float[Array, ""]],
    params: PyTree,
    batch: PyTree,
    *,
    sketch: int | None = None,
    key: Key[Array, ""] | None = None,
    chunk: int | None = None,
) -> Float[Array, "M P"]:
    """Row m is the gradient of fn(params, example m), flat as `jax.flatten_util.ravel_pytree` has it.

    `batch` is a pytree whose leaves have a leading axis M. `sketch` d makes rows [d]: the product with a
    matrix of random +-1/sqrt(d) from `key`, the same for all prompts, which keeps inner products on
    average. `chunk` prompts are differentiated at a time (any number). float32, float64 for float64.
    ValueError for a sketch without key, numbers below 1, and leading axes that differ.
    """
    sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(batch)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(f"batch has leading axes {sorted(sizes)}; all must have the same axis M")
    if chunk is not None:
        check_count("chunk", chunk, 1)
    if sketch is not None:
        check_count("sketch", sketch, 1)
        if key is None:
            raise ValueError(f"key=None must be a PRNG key for sketch={sketch}")

    def row(example):
        flat = wide(ravel_pytree(jax.grad(fn)(params, example))[0])
        return flat if sketch is None else _sketched(flat, sketch, key)

    return jax.vmap(row)(batch) if chunk is None else jax.lax.map(row, batch, batch_size=chunk)


def _sketched(x, width, key):
    """x [P] times a [P, width] matrix of random signs / sqrt(width), made block by block."""
    blocks = -(-x.size // BLOCK)
    parts = jnp.pad(x, (0, blocks * BLOCK - x.size)).reshape(blocks, BLOCK)

    def add(total, part):
        i, values = part
        signs = jax.random.rademacher(jax.random.fold_in(key, i), (BLOCK, width), x.dtype)
        return total + jnp.matmul(values, signs, precision=jax.lax.Precision.HIGHEST), None

    total, _ = jax.lax.scan(add, jnp.zeros(width, x.dtype), (jnp.arange(blocks), parts))
    return total / np.sqrt(width)


def _inner(a: PyTree, b: PyTree, names: str) -> Float[Array, ""]:
    """Inner product of two trees of the same form, in float32 (float64 for float64 leaves)."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        raise ValueError(
            f"{names} must be trees of one structure: {jax.tree.structure(a)} and {jax.tree.structure(b)}"
        )
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    for x, y in pairs:
        check_shape(f"a leaf of {names}", y, jnp.shape(x))
    return sum((jnp.sum(wide(x) * wide(y)) for x, y in pairs), start=jnp.zeros(()))


def crossfit_inner_product(
    g_a: tuple[PyTree, PyTree], g_b: tuple[PyTree, PyTree]
) -> Float[Array, ""]:
    """(<g_k^A, g_1^B> + <g_k^B, g_1^A>) / 2 of g_a = (g_k, g_1) and g_b from two halves of the samples.

    Unbiased; the product of gradients of the same samples is too large by the trace of their covariance.
    """
    (k_a, one_a), (k_b, one_b) = g_a, g_b
    return (_inner(k_a, one_b, "g_a and g_b") + _inner(k_b, one_a, "g_a and g_b")) / 2


def gradient_surgery(g: PyTree, g_ref: PyTree, eps: float = 1e-12) -> PyTree:
    """g - min(0, <g, g_ref>) / (|g_ref|^2 + eps) g_ref: no longer against g_ref, else as it was.

    Inner products over the whole tree, in float32; leaves keep their type. ValueError for trees of
    different form. Source: the note, section 3.4.
    """
    check_number("eps", eps, 0)
    against = jnp.minimum(_inner(g, g_ref, "g and g_ref"), 0)
    square = _inner(g_ref, g_ref, "g_ref and g_ref") + eps
    factor = against / jnp.where(square > 0, square, 1)
    # Kept bit by bit where there is no conflict, infinite references included.
    cut = lambda x, y: jnp.where(  # noqa: E731
        factor < 0, (wide(x) - factor * wide(y)).astype(jnp.result_type(x)), x
    )
    return jax.tree.map(cut, g, g_ref)


def safe_mixing(g_k: PyTree, g_1: PyTree) -> Float[Array, ""]:
    """Largest lambda in (0, 1] with lambda g_k + (1 - lambda) g_1 not against g_1."""
    product = _inner(g_k, g_1, "g_k and g_1")
    square = _inner(g_1, g_1, "g_1 and g_1")
    return jnp.where(product < 0, square / jnp.where(product < 0, square - product, 1), 1)
