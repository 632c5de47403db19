"""Masked diffusion of bytes (MDLM), a DiT of 1.3 M parameters, the demo's text; a laptop CPU.

Launch:   jaxlab train mdlm
          jaxlab sample runs/mdlm --psi steps=256 --psi low=max-capped-0.02
Expected: held-out bound about 2.1 nats per byte in four minutes on 2 cores, with an error of some 0.1
          (evaluators.0.passes=8 for less); the demo, which reads from left to right, has 1.57
"""

from models.dit import DiTConfig
from train.data.text import Text
from train.denoise import Denoised
from train.diffusion import mdlm
from train.evaluate import HeldOut
from train.optimizer import Optimizer
from train.run import Run


def run() -> Run:
    """The mask is the last id; 264 of them can be split over 8 devices."""
    return Run(
        model=DiTConfig(vocab=264),
        objective=mdlm(),
        source=Text(seq_len=128),
        evaluators=(HeldOut(batches=0), Denoised()),
        optimizer=Optimizer(name="muon", lr=0.01, ema=0.98),
        steps=600,
        batch=32,
        eval_every=200,
    )
