"""LaCT language model: window attention and test-time training in every layer, on embedded text.

Launch:   jaxlab train lact        (model.pattern=gated_delta, kda, ttt_linear... for other mixers)
Expected: held-out loss about 2.16 nats per byte, two minutes on 2 cores
"""

from jaxlab.ttt import InnerConfig
from models.decoder import DecoderConfig
from models.mixers import LaCT
from train.data.text import Text
from train.evaluate import HeldOut, Sample
from train.objectives import NextToken
from train.optimizer import Optimizer
from train.run import Run


def run() -> Run:
    """Two blocks, width 64, windows of 16 tokens, chunks of 32."""
    return Run(
        model=DecoderConfig(
            layers=2, d_model=64, heads=4, kv_heads=4, head_dim=16, mlp=128, pattern=("lact",),
            lact=LaCT(heads=2, window=16, inner=InnerConfig(chunk_size=32)),
        ),
        objective=NextToken(),
        source=Text(seq_len=256),
        evaluators=(HeldOut(batches=4), Sample(tokens=100)),
        optimizer=Optimizer(lr=5e-3, warmup=10),
        steps=150,
        batch=8,
        eval_every=50,
    )  # fmt: skip
