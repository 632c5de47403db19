"""Uniform diffusion of bytes (UDLM), otherwise as mdlm.

Launch:   jaxlab train udlm
          jaxlab sample runs/udlm --psi steps=256 --psi high=constant-0.9 --psi high_frac=0.5
Expected: not measured at this size (benchmarks/diffusion_lm.py trains half of it); the held-out bound is
          noisy: evaluators.0.passes=8 goes over it 8 times
"""

import dataclasses

from configs import mdlm
from models.dit import DiTConfig
from train.diffusion import udlm
from train.run import Run


def run() -> Run:
    """Every token may change again, so there is no mask."""
    return dataclasses.replace(mdlm.run(), model=DiTConfig(), objective=udlm())
