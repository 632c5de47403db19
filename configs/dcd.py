"""Distillation of a uniform diffusion model of bytes (DCD), in three rounds; a laptop CPU.

Launch:   jaxlab train udlm
          jaxlab import teacher runs/udlm --run-dir runs/dcd
          jaxlab train runs/dcd
          jaxlab sample runs/dcd --psi steps=8 --psi removal=greedy
"""

from configs import mdlm
from models.distilled import FROZEN_TEACHER, Distilled
from train.distill import Dcd
from train.optimizer import Optimizer
from train.run import Run


def run() -> Run:
    """Model and source become those of the teacher's run."""
    base = mdlm.run()
    return Run(
        model=Distilled(),
        objective=Dcd(T=64, every=100),
        source=base.source,
        evaluators=base.evaluators,
        optimizer=Optimizer(
            lr=3e-4, schedule="constant", ema=0.98, weight_decay=0.0, freeze=FROZEN_TEACHER
        ),
        origin="runs/udlm",
        steps=300,
        batch=32,
        eval_every=100,
    )
