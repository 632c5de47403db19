"""What treats tokens alone, done by each device on its own ones."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlab.varying import vary_like
from sharding.rules import spec_of


def over_tokens(
    fn: Callable[[Any, Any], Any],
    tokens: Any,
    weights: Any,
    *,
    pieces: int = 1,
    total: bool = False,
) -> Any:
    """`fn(tokens, weights)`, on each device with its own tokens and whole weights.

    `tokens` is a pytree of arrays [b, t, ...], and so is the result; with `total` it is one of scalars,
    summed over devices. The compiler by itself gathers weights, and sums their gradients, at every turn
    of a loop over pieces of the sequence: here that is done once, before and after `fn`. Mesh axis
    'tensor' is left to the compiler. Without a mesh, inside shard_map, or where the mesh and the
    `pieces` into which `fn` cuts what it gets do not divide b and t, it is the plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Manual in mesh.axis_types:
        return fn(tokens, weights)
    spec = spec_of(("batch", "length"), mesh=mesh)
    groups = [(part,) if isinstance(part, str) else (part or ()) for part in spec]
    rows, length = (math.prod(mesh.shape[axis] for axis in group) for group in groups)
    shapes = [x.shape for x in jax.tree.leaves(tokens)]
    if any(shape[0] % rows or shape[1] % (length * pieces) for shape in shapes):
        return fn(tokens, weights)
    axes = (*groups[0], *groups[1])

    def local(tokens, weights):
        # Typed as varying before `fn`, so that its gradients are summed over devices after it.
        out = fn(tokens, jax.tree.map(lambda w: vary_like(w, tokens), weights))
        return jax.tree.map(functools.partial(jax.lax.psum, axis_name=axes), out) if total else out

    # An axis of size 1 is nobody's: with it, all of them are manual on most meshes.
    manual = {axis for axis in mesh.axis_names if axis in axes or mesh.shape[axis] == 1}
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, P()), out_specs=P() if total else spec, axis_names=manual
    )
    return run(tokens, weights)
