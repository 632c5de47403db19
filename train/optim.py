"""Optax wrappers that keep a step from working against a second objective."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxlab.rl import gradient_surgery


def protect_reference(
    inner: optax.GradientTransformation,
    mode: Literal["update", "gradient"] = "update",
    *,
    eps: float = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    """`inner` whose steps do not, to first order, lower a reference objective.

    `update(grads, state, params, reference_grads=...)`: grads descend as usual, reference_grads is the
    *ascent* gradient of the reference, of the same form. "update" projects what `inner` returns,
    which is what is added to the parameters; "gradient" projects what it is given, which a
    preconditioner such as Adam undoes. ValueError for another mode. Source: note on pass@k
    interference, sections 3.4 and 6.3.
    """
    if mode not in ("update", "gradient"):
        raise ValueError(f"mode={mode!r} must be 'update' or 'gradient'")
    wrapped = optax.with_extra_args_support(inner)

    def update(grads, state, params=None, *, reference_grads, **extra):
        if mode == "gradient":
            ascent = gradient_surgery(jax.tree.map(lambda g: -g, grads), reference_grads, eps)
            grads = jax.tree.map(lambda g: -g, ascent)
        updates, state = wrapped.update(grads, state, params, **extra)
        if mode == "update":
            updates = gradient_surgery(updates, reference_grads, eps)
        return updates, state

    return optax.GradientTransformationExtraArgs(wrapped.init, update)  # type: ignore[arg-type]


class Protected(NamedTuple):
    """State of `protect_average`."""

    average: Any  # of past reference gradients, like the parameters, float32
    inner: Any


def protect_average(
    inner: optax.GradientTransformation, decay: float
) -> optax.GradientTransformationExtraArgs:
    """`protect_reference` against an exponential average of the reference gradients of *earlier* steps.

    The samples that make a step also make its reference gradient, so that the two agree by chance and a
    conflict goes unseen (note on pass@k interference, section 3.4); earlier ones are drawn
    independently. The first step is not protected. ValueError unless 0 < decay < 1.
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay={decay} must be between 0 and 1")
    guarded = protect_reference(inner)

    def init(params):
        average = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return Protected(average, guarded.init(params))

    def update(grads, state, params=None, *, reference_grads, **extra):
        updates, after = guarded.update(
            grads, state.inner, params, reference_grads=state.average, **extra
        )
        mix = lambda old, new: decay * old + (1 - decay) * new  # noqa: E731
        return updates, Protected(jax.tree.map(mix, state.average, reference_grads), after)

    return optax.GradientTransformationExtraArgs(init, update)  # type: ignore[arg-type]
