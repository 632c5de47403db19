"""Where functions of [b, t, h, ...] run on a mesh: rows, tokens and heads split, one `shard_map`."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from jaxlab.linear_attention import LinAttnState
from jaxlab.ttt import FastWeights
from sharding.context.checks import current_mesh
from sharding.context.zigzag import nearest_multiples


class Place(NamedTuple):
    """A mesh as these functions see it: axes that split rows, tokens and heads."""

    mesh: Any
    rows: tuple[str, ...]
    tokens: tuple[str, ...]
    heads: tuple[str, ...]

    def size(self, axes: tuple[str, ...]) -> int:
        """Devices along `axes`."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def shard(self, body: Callable, *args: Any, state: bool = False) -> Any:
        """`body` on every device, of trees of arrays [b, t, h, ...] or [b, t], and of states.

        FastWeights and LinAttnState are whole on every shard of the tokens. The result is an array
        [b, t, h, ...] or, with `state`, a pair of it and a LinAttnState or None.
        """
        tokens, whole = P(self.rows, self.tokens, self.heads), (self.rows, self.heads)

        def spec(x):
            if isinstance(x, FastWeights):
                return jax.tree.map(lambda w: P(*whole[4 - w.ndim :]), x)
            if isinstance(x, LinAttnState):
                return P(*whole)
            return jax.tree.map(lambda a: P(*tokens[: min(a.ndim, 3)]), x)

        run = jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=tuple(map(spec, args)),
            out_specs=(tokens, P(*whole)) if state else tokens,
        )
        return run(*args)


def find_place(mesh: Any) -> Place | None:
    """The place of `mesh` or, if None, of `jax.set_mesh`'s; None where no sequence is split."""
    mesh = current_mesh() if mesh is None else mesh
    if mesh is None:
        return None
    group = lambda *axes: tuple(axis for axis in axes if axis in mesh.axis_names)  # noqa: E731
    split = tuple(axis for axis in group("ring", "context") if mesh.shape[axis] > 1)
    return Place(mesh, group("data", "fsdp"), split, group("tensor")) if split else None


def check_divides(place: Place, b: int, t: int, h: int) -> None:
    """ValueError, naming the nearest sizes that would do, unless the mesh divides [b, t, h]."""
    for name, size, axes in (
        ("batch", b, place.rows),
        ("length", t, place.tokens),
        ("heads", h, place.heads),
    ):
        ways = place.size(axes)
        if size % ways:
            raise ValueError(
                f"{name} {size} is not divisible by {' * '.join(axes)} = {ways}; "
                f"nearest: {nearest_multiples(size, ways)}"
            )
