"""Psi-samplers: ancestral steps mixed with fresh corruptions of the guess, as one compiled scan.

The names that a sampler needs are all found here, wherever they are made. Source: "The Diffusion Duality,
Chapter II" (arXiv 2602.21185); note on Psi-samplers, sections 7 and 14.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxlab.diffusion.arguments import check_prior, floats, tokens
from jaxlab.diffusion.draws import draw_and_mass, fine_uniform, nucleus, race_categorical
from jaxlab.diffusion.forward import prior_draw, prior_probs
from jaxlab.diffusion.losses import subs
from jaxlab.diffusion.posterior import StepCoef, guided_probs, mixture, weights_of
from jaxlab.diffusion.psi_schedule import (
    PsiSpec,
    SamplerConfig,
    kappa_schedule,
    step_coefs,
    time_profile,
)

__all__ = [
    "PsiSpec",
    "SamplerConfig",
    "StepCoef",
    "categorical_step",
    "inverse_cdf_step",
    "kappa_schedule",
    "nucleus",
    "race_categorical",
    "sample",
    "sample_from_uniforms",
    "step_coefs",
    "time_profile",
]
Denoise = Callable[..., Float[Array, "b t v"]]


def _step_inputs(logits, z, coef: StepCoef, prior, mask_id):
    logits = floats("logits", logits)
    z = tokens("z", z, logits.shape[:-1])
    check_prior(prior, mask_id, logits.shape[-1])
    return logits, z, StepCoef(*(jnp.asarray(x, logits.dtype) for x in coef))


def _row_keys(key: Key[Array, ""], batch: int) -> Key[Array, "b"]:
    """A key an example: what it draws does not depend on the batch it is in."""
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(batch))


def _prior_rows(key, shape, mask_id: int | None, vocab: int) -> Int[Array, "b t"]:
    draw = lambda key: prior_draw(key, shape[1:], mask_id, vocab)  # noqa: E731
    return jax.vmap(draw)(_row_keys(key, shape[0]))


def categorical_step(
    key: Key[Array, ""],
    logits: Float[Array, "b t v"],
    z: Int[Array, "b t"],
    coef: StepCoef,
    prior: str = "uniform",
    mask_id: int | None = None,
) -> Int[Array, "b t"]:
    """One draw of Psi given tokens z and the guess softmax(logits); int32.

    `logits` after `subs` (masked prior) and `nucleus`; `coef` is one row of `step_coefs`. Three
    uniforms a token, and with the uniform prior one integer. Row i draws from `key` and i alone.
    TypeError or ValueError for tokens, shapes, prior or mask that do not fit.
    Source: note on Psi-samplers, sections 7.2 and 14.
    """
    logits, z, coef = _step_inputs(logits, z, coef, prior, mask_id)
    vocab, dtype = logits.shape[-1], logits.dtype
    choice, renew = jax.random.split(key)
    draw = lambda key: fine_uniform(key, (3, *z.shape[1:]), dtype)  # noqa: E731
    u = jnp.moveaxis(jax.vmap(draw)(_row_keys(choice, z.shape[0])), 1, 0)
    guess, p_z = draw_and_mass(logits, z, u[1:])
    w_x, _, w_u = weights_of(p_z, z, coef, prior, mask_id, vocab)
    noise = _prior_rows(renew, z.shape, mask_id, vocab)
    # The rare branches first, where a uniform has its digits.
    return jnp.where(u[0] < w_u, noise, jnp.where(u[0] < w_u + w_x, guess, z))


def _inverse_cdf(u, probs) -> Int[Array, "*b"]:
    cumulative = jnp.cumsum(probs, -1)
    # The last sum, not a sum of its own: rounded otherwise, u near 1 would pick what has no probability.
    below = cumulative < u.astype(probs.dtype)[..., None] * cumulative[..., -1:]
    return jnp.sum(below, -1, dtype=jnp.int32)


def inverse_cdf_step(
    u: Float[Array, "b t"],
    logits: Float[Array, "b t v"],
    z: Int[Array, "b t"],
    coef: StepCoef,
    prior: str = "uniform",
    mask_id: int | None = None,
) -> Int[Array, "b t"]:
    """The law of `categorical_step` from one uniform a token and the whole of Psi: the slow form.

    The token is the number of j with cumsum_j(Psi) < u sum(Psi). Errors as there.
    """
    logits, z, coef = _step_inputs(logits, z, coef, prior, mask_id)
    u = jnp.asarray(u)
    if u.shape != z.shape:
        raise ValueError(f"u has shape {u.shape}; expected {z.shape}")
    return _inverse_cdf(u, mixture(jax.nn.softmax(logits, -1), z, coef, prior, mask_id))


def _guesses(denoise_fn, cfg: SamplerConfig, z, sigma, labels) -> list[Float[Array, "b t v"]]:
    """Log-probabilities or logits with and, if guidance needs it, without the class; no nucleus."""
    sigma = jnp.broadcast_to(sigma, z.shape[:1])
    given = [()] if labels is None else [(labels,)]
    if labels is not None and cfg.guidance is not None and cfg.guidance != 1:
        without = (jnp.full_like(labels, cfg.num_classes or 0),)
        given = [without] if cfg.guidance == 0 else [*given, without]
    out = []
    for extra in given:
        logits = floats("the result of denoise_fn", denoise_fn(z, sigma, *extra))
        if logits.shape != (*z.shape, cfg.vocab):
            raise ValueError(f"denoise_fn gave {logits.shape}; expected {(*z.shape, cfg.vocab)}")
        out.append(logits if cfg.mask_id is None else subs(logits, z, cfg.mask_id))
    return out


def _guided(guesses, z, coef: StepCoef, cfg) -> Float[Array, "b t v"]:
    """Psi of two guesses: guidance on the posteriors to s and to 0, then their mixture."""

    def posterior(c: StepCoef):
        probs = (jax.nn.softmax(x, -1) for x in guesses)
        cond, uncond = (mixture(p, z, c, cfg.prior, cfg.mask_id) for p in probs)
        both = guided_probs(cond, uncond, cfg.guidance)
        # Where nothing is possible in both, the class alone decides.
        return jnp.where(jnp.any(both > 0, -1, keepdims=True), both, cond)

    one, zero = jnp.ones_like(coef.kappa), jnp.zeros_like(coef.kappa)
    to_s = posterior(coef._replace(kappa=one))
    clean = coef._replace(
        alpha_s=one, one_minus_alpha_s=zero, gap=coef.one_minus_alpha_t, kappa=one
    )
    renewed = coef.alpha_s * posterior(clean) + coef.one_minus_alpha_s * prior_probs(
        cfg.prior, cfg.mask_id, cfg.vocab, to_s.dtype
    )
    return coef.kappa * to_s + (1 - coef.kappa) * renewed


def _run(denoise_fn, cfg, z, draws, coefs, labels, draw, draw_guided, keep) -> tuple:
    """The loop of both samplers: (tokens, z after each step if `keep`). `draws`: N + 1 rows."""
    coefs = step_coefs(cfg) if coefs is None else coefs
    for name, x in zip(StepCoef._fields, coefs, strict=True):
        if jnp.shape(x)[:1] != (cfg.steps + 1,):
            raise ValueError(
                f"coefs.{name} has shape {jnp.shape(x)}; expected {cfg.steps + 1} rows"
            )

    def move(z, inputs):
        source, coef = inputs
        guesses = _guesses(denoise_fn, cfg, z, coef.sigma, labels)
        kept = nucleus(guesses[0], cfg.nucleus)
        # One nucleus, that of the class, for both: two might have no token in common.
        guesses = [kept, *(jnp.where(kept == -jnp.inf, -jnp.inf, x) for x in guesses[1:])]
        if len(guesses) == 1:
            z = draw(source, guesses[0], z, coef, cfg.prior, cfg.mask_id)
        else:
            coef = StepCoef(*(x.astype(guesses[0].dtype) for x in coef))
            z = draw_guided(source, _guided(guesses, z, coef, cfg))
        return z, z if keep else None

    body = jax.tree.map(lambda x: x[:-1], (draws, coefs))
    last = jax.tree.map(lambda x: x[-1], (draws, coefs))
    z, trajectory = jax.lax.scan(move, z, body)
    if cfg.removal == "ancestral":
        z = move(z, last)[0]
    elif cfg.removal == "greedy":
        guesses = [
            jax.nn.log_softmax(x) for x in _guesses(denoise_fn, cfg, z, last[1].sigma, labels)
        ]
        mix = guesses[0]
        if len(guesses) == 2:
            mix = cfg.guidance * guesses[0] + (1 - cfg.guidance) * guesses[1]
        z = jnp.argmax(mix, -1).astype(jnp.int32)
    return z, trajectory


def sample(
    key: Key[Array, ""],
    denoise_fn: Denoise,
    cfg: SamplerConfig,
    shape: tuple[int, int],
    coefs: StepCoef | None = None,
    labels: Int[Array, "b"] | None = None,
    trajectory: bool = False,
) -> Any:
    """Tokens int32 of `shape` (batch, length) after N steps and the removal.

    With `trajectory` a pair: the tokens, and [N, batch, length] after each of the steps.

    `denoise_fn(z int[b, t], sigma f[b])` gives raw logits [b, t, v]; with `labels` it is called with
    them as third argument. `coefs` stands for `step_coefs(cfg)`: traced, so that one compilation
    serves all kappa and times. Example i draws from `key` and i alone. ValueError for shapes that do
    not fit, or guidance without labels. Source: note on Psi-samplers, section 7.10.
    """
    if len(shape) != 2:
        raise ValueError(f"shape={shape} must be (batch, length)")
    labels = None if labels is None else tokens("labels", labels, (shape[0],))
    if cfg.guidance is not None and labels is None:
        raise ValueError(f"labels=None must be given with guidance={cfg.guidance}")
    start, steps = jax.random.split(key)

    def draw_guided(key, probs):
        u = jax.vmap(lambda key: fine_uniform(key, (2, shape[1]), probs.dtype))
        u = jnp.moveaxis(u(_row_keys(key, shape[0])), 1, 0)
        return draw_and_mass(jnp.log(probs), jnp.zeros(shape, jnp.int32), u)[0]

    keys = jax.vmap(lambda i: jax.random.fold_in(steps, i))(jnp.arange(cfg.steps + 1))
    z = _prior_rows(start, tuple(shape), cfg.mask_id, cfg.vocab)
    draws = (categorical_step, draw_guided)
    found = _run(denoise_fn, cfg, z, keys, coefs, labels, *draws, keep=trajectory)
    return found if trajectory else found[0]


def sample_from_uniforms(
    denoise_fn: Denoise,
    z_init: Int[Array, "b t"],
    uniforms: Float[Array, "n b t"],
    cfg: SamplerConfig,
    coefs: StepCoef | None = None,
) -> tuple[Int[Array, "b t"], Int[Array, "steps b t"]]:
    """(tokens, z after each of the N steps) from `z_init`, every draw by `inverse_cdf_step`.

    `uniforms` [N + 1, b, t]: row i at step i, row N at the removal (unread unless "ancestral").
    Otherwise as `sample`, without labels.
    """
    z, u = tokens("z_init", z_init), floats("uniforms", uniforms)
    if u.shape != (cfg.steps + 1, *z.shape) or z.ndim != 2:
        expected = (cfg.steps + 1, *z.shape)
        raise ValueError(f"uniforms has shape {u.shape}; expected {expected}, z_init [b, t]")
    if cfg.guidance is not None:
        raise ValueError(f"guidance={cfg.guidance} must be None: there are no labels here")
    return _run(denoise_fn, cfg, z, u, coefs, None, inverse_cdf_step, _inverse_cdf, keep=True)
