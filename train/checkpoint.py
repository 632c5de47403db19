"""Checkpoints: asynchronous, atomic and verified; the one module that knows Orbax."""

import contextlib
import dataclasses
import logging
import math
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32

from train.errors import NoUsableCheckpoint
from train.processes import all_agree, all_or_none

# What fails is raised here as well; their logs, from other threads, are tracebacks of it. Of a damaged
# checkpoint Orbax reports the first bad array, asyncio would print all the others.
for noisy in ("absl", "orbax", "asyncio"):
    logging.getLogger(noisy).setLevel(logging.CRITICAL)


# Bytes compressed in one piece, and collected before they are written: with Orbax's defaults, a whole
# array and 2 GiB, saving takes the memory of the state again.
PIECE, FILE = 2**25, 2**27


@jax.jit
def fingerprint(tree: Any) -> UInt32[Array, "leaves"]:
    """One checksum a leaf: sum over elements i of bits_i * (2 i + 1), modulo 2^32.

    Integer sums are exact in any order, so the value does not depend on the mesh; 2 i + 1 is odd, so
    every single flipped bit changes it. One program: many at once would block each other's
    collectives.
    """
    return jnp.stack([_checksum(x) for x in jax.tree.leaves(tree)])


def _checksum(x: jax.Array) -> jax.Array:
    width = x.dtype.itemsize * 8
    bits = jax.lax.bitcast_convert_type(x, f"uint{min(width, 32)}").astype(jnp.uint32)
    index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
    for axis in reversed(range(bits.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index, stride = index + place * np.uint32(stride % 2**32), stride * bits.shape[axis]
    # Two sums in one reduction: the compiler then makes no array of what is summed.
    zero = np.uint32(0)
    add = lambda a, b: (a[0] + b[0], a[1] + b[1])  # noqa: E731
    weighted, plain = jax.lax.reduce((bits * index, bits), (zero, zero), add, range(bits.ndim))
    return 2 * weighted + plain


def state_bytes(abstract: Any) -> int:
    """Bytes of the whole state, over all devices."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(abstract))


def _paths(tree: Any) -> list[str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


class StructureError(ValueError):
    """The checkpoint is sound but belongs to another model or optimiser."""


@dataclasses.dataclass
class Restored:
    """What came back: the state, the step's metadata, and the newer steps found unreadable."""

    state: Any
    step: int
    meta: dict[str, Any]
    rejected: dict[int, str]


class Checkpoints:
    """The checkpoints of one run directory.

    A step appears by an atomic rename when every process has written its shards, so a killed save
    leaves the step before. Unreadable steps are renamed `corrupt-STEP-TIME`, never deleted.
    """

    def __init__(self, folder: Path | str, keep: int = 3, read_only: bool = False):
        self.folder = Path(folder).absolute()
        self.read_only = read_only
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            read_only=read_only,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
        )
        self._manager: ocp.CheckpointManager | None = None
        self._handler = ocp.PyTreeCheckpointHandler()

    @property
    def manager(self) -> ocp.CheckpointManager:
        """The Orbax manager, made at first use (it creates the folder)."""
        if self._manager is None:
            handlers = {"state": self._handler, "meta": ocp.JsonCheckpointHandler()}
            self._manager = ocp.CheckpointManager(
                self.folder, options=self._options, item_handlers=handlers
            )
        return self._manager

    def steps(self) -> list[int]:
        """Complete steps on disk, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name) for p in self.folder.iterdir() if p.name.isdigit())

    def save(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """Starts saving; returns when the state is copied off the devices. Skips a step on disk.

        OSError before anything is written when the disk has no room for it.
        """
        if step in self.steps():
            return
        check_space(self.folder, state_bytes(state))
        sums = [int(s) for s in np.asarray(fingerprint(state))]
        meta = meta | {"step": step, "fingerprint": dict(zip(_paths(state), sums, strict=True))}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(
                state,
                save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=PIECE), state),
                ocdbt_target_data_file_size=FILE,
            ),
            meta=ocp.args.JsonSave(meta),
        )
        self.manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Blocks until every started save is on disk; raises what went wrong with it."""
        if self._manager is not None:
            self._manager.wait_until_finished()

    def preempted(self, step: int) -> bool:
        """True on every process at the same step once any of them got SIGTERM (several processes)."""
        return jax.process_count() > 1 and self.manager.reached_preemption(step)

    def meta(self, step: int) -> dict[str, Any]:
        """Metadata of a step: fingerprints, configuration, state of the source."""
        return self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
            "meta"
        ]

    def shapes(self, step: int) -> Any:
        """Shapes and types of a saved state, without reading the arrays."""
        return self.manager.item_metadata(step).state

    def restore(self, abstract: Any, step: int | None = None, only: str | None = None) -> Restored:
        """The newest step that reads and verifies (or exactly `step`), placed as `abstract` asks.

        `abstract` gives shape, type and sharding of every leaf; another mesh or floating type than
        at saving is fine. Of a checkpoint saved as a dict of some of its fields (`parts` in the
        metadata) that dict comes back; with `only` (params, ema) that field alone is read and comes
        back. Newer steps that are damaged are set aside once an older one
        is found to be good. ValueError when the checkpoint is of another model,
        NoUsableCheckpoint when no step is usable; both change nothing.
        """
        rejected: dict[int, str] = {}
        for candidate in [step] if step is not None else reversed(self.steps()):
            error, got = None, None
            try:
                got = self._read(abstract, candidate, only)
            except (StructureError, PermissionError, MemoryError):
                raise
            except Exception as caught:  # Orbax, TensorStore and JSON each raise their own
                if "RESOURCE_EXHAUSTED" in str(caught):  # the machine's fault, not the checkpoint's
                    raise
                said = (str(caught).splitlines() or [type(caught).__name__])[0]
                error = f"cannot be read: {said.split('. See full')[0][:160]}"
            if all_agree(error is None) and got is not None:
                if rejected and not self.read_only:
                    self._set_aside(list(rejected))
                return Restored(got[0], candidate, got[1], rejected)
            rejected[candidate] = error or "unreadable on another process"
        names = "; ".join(f"step {s} {why}" for s, why in rejected.items())
        raise NoUsableCheckpoint(
            f"no usable checkpoint in {self.folder} ({names or 'it has none'}): nothing was changed"
        )

    def _read(self, abstract: Any, step: int, only: str | None) -> tuple[Any, dict[str, Any]]:
        meta, tree = self.meta(step), self.shapes(step)
        if meta.get("parts") and not isinstance(abstract, dict):
            abstract = {name: getattr(abstract, name) for name in meta["parts"]}
        saved = dict(zip(_paths(tree), jax.tree.leaves(tree), strict=True))
        names, leaves = _paths(abstract), jax.tree.leaves(abstract)
        if sorted(saved) != sorted(meta["fingerprint"]):
            raise ValueError("its list of arrays is damaged")
        problems = [f"{n} is missing" for n in names if n not in saved]
        problems += [f"{n} is not expected" for n in saved if n not in names]
        problems += [
            f"{n} has shape {tuple(saved[n].shape)}, expected {a.shape}"
            for n, a in zip(names, leaves, strict=True)
            if n in saved and tuple(saved[n].shape) != a.shape
        ]
        if problems:
            more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
            raise StructureError(
                f"checkpoint step {step} is of another model: {'; '.join(problems[:6])}{more}"
            )
        if only is not None:
            parts = abstract if isinstance(abstract, dict) else abstract._asdict()
            # What was imported has no average yet; the parameters are where it will start.
            only = only if only in parts else "params"
            abstract = {only: parts[only]}
            names, leaves = _paths(abstract), jax.tree.leaves(abstract)
        # Read in the saved type: the fingerprint is of its bits; cast after the check.
        as_saved = [
            jax.ShapeDtypeStruct(a.shape, saved[n].dtype, sharding=a.sharding)
            for n, a in zip(names, leaves, strict=True)
        ]
        as_saved = jax.tree.unflatten(jax.tree.structure(abstract), as_saved)
        # Checksums communicate: no process may be missing.
        with all_or_none():
            args = ocp.args.PyTreeRestore(
                as_saved,
                restore_args=ocp.checkpoint_utils.construct_restore_args(as_saved),
                partial_restore=only is not None,
            )
            # The manager's own restore ends at a barrier, where one that cannot read never comes.
            where: Any = self.folder / str(step) / "state"
            state = self._handler.restore(where, args=args)
        sums = np.asarray(fingerprint(state))
        bad = [n for n, s in zip(names, sums, strict=True) if meta["fingerprint"][n] != int(s)]
        if bad:
            raise ValueError(f"the bytes of {', '.join(bad[:3])} are not the ones that were saved")
        state = jax.tree.map(lambda x, a: x.astype(a.dtype), state, abstract)
        return state if only is None else state[only], meta

    def _set_aside(self, steps: list[int]) -> None:
        self.close()
        if jax.process_index() == 0:
            for step in steps:
                name = f"corrupt-{step}-{time.strftime('%Y%m%dT%H%M%S')}"
                (self.folder / str(step)).rename(self.folder / name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")

    def close(self) -> None:
        """Waits for saves under way and releases the manager."""
        if self._manager is not None:
            with contextlib.closing(self._manager):
                self._manager, _ = None, self.wait()


def check_space(folder: Path, state: int) -> None:
    """OSError when the disk of `folder` has no room for one checkpoint of `state` bytes."""
    needed = state + state // 20 + 2**18  # its index and metadata
    existing = next(p for p in [folder, *folder.parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"{folder} has {free / 2**20:.1f} MiB free, one checkpoint needs "
            f"{needed / 2**20:.1f} MiB: free some space or give another folder"
        )
