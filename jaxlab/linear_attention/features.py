"""Feature maps of linear attention, by name."""

from collections.abc import Callable

import jax

MAPS: dict[str, Callable] = {
    "identity": lambda x: x,
    "elu1": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
}
SIGNED = ("identity", "silu")


def feature_map(name: str | Callable) -> Callable:
    """The map called `name`: identity, elu1 (elu + 1), relu, silu or softplus; a callable is itself.

    ValueError for any other name. Source: Katharopoulos et al., 2020, equation 7 (elu1).
    """
    if callable(name):
        return name
    if not isinstance(name, str) or name not in MAPS:
        raise ValueError(f"feature_map={name!r} must be one of {sorted(MAPS)} or a callable")
    return MAPS[name]
