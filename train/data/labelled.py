"""Labelled images and rows of one's own as a source of batches: which files, which part is held out."""

import dataclasses
import functools
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from train.data.epochs import Rows, held_out
from train.data.examples import decode_image, find_images, find_rows

SPLITS = {"train": "files", "valid": "valid_files", "ood": "ood_files"}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """What images and rows have in common. Labels are read once, at the start; batches are functions of
    their step.

    Without `valid_files` a share of every class is held out, by `split_seed` alone. Labels are integers
    from 0, or texts, whose order is the alphabet's.
    """

    files: Annotated[tuple[str, ...], "paths, folders, or globs of tables: the training part"] = ()
    valid_files: Annotated[tuple[str, ...], "those of the held-out part; (): a share of files"] = ()
    ood_files: Annotated[tuple[str, ...], "of strangers to detect, labels unused; (): none"] = ()
    label: Annotated[str, "column of labels of Parquet rows and ArrayRecord features"] = "label"
    classes: Annotated[int, "classes there are"] = 10
    held_out: Annotated[float, "share of the rows that is held out"] = 0.1
    split_seed: Annotated[int, "of what is held out"] = 0

    @property
    def splits(self) -> tuple[str, ...]:
        """What `make` knows."""
        return ("train", "valid", *(("ood",) if self.ood_files else ()))

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work; reads no file."""
        for name in SPLITS.values():
            found = getattr(self, name)
            if not all(found) or (name == "files" and not found):
                raise ValueError(
                    f"source.{name}={list(found)} must name at least one file or folder"
                )
        if self.classes < 2:
            raise ValueError(f"source.classes={self.classes} must be at least 2")
        if not 0 < self.held_out < 1:
            raise ValueError(f"source.held_out={self.held_out} must be between 0 and 1")
        if self.split_seed < 0:
            raise ValueError(f"source.split_seed={self.split_seed} must be at least 0")
        for axis in ("ring", "context"):
            if mesh_sizes.get(axis, 1) > 1:
                raise ValueError(f"mesh.{axis}={mesh_sizes[axis]} must be 1: rows are not split")

    def make(
        self, batch: int, *, seed: int, split: str, process_index: int = 0, process_count: int = 1
    ) -> Rows:
        """The batches of a split: 'train', in a new order every epoch; 'valid' and 'ood', in one.

        FileNotFoundError or ValueError, naming file and row, for data that cannot be used.
        """
        self.check({})
        part, index = parts(self)[split]

        def fetch(rows, places):
            return np.stack([self.row(part, int(index[i])) for i in rows])

        return Rows(fetch, part.labels[index], self.spec(batch), seed, split)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and types of a global batch."""
        raise NotImplementedError

    def find(self, pattern: str, field: str):
        """The files of a pattern, as `train.data.examples` finds them."""
        raise NotImplementedError

    def row(self, part: "Part", i: int) -> np.ndarray:
        """Example i as a batch has it."""
        raise NotImplementedError

    def inspect(self, part: "Part") -> None:
        """ValueError for what can be found out before the first step."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Images(Labelled):
    """Batches {"images": float32 [b, side, side] or [b, side, side, 3], "labels": int32 [b]}, in 0..1.

    A folder with a folder of images for each class; or Parquet (images as bytes, or as Hugging Face keeps
    them); or ArrayRecord of tf.train.Example. An image of another size is cut to its central square and
    resized. Parquet is held in memory, as encoded; folders and ArrayRecord are read as they are needed.
    """

    image: Annotated[int, "pixels a side"] = 32
    channels: Annotated[int, "values of a pixel: 1 grey, 3 colours"] = 3
    column: Annotated[str, "of images; '': image, or the only one beside the label"] = ""

    @property
    def features(self) -> int:
        """Values of an image."""
        return self.image**2 * self.channels

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work; reads no file."""
        super().check(mesh_sizes)
        if self.image < 1 or self.channels not in (1, 3):
            raise ValueError(
                f"source.image={self.image} must be at least 1 and source.channels={self.channels} 1 or 3"
            )

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and types of a global batch."""
        shape = (batch, self.image, self.image, *((3,) if self.channels == 3 else ()))
        images = jax.ShapeDtypeStruct(shape, np.float32)
        return {"images": images, "labels": jax.ShapeDtypeStruct((batch,), np.int32)}

    def find(self, pattern: str, field: str):
        """The files of a pattern."""
        return find_images(pattern, self.column, self.label, field)

    def row(self, part: "Part", i: int) -> np.ndarray:
        """The decoded image i."""
        return decode_image(part.read(i), self.image, self.channels, part.where(i))

    def inspect(self, part: "Part") -> None:
        """The first image of every class; the rest may be many."""
        for i in np.unique(part.labels, return_index=True)[1]:
            self.row(part, int(i))


@dataclasses.dataclass(frozen=True)
class Table(Labelled):
    """Batches {"features": float32 [b, features], "labels": int32 [b]} of Parquet or ArrayRecord, in memory.

    Standardised by the mean and deviation of the training part.
    """

    features: Annotated[int, "numbers of a row"] = 0
    columns: Annotated[tuple[str, ...], "those that hold them, in order; (): all but label"] = ()

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work; reads no file."""
        super().check(mesh_sizes)
        if self.features < 1:
            raise ValueError(f"source.features={self.features} must be at least 1")
        if len({*self.columns, self.label}) <= len(self.columns):
            raise ValueError(
                f"source.columns={list(self.columns)} must be different, without source.label={self.label!r}"
            )

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and types of a global batch."""
        rows = jax.ShapeDtypeStruct((batch, self.features), np.float32)
        return {"features": rows, "labels": jax.ShapeDtypeStruct((batch,), np.int32)}

    def find(self, pattern: str, field: str):
        """The files of a pattern."""
        return find_rows(pattern, self.columns, self.label, field)

    def row(self, part: "Part", i: int) -> np.ndarray:
        """Row i, standardised."""
        mean, deviation = scale(self)
        return (self.raw(part, i) - mean) / deviation

    def inspect(self, part: "Part") -> None:
        """Every row, which are in memory."""
        for i in range(len(part.labels)):
            self.raw(part, i)

    def raw(self, part: "Part", i: int) -> np.ndarray:
        """Row i as it is in its file; ValueError for another number of values, and for NaN."""
        found = part.read(i)
        if len(found) != self.features:
            raise ValueError(
                f"{part.where(i)} has {len(found)} numbers beside its label: use "
                f"source.features={len(found)} model.features={len(found)}, or name source.columns"
            )
        if not np.all(np.isfinite(found)):
            raise ValueError(f"{part.where(i)}: {found} must be finite numbers, without gaps")
        return found


class Part(NamedTuple):
    """All examples of some files, one after another."""

    where: Any  # i -> file and row
    read: Any  # i -> bytes or numbers
    labels: np.ndarray  # int32
    names: tuple[str, ...]  # of text labels, else ()


@functools.lru_cache(8)
def parts(config: Labelled) -> dict[str, tuple[Part, np.ndarray]]:
    """{split: (its files, which of their examples are its)}."""
    train = _join(config, "train")
    whole = lambda part: (part, np.arange(len(part.labels)))  # noqa: E731
    found = {"train": whole(train)}
    for split in ("valid", "ood"):
        if getattr(config, SPLITS[split]):
            found[split] = whole(_join(config, split, train.names))
    for part, _ in found.values():
        config.inspect(part)
    if "valid" not in found:
        random = np.random.default_rng([config.split_seed, 0])
        mask = held_out(train.labels, config.held_out, random)
        if not mask.any():
            raise ValueError(
                f"source.files={list(config.files)} hold one example of each class: none can be held out"
            )
        found |= {"train": (train, np.flatnonzero(~mask)), "valid": (train, np.flatnonzero(mask))}
    return found


@functools.lru_cache(8)
def scale(config: Table) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the training rows; 1 where all are alike."""
    part, index = parts(config)["train"]
    rows = np.stack([config.raw(part, i) for i in index]).astype(np.float64)
    deviation = rows.std(0)
    return rows.mean(0), np.where(deviation > 0, deviation, 1)


