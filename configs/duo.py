"""Uniform diffusion of bytes with Duo's dense curriculum, otherwise as udlm.

Launch:   jaxlab train duo
          jaxlab sample runs/duo --psi steps=256 --psi high=constant-0.9 --psi high_frac=0.5
Expected: not measured at this size; half of it, 400 steps of 32 x 64 bytes, reaches 2.48 nats per byte with one
          seed (benchmarks/diffusion_lm.py), where mdlm has 2.49
"""

import dataclasses

from configs import mdlm
from models.dit import DiTConfig
from train.diffusion import duo
from train.run import Run


def run() -> Run:
    """The first half of the steps sees softened tokens."""
    return dataclasses.replace(mdlm.run(), model=DiTConfig(), objective=duo(end=300))
