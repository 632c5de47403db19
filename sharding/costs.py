"""What attention on a sharded sequence needs, by formula: memory, communication, and the stage that fits.

Source: papers' note on UPipe, sections 4, 5 and 9.4. Bytes and units are those of one device and one
attention block; T is one tensor of queries of one device. s = seq_len / (context * ring) tokens.
"""

from typing import NamedTuple

from sharding.context.checks import METHODS, STAGED, TWO_LEVEL, check_context
from sharding.context.schedule import (
    HeadSchedule,
    head_schedule,
    legal_heads_per_stage,
)


class MemoryModel(NamedTuple):
    """Bytes: of T; of the forward pass beyond x; of the backward pass with x, out, dout and dx."""

    unit_bytes: float
    forward_bytes: float
    backward_bytes: float


class CommModel(NamedTuple):
    """Operands of collectives, in units of one head of s tokens, and how many collectives.

    A step is forward and backward without rematerialisation around the layer.
    """

    unit_bytes: float
    forward_units: float
    forward_calls: int
    step_units: float
    step_calls: int


def memory_model(
    method: str,
    *,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    model_dim: int,
    context: int,
    ring: int = 1,
    heads_per_stage: int | None = None,
    batch: int = 1,
    dtype_bytes: int = 2,
    accounting: str = "paper",
) -> MemoryModel:
    """Activation memory of one attention block by the paper's accounting (section 4 of the note).

    With accounting 'xla' the peaks of the TPU compiler: the weights and their gradients count, the
    model's own width, and `_XLA` more tensors, fitted to benchmarks/results/context_memory_*.json for
    ulysses and upipe.
    `batch` is that of one device. `heads_per_stage` None is the smallest legal number. ValueError for
    a geometry that `sharding.context.check_context` refuses, for method 'none', and for accounting
    'xla' of a method that is not fitted.
    """
    if accounting not in ("paper", "xla"):
        raise ValueError(f"accounting={accounting!r} must be 'paper' or 'xla'")
    if accounting == "xla" and method not in _XLA:
        raise ValueError(
            f"accounting='xla' is fitted for the methods {list(_XLA)}, not {method!r}: use 'paper'"
        )
    if model_dim < 1 or head_dim < 1:
        raise ValueError(f"model_dim={model_dim} and head_dim={head_dim} must be at least 1")
    schedule = _schedule(method, seq_len, num_heads, num_kv_heads, context, ring, heads_per_stage)
    token = batch * head_dim * dtype_bytes  # bytes of a head of a token
    heads = seq_len // (context * ring) * token
    t = heads * num_heads
    # Accumulators in float32, in units of the activations' type.
    wide = max(4, dtype_bytes) / dtype_bytes
    f, fk = schedule.heads_per_stage / num_heads, schedule.ukv / num_heads
    if method == "ring":
        gamma = num_kv_heads / num_heads
        forward = 2 + wide + 4 * gamma
        backward = 5 + wide + 4 * gamma + 4 * wide * gamma
    elif method == "allgather":
        whole = 2 * num_kv_heads * seq_len * token / t
        forward, backward = 1 + whole, 1 + 2 * whole
    else:
        # x, out, dout, dx; then q, out, dout, dq of a stage; the staged methods drop the rest, and
        # gather gradients of keys and values over its stages, so that they have six arrays, not four.
        visiting = 4 * fk if method in TWO_LEVEL and ring > 1 else 0
        forward = 1 + 2 * (f + 2 * fk) + visiting
        backward = 4 + 4 * f + 6 * fk + visiting
        if method not in STAGED:
            backward = 8 + 12 * fk + visiting
    if accounting == "paper":
        return MemoryModel(float(t), forward * t, backward * t)
    weights = 2 * model_dim * (num_heads + num_kv_heads) * head_dim * dtype_bytes
    # x, its gradient, y and its gradient are as wide as the model, not as all heads together.
    wider = seq_len // (context * ring) * batch * model_dim * dtype_bytes - t
    if schedule.heads_per_stage == num_heads:
        method, backward = "ulysses", 8 + 12 * fk  # one stage is no stages
    backward += _XLA[method] * f
    # Ulysses computes in the places of dx and y before they are made, as far as these are wide enough.
    slack = 4 if method == "upipe" else -2.5
    return MemoryModel(
        float(t), forward * t + wider + weights, backward * t + slack * wider + 2 * weights
    )


