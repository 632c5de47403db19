"""Logical axis names of parameters and activations, and their mapping to mesh axes."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Rules = Mapping[str, str | tuple[str, ...] | None]

# One value a name. Activations: batch, length, cache, act_*; the others belong to parameters.
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": ("ring", "context"),
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
    "cache": None,
    "layers": None,
    "members": None,
    # Shards of the sequence share one copy of the parameters too, gathered a layer at a time.
    "embed": ("fsdp", "ring", "context"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    # The look-up table is split by rows only: any other layout makes XLA gather it whole.
    "vocab_in": ("tensor", "fsdp", "ring", "context"),
    "norm": None,
}

_current: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=RULES)


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[None]:
    """Uses `rules` for every `constrain` and `spec_of` traced inside the block."""
    token = _current.set(rules)
    try:
        yield
    finally:
        _current.reset(token)


def current_rules() -> Rules:
    """The rules in force."""
    return _current.get()


def spec_of(axes: tuple[Any, ...], rules: Rules | None = None, mesh=None) -> P:
    """PartitionSpec of logical `axes`; a mesh axis used twice or an unknown name is a ValueError.

    None is not split, P.UNCONSTRAINED left to the compiler.
    """
    rules = _current.get() if rules is None else rules
    parts, used = [], {}
    for name in axes:
        if name is P.UNCONSTRAINED:
            parts.append(name)
            continue
        if name is not None and name not in rules:
            raise ValueError(f"unknown logical axis {name!r}; the rules know {sorted(rules)}")
        value = None if name is None else rules[name]
        group = (value,) if isinstance(value, str) else tuple(value or ())
        if mesh is not None:
            group = tuple(axis for axis in group if axis in mesh.axis_names)
        for axis in group:
            if axis in used:
                raise ValueError(f"logical axes {used[axis]!r} and {name!r} both map to {axis!r}")
            used[axis] = name
        parts.append(group if len(group) > 1 else (group[0] if group else None))
    return P(*parts)


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """Asks the compiler for the sharding of logical `axes`; identity without a mesh or inside shard_map."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(axes, mesh=mesh))


def shardings(axes_tree, mesh: Mesh, rules: Rules | None = None):
    """NamedShardings for a tree whose leaves are tuples of logical axis names."""
    return jax.tree.map(
        lambda axes: NamedSharding(mesh, spec_of(axes, rules, mesh)), axes_tree, is_leaf=_is_axes
    )


def _is_axes(x) -> bool:
    return isinstance(x, tuple) and all(a is None or isinstance(a, str) for a in x)


def check_divisible(shapes, axes_tree, mesh_sizes: Mapping[str, int], rules=None) -> None:
    """ValueError listing every array dimension that its mesh axes do not divide.

    `shapes`: tree of objects with `.shape`; `axes_tree`: tree of logical-name tuples alongside it.
    """
    problems: list[str] = []

    def visit(path, leaf, axes):
        spec = spec_of(axes, rules)
        for name, size, part in zip(axes, leaf.shape, spec, strict=True):
            group = (part,) if isinstance(part, str) else (part or ())
            ways = math.prod(mesh_sizes.get(axis, 1) for axis in group)
            if size % ways:
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                mesh = "*".join(f"{a}={mesh_sizes[a]}" for a in group if mesh_sizes.get(a, 1) > 1)
                problems.append(
                    f"{where}: {name}={size} is not divisible by {mesh}; "
                    f"nearest sizes that are: {max(size // ways, 1) * ways}, "
                    f"{(size // ways + 1) * ways}"
                )

    jax.tree_util.tree_map_with_path(visit, shapes, axes_tree)
    if problems:
        raise ValueError("the mesh does not divide the arrays:\n  " + "\n  ".join(problems[:12]))
