"""Smallest decoder, for tests and for trying things out: seconds on any machine.

Launch:   jaxlab train tiny
Expected: loss below 3.5 nats per byte after 20 steps, in 10 s
"""

from models.decoder import DecoderConfig
from train.data.text import Text
from train.evaluate import HeldOut
from train.objectives import NextToken
from train.optimizer import Optimizer
from train.run import Run


def run() -> Run:
    """Two blocks, width 64."""
    return Run(
        model=DecoderConfig(layers=2, d_model=64, heads=4, kv_heads=4, head_dim=16, mlp=128),
        objective=NextToken(),
        source=Text(seq_len=64),
        evaluators=(HeldOut(batches=2),),
        optimizer=Optimizer(warmup=5),
        steps=20,
        batch=8,
        log_every=5,
        save_every=10,
    )
