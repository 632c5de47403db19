"""Episodes of agents as a source of the trainer, with the advantages of GRPO, GiGPO or SELAUR."""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import rl
from jaxlab.rl import AgentConfig
from train.data.tokenizers import Tokenizer, TokenRows, Words
from train.envs.environment import Imported
from train.envs.games import Games
from train.envs.house import TextHouse
from train.evaluate import Scene
from train.folders import starting_parameters
from train.rollout.episodes import Played, Player
from train.rollout.source import Collected, Sampled

TOKENS = ("mask", "logp_old", "logp_sampler", "adv", "adv_reference", "logp_ref")
COLUMNS = ("reward", "length", "informative", "steps", "invalid", "uncertainty", "gate", "anchors")


@dataclasses.dataclass(frozen=True)
class Conversations(TokenRows):
    """Episodes of an environment of texts, one a row."""

    world: TextHouse | Games | Imported = TextHouse()
    tokenizer: Annotated[str, "'words' of the world, 'bytes', a tokenizer.json or its folder"] = (
        "words"
    )
    turns: Annotated[int, "most actions of an episode"] = 20
    observation: Annotated[int, "most tokens of an observation; of longer ones the last"] = 40
    new: Annotated[int, "most tokens of an action, its end included"] = 3
    length: Annotated[int, "tokens of a row; an episode without room for a turn ends"] = 640
    workers: Annotated[int, "processes that step environments; 0: the trainer's own"] = 0

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        return self.length

    def vocab_size(self) -> int | None:
        """Size of the vocabulary."""
        if self.tokenizer == "words":
            return self.make_tokenizer().vocab_size
        return super().vocab_size()

    def make_tokenizer(self) -> Tokenizer:
        """The tokenizer; ValueError for the words of a world without a fixed few."""
        if self.tokenizer != "words":
            return super().make_tokenizer()
        if not (words := self.world.words()):
            raise ValueError(
                f"source.tokenizer='words': {type(self.world).__name__} has no fixed vocabulary; use "
                f"'bytes' or a tokenizer.json"
            )
        return Words(words)

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work."""
        self.world.check()
        for name, least in (("turns", 1), ("observation", 2), ("new", 1), ("workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"source.{name}={getattr(self, name)} must be at least {least}")
        if self.length < self.observation + self.new:
            raise ValueError(
                f"source.length={self.length} must be at least source.observation="
                f"{self.observation} + source.new={self.new}"
            )
        parts = mesh_sizes.get("ring", 1) * mesh_sizes.get("context", 1)
        if self.length % parts:
            raise ValueError(
                f"source.length={self.length} is not divisible by mesh.ring * mesh.context={parts}"
            )
        self.vocab_size()


@dataclasses.dataclass(frozen=True)
class Agents(Conversations, Sampled):
    """Sampled episodes with what policy losses need; a batch counts episodes."""

    samples: Annotated[int, "episodes a task; they share its first observation"] = 8
    temperature: Annotated[float, "of sampling, and of the log-probabilities of the loss"] = 1.0
    lag: Annotated[int, "updates that a sample may be old; 0: every batch is on-policy"] = 0
    penalty: Annotated[float, "subtracted for an invalid action, from its own step only"] = 0.1
    success: Annotated[float, "reward of an episode that is won, at its last step"] = 10.0
    advantage: AgentConfig = AgentConfig(gate=0.5)
    reference: Annotated[bool, "log-probabilities of the starting parameters, for the KL"] = False

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work."""
        super().check(mesh_sizes)
        self.check_sampling()
        for name in ("penalty", "success"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"source.{name}={getattr(self, name)} must be finite and >= 0")

    def spec(self, batch: int):
        """Names, shapes and dtypes of a global batch."""
        self.check_batch(batch)
        tokens = jax.ShapeDtypeStruct((batch, self.length), np.float32)
        column = jax.ShapeDtypeStruct((batch,), np.float32)
        rows = [name for name in TOKENS if name != "logp_ref" or self.reference]
        return super().spec(batch) | dict.fromkeys(rows, tokens) | dict.fromkeys(COLUMNS, column)

    def make(
        self, batch: int, *, seed: int, split: str, process_index: int = 0, process_count: int = 1
    ) -> "AgentCollector":
        """The source of training batches; held-out tasks are those of the evaluators."""
        if split != "train":
            raise ValueError("rollouts have no held-out rows: use the evaluator Success")
        return AgentCollector(self, batch, seed)


