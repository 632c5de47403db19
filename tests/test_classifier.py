"""Classifiers: their data without leaks, dropout and ensembles, posteriors, and the evaluator's page."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.digits import run as digits
from jaxlab import uncertainty as un
from models.classifier import EnsembleConfig, MLPConfig
from models.decoder import DecoderConfig
from models.vittt import ViTTTConfig
from train import trainer
from train.classified import Uncertainty, rates
from train.data.tabular import SIZES, Shipped, parts
from train.evaluate import Scene
from train.objectives import Classify
from train.posterior import Dropout, Laplace, Members, Swag

pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", SIZES)
def test_no_row_is_on_both_sides(name):
    found = parts(Shipped(name))
    train, valid = (set(map(bytes, found[k][0])) for k in ("train", "valid"))
    assert train and valid and not train & valid
    counts = [np.bincount(found[k][1]) for k in ("train", "valid")]
    np.testing.assert_allclose(counts[1] / (counts[0] + counts[1]), 0.35, atol=0.02)
    if name != "digits":  # by the training part alone
        np.testing.assert_allclose(found["train"][0].mean(0), 0, atol=1e-5)


def test_switches_change_what_they_say_and_nothing_else():
    plain = parts(Shipped())
    noisy = parts(Shipped(label_noise=0.3))
    np.testing.assert_array_equal(noisy["train"][0], plain["train"][0])
    np.testing.assert_array_equal(noisy["valid"][1], plain["valid"][1])
    assert abs(np.mean(noisy["train"][1] != plain["train"][1]) - 0.3) < 0.05
    kept = parts(Shipped(keep=(5,) * 9 + (7,)))
    assert list(np.bincount(kept["train"][1])) == [5] * 9 + [7]
    np.testing.assert_array_equal(kept["valid"][0], plain["valid"][0])
    moved = parts(Shipped(shift="permuted"))
    np.testing.assert_array_equal(moved["train"][0], plain["train"][0])
    np.testing.assert_allclose(np.sort(moved["valid"][0]), np.sort(plain["valid"][0]))
    left = parts(Shipped(leave_out=(8, 9)))
    assert set(left["ood"][1]) == {8, 9} and left["train"][1].max() == 7
    source = Shipped(noise=0.1).make(8, seed=1, split="train")
    whole = source.batch_at(200)
    np.testing.assert_array_equal(source.batch_at(200, slice(2, 5))["images"], whole["images"][2:5])


def test_an_ensemble_is_its_members():
    base = MLPConfig(classes=3, features=6, d_model=5, dropout=0.5)
    ensemble, one = (c.build("cpu") for c in (EnsembleConfig(base, 4), base))
    x = jax.random.normal(jax.random.key(1), (7, 6))
    params = jax.jit(ensemble.init)(jax.random.key(0), x)["params"]
    params = nn.unbox(params)
    logits = ensemble.apply({"params": params}, x)
    members = params["base"]
    want = [one.apply({"params": jax.tree.map(lambda a, i=i: a[i], members)}, x) for i in range(4)]
    np.testing.assert_allclose(logits, np.stack(want), atol=1e-6)
    assert len(np.unique(np.asarray(logits)[:, 0, 0])) == 4
    # The loss of an ensemble is the mean of its members' losses.
    batch = {"features": x, "labels": jnp.arange(7) % 3}
    whole = Classify()(lambda p, x: logits, None, batch, None)[0]
    each = [Classify()(lambda p, x, o=o: o, None, batch, None)[0] for o in want]
    np.testing.assert_allclose(whole, np.mean(each), rtol=1e-5)


def test_swag_is_its_definition():
    random = np.random.default_rng(0)
    walk = random.normal(size=(6, 3)) * 0.01 + 5
    with jax.enable_x64(True):
        state = un.swag_init({"w": jnp.zeros(3, "float64")}, 4)
        for point in walk:
            state = un.swag_update(state, {"w": jnp.asarray(point)})
        np.testing.assert_allclose(state.mean["w"], walk.mean(0), rtol=1e-12)
        np.testing.assert_allclose(state.var["w"], walk.var(0), rtol=1e-9)
        means = np.cumsum(walk, 0) / np.arange(1, 7)[:, None]
        rows = (walk - means)[[4, 5, 2, 3]]
        np.testing.assert_allclose(state.deviations["w"], rows, atol=1e-12)
        draw = jax.jit(jax.vmap(functools.partial(un.swag_sample, state=state)))
        drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 20000))["w"])
        want = (np.diag(walk.var(0)) + rows.T @ rows / 3) / 2
        np.testing.assert_allclose(np.cov(drawn.T), want, atol=0.05 * want.max())
    with pytest.raises(ValueError, match="rank=1"):
        un.swag_init({"w": jnp.zeros(3)}, 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": MLPConfig(classes=4, dropout=1.0)}, "model.dropout=1.0"),
        ({"model": MLPConfig(classes=5, dropout=0.1)}, "model.classes=5 must equal"),
        ({"model": MLPConfig(classes=4, features=9, dropout=0.1)}, "model.features=9 must equal"),
        ({"model": MLPConfig(classes=4)}, "Dropout needs model.dropout above 0"),
        ({"model": EnsembleConfig(MLPConfig(classes=4), members=1)}, "model.members=1"),
        ({"model": ViTTTConfig(classes=4, dropout=-1.0)}, "model.heads|model.dropout=-1.0"),
        ({"source": Shipped(keep=(3,))}, "source.keep"),
        ({"source": Shipped(label_noise=2.0)}, "source.label_noise=2.0"),
        ({"source": Shipped(relabel=(0,) * 10, label_noise=0.1)}, "source.relabel=.*two labels"),
        ({"source": Shipped(leave_out=(12,))}, "source.leave_out"),
        ({"evaluators": (Uncertainty(critical=(9,)),)}, "critical=\\(9,\\)"),
        ({"evaluators": (Uncertainty(critical=(2, 2)),)}, "critical=\\(2, 2\\)"),
        ({"evaluators": (Uncertainty(critical=(0, 1, 2, 3)),)}, "critical=\\(0, 1, 2, 3\\)"),
        ({"evaluators": (Uncertainty(coverage=0.0),)}, "coverage=0.0"),
        ({"evaluators": (Uncertainty(),) * 2}, "two of Uncertainty"),
        ({"evaluators": (Uncertainty(Members()),)}, "needs a model with members"),
        ({"evaluators": (Uncertainty(Swag(every=0)),)}, "every=0"),
        ({"evaluators": (Uncertainty(Laplace(prior_precision=0.0)),)}, "prior_precision=0.0"),
        ({"model": DecoderConfig()}, "model has no classes"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_work_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(digits(), **changes).check(1)


def test_rates_of_no_critical_row_are_unknown():
    """0 would read as perfect."""
    y, score = np.array([0, 1, 1, 0]), np.arange(4.0, dtype=np.float32)
    assert all(np.isnan(x) for x in rates(y, y, score, (2,), 0.5, 3).values())
    assert float(rates(y, y, score, (1,), 0.5, 3)["deferred"]) == 0.5


def sampled(samples, fitted, run, split):
    """Probabilities and labels of a whole split, row by row of the source."""
    x, y = parts(run.source)[split]
    rows, predict = run.source.make(run.batch, seed=run.seed, split=split), jax.jit(samples.predict)
    p = []
    for i in range(-(-len(y) // run.batch)):
        key = jax.random.fold_in(jax.random.key(run.seed), i)
        p.append(predict(fitted, (rows.batch_at(i)["images"],), key))
    return np.concatenate(p, 1)[:, : len(y)], y


def check_fit(posterior, run, scene, params, fitted):
    """What is fitted, against plain code: the curvature at all training rows, the walk of SGD."""
    if isinstance(posterior, Laplace):
        size = len(parts(run.source)["train"][1])
        rows = run.source.make(size, seed=run.seed, split="train").batch_at(0)["images"]
        features = scene.apply(params, rows, features=True)
        want = un.laplace_last_layer_fit(features, params["head"], params["bias"])
        for got, x in zip(jax.tree.leaves(fitted[1]), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(got, x, 1e-3, 1e-5)
    if isinstance(posterior, Swag):
        rows = run.source.make(run.batch, seed=run.seed, split="train")
        points = []

        def loss(params, batch, key):
            total, metrics = run.objective(scene.apply, params, batch, key)
            return total / metrics["loss"][1]

        slope = jax.jit(jax.grad(loss))
        for i in range(posterior.steps):
            batch = rows.batch_at(i) | {"step": np.int32(i)}
            down = slope(params, batch, jax.random.fold_in(jax.random.key(run.seed), i))
            params = jax.tree.map(lambda p, g: p - posterior.lr * g, params, down)
            points += [params] if (i + 1) % posterior.every == 0 else []
        mean = jax.tree.map(lambda *x: np.mean(x, 0), *points)
        for got, x in zip(jax.tree.leaves(fitted.mean), jax.tree.leaves(mean), strict=True):
            np.testing.assert_allclose(got, x, 1e-4, 1e-6)


POSTERIORS = [Dropout(4), Laplace(4), Swag(4, steps=4, every=2, rank=2), Members()]


@pytest.mark.parametrize("posterior", POSTERIORS, ids=lambda p: type(p).__name__)
def test_every_posterior_reports_what_its_samples_say_and_draws(posterior, tmp_path):
    model = MLPConfig(classes=4, d_model=8, dropout=0.3)
    if isinstance(posterior, Members):
        model = EnsembleConfig(model, 3)
    evaluator = Uncertainty(posterior, critical=(2, 3))
    run = dataclasses.replace(digits(), model=model, evaluators=(evaluator,)).check(1)
    program = trainer.build(run, jax.devices()[:1])
    with jax.set_mesh(program.mesh):
        params = program.init().params
        folder = tmp_path if isinstance(posterior, Members) else None
        scene = Scene(run, program.apply, program.mesh, (0, 1), None, folder)
        values = evaluator.make(scene)(params, 0)
        samples = posterior.make(scene)
        fitted = samples.prepare(params)
        check_fit(posterior, run, scene, params, fitted)
        p, y = sampled(samples, fitted, run, "valid")
        strange, _ = sampled(samples, fitted, run, "ood")
    assert all(np.isfinite(v) for v in values.values())
    mean, wide = p.mean(0), p.astype(np.float64)
    yhat = mean.argmax(-1)
    wrong, mi = (yhat != y).astype(int), un.mutual_information(p)
    cbec = un.cbec(p, (0, 1), (2, 3))
    kept = np.argsort(cbec, kind="stable")[: int(np.ceil(0.8 * len(y)))]
    critical, missed = y[kept] >= 2, (y[kept] >= 2) & (yhat[kept] < 2)
    c, rho = (wide.var(0) / wide.mean(0)).mean(0) / 2, un.skewness_ratio(*un.moments(p)[:3])
    both = np.concatenate([mi, un.mutual_information(strange)])
    for name, want in {
        "accuracy": np.mean(yhat == y),
        "nll": -np.log(mean[np.arange(len(y)), y]).mean(),
        "augrc/mi": un.augrc(mi, wrong),
        "aurc/mi": un.aurc(mi, wrong),
        "critical_ausc/cbec": un.ausc(y, yhat, cbec, (2, 3)),
        "critical_fnr/cbec": missed.sum() / critical.sum(),
        "critical_deferred/cbec": 1 - critical.sum() / np.sum(y >= 2),
        "ood_auroc/mi": un.auroc(both, np.repeat([0, 1], [len(y), strange.shape[1]])),
        "reliable": np.mean(rho < 0.3),
        **{f"class/{k}/c": x for k, x in enumerate(c)},
    }.items():
        # Rounding of the samples may swap neighbours in the order of a score.
        loose = 2e-3 if "/" in name and "class" not in name else 1e-5
        np.testing.assert_allclose(values[f"uncertainty/{name}"], want, loose, 1e-7, err_msg=name)
    if folder:
        names = {"table.md", "reliability.png", "risk_coverage.png", "classes.png",
                 "most_uncertain.png"}  # fmt: skip
        assert {f.name for f in (tmp_path / "uncertainty").iterdir()} == names


@pytest.mark.parametrize("source", ["members", "passes"])
def test_eight_devices_sample_as_one(source):
    """64 members, or 512 passes, split over samples and rows of inputs."""
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = jax.make_mesh((4, 2), ("s", "n"), (AxisType.Auto,) * 2, devices=jax.devices()[:8])
    place = lambda tree, *spec: jax.device_put(tree, NamedSharding(mesh, P(*spec)))  # noqa: E731
    drop = MLPConfig(classes=4, features=6, d_model=8, dropout=0.3).build("cpu")
    x = jax.random.normal(jax.random.key(1), (16, 6))
    keys = jax.random.split(jax.random.key(2), 64 if source == "members" else 512)
    born = lambda key: nn.unbox(drop.init(key, x))["params"]  # noqa: E731
    if source == "members":
        left = jax.vmap(born)(keys)
        predict = lambda p, x: un.ensemble_predict(  # noqa: E731
            lambda p, x: drop.apply({"params": p}, x), p, x
        )
    else:
        left, params = keys, born(jax.random.key(0))
        predict = lambda keys, x: un.mc_predict(  # noqa: E731
            lambda p, x, k: drop.apply(
                {"params": p}, x, deterministic=False, rngs={"dropout": k}
            ), params, x, keys,
        )  # fmt: skip

    @jax.jit
    def evaluate(left, x):
        p = predict(left, x)
        return p, un.moments(p), un.critical_scores(p, (0, 1), (2, 3))

    split = evaluate(place(left, "s"), place(x, "n"))
    shape = split[0].shape  # a copy on each device would be on 8 devices, too
    assert split[0].sharding.shard_shape(shape)[:2] == (shape[0] // 4, shape[1] // 2)
    whole = evaluate(*jax.device_put((left, x), jax.devices()[0]))
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
