"""Lower-triangular matrices of a chunk, built by doubling: blocks of 1, 2, 4... tokens join in pairs.

A joined block [[left, 0], [low, right]] needs only `low`: the way from a token on the left to the
seam, then from the seam to a token on the right. No cumulative sum is ever subtracted or divided
by, so decay 0 (log -inf) and momentum 0 are exact and have finite gradients, at O(l^2) work.
Source: note on TTT as linear attention, sections 5.3, 6 and 7.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Blocks up to this size are inverted by masked products of whole matrices, larger ones by halves:
# a product of many tiny matrices costs more than it saves.
SMALL_BLOCK = 16


def _up(length: int) -> int:
    """The power of two at or above `length`."""
    return 1 << max(length - 1, 0).bit_length()


def _pad(x: jax.Array, axis: int, value: float = 0.0) -> jax.Array:
    """`x` with `axis` (negative) filled up to a power of two."""
    missing = _up(x.shape[axis]) - x.shape[axis]
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, missing)
    return jnp.pad(x, widths, constant_values=value) if missing else x


def _pair(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Left and right blocks of every pair along the (negative) axis that counts blocks."""
    left, right = (jax.lax.slice_in_dim(x, side, None, 2, axis) for side in (0, 1))
    return left, right


def _join(left: jax.Array, low: jax.Array, right: jax.Array, above: float = 0.0) -> jax.Array:
    top = jnp.concatenate([left, jnp.full_like(left, above)], -1)
    return jnp.concatenate([top, jnp.concatenate([low, right], -1)], -2)


def decay_logs(
    log_decay: Float[Array, "*a c"],
) -> tuple[Float[Array, "*a c c"], Float[Array, "*a c"]]:
    """(sum of log_decay over i < s <= t as [t, i], -inf above the diagonal; the sum over s <= t)."""
    length = log_decay.shape[-1]
    total = _pad(log_decay, -1)[..., None]
    logs = jnp.zeros_like(total)[..., None]
    while total.shape[-2] > 1:
        (left, right), (before, after) = _pair(logs, -3), _pair(total, -2)
        logs = _join(left, after[..., None] + left[..., -1:, :], right, -jnp.inf)
        total = jnp.concatenate([before, after + before[..., -1:]], -1)
    return logs[..., 0, :length, :length], total[..., 0, :length]


def decay_matrix(log_decay: Float[Array, "*a c"]) -> Float[Array, "*a c c"]:
    """exp(G_t - G_i) with G the cumulative sum of `log_decay`: 1 on the diagonal, 0 above it.

    Any length; log_decay -inf is decay 0. Source: the note, section 5.3 with mu = 0.
    """
    return jnp.exp(decay_logs(log_decay)[0])


def momentum_coefficients(
    lam: Float[Array, "*a c"], mu: Float[Array, "*a c"], eout: Float[Array, "*a c"]
) -> tuple[Array, Array, Array, Array, Array]:
    """(C, P, Psi, Pi, Lam) of a chunk with decay factors `lam`, momentum `mu` and rates `eout`.

    P[t, i] and C[t, i] are what a write at i leaves in M and in S after t [..., c, c], 0 for i > t;
    Pi, Psi and Lam [..., c] what M before the chunk leaves in M, in S, and S before it in S.
    The three arguments broadcast. Source: the note, section 5.3.
    """
    lam, mu, eout = jnp.broadcast_arrays(lam, mu, eout)
    length = lam.shape[-1]
    lam, mu, eout = (_pad(x, -1, 1.0)[..., None] for x in (lam, mu, eout))
    c, p, psi, pi = eout[..., None], jnp.ones_like(mu)[..., None], eout * mu, mu
    while lam.shape[-2] > 1:
        (c0, c1), (p0, p1) = _pair(c, -3), _pair(p, -3)
        (lam0, lam1), (psi0, psi1), (pi0, pi1) = (_pair(x, -2) for x in (lam, psi, pi))
        c_end, p_end = c0[..., -1:, :], p0[..., -1:, :]
        c = _join(c0, lam1[..., None] * c_end + psi1[..., None] * p_end, c1)
        p = _join(p0, pi1[..., None] * p_end, p1)
        psi = jnp.concatenate([psi0, lam1 * psi0[..., -1:] + psi1 * pi0[..., -1:]], -1)
        pi = jnp.concatenate([pi0, pi1 * pi0[..., -1:]], -1)
        lam = jnp.concatenate([lam0, lam1 * lam0[..., -1:]], -1)
    square = (..., 0, slice(length), slice(length))
    row = (..., 0, slice(length))
    return c[square], p[square], psi[row], pi[row], lam[row]


