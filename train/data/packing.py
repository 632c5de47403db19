"""Fixed-length rows from a corpus: consecutive and random-access, or first-fit as a stream."""

from collections.abc import Iterator
from typing import Any, cast

import grain
import jax
import numpy as np
from absl import flags

from train.data.corpus import Corpus

# Grain reads absl flags, which nobody parses outside absl.app.
flags.FLAGS.mark_as_parsed()

Batch = dict[str, np.ndarray]
NAMES = ("tokens", "targets", "positions", "segment_ids")


def batch_spec(batch: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
    """int32 [batch, seq_len] for each of tokens, targets, positions, segment_ids."""
    return {name: jax.ShapeDtypeStruct((batch, seq_len), np.int32) for name in NAMES}


class Windows:
    """Row i: tokens [i * seq_len, (i + 1) * seq_len) of the documents laid end to end.

    Targets are the next tokens, -1 at the end of a document; positions restart and segment ids count
    up (from 1) at each document, so that attention stays inside it. Padding: segment 0, target -1.
    """

    def __init__(self, corpus: Corpus, seq_len: int, order: np.ndarray | None = None):
        self.ids, self.seq_len = corpus.ids, seq_len
        spans = corpus.spans if order is None else corpus.spans[order]
        self.begin = spans[:, 0]
        self.bounds = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])

    def __len__(self) -> int:
        return max(1, -(-(int(self.bounds[-1]) - 1) // self.seq_len))

    def __getitem__(self, i: int) -> Batch:
        first, total = int(i) * self.seq_len, int(self.bounds[-1])
        at = np.arange(first, first + self.seq_len + 1)
        real = at < total
        at = np.minimum(at, total - 1)
        document = np.searchsorted(self.bounds, at, "right") - 1
        ids = self.ids[self.begin[document] + at - self.bounds[document]].astype(np.int32)
        here = real[:-1]
        follows = real[1:] & (document[1:] == document[:-1])
        position = at - np.maximum(self.bounds[document], first)
        return {
            "tokens": np.where(here, ids[:-1], 0).astype(np.int32),
            "targets": np.where(follows, ids[1:], -1).astype(np.int32),
            "positions": np.where(here, position[:-1], 0).astype(np.int32),
            "segment_ids": np.where(here, document[:-1] - document[0] + 1, 0).astype(np.int32),
        }


class Rows:
    """Batches as a pure function of the step, on any number of hosts."""

    def __init__(self, windows: list[Windows], weights, batch: int, seed: int, shuffle: bool):
        self.batch, self.windows, self.shuffle = batch, windows, shuffle
        self.spec = batch_spec(batch, windows[0].seq_len)
        self.num_batches = -(-sum(map(len, windows)) // batch)
        self.tokens_total = sum(int(w.bounds[-1]) for w in windows)
        self.documents = sum(len(w.begin) for w in windows)
        sets = [grain.MapDataset.source(cast(Any, w)) for w in windows]
        if shuffle:
            sets = [s.seed(seed + i).shuffle().repeat() for i, s in enumerate(sets)]
            rows = grain.MapDataset.mix(sets, weights) if len(sets) > 1 else sets[0]
        else:
            rows = grain.MapDataset.concatenate(sets) if len(sets) > 1 else sets[0]
        self._rows = rows

    def batch_at(self, step: int, rows: slice | None = None) -> Batch:
        """Rows `rows` (all if None) of the batch of a step: int32 [rows, seq_len] by name.

        Training rows go on for ever, reshuffled each epoch; held-out rows end in padding.
        """
        start, stop, _ = (rows or slice(None)).indices(self.batch)
        found = [self._row(step * self.batch + r) for r in range(start, stop)]
        return {name: np.stack([row[name] for row in found]) for name in NAMES}

    def _row(self, i: int) -> Batch:
        if not self.shuffle and i >= len(self._rows):
            empty = np.zeros(self.windows[0].seq_len, np.int32)
            return {name: empty - (name == "targets") for name in NAMES}
        return cast(Batch, self._rows[i])

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, targets) of every row once, in order."""
        for windows in self.windows:
            for i in range(len(windows)):
                row = windows[i]
                yield row["tokens"], row["targets"]


class _Pieces:
    """Documents, the long ones cut, as (tokens, targets) of at most seq_len."""

    def __init__(self, corpus: Corpus, seq_len: int):
        self.ids, self.seq_len = corpus.ids, seq_len
        length = corpus.spans[:, 1] - corpus.spans[:, 0] - 1
        count = -(-length // seq_len)
        document = np.repeat(np.arange(len(count)), count)
        nth = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
        self.begin = corpus.spans[document, 0] + nth * seq_len
        self.end = np.minimum(self.begin + seq_len + 1, corpus.spans[document, 1])

    def __len__(self) -> int:
        return len(self.begin)

    def __getitem__(self, i: int) -> Batch:
        ids = np.asarray(self.ids[self.begin[i] : self.end[i]], np.int32)
        return {"tokens": ids[:-1], "targets": ids[1:]}


class Stream:
    """First-fit packed batches: no document is cut that fits in a row, little padding.

    What a row holds depends on all rows before, so the state goes into the checkpoint; a process
    takes every n-th piece, hence the same number of processes must read on.
    """

    def __init__(
        self, corpora: list[Corpus], weights, seq_len: int, batch: int, seed: int,
        process_index: int, process_count: int,
    ):  # fmt: skip
        if batch % process_count:
            raise ValueError(f"batch={batch} must be divisible by the {process_count} processes")
        self.batch, self.spec, self.process_count = batch, batch_spec(batch, seq_len), process_count
        sets = [
            grain.MapDataset.source(cast(Any, _Pieces(c, seq_len)))
            .seed(seed + i)
            .shuffle()
            .repeat()
            for i, c in enumerate(corpora)
        ]
        mixed = grain.MapDataset.mix(sets, weights) if len(sets) > 1 else sets[0]
        packed = grain.experimental.FirstFitPackIterDataset(
            mixed[process_index::process_count].to_iter_dataset(),
            length_struct={"tokens": seq_len, "targets": seq_len},
            # A piece that fits in no open row closes them all: with many the emptier ones weigh less.
            num_packing_bins=max(64, batch // process_count),
        )
        self._iterator = iter(packed.batch(batch // process_count))

    def __next__(self) -> Batch:
        row = next(self._iterator)
        segments = row["tokens_segment_ids"]
        return {
            "tokens": row["tokens"].astype(np.int32),
            "targets": np.where(segments > 0, row["targets"], -1).astype(np.int32),
            "positions": row["tokens_positions"].astype(np.int32),
            "segment_ids": segments.astype(np.int32),
        }

    def get_state(self) -> dict[str, Any]:
        """JSON: where to go on."""
        return {"processes": self.process_count, "iterator": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from `state`; ValueError under another number of processes."""
        if state["processes"] != self.process_count:
            raise ValueError(
                f"a first-fit stream of {state['processes']} row shards cannot go on with "
                f"{self.process_count}: use as many processes, or source.packing=concat"
            )
        self._iterator.set_state(state["iterator"])
