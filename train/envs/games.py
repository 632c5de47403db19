"""TextWorld's games as worlds (https://github.com/microsoft/TextWorld, extra `games`).

A game is made from its seed, in some seconds, and kept as a file; the engine, its texts and its plan for the
expert are TextWorld's own.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal


@dataclasses.dataclass(frozen=True)
class Games:
    """Games of one kind and level that TextWorld generates, one a seed."""

    challenge: Annotated[
        Literal["coin_collector", "treasure_hunter"], "which of TextWorld's challenges"
    ] = "coin_collector"
    level: Annotated[int, "its difficulty, from 1"] = 2
    games: Annotated[int, "different games, of which the seed takes one; 0: one a seed"] = 0
    horizon: Annotated[int, "actions after which an episode ends"] = 20
    folder: Annotated[str, "where games are kept; '': the system's folder of temporary files"] = ""

    def check(self) -> None:
        """ValueError for numbers out of range, ImportError without TextWorld."""
        for name in ("level", "horizon"):
            if getattr(self, name) < 1:
                raise ValueError(f"source.world.{name}={getattr(self, name)} must be at least 1")
        if self.games < 0:
            raise ValueError(f"source.world.games={self.games} must be at least 0")
        _textworld()

    def words(self) -> tuple[str, ...]:
        """Not a fixed few."""
        return ()

    def make(self) -> "GameEnv":
        """A new environment."""
        return GameEnv(self)


def _textworld() -> Any:
    try:
        import textworld  # pyright: ignore[reportMissingImports]
        import textworld.challenges  # pyright: ignore[reportMissingImports]
        import textworld.generator  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("source.world=Games needs: pip install 'jaxlab[games]'") from error
    return textworld


class GameEnv:
    """An episode is a game; admissible commands and the expert's plan are TextWorld's."""

    def __init__(self, config: Games):
        self._config, self._textworld = config, _textworld()
        self._folder = Path(config.folder or Path(tempfile.gettempdir()) / "jaxlab-games")
        self._game: Any = None
        self._steps, self._state = 0, None

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        """The game of a seed, which is made on first use."""
        if self._game is not None:
            self._game.close()
        infos = self._textworld.EnvInfos(
            feedback=True,
            description=True,
            admissible_commands=True,
            won=True,
            policy_commands=True,
        )
        self._game = self._textworld.start(self._file(seed % (self._config.games or 2**31)), infos)
        self._steps, self._state = 0, self._game.reset()
        return self._say(self._state, self._state.description)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """One command."""
        state, _, done = self._game.step(action)
        self._steps += 1
        won = bool(state.won)
        text, info = self._say(state, state.feedback)
        return text, float(won), bool(done), self._steps >= self._config.horizon, info

    def _say(self, state: Any, text: str) -> tuple[str, dict[str, Any]]:
        plan = state.policy_commands or []
        possible = sorted(state.admissible_commands or [])
        info = {"admissible": possible, "won": bool(state.won), "expert": plan[0] if plan else ""}
        return " ".join(text.split()), info

    def _file(self, seed: int) -> str:
        c = self._config
        path = self._folder / f"{c.challenge}-{c.level}-{seed}.z8"
        if not path.is_file():
            options = self._textworld.GameOptions()
            options.seeds = seed
            # A file appears whole: another process may be making the same game.
            with tempfile.TemporaryDirectory(dir=self._made(self._folder)) as folder:
                options.path = str(Path(folder) / path.name)
                challenge = getattr(self._textworld.challenges, c.challenge)
                game = challenge.make({"level": c.level}, options)
                self._textworld.generator.compile_game(game, options)
                for made in Path(folder).iterdir():
                    made.replace(self._folder / made.name)
        return str(path)

    @staticmethod
    def _made(folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        return folder
