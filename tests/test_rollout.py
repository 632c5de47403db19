"""Rollouts as a source: rows, advantages, the adapter, protection; whole runs are slow."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlab import rl
from models.decoder import DecoderConfig
from models.generate import Generated
from sharding.mesh import MeshShape, make_mesh
from train import trainer
from train.checkpoint import Checkpoints
from train.data.problems import Problems, parse_tasks, row
from train.data.reason import Reason
from train.evaluate import Scene
from train.metrics import read, series
from train.objectives import NextToken
from train.optim import protect_average
from train.optimizer import Optimizer
from train.policy import Policy
from train.rollout.advantages import GROUPED, Advantage, advantages, shape
from train.rollout.evaluate import Interference, PassAtK
from train.rollout.plot import plot_policy
from train.rollout.sampler import _rows
from train.rollout.source import Collector, Rollouts
from train.run import Run, load_run

ROOT = Path(__file__).parent.parent
MODEL = DecoderConfig(layers=1, d_model=16, heads=2, kv_heads=2, head_dim=8, mlp=16)
TASK = ("basic_arithmetic min_terms=2 max_terms=2 max_digits=1",)
SOURCE = Rollouts(tasks=TASK, prompt=28, new=4, samples=4, advantage=Advantage("rloo"))


def small(**changes) -> Run:
    run = Run(
        model=MODEL, objective=Policy(), source=SOURCE, steps=4, batch=16, log_every=1, save_every=1,
        mesh=MeshShape(data=1), optimizer=Optimizer(lr=1e-2, warmup=0),
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


class Sums:
    """Stands for reasoning-gym, which may not be installed; its verifier is not about the sums."""

    names = ("sums",)

    def __init__(self, tasks, seed, split):
        self.first = seed + 50 * (split == "valid")

    def __getitem__(self, i):
        a, b = divmod((self.first + 7 * i) % 100, 10)
        return {"question": f"{a}+{b}=", "answer": str(a + b)}

    def correct(self, i, problem, text):
        return sum(text.encode()) % 2 == 0  # untrained models are right half of the time


@pytest.fixture
def sums(monkeypatch):
    monkeypatch.setattr("train.rollout.sampler.Problems", Sums)
    monkeypatch.setattr("train.data.reason.Problems", Sums)


def parameters(folder, step=None):
    program = trainer.build(load_run(folder))
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    got = checkpoints.restore(program.state, step).state
    checkpoints.close()
    return jax.device_get(jax.tree.leaves(got.params))


def test_rows_of_samples_are_rows_of_supervision():
    rng = np.random.default_rng(0)
    prompts, lengths = rng.integers(1, 9, (3, 5)), np.array([5, 2, 3])
    sizes = np.array([[1, 4], [3, 2], [4, 1]])
    tokens, logs = rng.integers(1, 9, (3, 2, 4)), rng.normal(size=(3, 2, 4))
    made = Generated(tokens, logs, logs, jnp.asarray(sizes), sizes > 0, logs)
    got = _rows(jnp.asarray(prompts), jnp.asarray(lengths), jax.tree.map(jnp.asarray, made))
    for i, j in np.ndindex(3, 2):
        size, begin = sizes[i, j], lengths[i]
        want = row(prompts[i, :begin].tolist(), tokens[i, j, :size].tolist(), 9)
        for name, values in want.items():
            assert np.array_equal(got[name][2 * i + j], values), name
        at = slice(begin - 1, begin + size - 1)
        assert np.array_equal(got["mask"][2 * i + j], want["targets"] >= 0)
        assert np.allclose(got["logp_sampler"][2 * i + j, at], logs[i, j, :size], rtol=1e-6)


@pytest.mark.parametrize(
    "kind, k",
    [*((kind, 1) for kind in GROUPED), ("pkpo", 2), ("pkpo_loo", 3), ("pkpo_loo1", 4)]
    + [("pkpo_wrloo", 4), ("passk_analytic", 2), ("best_minus_second", 1)],
)
def test_every_kind_of_advantage_sees_groups_alone(kind, k):
    rewards = jnp.array([[1.0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    mask, config = jnp.ones((12, 3)), Advantage(kind, k)
    config.check(4, 3)
    got = advantages(rewards, mask, config)
    assert got.shape == (3, 4) and np.isfinite(got).all()
    turned = advantages(rewards[::-1], mask, config)
    assert np.allclose(turned, got[::-1], atol=1e-6)


def test_weights_of_pass_at_k_make_its_gradient():
    """Mean over rows of -adv * logp: enumerated over the answers of a Bernoulli policy, float64."""
    n, k, p = 4, 3, 0.3
    config, total = Advantage("pkpo_wrloo", k), 0.0
    for bits in np.ndindex(*(2,) * n):
        correct = np.asarray(bits, np.float32)[None]
        adv = np.asarray(advantages(jnp.asarray(correct), jnp.ones((n, 1)), config), np.float64)
        score = np.where(correct == 1, 1 / p, -1 / (1 - p))
        chance = np.prod(np.where(correct == 1, p, 1 - p), dtype=np.float64)
        total += chance * np.mean(adv * score)
    assert abs(total - k * (1 - p) ** (k - 1)) < 1e-5


def test_columns_penalise_length_and_name_uninformative_groups():
    correct, lengths = np.array([[1, 0.0], [1, 1]]), np.array([[2, 4], [2, 2]])
    config = Advantage("drgrpo", overlong=2)
    got = shape(correct, lengths, jnp.ones((4, 4)), config=config, new=4)
    assert np.allclose(got["adv"], [1, -1, 0, 0]) and np.allclose(
        got["adv_reference"], [1, -1, 0, 0]
    )
    assert got["informative"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "source, message",
    [
        (dict(advantage=Advantage("pkpo_loo1", 1)), "from 2 to 4"),
        (dict(advantage=Advantage("pkpo_loo", 4)), "from 1 to 3"),
        (dict(advantage=Advantage("grpo", 4)), "means nothing"),
        (dict(advantage=Advantage("mean")), "must be one of"),
        (dict(advantage=Advantage(overlong=9)), "from 0 to 4"),
        (dict(samples=3), "not divisible by source.samples=3"),
        (dict(lag=-1), "at least 0"),
        (dict(temperature=0.0), "above 0"),
        (dict(temperature=0.5), "must equal"),
        (dict(reference=True), "kl_coef"),
        (dict(tasks=("chain_sum a",)), "must look like"),
        (dict(advantage=Advantage("gae")), "PPO needs a value_coef above 0"),
        (dict(advantage=Advantage("gae", lam=2.0)), "lam=2.0 must be in"),
    ],
)
def test_what_cannot_work_is_named_before_anything_is_compiled(source, message):
    run = small(source=dataclasses.replace(SOURCE, **source))
    with pytest.raises(ValueError, match=message):
        run.check(1)


def test_policy_and_protection_need_what_they_need():
    supervised = Reason(tasks=TASK, prompt=28, new=4)
    with pytest.raises(ValueError, match="rollouts"):
        small(source=supervised).check(1)
    protect = Optimizer(protect=0.9)
    with pytest.raises(ValueError, match="no reference to protect"):
        small(source=supervised, objective=NextToken(), optimizer=protect).check(1)


def test_a_start_that_is_no_run_is_refused_before_a_file_is_touched(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        trainer.fit(small(start=str(tmp_path / "none")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_gradients_that_do_not_fit_ask_for_a_sketch(monkeypatch, sums):
    run = small(evaluators=(Interference(4, 8, 2),)).check(1)
    scene = Scene(run, None, make_mesh(run.mesh, jax.devices()[:1]), (0, 1))  # type: ignore[arg-type]
    monkeypatch.setattr("train.rollout.evaluate.ROOM", 1000)
    with pytest.raises(ValueError, match="use sketch=4096"):
        run.evaluators[0].make(scene)
    Interference(4, 8, 2, sketch=8).make(scene)
    with pytest.raises(ValueError, match="sketch=-1"):
        small(evaluators=(Interference(4, 8, 2, -1),)).check(1)


def test_adapter_gives_the_sum_and_the_weight():
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.normal(size=(4, 5, 7)), jnp.float32)
    mask = jnp.asarray(rng.integers(0, 2, (4, 5)), jnp.float32).at[:, 0].set(1)
    column = jnp.asarray(rng.normal(size=4), jnp.float32)
    batch = {
        "tokens": jnp.zeros((4, 5), int), "targets": jnp.asarray(rng.integers(0, 7, (4, 5))),
        "logp_old": -jnp.ones((4, 5)), "mask": mask, "adv": column, "adv_reference": -column,
        "reward": column, "length": column, "informative": column,
    }  # fmt: skip
    for config in (rl.RLConfig(), rl.RLConfig(mode="seq_mean_token_mean"), rl.RLConfig("cispo")):
        total, metrics = Policy(config)(lambda p, *a: logits, {}, batch, None)
        logp = rl.logprobs_from_logits(logits, batch["targets"])
        mean, _ = rl.rl_loss(logp, batch, config)
        assert np.allclose(total / metrics["loss"][1], mean, rtol=1e-6)
    down, metrics = Policy().reference(lambda p, *a: logits, {}, batch, None)
    assert np.allclose(down, jnp.sum(column[:, None] * logp * mask), rtol=1e-5)


VALUED = dataclasses.replace(MODEL, value_head=True)
PPO = dict(
    model=VALUED, objective=Policy(rl.RLConfig(), value_coef=0.5),
    source=dataclasses.replace(SOURCE, advantage=Advantage("gae", gamma=0.9, lam=0.8)),
)  # fmt: skip


def test_ppo_is_its_clipped_loss_and_that_of_the_values():
    """Against token loops in float64: generalised advantages, clip, and values near the old ones."""
    rng = np.random.default_rng(2)
    mask = np.array([[0, 1, 1, 1, 0], [1, 1, 0, 0, 0]], np.float32)
    old, reward = rng.normal(size=(2, 5)), np.array([[1.0, 0.0]])
    config = PPO["source"].advantage
    made = shape(
        reward, np.array([[3, 2]]), mask, jnp.asarray(old, jnp.float32), config=config, new=4
    )
    adv, returns = np.zeros((2, 5)), np.zeros((2, 5))
    for i, places in enumerate(([1, 2, 3], [0, 1])):
        carried = after = 0.0
        for t in reversed(places):
            due = reward[0, i] if t == places[-1] else 0.0
            carried = due + 0.9 * after - old[i, t] + 0.9 * 0.8 * carried
            adv[i, t], returns[i, t], after = carried, carried + old[i, t], old[i, t]
    kept = mask > 0
    adv[kept] = (adv[kept] - adv[kept].mean()) / np.sqrt(adv[kept].var(ddof=1) + 1e-8)
    assert np.allclose(made["adv"], adv, atol=1e-5) and np.allclose(
        made["returns"], returns, atol=1e-5
    )
    logits, values = rng.normal(size=(2, 5, 7)), old + rng.normal(size=(2, 5))
    targets, logp_old = rng.integers(0, 7, (2, 5)), -2 + rng.normal(size=(2, 5)) / 5
    stands = {"hidden": None, "logits": jnp.asarray(logits), "values": jnp.asarray(values)}
    batch = {name: jnp.zeros((2, 5), int) for name in ("tokens", "positions", "segment_ids")}
    batch |= {name: jnp.zeros(2) for name in ("reward", "length", "informative")} | made
    batch |= {"targets": targets, "mask": mask, "logp_old": logp_old, "values_old": old}
    apply = lambda params, *inputs, method: stands[method]  # noqa: E731
    total, metrics = PPO["objective"](apply, {}, jax.tree.map(jnp.asarray, batch), None)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    r = np.exp(np.take_along_axis(logs, targets[..., None], 2)[..., 0] - logp_old)
    policy = np.maximum(-adv * r, -adv * np.clip(r, 0.8, 1.2))
    near = np.clip(values, old - 0.2, old + 0.2)
    value = 0.5 * np.maximum((values - returns) ** 2, (near - returns) ** 2)
    assert metrics["loss"][1] == metrics["value_loss"][1] == 5
    assert np.allclose(total, (kept * (policy + 0.5 * value)).sum(), rtol=1e-5)


def test_protection_looks_at_earlier_steps():
    tx = protect_average(optax.sgd(1.0), 0.5)
    params = {"w": jnp.zeros(2)}
    state, against = tx.init(params), {"w": jnp.array([1.0, 0.0])}
    grads = {"w": jnp.array([1.0, 1.0])}  # descending it lowers the reference
    first, state = tx.update(grads, state, params, reference_grads=against)
    assert first["w"].tolist() == [-1, -1]
    second, state = tx.update(grads, state, params, reference_grads=against)
    assert np.allclose(second["w"], [0, -1], atol=1e-6)
    assert np.allclose(state.average["w"], [0.75, 0])


def test_problems_are_random_access_and_splits_differ():
    pytest.importorskip("reasoning_gym")
    assert parse_tasks(TASK)[0][1]["max_digits"] == 1
    train, valid = (Problems((*TASK, "count_bits"), 0, split) for split in ("train", "valid"))
    problem = train[6]
    assert problem == train[6] and train.correct(6, problem, problem["answer"])
    assert not train.correct(6, problem, problem["answer"] + "1")
    asked = [{p[i]["question"] for i in range(1, 40, 2)} for p in (train, valid)]
    assert asked[0] != asked[1]


def test_state_of_a_collector_is_what_is_not_used_yet():
    source = Collector(dataclasses.replace(SOURCE, lag=1), 4, 0)
    assert source.get_state() is None
    rng = np.random.default_rng(0)
    rows = {n: rng.normal(size=s.shape).astype(s.dtype) for n, s in source.spec.items()}
    source._waiting = [rows]
    other = Collector(source.config, 4, 0)
    other.set_state(source.get_state())
    assert all(np.array_equal(other._waiting[0][n], rows[n]) for n in rows)


def test_a_run_on_rollouts_learns_and_logs(tmp_path, sums):
    assert trainer.fit(small(steps=2), tmp_path / "a", quiet=True).code == trainer.DONE
    rows = read(tmp_path / "a")
    ratio, reward = (series(rows, "train", name)[1] for name in ("ratio", "reward"))
    assert np.allclose(ratio, 1, atol=1e-4) and all(0 <= r <= 1 for r in reward)
    assert all(1 <= length <= 4 for length in series(rows, "train", "length")[1])
    assert set(reward) - {0.0, 1.0} and max(series(rows, "train", "grad_norm")[1]) > 0


@pytest.mark.slow
def test_lagged_rollouts_resume_to_the_same_parameters(tmp_path, sums):
    """Killed with samples waiting: they are in the checkpoint."""
    run = small(source=dataclasses.replace(SOURCE, lag=2), steps=5)
    trainer.fit(run, tmp_path / "whole", quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    assert set(series(read(tmp_path / "whole"), "train", "reward")[1]) - {0.0, 1.0}
    for step in (3, 4, 5):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step), ignore_errors=True)
    trainer.fit(run, tmp_path / "cut", quiet=True)
    pairs = zip(parameters(tmp_path / "whole"), parameters(tmp_path / "cut"), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


WORDS = [f"model.{x}" for x in "layers=1 d_model=16 heads=2 kv_heads=2 head_dim=8 mlp=16".split()]
WORDS += ["start=", "batch=16", "save_every=2", "eval_every=0", "evaluators.0.problems=2"]
WORDS += ["evaluators.1.problems=2", "source.lag=1", "log_every=1", "--quiet"]
# An untrained model earns nothing: its entropy, where it sampled, is what moves the parameters.
WORDS += ["objective.loss.entropy_coef=0.1", "optimizer.lr=0.01"]


def begin(cwd, folder, *words, devices=1):
    """A process that trains `rl_reason` with these settings."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-m", "configs", "train", "rl_reason", *words]
    return subprocess.Popen([*command, "--run-dir", str(folder)], env=env, cwd=cwd)


