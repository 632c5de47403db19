"""Recurrences and TTT at shapes, chunk sizes and types that hypothesis draws, against token loops."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_linear_attention as recurrences
import ttt_cases
import ttt_oracle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxlab import linear_attention as la
from jaxlab.ttt import ttt

# A shape is a compilation.
pytestmark = pytest.mark.slow
EXAMPLES = 12
TOLERANCE = {"float64": 1e-11, "float32": 3e-5}
small = st.integers(1, 4)
lengths = st.one_of(st.just(1), st.integers(2, 40))
# As section 10.4 names them: single tokens, small, a power of two, all tokens, more than all.
chunks = st.sampled_from([1, 3, 16, "all", "more"])


def drawn(**strategies):
    """The body run on drawn examples, the same ones every time."""
    rules = settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    return lambda body: rules(given(**strategies)(body))


def chunk_of(chunk, length: int) -> int:
    return {"all": length, "more": length + 5}.get(chunk, chunk)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("method", recurrences.GATES)
def test_recurrences(method, dtype, monkeypatch):
    extras = "S segment_ids"
    if method == "linear_attention":
        extras += " log_decay momentum rate_in rate_out M"
    impls = ["recurrent", "chunkwise", "scan"] + ["parallel"] * (method == "linear_attention")

    @drawn(
        b=small, h=small, k=st.integers(1, 9), v=st.integers(1, 9), t=lengths, chunk=chunks,
        chosen=st.sets(st.sampled_from(extras.split())), seed=st.integers(0, 2**32 - 1),
    )  # fmt: skip
    def check(b, h, k, v, t, chunk, chosen, seed):
        for name, size in dict(B=b, H=h, K=k, V=v).items():
            monkeypatch.setattr(recurrences, name, size)
        if "M" in chosen:
            chosen = chosen | {"momentum"}
        args, arrays = recurrences.draw(seed, method, t, " ".join(sorted(chosen)))
        narrow = lambda x: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x  # noqa: E731
        args, arrays = jax.tree.map(narrow, (args, arrays))
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
        expected = recurrences.oracle(method, *(np.asarray(x, np.float64) for x in args), **wide)
        for impl in impls:
            run = functools.partial(
                recurrences.call, method, impl=impl, chunk_size=chunk_of(chunk, t)
            )
            out, state = recurrences.quick_jit(run)(args, arrays)
            assert out.dtype == dtype
            for x, y in zip((out, *state), expected, strict=True):
                if x is not None:
                    recurrences.assert_close(x, y, TOLERANCE[dtype], (impl, t, chunk))

    with jax.enable_x64(dtype == "float64"):
        check()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_ttt(dtype):
    plain = [name for name, (cfg, _) in ttt_cases.CASES.items() if not cfg.orthogonalize]
    # Newton-Schulz magnifies float32's rounding where a gradient is close to singular.
    names = [*ttt_cases.CASES] if dtype == "float64" else plain

    @drawn(
        name=st.sampled_from(names), chunk=st.integers(1, 6), t=st.integers(1, 20),
        b=small, h=small, dk=st.integers(1, 6), dv=st.integers(1, 6), dh=st.integers(1, 6),
        shared=st.booleans(), per_matrix=st.booleans(), seed=st.integers(0, 2**32 - 1),
    )  # fmt: skip
    def check(name, chunk, seed, **sizes):
        cfg = dataclasses.replace(ttt_cases.CASES[name][0], chunk_size=chunk)
        args = ttt_cases.inputs(seed, cfg, dtype=dtype, **sizes)
        expected, after = ttt_oracle.layer(*ttt_cases.as_numpy(args), cfg)
        for impl in ttt_cases.legal(cfg):
            run = ttt_cases.quick_jit(functools.partial(ttt, cfg=cfg, impl=impl))
            out, state = run(*args)
            assert out.dtype == dtype
            ttt_cases.assert_close(out, expected, TOLERANCE[dtype], (name, impl))
            for part, x in after.items():
                ttt_cases.assert_close(getattr(state.fw, part), x, TOLERANCE[dtype], (name, impl))

    with jax.enable_x64(dtype == "float64"):
        check()


def test_decay_of_exp_minus_40_and_zero_momentum_have_finite_gradients():
    q, k, v = (
        jax.random.normal(key, (1, 9, 2, 3)) for key in jax.random.split(jax.random.key(0), 3)
    )
    gate = jnp.full((1, 9, 2), -40.0)
    for impl in ("recurrent", "chunkwise", "scan", "parallel"):
        total = lambda k, g, m, impl=impl: jnp.sum(  # noqa: E731
            la.linear_attention(q, k, v, log_decay=g, momentum=m, impl=impl, chunk_size=4)[0] ** 2
        )
        grads = ttt_cases.quick_jit(jax.grad(total, (0, 1, 2)))(0 * k, gate, 0 * gate)
        assert all(bool(jnp.all(jnp.isfinite(g))) for g in grads)
