"""What every public method of `jaxlab` promises: jit, vmap, dtype, gradient, one trace."""

import importlib
import inspect
import pkgutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract_cases import CASES, EXEMPT, INTERNAL

import jaxlab

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def public_functions() -> set[str]:
    """Functions of public modules; of a package those that its `__all__` names."""
    found = set()
    for info in pkgutil.iter_modules(jaxlab.__path__, "jaxlab."):
        module = importlib.import_module(info.name)
        names = module.__all__ if info.ispkg else vars(module)
        for name in names if info.name not in INTERNAL else ():
            value = getattr(module, name)
            home = getattr(value, "__module__", "") or ""
            own = home.startswith(info.name) if info.ispkg else home == info.name
            if inspect.isfunction(value) and own and not name.startswith("_"):
                found.add(f"{info.name}.{name}")
    return found


def test_every_public_function_has_a_row():
    assert public_functions() - set(EXEMPT) == set(CASES)


def floating(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def close(a, b, dtype):
    tolerance = TOLERANCE[dtype]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(
            np.asarray(x, np.float64), np.asarray(y, np.float64), rtol=tolerance, atol=tolerance
        ),
        a,
        b,
    )


def check_plain(case, plain, jitted, dtype):
    """The plain call is the jitted one, finite, and of the type it promises."""
    close(jitted, plain, dtype)
    expected = jnp.float32 if case.out == "wide" else dtype
    for x in floating(plain):
        assert x.dtype == expected
        assert bool(jnp.all(jnp.isfinite(x)))


def differentiated(case, which):
    """(gradients by the arguments `which`, result) of a call."""

    def total(*args):
        out = case.call(*args)
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in floating(out)), out

    return jax.grad(total, argnums=which, has_aux=True)


def check_gradients(grads, args, which):
    """Gradients are finite, of their arguments' types, and not all zero."""
    for i, grad in zip(which, grads, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(grad, args[i])
        assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grad))
    assert any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))


def differentiable(case, args) -> list[int]:
    return [i for i, x in enumerate(args) if case.grad and floating(x)]


@every
def test_jit_vmap_and_grad_are_the_plain_call_and_one_trace_serves_every_value(case):
    args = [case.args(jax.random.key(i), "float32") for i in range(3)]
    one = jax.jit(chex.assert_max_traces(case.call, n=1))
    results = [one(*a) for a in args]
    chex.clear_trace_counter()
    check_plain(case, case.call(*args[0]), results[0], "float32")
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    stacked, which = stack(args), differentiable(case, args[0])
    if which:  # one compilation for both transformations
        grads, mapped = jax.jit(jax.vmap(differentiated(case, which)))(*stacked)
        check_gradients(grads, stacked, which)
    else:
        mapped = jax.jit(jax.vmap(case.call))(*stacked)
    close(mapped, stack(results), "float32")


@pytest.mark.slow
@every
def test_bfloat16_is_kept(case):
    args = case.args(jax.random.key(0), "bfloat16")
    check_plain(case, case.call(*args), jax.jit(case.call)(*args), "bfloat16")
    if which := differentiable(case, args):
        check_gradients(jax.jit(differentiated(case, which))(*args)[0], args, which)
