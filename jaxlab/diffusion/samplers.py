"""Psi-samplers: one compiled scan for every kappa and every fall of times.

A step draws from the mixture of section 7.2: one number chooses between a token of the network's
distribution, the token that is there and noise. Source: Duo++ 2602.21185; note, sections 7 and 14.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxlab.diffusion.checks import check_prior, check_tokens, wide
from jaxlab.diffusion.kappa import PsiSpec, kappa_schedule, time_profile
from jaxlab.diffusion.losses import subs
from jaxlab.diffusion.posterior import (
    StepCoef,
    guided_probs,
    masked_weights,
    mixture,
    uniform_weights,
)
from jaxlab.diffusion.schedules import host_schedule

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

REMOVAL = ("ancestral", "greedy", "none")
BLOCK = 256  # tokens of the first level of a draw


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """What is fixed when a sampler is compiled; `step_coefs` makes numbers of the rest.

    `time_conditioning` None: the network is told the noise level iff the prior is uniform. `removal`
    is the last step: a draw of q_{0|t}, the most probable tokens, or nothing. `guidance` weighs the
    class against none (section 7.8). ValueError for what cannot be.
    """

    vocab: int
    steps: int
    prior: str = "uniform"
    mask_id: int | None = None
    schedule: str = "log-linear"
    psi: PsiSpec = PsiSpec()
    nucleus: float = 1.0
    removal: str = "ancestral"
    time_conditioning: bool | None = None
    eps: float = 1e-5
    schedule_eps: float = 1e-3
    guidance: float | None = None
    num_classes: int | None = None

    def __post_init__(self):
        check_prior(self.prior, self.mask_id, self.vocab)
        host_schedule(self.schedule)
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.removal not in REMOVAL:
            raise ValueError(f"removal={self.removal!r} must be one of {list(REMOVAL)}")
        _check_share(self.nucleus, "nucleus")
        if self.guidance is not None and self.num_classes is None:
            raise ValueError(f"guidance={self.guidance} needs num_classes")
        kappa_schedule(self.psi, np.array([1.0, 0.5]), self.schedule, self.schedule_eps)
        time_profile(self.psi, self.steps, self.eps, self.schedule)


def _check_share(p: float, name: str) -> None:
    if not 0 < p <= 1:
        raise ValueError(f"{name}={p} must be in (0, 1]")


def step_coefs(cfg: SamplerConfig) -> StepCoef:
    """Coefficients [N + 1] of the N steps and of the removal, from float64 on the host."""
    times = time_profile(cfg.psi, cfg.steps, cfg.eps, cfg.schedule)
    kappa = kappa_schedule(cfg.psi, times, cfg.schedule, cfg.schedule_eps)
    alpha, noise = host_schedule(cfg.schedule).level(times, cfg.schedule_eps)
    alpha_s, noise_s = np.append(alpha[1:], 1.0), np.append(noise[1:], 0.0)
    kappa[-1] = 1
    # Of two small differences from 1, or of two small numbers.
    gain = np.where(alpha > 0.5, noise - noise_s, alpha_s - alpha)
    tell = cfg.prior == "uniform" if cfg.time_conditioning is None else cfg.time_conditioning
    sigma = -np.log(alpha) * tell
    return StepCoef(*map(jnp.asarray, (alpha, noise, alpha_s, noise_s, gain, kappa, sigma)))


def nucleus(logits: Float[Array, "*b v"], p: float) -> Float[Array, "*b v"]:
    """Keeps the tokens whose more probable rivals sum to at most `p`; the others become -inf.

    The token that crosses `p` is kept. By bisection, without a sort. ValueError for p outside (0, 1].
    """
    _check_share(p, "p")
    if p == 1:
        return logits
    wide_logits = logits.astype(wide(logits))
    top = jnp.max(wide_logits, -1, keepdims=True)
    probs = jax.nn.softmax(wide_logits)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        above = jnp.sum(probs, -1, keepdims=True, where=wide_logits > middle) > p
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    # Below are tokens of probability 0 to these types.
    single = wide_logits.dtype == jnp.float32
    bounds = top - (110 if single else 750), top
    low, _ = jax.lax.fori_loop(0, 40 if single else 70, halve, bounds)
    return jnp.where(wide_logits > low, logits, -jnp.inf)


def _row_keys(key: Key[Array, ""], rows: int) -> Key[Array, "b"]:
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))


def _draw(keys: Key[Array, "b"], logits: Float[Array, "b t v"]) -> Int[Array, "b t"]:
    """Tokens ~ softmax(logits): a block of tokens by one number, the token within by another."""
    b, t, v = logits.shape
    e = jnp.exp(logits - jnp.max(logits, -1, keepdims=True))
    e = jnp.pad(e, ((0, 0), (0, 0), (0, -v % BLOCK))).reshape(b, t, -1, BLOCK)
    u = jax.vmap(lambda key: jax.random.uniform(key, (t, 2), e.dtype))(keys)
    block = _pick(u[..., 0], jnp.sum(e, -1))
    inside = jnp.take_along_axis(e, block[..., None, None], 2)[:, :, 0]
    return jnp.minimum(block * BLOCK + _pick(u[..., 1], inside), v - 1)


def _pick(u: Float[Array, "*b"], weights: Float[Array, "*b n"]) -> Int[Array, "*b"]:
    """The index drawn by u in [0, 1) with probability as `weights`, which need not sum to 1."""
    total = jnp.cumsum(weights, -1)
    index = jnp.sum(total <= u[..., None] * total[..., -1:], -1, dtype=jnp.int32)
    return jnp.minimum(index, weights.shape[-1] - 1)


def categorical_step(
    key: Key[Array, ""],
    logits: Float[Array, "b t v"],
    z: Int[Array, "b t"],
    coef: StepCoef,
    prior: str = "uniform",
    mask_id: int | None = None,
) -> Int[Array, "b t"]:
    """One draw of Psi; `logits` after `subs` and `nucleus`, `coef` a row of `step_coefs`.

    The numbers of a row depend on the key and the row's index alone. Errors of `inverse_cdf_step`.
    """
    logits = _check(logits, z, prior, mask_id)
    c = jax.tree.map(lambda a: jnp.asarray(a, logits.dtype), coef)
    b, t, v = logits.shape
    keys = jax.vmap(lambda k: jax.random.split(k, 3))(_row_keys(key, b))
    token = _draw(keys[:, 0], logits)
    if prior == "masked":
        to_x, stay, _ = masked_weights(z == mask_id, c)
        noise = mask_id
    else:
        at = jnp.take_along_axis(logits, z[..., None], -1)[..., 0]
        to_x, stay, _ = uniform_weights(jnp.exp(at - jax.nn.logsumexp(logits, -1)), c, v)
        noise = jax.vmap(lambda key: jax.random.randint(key, (t,), 0, v))(keys[:, 1])
    u = jax.vmap(lambda key: jax.random.uniform(key, (t,), logits.dtype))(keys[:, 2])
    new = jnp.where(u < stay, z, jnp.where(u < stay + to_x, token, noise))
    return new.astype(jnp.int32)


def inverse_cdf_step(
    u: Float[Array, "b t"],
    logits: Float[Array, "b t v"],
    z: Int[Array, "b t"],
    coef: StepCoef,
    prior: str = "uniform",
    mask_id: int | None = None,
) -> Int[Array, "b t"]:
    """The law of `categorical_step` by one number a token: how many cumulative sums lie below u.

    ValueError for shapes and priors that do not fit, TypeError for tokens that are not integers.
    """
    logits = _check(logits, z, prior, mask_id)
    c = jax.tree.map(lambda a: jnp.asarray(a, logits.dtype), coef)
    return _invert(u, mixture(jax.nn.softmax(logits), z, c, prior, mask_id))


def _invert(u, probs) -> Int[Array, "b t"]:
    total = jnp.cumsum(probs, -1)
    index = jnp.sum(total < (u * jnp.sum(probs, -1))[..., None], -1, dtype=jnp.int32)
    return jnp.minimum(index, probs.shape[-1] - 1)


def _check(logits, z, prior, mask_id):
    check_tokens(z=z)
    check_prior(prior, mask_id, logits.shape[-1])
    if logits.shape[:-1] != z.shape:
        raise ValueError(f"logits {logits.shape} must be z {z.shape} with the vocabulary behind")
    return logits.astype(wide(logits))


def sample(
    key: Key[Array, ""],
    denoise_fn: Callable,
    cfg: SamplerConfig,
    shape: tuple[int, int],
    coefs: StepCoef | None = None,
    labels: Int[Array, "b"] | None = None,
) -> Int[Array, "b t"]:
    """Tokens of `shape` from noise, cfg.steps steps and the removal, a row of `coefs` each.

    `denoise_fn(z, sigma)`, with labels as a third argument if there are any, gives raw logits
    [b, t, v]. `coefs` in place of `step_coefs(cfg)` may be traced: one compilation for all of them.
    ValueError for guidance without labels, and for coefs of another number of steps.
    """
    b, t = shape
    start, steps, last = (jax.random.fold_in(key, i) for i in range(3))
    if cfg.prior == "masked":
        z = jnp.full(shape, cfg.mask_id, jnp.int32)
    else:
        draw = lambda key: jax.random.randint(key, (t,), 0, cfg.vocab)  # noqa: E731
        z = jax.vmap(draw)(_row_keys(start, b)).astype(jnp.int32)

    def step(key, z, c):
        if cfg.guidance is None:
            logits = nucleus(_logits(denoise_fn, cfg, z, c, labels), cfg.nucleus)
            return categorical_step(key, logits, z, c, cfg.prior, cfg.mask_id)
        u = jax.vmap(lambda key: jax.random.uniform(key, (t,)))(_row_keys(key, b))
        return _invert(u, _guided(denoise_fn, cfg, z, c, labels))

    def body(z, xs):
        i, c = xs
        return step(jax.random.fold_in(steps, i), z, c), None

    coefs = _coefs(cfg, coefs, labels)
    ahead = jax.tree.map(lambda a: a[:-1], coefs)
    z, _ = jax.lax.scan(body, z, (jnp.arange(cfg.steps), ahead))
    return _remove(denoise_fn, cfg, z, coefs, labels, lambda z, c: step(last, z, c))


def sample_from_uniforms(
    denoise_fn: Callable,
    z_init: Int[Array, "b t"],
    uniforms: Float[Array, "n b t"],
    cfg: SamplerConfig,
    coefs: StepCoef | None = None,
) -> tuple[Int[Array, "b t"], Int[Array, "s b t"]]:
    """(tokens, z after each step): `sample` from `z_init`, every draw by `inverse_cdf_step`.

    Row i of the N + 1 `uniforms` is that of step i, the last that of an ancestral removal.
    """
    check_tokens(z_init=z_init)
    if uniforms.shape != (cfg.steps + 1, *z_init.shape):
        raise ValueError(
            f"uniforms {uniforms.shape} must be {(cfg.steps + 1, *z_init.shape)}, steps + 1 rows"
        )

    def step(z, u, c):
        if cfg.guidance is not None:
            raise ValueError(f"guidance={cfg.guidance} needs labels: use sample")
        logits = nucleus(_logits(denoise_fn, cfg, z, c, None), cfg.nucleus)
        return inverse_cdf_step(u, logits, z, c, cfg.prior, cfg.mask_id)

    def body(z, xs):
        z = step(z, *xs)
        return z, z

    coefs = _coefs(cfg, coefs, None)
    ahead = jax.tree.map(lambda a: a[:-1], coefs)
    z, trajectory = jax.lax.scan(body, z_init.astype(jnp.int32), (uniforms[:-1], ahead))
    end = _remove(denoise_fn, cfg, z, coefs, None, lambda z, c: step(z, uniforms[-1], c))
    return end, trajectory


def _coefs(cfg: SamplerConfig, coefs: StepCoef | None, labels) -> StepCoef:
    if cfg.guidance is not None and labels is None:
        raise ValueError(f"guidance={cfg.guidance} needs labels")
    coefs = step_coefs(cfg) if coefs is None else coefs
    lengths = {np.shape(a)[0] for a in jax.tree.leaves(coefs)}
    if lengths != {cfg.steps + 1}:
        raise ValueError(f"coefs have {sorted(lengths)} rows; steps={cfg.steps} needs one more")
    return coefs


def _logits(denoise_fn, cfg: SamplerConfig, z, c, labels) -> Float[Array, "b t v"]:
    """The network's logits, with what is certain of a masked sequence."""
    more = () if labels is None else (labels,)
    logits = denoise_fn(z, jnp.broadcast_to(c.sigma, z.shape[:1]), *more)
    if logits.shape != (*z.shape, cfg.vocab):
        raise ValueError(f"denoise_fn gave {logits.shape} for vocab={cfg.vocab} and z {z.shape}")
    return subs(logits, z, cfg.mask_id) if cfg.prior == "masked" else logits.astype(wide(logits))


