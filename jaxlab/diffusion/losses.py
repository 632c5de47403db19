"""Training losses: the negative evidence bound of masked and of uniform diffusion, nats a token.

Continuous time, without the prior and reconstruction terms, which vanish. Sources: Sahoo et al.,
2024 (MDLM); Sahoo et al., 2025 (arXiv 2506.10892); note on Psi-samplers, section 4.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.diffusion.arguments import check_mask_id, check_range, floats, per_token, tokens
from jaxlab.diffusion.posterior import at
from jaxlab.diffusion.schedules import Level

EXCLUDED = -1e6  # log of a probability 0 that stays finite in products
SMALLEST = 1e-30  # levels are clamped to it, so that no end of time divides by 0
LARGEST = 1e18  # K alpha / (1 - alpha) is clamped to it, so that its square is a float32


def _inputs(logits, z, x0, level: Level) -> tuple:
    logits = floats("logits", logits)
    z, x0 = tokens("z", z, logits.shape[:-1]), tokens("x0", x0, logits.shape[:-1])
    check_range("level.alpha", level.alpha, 0, 1)
    fields = (per_token(x, logits.dtype) for x in level)
    return logits, z, x0, *(jnp.broadcast_to(x, z.shape) for x in fields)


def subs(
    logits: Float[Array, "b t v"], z: Int[Array, "b t"], mask_id: int
) -> Float[Array, "b t v"]:
    """Log-probabilities of the masked model: never the mask, and what is not masked is kept.

    Excluded entries are -1e6. float32 (float64 if logits are). ValueError unless shapes and mask fit,
    TypeError unless z holds integers. Source: MDLM, section 3.2.3; note on Psi-samplers, section 3.
    """
    logits = floats("logits", logits)
    z = tokens("z", z, logits.shape[:-1])
    check_mask_id(mask_id, logits.shape[-1])
    ids = jnp.arange(logits.shape[-1])
    guess = jax.nn.log_softmax(jnp.where(ids == mask_id, -jnp.inf, logits))
    guess = jnp.where(ids == mask_id, EXCLUDED, jnp.maximum(guess, EXCLUDED))
    kept = jnp.where(ids == z[..., None], 0.0, EXCLUDED).astype(logits.dtype)
    return jnp.where((z == mask_id)[..., None], guess, kept)


def masked_nelbo(
    logits: Float[Array, "b t v"],
    z: Int[Array, "b t"],
    x0: Int[Array, "b t"],
    level: Level,
    mask_id: int,
) -> Float[Array, "b t"]:
    """alpha' / (1 - alpha) log p(x0) where z is the mask, 0 elsewhere; applies `subs` itself.

    `logits` is the raw network output; fields of `level` broadcast against z. float32 (float64 if
    logits are). Errors as in `subs`. Source: MDLM; note on Psi-samplers, section 4.1.
    """
    logits, z, x0, _, rest, slope = _inputs(logits, z, x0, level)
    check_mask_id(mask_id, logits.shape[-1])
    others = jnp.where(jnp.arange(logits.shape[-1]) == mask_id, -jnp.inf, logits)
    log_p = at(logits, x0) - jax.nn.logsumexp(others, -1)
    log_p = jnp.where(x0 == mask_id, EXCLUDED, log_p)
    return jnp.where(z == mask_id, slope / jnp.maximum(rest, SMALLEST) * log_p, 0)


def _excess(e, log):
    """e - log(1 + e), `log` being its logarithm: a series near 0, where the difference cancels."""
    # sum over n >= 2 of (-e)^n / n
    terms = 12 if e.dtype == jnp.float64 else 7
    tail = jnp.zeros_like(e)
    for n in range(terms + 1, 1, -1):
        tail = 1 / n - e * tail
    return jnp.where(jnp.abs(e) < 0.05, e * e * tail, e - log)


def _split_log(e, apart):
    """log(1 + e), from the logarithms of its factors where e is near -1 or beyond range."""
    near = (e >= -0.5) & (e < 1e6)
    return jnp.where(near, jnp.log1p(jnp.where(near, e, 0)), apart)


def _terms(logits, alpha, rest, z, x0):
    """Per token: coefficient 1 / (K alpha), r, and p as an array with what of it is summed."""
    k = logits.shape[-1]
    alpha, rest = jnp.maximum(alpha, SMALLEST), jnp.maximum(rest, k / LARGEST)
    p = jax.nn.softmax(logits, -1)
    return 1 / (k * alpha), k * alpha / rest, p, jnp.arange(k) == x0[..., None]


def _uniform_value(logits, alpha, rest, slope, z, x0):
    scale, r, p, own = _terms(logits, alpha, rest, z, x0)
    p_z, p_x = at(p, z), at(p, x0)
    wrong = jnp.sum(jnp.where(own, 0, p), -1)  # 1 - p_x, without cancellation
    same = z == x0
    below, log_r, log_z = 1 + r * p_z, jnp.log1p(r), jnp.log1p(r * p_z)
    # The term of x0, which is 0 when z = x0.
    e_x = -(r / (1 + r) * wrong + r * p_z) / below
    h_x = (1 + r) * _excess(e_x, _split_log(e_x, jnp.log1p(r * p_x) - log_z - log_r))
    # The terms of the others, times their a: 1, or 1 / (1 + r) when z = x0.
    a = jnp.where(same, 1 / (1 + r), 1)
    r, p_z, below, log_z, same_v = (x[..., None] for x in (r, p_z, below, log_z, same))
    ae = jnp.where(same_v, wrong[..., None] / (1 + r) + p, p - p_z) * (r / below)
    e = jnp.minimum(jnp.where(same_v, ae * (1 + r), ae), 1e30)
    apart = jnp.log1p(r * p) - log_z + jnp.where(same_v, log_r[..., None], 0)
    big = a[..., None] * _excess(e, _split_log(e, apart))
    others = jnp.sum(jnp.where(own, 0, big), -1)
    return -slope * scale * (others + jnp.where(same, 0, h_x))


def _uniform_slopes(logits, alpha, rest, slope, z, x0):
    """d loss / d logits, p_m (v_m - sum_j p_j v_j) with v = r (b_j - a_j) / (1 + r p_j).

    At z, v is -r (sum b - sum a) / (1 + r p_z). Only differences of v count: they are taken to the
    likeliest token t, each in a form that does not cancel.
    """
    scale, r, p, own = _terms(logits, alpha, rest, z, x0)
    k, ids = p.shape[-1], jnp.arange(p.shape[-1])
    t = jnp.argmax(logits, -1)
    p_z, p_t, r = at(p, z)[..., None], at(p, t)[..., None], r[..., None]
    z, x0, t = (x[..., None] for x in (z, x0, t))
    same = z == x0
    wrong = jnp.sum(jnp.where(own, 0, p), -1, keepdims=True)
    unlikely = jnp.sum(jnp.where(ids == t, 0, p), -1, keepdims=True)
    at_z, at_t, all_ = 1 + r * p_z, 1 + r * p_t, 1 + r * p
    share, share_t = r * p / all_, r * p_t / at_t

    # v itself: at z, at another token.
    v_z = r * jnp.where(same, -wrong / (1 + r), p_z) * (r / at_z) * ((k + r) / at_z)
    v_x = (
        -r * (wrong / at_z + (1 + r) * (p_z / at_z)) * (r / (1 + r * at(p, x0[..., 0])[..., None]))
    )
    v = jnp.where(same, wrong / (1 + r) + p, p - p_z) * (r / at_z) * (r / all_)
    v = jnp.where(own, v_x, v)
    v_t = jnp.sum(jnp.where(ids == t, v, 0), -1, keepdims=True)
    # v - v_t where neither is z: both of one a, or one of them x0.
    a = jnp.where(same, 1 / (1 + r), 1)
    to_t = a * (r / all_) * (r / at_t) * (p - p_t)
    to_t = jnp.where(t == x0, (r / at_t) * (r * unlikely / all_ + (1 + r) * share), to_t)
    to_t = jnp.where(own, -(r / all_) * (r * wrong / at_t + (1 + r) * share_t), to_t)
    w = jnp.where(ids == z, v_z - v_t, jnp.where(t == z, v - v_z, to_t))
    w = jnp.where(ids == t, 0, w)
    return -(slope * scale)[..., None] * p * (w - jnp.sum(p * w, -1, keepdims=True))


@jax.custom_jvp
def _uniform(logits, alpha, rest, slope, z, x0):
    return _uniform_value(logits, alpha, rest, slope, z, x0)


def _uniform_jvp(primals, tangents):
    """Closed form along the logits: bounded where products of autodiff overflow."""
    out, tangent = _uniform(*primals), jnp.zeros((), primals[0].dtype)
    zero = jax.custom_derivatives.SymbolicZero
    d_logits, levels = tangents[0], tangents[1:4]
    if type(d_logits) is not zero:
        tangent = jnp.sum(_uniform_slopes(*primals) * d_logits, -1)
    if any(type(x) is not zero for x in levels):
        logits, z, x0, given = primals[0], *primals[4:], primals[1:4]
        levels = tuple(
            jnp.zeros_like(p) if type(t) is zero else t for p, t in zip(given, levels, strict=True)
        )
        along = jax.jvp(lambda a, b, c: _uniform_value(logits, a, b, c, z, x0), given, levels)[1]
        tangent = tangent + along
    return out, jnp.broadcast_to(tangent, out.shape)


_uniform.defjvp(_uniform_jvp, symbolic_zeros=True)


def uniform_nelbo(
    logits: Float[Array, "b t v"], z: Int[Array, "b t"], x0: Int[Array, "b t"], level: Level
) -> Float[Array, "b t"]:
    """Negative evidence bound of uniform diffusion, in the form that sums non-negative terms.

    -alpha' / (K alpha) sum_j (b_j - a_j + a_j log(a_j / b_j)), a and b being K alpha x + 1 - alpha of
    the clean token and of the guess, divided by their entry at z. `logits` is the raw network output;
    fields of `level` broadcast against z. float32 is right to 1e-5 (1 - alpha enters as a field);
    float64 if logits are. The backward pass keeps the logits only. alpha of 0 or 1 is clamped.
    ValueError unless shapes fit, TypeError unless z and x0 hold integers.
    Source: arXiv 2506.10892, Rao-Blackwellised; note on Psi-samplers, section 4.2, form B.
    """
    logits, z, x0, alpha, rest, slope = _inputs(logits, z, x0, level)
    return jax.checkpoint(_uniform)(logits, alpha, rest, slope, z, x0)


def nelbo_mean(
    per_token: Float[Array, "b t"], valid: Bool[Array, "b t"] | Int[Array, "b t"]
) -> tuple[Float[Array, ""], dict[str, tuple]]:
    """(mean over valid tokens, {"nll": (sum, weight)}); 0 without valid tokens.

    ValueError unless the shapes are equal.
    """
    per_token, valid = floats("per_token", per_token), jnp.asarray(valid)
    if valid.shape != per_token.shape:
        raise ValueError(f"valid has shape {valid.shape}; expected {per_token.shape}")
    total = jnp.sum(jnp.where(valid != 0, per_token, 0))
    weight = jnp.sum(valid != 0).astype(total.dtype)
    return total / jnp.maximum(weight, 1), {"nll": (total, weight)}
