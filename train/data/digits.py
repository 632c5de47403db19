"""Digits in many fonts, turned, scaled, shifted and noisy: images with labels that need no download."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

import jax
import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

# Fonts that come with matplotlib; the held-out ones are not seen in training.
FONTS = {
    "train": (
        "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono",
        "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-BoldItalic", "STIXGeneral",
        "STIXGeneralItalic",
    ),
    "valid": ("DejaVuSans-BoldOblique", "DejaVuSerif-Bold", "STIXGeneralBol"),
}  # fmt: skip
BIG = 64  # pixels a side of the glyphs that images are sampled from


@functools.lru_cache
def glyphs(split: str) -> np.ndarray:
    """Every digit in every font of a split: float32 [fonts, 10, BIG, BIG], 0 paper and 1 ink."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    found = []
    for font in FONTS[split]:
        for digit in range(10):
            figure = Figure(figsize=(1, 1), dpi=BIG)
            canvas = FigureCanvasAgg(figure)
            properties = FontProperties(fname=folder / f"{font}.ttf", size=0.8 * 72)
            figure.text(0.5, 0.5, str(digit), fontproperties=properties, ha="center", va="center")
            canvas.draw()
            found.append(1 - np.asarray(canvas.buffer_rgba())[..., 0] / np.float32(255))
    return np.stack(found).reshape(len(FONTS[split]), 10, BIG, BIG)


@dataclasses.dataclass(frozen=True)
class Digits:
    """Batches {"images": float32 [b, image, image], "labels": int32 [b]}, each a function of its step."""

    image: Annotated[int, "pixels a side"] = 28
    turn: Annotated[float, "greatest rotation, degrees"] = 25.0
    noise: Annotated[float, "standard deviation added to pixels in 0..1"] = 0.15
    held_out: Annotated[int, "images of the held-out split"] = 512

    @property
    def classes(self) -> int:
        """Ten digits."""
        return 10

    @property
    def features(self) -> int:
        """Pixels of an image."""
        return self.image**2

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work."""
        if self.image < 8 or self.held_out < 1:
            raise ValueError(
                f"source.image={self.image} must be at least 8 and "
                f"source.held_out={self.held_out} at least 1"
            )
        if not (0 <= self.turn <= 180 and 0 <= self.noise < float("inf")):
            raise ValueError(
                f"source.turn={self.turn} must be in [0, 180] and source.noise={self.noise} >= 0"
            )
        for axis in ("ring", "context"):
            if mesh_sizes.get(axis, 1) > 1:
                raise ValueError(f"mesh.{axis}={mesh_sizes[axis]} must be 1: images are not split")

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and types of a global batch."""
        images = jax.ShapeDtypeStruct((batch, self.image, self.image), np.float32)
        return {"images": images, "labels": jax.ShapeDtypeStruct((batch,), np.int32)}

    def make(
        self, batch: int, *, seed: int, split: str, process_index: int = 0, process_count: int = 1
    ) -> "Drawn":
        """The batches of a split ('train' or 'valid')."""
        return Drawn(self, batch, seed, split)


class Drawn:
    """Random access to the drawn images of a split."""

    def __init__(self, config: Digits, batch: int, seed: int, split: str):
        self.config, self.batch, self.split = config, batch, split
        self.seed = [seed, split == "valid"]
        self.spec = config.spec(batch)
        self.num_batches = -(-config.held_out // batch)

    def batch_at(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Rows `rows` (all if None) of the batch of a step."""
        start, stop, _ = (rows or slice(None)).indices(self.batch)
        drawn = [self._image(step * self.batch + row) for row in range(start, stop)]
        images, labels = zip(*drawn, strict=True)
        return {"images": np.stack(images), "labels": np.asarray(labels, np.int32)}

    def _image(self, i: int) -> tuple[np.ndarray, int]:
        c, big = self.config, glyphs(self.split)
        random = np.random.default_rng([*self.seed, i])
        font, label = random.integers(len(big)), int(random.integers(10))
        angle = np.deg2rad(random.uniform(-c.turn, c.turn))
        scale, shift = random.uniform(0.8, 1.3, 2), random.uniform(-0.15, 0.15, 2)
        # Where each pixel of the image lies in the glyph, -1 to 1 on both sides.
        side = np.linspace(-1, 1, c.image)
        y, x = np.meshgrid(side + shift[0], side + shift[1], indexing="ij")
        turned = np.cos(angle) * y - np.sin(angle) * x, np.sin(angle) * y + np.cos(angle) * x
        image = bilinear(big[font, label], turned[0] * scale[0], turned[1] * scale[1])
        noisy = image + c.noise * random.standard_normal(image.shape)
        return noisy.astype(np.float32), label


def bilinear(glyph: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Values of a square glyph at coordinates in -1..1, 0 outside."""
    size = len(glyph)
    padded = np.pad(glyph, (1, 2))
    at = [np.clip((a + 1) / 2 * (size - 1) + 1, 0, size + 1) for a in (y, x)]
    (i, j), (u, v) = ([np.floor(a).astype(int) for a in at], [a - np.floor(a) for a in at])
    top = padded[i, j] * (1 - v) + padded[i, j + 1] * v
    return top * (1 - u) + (padded[i + 1, j] * (1 - v) + padded[i + 1, j + 1] * v) * u