def decayed_products(
    queries: tuple[Float[Array, "*a c k"], ...],
    k: Float[Array, "*a c k"],
    log_decay: Float[Array, "*a c k"],
) -> tuple[tuple[Array, ...], Float[Array, "*a c k"], Float[Array, "*a c k"]]:
    """sum_d q_t[d] k_i[d] exp(G_t[d] - G_i[d]) for t >= i of every q in `queries`, 0 above.

    Also exp(G_t) and exp(G_end - G_t). The seam splits each exponent in two, both of them sums of
    log-decays, so that a level is one matrix product and no factor exceeds 1 when decay does not.
    """
    length = k.shape[-2]
    *padded, k, into = (_pad(x, -2) for x in (*queries, k, log_decay))
    products = [jnp.sum(q * k, -1)[..., None, None] for q in padded]
    after = jnp.zeros_like(into)
    size = 1
    while size < k.shape[-2]:

        def halves(x, size=size):
            x = x.reshape(*x.shape[:-2], -1, 2, size, x.shape[-1])
            return x[..., 0, :, :], x[..., 1, :, :]

        (into0, into1), (after0, after1) = halves(into), halves(after)
        key = (halves(k)[0] * jnp.exp(after0)).mT
        fade = jnp.exp(into1)
        for n, q in enumerate(padded):
            left, right = _pair(products[n], -3)
            products[n] = _join(left, (halves(q)[1] * fade) @ key, right)
        into = jnp.stack([into0, into1 + into0[..., -1:, :]], -3).reshape(into.shape)
        after = jnp.stack([after0 + into1[..., -1:, :], after1], -3).reshape(into.shape)
        size *= 2
    square = tuple(x[..., 0, :length, :length] for x in products)
    return square, jnp.exp(into[..., :length, :]), jnp.exp(after[..., :length, :])


def tri_inverse_unit_lower(Lo: Float[Array, "*a c c"]) -> Float[Array, "*a c c"]:
    """(I + Lo)^{-1} for strictly lower triangular `Lo` of any size; the rest of `Lo` is not read.

    Matrix products only, and no power of Lo, which could overflow where the inverse does not; the
    derivative is -X dLo X. ValueError unless square. Source: the note, section 6.
    """
    if Lo.ndim < 2 or Lo.shape[-1] != Lo.shape[-2]:
        raise ValueError(f"Lo={Lo.shape} must be square in its last two axes")
    return _inverse(jnp.tril(Lo, -1))


@jax.custom_jvp
def _inverse(lower: jax.Array) -> jax.Array:
    length = lower.shape[-1]
    full = _pad(_pad(lower, -1), -2)
    size = min(SMALL_BLOCK, full.shape[-1])
    small = _diagonal_blocks(full, size)
    x = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), small.shape)
    row = jnp.arange(size)
    for b in (2**n for n in range(size.bit_length() - 1)):
        seam = (row // b % 2 == 1)[:, None] & (row[:, None] // b - 1 == row // b)
        x = x - x @ jnp.where(seam, small, 0) @ x
    while x.shape[-3] > 1:
        left, right = _pair(x, -3)
        size = left.shape[-1]
        low = _diagonal_blocks(full, 2 * size)[..., size:, :size]
        x = _join(left, -right @ low @ left, right)
    return x[..., 0, :length, :length]


def _diagonal_blocks(x: jax.Array, size: int) -> jax.Array:
    """[..., n, size, size]: the blocks on the diagonal of [..., n * size, n * size]."""
    starts = range(0, x.shape[-1], size)
    return jnp.stack([x[..., s : s + size, s : s + size] for s in starts], -3)


@_inverse.defjvp
def _inverse_jvp(primals, tangents):
    x = _inverse(*primals)
    return x, -x @ tangents[0] @ x
