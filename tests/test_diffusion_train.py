"""Training and writing of diffusion models: meshes, curriculum, evaluation, the command line."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import presets
from jaxlab.diffusion import sample
from models.distilled import FROZEN_TEACHER, Distilled
from models.dit import DiTConfig
from sharding.context import ContextConfig
from sharding.mesh import MeshShape
from train import trainer
from train.cli import main
from train.data.bigram import bigram_loss, fit_bigram
from train.data.text import Text
from train.denoise import Denoised, Psi, denoiser
from train.diffusion import duo, duo_pp, mdlm, udlm
from train.distill import Dcd
from train.evaluate import HeldOut, Scene
from train.metrics import read, series
from train.optimizer import Optimizer
from train.run import Run
from train.state import in_microbatches, prepared

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
# One block without dropout, and no more tokens than the mesh needs: what compiles in a second or two.
SMALL = dataclasses.replace(
    RUN,
    model=DiTConfig(vocab=264, layers=1, d_model=8, heads=4, cond=8, dropout=0.0),
    source=Text(seq_len=16),
)


def start(run):
    """(program, random parameters, first batch) of a run; nothing is compiled."""
    mesh = run.mesh.resolve(run.mesh.data * run.mesh.fsdp * run.mesh.context)
    devices = mesh.data * mesh.fsdp * mesh.context
    program = trainer.build(run.check(devices), jax.devices()[:devices])
    random = np.random.default_rng(0)
    draw = lambda a: np.float32(random.normal(0, 0.3, a.shape))  # noqa: E731
    params = jax.tree.map(lambda a: jax.device_put(draw(a), a.sharding), program.state.params)
    rows = run.source.make(run.batch, seed=0, split="train").batch_at(0, slice(0, run.batch))
    place = {name: a.sharding for name, a in program.batch.items()}
    return program, params, jax.device_put(dict(rows), place)


def test_loss_gradient_and_rows_do_not_depend_on_devices():
    """Rows of the batch over two devices and tokens of a row over four, against one device."""

    def found(mesh, method="none"):
        model = dataclasses.replace(SMALL.model, context=ContextConfig(method))
        run = dataclasses.replace(SMALL, model=model, mesh=mesh, objective=duo_pp(end=2))
        run = dataclasses.replace(run, model=dataclasses.replace(model, vocab=256))
        program, params, batch = start(run)
        config = Psi(steps=2, low="constant-0.5").of(run)

        @jax.jit
        def all_of_it(params, batch):
            def loss(params):
                part = batch | {"step": 0}
                return program.run.objective(program.apply, params, part, jax.random.key(0))[0]

            denoise = denoiser(program.apply, params)
            return jax.value_and_grad(loss)(params), sample(
                jax.random.key(1), denoise, config, (8, 16)
            )

        with jax.set_mesh(program.mesh):
            return jax.device_get(all_of_it(params, batch))

    (loss, grads), rows = found(MeshShape(data=1))
    (same, spread), again = found(MeshShape(data=2, context=4), "ulysses")
    np.testing.assert_allclose(same, loss, rtol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (grads, spread)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, np.abs(a).max()))
    np.testing.assert_array_equal(rows, again)


def train(folder, mesh=RUN.mesh, **changes):
    """(losses of the steps, last values)."""
    out = trainer.fit(dataclasses.replace(RUN, mesh=mesh, **changes), folder, quiet=True)
    assert out.code == trainer.DONE
    return np.array(series(read(folder), "train", "loss")[1]), out.values


PAIR = {
    "model": Distilled(dataclasses.replace(RUN.model, vocab=256)),
    "objective": Dcd(T=4, every=2),
    "optimizer": dataclasses.replace(RUN.optimizer, freeze=FROZEN_TEACHER),
}
OBJECTIVES = {
    "mdlm": {"objective": mdlm()},
    "udlm": {"objective": udlm()},
    "duo": {"objective": duo(end=2)},
    "duo++": {"objective": duo_pp(end=2)},
    "dcd": PAIR,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_texts_of_a_run_do_not_depend_on_devices(name, tmp_path):
    one, values = train(tmp_path / "one", **OBJECTIVES[name])
    eight, same = train(tmp_path / "eight", MeshShape(data=2, fsdp=4), **OBJECTIVES[name])
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


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["linear_attention", "ttt_linear"])
def test_a_recurrence_both_ways_learns_in_the_place_of_attention(mixer, tmp_path):
    model = dataclasses.replace(RUN.model, mixer=mixer, d_model=32)
    source = Text(seq_len=16)
    run = {"model": model, "source": source, "steps": 60, "evaluators": (HeldOut(passes=4),)}
    optimizer = Optimizer(name="muon", lr=0.02, warmup=5)
    losses, values = train(tmp_path / "run", optimizer=optimizer, **run)
    assert np.all(np.isfinite(losses)) and values["valid/loss"] < 4.0 < np.log(263)


def losses(objective, *steps):
    """Losses of one batch with random parameters at these steps; None: held out."""
    vocab = 264 if objective.prior == "masked" else 256
    model = dataclasses.replace(SMALL.model, vocab=vocab)
    program, params, batch = start(dataclasses.replace(SMALL, objective=objective, model=model))

    @jax.jit
    def loss(more):
        total, metrics = objective(program.apply, params, batch | more, jax.random.key(0))
        return total, metrics["loss"]

    found = [loss({} if step is None else {"step": jnp.int32(step)}) for step in steps]
    assert all(total == pair[0] for total, pair in found)
    return [float(total / count) for _, (total, count) in found]


@pytest.mark.parametrize("make", [duo_pp, pytest.param(duo, marks=pytest.mark.slow)])
def test_the_curriculum_ends_at_its_step_and_is_not_there_in_evaluation(make):
    plain = losses(udlm(), None)[0]
    early, late, evaluated = losses(make(end=5), 4, 5, None)
    assert abs(early - plain) > 1e-3
    # Two programs: rounded otherwise.
    np.testing.assert_allclose([late, evaluated], plain, rtol=1e-6)


@pytest.mark.parametrize("objective, vocab", [(mdlm(), 17), (udlm(), 16)], ids=["mdlm", "udlm"])
def test_a_guess_without_knowledge_costs_the_logarithm_of_the_vocabulary(objective, vocab):
    """The integral of the bound's weight is 1: 16,384 rows of 8 tokens."""
    x0 = jax.random.randint(jax.random.key(0), (16_384, 8), 0, 16)
    batch = {"tokens": x0, "segment_ids": jnp.ones_like(x0), "positions": x0}
    apply = lambda params, z, sigma, **_: jnp.zeros((*z.shape, vocab))  # noqa: E731
    total, metrics = jax.jit(lambda key: objective(apply, {}, batch, key))(jax.random.key(1))
    assert abs(total / metrics["loss"][1] / np.log(16) - 1) < 0.02


