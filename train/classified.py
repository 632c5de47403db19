"""Evaluator of a classifier's uncertainty: calibration, deferral, detection, and which class it is about."""

import dataclasses
import functools
import sys
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import uncertainty as un
from train.evaluate import Scene
from train.feed import global_batch
from train.objectives import inputs_of
from train.posterior import Dropout, Laplace, Members, Runs, Swag

RANKED = ("entropy", "mi", "c_sum", "maxprob")  # what errors and strangers are told by


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """Figures of the held-out part, from samples of a posterior; `jaxlab eval` also draws them.

    Names: accuracy, nll, ece, brier; aurc, eaurc, augrc by score; class/k/c, the mean C_k. With
    critical classes: by score the area under the critical false-negative rate, that rate at
    `coverage` and the share of critical rows deferred there. Where the source has a split "ood":
    auroc, aupr and fpr95 by score.
    """

    posterior: Annotated[
        Dropout | Members | Laplace | Swag | Runs, "where the samples come from"
    ] = Dropout()
    critical: Annotated[tuple[int, ...], "classes that must not be missed; (): none"] = ()
    coverage: Annotated[float, "share that is kept where rates are reported"] = 0.8

    def check(self, run: Any) -> None:
        """ValueError when it cannot be applied to this run."""
        classes = getattr(run.model, "classes", None)
        if classes is None:
            raise ValueError("evaluator Uncertainty needs a classifier: the model has no classes")
        if jax.process_count() > 1:
            raise ValueError("evaluator Uncertainty runs in one process")
        if sum(isinstance(e, Uncertainty) for e in run.evaluators) > 1:
            raise ValueError(
                "evaluators: two of Uncertainty would write the same figures; set the posterior of one, "
                "and evaluate again for another"
            )
        bad = set(self.critical) - set(range(classes))
        twice = len(set(self.critical)) < len(self.critical)
        if bad or twice or len(self.critical) == classes:
            raise ValueError(
                f"evaluator Uncertainty: critical={self.critical} must be some, not all, of the classes "
                f"below {classes}, each once"
            )
        if not 0 < self.coverage <= 1:
            raise ValueError(f"evaluator Uncertainty: coverage={self.coverage} must be in (0, 1]")
        self.posterior.check(run)

    def make(self, scene: Scene):
        samples = self.posterior.make(scene)
        predict = jax.jit(samples.predict)

        def predictions(fitted, split: str):
            """(p [S, n, K], labels [n], inputs [n, ...]) of a whole split."""
            run = scene.run
            rows = run.source.make(run.batch, seed=run.seed, split=split)
            size = getattr(rows, "size", rows.num_batches * run.batch)
            parts = []
            for i in range(-(-size // run.batch)):
                fetch = lambda r, i=i: rows.batch_at(i, r)  # noqa: E731
                batch = global_batch(fetch, rows.spec, scene.mesh)
                key = jax.random.fold_in(jax.random.key(run.seed), i)
                p = predict(fitted, inputs_of(batch), key)
                parts.append(jax.device_get((p, batch["labels"], inputs_of(batch)[0])))
            p, y, x = zip(*parts, strict=True)
            return (
                np.concatenate(p, 1)[:, :size],
                np.concatenate(y)[:size],
                np.concatenate(x)[:size],
            )

        def evaluate(params, step: int) -> dict[str, float | str]:
            fitted = samples.prepare(params)
            p, y, x = predictions(fitted, "valid")
            values = figures(p, y, self.critical, self.coverage)
            if "ood" in getattr(scene.run.source, "splits", ()):
                strange = predictions(fitted, "ood")[0]
                values |= detection(p, strange)
            if scene.folder is not None:
                from train.pictures import draw, table

                page = table(values, p, y, step, self)
                print(page, file=sys.stderr)
                draw(scene.folder / "uncertainty", page, p, y, x, self.critical)
            return {f"uncertainty/{name}": float(v) for name, v in values.items()}

        return evaluate


def figures(p, y, critical: tuple[int, ...], coverage: float) -> dict[str, Any]:
    """Named figures of samples p [S, n, K] and labels y [n]."""
    classes = p.shape[-1]
    mean = p.mean(0)
    yhat = mean.argmax(-1)
    wrong = (yhat != y).astype(np.int32)
    nll = -np.mean(np.log(np.maximum(mean[np.arange(len(y)), y], 1e-30)))
    values = {"accuracy": 1 - wrong.mean(), "nll": nll, "ece": jax.jit(un.ece)(mean, y)}
    values["brier"] = jax.jit(un.brier)(mean, y)
    for name, score in ranked(p).items():
        for area, value in areas(score, wrong).items():
            values[f"{area}/{name}"] = value
    if critical:
        safe = tuple(k for k in range(classes) if k not in critical)
        scores = jax.jit(un.critical_scores, static_argnums=(1, 2))(p, safe, critical)
        for name, score in scores.items():
            for rate, value in rates(y, yhat, score, critical, coverage, classes).items():
                values[f"critical_{rate}/{name}"] = value
    c, reliable = by_class(p)
    values["reliable"] = reliable
    return values | {f"class/{k}/c": x for k, x in enumerate(c)}


@jax.jit
def areas(score, wrong) -> dict[str, Any]:
    """The areas under the risk-coverage curve, by name."""
    return {fn.__name__: fn(score, wrong) for fn in (un.aurc, un.eaurc, un.augrc)}


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def rates(y, yhat, score, critical, coverage: float, classes: int) -> dict[str, Any]:
    """What deferring by a score does for the critical classes, by name; NaN where no row is critical."""
    some = jnp.any(jnp.isin(y, jnp.asarray(critical)))
    curve = un.selective_curve(y, yhat, score, critical, (coverage,), num_classes=classes)
    found = {
        "ausc": un.ausc(y, yhat, score, critical),
        "fnr": curve.critical_fnr[0],
        "deferred": curve.deferred_critical[0],
    }
    return {name: jnp.where(some, x, jnp.nan) for name, x in found.items()}


@jax.jit
def by_class(p):
    """(mean C [K], share of samples and classes whose C may be read as D)."""
    m = un.moments(p)
    rho = un.skewness_ratio(m.mean, m.var, m.m3)
    return un.contributions_from_moments(m).mean(0), un.reliable_mask(rho).mean()


def detection(inside, outside) -> dict[str, Any]:
    """How well each score tells rows of other classes from the known."""
    a, b = ranked(inside), ranked(outside)
    positive: Any = np.repeat([0, 1], [inside.shape[1], outside.shape[1]])
    values = {}
    for name in a:
        for figure, value in detected(np.concatenate([a[name], b[name]]), positive).items():
            values[f"ood_{figure}/{name}"] = value
    return values


@jax.jit
def detected(score, positive) -> dict[str, Any]:
    """AUROC, AUPR and the false-positive rate, by name."""
    named = (("auroc", un.auroc), ("aupr", un.aupr), ("fpr95", un.fpr_at_tpr))
    return {name: fn(score, positive) for name, fn in named}


def ranked(p) -> dict[str, Any]:
    """The scores of `RANKED`, each [n]."""
    return {name: np.asarray(x) for name, x in zip(RANKED, _ranked(p), strict=True)}


@jax.jit
def _ranked(p):
    entropy, mi = un.predictive_entropy(p), un.mutual_information(p)
    return entropy, mi, un.contributions(p).sum(-1), 1 - p.mean(0).max(-1)
