r"""Byte-level LM on rows of 32k tokens, sequence sharded over 8 devices: UPipe's stages of few heads.

Launch:   JAX_NUM_CPU_DEVICES=8 jaxlab train long_context     (simulated devices; accelerators as they are)
Expected: loss about 3 nats per byte after 20 steps, the same with any model.context.method
"""

from models.decoder import DecoderConfig
from sharding.context import ContextConfig
from sharding.mesh import MeshShape
from train.data.text import Text
from train.evaluate import HeldOut
from train.objectives import NextToken
from train.optimizer import Optimizer
from train.run import Run


def run() -> Run:
    """Two blocks of 8 query heads on 4 key/value heads; nothing of full length but the residuals."""
    return Run(
        model=DecoderConfig(
            layers=2, d_model=64, heads=8, kv_heads=4, head_dim=8, mlp=128,
            context=ContextConfig("upipe"), mlp_tiles=4, remat="attn_y",
        ),
        objective=NextToken(tiles=8),
        evaluators=(HeldOut(batches=1),),
        source=Text(seq_len=32_768),
        optimizer=Optimizer(warmup=5),
        mesh=MeshShape(data=1, context=-1),
        steps=20,
        batch=1,
        log_every=1,
        save_every=10,
    )  # fmt: skip
