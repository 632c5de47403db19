"""From a source's rows to sharded global batches, ahead of the step that needs them."""

import concurrent.futures
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sharding.rules import spec_of


def batch_shardings(spec: dict[str, jax.ShapeDtypeStruct], mesh: Mesh) -> dict[str, NamedSharding]:
    """Rows over (data, fsdp); a second axis, if there is one, over (ring, context)."""
    axes = ("batch", "length")
    return {
        name: NamedSharding(mesh, spec_of((*axes, None, None)[: len(s.shape)], mesh=mesh))
        for name, s in spec.items()
    }


def abstract_batch(spec: dict[str, jax.ShapeDtypeStruct], mesh: Mesh):
    """The batch as shapes with shardings, for compiling ahead of time."""
    placed = batch_shardings(spec, mesh)
    return {n: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed[n]) for n, s in spec.items()}


def row_shard(mesh: Mesh, batch: int) -> tuple[int, int]:
    """(index, count): which equal part of a batch's rows this process holds.

    Processes that share rows (the sequence is split between them) get the same index. (0, 0) when
    the rows are not one such part, which only a source that makes its own rows has to mind.
    """
    sharding = NamedSharding(mesh, spec_of(("batch",), mesh=mesh))
    slices = [i[0] for i in sharding.addressable_devices_indices_map((batch,)).values() if i]
    return one_part(sorted({s.indices(batch)[:2] for s in slices}), batch)


def one_part(ranges: list[tuple[int, int]], batch: int) -> tuple[int, int]:
    """`row_shard` of sorted, distinct (start, stop) ranges of rows."""
    start, stop = ranges[0][0], ranges[-1][1]
    size = stop - start
    gaps = any(a[1] != b[0] for a, b in zip(ranges, ranges[1:], strict=False))
    return (0, 0) if gaps or batch % size or start % size else (start // size, batch // size)


def token_order(
    model: Any, spec: dict[str, jax.ShapeDtypeStruct], sizes, platform: str = ""
) -> np.ndarray | None:
    """The order in which `model` wants the tokens of a row; None: as the source has them.

    ValueError when it cannot take rows of this length on a mesh of these sizes, or have the kernel it
    names on `platform`.
    """
    if not hasattr(model, "order"):
        return None
    return model.order(sizes, spec["tokens"].shape[1], platform, "segment_ids" in spec)


def global_batch(fetch: Callable[[slice], dict[str, np.ndarray]], spec, mesh: Mesh, order=None):
    """Assembles global arrays; `fetch(rows)` is asked once for each range held here.

    `order` is that of `token_order`: every array with a second axis is put into it.
    """
    cache: dict[tuple[int, int], dict[str, np.ndarray]] = {}
    placed = batch_shardings(spec, mesh)

    def part(name: str, index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(spec[name].shape[0])
        if (start, stop) not in cache:
            rows = fetch(slice(start, stop))
            if order is not None:
                rows = {k: x[:, order] if x.ndim > 1 else x for k, x in rows.items()}
            cache[start, stop] = rows
        return cache[start, stop][name][(slice(None), *index[1:])]

    return {
        name: jax.make_array_from_callback(s.shape, placed[name], lambda i, n=name: part(n, i))
        for name, s in spec.items()
    }


class Feed:
    """Batches of consecutive steps, as (batch, source state); prepared in a thread where possible.

    Three kinds of source: `batch_at(step, rows)` is a pure function of the step; `__next__` is a
    stream, whose state belongs in the checkpoint; `batch_from(step, params)` looks at the
    parameters and returns global arrays; the trainer gives it the run's `Scene` by `attach`.
    """

    def __init__(self, source: Any, mesh: Mesh, step: int, ahead: int = 2, order=None):
        self.source, self.mesh, self.spec, self.order = source, mesh, source.spec, order
        self._next, self._ahead = step, ahead
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "feed")
        self._queue: list[concurrent.futures.Future] = []

    def _make(self, step: int):
        if hasattr(self.source, "batch_at"):
            fetch = lambda rows: self.source.batch_at(step, rows)  # noqa: E731
            return global_batch(fetch, self.spec, self.mesh, self.order), None
        local = next(self.source)
        first = row_shard(self.mesh, self.source.batch)[0] * len(next(iter(local.values())))

        def held(rows: slice) -> dict[str, np.ndarray]:
            return {k: v[rows.start - first : rows.stop - first] for k, v in local.items()}

        return global_batch(held, self.spec, self.mesh, self.order), self.source.get_state()

    def take(self, params: Any):
        """The batch of the next step and the state that continues after it."""
        if hasattr(self.source, "batch_from"):
            batch = self.source.batch_from(self._next, params)
            self._next += 1
            return batch, getattr(self.source, "get_state", lambda: None)()
        while len(self._queue) <= self._ahead:
            self._queue.append(self._pool.submit(self._make, self._next))
            self._next += 1
        return self._queue.pop(0).result()

    def close(self) -> None:
        """Stops the thread."""
        self._pool.shutdown(wait=True, cancel_futures=True)
