"""States of TTT: runs continued, tokens one at a time, weights read without learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ttt_oracle
from ttt_cases import (
    CASES,
    INCLUSIVE,
    as_numpy,
    assert_close,
    assert_trees_close,
    config,
    inputs,
    legal,
    quick_jit,
    replace,
)

from jaxlab.ttt import LADDER, init_ttt_state, ttt, ttt_apply, ttt_step


def part(args, start, stop):
    """Tokens, rates and gates of the positions from `start` to `stop`, without the weights."""
    return tuple(x[:, start:stop] for x in (*args[:3], *args[4:]))


def run(cfg, impl, tokens, fw):
    return quick_jit(functools.partial(ttt, cfg=cfg, impl=impl))(*tokens[:3], fw, *tokens[3:])


@pytest.mark.parametrize(
    "case", ["base", "base inclusive", "V1p", "V1p inclusive", "V2", "V2 token"]
)
def test_a_run_may_be_continued_where_a_chunk_begins(case):
    cfg, sizes = CASES[case]
    with jax.enable_x64(True):
        args = inputs(4, cfg, **{**sizes, "t": 11})
        for impl in set(legal(cfg)) - {"auto"}:
            out, state = run(cfg, impl, part(args, 0, 11), args[3])
            first, carried = run(cfg, impl, part(args, 0, 4), args[3])
            second, carried = run(cfg, impl, part(args, 4, 8), carried)
            third, last = run(cfg, impl, part(args, 8, 11), carried)
            assert_close(jnp.concatenate([first, second, third], 1), out, 1e-12, impl)
            assert_trees_close(last, state, 1e-12)
            nothing, same = run(cfg, impl, part(args, 8, 8), carried)
            assert (
                nothing.shape == (*out.shape[:1], 0, *out.shape[2:]) and nothing.dtype == out.dtype
            )
            assert_trees_close(same, carried, 0)


@pytest.mark.parametrize("case", ["base", "base squared", "base plain", "V1p", "V2", "V6"])
def test_token_by_token_equals_all_at_once_from_any_position(case):
    cfg = replace(CASES[case][0], visibility="exclusive", steps=1)
    step = quick_jit(functools.partial(ttt_step, cfg=cfg))
    with jax.enable_x64(True):
        args = inputs(5, cfg, **{**CASES[case][1], "t": 9})
        states = {t: run(cfg, "auto", part(args, 0, t), args[3]) for t in (3, 4, 9)}
        whole = states[9][0]
        for start in (0, 3, 4):
            state = states[start][1] if start else init_ttt_state(args[3], whole.shape[0], cfg)
            for t in range(start, 9):
                state, out = step(state, *(x[:, 0] for x in part(args, t, t + 1)))
                # An exclusive output does not depend on what comes after.
                assert_close(out, whole[:, t], 1e-12)
                if t + 1 in states:
                    assert_trees_close(state, states[t + 1][1], 1e-12)


def test_without_gates_a_step_equals_a_run_too():
    cfg = config("base")
    q, k, v, fw, rates, _ = inputs(6, cfg, dtype="float32")
    expected, after = ttt(q, k, v, fw, rates, cfg=cfg)
    step = quick_jit(functools.partial(ttt_step, cfg=cfg))
    state, kinds = init_ttt_state(fw, 2, cfg), None
    for t in range(q.shape[1]):
        state, out = step(state, q[:, t], k[:, t], v[:, t], rates[:, t])
        assert_close(out, expected[:, t], 1e-5)
        assert kinds in (None, jax.tree.map(lambda x: (x.shape, x.dtype), state))
        kinds = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert_trees_close(state, after, 1e-5)


def test_a_step_is_a_scan_body_and_keeps_its_types():
    cfg = config("base")
    args = inputs(7, cfg, dtype="bfloat16")
    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (*args[:3], *args[4:]))
    scan = lambda fw, xs: jax.lax.scan(  # noqa: E731
        lambda state, x: ttt_step(state, *x, cfg), init_ttt_state(fw, 2, cfg), xs
    )
    state, out = quick_jit(scan)(args[3], tokens)
    expected, after = ttt(*args, cfg)
    assert out.dtype == jnp.bfloat16
    assert_close(jnp.moveaxis(out, 0, 1), expected, 1e-2)
    assert_trees_close(state, after, 1e-5)


def test_update_on_some_tokens_then_apply_to_all():
    cfg = replace(LADDER["base"], momentum=False, detach_norm=True, orthogonalize="muon",
                  chunk_size=6, **INCLUSIVE)  # fmt: skip
    with jax.enable_x64(True):
        q, k, v, fw, rates, _ = inputs(8, cfg)
        out, state = ttt(q[:, :6], k[:, :6], v[:, :6], fw, rates[:, :6], cfg=cfg)
        some = (*(x[:, :6] for x in (q, k, v)), fw, rates[:, :6], None)
        expected, after = ttt_oracle.layer(*as_numpy(some), cfg)
        seen = ttt_apply(state.fw, q, cfg)
        assert_close(seen[:, :6], expected, 1e-12)
        for n, i, h in np.ndindex(*q.shape[:3]):
            w = {name: x[n, h].T for name, x in after.items()}
            assert_close(seen[n, i, h], ttt_oracle.net(w, np.asarray(q[n, i, h]), "swiglu"), 1e-12)