def _join(config: Labelled, split: str, names: tuple[str, ...] | None = None) -> Part:
    """The examples of all files of a split; `names` are the text labels of the training part.

    ValueError for labels that are none of the classes.
    """
    field = f"source.{SPLITS[split]}"
    patterns = getattr(config, SPLITS[split])
    found = [f for pattern in patterns for f in config.find(pattern, field)]
    starts = [f.where(0) for f in found if f.labels]
    again = next((x for x in starts if starts.count(x) > 1), None)
    if again:
        raise ValueError(f"{field}={list(patterns)} name {again} twice")
    bounds = np.cumsum([0, *(len(f.labels) for f in found)])
    if not bounds[-1]:
        raise ValueError(f"{field}={list(patterns)}: there is no example in them")

    def at(i: int):
        place = int(np.searchsorted(bounds, i, "right")) - 1
        return found[place], int(i - bounds[place])

    def where(i: int) -> str:
        file, row = at(i)
        return file.where(row)

    def read(i: int):
        file, row = at(i)
        return file.read(row)

    given = [x for f in found for x in f.labels]
    if split == "ood":
        return Part(where, read, np.zeros(len(given), np.int32), ())
    texts = tuple(sorted({x for x in given if isinstance(x, str)})) if names is None else names
    for i, x in enumerate(given):
        if isinstance(x, bool) or not isinstance(x, str if texts else int):
            kind = "a text, as others are" if texts else "an integer or a text"
            raise ValueError(f"{where(i)}: source.label={config.label!r} is {x!r}, not {kind}")
    if len(texts) == 1:
        raise ValueError(f"{field} has one class, {texts[0]!r}; a classifier needs at least two")
    if texts and len(texts) != config.classes:
        shown = ", ".join(texts[:8]) + (", ..." if len(texts) > 8 else "")
        raise ValueError(
            f"{field} has {len(texts)} classes ({shown}), not source.classes={config.classes}: use "
            f"source.classes={len(texts)} model.classes={len(texts)}"
        )
    number = {x: i for i, x in enumerate(texts)}
    labels = np.asarray([number.get(x, -1) if texts else x for x in given], np.int64)
    bad = np.flatnonzero((labels < 0) | (labels >= config.classes))
    if len(bad):
        legal = (
            f"one of {', '.join(texts)}"
            if texts
            else (f"at least 0 and below source.classes={config.classes}")
        )
        raise ValueError(f"{where(bad[0])}: label {given[bad[0]]!r} must be {legal}")
    return Part(where, read, labels.astype(np.int32), texts)