# Tensors of the queries of one stage beyond the paper's backward pass, in what the compiler assigns:
# Ulysses needs less, as not all of its tensors live at once.
_XLA = {"ulysses": -2.85, "upipe": 2.2}


def comm_model(
    method: str,
    *,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    context: int,
    ring: int = 1,
    heads_per_stage: int | None = None,
    batch: int = 1,
    dtype_bytes: int = 2,
) -> CommModel:
    """What `sharding.plan.count_collectives` counts in `attention_layer` (section 5 of the note).

    Arguments and errors are those of `memory_model`. A part (n - 1) / n of an all_to_all's operands
    goes over the wire, n - 1 times those of an all_gather.
    """
    s = _schedule(method, seq_len, num_heads, num_kv_heads, context, ring, heads_per_stage)
    unit = float(batch * seq_len // (context * ring) * head_dim * dtype_bytes)
    wide = max(4, dtype_bytes) / dtype_bytes
    if method == "allgather":
        there, back = 2 * num_kv_heads, 2 * num_kv_heads * context
        moving = context > 1
        return CommModel(unit, there * moving, 2 * moving, (there + back) * moving, 4 * moving)
    stages, passes = s.n_outer * s.n_inner, 3 if method in STAGED else 2
    units, calls = 0, 0
    if method != "ring" and context > 1:
        units, calls = 2 * num_heads + 2 * s.he, 2 * stages + 2 * s.n_outer
    hops, visitors, tours = 0, 0, 0
    if method == "ring":
        hops, visitors, tours = context - 1, 2 * num_kv_heads, 1
    elif method in TWO_LEVEL:
        hops, visitors, tours = ring - 1, 2 * s.ukv, stages
    # Gradients go one hop more than keys and values, which are then at home.
    home = tours * (hops + 1) if hops else 0
    turn = tours * hops
    return CommModel(
        unit,
        units + turn * visitors,
        calls + turn,
        passes * (units + turn * visitors) + home * visitors * wide,
        passes * (calls + turn) + home,
    )


def choose_heads_per_stage(
    budget_bytes: float,
    *,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    model_dim: int,
    context: int,
    ring: int = 1,
    batch: int = 1,
    dtype_bytes: int = 2,
    accounting: str = "paper",
) -> int:
    """The largest legal `heads_per_stage` whose backward pass needs at most `budget_bytes`.

    `accounting` is that of `memory_model`. Larger stages are fewer and faster. ValueError, naming the
    smallest need, when none fits.
    """
    method = "upipe_ring" if ring > 1 else "upipe"

    def need(u: int) -> float:
        model = memory_model(
            method, seq_len=seq_len, num_heads=num_heads, num_kv_heads=num_kv_heads,
            head_dim=head_dim, model_dim=model_dim, context=context, ring=ring, heads_per_stage=u,
            batch=batch, dtype_bytes=dtype_bytes, accounting=accounting,
        )  # fmt: skip
        return model.backward_bytes

    legal = legal_heads_per_stage(num_heads, num_kv_heads, context)
    fitting = [u for u in legal if need(u) <= budget_bytes]
    if not fitting:
        raise ValueError(
            f"budget_bytes={budget_bytes:.0f} is too small: attention of seq_len={seq_len}, "
            f"num_heads={num_heads}, num_kv_heads={num_kv_heads}, context={context}, ring={ring} "
            f"needs at least {need(legal[0]):.0f} bytes, with heads_per_stage={legal[0]}"
        )
    return fitting[-1]


def _schedule(
    method: str, seq_len, num_heads, num_kv_heads, context, ring, heads_per_stage
) -> HeadSchedule:
    """The stages of `method`, all heads in one where it has none; checked."""
    check_context(
        {"ring": ring, "context": context}, method=method, num_heads=num_heads,
        num_kv_heads=num_kv_heads, seq_len=seq_len, heads_per_stage=heads_per_stage,
    )  # fmt: skip
    if method == "none":
        legal = [name for name in METHODS if name != "none"]
        raise ValueError(f"method='none' is left to the compiler; there is a model of {legal}")
    if method in STAGED:
        least = legal_heads_per_stage(num_heads, num_kv_heads, context)[0]
        return head_schedule(num_heads, num_kv_heads, context, heads_per_stage or least)
    if method in ("ring", "allgather"):
        return head_schedule(num_heads, num_kv_heads, 1, num_heads)
    return head_schedule(num_heads, num_kv_heads, context, num_heads)