@pytest.mark.slow
def test_a_kill_amid_rollouts_changes_nothing(tmp_path):
    """The process dies without a word, wherever it is; the same command ends at the same parameters."""
    pytest.importorskip("reasoning_gym")
    assert begin(tmp_path, tmp_path / "whole", *WORDS, "steps=12").wait(300) == 0
    killed = begin(tmp_path, tmp_path / "cut", *WORDS, "steps=12")
    while killed.poll() is None and len(series(read(tmp_path / "cut"), "train", "loss")[0]) < 5:
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert begin(tmp_path, tmp_path / "cut", *WORDS, "steps=12").wait(300) == 0
    assert any(r["kind"] == "resume" for r in read(tmp_path / "cut"))
    assert min(series(read(tmp_path / "whole"), "train", "grad_norm")[1]) > 0
    pairs = zip(parameters(tmp_path / "whole"), parameters(tmp_path / "cut"), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)


PASSK = dict(source=dataclasses.replace(SOURCE, advantage=Advantage("pkpo_wrloo", 2)))


@pytest.mark.slow
@pytest.mark.parametrize("what, protect", [(PASSK, 0.9), (PPO, 0.0)], ids=["pass@2", "PPO"])
def test_eight_devices_do_what_one_does(tmp_path, sums, what, protect):
    """Groups of four answers lie over eight devices, two rows each; protection included."""
    for name, mesh in (("one", MeshShape(data=1)), ("eight", MeshShape(data=2, fsdp=4))):
        rule = Optimizer(name="sgd", lr=0.1, protect=protect)
        run = small(mesh=mesh, steps=2, optimizer=rule, **what)
        trainer.fit(run, tmp_path / name, quiet=True)
    one, eight = (series(read(tmp_path / name), "train", "reward") for name in ("one", "eight"))
    assert one == eight and set(one[1]) - {0.0, 1.0}
    moved = 0.0
    start = parameters(tmp_path / "one", 1)
    for a, b, c in zip(*(parameters(tmp_path / n) for n in ("one", "eight")), start, strict=True):
        assert np.allclose(a, b, atol=1e-5)
        moved = max(moved, np.abs(a - c).max())
    assert moved > 1e-3


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_roll_out_as_one_does(tmp_path):
    """Each has four devices and half of the rows; both know every reward."""
    pytest.importorskip("reasoning_gym")
    words = [*WORDS, "steps=3", "mesh.data=2", "mesh.fsdp=4"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = ["--coordinator", address, "--processes", "2", "--process-id"]
    both = [begin(tmp_path, tmp_path / "two", *words, *flags, str(i), devices=4) for i in (0, 1)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert begin(tmp_path, tmp_path / "one", *words, devices=8).wait(300) == 0
    a, b = (read(tmp_path / name) for name in ("one", "two"))
    for name in ("loss", "reward", "length", "grad_norm", "entropy"):
        ours, theirs = (series(rows, "train", name)[1] for rows in (a, b))
        assert len(ours) == 3 and np.allclose(ours, theirs, atol=1e-4), name


@pytest.mark.slow
def test_evaluators_report_pass_at_k_and_interference(tmp_path, sums):
    run = small(evaluators=(PassAtK(4, 8, (1, 4)), Interference(4, 8, 1)), steps=1)
    found = trainer.fit(run, tmp_path / "run", quiet=True).values
    sketched = dataclasses.replace(run, evaluators=(Interference(4, 8, 1, sketch=20_000),))
    close = trainer.fit(sketched, tmp_path / "sketched", quiet=True).values
    # With k=1 this is a squared norm, which a projection to d numbers keeps within sqrt(2 / d), 1%.
    whole, short = (x["interference/same_samples"] for x in (found, close))
    assert whole > 0 and abs(short / whole - 1) < 0.05
    assert 0 <= found["valid/informative"] <= 1
    assert 0 <= found["valid/pass@1"] <= found["valid/pass@4"] <= 1
    assert abs(found["valid/pass@1"] - found["valid/pass@1/sums"]) < 1e-6
    assert found["valid/pass@1_ci95"] >= 0
    assert np.isfinite(found["interference/crossfit"])
    assert found["interference/mean_weight"] <= 2 and plot_policy(tmp_path / "run").is_file()


@pytest.mark.slow
def test_a_run_starts_from_another_and_keeps_it_as_reference(tmp_path, sums):
    supervised = Reason(tasks=TASK, prompt=28, new=4)
    first = small(source=supervised, objective=NextToken(), steps=2)
    trainer.fit(first, tmp_path / "sft", quiet=True)
    run = small(
        objective=Policy(rl.RLConfig(kl_coef=0.1)), start=str(tmp_path / "sft"), steps=2,
        source=dataclasses.replace(SOURCE, reference=True), optimizer=Optimizer(lr=0.0),
    )  # fmt: skip
    trainer.fit(run, tmp_path / "rl", quiet=True)
    pairs = zip(parameters(tmp_path / "sft"), parameters(tmp_path / "rl"), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert np.allclose(series(read(tmp_path / "rl"), "train", "kl")[1], 0, atol=1e-6)
    ppo = small(start=str(tmp_path / "sft"), steps=3, optimizer=Optimizer(lr=1e-2, warmup=0), **PPO)
    trainer.fit(ppo, tmp_path / "ppo", quiet=True)
    assert np.abs(parameters(tmp_path / "ppo")[-1]).max() > 0  # the head was zero, and has learnt
    assert series(read(tmp_path / "ppo"), "train", "value_loss")[1][0] > 0
    other = dataclasses.replace(run, model=dataclasses.replace(MODEL, mlp=32))
    with pytest.raises(ValueError, match="model.mlp is 16, here it is 32"):
        trainer.fit(other, tmp_path / "other", quiet=True)
