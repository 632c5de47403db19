"""ViTTT classifier of drawn digits; held-out fonts; a laptop CPU.

Launch:   jaxlab train vittt
Expected: held-out accuracy about 0.97, in a minute or two on 2 cores
"""

from models.vittt import ViTTTConfig
from train.data.digits import Digits
from train.evaluate import HeldOut
from train.objectives import Classify
from train.optimizer import Optimizer
from train.run import Run


def run() -> Run:
    """Three blocks, width 64."""
    return Run(
        model=ViTTTConfig(),
        objective=Classify(),
        source=Digits(),
        evaluators=(HeldOut(batches=0),),
        optimizer=Optimizer(name="muon", lr=0.02, warmup=20),
        steps=300,
        batch=32,
        eval_every=100,
    )
