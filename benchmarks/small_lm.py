"""A small LaCT language model trained with one inner configuration and several seeds, compiled once."""

import dataclasses
import functools
import statistics
from typing import Any

import jax
import numpy as np

from configs.lact import run as lact
from jaxlab.ttt import InnerConfig
from train import trainer
from train.evaluate import HeldOut, Scene
from train.feed import global_batch
from train.run import Run
from train.state import init_params


def experiment(inner: InnerConfig, steps: int, batch: int) -> Run:
    """The preset `lact` with another inner configuration; its chunk stays."""
    preset = lact()
    settings = preset.model.lact
    inner = dataclasses.replace(inner, chunk_size=settings.inner.chunk_size)
    model = dataclasses.replace(preset.model, lact=dataclasses.replace(settings, inner=inner))
    return dataclasses.replace(preset, model=model, steps=steps, batch=batch).check(1)


def train_seeds(run: Run, seeds: int, batches: int) -> tuple[list[Any], list[float]]:
    """(parameters, held-out loss in nats) after training with seeds 0, 1...: of weights and data."""
    program = trainer.build(run, jax.devices()[:1])
    spec = run.source.spec(run.batch)
    module, inputs = run.model.build(jax.default_backend()), run.model.inputs(spec)
    start = jax.jit(lambda key: init_params(module, key, inputs))
    held_out = HeldOut(batches).make(Scene(run, program.apply, program.mesh, (0, 1)))
    found, losses = [], []
    with jax.set_mesh(program.mesh):
        for seed in range(seeds):
            rows: Any = run.source.make(run.batch, seed=seed, split="train")
            state = program.warm(start(jax.random.key(seed)))
            for step in range(run.steps):
                fetch = functools.partial(rows.batch_at, step)
                batch = global_batch(fetch, spec, program.mesh)
                state, _ = program.step(state, batch)
            losses.append(held_out(state.params, run.steps)["valid/loss"])
            found.append(jax.device_get(state.params))
    return found, losses


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and the standard error of it; 0 for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def verdict(first: list[float], second: list[float], sign: int) -> str:
    """Whether `second - first`, paired by seed, has the sign claimed, beyond two standard errors."""
    mean, error = mean_and_error(list(np.subtract(second, first)))
    if abs(mean) <= 2 * error:
        return "within noise"
    return "holds" if mean * sign > 0 else "reversed"
