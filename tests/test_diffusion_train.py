"""Training and writing of diffusion models: meshes, curriculum, evaluation, the command line."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import presets
from models.dit import DiTConfig
from sharding.context import ContextConfig
from sharding.mesh import MeshShape
from train import trainer
from train.cli import main
from train.data.bigram import bigram_loss, fit_bigram
from train.data.text import Text
from train.denoise import Denoised, Psi
from train.diffusion import duo, duo_pp, mdlm, udlm
from train.evaluate import HeldOut
from train.metrics import read, series
from train.optimizer import Optimizer
from train.run import Run

RUN = Run(
    model=DiTConfig(vocab=264, layers=2, d_model=16, heads=4, cond=8),
    objective=mdlm(),
    source=Text(seq_len=32),
    evaluators=(HeldOut(batches=1), Denoised(Psi(steps=3), rows=8)),
    optimizer=Optimizer(warmup=2, lr=0.01),
    mesh=MeshShape(data=1),
    steps=3,
    batch=8,
    log_every=1,
)


def train(folder, mesh=RUN.mesh, **changes):
    """(losses of the steps, last values)."""
    out = trainer.fit(dataclasses.replace(RUN, mesh=mesh, **changes), folder, quiet=True)
    assert out.code == trainer.DONE
    return np.array(series(read(folder), "train", "loss")[1]), out.values


@pytest.mark.parametrize(
    "objective",
    [
        duo_pp(end=2),
        pytest.param(mdlm(), marks=pytest.mark.slow),
        pytest.param(udlm(), marks=pytest.mark.slow),
        pytest.param(duo(end=2), marks=pytest.mark.slow),
    ],
    ids=["duo++", "mdlm", "udlm", "duo"],
)
def test_losses_and_texts_do_not_depend_on_devices(objective, tmp_path):
    one, values = train(tmp_path / "one", objective=objective)
    eight, same = train(tmp_path / "eight", MeshShape(data=2, fsdp=4), objective=objective)
    np.testing.assert_allclose(one, eight, atol=1e-4)
    assert abs(values["valid/loss"] - same["valid/loss"]) < 1e-4
    assert values["sample"] == same["sample"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ulysses", "ring", "upipe"])
def test_a_sharded_sequence_changes_nothing(method, tmp_path):
    one, values = train(tmp_path / "one")
    model = dataclasses.replace(RUN.model, context=ContextConfig(method))
    split, same = train(tmp_path / "split", MeshShape(data=2, context=4), model=model)
    np.testing.assert_allclose(one, split, atol=1e-4)
    assert abs(values["valid/loss"] - same["valid/loss"]) < 1e-4


def losses(objective, step, model=RUN.model):
    """Loss of an untrained model on one batch."""
    run = dataclasses.replace(RUN, objective=objective, model=model).check(1)
    program = trainer.build(run, jax.devices()[:1])
    rows = run.source.make(run.batch, seed=0, split="train")
    batch = dict(rows.batch_at(0, slice(0, run.batch)))
    params = program.init().params
    more = {} if step is None else {"step": jax.numpy.int32(step)}
    loss, metrics = run.objective(program.apply, params, batch | more, jax.random.key(0))
    assert loss == metrics["loss"][0]
    return float(metrics["loss"][0] / metrics["loss"][1])


@pytest.mark.parametrize("make", [duo, duo_pp])
def test_the_curriculum_ends_at_its_step_and_is_not_there_in_evaluation(make):
    model = dataclasses.replace(RUN.model, dropout=0.0)
    early, late = losses(make(end=5), 4, model), losses(make(end=5), 5, model)
    assert early != late and late == losses(udlm(), 5, model)
    assert losses(make(end=5), None) == losses(udlm(), None)


def test_an_untrained_bound_is_near_the_logarithm_of_the_vocabulary():
    """Of a model that says nothing: log 256 for the mask, by the integral of its weight."""
    found = [losses(mdlm(), None, dataclasses.replace(RUN.model, vocab=264))]
    assert abs(np.mean(found) - np.log(256)) < 1.5


def test_the_judge_is_the_bigram_model_of_the_demo():
    rows = [RUN.source.make(8, seed=0, split=s) for s in ("train", "valid")]
    judge = fit_bigram(*rows, 256)
    pairs = [(t[y >= 0], y[y >= 0]) for t, y in rows[1].pairs()]
    a, b = (np.concatenate(x) for x in zip(*pairs, strict=True))
    assert judge(a, b) == bigram_loss(*rows, 256)
    shuffled = np.random.default_rng(0).permutation(b)
    assert judge(a, shuffled) > judge(a, b) + 0.5


def test_presets_are_legal():
    for name in ("mdlm", "udlm", "duo", "duo_pp", "dcd"):
        presets()[name].make().check(1)


def test_the_command_writes_rows_and_shows_how(tmp_path, capsys):
    train(tmp_path / "run", steps=1)
    folder = str(tmp_path / "run")
    sample = lambda *args: main(presets(), ["sample", folder, *args])  # noqa: E731
    assert (
        sample("--n", "2", "--psi", "steps=4", "--psi", "high=pure-pc", "--psi", "high_frac=0.5")
        == 0
    )
    assert "--- row 2 ---" in capsys.readouterr().out
    assert sample("--views", "3", "--psi", "steps=4") == 0
    out = capsys.readouterr().out
    assert "after 1 of 4 steps" in out and "at the end" in out
    for args, message in (
        (["--prompt", "x"], "writes whole rows"),
        (["--psi", "stepz=4"], "steps"),
        (["--psi", "low=constant-2"], "constant-2"),
        (["--psi", "nucleus=0"], "nucleus=0"),
    ):
        assert sample(*args) == 2
        assert message in capsys.readouterr().err
