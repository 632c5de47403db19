"""Rows of a diffusion model: the sampler around a run's denoiser, and what a judge says of its texts."""

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
    guidance: Annotated[
        float | None, "pull towards the class: 1, or none, as it is, 0 none at all"
    ] = None

    def sampler(
        self, vocab: int, prior: str, schedule: str = "log-linear", classes: int | None = None
    ) -> SamplerConfig:
        """The configuration of the sampler; ValueError for values that it cannot have."""
        if self.guidance is not None and classes is None:
            raise ValueError(f"guidance={self.guidance} needs a model of classes")
        spec = PsiSpec(
            self.profile, self.high, self.middle, self.low, self.high_frac, self.middle_frac
        )
        for part in ("high", "middle"):
            mode, share = getattr(self, part), getattr(self, f"{part}_frac")
            if mode != "pure-posterior" and not share:
                raise ValueError(f"{part}={mode!r} has no steps: give {part}_frac as well")
        return SamplerConfig(
            vocab, self.steps, prior, vocab - 1 if prior == "masked" else None, schedule,
            psi=spec, nucleus=self.nucleus, removal=self.removal, guidance=self.guidance,
            num_classes=classes,
        )  # fmt: skip

    def of(self, run: Any) -> SamplerConfig:
        """The same for the model that a run trains."""
        objective = run.objective
        schedule = getattr(objective, "schedule", "log-linear")
        classes = getattr(run.model, "classes", None)
        return self.sampler(run.model.vocab, objective.prior, schedule, classes)


def check_diffusion(run: Any, who: str) -> None:
    """ValueError unless `run` trains a diffusion model of text."""
    if not hasattr(run.objective, "prior") or not hasattr(run.source, "tokenizer"):
        raise ValueError(f"{who} needs a diffusion model of text, not {run.objective}")


def denoiser(apply: Callable, params: Any) -> Callable:
    """`denoise_fn` of the samplers: the network on whole rows of one document, or images."""

    def denoise(z, sigma, labels=None):
        return apply(params, z, sigma, **({} if labels is None else {"labels": labels}))

    return denoise


def every_class(run: Any, rows: int) -> jax.Array | None:
    """Labels [rows], one class after another; None for a model without classes."""
    classes = getattr(run.model, "classes", None)
    return None if classes is None else jnp.arange(rows) % classes


def rows_on(mesh: Mesh, rows: int) -> int:
    """`rows`, or the next number that the mesh splits."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return -(-rows // ways) * ways


def shown(source: Any) -> Callable[[np.ndarray], list[str]]:
    """What turns rows of a source's tokens into lines for a terminal."""
    from train.data.text import load_tokenizer

    if not hasattr(source, "tokenizer"):
        return source.text
    return functools.partial(to_text, load_tokenizer(source.tokenizer))


def to_text(tokenizer: Any, rows: np.ndarray) -> list[str]:
    """Rows of tokens as text, without ids that the tokenizer lacks (the mask)."""
    known = lambda row: [int(i) for i in row if i < tokenizer.vocab_size]  # noqa: E731
    return [tokenizer.decode(known(row)) for row in rows]


@dataclasses.dataclass(frozen=True)
class Denoised:
    """Perplexity under a bigram model of the training text, and unigram entropy, of written rows.

    Perplexity without entropy means nothing: a row of one token is very probable. Both of as many
    held-out rows stand beside them.
    """

    psi: Psi = Psi()
    rows: Annotated[int, "texts to write"] = 16

    def check(self, run) -> None:
        check_diffusion(run, "evaluator Denoised")
        if self.rows < 1:
            raise ValueError(f"evaluator Denoised: rows={self.rows} must be at least 1")
        self.psi.of(run)

    def make(self, scene):
        from train.data.bigram import fit_bigram

        run = scene.run
        config = self.psi.of(run)
        shape = (rows_on(scene.mesh, self.rows), run.source.seq_len)
        show = shown(run.source)

        @jax.jit
        def write(params, key):
            return sample(key, denoiser(scene.apply, params), config, shape)

        @functools.cache
        def judge():
            """The bigram model, and what it and the entropy say of held-out rows."""
            plain = dataclasses.replace(run.source, packing="concat")
            train, valid = (
                plain.make(run.batch, seed=run.seed, split=s) for s in ("train", "valid")
            )
            bigram = fit_bigram(train, valid, run.model.vocab)
            batches = range(min(valid.num_batches, -(-self.rows // run.batch)))
            rows = np.concatenate([valid.batch_at(i)["tokens"] for i in batches])[: self.rows]
            return bigram, figures(bigram, rows, "held_out_")

        def figures(bigram, tokens, prefix: str = "") -> dict[str, float]:
            entropy = jnp.mean(unigram_entropy(tokens, run.model.vocab))
            perplexity = np.exp(bigram(tokens[:, :-1], tokens[:, 1:]))
            return {
                f"denoised/{prefix}perplexity": float(perplexity),
                f"denoised/{prefix}entropy": float(entropy),
            }

        def evaluate(params, step):
            key = jax.random.fold_in(jax.random.key(run.seed), step)
            tokens = np.asarray(write(params, key))
            bigram, held_out = judge()
            return figures(bigram, tokens) | held_out | {"sample": show(tokens[:1])[0]}

        return evaluate


def write_rows(run: Any, program: Any, params: Any, psi: Psi, rows: int, seed: int, views: int):
    """(caption, lines of the rows) of `views` moments of denoising, the last of them the end.

    A model of classes writes them in turn, row i of class i modulo their number. ValueError for more views
    than there are moments.
    """
    config, show = psi.of(run), shown(run.source)
    if views > config.steps + 1:
        raise ValueError(
            f"--views {views}: with steps={config.steps} there are {config.steps + 1} moments to see"
        )
    shape = (rows_on(program.mesh, rows), run.source.seq_len)
    labels = every_class(run, shape[0])

    @jax.jit
    def write(params):
        denoise, key = denoiser(program.apply, params), jax.random.key(seed)
        return sample(key, denoise, config, shape, labels=labels, trajectory=views > 1)

    if views == 1:
        yield "", show(np.asarray(write(params))[:rows])
        return
    final, states = jax.device_get(write(params))
    for at in np.linspace(0, config.steps - 1, views - 1).astype(int):
        yield f"after {at + 1} of {config.steps} steps", show(states[at, :rows])
    yield "at the end", show(final[:rows])
