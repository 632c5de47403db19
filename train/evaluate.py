"""Evaluators: each is made once for a run and then maps parameters to named values."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from train.feed import global_batch
from train.state import in_microbatches, prepared


@dataclasses.dataclass(frozen=True)
class Scene:
    """What an evaluator may use: the run, its model's apply, its mesh, this process's rows."""

    run: Any
    apply: Callable
    mesh: Mesh
    rows: tuple[int, int]
    order: np.ndarray | None = None  # of the tokens of a row
    folder: Path | None = None  # of pages and pictures; None: numbers only


class Evaluator(Protocol):
    """An evaluation, in two stages, so that compilation and data are paid once."""

    def check(self, run: Any) -> None:
        """ValueError when it cannot be applied to this run."""
        ...

    def make(self, scene: Scene) -> Callable[[Any, int], dict[str, float | str]]:
        """Function of (parameters, step) that returns named numbers and texts."""
        ...


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Metrics of the objective on the held-out split, exact over the tokens seen."""

    batches: Annotated[int, "batches of the held-out split; 0: all of it"] = 8
    passes: Annotated[int, "times over them, where the objective draws noise"] = 1

    def check(self, run) -> None:
        for name, least in (("batches", 0), ("passes", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"evaluators {name}={getattr(self, name)} must be at least {least}"
                )

    def make(self, scene):
        run, index_count = scene.run, scene.rows
        rows = run.source.make(
            run.batch, seed=run.seed, split="valid",
            process_index=index_count[0], process_count=index_count[1],
        )  # fmt: skip
        total = rows.num_batches if self.batches == 0 else min(self.batches, rows.num_batches)

        @jax.jit
        def metrics(params, batch, i):
            found = lambda part, key: run.objective(scene.apply, params, part, key)[1]  # noqa: E731
            # Noise of its own for every batch, the same for every run: what differs is the model.
            key = jax.random.fold_in(jax.random.key(0), i)
            batch = prepared(run.objective, batch, key)
            return in_microbatches(found, run.accumulate, batch, key)

        def evaluate(params, step):
            sums: dict[str, np.ndarray] = {}
            for i in range(max(total, 1) * self.passes):
                fetch = lambda r, i=i: rows.batch_at(i % max(total, 1), r)  # noqa: E731
                batch = global_batch(fetch, rows.spec, scene.mesh, scene.order)
                for name, pair in jax.device_get(metrics(params, batch, i)).items():
                    sums[name] = sums.get(name, 0.0) + np.asarray(pair, np.float64)
            return {f"valid/{n}": float(s / max(w, 1e-30)) for n, (s, w) in sums.items()}

        return evaluate


@dataclasses.dataclass(frozen=True)
class Bigram:
    """Loss of a smoothed bigram model fitted on the training split: the bar to beat."""

    def check(self, run) -> None:
        if not hasattr(run.source, "tokenizer"):
            raise ValueError("evaluator Bigram needs a text source")

    def make(self, scene):
        from train.data.bigram import bigram_loss

        run = scene.run
        value: list[float] = []

        def evaluate(params, step):
            if not value:
                plain = dataclasses.replace(run.source, packing="concat")
                train, valid = (
                    plain.make(run.batch, seed=run.seed, split=s) for s in ("train", "valid")
                )
                value.append(float(bigram_loss(train, valid, run.model.vocab)))
            return {"valid/bigram": value[0]}

        return evaluate


@dataclasses.dataclass(frozen=True)
class Sample:
    """A continuation written by the model."""

    prompt: Annotated[str, "text to continue"] = "The "
    tokens: Annotated[int, "tokens to write"] = 200
    temperature: Annotated[float, "0: greedy"] = 0.8

    def check(self, run) -> None:
        if self.tokens < 1 or self.temperature < 0:
            raise ValueError(
                f"evaluator Sample: tokens={self.tokens} must be >= 1 and "
                f"temperature={self.temperature} >= 0"
            )

    def make(self, scene):
        from jaxlab.sampling import Sampling
        from train.data.text import load_tokenizer
        from train.writer import Writer

        run = scene.run
        writer = Writer(
            run.model.build(scene.mesh.devices.flat[0].platform),
            load_tokenizer(run.source.tokenizer),
            [self.prompt],
            tokens=self.tokens, samples=1, sampling=Sampling(self.temperature), piece=self.tokens,
        )  # fmt: skip

        def evaluate(params, step):
            key = jax.random.fold_in(jax.random.key(run.seed), step)
            text = "".join(text for _, text, _ in writer.write(params, key))
            return {"sample": self.prompt + text}

        return evaluate