def test_times_are_spread_over_the_whole_batch_however_it_is_cut():
    batch = {"tokens": jnp.zeros((8, 4), jnp.int32)}
    for count in (1, 4, 8):
        whole = prepared(mdlm(), batch, jax.random.key(0))
        strata = lambda part, key: jnp.sum(  # noqa: E731
            jax.nn.one_hot((part["time"] * 8).astype(int), 8), 0
        )
        np.testing.assert_array_equal(in_microbatches(strata, count, whole, jax.random.key(0)), 1)


def test_held_out_noise_is_the_batch_s_own_and_the_same_for_every_seed():
    def loss(seed=0, **fields):
        run = dataclasses.replace(SMALL, seed=seed, evaluators=())
        program, params, _ = start(run)
        scene = Scene(run, program.apply, program.mesh, (0, 1))
        return HeldOut(**fields).make(scene)(params, 0)["valid/loss"]

    once = loss(batches=1)
    assert once == loss(seed=1, batches=1)
    assert abs(once - loss(batches=1, passes=2)) > 1e-3


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
        (["--temperature", "0"], "--psi nucleus"),
        (["--views", "6", "--psi", "steps=4"], "5 moments"),
        (["--psi", "middle=pure-pc"], "middle_frac"),
        (["--psi", "guidance=2"], "classes"),
        (["--psi", "stepz=4"], "steps"),
        (["--psi", "low=constant-2"], "constant-2"),
        (["--psi", "nucleus=0"], "nucleus=0"),
    ):
        assert sample(*args) == 2
        assert message in capsys.readouterr().err
