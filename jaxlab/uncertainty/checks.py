"""What is checked of arguments: shapes and static values always, numbers where they are known.

Numbers of a concrete array are checked at once, those of a traced one by `checkify.debug_check`: nothing
in a plain jit, an error under `checkify.checkify`.
"""

import functools
import math
import numbers
import operator
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import checkify

from jaxlab import arguments

Classes = tuple[int, ...]

check_count = functools.partial(arguments.check_count, wrong_type=TypeError)


def check_values(good, message: str, values=None) -> None:
    """ValueError(message) unless every entry of `good` is true, with the first bad one of `values`."""
    if isinstance(good, Tracer):
        checkify.debug_check(jnp.all(good), message)
    # The values of an array that is spread over other hosts are not known here.
    elif getattr(good, "is_fully_addressable", True) and not np.all(good):
        found = "" if values is None else f"; it holds {np.asarray(values)[~np.asarray(good)][0]}"
        raise ValueError(message + found)


def as_array(name: str, x) -> jax.Array:
    """`x` as an array; TypeError for what is none."""
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError):
        raise TypeError(f"{name}={str(x)[:60]!r} must be an array of numbers") from None


def check_type(name: str, x, kind: type) -> None:
    """TypeError unless `x` is a `kind`."""
    if not isinstance(x, kind):
        raise TypeError(f"{name}={str(x)[:60]!r} must be a {kind.__name__}")


def real(name: str, x) -> jax.Array:
    """`x`, which must be real, in the type of all that is computed: float64 if it is, else float32."""
    x = as_array(name, x)
    if not any(jnp.issubdtype(x.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"{name} has dtype {x.dtype}; it must be real")
    return arguments.wide(x)


def as_probabilities(p, from_logits: bool, *, samples: bool = True, name: str = "p") -> jax.Array:
    """Checked probabilities [samples, ..., classes] in the wide type; without samples [..., classes]."""
    given = as_array(name, p)
    p = real(name, given)
    least, letters = (2, "samples, ..., classes") if samples else (1, "..., classes")
    if p.ndim < least:
        raise ValueError(f"{name}={p.shape} must have at least {least} axes: [{letters}]")
    if p.shape[-1] < 2:
        raise ValueError(f"{name}={p.shape} must have at least 2 classes in its last axis")
    if samples and p.shape[0] < 2:
        raise ValueError(
            f"{name}={p.shape} must have at least 2 samples in its first axis: "
            "the variance of one is undefined"
        )
    if from_logits:
        check_values(jnp.isfinite(jnp.max(p, -1)), f"logits {name} hold NaN, inf or a row of -inf")
        return jax.nn.softmax(p, -1)
    # Probabilities rounded to 16 bits do not sum to 1 within 1e-4.
    narrow = jnp.issubdtype(given.dtype, jnp.floating) and given.dtype.itemsize < 4
    tolerance = max(1e-4, float(jnp.finfo(given.dtype).eps)) if narrow else 1e-4
    check_values(~jnp.isnan(p), f"{name} holds NaN")
    hint = "(from_logits=True takes logits)"
    check_values(p >= 0, f"{name} must hold no negative probability {hint}", p)
    total = jnp.sum(p, -1)
    message = f"{name} must have rows that sum to 1 within {tolerance:.0e} {hint}"
    check_values(jnp.abs(total - 1) <= tolerance, message, total)
    return p


def class_indices(name: str, value, num_classes: int | None = None) -> Classes:
    """`value` as a tuple of different class indices, at least one."""
    try:
        if not isinstance(value, Iterable) or any(isinstance(k, bool) for k in value):
            raise TypeError
        classes = tuple(operator.index(k) for k in value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be a static tuple of class indices") from None
    if not classes or len(set(classes)) < len(classes):
        raise ValueError(f"{name}={classes} must hold different class indices, at least one")
    if min(classes) < 0 or (num_classes is not None and max(classes) >= num_classes):
        below = "" if num_classes is None else f" and below {num_classes}"
        raise ValueError(f"{name}={classes} must be class indices of at least 0{below}")
    return classes


def class_groups(safe, critical, num_classes: int) -> tuple[Classes, Classes]:
    """Both groups as tuples; ValueError where they overlap."""
    safe = class_indices("safe", safe, num_classes)
    critical = class_indices("critical", critical, num_classes)
    if set(safe) & set(critical):
        raise ValueError(f"safe={safe} and critical={critical} must not share a class")
    return safe, critical


def among(classes: Classes, y: jax.Array) -> jax.Array:
    """Whether each label is one of `classes`."""
    return jnp.any(y[..., None] == jnp.asarray(classes), -1)


def check_number(name: str, value, legal: str, test) -> None:
    """ValueError where a number, or a concrete scalar array, fails `test`; a tracer passes."""
    if isinstance(value, Tracer):
        return
    if not isinstance(value, numbers.Real) and np.ndim(value):
        raise ValueError(f"{name}={np.shape(value)} must be a scalar")
    if value is None or isinstance(value, str) or not test(float(value)):
        raise ValueError(f"{name}={value!r} must be {legal}")


def check_eps(eps, dtype) -> jax.Array:
    """`eps` in `dtype`: a float64 would widen all results. ValueError for a negative or infinite one."""
    check_number("eps", eps, "finite and at least 0", lambda x: 0 <= x < math.inf)
    return jnp.asarray(eps, dtype)


def check_labels(name: str, y, num_classes: int | None, size: int | None = None) -> jax.Array:
    """Labels [n] as int32, from 0 to num_classes - 1."""
    y = as_array(name, y)
    if not (jnp.issubdtype(y.dtype, jnp.integer) or y.dtype == bool):
        raise TypeError(f"{name} has dtype {y.dtype}; it must be integer class labels")
    if y.ndim != 1 or not y.size or (size is not None and y.shape[0] != size):
        want = "[n], n at least 1" if size is None else f"({size},)"
        raise ValueError(f"{name}={y.shape} must have the shape {want}")
    good, upper = y >= 0, ""
    if num_classes is not None:
        good, upper = good & (y < num_classes), f" and below {num_classes}"
    check_values(good, f"{name} must be labels of at least 0{upper}", y)
    return y.astype(jnp.int32)


def check_scores(score, size: int | None = None, name: str = "score") -> jax.Array:
    """Scores [n] in the wide type, without NaN."""
    score = real(name, score)
    if score.ndim != 1 or not score.size or (size is not None and score.shape[0] != size):
        want = "[n], n at least 1" if size is None else f"({size},)"
        raise ValueError(f"{name}={score.shape} must have the shape {want}")
    check_values(~jnp.isnan(score), f"{name} holds NaN")
    return score


def check_binary(name: str, x, size: int) -> jax.Array:
    """0 or 1 for each of `size` samples, as int32."""
    x = as_array(name, x)
    if x.shape != (size,):
        raise ValueError(f"{name}={x.shape} must have the shape ({size},) of score")
    check_values((x == 0) | (x == 1), f"{name} must hold 0 and 1 only", x)
    return x.astype(jnp.int32)


def check_coverages(name: str, coverages) -> np.ndarray:
    """Static coverages in (0, 1], float64 [n]."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(coverages)):
        raise TypeError(f"{name} must be static numbers, not traced ones")
    try:
        values = np.asarray(coverages, np.float64)
    except (TypeError, ValueError):
        values = np.zeros(0)
    if values.ndim != 1 or not values.size or not np.all((values > 0) & (values <= 1)):
        raise ValueError(
            f"{name}={coverages!r} must be numbers above 0 and at most 1, at least one"
        )
    return values
