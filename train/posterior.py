"""Where the samples of a network's probabilities come from: one protocol, five sources.

`make(scene)` returns `Samples`: `prepare(params)` fits what has to be fitted; `predict`, a pure function of
what it gives, the inputs and a key, makes probabilities and may be jitted and sharded. Where samples are
whole networks, `draws` gives them: of a language model the probabilities would not fit.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import uncertainty as un
from train.folders import starting_parameters, starting_run
from train.objectives import inputs_of


@dataclasses.dataclass(frozen=True)
class Samples:
    """`fitted = prepare(params)`, then `predict(fitted, inputs, key)` -> probabilities [S, n, K].

    `draws(fitted, key)` -> (a pytree with S in front, `net(one, *inputs, **options)`: what a draw says);
    all draws have the same parameters if `same_params`.
    """

    prepare: Callable[[Any], Any]
    predict: Callable[[Any, tuple, jax.Array], jax.Array]
    draws: Callable[[Any, jax.Array], tuple[Any, Callable]] | None = None
    same_params: bool = False


def of_networks(prepare: Callable, draws: Callable, same_params: bool = False) -> Samples:
    """`Samples` of whole networks."""

    def predict(fitted, inputs, key):
        stacked, net = draws(fitted, key)
        return un.ensemble_predict(lambda one, inputs: net(one, *inputs), stacked, inputs)

    return Samples(prepare, predict, draws, same_params)


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Passes with dropout left on (Gal and Ghahramani, 1506.02142)."""

    samples: Annotated[int, "stochastic passes"] = 30

    def check(self, run) -> None:
        """ValueError unless the model drops anything out."""
        at_least("samples", self.samples)
        if not dropout_of(run.model):
            raise ValueError(
                "posterior Dropout needs model.dropout above 0, which is what the model trained with; "
                "or evaluators.0.posterior=Swag (of a classifier also Laplace)"
            )

    def make(self, scene) -> Samples:
        """Nothing is fitted."""
        # A language model drops out where it is given the rng.
        how = {} if hasattr(scene.run.model, "vocab") else {"deterministic": False}

        def draws(params, key):
            def net(key, *inputs, **options):
                return scene.apply(params, *inputs, rngs={"dropout": key}, **how, **options)

            return jax.random.split(key, self.samples), net

        return of_networks(lambda params: params, draws, same_params=True)


@dataclasses.dataclass(frozen=True)
class Runs:
    """An ensemble of this run and others of the same model, such as those of other seeds."""

    runs: Annotated[tuple[str, ...], "run directories, or checkpoints of them"] = ()

    def check(self, run) -> None:
        """ValueError unless there are other runs, of the same model."""
        if not self.runs:
            raise ValueError("posterior Runs: runs=[] must name at least one run beside this one")
        single(run, "Runs")
        for folder in self.runs:
            try:
                starting_run(dataclasses.replace(run, start=folder))
            except ValueError as error:
                raise ValueError(
                    f"posterior Runs: {str(error).replace('start=', 'runs=', 1)}"
                ) from None

    def make(self, scene) -> Samples:
        """Reads the parameters of the others."""

        def prepare(params):
            others = [
                starting_parameters(dataclasses.replace(scene.run, start=folder))
                for folder in self.runs
            ]
            return jax.tree.map(lambda *x: jnp.stack(x), params, *others)

        return of_networks(prepare, lambda stacked, key: (stacked, scene.apply))


@dataclasses.dataclass(frozen=True)
class Members:
    """The members of an ensemble that was trained as one model (EnsembleConfig)."""

    def check(self, run) -> None:
        """ValueError unless the model is an ensemble."""
        if not hasattr(run.model, "members"):
            raise ValueError("posterior Members needs a model with members, such as EnsembleConfig")

    def make(self, scene) -> Samples:
        """Nothing is fitted."""

        def predict(params, inputs, key):
            return jax.nn.softmax(scene.apply(params, *inputs).astype(jnp.float32))

        return Samples(lambda params: params, predict)


