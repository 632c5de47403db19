"""Labelled rows epoch after epoch: which of them are held out, and which stands where in the stream."""

import functools
from collections.abc import Callable

import jax
import numpy as np


def held_out(y: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """Mask of the rows that are held out, of every label in proportion: one at least, but never all."""
    mask = np.zeros(len(y), bool)
    for k in np.unique(y):
        rows = random.permutation(np.flatnonzero(y == k))
        mask[rows[: min(max(1, round(share * len(rows))), len(rows) - 1)]] = True
    return mask


class Rows:
    """Random access to batches of a part, each a function of its step, on any number of hosts.

    `fetch(index, places)` reads the rows of an index; `places` are their (epoch, place in it), for noise
    that does not depend on the batch size. The training part is shuffled anew every epoch, and a batch
    at its end goes on in the next; others keep their order. A part smaller than a batch fills it by
    repeating rows, of which some then count twice in the metrics of the objective.
    """

    def __init__(
        self,
        fetch: Callable[[np.ndarray, list[tuple[int, int]]], np.ndarray],
        y: np.ndarray,
        spec: dict[str, jax.ShapeDtypeStruct],
        seed: int,
        split: str,
    ):
        self.fetch, self.y, self.spec, self.train = fetch, y, spec, split == "train"
        self.name, self.size, self.batch = next(iter(spec)), len(y), spec["labels"].shape[0]
        # Metrics of the objective are of whole batches, which hold a row once where there are enough.
        whole, up = len(y) // self.batch, -(-len(y) // self.batch)
        self.num_batches = up if self.train else max(1, whole)
        self._order = functools.lru_cache(2)(
            lambda epoch: np.random.default_rng([seed, 1, epoch]).permutation(len(y))
        )

    def batch_at(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Rows `rows` (all if None) of the batch of a step."""
        start, stop, _ = (rows or slice(None)).indices(self.batch)
        places = [divmod(step * self.batch + row, self.size) for row in range(start, stop)]
        index = np.asarray([self._order(epoch)[i] if self.train else i for epoch, i in places], int)
        x = self.fetch(index, places).astype(np.float32)
        shape = self.spec[self.name].shape[1:]
        return {self.name: x.reshape(-1, *shape), "labels": self.y[index]}