def steps_of(played: Played, source: Agents) -> dict[str, np.ndarray]:
    """The flat rows of `selaur_advantage`: `source.turns` for each episode, the late ones padding.

    A step's success reward comes at the end of an episode that was won; tokens of a step are its action's.
    """
    n, t = len(played.steps), source.turns
    group = np.repeat(np.arange(n) // source.samples, t)
    reward, penalty = np.zeros((n, t), np.float32), np.zeros((n, t), np.float32)
    valid, seen = np.zeros((n, t), bool), np.full((n, t), "", object)
    for i, steps in enumerate(played.steps):
        for j, step in enumerate(steps):
            valid[i, j], seen[i, j] = True, step.seen
            penalty[i, j] = 0 if step.turn.valid else source.penalty
    won = np.array([steps[-1].turn.won for steps in played.steps])
    last = valid.sum(1) - 1
    reward[np.arange(n), last] = source.success * won
    shape = (n, t, source.new)
    logs = {name: np.zeros(shape, np.float32) for name in ("raw_logp", "raw_logp2")}
    mask, turns = np.zeros(shape, np.float32), played.rows["turns"]
    row, at = np.nonzero(turns >= 0)
    first = np.r_[True, (np.diff(turns[row, at]) != 0) | (np.diff(row) != 0)]
    begin = np.flatnonzero(first)
    inside = np.arange(len(at)) - begin[np.cumsum(first) - 1]
    where = row, turns[row, at], inside
    mask[where] = 1
    for name, values in logs.items():
        values[where] = played.rows[name][row, at]
    flat = lambda x: np.asarray(x).reshape(n * t, *np.shape(x)[2:])  # noqa: E731
    each = lambda x: np.repeat(x, t)  # noqa: E731
    return {
        "group": group,
        "traj": each(np.arange(n)),
        "t": np.tile(np.arange(t), n),
        "anchor": rl.anchor_ids(seen.reshape(-1).tolist(), group.tolist()),
        "success": each(won).astype(np.float32),
        "reward": flat(reward),
        "score": each(reward.sum(1)) - flat(penalty),
        "step_penalty": flat(penalty),
        "valid": flat(valid).astype(np.float32),
        "mask": flat(mask),
        "logp": flat(logs["raw_logp"]),
        "logp2": flat(logs["raw_logp2"]),
    }


class AgentCollector(Collected):
    """`Collected` episodes."""

    def attach(self, scene: Scene) -> None:
        """Takes what sampling needs of a run: model, mesh, and the parameters it starts from."""
        self._scene, c = scene, self.config
        tasks = self.batch // c.samples
        self._player = Player(scene, tasks, c.samples, "train", c.temperature)
        self._advantage = jax.jit(functools.partial(rl.selaur_advantage, cfg=c.advantage))
        self._reference = starting_parameters(scene.run) if c.reference else None

    def _collect(self, step: int, params: Any) -> dict[str, np.ndarray]:
        c, tasks = self.config, self.batch // self.config.samples
        key = jax.random.fold_in(jax.random.key(self.seed), 1)  # key 0 is the parameters'
        played = self._player.play(params, range(step * tasks, (step + 1) * tasks), key)
        played = self._player.score(params, played, self._reference)
        steps = steps_of(played, c)
        got = jax.device_get(self._advantage(steps))
        of_step = got.adv_episode + c.advantage.omega * got.adv_step
        rows = played.rows
        turn = np.maximum(rows["turns"], 0)
        spread = lambda x: np.take_along_axis(x.reshape(-1, c.turns), turn, 1) * rows["mask"]  # noqa: E731
        won = steps["success"].reshape(-1, c.turns)[:, 0]
        plain = rl.group_advantage(
            jnp.asarray(won), jnp.arange(self.batch) // c.samples, tasks, kind="rloo"
        )
        groups = won.reshape(tasks, c.samples)
        counts = steps["valid"].reshape(-1, c.turns).sum(1)
        real = steps["valid"] > 0
        distinct = len({*zip(steps["group"][real], steps["anchor"][real], strict=True)})
        everywhere = lambda x: np.full(self.batch, x, np.float32)  # noqa: E731
        rows = rows | {
            "adv": spread(of_step),
            "adv_reference": np.asarray(plain)[:, None] * rows["mask"],
            "reward": won,
            "length": rows["segment_ids"].sum(1).astype(np.float32),
            "informative": np.repeat((groups != groups[:, :1]).any(1), c.samples).astype(
                np.float32
            ),
            "steps": counts.astype(np.float32),
            "invalid": (steps["step_penalty"].reshape(-1, c.turns) > 0).sum(1) / counts,
            "uncertainty": got.u_traj.reshape(-1, c.turns)[:, 0],
            "gate": everywhere(got.gate),
            "anchors": everywhere(counts.sum() / distinct),
        }
        return {name: np.asarray(rows[name], self.spec[name].dtype) for name in self.spec}
