"""What an agent's environment is: Gymnasium's `reset` and `step`, with texts.

`info` may hold "admissible" (texts of the actions that are possible now), "won", "valid" (whether the
action was one), "expert" (an action of a good policy). Environments are deterministic: the same seed and
actions give the same texts, which is what lets a worker that died, or a run, go on.
"""

import dataclasses
import importlib
import json
from typing import Annotated, Any, NamedTuple, Protocol


class Environment(Protocol):
    """One episode at a time."""

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """(observation, info) of the episode of this seed."""
        ...

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """(observation, reward, terminated, truncated, info)."""
        ...


class World(Protocol):
    """A configuration that makes environments; a frozen dataclass, sent to the processes that step them."""

    def check(self) -> None:
        """ValueError naming the field that cannot work."""
        ...

    def words(self) -> tuple[str, ...]:
        """All words that texts and actions are made of; () when they are not a fixed few."""
        ...

    def make(self) -> Environment:
        """A new environment."""
        ...


class Turn(NamedTuple):
    """What an environment says to an action, or to the beginning of an episode."""

    text: str
    reward: float = 0.0
    done: bool = False
    won: bool = False
    valid: bool = True
    admissible: tuple[str, ...] = ()
    expert: str = ""


def begin(environment: Environment, seed: int) -> Turn:
    """The first turn of the episode of a seed."""
    text, info = environment.reset(seed=seed)
    return _turn(text, 0.0, False, info, True)


def act(environment: Environment, action: str, before: Turn) -> Turn:
    """The turn after an action. Without info["valid"] those that `before` lists are valid."""
    text, reward, ended, cut, info = environment.step(action)
    possible = not before.admissible or action in before.admissible
    return _turn(text, float(reward), bool(ended or cut), info, possible)


def _turn(text: str, reward: float, done: bool, info: dict[str, Any], valid: bool) -> Turn:
    return Turn(
        str(text),
        reward,
        done,
        won=bool(info.get("won", done and reward > 0)),
        valid=bool(info.get("valid", valid)),
        admissible=tuple(info.get("admissible") or ()),
        expert=str(info.get("expert") or ""),
    )


@dataclasses.dataclass(frozen=True)
class Imported:
    """Any environment with Gymnasium's `reset` and `step` and texts on both sides."""

    target: Annotated[str, "what makes it: package.module:callable"] = ""
    options: Annotated[str, "its keyword arguments, a JSON object"] = "{}"

    def check(self) -> None:
        """ValueError for a target that is not there or options that are no JSON object."""
        self._found()

    def words(self) -> tuple[str, ...]:
        """Unknown."""
        return ()

    def make(self) -> Environment:
        """A new environment."""
        target, options = self._found()
        return target(**options)

    def _found(self) -> tuple[Any, dict[str, Any]]:
        module, _, name = self.target.partition(":")
        try:
            options = json.loads(self.options)
        except json.JSONDecodeError:
            options = None
        if not isinstance(options, dict):
            raise ValueError(f"source.world.options={self.options!r} must be a JSON object")
        try:
            target = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"source.world.target={self.target!r} must be package.module:callable: {error}"
            ) from error
        return target, options
