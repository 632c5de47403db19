"""Episodes of an environment's own expert as supervised rows: what agents start from."""

import dataclasses
from typing import Annotated

import numpy as np

from train.data.problems import HELD_OUT
from train.envs.environment import act, begin
from train.rollout.agents import Conversations
from train.rollout.episodes import Row, observation_ids

COLUMNS = ("tokens", "targets", "positions", "segment_ids")


@dataclasses.dataclass(frozen=True)
class Shown(Conversations):
    """Conversations with the world's expert; the loss is that of its actions alone."""

    wander: Annotated[float, "share of actions that are random instead, and not to be learnt"] = 0.2
    held_out: Annotated[int, "episodes of the held-out split"] = 64

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work."""
        super().check(mesh_sizes)
        if not 0 <= self.wander < 1 or self.held_out < 1:
            raise ValueError(
                f"source.wander={self.wander} must be in [0, 1) and "
                f"source.held_out={self.held_out} at least 1"
            )

    def make(
        self, batch: int, *, seed: int, split: str, process_index: int = 0, process_count: int = 1
    ) -> "Shows":
        """The batches of a split ('train' or 'valid')."""
        return Shows(self, batch, seed, split)


class Shows:
    """Random access to rows: row i is played when it is asked for, from seed and i alone."""

    def __init__(self, config: Shown, batch: int, seed: int, split: str):
        self.config, self.batch, self.spec = config, batch, config.spec(batch)
        self.num_batches = -(-config.held_out // batch)
        # No task of a rollout: those have the seeds in front of these.
        self._first = 1_000_003 * seed + HELD_OUT // 2 + (HELD_OUT if split == "valid" else 0)
        self._tokenizer = config.make_tokenizer()
        self._environment = config.world.make()

    def batch_at(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Rows `rows` (all if None) of the batch of a step."""
        start, stop, _ = (rows or slice(None)).indices(self.batch)
        made = [self._row(step * self.batch + i).columns() for i in range(start, stop)]
        return {name: np.stack([row[name] for row in made]) for name in COLUMNS}

    def _row(self, i: int) -> Row:
        c, row, chance = self.config, Row(self.config.length), np.random.default_rng([i, 1])
        end = [] if self._tokenizer.eos is None else [self._tokenizer.eos]
        turn = begin(self._environment, self._first + i)
        for number in range(c.turns):
            if len(row.ids) + c.observation + c.new > c.length or turn.done:
                break
            if not turn.expert:
                raise ValueError(f"source.world: {type(c.world).__name__} has no expert to show")
            row.see(observation_ids(self._tokenizer, turn.text, c.observation, first=not number))
            strays = bool(turn.admissible) and chance.random() < c.wander
            action = str(chance.choice(turn.admissible)) if strays else turn.expert
            ids = [*map(int, self._tokenizer.encode(action)), *end]
            if len(ids) > c.new:
                raise ValueError(
                    f"source.new={c.new} is too short for {action!r}: {len(ids)} tokens"
                )
            row.say(ids, -1 if strays else number)
            turn = act(self._environment, action, turn)
        return row
