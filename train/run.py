"""A run's configuration: model x objective x source x sharding, and the trainer's own settings."""

import dataclasses
import importlib
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from sharding.mesh import MeshShape
from train.optimizer import Optimizer
from train.overrides import Kinds

ROOMS = ("jaxlab", "sharding", "models", "train", "configs")

SOURCES = Kinds(
    f"train.data.{name}"
    for name in (
        "text:Text",
        "labelled:Images",
        "labelled:Table",
        "tabular:Shipped",
        "digits:Digits",
    )
)

EVALUATORS = Kinds(
    f"train.{name}"
    for name in ("evaluate:HeldOut", "evaluate:Bigram", "evaluate:Sample", "denoise:Denoised",
                 "classified:Uncertainty", "tokens:Tokens")
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One experiment. Every field can be overridden on the command line: `steps=100`, `optimizer.lr=1e-3`."""

    model: Any
    objective: Any
    source: Annotated[Any, "where batches come from", SOURCES]
    evaluators: Annotated[tuple[Any, ...], "what is measured on held-out data", EVALUATORS] = ()
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    steps: Annotated[int, "optimiser steps"] = 300
    batch: Annotated[int, "global batch, in sequences"] = 16
    accumulate: Annotated[int, "microbatches a step"] = 1
    seed: Annotated[int, "of parameters, data order and objective noise"] = 0
    origin: Annotated[str, "whose weights step 0 holds, set by `jaxlab import`; '': random"] = ""
    start: Annotated[str, "run, or checkpoint of one, whose parameters step 0 takes; '': none"] = ""
    log_every: Annotated[int, "steps between log records"] = 10
    eval_every: Annotated[int, "steps between evaluations; 0: at the end only"] = 0
    save_every: Annotated[int, "steps between checkpoints; 0: at the end only"] = 100
    keep: Annotated[int, "newest checkpoints kept; at least 2, lest the newest be damaged"] = 3
    max_bad_steps: Annotated[int, "non-finite steps in a row before the run stops"] = 10

    def check(self, n_devices: int) -> "Run":
        """The run with its mesh resolved; ValueError, naming field and fix, if it cannot work."""
        for name, least in (
            ("steps", 1), ("batch", 1), ("accumulate", 1), ("log_every", 1), ("keep", 2),
            ("max_bad_steps", 1), ("eval_every", 0), ("save_every", 0), ("seed", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be below 2**32={2**32}")
        from train.feed import token_order

        mesh = self.mesh.resolve(n_devices)
        sizes = dataclasses.asdict(mesh)
        self.optimizer.check()
        self.source.check(sizes)
        self.model.check(sizes)
        self.objective.check(self.model, self.source)
        if self.optimizer.protect and not hasattr(self.objective, "reference"):
            raise ValueError(
                f"optimizer.protect={self.optimizer.protect}: objective {type(self.objective).__name__} "
                f"has no reference to protect"
            )
        token_order(self.model, self.source.spec(self.batch), sizes)
        rows = mesh.data * mesh.fsdp * self.accumulate
        if self.batch % rows:
            raise ValueError(
                f"batch={self.batch} is not divisible by mesh.data={mesh.data} * "
                f"mesh.fsdp={mesh.fsdp} * accumulate={self.accumulate}; use a multiple of {rows}"
            )
        for evaluator in self.evaluators:
            evaluator.check(self)
        return dataclasses.replace(self, mesh=mesh)


# Fields of a model that say how it is computed; what is learnt is the same.
HOW = ("dtype", "param_dtype", "remat", "context", "mlp_tiles")
COMPUTED = tuple(f"{model}.{field}" for model in ("model", "model.base") for field in HOW)
# Fields, or groups of fields, that may differ between a run and its resumption.
FREE = ("mesh", "log_every", "eval_every", "save_every", "keep", "max_bad_steps", "evaluators",
        *COMPUTED, "objective.tiles", "source.cache_dir")  # fmt: skip
# Those that mean something when the run is only evaluated.
EVALUATED = ("mesh", "evaluators", "batch", "source", "objective", "seed", *COMPUTED)


def within(path: str, groups: Iterable[str]) -> bool:
    """Whether the field `path` is one of `groups` or lies in one: model.dtype is not model.dtype_x."""
    return any(path == g or path.startswith(g + ".") for g in groups)


def to_json(value: Any) -> Any:
    """Plain JSON of nested dataclasses; each remembers its type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = f"{type(value).__module__}:{type(value).__qualname__}"
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": name, **fields}
    return [to_json(v) for v in value] if isinstance(value, tuple | list) else value


def from_json(value: Any) -> Any:
    """Inverse of `to_json`; only dataclasses of this project, or already imported, are built."""
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    module, _, name = value["type"].partition(":")
    # Besides the project's types, those of classes that the program at hand has imported.
    known_module = module.split(".")[0] in ROOMS or module in sys.modules
    cls = getattr(importlib.import_module(module), name, None) if known_module else None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"config names the type {value['type']!r}, which is not of this project")
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


# Begins the path of a tokenizer that lies in the run directory, as the run's config.json has it.
HERE = "{run}/"


def described(run: Run, folder: Path) -> Any:
    """JSON of a run that lies in `folder`; it holds wherever the folder is moved."""
    tokenizer = Path(getattr(run.source, "tokenizer", "")).absolute()
    if not tokenizer.is_relative_to(folder.absolute()):
        return to_json(run)
    inside = HERE + str(tokenizer.relative_to(folder.absolute()))
    source: Any = run.source
    return to_json(dataclasses.replace(run, source=dataclasses.replace(source, tokenizer=inside)))


def _read(file: Path) -> Run:
    """The run of a config.json, its paths those of today."""
    data = json.loads(file.read_text())
    if isinstance(data, dict) and "architectures" in data and "type" not in data:
        raise FileNotFoundError(
            f"{file.parent} is a Hugging Face directory, no run: "
            f"jaxlab import hf {shlex.quote(str(file.parent))} makes one of it"
        )
    run = from_json(data)
    tokenizer = getattr(run.source, "tokenizer", "")
    if not tokenizer.startswith(HERE):
        return run
    here = str(file.parent.absolute() / tokenizer.removeprefix(HERE))
    return dataclasses.replace(run, source=dataclasses.replace(run.source, tokenizer=here))


def load_run(path: Path) -> Run:
    """The run whose resolved configuration lies in `path`/config.json."""
    file = path / "config.json"
    if not file.is_file():
        if (path / "checkpoints").is_dir():
            raise FileNotFoundError(
                f"{path} has checkpoints but no config.json: put it back from a copy, or set all of it "
                f"aside with jaxlab train CONFIG --run-dir {shlex.quote(str(path))} --fresh"
            )
        raise FileNotFoundError(f"{path} is not a run directory: it has no config.json")
    try:
        return _read(file)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read as a configuration: {error}; put it back from a copy, or set the run "
            f"aside with jaxlab train CONFIG --run-dir {shlex.quote(str(path))} --fresh"
        ) from error
