"""The methods of context parallelism, what each needs, and the errors when it does not have it.

Source: papers' note on UPipe, section 9.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
from jax.sharding import AxisType

from sharding.context.schedule import check_groups, check_heads, head_schedule, shareable
from sharding.context.zigzag import check_zigzag, nearest_multiples
from sharding.mesh import AXES

Method = Literal["none", "ulysses", "upipe", "ring", "allgather", "usp", "upipe_ring"]
Layout = Literal["contiguous", "zigzag"]
Core = Literal["auto", "dense", "blockwise", "splash", "cudnn"]
StagePolicy = Literal["nothing", "attn_out"]
METHODS, LAYOUTS, CORES, STAGE_POLICIES = map(get_args, (Method, Layout, Core, StagePolicy))

# Sequence shards become head shards over 'context'; those of them that do so in stages.
BY_HEADS = ("ulysses", "upipe", "usp", "upipe_ring")
STAGED = ("upipe", "upipe_ring")
# The sequence is sharded over 'ring' too, over which keys and values rotate.
TWO_LEVEL = ("usp", "upipe_ring")
# Each device computes some rows of the mask only, and zigzag order gives all the same work.
BALANCED = ("ring", "allgather", *TWO_LEVEL)


@dataclasses.dataclass(frozen=True)
class ContextConfig:
    """How attention works on a sharded sequence: keywords of `attention_layer`."""

    method: Annotated[Method, "how tokens of other shards are seen; none: left to the compiler"] = (
        "none"
    )
    heads_per_stage: Annotated[
        int | None, "query heads at a time, upipe methods only; none: as few as possible"
    ] = None
    layout: Annotated[Layout, "order of tokens over devices; zigzag balances causal work"] = (
        "contiguous"
    )
    core: Annotated[Core, "attention of one device; auto: by its platform"] = "auto"
    stage_policy: Annotated[
        StagePolicy, "what a stage of an upipe method keeps for the backward"
    ] = "nothing"


def ring_axis(method: str) -> str | None:
    """The mesh axis over which keys and values go, or are gathered; None: they stay."""
    if method not in BALANCED:
        return None
    return "ring" if method in TWO_LEVEL else "context"


class Sizes(NamedTuple):
    """Devices along each mesh axis."""

    data: int = 1
    fsdp: int = 1
    ring: int = 1
    context: int = 1
    tensor: int = 1


def current_mesh() -> Any:
    """That of `jax.set_mesh`; None without one, and inside shard_map, where shapes are one device's."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or AxisType.Manual in mesh.axis_types else mesh


def mesh_sizes(mesh: Any) -> Sizes:
    """Sizes of a mesh, of a mapping from axis names to sizes, or all 1 for None.

    ValueError for an axis that is not one of `sharding.mesh.AXES`.
    """
    if mesh is None:
        return Sizes()
    sizes = dict(mesh if isinstance(mesh, Mapping) else mesh.shape)
    if unknown := [name for name in sizes if name not in AXES]:
        raise ValueError(f"mesh axes {unknown} are unknown; the names are {list(AXES)}")
    return Sizes(**sizes)


def check_mesh(mesh: Any, method: str) -> None:
    """ValueError for a mesh on which `method` cannot call shard_map."""
    if not (mesh is None or isinstance(mesh, jax.sharding.Mesh | jax.sharding.AbstractMesh)):
        raise ValueError(f"mesh must be a jax.sharding.Mesh or None, got {type(mesh).__name__}")
    if method == "none":
        return
    around = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in around.axis_types:
        raise ValueError(
            f"method={method!r} is a shard_map over the whole mesh and cannot be used inside one: call "
            f"it outside, or use jaxlab.attention on what a device has"
        )
    if mesh is None:
        return
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"mesh has axis types {mesh.axis_types}; all must be AxisType.Auto, as those of "
            f"sharding.mesh.make_mesh"
        )
    if not around.empty and mesh.abstract_mesh != around:
        raise ValueError(
            f"mesh={dict(mesh.shape)} is not that of jax.set_mesh, {dict(around.shape)}: leave it None"
        )


