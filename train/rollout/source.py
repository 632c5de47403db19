"""Rollouts as a source of the trainer: answers of the current policy, verified, as batches."""

import base64
import dataclasses
import functools
import io
from collections.abc import Mapping
from typing import Annotated, Any

import jax
import numpy as np

from train.data.reason import Reason
from train.data.tokenizers import TokenRows
from train.evaluate import Scene
from train.feed import global_batch
from train.folders import starting_parameters
from train.rollout.advantages import Advantage, shape
from train.rollout.sampler import Sampler

ROWS = ("mask", "logp_old", "logp_sampler")  # float32 [rows, tokens]
VALUED = ("adv", "returns", "values_old")  # of a value head, float32 [rows, tokens]
COLUMNS = ("adv", "adv_reference", "informative", "reward", "length")  # float32 [rows]


class Sampled(TokenRows):
    """What sources that sample from the current parameters share."""

    samples: int
    temperature: float
    lag: int
    reference: bool
    advantage: Any

    def check_sampling(self) -> None:
        """ValueError naming the field that cannot work."""
        for name, least in (("samples", 1), ("lag", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"source.{name}={getattr(self, name)} must be at least {least}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"source.temperature={self.temperature} must be finite and above 0")

    def check_batch(self, batch: int) -> None:
        """ValueError unless a batch holds whole groups."""
        if batch % self.samples:
            raise ValueError(
                f"batch={batch} is not divisible by source.samples={self.samples}: a batch holds whole "
                f"groups"
            )


@dataclasses.dataclass(frozen=True)
class Rollouts(Reason, Sampled):
    """Sampled answers to reasoning-gym problems with what policy losses need; a batch counts answers."""

    samples: Annotated[int, "answers a problem; they share its prefill"] = 8
    temperature: Annotated[float, "of sampling, and of the log-probabilities of the loss"] = 1.0
    lag: Annotated[int, "updates that a sample may be old; 0: every batch is on-policy"] = 0
    advantage: Advantage = Advantage()
    reference: Annotated[bool, "log-probabilities of the starting parameters, for the KL"] = False

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work."""
        super().check(mesh_sizes)
        self.check_sampling()
        self.advantage.check(self.samples, self.new)

    def spec(self, batch: int):
        """Names, shapes and dtypes of a global batch."""
        self.check_batch(batch)
        tokens = jax.ShapeDtypeStruct((batch, self.seq_len), np.float32)
        column = jax.ShapeDtypeStruct((batch,), np.float32)
        rows = ROWS + ("logp_ref",) * self.reference + VALUED * (self.advantage.kind == "gae")
        return super().spec(batch) | dict.fromkeys(COLUMNS, column) | dict.fromkeys(rows, tokens)

    def make(
        self, batch: int, *, seed: int, split: str, process_index: int = 0, process_count: int = 1
    ) -> "Collector":
        """The source of training batches; held-out problems are those of the evaluators."""
        if split != "train":
            raise ValueError("rollouts have no held-out rows: use the evaluator PassAtK")
        return Collector(self, batch, seed)


class Collected:
    """Batches that look at the parameters: `lag + 1` of them are collected at once, then used in turn.

    Every process makes the same whole batch. Randomness comes from the seed and the numbers of the
    problems, which follow from the step; what is collected and not yet used is the state, so that a
    run goes on exactly wherever it was killed. The collecting itself is `_collect` of a subclass.
    """

    _scene: Scene

    def __init__(self, config: Any, batch: int, seed: int):
        self.config, self.batch, self.seed = config, batch, seed
        self.spec = config.spec(batch)
        self._waiting: list[dict[str, np.ndarray]] = []

    def _collect(self, step: int, params: Any) -> dict[str, np.ndarray]:
        """The whole batch of a step."""
        raise NotImplementedError

    def batch_from(self, step: int, params: Any) -> Mapping[str, jax.Array]:
        """The global batch of a step, of samples at most `lag` updates old."""
        if not self._waiting:
            count = self.config.lag + 1
            self._waiting = [self._collect(s, params) for s in range(step, step + count)]
        whole = self._waiting.pop(0)
        fetch = lambda rows: {name: x[rows] for name, x in whole.items()}  # noqa: E731
        return global_batch(fetch, self.spec, self._scene.mesh, self._scene.order)

    def get_state(self) -> str | None:
        """What is collected and not yet used, as text; None if nothing is."""
        if not self._waiting:
            return None
        file = io.BytesIO()
        named: Any = {
            f"{i}/{n}": x for i, rows in enumerate(self._waiting) for n, x in rows.items()
        }
        np.savez_compressed(file, **named)
        return base64.b64encode(file.getvalue()).decode()

    def set_state(self, state: str) -> None:
        """Goes on from `get_state`."""
        with np.load(io.BytesIO(base64.b64decode(state))) as held:
            count = len(held.files) // len(self.spec)
            self._waiting = [{n: held[f"{i}/{n}"] for n in self.spec} for i in range(count)]


class Collector(Collected):
    """`Collected` answers to problems."""

    def attach(self, scene: Scene) -> None:
        """Takes what sampling needs of a run: model, mesh, and the parameters it starts from."""
        self._scene, c = scene, self.config
        self._sampler = Sampler(scene, c.samples, "train", self.seed, score=True)
        self._shape = jax.jit(functools.partial(shape, config=c.advantage, new=c.new))
        self._reference = starting_parameters(scene.run) if c.reference else None

    def _collect(self, step: int, params: Any) -> dict[str, np.ndarray]:
        c, problems = self.config, self.batch // self.config.samples
        key = jax.random.fold_in(jax.random.key(self.seed), 1)  # key 0 is the parameters'
        indices = range(step * problems, (step + 1) * problems)
        got = self._sampler(params, indices, key, self._reference)
        columns = self._shape(
            got.correct, got.lengths, got.rows["mask"], got.rows.get("values_old")
        )
        rows = got.rows | jax.device_get(columns)
        rows |= {
            "reward": got.correct.reshape(-1),
            "length": got.lengths.reshape(-1).astype(np.float32),
        }
        if c.advantage.dynamic:
            rows["mask"] = rows["mask"] * rows["informative"][:, None]
        return {name: rows[name] for name in self.spec}
