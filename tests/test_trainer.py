"""The trainer: equal on every mesh, exact on resuming, honest about what it measures."""

import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.decoder import DecoderConfig
from sharding.mesh import MeshShape, make_mesh
from train import rundir, trainer
from train.checkpoint import Checkpoints
from train.data.text import Text
from train.evaluate import HeldOut
from train.feed import global_batch
from train.metrics import read, series
from train.objectives import NextToken
from train.optimizer import Optimizer, learning_rate, make_optimizer
from train.run import Run, difference, from_json, load_run, to_json

RUN = Run(
    model=DecoderConfig(layers=2, d_model=32, heads=4, kv_heads=4, head_dim=8, mlp=64),
    objective=NextToken(),
    source=Text(seq_len=32),
    optimizer=Optimizer(warmup=5),
    steps=20,
    batch=8,
    log_every=1,
    save_every=0,
)
MESHES = {
    "1": MeshShape(data=1),
    "data8": MeshShape(data=8),
    "fsdp8": MeshShape(data=1, fsdp=8),
    "tensor4 x data2": MeshShape(data=2, tensor=4),
    "context2 x fsdp4": MeshShape(data=1, context=2, fsdp=4),
}


def losses(folder) -> list[float]:
    return series(read(folder), "train", "loss")[1]


@pytest.fixture
def devices(monkeypatch):
    """Limits what the trainer sees to the first n devices."""
    whole = jax.devices()

    def limit(n: int):
        monkeypatch.setattr(jax, "device_count", lambda: n)
        monkeypatch.setattr(
            trainer, "make_mesh", lambda shape, devices=None: make_mesh(shape, devices or whole[:n])
        )

    return limit


def size(mesh: MeshShape) -> int:
    return abs(math.prod(dataclasses.astuple(mesh)))


def test_loss_after_20_steps_is_equal_on_every_mesh(tmp_path, devices):
    table = {}
    for name, mesh in MESHES.items():
        devices(size(mesh))
        folder = tmp_path / name.replace(" ", "")
        trainer.fit(dataclasses.replace(RUN, mesh=mesh), folder, quiet=True)
        table[name] = losses(folder)
    print(json.dumps({k: v[-1] for k, v in table.items()}))
    for name, got in table.items():
        assert len(got) == 20
        np.testing.assert_allclose(got, table["1"], rtol=0, atol=1e-4, err_msg=name)
    assert table["1"][-1] < table["1"][0] - 1


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_accumulation_is_exact(tmp_path, devices, name):
    devices(2)
    run = dataclasses.replace(
        RUN, optimizer=Optimizer(name=name, warmup=5, ema=0.5), steps=4, mesh=MeshShape(data=2)
    )
    held_out = {}
    for parts in (1, 4):
        cut = dataclasses.replace(run, accumulate=parts, evaluators=(HeldOut(batches=2),))
        held_out[parts] = trainer.fit(cut, tmp_path / str(parts), quiet=True).values["valid/loss"]
    np.testing.assert_allclose(losses(tmp_path / "4"), losses(tmp_path / "1"), atol=2e-5)
    assert abs(held_out[4] - held_out[1]) < 2e-5


def state_of(folder, mesh=None, step=None):
    run = load_run(folder)
    run = dataclasses.replace(run, mesh=mesh or run.mesh)
    program = trainer.build(run)
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    got = checkpoints.restore(program.state, step)
    checkpoints.close()
    return got.state


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


