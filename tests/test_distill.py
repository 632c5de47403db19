"""Distillation: a frozen teacher, rounds, a loss that falls, and the command that starts it."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import presets
from models.distilled import FROZEN_TEACHER, Distilled
from models.dit import DiTConfig
from sharding.mesh import MeshShape
from train import trainer
from train.cli import main
from train.data.text import Text
from train.diffusion import mdlm, udlm
from train.distill import Dcd
from train.evaluate import HeldOut
from train.optimizer import Optimizer
from train.run import Run, load_run

BASE = Run(
    model=DiTConfig(layers=1, d_model=16, heads=2, cond=8, dropout=0.0),
    objective=udlm(),
    source=Text(seq_len=16),
    optimizer=Optimizer(lr=0.03, warmup=2, schedule="constant"),
    mesh=MeshShape(data=1),
    steps=30,
    batch=16,
)
ROUND = 20
PAIR = dataclasses.replace(
    BASE,
    model=Distilled(BASE.model),
    objective=Dcd(T=4, every=ROUND),
    optimizer=Optimizer(lr=3e-3, warmup=2, schedule="constant", freeze=FROZEN_TEACHER),
)


def batches(run, program):
    rows = run.source.make(run.batch, seed=0, split="train")
    place = jax.tree.map(lambda a: a.sharding, program.batch)
    return lambda step: jax.device_put(rows.batch_at(step, slice(0, run.batch)), place)


def steps(run, state=None, params=None):
    """Yields (state, loss) after each step."""
    program = trainer.build(run.check(1), jax.devices()[:1])
    batch_at = batches(run, program)
    with jax.set_mesh(program.mesh):
        state = program.init() if params is None else program.warm(params)
        for step in range(run.steps):
            state, metrics = program.step(state, batch_at(step))
            total, count = jax.device_get(metrics["loss"])
            yield jax.device_get(state), float(total / count)


@pytest.fixture(scope="module")
def taught():
    """Parameters of a trained teacher."""
    return list(steps(BASE))[-1][0].params


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


def test_the_teacher_is_frozen_within_a_round_and_then_the_student(taught):
    run = dataclasses.replace(PAIR, steps=ROUND + 3)
    found = list(steps(run, params=jax.tree.map(np.copy, {"student": taught, "teacher": taught})))
    for state, _ in found[:ROUND]:
        assert equal(state.params["teacher"], taught)
        assert not equal(state.params["student"], taught)
    last = found[ROUND - 1][0].params["student"]
    for state, _ in found[ROUND:]:
        assert equal(state.params["teacher"], last)
    losses = [loss for _, loss in found]
    assert np.mean(losses[ROUND - 6 : ROUND]) < 0.8 * np.mean(losses[:3])


@pytest.mark.slow
def test_without_a_distance_a_student_has_nothing_to_learn(taught):
    run = dataclasses.replace(PAIR, objective=Dcd(T=10**9), steps=1)
    ((_, loss),) = steps(run, params={"student": taught, "teacher": taught})
    assert abs(loss) < 1e-6


def test_what_is_no_pair_is_refused():
    for run, message in (
        (dataclasses.replace(PAIR, model=BASE.model), "Distilled"),
        (dataclasses.replace(PAIR, objective=Dcd(every=0)), "every=0"),
        (dataclasses.replace(PAIR, objective=Dcd(alpha_max=0.0)), "alpha_max=0.0"),
        (dataclasses.replace(PAIR, model=Distilled(DiTConfig(heads=3))), "model.base.heads=3"),
    ):
        with pytest.raises(ValueError, match=message):
            run.check(1)


@pytest.mark.slow
def test_the_command_makes_a_run_of_a_teacher(tmp_path, capsys):
    run = dataclasses.replace(BASE, steps=2, evaluators=(HeldOut(batches=1),), mesh=MeshShape())
    trainer.fit(run, tmp_path / "teacher", quiet=True)
    call = lambda *args: main(presets(), list(map(str, args)))  # noqa: E731
    made = ("import", "teacher", tmp_path / "teacher", "--run-dir", tmp_path / "dcd", "steps=3", "batch=16",
            "objective.every=2")  # fmt: skip
    assert call(*made) == 0, capsys.readouterr().err
    assert load_run(tmp_path / "dcd").model == Distilled(BASE.model)
    assert call("train", tmp_path / "dcd", "evaluators.1.psi.steps=2") == 0
    assert call("sample", tmp_path / "dcd", "--psi", "steps=2") == 0
    assert call(*made) == 2 and "dcd" in capsys.readouterr().err
    other = dataclasses.replace(
        run, objective=mdlm(), model=dataclasses.replace(BASE.model, vocab=264)
    )
    trainer.fit(other, tmp_path / "masked", quiet=True)
    assert call("import", "teacher", tmp_path / "masked", "--run-dir", tmp_path / "no") == 2
    assert "uniform" in capsys.readouterr().err
    assert call("train", "dcd", "--run-dir", tmp_path / "random") == 2
    assert "import teacher" in capsys.readouterr().err
