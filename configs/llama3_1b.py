"""Llama 3.2 1B shape, 8192-token sequences, for a TPU slice of 4 chips or more.

A step is 64 sequences in 2 microbatches, which any power of two of devices up to 32 divides; 64 devices
take accumulate=1.

Plan:     jaxlab compile --config llama3_1b --topology v5p:2x2x1
Launch:   jaxlab import hf DIR --run-dir RUN && jaxlab train RUN source.files=MY.jsonl
          (with pretrained weights; from scratch as in llama3_8b)
"""

from jaxlab.rope import Llama3Scaling
from models.decoder import DecoderConfig
from sharding.mesh import MeshShape
from train.data.text import Text
from train.evaluate import HeldOut
from train.objectives import NextToken
from train.optimizer import Optimizer
from train.run import Run


def run() -> Run:
    """1.24 billion parameters, one embedding for input and output."""
    return Run(
        model=DecoderConfig(
            vocab=128_256, layers=16, d_model=2048, heads=32, kv_heads=8, head_dim=64, mlp=8192,
            tied=True, rope_theta=500_000.0, rope_scaling=Llama3Scaling(factor=32.0), norm_eps=1e-5,
            remat="full", dtype="bfloat16",
        ),
        objective=NextToken(tiles=16),
        source=Text(files=("data/*.parquet",), tokenizer="tokenizer.json", seq_len=8192),
        evaluators=(HeldOut(),),
        optimizer=Optimizer(lr=3e-4, warmup=2000),
        mesh=MeshShape(data=1, fsdp=-1),
        steps=100_000,
        batch=64,
        accumulate=2,
        save_every=1000,
        eval_every=1000,
    )  # fmt: skip
