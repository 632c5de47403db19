"""Affine maps S -> a S + b, the summaries of linear recurrences, and their composition."""

from collections.abc import Callable
from typing import Any

import jax

Map = tuple[Any, Any]  # (a, b)


def compose(times: Callable[[Any, Any], jax.Array], first: Map, second: Map) -> Map:
    """The map `first`, then `second`; `times` multiplies an a with another a or with a state.

    Source: note on TTT as linear attention, section 5.2.
    """
    return times(second[0], first[0]), times(second[0], first[1]) + second[1]
