"""Linear attention and its relatives: one recurrence, token by token or in chunks, and its step.

Source: note on TTT as linear attention (arXiv 2602.21204), sections 5, 6 and 10.1.
"""

from jaxlab.linear_attention.features import feature_map
from jaxlab.linear_attention.master import linear_attention, linear_attention_step
from jaxlab.linear_attention.relatives import (
    delta_rule,
    delta_rule_step,
    gated_delta_rule,
    gated_delta_rule_step,
    gla,
    gla_step,
    kda,
    kda_step,
)  # fmt: skip
from jaxlab.linear_attention.state import LinAttnState, init_state
from jaxlab.linear_attention.triangular import (
    decay_matrix,
    momentum_coefficients,
    tri_inverse_unit_lower,
)  # fmt: skip

__all__ = [
    "LinAttnState",
    "decay_matrix",
    "delta_rule",
    "delta_rule_step",
    "feature_map",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gla",
    "gla_step",
    "init_state",
    "kda",
    "kda_step",
    "linear_attention",
    "linear_attention_step",
    "momentum_coefficients",
    "tri_inverse_unit_lower",
]
