"""Perceptron with dropout on real handwritten digits as four imbalanced grades; a laptop CPU.

Launch:   jaxlab train digits
Expected: held-out accuracy 0.77 (the inputs are noisy, the critical grades rare) in about a minute;
          `jaxlab eval runs/digits` prints where the model does not know and draws it into
          runs/digits/uncertainty
"""

from models.classifier import MLPConfig
from train.classified import Uncertainty
from train.data.tabular import Shipped
from train.evaluate import HeldOut
from train.objectives import Classify
from train.optimizer import Optimizer
from train.posterior import Dropout
from train.run import Run


def run() -> Run:
    """Grades 2 and 3 are critical: digit 5, and digits 3 and 8."""
    return Run(
        model=MLPConfig(classes=4, dropout=0.3),
        objective=Classify(),
        source=Shipped(relabel=(0, 0, 0, 3, 0, 2, 0, 0, 3, 1), keep=(1000, 50, 50, 30), noise=0.35),
        evaluators=(HeldOut(batches=0), Uncertainty(Dropout(), critical=(2, 3))),
        optimizer=Optimizer(lr=2e-3, weight_decay=1e-4, schedule="constant", warmup=0),
        steps=400,
        batch=64,
        log_every=50,
        eval_every=200,
        save_every=200,
    )
