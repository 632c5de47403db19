"""Texts of a diffusion model: the sampler around a run's denoiser, and what a judge says of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxlab.diffusion.metrics import unigram_entropy
from jaxlab.diffusion.samplers import (
    PsiSpec,
    SamplerConfig,
    sample,
    sample_from_uniforms,
    step_coefs,
)


@dataclasses.dataclass(frozen=True)
class Psi:
    """How a diffusion model writes: the mixing of posterior and corrector over three parts of time.

    The defaults are ancestral sampling; see `jaxlab.diffusion.samplers.PsiSpec` for the names.
    """

    steps: Annotated[int, "calls of the network, but for the last"] = 64
    profile: Annotated[str, "how times fall from 1 to 0"] = "linear"
    high: Annotated[str, "kappa at high noise, such as constant-0.9"] = "pure-posterior"
    middle: Annotated[str, "kappa in between"] = "pure-posterior"
    low: Annotated[str, "kappa at low noise"] = "pure-posterior"
    high_frac: Annotated[float, "share of the steps that are high noise"] = 0.0
    middle_frac: Annotated[float, "share of the steps in between"] = 0.0
    nucleus: Annotated[float, "draw from the most probable tokens of this probability"] = 1.0
    removal: Annotated[str, "last step: ancestral, greedy or none"] = "ancestral"

    def sampler(self, vocab: int, prior: str) -> SamplerConfig:
        """The configuration of the sampler; ValueError for values that it cannot have."""
        spec = PsiSpec(
            self.profile, self.high, self.middle, self.low, self.high_frac, self.middle_frac
        )
        config = SamplerConfig(
            vocab, self.steps, prior, vocab - 1 if prior == "masked" else None,
            psi=spec, nucleus=self.nucleus, removal=self.removal,
        )  # fmt: skip
        step_coefs(config)
        return config


def check_diffusion(run: Any, who: str) -> None:
    """ValueError unless `run` trains a diffusion model of text."""
    if not hasattr(run.objective, "prior") or not hasattr(run.source, "tokenizer"):
        raise ValueError(f"{who} needs a diffusion model of text, not {run.objective}")


def denoiser(apply: Callable, params: Any) -> Callable:
    """`denoise_fn` of the samplers: the network on whole rows of one document."""
    return lambda z, sigma: apply(params, z, sigma)


def rows_on(mesh: Mesh, rows: int) -> int:
    """`rows`, or the next number that the mesh splits."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // ways) * ways


def to_text(tokenizer: Any, rows: np.ndarray) -> list[str]:
    """Rows of tokens as text, without ids that the tokenizer lacks (the mask)."""
    known = lambda row: [int(i) for i in row if i < tokenizer.vocab_size]  # noqa: E731
    return [tokenizer.decode(known(row)) for row in rows]


@dataclasses.dataclass(frozen=True)
class Denoised:
    """Perplexity under a bigram model of the training text, and unigram entropy, of written rows.

    Perplexity without entropy means nothing: a row of one token is very probable. The entropy of as
    many held-out rows stands beside them.
    """

    psi: Psi = Psi()
    rows: Annotated[int, "texts to write"] = 16

    def check(self, run) -> None:
        check_diffusion(run, "evaluator Denoised")
        if self.rows < 1:
            raise ValueError(f"evaluator Denoised: rows={self.rows} must be at least 1")
        self.psi.sampler(run.model.vocab, run.objective.prior)

    def make(self, scene):
        from train.data.bigram import fit_bigram
        from train.data.text import load_tokenizer

        run = scene.run
        config = self.psi.sampler(run.model.vocab, run.objective.prior)
        shape = (rows_on(scene.mesh, self.rows), run.source.seq_len)
        tokenizer = load_tokenizer(run.source.tokenizer)

        @jax.jit
        def write(params, key):
            tokens = sample(key, denoiser(scene.apply, params), config, shape)
            return tokens, jnp.mean(unigram_entropy(tokens, run.model.vocab))

        @functools.cache
        def judge():
            plain = dataclasses.replace(run.source, packing="concat")
            train, valid = (
                plain.make(run.batch, seed=run.seed, split=s) for s in ("train", "valid")
            )
            return fit_bigram(train, valid, run.model.vocab)

        def evaluate(params, step):
            key = jax.random.fold_in(jax.random.key(run.seed), step)
            tokens, entropy = jax.device_get(write(params, key))
            return {
                "denoised/perplexity": float(np.exp(judge()(tokens[:, :-1], tokens[:, 1:]))),
                "denoised/entropy": float(entropy),
                "sample": to_text(tokenizer, tokens[:1])[0],
            }

        return evaluate


def write_rows(run: Any, program: Any, params: Any, psi: Psi, rows: int, seed: int, views: int):
    """(caption, texts of the rows) of `views` moments of denoising, the last of them the end."""
    from train.data.text import load_tokenizer

    config = psi.sampler(run.model.vocab, run.objective.prior)
    tokenizer = load_tokenizer(run.source.tokenizer)
    shape = (rows_on(program.mesh, rows), run.source.seq_len)
    keys = jax.random.split(jax.random.key(seed))
    if views == 1:
        fn = lambda p: sample(keys[0], denoiser(program.apply, p), config, shape)  # noqa: E731
        yield "", to_text(tokenizer, np.asarray(jax.jit(fn)(params))[:rows])
        return

    @jax.jit
    def trace(params):
        uniforms = jax.random.uniform(keys[0], (config.steps + 1, *shape))
        if config.prior == "masked":
            start = jnp.full(shape, config.mask_id or 0)
        else:
            start = jax.random.randint(keys[1], shape, 0, config.vocab)
        return sample_from_uniforms(denoiser(program.apply, params), start, uniforms, config)

    final, states = jax.device_get(trace(params))
    for at in np.linspace(0, config.steps - 1, views - 1).astype(int):
        yield f"after {at + 1} of {config.steps} steps", to_text(tokenizer, states[at, :rows])
    yield "at the end", to_text(tokenizer, final[:rows])
