"""Real data that ships with scikit-learn, with switches for imbalance, label noise and shift."""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import numpy as np

from train.data.epochs import Rows, held_out

SHIFTS = ("none", "noisy", "permuted", "scaled")
SIZES = {"digits": 10, "breast_cancer": 2, "wine": 3}  # classes


@functools.lru_cache
def shipped(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(x float32 [n, features], labels int32 [n]); digits in 0..1, the others as they were measured.

    ImportError, with what to install, without scikit-learn.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("data of scikit-learn needs: pip install 'jaxlab[data]'") from error
    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    return (x / 16 if name == "digits" else x).astype(np.float32), y.astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Shipped:
    """Batches {"images" [b, 8, 8] of digits, or "features" [b, f]: float32; "labels": int32 [b]}.

    Each is a function of its step. The held-out part is cut from every original class in proportion,
    by `split_seed` alone. Measurements are standardised by the mean and deviation of the training
    part, as it is before `keep` cuts it. Label noise is of the training part only, a shift of the held-out
    one only. The split "ood" is the classes of `leave_out`, whole, or where there are none the held-out
    rows, each permuted.
    """

    name: Annotated[Literal["digits", "breast_cancer", "wine"], "the data set"] = "digits"
    relabel: Annotated[tuple[int, ...], "new label of each original class; (): their own"] = ()
    leave_out: Annotated[tuple[int, ...], "original classes in neither part: split 'ood'"] = ()
    keep: Annotated[tuple[int, ...], "at most so many training rows of each label; (): all"] = ()
    label_noise: Annotated[float, "share of training labels that are drawn anew, never right"] = 0.0
    noise: Annotated[float, "standard deviation added to every value, of both parts"] = 0.0
    shift: Annotated[Literal["none", "noisy", "permuted", "scaled"], "of the held-out part"] = (
        "none"
    )
    strength: Annotated[float, "deviation of shift 'noisy', factor of 'scaled'"] = 0.5
    held_out: Annotated[float, "share of the rows that is held out"] = 0.35
    split_seed: Annotated[int, "of the cut, the noise of labels and that of held-out rows"] = 0

    @property
    def splits(self) -> tuple[str, ...]:
        """What `make` knows."""
        return ("train", "valid", "ood")

    @property
    def classes(self) -> int:
        """Labels there are, up to the largest."""
        kept = [k for k in range(SIZES[self.name]) if k not in self.leave_out]
        return 1 + max(self.relabel[k] if self.relabel else k for k in kept)

    @property
    def image(self) -> int | None:
        """Pixels a side; None where rows are no images."""
        return 8 if self.name == "digits" else None

    @property
    def features(self) -> int:
        """Values of a row."""
        return {"digits": 64, "breast_cancer": 30, "wine": 13}[self.name]

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work."""
        size = SIZES[self.name]
        if len(self.relabel) not in (0, size) or any(k < 0 for k in self.relabel):
            raise ValueError(f"source.relabel={self.relabel} must be {size} labels of at least 0")
        if set(self.leave_out) - set(range(size)) or len(set(self.leave_out)) > size - 2:
            raise ValueError(
                f"source.leave_out={self.leave_out} must be classes below {size}, two fewer at most"
            )
        if self.classes < 2:
            raise ValueError(f"source.relabel={self.relabel} must leave at least two labels")
        if len(self.keep) not in (0, self.classes) or any(k < 1 for k in self.keep):
            raise ValueError(
                f"source.keep={self.keep} must be {self.classes} numbers of at least 1, one a label"
            )
        for name, low, high in (("label_noise", 0, 1), ("held_out", 0.05, 0.95)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"source.{name}={getattr(self, name)} must be in [{low}, {high}]")
        for name in ("noise", "strength"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"source.{name}={getattr(self, name)} must be finite and >= 0")
        if self.split_seed < 0:
            raise ValueError(f"source.split_seed={self.split_seed} must be at least 0")
        for axis in ("ring", "context"):
            if mesh_sizes.get(axis, 1) > 1:
                raise ValueError(f"mesh.{axis}={mesh_sizes[axis]} must be 1: rows are not split")

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and types of a global batch."""
        name, shape = ("images", (8, 8)) if self.image else ("features", (self.features,))
        rows = jax.ShapeDtypeStruct((batch, *shape), np.float32)
        return {name: rows, "labels": jax.ShapeDtypeStruct((batch,), np.int32)}

    def make(
        self, batch: int, *, seed: int, split: str, process_index: int = 0, process_count: int = 1
    ) -> Rows:
        """The batches of a split: 'train', in a new order every epoch; 'valid' and 'ood', in one."""
        x, y = parts(self)[split]

        def fetch(index, places):
            if split != "train" or not self.noise:
                return x[index]
            drawn = [
                np.random.default_rng([seed, 2, *place]).standard_normal(x.shape[1])
                for place in places
            ]
            return x[index] + self.noise * np.asarray(drawn, np.float32)

        return Rows(fetch, y, self.spec(batch), seed, split)


@functools.lru_cache
def parts(config: Shipped) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train", "valid", "ood": (x [n, features], labels [n])}, before the noise of training rows."""
    c, (x, y) = config, shipped(config.name)
    random = np.random.default_rng([c.split_seed, 0])
    valid = held_out(y, c.held_out, random)
    out = np.isin(y, c.leave_out)
    train = np.flatnonzero(~valid & ~out)
    if c.name != "digits":
        x = (x - x[train].mean(0)) / x[train].std(0)
    if c.relabel:
        y = np.asarray(c.relabel, np.int32)[y]
    if c.keep:
        cut = [random.permutation(train[y[train] == k])[:n] for k, n in enumerate(c.keep)]
        train = np.sort(np.concatenate(cut))
    labels = y[train]
    wrong = random.random(len(train)) < c.label_noise
    labels = np.where(
        wrong, (labels + random.integers(1, c.classes, len(train))) % c.classes, labels
    )
    known, unknown = x[valid & ~out], x[out]
    held = known + c.noise * random.standard_normal(known.shape)
    ood = (unknown + c.noise * random.standard_normal(unknown.shape), y[out])
    if not c.leave_out:
        ood = (random.permuted(held, axis=1), y[valid])
    if c.shift == "noisy":
        held = held + c.strength * random.standard_normal(held.shape)
    elif c.shift == "permuted":
        held = random.permuted(held, axis=1)
    elif c.shift == "scaled":
        held = held * c.strength
    pairs = {"train": (x[train], labels), "valid": (held, y[valid & ~out]), "ood": ood}
    return {k: (a.astype(np.float32), b.astype(np.int32)) for k, (a, b) in pairs.items()}
