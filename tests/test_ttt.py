"""TTT over sequences: every implementation against NumPy loops, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ttt_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from ttt_cases import (
    CASES,
    as_numpy,
    assert_close,
    assert_trees_close,
    config,
    inputs,
    legal,
    quick_jit,
)

from jaxlab.ttt import FastWeights, ttt


def measured(cfg, impl):
    """Outputs, state and gradients of all inputs, in one jitted program."""

    @quick_jit
    def run(args, cotangents):
        (out, state), vjp = jax.vjp(lambda *args: ttt(*args, cfg, impl=impl), *args)
        zeros = jax.tree.map(jnp.zeros_like, state._replace(count=None))
        fw = jax.tree.map(lambda x, y: x.astype(y.dtype), cotangents[1], zeros.fw)
        count = np.zeros((), jax.dtypes.float0)
        grads = vjp((cotangents[0].astype(out.dtype), zeros._replace(fw=fw, count=count)))
        return out, state, grads

    return run


# One of each kind by default.
QUICK = ("base", "base inclusive", "base squared", "kernel only", "V1p", "V1p steps", "V2", "V2 token",
         "V6", "affine", "one token", "chunks of one")  # fmt: skip


def some_slow(names, quick):
    return [pytest.param(x, marks=() if x in quick else pytest.mark.slow) for x in names]


@pytest.mark.parametrize("case", some_slow(CASES, QUICK))
def test_every_form_matches_numpy_loops_and_finite_differences_in_float64(case):
    cfg, sizes = CASES[case]
    forms = {impl: measured(cfg, impl) for impl in legal(cfg) if impl != "auto"}

    @settings(max_examples=2, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1))
    def check(seed):
        args = inputs(seed, cfg, **sizes)
        base, random = as_numpy(args), np.random.default_rng(seed)
        shift = jax.tree.map(lambda x: 1e-6 * random.standard_normal(x.shape), base)
        expected, after = ttt_oracle.layer(*base, cfg)
        moved = []
        for sign in (1, -1):
            nearby = jax.tree.map(lambda x, d, sign=sign: x + sign * d, base, shift)
            norm_of = base[3] if cfg.detach_norm else None
            moved.append(ttt_oracle.layer(*nearby, cfg, norm_of=norm_of))
        dout = random.standard_normal(expected.shape)
        dfw = {n: random.standard_normal(x.shape) for n, x in after.items()}
        (up, up_fw), (down, down_fw) = moved
        slope = np.sum(dout * (up - down)) + sum(
            np.sum(dfw[n] * (up_fw[n] - down_fw[n])) for n in dfw
        )
        cotangents = dout, FastWeights(*(dfw.get(n) for n in FastWeights._fields))
        results = {impl: run(args, cotangents) for impl, run in forms.items()}
        for impl, (out, state, grads) in results.items():
            assert out.dtype == jnp.float64
            assert_close(out, expected, 1e-11, impl)
            for name, x in after.items():
                assert_close(getattr(state.fw, name), x, 1e-11, (impl, name))
            pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(shift), strict=True)
            got = 2 * sum(np.sum(np.asarray(g) * d) for g, d in pairs)
            size = 2e-6 * max(np.linalg.norm(np.ravel(g)) for g in jax.tree.leaves(grads))
            assert abs(got - slope) <= 1e-6 * size, (impl, got, slope)
            # Not only along one direction: every form has the gradients of the recurrent one.
            for x, y in ((state, results["recurrent"][1]), (grads, results["recurrent"][2])):
                assert_trees_close(x, y, 1e-10)

    with jax.enable_x64(True):
        check()


def test_auto_is_parallel_where_that_is_legal():
    for cfg, sizes in CASES.values():
        shapes = jax.eval_shape(
            lambda cfg=cfg, sizes=sizes: inputs(0, cfg, dtype="float32", **sizes)
        )
        trace = lambda impl, cfg=cfg, shapes=shapes: str(  # noqa: E731
            jax.make_jaxpr(lambda *args: ttt(*args, cfg, impl=impl))(*shapes)
        )
        same = "parallel" if "parallel" in legal(cfg) else "recurrent"
        if cfg.visibility != "token":
            assert trace("auto") == trace(same)


@pytest.mark.parametrize(
    "case",
    some_slow(["base", "V1p", "V1p inclusive", "V2", "affine", "V2 token"], ["base", "V2 token"]),
)
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_narrow_types_are_carried_in_float32(case, dtype, tolerance):
    cfg, sizes = CASES[case]
    q, k, v, fw, rates, mu = inputs(1, cfg, dtype="float32", **sizes)
    args = (*(x.astype(dtype) for x in (q, k, v)), fw, rates, mu)
    expected, after = ttt_oracle.layer(*as_numpy(args), cfg)
    for impl in legal(cfg):
        out, state = quick_jit(functools.partial(ttt, cfg=cfg, impl=impl))(*args)
        assert str(out.dtype) == dtype
        assert_close(out, expected, tolerance, impl)
        assert {str(x.dtype) for x in jax.tree.leaves(state._replace(count=None))} == {"float32"}
        assert_close(state.fw.w1, after["w1"], 2e-5, impl)


@pytest.mark.parametrize("t", [3 * 130 + 1])
@pytest.mark.parametrize("name", some_slow(["V2", "V1p"], ["V2"]))
@pytest.mark.parametrize("orthogonalize", ["lact", None])
def test_many_chunks_with_gates_near_a_half_stay_exact_in_float32(name, orthogonalize, t):
    """A momentum scan that divides by products of gates fails from about 20 chunks."""
    cfg = config(name, chunk_size=3, orthogonalize=orthogonalize)
    q, k, v, fw, rates, mu = inputs(2, cfg, b=1, t=t, h=1, dtype="float32")
    mu = 0.45 + 0.1 * mu
    expected, after = ttt_oracle.layer(*as_numpy((q, k, v, fw, rates, mu)), cfg)
    for impl in ("recurrent", "parallel"):
        run = quick_jit(lambda *args, impl=impl: ttt(*args, cfg, impl=impl))
        out, state = run(q, k, v, fw, rates, mu)
        assert_close(out, expected, 2e-5, impl)
        assert_close(state.fw.w1, after["w1"], 2e-5, impl)


def test_gates_of_zero_and_keys_of_zero_have_finite_gradients():
    for name in ("base", "V1p", "V2"):
        cfg = config(name)
        q, k, v, fw, rates, mu = inputs(3, cfg, dtype="float32")
        args = q, k.at[:, :4].set(0), v.at[:, 8:].set(0), fw, rates, mu.at[:, :8].set(0)
        for impl in set(legal(cfg)) - {"auto"}:
            loss = lambda *args, cfg=cfg, impl=impl: jnp.sum(jnp.sin(ttt(*args, cfg, impl=impl)[0]))  # noqa: E731
            grads = quick_jit(jax.grad(loss, range(6)))(*args)
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grads)), (name, impl)
