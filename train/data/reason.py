"""Problems with their answers as a source of supervised batches: what RL starts from."""

import dataclasses
from typing import Annotated

import numpy as np

from train.data.problems import Problems, answer_ids, parse_tasks, prompt_ids, row
from train.data.tokenizers import TokenRows, load_tokenizer

TASKS = (
    "chain_sum min_terms=2 max_terms=2 min_digits=1 max_digits=1",
    "count_bits max_n=63",
    "spell_backward min_word_len=3 max_word_len=4",
    "lcm max_value=12",
)


@dataclasses.dataclass(frozen=True)
class Reason(TokenRows):
    """Reasoning-gym problems, one a row; the loss is that of the answer alone."""

    tasks: Annotated[tuple[str, ...], "datasets of reasoning-gym, each 'name field=3 ...'"] = TASKS
    tokenizer: Annotated[str, "'bytes', a tokenizer.json or its folder"] = "bytes"
    prompt: Annotated[int, "most tokens of a question, its first and last included"] = 80
    new: Annotated[int, "most tokens of an answer, its end included"] = 8
    held_out: Annotated[int, "problems of the held-out split"] = 256

    @property
    def seq_len(self) -> int:
        """Tokens a row."""
        return self.prompt + self.new

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError naming the field that cannot work."""
        parse_tasks(self.tasks)
        for name, least in (("prompt", 2), ("new", 1), ("held_out", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"source.{name}={getattr(self, name)} must be at least {least}")
        parts = mesh_sizes.get("ring", 1) * mesh_sizes.get("context", 1)
        if self.seq_len % parts:
            raise ValueError(
                f"source.prompt={self.prompt} + source.new={self.new} is not divisible by "
                f"mesh.ring * mesh.context={parts}"
            )

    def make(
        self, batch: int, *, seed: int, split: str, process_index: int = 0, process_count: int = 1
    ) -> "Answered":
        """The batches of a split ('train' or 'valid')."""
        return Answered(self, batch, seed, split)


class Answered:
    """Random access to rows of problems and their answers."""

    def __init__(self, config: Reason, batch: int, seed: int, split: str):
        self.config, self.batch, self.spec = config, batch, config.spec(batch)
        self.num_batches = -(-config.held_out // batch)
        self._problems = Problems(config.tasks, seed, split)
        self._tokenizer = load_tokenizer(config.tokenizer)

    def batch_at(self, step: int, rows: slice | None = None) -> dict[str, np.ndarray]:
        """Rows `rows` (all if None) of the batch of a step."""
        start, stop, _ = (rows or slice(None)).indices(self.batch)
        made = [self._row(step * self.batch + i) for i in range(start, stop)]
        return {name: np.stack([r[name] for r in made]) for name in self.spec}

    def _row(self, i: int) -> dict[str, np.ndarray]:
        c, problem = self.config, self._problems[i]
        prompt = prompt_ids(self._tokenizer, problem["question"], c.prompt)
        answer = answer_ids(self._tokenizer, problem["answer"])
        if len(answer) > c.new:
            raise ValueError(
                f"source.new={c.new} is too short for {problem['answer']!r}: {len(answer)} tokens"
            )
        return row(prompt, answer, c.seq_len)
