"""Supervised start of agents in text-houses: a small word LM sees the oracle at work.

Launch:   jaxlab train sft_house
Expected: at steps=250 loss 0.28 and success 0.33 ± 0.12 on 64 held-out houses; 11 minutes on 2 busy cores;
          400 steps were not measured
"""

from typing import Any

from jaxlab.envs import HouseConfig
from models.decoder import DecoderConfig
from train.envs.house import TextHouse
from train.evaluate import HeldOut
from train.objectives import NextToken
from train.optimizer import Optimizer
from train.rollout.shown import Shown
from train.rollout.success import Success
from train.run import Run

# A house and an episode of at most 16 actions; the row has room for them.
WORLD = TextHouse(HouseConfig(rooms=2, receptacles=5, objects=3, conditions=1), horizon=16)
EPISODE: dict[str, Any] = {"world": WORLD, "turns": 16, "length": 512}


def run() -> Run:
    """Houses of two rooms; `rl_house` goes on from it."""
    return Run(
        model=DecoderConfig(
            vocab=64, layers=2, d_model=64, heads=4, kv_heads=4, head_dim=16, mlp=192
        ),
        objective=NextToken(),
        source=Shown(**EPISODE),
        evaluators=(HeldOut(batches=2), Success()),
        optimizer=Optimizer(lr=3e-3),
        steps=400,
        batch=16,
    )