def _guided(denoise_fn, cfg: SamplerConfig, z, c, labels) -> Float[Array, "b t v"]:
    """Psi with the class against Psi without."""

    def psi(labels):
        logits = nucleus(_logits(denoise_fn, cfg, z, c, labels), cfg.nucleus)
        return mixture(jax.nn.softmax(logits), z, c, cfg.prior, cfg.mask_id)

    none = jnp.full_like(labels, cfg.num_classes)
    return guided_probs(psi(labels), psi(none), cfg.guidance)


def _remove(denoise_fn, cfg: SamplerConfig, z, coefs: StepCoef, labels, draw: Callable):
    c = jax.tree.map(lambda a: a[-1], coefs)
    if cfg.removal == "none":
        return z
    if cfg.removal == "ancestral":
        return draw(z, c)
    logits = _logits(denoise_fn, cfg, z, c, labels)
    if cfg.guidance is not None:
        none = _logits(denoise_fn, cfg, z, c, jnp.full_like(labels, cfg.num_classes))
        logits = guided_probs(jax.nn.softmax(logits), jax.nn.softmax(none), cfg.guidance)
    return jnp.argmax(logits, -1).astype(jnp.int32)


def race_categorical(
    probs: Float[Array, "*b v"], uniforms: Float[Array, "*b v"]
) -> Int[Array, "*b"]:
    """The release's draw: argmax p / E, E = 1e-10 - log(u + 1e-10) (section 7.9)."""
    return jnp.argmax(probs / (1e-10 - jnp.log(uniforms + 1e-10)), -1).astype(jnp.int32)
