"""Evaluator of agents: the share of held-out tasks that they solve."""

import dataclasses
from typing import Annotated

import jax
import numpy as np

from train.rollout.agents import Conversations
from train.rollout.episodes import Player


@dataclasses.dataclass(frozen=True)
class Success:
    """Success on held-out tasks, with a 95% interval over tasks, actions of an episode and how many fail."""

    tasks: Annotated[int, "held-out tasks, one episode each"] = 64
    temperature: Annotated[float, "of sampling; 0: greedy"] = 0.4

    def check(self, run) -> None:
        if not isinstance(run.source, Conversations) or not hasattr(run.model, "vocab"):
            raise ValueError(
                "evaluator Success needs a language model and a source of conversations"
            )
        if self.tasks < 2 or not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"evaluator Success: tasks={self.tasks} must be at least 2 and "
                f"temperature={self.temperature} finite and >= 0"
            )

    def make(self, scene):
        player = Player(scene, self.tasks, 1, "valid", self.temperature)

        def evaluate(params, step):
            # The same keys at every evaluation: what changes is the policy.
            key = jax.random.fold_in(jax.random.key(scene.run.seed), 2)
            played = player.play(params, range(self.tasks), key)
            won = np.array([steps[-1].turn.won for steps in played.steps], np.float64)
            actions = [step for steps in played.steps for step in steps]
            return {
                "valid/success": float(won.mean()),
                "valid/success_ci95": float(1.96 * won.std(ddof=1) / len(won) ** 0.5),
                "valid/steps": len(actions) / len(won),
                "valid/invalid": float(np.mean([not step.turn.valid for step in actions])),
            }

        return evaluate
