"""Diffusion of images: their tokens, the distance of features, training, drawing, guidance."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest
from scipy import linalg

from configs import presets, unet
from jaxlab import diffusion as d
from models.dit import DiTConfig
from models.unet import UNetConfig
from sharding.mesh import MeshShape
from train import trainer
from train.cli import main
from train.data.pixels import Pixels
from train.denoise import Psi
from train.diffusion import Curriculum, Diffusion
from train.evaluate import HeldOut
from train.frechet import Frechet, figures, judge
from train.metrics import read, series
from train.optimizer import Optimizer
from train.run import Run

needs_digits = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="the images are those of scikit-learn"
)
RUN = Run(
    model=UNetConfig(channels=8, multipliers=(1,), attention=(0,), dropout=0.0),
    objective=Diffusion(classes=10, schedule="cosine"),
    source=Pixels(),
    evaluators=(HeldOut(batches=1), Frechet(Psi(steps=1), rows=16)),
    optimizer=Optimizer(lr=0.01, warmup=1),
    mesh=MeshShape(data=1),
    steps=2,
    batch=16,
    log_every=1,
)


def test_the_distance_is_that_of_float64_roots():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 7)) @ rng.normal(size=(7, 7))
    y = rng.normal(size=(50, 7)) @ rng.normal(size=(7, 7)) + 0.3
    a, b = np.cov(x.T), np.cov(y.T)
    want = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b - 2 * np.real(linalg.sqrtm(a @ b)))
    distance = jax.jit(d.frechet_distance)
    with jax.enable_x64(True):
        np.testing.assert_allclose(distance(x, y), want, rtol=1e-11)
        # Fewer rows than features, from themselves; a set moved.
        assert abs(distance(x[:3], x[:3])) < 1e-12
        np.testing.assert_allclose(distance(x, x + 2.0), 4.0 * 7, rtol=1e-12)
    np.testing.assert_allclose(distance(np.float32(x), np.float32(y)), want, rtol=1e-5)


@pytest.mark.parametrize(
    "x, y, message",
    [
        (np.zeros((3, 2)), np.zeros((3, 4)), "expected"),
        (np.zeros((1, 2)), np.zeros((3, 2)), "2 rows"),
    ],
)
def test_the_distance_names_what_is_wrong(x, y, message):
    with pytest.raises(ValueError, match=message):
        d.frechet_distance(x, y)


def test_wrong_runs_are_refused():
    change = lambda **fields: dataclasses.replace(RUN, **fields)  # noqa: E731
    model = lambda **fields: change(model=dataclasses.replace(RUN.model, **fields))  # noqa: E731
    for run, message in (
        (model(vocab=16), "model.vocab=16"),
        (model(side=4), "model.side=4"),
        (model(multipliers=(1, 2, 2, 2, 2)), "multiple of 16"),
        (model(attention=(3,)), "model.attention"),
        (model(channels=6), "model.channels=6"),
        (model(classes=4), "model.classes=4"),
        (change(objective=Diffusion(classes=None)), "objective.classes=None"),
        (change(objective=dataclasses.replace(RUN.objective, hide=1.0)), "objective.hide=1"),
        (
            change(objective=Diffusion(classes=10, curriculum=Curriculum())),
            "takes no mixed tokens",
        ),
        (change(model=DiTConfig(vocab=17), objective=Diffusion()), "source.side=8"),
        (change(evaluators=(Frechet(rows=1),)), "rows=1"),
        (change(evaluators=(Frechet(Psi(low="constant-2")),)), "constant-2"),
        (change(mesh=MeshShape(data=1, context=2)), "mesh.context=2"),
    ):
        with pytest.raises(ValueError, match=message):
            run.check(2 if run.mesh.context > 1 else 1)
    with pytest.raises(ValueError, match="guidance"):
        Psi(guidance=2.0).sampler(4, "uniform")


def train(folder, **changes):
    """(losses of the steps, last values)."""
    out = trainer.fit(dataclasses.replace(RUN, **changes), folder, quiet=True)
    assert out.code == trainer.DONE
    return np.array(series(read(folder), "train", "loss")[1]), out.values


@needs_digits
def test_tokens_are_the_grey_levels():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    parts = {s: RUN.source.make(8, seed=0, split=s).whole() for s in ("train", "valid")}
    both = np.concatenate([parts[s]["tokens"] for s in ("train", "valid")])
    assert sorted(map(tuple, both)) == sorted(map(tuple, x.astype(int)))
    rows = RUN.source.make(8, seed=0, split="valid").batch_at(1, slice(2, 5))
    assert rows["tokens"].dtype == np.int32 and rows["tokens"].shape == (3, 64)
    for tokens, label in zip(rows["tokens"], rows["labels"], strict=True):
        assert label in y[np.all(x == tokens, 1)]
    text = RUN.source.text(np.r_["0,2", np.zeros(64, int), np.full(64, 17)])
    assert text[0].strip() == "" and set(text[1]) == {"?", "\n"}


@needs_digits
def test_the_judge_knows_digits_and_noise():
    jury = judge(RUN.source)
    valid = jury.parts["valid"]
    real = figures(jury, valid["tokens"], valid["labels"])
    assert real["classifier"] == real["right"] > 0.95
    assert real["distance"] == real["held_out"]
    noise = np.random.default_rng(0).integers(0, 17, valid["tokens"].shape)
    found = figures(jury, noise, valid["labels"])
    assert found["distance"] > 20 * real["distance"] and found["right"] < 0.2


@needs_digits
@pytest.mark.slow
def test_a_run_trains_draws_and_writes(tmp_path, capsys):
    losses, values = train(tmp_path / "run")
    assert np.all(np.isfinite(losses)) and values["frechet/distance"] > values["frechet/held_out"]
    call = lambda *args: main(presets(), [*args])  # noqa: E731
    folder = str(tmp_path / "run")
    assert call("sample", folder, "--n", "1", "--psi", "steps=1", "--psi", "guidance=2") == 0
    assert len(capsys.readouterr().out.splitlines()) == 8
    assert call("eval", folder) == 0
    assert (tmp_path / "run" / "frechet.png").stat().st_size > 5000


@needs_digits
@pytest.mark.slow
def test_losses_and_images_do_not_depend_on_devices(tmp_path):
    one, values = train(tmp_path / "one")
    eight, same = train(tmp_path / "eight", mesh=MeshShape(data=2, fsdp=4))
    np.testing.assert_allclose(one, eight, atol=1e-4)
    for name in values:
        assert abs(values[name] - same[name]) < 1e-3, name


@needs_digits
@pytest.mark.slow
def test_trajectories_with_guidance(tmp_path, capsys):
    train(tmp_path / "run")
    more = ("--psi", "steps=2", "--psi", "guidance=2", "--psi", "removal=greedy")
    assert main(presets(), ["sample", str(tmp_path / "run"), "--views", "2", *more]) == 0
    assert "after 1 of 2 steps" in capsys.readouterr().out


@needs_digits
@pytest.mark.slow
def test_the_preset_learns_to_draw(tmp_path):
    """A fifth of it: nearer by ten times than before, and most digits are those asked for."""
    psi = dataclasses.replace(unet.run().evaluators[1].psi, steps=31)
    short = dataclasses.replace(
        unet.run(), steps=200, eval_every=0, evaluators=(Frechet(psi, rows=256),)
    )
    start = trainer.fit(dataclasses.replace(short, steps=1), tmp_path / "start", quiet=True)
    end = trainer.fit(short, tmp_path / "end", quiet=True)
    assert end.values["frechet/distance"] < 0.1 * start.values["frechet/distance"]
    assert end.values["frechet/right"] > 0.6
