"""Problems with verifiers, made by reasoning-gym from a seed: no file and no network."""

from typing import Any

import numpy as np

from train.data.tokenizers import Tokenizer

HELD_OUT = 2**40  # held-out problems are those of seeds from here on


def parse_tasks(tasks: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """("chain_sum max_terms=2", ...) as (name, settings); ValueError for other spellings."""
    if not tasks:
        raise ValueError(f"source.tasks={list(tasks)} must name at least one dataset")
    found = []
    for task in tasks:
        name, *settings = task.split() or [""]
        pairs = [s.partition("=") for s in settings]
        if not name or not all(k.isidentifier() and v.isdigit() for k, _, v in pairs):
            raise ValueError(
                f"source.tasks={list(tasks)}: {task!r} must look like 'name field=3 other=4'"
            )
        found.append((name, {k: int(v) for k, _, v in pairs}))
    return found


class Problems:
    """Random access: problem i is the (i // tasks)-th one of task i % tasks, whatever was asked before.

    ImportError without reasoning-gym, ValueError for a dataset or a setting that it does not have.
    """

    def __init__(self, tasks: tuple[str, ...], seed: int, split: str):
        try:
            import reasoning_gym  # pyright: ignore[reportMissingImports]  (of the extra rl)
        except ImportError as error:
            raise ImportError("reasoning tasks need: pip install 'jaxlab[rl]'") from error
        parsed = parse_tasks(tasks)
        self.names = [name for name, _ in parsed]
        # A problem's own seed is its dataset's plus its number.
        first = 1_000_003 * seed + (HELD_OUT if split == "valid" else 0)
        try:
            self._sets = [
                reasoning_gym.create_dataset(name, seed=first, size=HELD_OUT, **settings)
                for name, settings in parsed
            ]
        except (AssertionError, TypeError, ValueError) as error:
            raise ValueError(f"source.tasks={list(tasks)}: {error}") from error

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"question", "answer", ...}, as reasoning-gym has it."""
        return self._sets[i % len(self._sets)][i // len(self._sets)]

    def correct(self, i: int, problem: dict[str, Any], text: str) -> bool:
        """Whether `text` is a full answer to problem i: partial credit does not count."""
        return self._sets[i % len(self._sets)].score_answer(answer=text, entry=problem) == 1


def prompt_ids(tokenizer: Tokenizer, question: str, room: int) -> list[int]:
    """The tokens that ask a question; ValueError when they are more than `room`."""
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    ids = [*bos, *map(int, tokenizer.encode(f"{question.strip()}\n"))]
    if len(ids) > room:
        raise ValueError(
            f"source.prompt={room} is too short for {question!r}: it has {len(ids)} tokens"
        )
    return ids


def answer_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """The tokens of an answer, with the end if the tokenizer has one."""
    eos = [] if tokenizer.eos is None else [tokenizer.eos]
    return [*map(int, tokenizer.encode(answer)), *eos]


def row(prompt: list[int], answer: list[int], length: int) -> dict[str, np.ndarray]:
    """A padded row [length]: only the answer has targets, each at the token before it; segment 0 pads."""
    ids = prompt + answer
    at = np.arange(length)
    tokens = np.zeros(length, np.int32)
    tokens[: len(ids)] = ids
    targets = np.full(length, -1, np.int32)
    targets[len(prompt) - 1 : len(ids) - 1] = answer
    real = at < len(ids)
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": np.where(real, at, 0).astype(np.int32),
        "segment_ids": real.astype(np.int32),
    }
