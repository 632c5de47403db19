"""SELAUR on agents in text-houses, from `sft_house`; GiGPO and GRPO by a field.

Launch:   jaxlab train sft_house; jaxlab train rl_house
          jaxlab train rl_house source.advantage.transform=none                           (GiGPO)
          jaxlab train rl_house source.advantage.transform=none source.advantage.omega=0  (GRPO)
Expected: not measured to the end; SELAUR, GiGPO and GRPO are compared by benchmarks/agents.py, see docs/rl.md
"""

from configs.sft_house import EPISODE
from configs.sft_house import run as supervised
from jaxlab.rl import RLConfig
from train.optimizer import Optimizer
from train.policy import Policy
from train.rollout.agents import Agents
from train.rollout.success import Success
from train.run import Run


def run() -> Run:
    """8 houses of 8 episodes a step."""
    return Run(
        model=supervised().model,
        objective=Policy(RLConfig(kl_coef=0.01)),
        source=Agents(**EPISODE, reference=True),
        evaluators=(Success(),),
        optimizer=Optimizer(lr=1e-3, schedule="constant", warmup=5, weight_decay=0.0),
        start="runs/sft_house",
        steps=50,
        batch=64,
        eval_every=10,
    )
