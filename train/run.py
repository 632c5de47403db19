"""A run's configuration: model x objective x source x sharding, and the trainer's own settings."""

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Annotated, Any

from sharding.mesh import MeshShape
from train.optimizer import Optimizer

ROOMS = ("jaxlab", "models", "train", "sharding")


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment. Every field can be overridden on the command line: `steps=100`, `optimizer.lr=1e-3`."""

    model: Any
    objective: Any
    source: Any
    evaluators: tuple[Any, ...] = ()
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    steps: Annotated[int, "optimiser steps"] = 300
    batch: Annotated[int, "global batch, in sequences"] = 16
    accumulate: Annotated[int, "microbatches a step"] = 1
    seed: Annotated[int, "of parameters, data order and objective noise"] = 0
    log_every: Annotated[int, "steps between log records"] = 10
    eval_every: Annotated[int, "steps between evaluations; 0: at the end only"] = 0
    save_every: Annotated[int, "steps between checkpoints; 0: at the end only"] = 100
    keep: Annotated[int, "newest checkpoints kept"] = 3
    max_bad_steps: Annotated[int, "non-finite steps in a row before the run stops"] = 10

    def check(self, n_devices: int) -> "Run":
        """The run with its mesh resolved; ValueError, naming field and fix, if it cannot work."""
        for name, least in (
            ("steps", 1), ("batch", 1), ("accumulate", 1), ("log_every", 1), ("keep", 1),
            ("max_bad_steps", 1), ("eval_every", 0), ("save_every", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        mesh = self.mesh.resolve(n_devices)
        sizes = dataclasses.asdict(mesh)
        self.optimizer.check()
        self.source.check(sizes)
        self.model.check(sizes)
        self.objective.check(self.model, self.source)
        rows = mesh.data * mesh.fsdp * self.accumulate
        if self.batch % rows:
            raise ValueError(
                f"batch={self.batch} is not divisible by mesh.data={mesh.data} * "
                f"mesh.fsdp={mesh.fsdp} * accumulate={self.accumulate}; use a multiple of {rows}"
            )
        for evaluator in self.evaluators:
            evaluator.check(self)
        return dataclasses.replace(self, mesh=mesh)


# Fields that may differ between a run and its resumption: they do not change what is learnt.
FREE = ("mesh.", "log_every", "eval_every", "save_every", "keep", "max_bad_steps", "evaluators",
        "model.dtype", "model.param_dtype", "model.remat", "model.attention", "objective.tiles",
        "source.cache_dir")  # fmt: skip


def to_json(value: Any) -> Any:
    """Plain JSON of nested dataclasses; each remembers its type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": name, **fields}
    return [to_json(v) for v in value] if isinstance(value, tuple | list) else value


def from_json(value: Any) -> Any:
    """Inverse of `to_json`; only types of this project are built."""
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    module, _, name = value["type"].partition(":")
    if module.split(".")[0] not in ROOMS:
        raise ValueError(f"config names the type {value['type']!r}, which is not of this project")
    cls = getattr(importlib.import_module(module), name)
    known = {f.name for f in dataclasses.fields(cls)}
    if extra := sorted(set(value) - known - {"type"}):
        raise ValueError(f"config of {name} has fields {extra} that this version does not know")
    return cls(**{k: from_json(v) for k, v in value.items() if k != "type"})


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"optimizer.lr": 0.003, ...} of a configuration or of its JSON."""
    if dataclasses.is_dataclass(value):
        value = to_json(value)
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return out


def difference(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Leaves that differ between two configurations: (path, old value, new value)."""
    a, b = flatten(old), flatten(new)
    paths = [*a, *(p for p in b if p not in a)]
    return [(p, a.get(p, "-"), b.get(p, "-")) for p in paths if a.get(p, "-") != b.get(p, "-")]


def load_run(path: Path) -> Run:
    """The run whose resolved configuration lies in `path`/config.json."""
    file = path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} is not a run directory: it has no config.json")
    try:
        return from_json(json.loads(file.read_text()))
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as a configuration: {error}") from error
