"""Test-time training with key-value binding: LaCT and its ladder, TTT-Linear, TTT-MLP, ViTTT.

Operators over sequences, a step of each for decoding, and the oracle they are proven against.
Sources: 2602.21204 (the ladder down to linear attention), LaCT 2505.23884, ViTTT 2512.01643,
TTT-Linear and TTT-MLP 2407.04620.
"""

from jaxlab.ttt.config import LADDER, FastWeights, InnerConfig
from jaxlab.ttt.lact import ttt, ttt_step
from jaxlab.ttt.minibatch import TTTLinearParams, TTTMLPParams
from jaxlab.ttt.net import swiglu_minus_grads, ttt_apply
from jaxlab.ttt.oracle import LinearForm, to_linear_attention, ttt_autodiff
from jaxlab.ttt.orthogonal import newton_schulz
from jaxlab.ttt.packed import PackedState, document_places, packed_state, ttt_packed
from jaxlab.ttt.packed_minibatch import (
    PackedMiniBatch,
    packed_minibatch_state,
    ttt_minibatch_packed,
)
from jaxlab.ttt.sequence import (
    ttt_linear,
    ttt_linear_init,
    ttt_linear_step,
    ttt_mlp,
    ttt_mlp_init,
    ttt_mlp_step,
)
from jaxlab.ttt.state import TTTState, init_ttt_state
from jaxlab.ttt.vittt import vittt_dwconv, vittt_glu

__all__ = [
    "LADDER",
    "FastWeights",
    "InnerConfig",
    "LinearForm",
    "PackedMiniBatch",
    "PackedState",
    "TTTLinearParams",
    "TTTMLPParams",
    "TTTState",
    "document_places",
    "init_ttt_state",
    "newton_schulz",
    "packed_minibatch_state",
    "packed_state",
    "swiglu_minus_grads",
    "to_linear_attention",
    "ttt",
    "ttt_apply",
    "ttt_autodiff",
    "ttt_linear",
    "ttt_linear_init",
    "ttt_linear_step",
    "ttt_minibatch_packed",
    "ttt_mlp",
    "ttt_mlp_init",
    "ttt_mlp_step",
    "ttt_packed",
    "ttt_step",
    "vittt_dwconv",
    "vittt_glu",
]
