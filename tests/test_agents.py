"""Agents: worlds of texts and their processes, episodes as rows, advantages of steps; whole runs are slow."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from test_rollout import parameters
from text_worlds import Counter

from jaxlab.envs import HouseConfig
from jaxlab.rl import AgentConfig
from models.decoder import DecoderConfig
from sharding.mesh import MeshShape
from train import trainer
from train.data.tokenizers import Words
from train.envs.environment import Imported, act, begin
from train.envs.games import Games
from train.envs.house import TextHouse
from train.envs.workers import Workers
from train.evaluate import Scene
from train.metrics import read, series
from train.optimizer import Optimizer
from train.policy import Policy
from train.rollout.agents import Agents, steps_of
from train.rollout.episodes import Player, Row
from train.rollout.plot import plot_policy
from train.rollout.shown import Shown
from train.rollout.success import Success
from train.run import Run

ROOT = Path(__file__).parent.parent
MODEL = DecoderConfig(vocab=12, layers=1, d_model=16, heads=2, kv_heads=2, head_dim=8, mlp=16)
SOURCE = Agents(world=Counter(), turns=4, observation=8, new=1, length=36, samples=4)  # type: ignore[arg-type]


def small(**changes) -> Run:
    run = Run(
        model=MODEL, objective=Policy(), source=SOURCE, steps=3, batch=16, log_every=1, save_every=1,
        mesh=MeshShape(data=1), optimizer=Optimizer(lr=1e-2, warmup=0),
    )  # fmt: skip
    return dataclasses.replace(run, **changes)


def scene_of(run):
    run = run.check(1)
    program = trainer.build(run, jax.devices()[:1])
    return Scene(run, program.apply, program.mesh, (0, 1)), program


# ---- worlds ----


def test_a_house_of_texts_is_the_house_of_arrays():
    world = TextHouse(HouseConfig(2, 4, 2, 3), horizon=16)
    environment, words = world.make(), set(world.words())
    for seed in range(4):
        turn, steps = begin(environment, seed), 0
        assert turn == begin(world.make(), seed)
        nothing = act(environment, "take kitchen", turn)
        assert nothing.text == turn.text and not nothing.valid
        assert not act(environment, "dance", turn).valid and not act(environment, "", turn).valid
        while not turn.done:
            assert set(turn.text.split()) <= words and turn.expert in turn.admissible
            turn, steps = act(environment, turn.expert, turn), steps + 1
            assert turn.valid
        assert turn.won and turn.reward == 10 and steps <= 11
    turn = begin(environment, 2**40)  # held-out seeds are large
    for i in range(16):
        turn = act(environment, "dance", turn)
        assert turn.done == (i == 15) and not turn.won


def test_any_environment_with_reset_and_step_is_a_world():
    world = Imported("text_worlds:counter", '{"most": 2}')
    world.check()
    turn = begin(world.make(), 1)
    assert (turn.text, turn.done, turn.admissible) == ("at 0 of 2", False, ("up", "stay"))
    environment = world.make()
    turn = begin(environment, 1)
    turn = act(environment, "down", turn)
    assert not turn.valid and not turn.done
    turn = act(environment, "up", act(environment, "up", turn))
    assert turn.valid and turn.done and turn.won and turn.reward == 1
    with pytest.raises(ValueError, match="package.module:callable"):
        Imported("text_worlds:nobody").check()
    with pytest.raises(ValueError, match="JSON object"):
        Imported("text_worlds:counter", "[1]").check()


def test_processes_do_what_one_does_and_one_that_dies_is_replaced():
    found = []
    for processes in (0, 2):
        workers = Workers(Counter(), 5, processes)  # type: ignore[arg-type]
        turns = [workers.begin([0, 1, 2, 3, 4])]
        turns.append(workers.act({0: "up", 3: "stay", 4: "up"}))
        if processes:
            os.kill(workers._workers[0].process.pid, signal.SIGKILL)
        turns.append(workers.act({1: "down", 3: "up", 4: "up"}))
        turns.append(workers.begin([7, 7]))
        turns.append(workers.act({0: "up", 1: "up", 2: "up"}))
        found.append(turns)
        if processes:
            with pytest.raises(RuntimeError, match="no such luck"):
                workers.act({1: "fail"})
            with pytest.raises(RuntimeError, match="died twice"):
                workers.act({0: "die"})
        workers.close()
    assert found[0] == found[1]
    assert not found[0][2][1].valid and found[0][2][4].won


@pytest.mark.filterwarnings("ignore:Game .* is not fully supported")
def test_games_of_textworld_are_worlds(tmp_path):
    pytest.importorskip("textworld")
    world = Games(level=2, games=1, horizon=3, folder=str(tmp_path))
    world.check()
    environment = world.make()
    turn = begin(environment, 0)
    while not turn.done:
        assert turn.expert in turn.admissible or turn.expert == "take coin"
        turn = act(environment, turn.expert, turn)
    assert turn.won and len(list(tmp_path.glob("*.z8"))) == 1
    assert begin(world.make(), 5) == begin(environment, 0)


@pytest.mark.parametrize("field", ["level", "horizon", "games"])
def test_games_that_cannot_be(field):
    with pytest.raises(ValueError, match=f"source.world.{field}=-1"):
        Games(**{field: -1}).check()


# ---- rows ----


def test_words_are_tokens():
    words = Words(("go", "hall"))
    ids = words.encode("go hall\n")
    assert ids.tolist() == [2, 3, 1] and words.decode([2, 3, 0]) == "go hall"
    with pytest.raises(ValueError, match="'kitchen', which is no known word"):
        words.encode("go kitchen")


def test_a_row_has_targets_where_the_agent_speaks():
    row = Row(10)
    row.see([5, 6])
    row.say([7, 0], 0, [-0.5, -0.25])
    row.see([8])
    row.say([9], -1)
    row.see([5])
    row.say([9, 0], 2, [-1.0, -2.0])
    got = row.columns()
    assert got["tokens"].tolist() == [5, 6, 7, 0, 8, 9, 5, 9, 0, 0]
    assert got["targets"].tolist() == [-1, 7, 0, -1, -1, -1, 9, 0, -1, -1]
    assert got["turns"].tolist() == [-1, 0, 0, -1, -1, -1, 2, 2, -1, -1]
    assert got["mask"].tolist() == [0, 1, 1, 0, 0, 0, 1, 1, 0, 0]
    assert got["segment_ids"].tolist() == [1] * 9 + [0]
    assert got["logp_sampler"].tolist() == [0, -0.5, -0.25, 0, 0, 0, -1, -2, 0, 0]


def test_shown_episodes_teach_the_expert_and_not_the_strays():
    source = Shown(world=Counter(), turns=4, observation=8, new=2, length=36, wander=0.5)  # type: ignore[arg-type]
    rows, words = source.make(4, seed=0, split="train"), source.make_tokenizer()
    batches = [rows.batch_at(i) for i in range(4)]
    assert all(np.array_equal(batches[1][n], rows.batch_at(1)[n]) for n in rows.spec)
    assert np.array_equal(batches[1]["tokens"][2:], rows.batch_at(1, slice(2, 4))["tokens"])
    targets = np.concatenate([b["targets"] for b in batches])
    assert set(np.unique(targets)) == {-1, words.eos, int(words.encode("up")[0])}
    said = [words.decode(row) for b in batches for row in b["tokens"]]
    assert any("stay" in text for text in said)
    valid = source.make(4, seed=0, split="valid").batch_at(0)["tokens"]
    assert not np.array_equal(valid, batches[0]["tokens"])


# ---- episodes ----


@pytest.mark.parametrize(
    "pattern", [("attention",), pytest.param(("lact", "attention"), marks=pytest.mark.slow)]
)
def test_turns_read_into_the_state_are_the_whole_row_at_once(pattern):
    """What decoding thought of its tokens, turn by turn, is what a pass over the row thinks."""
    model = dataclasses.replace(MODEL, layers=len(pattern), pattern=pattern)
    source = dataclasses.replace(SOURCE, new=2)
    scene, program = scene_of(small(model=model, source=source))
    with jax.set_mesh(program.mesh):
        params = program.init().params
        player = Player(scene, 3, 4, "train", 1.0)
        key = jax.random.key(3)
        played = player.score(params, player.play(params, range(5, 8), key))
        again = player.play(params, range(5, 8), key)
    rows = played.rows
    assert np.allclose(rows["logp_sampler"], rows["logp_old"], atol=2e-5)
    assert np.allclose(rows["raw_logp"] * rows["mask"], rows["logp_old"], atol=1e-6)
    assert len({len(steps) for steps in played.steps}) > 1 or len(played.steps[0]) == 4
    assert all(np.array_equal(x, rows[name]) for name, x in again.rows.items())
    words = scene.run.source.make_tokenizer()
    for i, steps in enumerate(played.steps):
        want = []
        for j, step in enumerate(steps):
            said = rows["targets"][i][rows["turns"][i] == j]
            assert words.decode(said) == step.action
            want += [*words.encode(f"{step.seen}\n"), *said]
        assert rows["tokens"][i][: len(want)].tolist() == want
        assert rows["segment_ids"][i].sum() == len(want)


@pytest.mark.slow
def test_episodes_do_not_depend_on_the_tasks_beside_them():
    scene, program = scene_of(small())
    with jax.set_mesh(program.mesh):
        params, key = program.init().params, jax.random.key(3)
        both = Player(scene, 3, 4, "train", 1.0).play(params, range(5, 8), key)
        alone = Player(scene, 1, 4, "train", 1.0).play(params, range(6, 7), key)
    assert alone.steps == both.steps[4:8]
    for name, x in alone.rows.items():
        if name == "logp_sampler":
            np.testing.assert_allclose(x, both.rows[name][4:8], atol=1e-5)
        else:
            assert np.array_equal(x, both.rows[name][4:8]), name


def test_steps_and_their_advantages_are_those_of_the_texts():
    """GiGPO from the texts alone, with dictionaries and float64."""
    source = dataclasses.replace(SOURCE, advantage=AgentConfig(transform="none"), penalty=0.25)
    scene, program = scene_of(small(source=source))
    with jax.set_mesh(program.mesh):
        params = program.init().params
        player = Player(scene, 4, 4, "train", 1.0)
        played = player.score(params, player.play(params, range(4), jax.random.key(1)))
        collector = source.make(16, seed=0, split="train")
        collector.attach(scene)
        collector._player.play = lambda *_: played
        batch = collector._collect(0, params)
    steps = steps_of(played, source)
    assert steps["mask"].shape == (64, 1) and steps["mask"].sum() == batch["mask"].sum()
    won = [s[-1].turn.won for s in played.steps]
    assert 0 < sum(won) < 16
    scores, returns = {}, {}
    for i, line in enumerate(played.steps):
        for j, step in enumerate(line):
            penalty = 0.0 if step.turn.valid else 0.25
            scores[i, j] = 10.0 * won[i] - penalty
            returns[i, j] = 10.0 * won[i] * 0.95 ** (len(line) - 1 - j) - penalty
    for i, line in enumerate(played.steps):
        turns = played.rows["turns"][i]
        for j, step in enumerate(line):
            mates = [scores[k] for k in scores if k[0] // 4 == i // 4]
            same = [
                returns[k]
                for k in returns
                if k[0] // 4 == i // 4 and played.steps[k[0]][k[1]].seen == step.seen
            ]
            want = scores[i, j] - np.mean(mates) + returns[i, j] - np.mean(same)
            assert np.allclose(batch["adv"][i][turns == j], want, atol=2e-5)
            where = np.flatnonzero(turns == j)
            assert np.array_equal(
                steps["logp"][i * 4 + j][: len(where)], played.rows["raw_logp"][i][where]
            )
    assert not batch["adv"][played.rows["turns"] < 0].any()
    assert np.array_equal(batch["reward"], np.array(won, np.float32))


@pytest.mark.parametrize(
    "source, message",
    [
        (dict(turns=0), "source.turns=0"),
        (dict(length=8), "source.length=8"),
        (dict(samples=3), "not divisible by source.samples=3"),
        (dict(workers=-1), "source.workers=-1"),
        (dict(penalty=-1.0), "source.penalty=-1.0"),
        (dict(temperature=0.5), "must equal"),
        (dict(world=Imported("text_worlds:counter")), "no fixed vocabulary"),
        (dict(world=TextHouse(horizon=0)), "source.world.horizon=0"),
        (dict(world=TextHouse()), "language model of 34 or more"),
        (dict(reference=True), "kl_coef"),
    ],
)
def test_what_cannot_work_is_named_before_anything_is_compiled(source, message):
    with pytest.raises(ValueError, match=message):
        small(source=dataclasses.replace(SOURCE, **source)).check(1)


def test_a_run_of_agents_logs_steps_and_success(tmp_path):
    run = small(steps=2, evaluators=(Success(tasks=8),))
    outcome = trainer.fit(run, tmp_path / "a", quiet=True)
    assert outcome.code == trainer.DONE and 0 <= outcome.values["valid/success"] <= 1
    rows = read(tmp_path / "a")
    get = lambda name: series(rows, "train", name)[1]  # noqa: E731
    assert np.allclose(get("ratio"), 1, atol=1e-4)
    assert all(1 <= x <= 4 for x in get("steps")) and all(0 <= x <= 1 for x in get("invalid"))
    assert all(x > 0 for x in get("uncertainty")) and all(x >= 1 for x in get("anchors"))
    assert max(get("grad_norm")) > 0
    assert plot_policy(tmp_path / "a") == tmp_path / "a" / "policy.png"


# ---- whole runs ----


@pytest.mark.slow
def test_an_agent_learns_to_count(tmp_path):
    run = small(steps=40, source=dataclasses.replace(SOURCE, advantage=AgentConfig(gate=0.5)),
                save_every=0)  # fmt: skip
    trainer.fit(run, tmp_path / "a", quiet=True)
    reward = series(read(tmp_path / "a"), "train", "reward")[1]
    assert np.mean(reward[-5:]) > np.mean(reward[:5]) + 0.3


@pytest.mark.slow
def test_eight_devices_do_what_one_does(tmp_path):
    """Groups of four episodes lie over eight devices, two rows each."""
    for name, mesh in (("one", MeshShape(data=1)), ("eight", MeshShape(data=2, fsdp=4))):
        run = small(
            mesh=mesh, steps=2, optimizer=Optimizer(name="sgd", lr=0.1),
            source=dataclasses.replace(SOURCE, advantage=AgentConfig(gate=0.0)),
        )  # fmt: skip
        trainer.fit(run, tmp_path / name, quiet=True)
    one, eight = (series(read(tmp_path / name), "train", "reward") for name in ("one", "eight"))
    assert one == eight and set(one[1]) - {0.0, 1.0}
    start = parameters(tmp_path / "one", 1)
    moved = 0.0
    for a, b, c in zip(*(parameters(tmp_path / n) for n in ("one", "eight")), start, strict=True):
        assert np.allclose(a, b, atol=1e-5)
        moved = max(moved, np.abs(a - c).max())
    assert moved > 1e-3


@pytest.mark.slow
def test_a_kill_amid_episodes_changes_nothing(tmp_path):
    """The trainer dies without a word while its workers play; the same command ends the same."""
    words = "layers=1 d_model=16 heads=2 kv_heads=2 head_dim=8 mlp=16".split()
    words = [f"model.{word}" for word in words] + ["start=", "source.reference=false"]
    words += ["objective.loss.kl_coef=0", "objective.loss.entropy_coef=0.1", "optimizer.lr=0.01"]
    words += ["source.world.house.conditions=0", "source.world.house.objects=1"]
    words += ["source.world.house.receptacles=2", "source.world.house.rooms=1"]
    words += ["source.turns=4", "source.length=200", "source.samples=4", "source.workers=2"]
    words += ["batch=16", "save_every=2", "eval_every=0", "evaluators.0.tasks=2", "steps=12"]
    words += ["source.lag=1", "log_every=1", "--quiet"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}

    def start(folder):
        command = [sys.executable, "-m", "configs", "train", "rl_house", *words]
        return subprocess.Popen([*command, "--run-dir", str(folder)], env=env, cwd=tmp_path)

    assert start(tmp_path / "whole").wait(300) == 0
    killed = start(tmp_path / "cut")
    while killed.poll() is None and len(series(read(tmp_path / "cut"), "train", "loss")[0]) < 5:
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert start(tmp_path / "cut").wait(300) == 0
    assert any(r["kind"] == "resume" for r in read(tmp_path / "cut"))
    assert min(series(read(tmp_path / "whole"), "train", "grad_norm")[1]) > 0
    pairs = zip(parameters(tmp_path / "whole"), parameters(tmp_path / "cut"), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
