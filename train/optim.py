"""An optax wrapper that keeps a step from working against a second objective."""

from typing import Literal

import jax
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
