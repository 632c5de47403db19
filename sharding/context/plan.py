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
    check_names,
    current_mesh,
    mesh_sizes,
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
    method: str
    sizes: Sizes
    rule: Rule
    core: Callable
    typed: bool  # whether types inside shard_map can be checked
    seq_len: int
    zigzag: bool
    schedule: HeadSchedule | None  # of the staged methods
    policy: str
    copies: int
    rope_factor: float
    norm_eps: float

    @property
    def exchange(self) -> Exchange:
        """Between tokens and heads, for the methods that do so."""
        if self.method in BY_HEADS and self.sizes.context > 1:
            return Exchange("context", self.copies)
        return Exchange(None, 1)

    @property
    def ring(self) -> Ring | None:
        """The ring of the methods that have one of more than one device."""
        if self.method not in BALANCED:
            return None
        axis = "ring" if self.method in TWO_LEVEL else "context"
        size = getattr(self.sizes, axis)
        return Ring(axis, size, self.rule, self.seq_len, self.zigzag) if size > 1 else None

    def attend(self, segment_ids, q, k, v) -> Any:
        """Attention between the exchanges; `segment_ids` are those of the whole sequence."""
        if self.ring is None:
            arguments: dict[str, Any] = self.rule._asdict()
            return self.core(q, k, v, segment_ids=segment_ids, **arguments)
        attend = gathered_attention if self.method == "allgather" else ring_attention
        return attend(self.ring, q, k, v, segment_ids)

    def positions(self, length: int) -> Int[Array, "1 s"]:
        """Natural indices of this device's tokens."""
        names = () if self.mesh is None else self.mesh.axis_names
        shard = 0
        for axis in ("ring", "context"):
            if axis in names:
                shard = shard * getattr(self.sizes, axis) + jax.lax.axis_index(axis)
        places = shard * length + jnp.arange(length, dtype=jnp.int32)
        if self.zigzag and self.ring:
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
    q, k, v, mesh, method, layout, core, policy, heads_per_stage, segment_ids,
    rope_factor=1.0, norm_eps=1e-6, **mask,
) -> Plan:  # fmt: skip
    """The plan of a call on q, k, v of these shapes; ValueError, before anything runs, if there is none."""
    check_names(method, layout, core, policy)
    mesh = current_mesh() if mesh is None else mesh
    _check_mesh(mesh)
    if heads_per_stage is not None:
        heads_per_stage = check_count("heads_per_stage", heads_per_stage, 1)
    h, hk, s = q.shape[2], k.shape[2], q.shape[1]
    check_context(
        mesh, method=method, num_heads=h, num_kv_heads=hk, seq_len=s, batch=q.shape[0],
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
    sizes, platform = mesh_sizes(mesh), _platform(mesh)
    # Without shard_map, of method 'none', the compiler splits the work, which it cannot with kernels.
    whole_mesh = math.prod(sizes) if method == "none" else 1
    function, typed = find_core(core, platform, whole_mesh, q, rule, segment_ids)
    schedule = None
    if method in STAGED:
        heads = h // sizes.tensor, hk // sizes.tensor, sizes.context
        schedule = head_schedule(*heads, heads_per_stage or legal_heads_per_stage(*heads)[0])
    plan = Plan(
        mesh=None if method == "none" else mesh,
        method=method,
        sizes=sizes,
        rule=rule,
        core=function,
        typed=typed,
        seq_len=s,
        zigzag=layout == "zigzag",
        schedule=schedule,
        policy=policy,
        copies=replication(hk // sizes.tensor, sizes.context) if method in BY_HEADS else 1,
        rope_factor=rope_factor,
        norm_eps=norm_eps,
    )
    # What goes round a ring is computed here, not by a kernel.
    return plan if plan.ring is None else plan._replace(core=blockwise_attention, typed=True)


def _check_mesh(mesh) -> None:
    if mesh is None:
        return
    if not isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh or None, got {type(mesh).__name__}")
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"mesh has axis types {mesh.axis_types}; all must be AxisType.Auto, as those of "
            f"sharding.mesh.make_mesh"
        )


def _platform(mesh) -> str:
    """Of the mesh's devices, which need not be the default ones; without a mesh of those."""
    if mesh is None:
        return jax.default_backend()
    if isinstance(mesh, jax.sharding.AbstractMesh):
        return getattr(mesh.abstract_device, "platform", None) or jax.default_backend()
    return mesh.devices.flat[0].platform
