"""Run directories as a command is given them: written to by `train`, read by `eval` and `sample`."""

import argparse
import dataclasses
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from train.devices import start
from train.errors import NoUsableCheckpoint


def check_folder(folder: Path, fresh: bool) -> None:
    """ValueError, naming --run-dir, where no run can be written or gone on with."""
    above = (folder, *folder.parents)
    file = next((p for p in above if p.is_file()), None)
    if file is not None:
        raise ValueError(f"--run-dir {folder}: {file} is a file, not a folder")
    there = next(p for p in above if p.is_dir())
    try:
        # A file without a name: nothing of it is seen.
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"--run-dir {folder}: {there} cannot be written ({error.strerror})"
        ) from error
    if (folder / "checkpoints").is_dir() and not (fresh or (folder / "config.json").is_file()):
        raise ValueError(
            f"--run-dir {folder} has checkpoints but no config.json: put it back from a copy, or set all "
            f"of it aside with --fresh"
        )


def blame(error: OSError, run: Any, folder: Path) -> OSError:
    """The error with the argument that names the place where it happened."""
    if not error.filename:
        return error
    at = Path(error.filename)
    cache = getattr(run.source, "cache_dir", "")
    for name, place in ((f"source.cache_dir={cache}", cache), (f"--run-dir {folder}", folder)):
        if place and (at.is_relative_to(place) or Path(place).is_relative_to(at)):
            return OSError(f"{name} cannot be written: {error.strerror}")
    return error


def open_run(args: argparse.Namespace, assignments: list[str], evaluators: bool):
    """Run, program, parameters and step of a run directory; nothing but the parameters is read."""
    import jax

    from train.overrides import override
    from train.run import EVALUATED, flatten, load_run, within

    folder, step = args.run, args.step
    run = load_run(folder)
    paths = [text.partition("=")[0] for text in assignments]
    override(run, assignments)
    strange = [path for path in paths if not within(path, EVALUATED)]
    if strange:
        here = [g for g in EVALUATED if any(within(field, [g]) for field in flatten(run))]
        raise ValueError(
            f"{strange[0]} means nothing to `jaxlab {args.command}`; what does: {', '.join(here)}"
        )
    devices = start(args)
    shape = type(run.mesh)(data=1)
    if not any(within(path, ("mesh",)) for path in paths):
        shape = mesh_here(run.mesh, devices, jax.process_count())
    if not evaluators:
        run = dataclasses.replace(run, evaluators=())
    run = override(dataclasses.replace(run, mesh=shape), assignments).check(devices)
    return run, *parameters(run, folder, step)


def parameters(run: Any, folder: Path, step: int | None):
    """Program, parameters (their average if there is one) and step of a checked run, from its folder."""
    from train import trainer
    from train.checkpoint import Checkpoints

    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    if step is not None and step not in checkpoints.steps():
        raise ValueError(f"--step {step}: {folder} has checkpoints of steps {checkpoints.steps()}")
    program = trainer.build(run)
    only = "ema" if run.optimizer.ema else "params"
    try:
        got = checkpoints.restore(program.state, step, only=only)
    except NoUsableCheckpoint as error:
        raise ValueError(
            f"{error}; jaxlab train {shlex.quote(str(folder))} makes one, or put one back from a copy"
        ) from error
    for at, why in got.rejected.items():
        print(f"jaxlab: checkpoint step {at} passed over: {why}", file=sys.stderr)
    checkpoints.close()
    return program, got.state, got.step


def starting_run(run: Any):
    """(run, folder, step) that `run.start` names, with the model and mesh of `run`, which is checked.

    Only a value head may be missing there. ValueError when it names none, or one of another model.
    """
    from train.report import locate
    from train.run import COMPUTED, difference, load_run, within

    if not run.start:
        raise ValueError("start='' must name the run whose parameters are the reference")
    folder, step = locate(Path(run.start))
    before = load_run(folder)
    model = run.model
    if getattr(model, "value_head", False) and not getattr(before.model, "value_head", True):
        model = dataclasses.replace(model, value_head=False)
    for path, old, new in difference(before.model, model):
        if not within(f"model.{path}", COMPUTED):
            raise ValueError(f"start={run.start}: its model.{path} is {old}, here it is {new}")
    return dataclasses.replace(before, model=model, mesh=run.mesh), folder, step


def starting_parameters(run: Any):
    """The parameters of `starting_run`, placed as `run` has its own; a new value head is zero."""
    import numpy as np
    from jax import dtypes

    params = parameters(*starting_run(run))[1]
    if getattr(run.model, "value_head", False) and "value" not in params:
        kind = dtypes.canonicalize_dtype(run.model.param_dtype)
        params |= {"value": np.zeros(run.model.d_model, kind)}
    return params


SOURCE_CONFIG = "hf_config.json"  # the config.json of what was imported, in its run


def end_tokens(folder: Path) -> list[int]:
    """Tokens that end a text as an imported model says; [] for other runs."""
    from models.json_object import read_json

    files = [folder / name for name in ("generation_config.json", SOURCE_CONFIG)]
    said = [read_json(file).get("eos_token_id") for file in files if file.is_file()]
    return sorted(
        {i for ids in said for i in (ids if isinstance(ids, list) else [ids]) if i is not None}
    )


def mesh_here(mesh: Any, devices: int, processes: int) -> Any:
    """The run's own mesh where it fits; else one device, or with several processes all of them."""
    try:
        shape = mesh.resolve(devices)
    except ValueError:
        shape = None
    if shape is not None and (processes == 1 or shape.size == devices):
        return shape
    return type(mesh)(data=1 if processes == 1 else -1)
