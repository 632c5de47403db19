"""Types of arrays inside a manual region (shard_map with check_vma): over which axes they vary."""

import jax


def varying_axes(*refs) -> set[str]:
    """Manual mesh axes over which any array of the pytrees `refs` varies; empty elsewhere."""
    axes: set[str] = set()
    for x in jax.tree.leaves(refs):
        kind = getattr(jax.typeof(x), "manual_axis_type", None)
        axes |= set(kind.varying if kind is not None else getattr(jax.typeof(x), "vma", ()))
    return axes


def vary_like(x: jax.Array, *refs) -> jax.Array:
    """`x` typed as device-varying over the manual mesh axes of `refs`; identity outside shard_map.

    Scan carries must have the type that the body returns, and a custom gradient the type of its
    input; the transpose of this cast is the sum over the axes that it added.
    """
    missing = tuple(sorted(varying_axes(*refs) - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
