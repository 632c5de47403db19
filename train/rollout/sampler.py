"""Answers to problems, sampled with sharded parameters and verified on the host."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.rl import logprobs_from_logits
from jaxlab.sampling import Sampling
from models.generate import generate
from train.data.problems import Problems, prompt_ids
from train.data.tokenizers import load_tokenizer
from train.evaluate import Scene


class Answers(NamedTuple):
    """n answers to each of p problems, on the host."""

    rows: dict[str, np.ndarray]  # [p * n, t]: tokens, targets, positions, segment_ids, mask, logp_*
    lengths: np.ndarray  # [p, n], tokens of an answer, its end included
    correct: np.ndarray  # [p, n] float32


class Sampler:
    """Samples and verifies; compiled once for a number of problems, `samples` of each.

    One program generates, with one prefill a problem, and, if `score`, scores what was generated:
    log-probabilities under the parameters (`logp_old`) and under `reference`, if there is one
    (`logp_ref`), beside those of the distribution that was drawn from (`logp_sampler`); and what the value
    head says, if the model has one (`values_old`). Sample j of problem i comes from the key
    fold_in(fold_in(key, i), j): it depends neither on batch nor mesh.
    """

    def __init__(self, scene: Scene, samples: int, split: str, seed: int, *, score: bool = False):
        run, source = scene.run, scene.run.source
        self.samples, self.prompt, self.new = samples, source.prompt, source.new
        self._problems = Problems(source.tasks, seed, split)
        self._tokenizer = load_tokenizer(source.tokenizer)
        self._everywhere = NamedSharding(scene.mesh, P())
        stop = () if self._tokenizer.eos is None else (self._tokenizer.eos,)
        temperature = getattr(source, "temperature", 1.0)
        module = run.model.build(scene.mesh.devices.flat[0].platform)
        apply = scene.apply if score else None
        self._valued = getattr(run.model, "value_head", False)
        self._roll = jax.jit(
            functools.partial(
                self._program, module, apply, stop, Sampling(temperature), temperature
            ),
            out_shardings=self._everywhere,
        )

    def _program(self, module, apply, stop, sampling, temperature, params, reference, *asked):
        prompts, lengths, keys = asked
        made = generate(
            module, params, prompts, lengths, keys,
            new=self.new, samples=self.samples, stop=stop, sampling=sampling,
        )  # fmt: skip
        rows = _rows(prompts, lengths, made)

        def hidden(params):
            inputs = rows["tokens"], rows["positions"], rows["segment_ids"]
            return apply(params, *inputs, method="hidden")

        def score(params, states):
            targets = jnp.maximum(rows["targets"], 0)
            logits = apply(params, states, method="logits")
            return rows["mask"] * logprobs_from_logits(logits, targets, temperature=temperature)

        if apply is not None:
            states = hidden(params)
            rows["logp_old"] = score(params, states)
            if self._valued:
                rows["values_old"] = rows["mask"] * apply(params, states, method="values")
        if reference is not None:
            rows["logp_ref"] = score(reference, hidden(reference))
        return made.tokens, made.lengths, rows

    def __call__(self, params: Any, indices: range, key: jax.Array, reference=None) -> Answers:
        """Answers to the problems of these numbers."""
        problems = [self._problems[i] for i in indices]
        asked = [prompt_ids(self._tokenizer, p["question"], self.prompt) for p in problems]
        prompts = np.zeros((len(asked), self.prompt), np.int32)
        for line, ids in zip(prompts, asked, strict=True):
            line[: len(ids)] = ids
        lengths = np.asarray([len(ids) for ids in asked], np.int32)
        numbers = np.asarray([i % 2**31 for i in indices], np.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        tokens, made, rows = jax.device_get(self._roll(params, reference, prompts, lengths, keys))
        correct = np.zeros(made.shape, np.float32)
        for at, size in np.ndenumerate(made):
            ids = [t for t in tokens[at][:size] if t != self._tokenizer.eos]
            text = self._tokenizer.decode(ids)
            i = at[0]
            correct[at] = self._problems.correct(indices[i], problems[i], text)
        return Answers(rows, made, correct)

    def task_of(self, i: int) -> str:
        """The name of the dataset of problem i."""
        return self._problems.names[i % len(self._problems.names)]


def _rows(prompts, lengths, made) -> dict[str, jax.Array]:
    """Prompt and answer of every sample in one right-padded row, as supervised rows are."""
    b, n, new = made.tokens.shape
    repeat = lambda x: jnp.repeat(x, n, 0)  # noqa: E731
    flat = lambda x: x.reshape(b * n, new)  # noqa: E731
    begin, size = repeat(lengths)[:, None], made.lengths.reshape(-1, 1)
    at = jnp.arange(prompts.shape[1] + new)[None]
    answer = lambda x, shift: jnp.take_along_axis(  # noqa: E731
        flat(x), jnp.clip(at + shift - begin, 0, new - 1), 1
    )
    asked = jnp.pad(repeat(prompts), ((0, 0), (0, new)))
    real = at < begin + size
    mask = (at >= begin - 1) & (at < begin + size - 1)
    return {
        "tokens": jnp.where(real, jnp.where(at < begin, asked, answer(made.tokens, 0)), 0),
        "targets": jnp.where(mask, answer(made.tokens, 1), -1),
        "positions": jnp.where(real, at, 0).astype(jnp.int32),
        "segment_ids": real.astype(jnp.int32),
        "mask": mask.astype(jnp.float32),
        "logp_sampler": jnp.where(mask, answer(made.sampling_logprobs, 1), 0),
    }
