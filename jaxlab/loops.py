"""Loops that may end early and yet tell how often they run at most."""

import re
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Int

# The last scope of a loop's name, transformations closed; compiled programs add the loop itself.
_NAME = re.compile(r"at_most_(\d+)\)*(?:/while)?$")


def loop_at_most(
    most: int,
    low: int | Int[Array, ""],
    high: int | Int[Array, ""],
    body: Callable[[Any, Any], Any],
    start: Any,
) -> Any:
    """`jax.lax.fori_loop(low, high, body, start)` where high - low <= `most`, which is static.

    The bound stands in the loop's name, `at_most_N`: jaxprs, compiled programs and profiles carry it,
    so that the work of a loop can be counted in full (`sharding.flops`) though its length is data.
    """
    with jax.named_scope(f"at_most_{most}"):
        return jax.lax.fori_loop(low, high, body, start)


def most_of(name: str) -> int | None:
    """The bound in the name of a loop that `loop_at_most` made, as programs spell it; else None."""
    match = _NAME.search(name)
    return int(match[1]) if match else None
