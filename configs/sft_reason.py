"""Supervised start of the reasoning tasks: a byte LM of 0.8 M parameters learns their form.

Launch:   pip install 'jaxlab[rl]'; jaxlab train sft_reason
Expected: not measured to the end yet; first figures are in docs/rl.md
"""

from models.decoder import DecoderConfig
from train.data.reason import Reason
from train.evaluate import HeldOut
from train.objectives import NextToken
from train.optimizer import Optimizer
from train.rollout.evaluate import PassAtK
from train.run import Run


def run() -> Run:
    """Problems and answers of four tasks; `rl_reason` goes on from it."""
    return Run(
        model=DecoderConfig(),
        objective=NextToken(),
        source=Reason(),
        evaluators=(HeldOut(batches=0), PassAtK()),
        optimizer=Optimizer(lr=2e-3),
        steps=300,
        batch=32,
    )