def test_resumed_in_two_parts_is_bit_identical(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=1), optimizer=Optimizer(ema=0.9, warmup=5))
    trainer.fit(run, tmp_path / "whole", quiet=True)
    # The schedule depends on `steps`, so the first part is the whole run stopped by its keeper.
    part = dataclasses.replace(run, save_every=7)
    trainer.fit(part, tmp_path / "parts", quiet=True)
    for step in (14, 20):
        shutil.rmtree(tmp_path / "parts" / "checkpoints" / str(step))
    trainer.fit(part, tmp_path / "parts", quiet=True)
    assert same(state_of(tmp_path / "whole"), state_of(tmp_path / "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_damaged_newest_checkpoint_falls_back(tmp_path, devices, capfd):
    devices(1)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=1), save_every=5)
    trainer.fit(run, tmp_path / "r", quiet=True)
    good = state_of(tmp_path / "r")
    newest = tmp_path / "r" / "checkpoints" / "20"
    for damage in ("truncate", "flip"):
        files = sorted(
            (p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
        )
        data = files[-1].read_bytes()
        if damage == "truncate":
            files[-1].write_bytes(data[: len(data) // 2])
        else:
            middle = len(data) // 2
            files[-1].write_bytes(data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :])
        out = trainer.fit(run, tmp_path / "r")
        assert out.code == trainer.DONE
        assert "checkpoint step 20 set aside as unusable" in capfd.readouterr().err
        assert same(state_of(tmp_path / "r"), good)
    kept = [p.name for p in (tmp_path / "r" / "checkpoints").iterdir()]
    assert sum(name.startswith("corrupt-20-") for name in kept) >= 1


def test_nothing_usable_is_an_error_that_changes_nothing(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=1), steps=2)
    trainer.fit(run, tmp_path / "r", quiet=True)
    for file in (tmp_path / "r" / "checkpoints" / "2").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no usable checkpoint"):
        trainer.fit(run, tmp_path / "r", quiet=True)
    assert (tmp_path / "r" / "checkpoints" / "2").is_dir()


def test_saved_on_8_devices_goes_on_on_1_2_4(tmp_path, devices):
    devices(8)
    first = dataclasses.replace(RUN, mesh=MeshShape(data=2, fsdp=2, tensor=2), save_every=10)
    trainer.fit(first, tmp_path / "eight", quiet=True)
    shutil.rmtree(tmp_path / "eight" / "checkpoints" / "20")
    saved = state_of(tmp_path / "eight")
    after = losses(tmp_path / "eight")[10:]
    for n, mesh in {
        1: MeshShape(data=1),
        2: MeshShape(data=1, tensor=2),
        4: MeshShape(data=1, fsdp=2, context=2),
    }.items():
        folder = tmp_path / f"on{n}"
        shutil.copytree(tmp_path / "eight", folder)
        devices(n)
        assert same(state_of(folder, mesh), saved)
        trainer.fit(dataclasses.replace(first, mesh=mesh), folder, quiet=True)
        np.testing.assert_allclose(losses(folder)[10:], after, rtol=0, atol=1e-5)


def test_batches_are_the_same_arrays_on_every_mesh():
    rows = RUN.source.make(8, seed=0, split="train")
    expected = rows.batch_at(3)
    for mesh in MESHES.values():
        made = make_mesh(mesh, jax.devices()[: size(mesh)])
        got = global_batch(lambda r: rows.batch_at(3, r), rows.spec, made)
        for name in expected:
            np.testing.assert_array_equal(np.asarray(got[name]), expected[name])


def test_first_fit_stream_resumes_exactly(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(
        RUN, mesh=MeshShape(data=1), source=Text(seq_len=32, packing="first_fit"), save_every=10
    )
    trainer.fit(run, tmp_path / "r", quiet=True)
    whole = losses(tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "20")
    trainer.fit(run, tmp_path / "r", quiet=True)
    assert losses(tmp_path / "r") == whole


@dataclasses.dataclass(frozen=True)
class Poisoned(NextToken):
    """NaN whenever the batch holds the byte that `poison` names."""

    poison: int = -1

    def __call__(self, apply, params, batch, key):
        loss, metrics = super().__call__(apply, params, batch, key)
        bad = jnp.any(batch["tokens"] == self.poison)
        loss = jnp.where(bad, jnp.nan, loss)
        return loss, metrics | {"loss": (loss, metrics["loss"][1])}


def test_a_non_finite_step_changes_nothing_but_its_counter(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=1), objective=Poisoned(poison=ord("e")))
    program = trainer.build(run)
    rows = run.source.make(run.batch, seed=0, split="train")
    batch = global_batch(lambda r: rows.batch_at(0, r), rows.spec, program.mesh)
    with jax.set_mesh(program.mesh):
        state = program.init()
        before = jax.tree.map(np.asarray, state)
        after, metrics = program.step(state, batch)
    assert same(before.params, after.params) and same(before.opt, after.opt)
    assert int(after.skipped) == int(after.bad_run) == int(after.step) == 1


def test_diverged_run_stops_and_keeps_the_batch(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(
        RUN, mesh=MeshShape(data=1), objective=Poisoned(poison=ord("e")), max_bad_steps=3
    )
    out = trainer.fit(run, tmp_path / "r", quiet=True)
    assert out.code == trainer.DIVERGED and out.step <= 5
    assert list((tmp_path / "r").glob("bad-batch-*.npz"))


def test_debug_raises_where_a_nan_is_born(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=1), objective=Poisoned(poison=ord("e")))
    with pytest.raises(FloatingPointError, match="nan"):
        trainer.fit(run, tmp_path / "r", quiet=True, debug=True)
    assert not jax.config.jax_debug_nans


def test_profile_of_two_steps_is_written(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=1), steps=4)
    trainer.fit(run, tmp_path / "r", quiet=True, profile=(1, 3))
    assert list((tmp_path / "r" / "profile").rglob("*.xplane.pb"))
    board = list((tmp_path / "r" / "tensorboard").iterdir())
    assert board and board[0].stat().st_size > 1000


