"""The plan of a call: mesh, method, mask and core, checked once, and hashable, so that it is static."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from jaxlab.arguments import check_count
from jaxlab.attention import blockwise_attention
from jaxlab.masks import Rule, check_attention
from sharding.context.checks import (
    BALANCED,
    BY_HEADS,
    STAGED,
    TWO_LEVEL,
    Sizes,
    check_context,
    check_mesh,
    check_names,
    current_mesh,
    mesh_sizes,
    ring_axis,
)
from sharding.context.cores import find_core
from sharding.context.ring import Ring, gathered_attention, ring_attention
from sharding.context.schedule import (
    HeadSchedule,
    head_schedule,
    legal_heads_per_stage,
    replication,
)
from sharding.context.stages import Exchange
from sharding.context.zigzag import natural_index


class Plan(NamedTuple):
    """Everything static about a call. `mesh` None: one device, or automatic sharding."""

    mesh: Any
    sizes: Sizes
    rule: Rule
    core: Callable  # not used by those with a ring
    typed: bool  # whether types inside shard_map can be checked
    seq_len: int
    exchange: Exchange
    ring: Ring | None  # of more than one device, which keys and values go round
    gathered: bool  # all at once, instead of going round
    schedule: HeadSchedule | None  # of the staged methods
    policy: str
    rope_factor: float
    norm_eps: float

    def attend(self, segment_ids, q, k, v) -> Any:
        """Attention between the exchanges; `segment_ids` are those of the whole sequence."""
        if self.ring is None:
            arguments: dict[str, Any] = self.rule._asdict()
            return self.core(q, k, v, segment_ids=segment_ids, **arguments)
        attend = gathered_attention if self.gathered else ring_attention
        return attend(self.ring, q, k, v, segment_ids)

    def positions(self, length: int) -> Int[Array, "1 s"]:
        """Natural indices of this device's tokens."""
        names = () if self.mesh is None else self.mesh.axis_names
        shard = 0
        for axis in ("ring", "context"):
            if axis in names:
                shard = shard * getattr(self.sizes, axis) + jax.lax.axis_index(axis)
        places = shard * length + jnp.arange(length, dtype=jnp.int32)
        if self.ring and self.ring.zigzag:
            places = natural_index(places, self.seq_len, self.ring.size)
        return places[None]

    def specs(self) -> tuple[P, P, P, P]:
        """Of tokens [b, s], of their segments (which every shard has whole), of heads, of wo's heads."""
        assert self.mesh is not None
        names = self.mesh.axis_names
        group = lambda *axes: tuple(axis for axis in axes if axis in names) or None  # noqa: E731
        rows, tokens, heads = group("data", "fsdp"), group("ring", "context"), group("tensor")
        return P(rows, tokens), P(rows), P(rows, tokens, heads), P(heads)

    def shard(self, body: Callable, in_specs, out_specs) -> Callable:
        """`body` on every device."""
        if self.mesh is None:
            return body
        return jax.shard_map(
            body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=self.typed
        )


def make_plan(
    q, k, v, *, mesh, method, core, segment_ids, layout="contiguous", policy="nothing",
    heads_per_stage=None, rope_factor=1.0, norm_eps=1e-6, strict=True, **mask,
) -> Plan:  # fmt: skip
    """The plan of a call on q, k, v of these shapes; ValueError, before anything runs, if there is none.

    `strict` False, for method 'none' only: the mesh need not divide rows and lengths.
    """
    check_names(method, layout, core, policy)
    mesh = current_mesh() if mesh is None else mesh
    check_mesh(mesh, method)
    if heads_per_stage is not None:
        heads_per_stage = check_count("heads_per_stage", heads_per_stage, 1)
    (b, s, h, _), hk = q.shape, k.shape[2]
    if strict:
        check_context(
            mesh, method=method, num_heads=h, num_kv_heads=hk, seq_len=s, batch=b,
            heads_per_stage=heads_per_stage, layout=layout,
        )  # fmt: skip
    rule, _ = check_attention(
        q, k, v, segment_ids=segment_ids, k_segment_ids=None, q_positions=None, k_positions=None,
        **mask,
    )  # fmt: skip
    if method in BALANCED and callable(core):
        raise ValueError(f"core={core!r}: {method!r} has attention of its own, give a name")
    if method in ("ring", *TWO_LEVEL) and k.shape != v.shape:
        raise ValueError(
            f"method={method!r} sends keys and values as one: v must have the head dim {k.shape[3]} of "
            f"k, got {v.shape[3]}"
        )
    sizes = mesh_sizes(mesh)
    ring = _ring(method, sizes, rule, s, layout)
    function, typed, split = blockwise_attention, True, method != "none"
    if ring is None:
        alone = split or _alone(mesh, sizes, b, h, hk)
        devices = 1 if alone else math.prod(sizes)
        function, typed, kernel = find_core(core, _platform(mesh), devices, q, rule, segment_ids)
        split = split or (kernel and alone and math.prod(sizes) > 1)
    exchange, schedule = Exchange(None, 1), None
    if method in BY_HEADS and sizes.context > 1:
        exchange = Exchange("context", replication(hk // sizes.tensor, sizes.context))
    if method in STAGED:
        heads = h // sizes.tensor, hk // sizes.tensor, sizes.context
        schedule = head_schedule(*heads, heads_per_stage or legal_heads_per_stage(*heads)[0])
    return Plan(
        mesh=mesh if split else None,
        sizes=sizes,
        rule=rule,
        core=function,
        typed=typed,
        seq_len=s,
        exchange=exchange,
        ring=ring,
        gathered=method == "allgather",
        schedule=schedule,
        policy=policy,
        rope_factor=rope_factor,
        norm_eps=norm_eps,
    )


def _ring(method: str, sizes: Sizes, rule: Rule, seq_len: int, layout: str) -> Ring | None:
    """That of the methods that have one, if of more than one device."""
    axis = ring_axis(method)
    if axis is None or getattr(sizes, axis) == 1:
        return None
    return Ring(axis, getattr(sizes, axis), rule, seq_len, layout == "zigzag")


def _alone(mesh, sizes: Sizes, batch: int, num_heads: int, num_kv_heads: int) -> bool:
    """Whether every device can have rows and heads of its own, with all tokens of them."""
    rows = batch % (sizes.data * sizes.fsdp)
    heads = num_heads % sizes.tensor or num_kv_heads % sizes.tensor
    auto = mesh is None or set(mesh.axis_types) == {AxisType.Auto}
    return auto and sizes.ring == sizes.context == 1 and not rows and not heads


def _platform(mesh) -> str:
    """Of the mesh's devices, which need not be the default ones; without a mesh of those."""
    if mesh is None:
        return jax.default_backend()
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return getattr(mesh.abstract_device, "platform", None) or jax.default_backend()
    return mesh.devices.flat[0].platform
