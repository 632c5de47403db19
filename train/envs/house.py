"""The text-house of `jaxlab.envs` as an environment of texts."""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import numpy as np

from jaxlab import envs
from jaxlab.envs.house import VERBS, HouseState


@dataclasses.dataclass(frozen=True)
class TextHouse:
    """Houses drawn from seeds: find an object, perhaps clean, heat or cool it, put it in its place."""

    house: envs.HouseConfig = envs.HouseConfig()
    horizon: Annotated[int, "actions after which an episode ends"] = 20

    def check(self) -> None:
        """ValueError for a horizon below 1."""
        if self.horizon < 1:
            raise ValueError(f"source.world.horizon={self.horizon} must be at least 1")

    def words(self) -> tuple[str, ...]:
        """Words of observations and actions."""
        return envs.house_words(self.house)[1:]

    def make(self) -> "TextHouseEnv":
        """A new environment."""
        return TextHouseEnv(self)


@functools.cache
def _programs(config: envs.HouseConfig):
    """(reset, step) of one house, each with what an agent is told: compiled once for all environments."""

    def told(state):
        return (
            envs.house_observe(config, state),
            envs.house_admissible(config, state),
            envs.house_oracle(config, state),
        )

    def reset(key):
        state = envs.house_reset(config, key)
        return state, told(state)

    def step(state, verb, noun):
        state, out = envs.house_step(config, state, verb, noun)
        return state, out, told(state)

    # Tiny programs: whatever accelerator there is has better to do.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.jit(reset), jax.jit(step)


class TextHouseEnv:
    """Actions are a verb and a noun, "take mug"; other texts are invalid and change nothing."""

    def __init__(self, config: TextHouse):
        self._config, self._words = config, envs.house_words(config.house)
        self._reset, self._step = _programs(config.house)
        self._state: HouseState | None = None
        self._steps = 0

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """The house of a seed, any integer of up to 64 bits."""
        key = jax.random.fold_in(jax.random.key(seed % 2**32), seed // 2**32 % 2**32)
        self._state, told = self._reset(key)
        self._steps = 0
        return self._say(told)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """What a verb and a noun bring; it ends with the goal or at the horizon."""
        if self._state is None:
            raise RuntimeError("reset the environment before its first step")
        verb, _, noun = action.strip().partition(" ")
        nouns = self._config.house.nouns
        # An action out of words that are none: look at an object is never possible.
        known = verb in VERBS and noun in nouns
        at = (VERBS.index(verb), nouns.index(noun)) if known else (0, len(nouns) - 1)
        self._state, out, told = self._step(self._state, *np.asarray(at, np.int32))
        self._steps += 1
        won = bool(out.done)
        text, info = self._say(told)
        info |= {"won": won, "valid": bool(out.valid)}
        return text, float(out.reward), won, self._steps >= self._config.horizon, info

    def _say(self, told) -> tuple[str, dict[str, Any]]:
        tokens, admissible, expert = jax.device_get(told)
        names = lambda verb, noun: f"{VERBS[verb]} {self._config.house.nouns[noun]}"  # noqa: E731
        possible = [names(*at) for at in np.argwhere(admissible)]
        text = " ".join(self._words[i] for i in tokens if i)
        return text, {"admissible": possible, "expert": names(*expert) if possible else ""}
