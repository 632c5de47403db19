"""The run directory: whose run it holds, what ran it, and what is left there for a post-mortem."""

import contextlib
import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train.errors import RunFailed
from train.processes import all_agree, all_or_none
from train.run import FREE, Run, described, difference, within

LOCK = "lock"


@contextlib.contextmanager
def claimed(folder: Path, fresh: bool) -> Iterator[None]:
    """Holds the run directory, made if need be, against other runs; `fresh` renames an earlier one.

    ValueError while another process holds it. The lock ends with the process that has it.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock(folder))
        if fresh and {p.name for p in folder.iterdir()} - {LOCK}:
            # The lock goes with the folder that is renamed.
            aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%dT%H%M%S')}")
            folder.rename(aside)
            print(f"jaxlab: the earlier run is now {aside}", file=sys.stderr)
            stack.enter_context(_lock(folder))
        yield


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            raise ValueError(
                f"{folder} is in use by {owner}: wait for it, or give another --run-dir"
            ) from None
        except OSError:  # a file system without locks
            pass
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


@contextlib.contextmanager
def failures(folder: Path, checkpoints) -> Iterator[None]:
    """Turns what breaks a running run into `RunFailed`, saying what is left and where to look."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if "RESOURCE_EXHAUSTED" in why and "No space" not in why:
            why += " (out of memory: smaller batch, accumulate=N, model.remat=full or more fsdp)"
        if jax.process_count() == 1:  # a dead process never finishes its part
            with contextlib.suppress(Exception):
                checkpoints.wait()  # what is being written may still be complete
        steps = checkpoints.steps()
        left = f"the last complete checkpoint is step {steps[-1]}" if steps else "nothing was saved"
        report = (
            folder / f"failure-{time.strftime('%Y%m%dT%H%M%S')}-process{jax.process_index()}.txt"
        )
        with contextlib.suppress(OSError):
            report.write_text(traceback.format_exc())
            left += f"; details in {report}"
        raise RunFailed(f"the run failed: {why}; {left}; the same command resumes") from error


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write in that becomes `folder` if the block ends well; all processes enter together.

    What a killed process has left, in `folder`.partial, is removed by the next one. ValueError while
    another process writes there.
    """
    folder = folder.absolute()
    partial = folder.with_name(f"{folder.name}.partial")
    with contextlib.ExitStack() as stack:
        with all_or_none():
            if jax.process_index() == 0:
                stack.enter_context(_lock(partial))
                stack.callback(shutil.rmtree, partial, ignore_errors=True)
                shutil.rmtree(partial / "new", ignore_errors=True)
                (partial / "new").mkdir()
        done = False
        try:
            yield partial / "new"
            done = True
        finally:  # a process that fails must not leave the others waiting
            done = all_agree(done)
        if not done:
            raise ValueError(f"another process could not write {folder}: see its output")
        if jax.process_index() == 0:
            (partial / "new").rename(folder)


def reconcile(run: Run, folder: Path, allow: tuple[str, ...]) -> None:
    """ValueError, with the difference, when `folder` holds a run that learns something else."""
    file = folder / "config.json"
    if not file.is_file():
        left = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        if "checkpoints" in left:
            raise ValueError(
                f"{folder} has checkpoints but no config.json: put it back (jaxlab inspect {folder} "
                f"shows what was in it), or use --fresh to set that run aside"
            )
        if left - {LOCK, "config.json.tmp"}:
            raise ValueError(
                f"{folder} is not empty and holds no run: give another --run-dir, nothing was touched"
            )
        return
    try:
        # As JSON: the types of a user's own classes need not be known here.
        there = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(
            f"{file} cannot be read as a configuration ({error}): put it right, or use --fresh to set "
            f"that run aside"
        ) from error
    changed = difference(there, described(run, folder))
    # With nothing but a step 0 (an imported model) only the model is settled.
    if any((folder / "checkpoints").glob("[1-9]*")):
        fixed = [c for c in changed if not within(c[0], (*FREE, *allow))]
    else:
        fixed = [c for c in changed if within(c[0], ("model",)) and not within(c[0], FREE)]
    if fixed:
        lines = "\n".join(f"  {path}: {old!r} there, {new!r} now" for path, old, new in fixed[:20])
        raise ValueError(
            f"{folder} holds a run with another configuration:\n{lines}\n"
            f"use another --run-dir, --fresh to set that run aside, or --allow FIELD to go on with it"
        )


def begins(folder: Path, fresh: bool) -> bool:
    """Whether a run in `folder` starts at step 0 rather than from a checkpoint of its own."""
    return fresh or not any((folder / "checkpoints").glob("[0-9]*"))


def refuse_random(run: Run, folder: Path, fresh: bool) -> None:
    """ValueError where a run of imported weights would start from random ones."""
    if run.origin and begins(folder, fresh):
        kind = "teacher" if hasattr(run.objective, "refresh") else "hf"
        raise ValueError(
            f"the run starts from the weights of {run.origin}, and {folder} would start from random "
            f"ones: jaxlab import {kind} {shlex.quote(run.origin)} --run-dir NEW makes another run of "
            f"them; origin= starts from random ones"
        )


def write_description(run: Run, folder: Path) -> None:
    """config.json, and one more entry in versions.json: packages, commit, devices, command."""
    from importlib.metadata import version

    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "commit": commit.stdout.strip() or None,
        "dirty": bool(dirty.stdout.strip()),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "command": sys.argv,
    }
    folder.mkdir(parents=True, exist_ok=True)
    history = []
    with contextlib.suppress(OSError, ValueError):
        history = json.loads((folder / "versions.json").read_text())
    for name, value in (
        ("config.json", described(run, folder)),
        ("versions.json", [*history, entry]),
    ):
        temporary = folder / f"{name}.tmp"
        temporary.write_text(json.dumps(value, indent=1) + "\n")
        temporary.replace(folder / name)


def save_batch(folder: Path, step: int, batch: dict[str, jax.Array]) -> Path:
    """Writes a batch to an .npz for inspection; what other processes hold is 0 in it."""
    path = folder / f"bad-batch-step{step}-process{jax.process_index()}.npz"
    arrays: dict[str, Any] = {}
    for name, value in batch.items():
        arrays[name] = np.zeros(value.shape, value.dtype)
        for shard in value.addressable_shards:
            arrays[name][shard.index] = np.asarray(shard.data)
    np.savez(path, **arrays)
    return path
