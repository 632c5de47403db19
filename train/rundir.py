"""The run directory: whose run it holds, what ran it, and what is left there for a post-mortem."""

import contextlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from train.run import FREE, Run, difference, load_run, to_json


class RunFailed(RuntimeError):
    """The run broke while it was running: a disk, a device or another process."""


@contextlib.contextmanager
def failures(checkpoints) -> Iterator[None]:
    """Turns what the outside world does to a running run into `RunFailed`, saying what is left."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        if "RESOURCE_EXHAUSTED" in why and "No space" not in why:
            why += " (out of memory: smaller batch, accumulate=N, model.remat=full or more fsdp)"
        steps = checkpoints.steps()
        left = f"the last complete checkpoint is step {steps[-1]}" if steps else "nothing was saved"
        raise RunFailed(f"the run failed: {why}; {left}; the same command resumes") from error


def reconcile(run: Run, folder: Path, allow: tuple[str, ...]) -> None:
    """ValueError, with the difference, when `folder` holds a run that learns something else."""
    if not (folder / "config.json").is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} is not empty and holds no run: give another --run-dir, nothing was touched"
            )
        return
    changed = difference(load_run(folder), run)
    # With nothing but a step 0 (an imported model) only the model is settled.
    if any((folder / "checkpoints").glob("[1-9]*")):
        fixed = [c for c in changed if not c[0].startswith((*FREE, *allow))]
    else:
        fixed = [c for c in changed if c[0].startswith("model.") and not c[0].startswith(FREE)]
    if fixed:
        lines = "\n".join(f"  {path}: {old!r} there, {new!r} now" for path, old, new in fixed[:20])
        raise ValueError(
            f"{folder} holds a run with another configuration:\n{lines}\n"
            f"use another --run-dir, --fresh to set that run aside, or --allow FIELD to go on with it"
        )


def write_description(run: Run, folder: Path) -> None:
    """config.json and versions.json; an earlier config.json is kept in the list of versions."""
    folder.mkdir(parents=True, exist_ok=True)
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
    path = folder / "versions.json"
    history = json.loads(path.read_text()) if path.is_file() else []
    path.write_text(json.dumps([*history, entry], indent=1) + "\n")
    temporary = folder / "config.json.tmp"
    temporary.write_text(json.dumps(to_json(run), indent=1) + "\n")
    temporary.replace(folder / "config.json")


def save_batch(folder: Path, step: int, batch: dict[str, jax.Array]) -> Path:
    """Writes the rows held by this process to an .npz for inspection."""
    path = folder / f"bad-batch-step{step}-process{jax.process_index()}.npz"
    held = lambda v: [np.asarray(s.data) for s in v.addressable_shards if s.replica_id == 0]  # noqa: E731
    np.savez(path, **{k: np.concatenate(held(v) or [np.zeros(0)]) for k, v in batch.items()})  # pyright: ignore[reportArgumentType]
    return path
