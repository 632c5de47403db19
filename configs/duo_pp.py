"""Uniform diffusion of bytes with the sparse curriculum of Duo++, otherwise as udlm.

Launch:   jaxlab train duo_pp
          jaxlab sample runs/duo_pp --psi steps=256 --psi high=constant-0.9 --psi high_frac=0.5
Expected: not measured at this size (benchmarks/diffusion_lm.py trains half of it); the held-out bound is
          noisy: evaluators.0.passes=8 goes over it 8 times
"""

import dataclasses

from configs import mdlm
from models.dit import DiTConfig
from train.diffusion import duo_pp
from train.run import Run


def run() -> Run:
    """The first half of the steps sees mixtures of two tokens."""
    return dataclasses.replace(mdlm.run(), model=DiTConfig(), objective=duo_pp(end=300))
