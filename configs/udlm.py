"""Uniform diffusion of bytes (UDLM), otherwise as mdlm.

Launch:   jaxlab train udlm
          jaxlab sample runs/udlm --psi steps=256 --psi high=constant-0.9 --psi high_frac=0.5
Expected: not measured at this size; half of it, 400 steps of 32 x 64 bytes, reaches 2.58 nats per byte with one
          seed (benchmarks/diffusion_lm.py), where mdlm has 2.49
"""

import dataclasses

from configs import mdlm
from models.dit import DiTConfig
from train.diffusion import udlm
from train.run import Run


def run() -> Run:
    """Every token may change again, so there is no mask."""
    return dataclasses.replace(mdlm.run(), model=DiTConfig(), objective=udlm())