@dataclasses.dataclass(frozen=True)
class Laplace:
    """Gaussian about the last layer, from the curvature at the training data (Daxberger, 2106.14806)."""

    samples: Annotated[int, "draws of the last layer"] = 30
    prior_precision: Annotated[float, "of the Gaussian prior of its parameters"] = 1.0
    batches: Annotated[int, "training batches the curvature is of; 0: all, once"] = 0

    def check(self, run) -> None:
        """ValueError unless the model is one classifier with a known last layer."""
        at_least("samples", self.samples)
        if not 0 < self.prior_precision < float("inf") or self.batches < 0:
            raise ValueError(
                f"posterior Laplace: prior_precision={self.prior_precision} must be above 0 and "
                f"batches={self.batches} at least 0"
            )
        single(run, "Laplace")
        if hasattr(run.model, "vocab"):
            raise ValueError(
                "posterior Laplace needs a classifier: the last layer of a language model has too many "
                "parameters for a full covariance; use Swag, Dropout or Runs"
            )

    def make(self, scene) -> Samples:
        """Fits the last layer to features of the training data."""
        run = scene.run
        features = lambda params, x: scene.apply(params, *x, features=True)  # noqa: E731

        def prepare(params):
            seen = jax.jit(features)
            batches, size = training_batches(run, self.batches)
            found = jnp.concatenate([seen(params, inputs_of(b)) for b in batches])
            fit = jax.jit(un.laplace_last_layer_fit, static_argnames="prior_precision")
            post = fit(
                found[:size], params["head"], params["bias"], prior_precision=self.prior_precision
            )
            return params, post

        def predict(fitted, inputs, key):
            params, post = fitted
            return un.laplace_last_layer_sample(post, features(params, inputs), key, self.samples)

        return Samples(prepare, predict)


@dataclasses.dataclass(frozen=True)
class Swag:
    """Gaussian about the walk of plain SGD that goes on from the trained parameters (1902.02476)."""

    samples: Annotated[int, "draws of all parameters"] = 30
    steps: Annotated[int, "steps of the walk"] = 300
    every: Annotated[int, "steps between the points that are counted"] = 10
    lr: Annotated[float, "constant learning rate of the walk"] = 0.02
    rank: Annotated[int, "deviations that are kept"] = 20
    scale: Annotated[float, "factor of the standard deviation"] = 1.0

    def check(self, run) -> None:
        """ValueError for a walk of fewer than two points, and for ensembles."""
        at_least("samples", self.samples)
        if self.every < 1 or self.steps < 2 * self.every or self.rank < 2:
            raise ValueError(
                f"posterior Swag: every={self.every} must be at least 1, steps={self.steps} at least "
                f"twice it, rank={self.rank} at least 2"
            )
        if not (0 < self.lr < float("inf") and 0 <= self.scale < float("inf")):
            raise ValueError(
                f"posterior Swag: lr={self.lr} must be above 0 and scale={self.scale} at least 0"
            )
        single(run, "Swag")

    def make(self, scene) -> Samples:
        """Walks on the training data, in one program."""
        run = scene.run

        def prepare(params):
            batches, _ = training_batches(run, self.steps // self.every * self.every)
            stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *batches)
            cut = lambda x: x.reshape(-1, self.every, *x.shape[1:])  # noqa: E731

            def step(params, batch):
                key = jax.random.fold_in(jax.random.key(run.seed), batch["step"])

                def loss(params):
                    total, metrics = run.objective(scene.apply, params, batch, key)
                    return total / metrics["loss"][1]

                down = lambda p, g: p - self.lr * g  # noqa: E731
                return jax.tree.map(down, params, jax.grad(loss)(params)), None

            def point(carry, batches):
                params, state = carry
                params, _ = jax.lax.scan(step, params, batches)
                return (params, un.swag_update(state, params)), None

            def walk(params, batches):
                start = (params, un.swag_init(params, self.rank))
                return jax.lax.scan(point, start, batches)[0][1]

            stacked["step"] = jnp.arange(len(batches))
            return jax.jit(walk)(params, jax.tree.map(cut, stacked))

        def draws(state, key):
            def net(key, *inputs, **options):
                params = un.swag_sample(key, state, scale=self.scale)
                return scene.apply(params, *inputs, **options)

            return jax.random.split(key, self.samples), net

        return of_networks(prepare, draws)


def training_batches(run: Any, count: int) -> tuple[list[dict[str, np.ndarray]], int]:
    """The first `count` batches of the training split, and how many rows they are; 0: one epoch."""
    source = run.source.make(run.batch, seed=run.seed, split="train")
    if not count and not hasattr(source, "size"):
        raise ValueError("posterior Laplace: this source has no end, set batches to 1 or more")
    size = count * run.batch or source.size
    return [source.batch_at(i) for i in range(-(-size // run.batch))], size


def dropout_of(model: Any) -> float:
    """The rate of a model, or of what it wraps."""
    return getattr(model, "dropout", 0) or getattr(getattr(model, "base", None), "dropout", 0)


def at_least(name: str, value: int, least: int = 2) -> None:
    """ValueError below `least`."""
    if value < least:
        raise ValueError(f"posterior {name}={value} must be at least {least}")


def single(run: Any, name: str) -> None:
    """ValueError for a model that is no single network."""
    if hasattr(run.model, "members"):
        raise ValueError(f"posterior {name} is of one network, not of EnsembleConfig: use Members")