def test_loss_counts_tokens_globally(devices):
    """Shards with different numbers of targets: the mean is over tokens, not over shards."""
    devices(4)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=4), batch=4, optimizer=Optimizer(name="sgd"))
    program = trainer.build(run)
    rows = run.source.make(4, seed=0, split="train").batch_at(0)
    for i in range(4):
        rows["targets"][i, 2 + 7 * i :] = -1
    batch = global_batch(lambda r: {k: v[r] for k, v in rows.items()}, program.batch, program.mesh)
    with jax.set_mesh(program.mesh):
        state = program.init()
        params = jax.tree.map(np.asarray, state.params)
        _, metrics = program.step(state, batch)

    def mean(params):
        logits = program.apply(params, rows["tokens"], rows["positions"], rows["segment_ids"])
        each = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.maximum(rows["targets"], 0)
        )
        keep = rows["targets"] >= 0
        return jnp.sum(each * keep) / jnp.sum(keep)

    value, grads = jax.value_and_grad(mean)(jax.tree.map(jnp.asarray, params))
    loss, weight = metrics["loss"]
    assert float(weight) == np.sum(rows["targets"] >= 0)
    np.testing.assert_allclose(float(loss / weight), float(value), rtol=1e-5)
    norm, one = metrics["grad_norm"]
    np.testing.assert_allclose(float(norm / one), float(optax.tree.norm(grads)), rtol=1e-4)


def test_schedules_hit_their_corners():
    for name in ("cosine", "linear", "constant", "wsd"):
        config = Optimizer(lr=1.0, schedule=name, warmup=10, final=0.1, decay=0.5)
        lr = learning_rate(config, 110)
        assert float(lr(0)) == pytest.approx(0.1) and float(lr(9)) == pytest.approx(1.0)
        assert float(lr(10)) == pytest.approx(1.0)
        assert float(lr(110)) == pytest.approx(1.0 if name == "constant" else 0.1)
        middle = {"cosine": 0.55, "linear": 0.55, "constant": 1.0, "wsd": 1.0}[name]
        assert float(lr(60)) == pytest.approx(middle)


def test_configuration_survives_json_and_difference_names_fields():
    run = dataclasses.replace(RUN, evaluators=(HeldOut(),))
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    other = dataclasses.replace(run, optimizer=Optimizer(lr=1.0, warmup=5))
    assert difference(run, other) == [("optimizer.lr", 0.003, 1.0)]


def test_compiled_size_does_not_depend_on_depth():
    def text(layers):
        model = dataclasses.replace(RUN.model, layers=layers)
        program = trainer.build(dataclasses.replace(RUN, model=model, mesh=MeshShape(data=8)))
        with jax.set_mesh(program.mesh):
            return program.step.lower(program.state, program.batch).as_text()

    assert len(text(32)) < 1.05 * len(text(4))


def test_two_runs_in_one_directory_and_a_fresh_start(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=1), steps=2)
    trainer.fit(run, tmp_path / "r", quiet=True)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "r").iterdir()}
    with rundir.claimed(tmp_path / "r", fresh=False):
        for fresh in (False, True):
            with pytest.raises(ValueError, match="is in use by process"):
                trainer.fit(run, tmp_path / "r", fresh=fresh, quiet=True)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "r").iterdir()}
    before.pop("lock"), after.pop("lock")
    assert before == after
    # What is wrong is found out before the earlier run is moved.
    bad = dataclasses.replace(run, source=Text(seq_len=32, files=("nowhere.txt",)))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        trainer.fit(bad, tmp_path / "r", fresh=True, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    other = dataclasses.replace(run, seed=1)
    assert trainer.fit(other, tmp_path / "r", fresh=True, quiet=True).code == trainer.DONE
    aside = next(p for p in tmp_path.iterdir() if p.name.startswith("r."))
    assert load_run(aside).seed == 0 and load_run(tmp_path / "r").seed == 1
    assert (aside / "checkpoints" / "2").is_dir()


def test_a_refused_resumption_leaves_the_configuration(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=1), steps=2)
    trainer.fit(run, tmp_path / "r", quiet=True)
    wide = dataclasses.replace(run, model=dataclasses.replace(run.model, mlp=128))
    with pytest.raises(ValueError, match="of another model"):
        trainer.fit(wide, tmp_path / "r", allow=("model.mlp",), quiet=True)
    assert load_run(tmp_path / "r").model.mlp == 64
    (tmp_path / "r" / "versions.json").write_text("[{")
    assert trainer.fit(run, tmp_path / "r", quiet=True).code == trainer.DONE
    (tmp_path / "r" / "config.json").unlink()
    with pytest.raises(ValueError, match="has checkpoints but no config.json"):
        trainer.fit(run, tmp_path / "r", quiet=True)


