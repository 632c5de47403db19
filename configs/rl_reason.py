"""GRPO on reasoning tasks from `sft_reason`, with pass@k and interference of prompts measured live.

Launch:   jaxlab train sft_reason; jaxlab train rl_reason
          jaxlab train rl_reason source.advantage.kind=pkpo_wrloo source.advantage.k=4 \\
              objective.loss.kind=pg optimizer.protect=0.9 --run-dir runs/protected
Expected: not measured to the end yet; first figures are in docs/rl.md
"""

from configs.sft_reason import run as supervised
from jaxlab.rl import RLConfig
from train.optimizer import Optimizer
from train.policy import Policy
from train.rollout.evaluate import Interference, PassAtK
from train.rollout.source import Rollouts
from train.run import Run


def run() -> Run:
    """16 problems of 8 answers a step."""
    return Run(
        model=supervised().model,
        objective=Policy(RLConfig(mode="seq_mean_token_mean")),
        source=Rollouts(),
        evaluators=(PassAtK(), Interference()),
        optimizer=Optimizer(lr=2e-4, schedule="constant", warmup=5, weight_decay=0.0),
        start="runs/sft_reason",
        steps=100,
        batch=128,
        eval_every=25,
    )