def check_names(method: str, layout: str, core: Any, stage_policy: str) -> None:
    """ValueError for a name that there is not; `core` may be a function."""
    for name, value, legal in (
        ("method", method, METHODS),
        ("layout", layout, LAYOUTS),
        ("core", "auto" if callable(core) else core, CORES),
        ("stage_policy", stage_policy, STAGE_POLICIES),
    ):
        if value not in legal:
            more = " or a function" if name == "core" else ""
            raise ValueError(f"{name}={value!r} must be one of {list(legal)}{more}")


def _check_stage(method: str, heads_per_stage: int | None) -> None:
    if heads_per_stage is not None and method not in STAGED:
        raise ValueError(
            f"heads_per_stage={heads_per_stage} is for the methods {list(STAGED)}, "
            f"not {method!r}: leave it None"
        )


def check_context(
    mesh: Any,
    *,
    method: str,
    num_heads: int,
    num_kv_heads: int,
    seq_len: int,
    batch: int = 1,
    heads_per_stage: int | None = None,
    layout: str = "contiguous",
) -> None:
    """ValueError, naming the numbers and what would work, unless `method` can run on `mesh`.

    `mesh` is a Mesh, a mapping from axis names to sizes, or None: no mesh. Heads are counted whole,
    before tensor parallelism.
    """
    check_names(method, layout, "auto", "nothing")
    _check_stage(method, heads_per_stage)
    sizes = mesh_sizes(mesh)
    if mesh is None and method != "none":
        raise ValueError(f"method={method!r} needs a mesh: give one, or enter jax.set_mesh(mesh)")
    check_groups(num_heads, num_kv_heads)
    if method != "none":
        _check_heads(sizes, method, num_heads, num_kv_heads, heads_per_stage)
        if method not in TWO_LEVEL and sizes.ring > 1:
            raise ValueError(
                f"method={method!r} uses one mesh axis for the sequence, but ring={sizes.ring} "
                f"(context={sizes.context}): use ring=1 or a method of {list(TWO_LEVEL)}"
            )
    _check_lengths(sizes, method, seq_len, batch, layout)


def _check_heads(sizes: Sizes, method, num_heads, num_kv_heads, heads_per_stage) -> None:
    tensor, heads = sizes.tensor, (num_heads, num_kv_heads)
    for name, count in zip(("num_heads", "num_kv_heads"), heads, strict=True):
        if count % tensor:
            legal = [n for n in range(1, num_kv_heads + 1) if _shares(sizes, method, n, *heads)]
            raise ValueError(
                f"{name}={count} is not divisible by tensor={tensor}; use tensor in {legal}"
            )
    try:
        if method in BY_HEADS:
            check_heads(num_heads // tensor, num_kv_heads // tensor, sizes.context)
        if heads_per_stage is not None:
            head_schedule(
                num_heads // tensor, num_kv_heads // tensor, sizes.context, heads_per_stage
            )
    except ValueError as error:
        if tensor == 1:
            raise
        raise ValueError(f"{error} (heads of one of tensor={tensor} ranks)") from error


def _shares(sizes: Sizes, method, tensor, num_heads, num_kv_heads) -> bool:
    """Whether `tensor` ranks can have these heads, and the method those of one rank."""
    if num_heads % tensor or num_kv_heads % tensor:
        return False
    by_heads = method in BY_HEADS
    return not by_heads or shareable(num_heads // tensor, num_kv_heads // tensor, sizes.context)


def _check_lengths(sizes: Sizes, method, seq_len, batch, layout) -> None:
    shards = sizes.ring * sizes.context
    if layout == "zigzag":
        if method not in BALANCED:
            raise ValueError(
                f"layout='zigzag' is for the methods {list(BALANCED)}: with {method!r} there is "
                f"nothing to balance, use layout='contiguous'"
            )
        if method in TWO_LEVEL:
            check_zigzag(seq_len, sizes.ring, sizes.context)
        else:
            check_zigzag(seq_len, sizes.context)
    if seq_len < 1 or seq_len % shards:
        raise ValueError(
            f"seq_len={seq_len} is not divisible by ring={sizes.ring} * context={sizes.context} "
            f"= {shards}; nearest: {nearest_multiples(seq_len, shards)}"
        )
    rows = sizes.data * sizes.fsdp
    if batch < 1 or batch % rows:
        raise ValueError(
            f"batch={batch} is not divisible by data={sizes.data} * fsdp={sizes.fsdp} = {rows}; "
            f"nearest: {nearest_multiples(batch, rows)}"
        )
