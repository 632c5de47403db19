"""Evaluator of written images: the Frechet distance of a small classifier's features, and a picture.

Source: Heusel et al., 1706.08500, with a classifier of the images at hand for the Inception network.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab.diffusion.metrics import frechet_distance
from jaxlab.diffusion.samplers import sample
from models.classifier import MLPConfig
from train.denoise import Psi, denoiser, every_class, rows_on
from train.objectives import Classify
from train.state import init_params


@dataclasses.dataclass(frozen=True)
class Judge:
    """Features [n, d] and classes [n] of rows of tokens, with the whole of both parts of the source."""

    features: Any
    classes: Any
    parts: dict[str, dict[str, np.ndarray]]


@functools.lru_cache
def judge(source: Any, steps: int = 600, width: int = 64) -> Judge:
    """A perceptron trained on the training part of an image source; always the same one."""
    parts = {s: source.make(64, seed=0, split=s).whole() for s in ("train", "valid")}
    top = source.vocab_size() - 1
    scaled = lambda tokens: jnp.asarray(tokens, jnp.float32) / top  # noqa: E731
    config = MLPConfig(source.classes, source.seq_len, d_model=width, dropout=0.2)
    module, objective, tx = config.build("cpu"), Classify(), optax.adam(2e-3)
    x, y = scaled(parts["train"]["tokens"]), jnp.asarray(parts["train"]["labels"])

    def apply(params, *args, **kwargs) -> Any:
        return module.apply({"params": params}, *args, **kwargs)

    @jax.jit
    def train(key):
        params = init_params(module, key, (jax.ShapeDtypeStruct((1, x.shape[1]), x.dtype),))

        def step(carry, key):
            params, opt = carry
            rows = jax.random.randint(key, (64,), 0, len(x))
            batch = {"features": x[rows], "labels": y[rows], "step": 0}
            grads = jax.grad(lambda p: objective(apply, p, batch, key)[0] / 64)(params)
            updates, opt = tx.update(grads, opt)
            return (optax.apply_updates(params, updates), opt), None

        return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[0][0]

    params = train(jax.random.key(0))
    features = jax.jit(lambda tokens: apply(params, scaled(tokens), features=True))
    classes = jax.jit(lambda tokens: jnp.argmax(apply(params, scaled(tokens)), -1))
    return Judge(features, classes, parts)


@dataclasses.dataclass(frozen=True)
class Frechet:
    """Frechet distance of features of written images from those of the training part.

    Names: distance; held_out, that of as many real images that were not trained on, below which no
    model need go; right, the share of written images whose class, as the classifier sees it, is the one
    asked for; classifier, its accuracy on the held-out part. `jaxlab eval` also draws frechet.png.
    """

    psi: Annotated[Psi, "how the model writes"] = Psi()
    rows: Annotated[int, "images to write"] = 512

    def check(self, run: Any) -> None:
        """ValueError when it cannot be applied to this run."""
        if not hasattr(run.objective, "prior") or not hasattr(run.source, "side"):
            raise ValueError(
                f"evaluator Frechet needs a diffusion model of images, not {run.objective}"
            )
        if self.rows < 2:
            raise ValueError(f"evaluator Frechet: rows={self.rows} must be at least 2")
        self.psi.of(run)

    def make(self, scene):
        run = scene.run
        config = self.psi.of(run)
        shape = (rows_on(scene.mesh, self.rows), run.source.seq_len)
        labels = every_class(run, shape[0])

        @jax.jit
        def write(params, key):
            return sample(key, denoiser(scene.apply, params), config, shape, labels=labels)

        def evaluate(params, step: int) -> dict[str, float | str]:
            key = jax.random.fold_in(jax.random.key(run.seed), step)
            tokens = np.asarray(write(params, key))[: self.rows]
            if scene.folder is not None:
                draw(scene.folder / "frechet.png", tokens, run.source)
            values = figures(judge(run.source), tokens, labels)
            return {f"frechet/{name}": value for name, value in values.items()}

        return evaluate


def figures(judge: Judge, tokens: np.ndarray, labels: Any) -> dict[str, float]:
    """What `Frechet` reports of rows of tokens [n, t] and the classes asked for, or None."""
    train, valid = (judge.parts[name] for name in ("train", "valid"))
    real = judge.features(train["tokens"])
    away = lambda x: float(frechet_distance(judge.features(x), real))  # noqa: E731
    # A mask that is left over is no grey level: it counts as the darkest.
    tokens = np.minimum(tokens, train["tokens"].max())
    accuracy = np.mean(judge.classes(valid["tokens"]) == valid["labels"])
    values = {
        "distance": away(tokens),
        "held_out": away(valid["tokens"][: len(tokens)]),
        "classifier": float(accuracy),
    }
    if labels is not None:
        values["right"] = float(np.mean(judge.classes(tokens) == labels[: len(tokens)]))
    return values


def draw(file: Path, tokens: np.ndarray, source: Any, columns: int = 20, lines: int = 5) -> None:
    """Writes the first images, and below them as many real ones of the held-out part."""
    from matplotlib.figure import Figure

    real = judge(source).parts["valid"]["tokens"]
    figure = Figure(figsize=(columns / 2, lines + 0.6), layout="constrained")
    for axis, rows, title in zip(
        figure.subplots(2, 1), (tokens, real), ("written", "held out"), strict=True
    ):
        side = source.side
        images = np.full((columns * lines, side + 1, side + 1), 0)
        some = rows[: len(images)].reshape(-1, side, side)
        images[: len(some), :side, :side] = some
        grid = images.reshape(lines, columns, side + 1, side + 1).swapaxes(1, 2)
        grid = grid.reshape(lines * (side + 1), -1)
        axis.imshow(grid, cmap="gray_r", vmax=source.vocab_size() - 1)
        axis.set(title=title, xticks=[], yticks=[])
    figure.savefig(file, dpi=80)
