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
every_dtype = pytest.mark.parametrize(
    "dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
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


@every
@every_dtype
def test_jit_is_no_jit_and_the_dtype_is_kept(case, dtype):
    args = case.args(jax.random.key(0), dtype)
    plain = case.call(*args)
    close(jax.jit(case.call)(*args), plain, dtype)
    expected = jnp.float32 if case.out == "wide" else dtype
    for x in floating(plain):
        assert x.dtype == expected
        assert bool(jnp.all(jnp.isfinite(x)))


@every
def test_vmap_is_a_loop_and_one_trace_serves_every_value(case):
    args = [case.args(jax.random.key(i), "float32") for i in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *args)
    one = jax.jit(chex.assert_max_traces(case.call, n=1))
    loop = jax.tree.map(lambda *x: jnp.stack(x), *(one(*a) for a in args))
    chex.clear_trace_counter()
    close(jax.jit(jax.vmap(case.call))(*stacked), loop, "float32")


@every
@every_dtype
def test_gradients_are_finite_and_of_the_argument_s_type(case, dtype):
    if not case.grad:
        pytest.skip("not differentiable by nature")
    args = case.args(jax.random.key(0), dtype)
    which = [i for i, x in enumerate(args) if floating(x)]

    def total(*args):
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in floating(case.call(*args)))

    grads = jax.jit(jax.grad(total, argnums=which))(*args)
    for i, grad in zip(which, grads, strict=True):
        chex.assert_trees_all_equal_shapes_and_dtypes(grad, args[i])
        assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grad))
    assert any(bool(jnp.any(g != 0)) for g in jax.tree.leaves(grads))
