"""Samples of predictive probabilities from a network: MC dropout and ensembles, one vmapped program."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from jaxlab.uncertainty.checks import check_count, real


def mc_predict(
    apply: Callable, params, x, keys: Key[Array, "s"], *, chunk: int | None = None
) -> Float[Array, "s n k"]:
    """Probabilities [S, N, K] of apply(params, x, key) -> logits [N, K], for each of `keys` [S].

    With dropout left on inside `apply`, MC dropout: the keys draw the masks. `chunk` passes are made at
    once (None: all), which on a CPU is faster where all do not fit the caches. At least float32.
    ValueError for a single key and for none, and for a chunk below 1. Source: Gal and Ghahramani, 1506.02142.
    """
    typed = jnp.issubdtype(getattr(keys, "dtype", np.uint32), jax.dtypes.prng_key)
    shape: tuple[int, ...] = getattr(keys, "shape", ())  # () of a list, too
    if len(shape) != (1 if typed else 2) or 0 in shape[:1]:
        raise ValueError(f"keys={shape} must be an array of keys: jax.random.split(key, S)")
    return _each(lambda key: _probabilities(apply(params, x, key)), keys, chunk)


def ensemble_predict(
    apply: Callable, stacked_params, x, *, chunk: int | None = None
) -> Float[Array, "s n k"]:
    """Probabilities [S, N, K] of apply(params, x) -> logits [N, K] of S members.

    Every leaf of `stacked_params` has the members on its first axis, as `jax.vmap` of the initialiser
    makes them; ValueError unless all have as many. `chunk` as in `mc_predict`. At least float32.
    Source: Lakshminarayanan et al., 1612.01474.
    """
    members = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(stacked_params)}
    if len(members) != 1 or () in members:
        raise ValueError(f"stacked_params must have one number of members, not {sorted(members)}")
    return _each(lambda params: _probabilities(apply(params, x)), stacked_params, chunk)


def _each(fn: Callable, stacked, chunk: int | None):
    if chunk is None:
        return jax.vmap(fn)(stacked)
    return jax.lax.map(fn, stacked, batch_size=check_count("chunk", chunk, 1))


def _probabilities(logits) -> jax.Array:
    return jax.nn.softmax(real("logits", logits), -1)
