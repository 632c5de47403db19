"""Small worlds of texts for test_agents.py; without JAX, so that their processes start quickly."""

import dataclasses
import os
import signal


@dataclasses.dataclass(frozen=True)
class Counter:
    """Say "up" until the number of the seed is reached; other words are invalid, "die" and "fail" do so."""

    most: int = 3

    def check(self):
        pass

    def words(self):
        return ("up", "stay", "at", "of", *map(str, range(self.most + 1)))

    def make(self):
        return CounterEnv(self)


class CounterEnv:
    def __init__(self, world):
        self._world = world

    def reset(self, *, seed):
        self._goal, self._at = 1 + seed % self._world.most, 0
        return self._say(), self._info()

    def step(self, action):
        if action == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "fail":
            raise KeyError("no such luck")
        self._at += action == "up"
        won = self._at == self._goal
        return self._say(), float(won), won, False, self._info()

    def _say(self):
        return f"at {self._at} of {self._goal}"

    def _info(self):
        return {"admissible": ["up", "stay"], "expert": "up"}


def counter(most):
    return CounterEnv(Counter(most))
