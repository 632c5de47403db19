r"""Llama 3 8B shape, from scratch, 8192-token sequences, for a TPU slice of 8 chips or more.

A step is 64 sequences in 2 microbatches, which any power of two of devices up to 32 divides; 64 devices
take accumulate=1.

Plan:     jaxlab compile --config llama3_8b --topology v5p:2x2x2
Launch:   RUN_DIR=/mnt/runs/a launch/tpu_pod.sh NAME ZONE llama3_8b \
              source.files=gs://BUCKET/*.parquet source.tokenizer=/mnt/tokenizer
"""

from models.decoder import DecoderConfig
from sharding.mesh import MeshShape
from train.data.text import Text
from train.evaluate import HeldOut
from train.objectives import NextToken
from train.optimizer import Optimizer
from train.run import Run


def run() -> Run:
    """8.0 billion parameters, fully sharded."""
    return Run(
        model=DecoderConfig(
            vocab=128_256, layers=32, d_model=4096, heads=32, kv_heads=8, head_dim=128, mlp=14_336,
            rope_theta=500_000.0, norm_eps=1e-5, remat="full",
            dtype="bfloat16",
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