def test_evaluations_take_nothing_from_the_training_record(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=1), steps=8, log_every=4)
    one = dataclasses.replace(run, log_every=1)
    with_evaluations = dataclasses.replace(run, evaluators=(HeldOut(batches=1),), eval_every=3)
    trainer.fit(one, tmp_path / "one", quiet=True)
    trainer.fit(with_evaluations, tmp_path / "four", quiet=True)
    each = np.array(losses(tmp_path / "one")).reshape(2, 4).mean(1)
    np.testing.assert_allclose(losses(tmp_path / "four"), each, rtol=1e-3)


def test_the_batch_of_a_divergence_is_the_one_of_its_step(tmp_path, devices):
    devices(8)
    rows = RUN.source.make(8, seed=0, split="train")
    tokens = [set(rows.batch_at(i)["tokens"].ravel().tolist()) for i in range(9)]
    step = next(i for i in range(2, 9) if tokens[i] - set().union(*tokens[:i]))
    poison = min(tokens[step] - set().union(*tokens[:step]))
    run = dataclasses.replace(
        RUN, mesh=MeshShape(data=2, context=4), objective=Poisoned(poison=poison), max_bad_steps=1
    )
    out = trainer.fit(run, tmp_path / "r", quiet=True)
    assert out.code == trainer.DIVERGED
    saved = np.load(tmp_path / "r" / f"bad-batch-step{step + 1}-process0.npz")
    for name, value in rows.batch_at(step).items():
        np.testing.assert_array_equal(saved[name], value)


def test_z_loss_is_minimised_and_not_reported(tmp_path, devices):
    devices(1)
    for z in (0.0, 0.5):
        run = dataclasses.replace(
            RUN, mesh=MeshShape(data=1), steps=1, objective=NextToken(z_loss=z)
        )
        trainer.fit(run, tmp_path / str(z), quiet=True)
    assert losses(tmp_path / "0.0") == pytest.approx(losses(tmp_path / "0.5"), rel=1e-6)
    assert series(read(tmp_path / "0.5"), "train", "z_loss")[1][0] > 1
    norms = [series(read(tmp_path / z), "train", "grad_norm")[1][0] for z in ("0.0", "0.5")]
    assert norms[1] > 1.1 * norms[0]


def test_a_class_of_one_s_own_resumes(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=1), steps=2, objective=Poisoned())
    for _ in range(2):
        assert trainer.fit(run, tmp_path / "r", quiet=True).code == trainer.DONE
    assert load_run(tmp_path / "r").objective == Poisoned()


def test_older_checkpoints_go_and_the_newest_stay(tmp_path, devices):
    devices(1)
    run = dataclasses.replace(RUN, mesh=MeshShape(data=1), steps=10, save_every=2, keep=2)
    trainer.fit(run, tmp_path / "r", quiet=True)
    assert Checkpoints(tmp_path / "r" / "checkpoints", read_only=True).steps() == [8, 10]
    with pytest.raises(ValueError, match="keep=1 must be at least 2"):
        dataclasses.replace(run, keep=1).check(1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_weight_decay_and_clipping_are_what_they_say(name):
    """One step by hand: the gradient clipped to norm 1, decay decoupled and of matrices only."""
    config = Optimizer(name=name, lr=0.1, warmup=0, schedule="constant", weight_decay=0.5, clip=1.0)
    params = {"w": jnp.full((2, 2), 3.0), "s": jnp.full(2, 3.0)}
    grads = {"w": jnp.full((2, 2), 4.0), "s": jnp.full(2, 4.0)}
    tx = make_optimizer(config, 10, {"w": ("embed", "mlp"), "s": ("norm",)})
    updates, _ = tx.update(grads, tx.init(params), params)
    clipped = 4.0 / np.sqrt(6 * 16)
    step = 1.0 if name == "adamw" else clipped
    np.testing.assert_allclose(updates["s"], -0.1 * step, rtol=1e-5)
    np.testing.assert_allclose(updates["w"], -0.1 * (step + 0.5 * 3.0), rtol=1e-5)
