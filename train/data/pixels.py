"""Grey levels of the handwritten digits of scikit-learn as rows of tokens, for diffusion of images."""

import dataclasses
from typing import Annotated

import jax
import numpy as np

from train.data.tabular import Shipped, parts

SHADES = " .,:;-~=+*xoXO#%@"  # one a level, from paper to ink


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Batches {"tokens": int32 [b, 64] in 0..16, row by row; "labels": int32 [b]} of the digits.

    The parts are those of `Shipped`, and each batch is a function of its step.
    """

    held_out: Annotated[float, "share of the images that is held out"] = 0.35
    split_seed: Annotated[int, "of the cut"] = 0

    @property
    def classes(self) -> int:
        """Ten digits."""
        return 10

    @property
    def side(self) -> int:
        """Pixels a side."""
        return 8

    @property
    def seq_len(self) -> int:
        """Tokens of an image."""
        return self.side**2

    def vocab_size(self) -> int:
        """Grey levels."""
        return len(SHADES)

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work."""
        self._shipped().check(mesh_sizes)

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and types of a global batch."""
        shape = {"tokens": (batch, self.seq_len), "labels": (batch,)}
        return {name: jax.ShapeDtypeStruct(s, np.int32) for name, s in shape.items()}

    def make(
        self, batch: int, *, seed: int, split: str, process_index: int = 0, process_count: int = 1
    ) -> "Levels":
        """The batches of a split: 'train', in a new order every epoch, or 'valid'."""
        shipped = self._shipped()
        rows = shipped.make(batch, seed=seed, split=split)
        return Levels(self.spec(batch), rows, *parts(shipped)[split])

    def text(self, rows: np.ndarray) -> list[str]:
        """Rows of tokens drawn with characters; what is no level (the mask) is a question mark."""
        marks = np.array([*SHADES, "?"])
        lines = marks[np.clip(rows, 0, len(SHADES))].reshape(len(rows), self.side, self.side)
        return ["\n".join("".join(c * 2 for c in line) for line in image) for image in lines]

    def _shipped(self) -> Shipped:
        return Shipped(held_out=self.held_out, split_seed=self.split_seed)


class Levels:
    """The rows of a part as tokens."""

    def __init__(self, spec, rows, images: np.ndarray, labels: np.ndarray):
        self.spec, self.rows, self.num_batches = spec, rows, rows.num_batches
        self._images, self._labels = images, labels

    def whole(self) -> dict[str, np.ndarray]:
        """The whole part, in the order of the data set."""
        return {"tokens": levels(self._images), "labels": self._labels}

    def batch_at(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Rows `rows` (all if None) of the batch of a step."""
        found = self.rows.batch_at(step, rows)
        return {"tokens": levels(found["images"]), "labels": found["labels"]}


def levels(images: np.ndarray) -> np.ndarray:
    """int32 [n, 64] grey levels of images in 0..1, which are whole sixteenths."""
    return np.rint(16 * images.reshape(len(images), -1)).astype(np.int32)
