"""Which heads when, which token where, and what is refused: everything of context parallelism but sums."""

import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import make_mesh
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.context import (
    LAYOUTS,
    METHODS,
    check_context,
    head_schedule,
    legal_heads_per_stage,
    zigzag_permutation,
    zigzag_shard,
    zigzag_unshard,
)

quickly = settings(max_examples=60, deadline=None, database=None, derandomize=True)
powers = st.sampled_from([1, 2, 4, 8])


# The sets of the papers' note, section 2.1: U to (Ukv, gt, n_outer, n_inner).
@pytest.mark.parametrize(
    "heads, expected",
    [
        ((32, 8, 8), {8: (8, 1, 1, 4), 16: (8, 2, 1, 2), 32: (8, 4, 1, 1)}),
        ((32, 8, 4), {4: (4, 1, 2, 4), 8: (4, 2, 2, 2), 16: (4, 4, 2, 1), 32: (8, 4, 1, 1)}),
        ((64, 8, 8), {8: (8, 1, 1, 8), 16: (8, 2, 1, 4), 32: (8, 4, 1, 2), 64: (8, 8, 1, 1)}),
        ((64, 8, 16), {16: (16, 1, 1, 4), 32: (16, 2, 1, 2), 64: (16, 4, 1, 1)}),
        ((32, 32, 8), {8: (8, 1, 4, 1), 16: (16, 1, 2, 1), 32: (32, 1, 1, 1)}),
        ((40, 8, 8), {8: (8, 1, 1, 5), 40: (8, 5, 1, 1)}),
        ((16, 2, 8), {8: (8, 1, 1, 2), 16: (8, 2, 1, 1)}),
    ],
)
def test_legal_stages_are_those_of_the_paper(heads, expected):
    assert legal_heads_per_stage(*heads) == tuple(expected)
    for u, numbers in expected.items():
        s = head_schedule(*heads, u)
        assert (s.ukv, s.gt, s.n_outer, s.n_inner) == numbers
        assert s.rep == (2 if heads == (64, 8, 16) else 4 if heads == (16, 2, 8) else 1)


@quickly
@given(powers, st.sampled_from([1, 2, 3, 4, 5, 8]), st.sampled_from([1, 2, 3, 4, 8, 16]))
def test_every_head_once_beside_its_keys(c, group, kv):
    """Over all legal stages: each query head once, its device has the key head that it reads."""
    h = group * kv
    if h % c or (kv % c and c % kv):
        with pytest.raises(ValueError, match=f"context={c}"):
            legal_heads_per_stage(h, kv, c)
        return
    legal = legal_heads_per_stage(h, kv, c)
    # U = C and U = H work for any head counts that can be shared at all.
    assert legal[0] == c and legal[-1] == h and list(legal) == sorted(set(legal))
    for u in range(1, h + 1):
        if u not in legal:
            with pytest.raises(ValueError, match=f"heads_per_stage={u} is not legal"):
                head_schedule(h, kv, c, u)
            continue
        s = head_schedule(h, kv, c, u)
        assert s.n_outer * s.n_inner == h // u and s.he == s.n_outer * s.ukv
        assert s.ge == s.n_inner * s.gt and s.ukv % c == 0 and s.he == kv * s.rep
        places = itertools.product(
            range(s.n_outer), range(s.n_inner), range(c), range(s.ukv // c), range(s.gt)
        )
        heads = []
        for o, t, r, j, i in places:
            heads.append(s.q_head(o, t, r, j, i))
            # Effective key heads are split over devices in order, each real one `rep` times.
            sent = o * s.ukv + r * (s.ukv // c) + j
            assert heads[-1] // s.ge == sent and heads[-1] // group == sent // s.rep
            if u == c:
                stage = o * s.n_inner + t
                assert heads[-1] == ((stage // s.ge) * c + r) * s.ge + stage % s.ge
        assert sorted(heads) == list(range(h))
        assert s.order.tolist() == heads
        np.testing.assert_array_equal(s.inverse[s.order], np.arange(h))


@settings(quickly, max_examples=15)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 1), st.data())
def test_zigzag_pairs_the_first_block_with_the_last(ring, block, axis, data):
    length = 2 * ring * block
    order = zigzag_permutation(length, ring)
    assert order.dtype == np.int32 and sorted(order) == list(range(length))
    blocks = order.reshape(ring, 2, block)
    for r in range(ring):
        for half, b in enumerate((r, 2 * ring - 1 - r)):
            np.testing.assert_array_equal(blocks[r, half], b * block + np.arange(block))
    # What a rank computes of a causal mask: the same everywhere.
    work = (order.reshape(ring, -1) + 1).sum(1)
    assert len(set(work)) == 1
    x = jnp.arange(3 * length).reshape(3, length) if axis else jnp.arange(length)[:, None]
    put = zigzag_shard(x, ring, axis=axis)
    np.testing.assert_array_equal(put, np.take(np.asarray(x), order, axis))
    np.testing.assert_array_equal(zigzag_unshard(put, ring, axis=axis), x)
    wrong = data.draw(st.integers(1, 50).filter(lambda n: n % (2 * ring)))
    for call in (zigzag_permutation, lambda n, r: zigzag_shard(jnp.zeros((1, n)), r)):
        with pytest.raises(ValueError, match=f"seq_len={wrong} is not divisible by .*= {2 * ring}"):
            call(wrong, ring)


def check(sizes, **changes):
    given = dict(method="ulysses", num_heads=32, num_kv_heads=8, seq_len=64, batch=4) | changes
    check_context(sizes, **given)


@pytest.mark.parametrize(
    "sizes, changes, words",
    [
        ({}, dict(method="ulisses"), "method='ulisses' must be one of"),
        ({}, dict(layout="zag"), "layout='zag' must be one of"),
        (None, {}, "method='ulysses' needs a mesh"),
        ({"model": 2}, {}, "['model'] are unknown"),
        ({"context": 4}, dict(num_heads=30, num_kv_heads=10), "num_heads=30 is not divisible by context=4"),
        ({"context": 3}, dict(num_heads=24), "num_kv_heads=8 and context=3: one must divide"),
        ({"context": 2}, dict(num_kv_heads=5), "num_heads=32 must be a multiple of num_kv_heads=5"),
        (
            {"context": 8}, dict(method="upipe", heads_per_stage=12),
            "heads_per_stage=12 is not legal for num_heads=32, num_kv_heads=8, context=8: use one of "
            "[8, 16, 32], nearest [8, 16]",
        ),
        ({"context": 8}, dict(method="upipe", heads_per_stage=64), "nearest [16, 32]"),
        ({"context": 2}, dict(heads_per_stage=8), "heads_per_stage=8 is for the methods"),
        ({"context": 4, "tensor": 4}, dict(method="upipe", heads_per_stage=16), "one of tensor=4 ranks"),
        ({"tensor": 3}, {}, "num_heads=32 is not divisible by tensor=3; use tensor in [1, 2, 4, 8]"),
        ({"tensor": 16}, {}, "num_kv_heads=8 is not divisible by tensor=16"),
        (
            {"tensor": 3, "context": 32}, dict(method="ulysses"),
            "num_heads=32 is not divisible by tensor=3; use tensor in [1]",
        ),
        (
            {"context": 8}, dict(method="ring", layout="zigzag", seq_len=60),
            "seq_len=60 is not divisible by 2 * ring=8 = 16 (zigzag order); nearest: [48, 64]",
        ),
        ({"ring": 2, "context": 2}, {}, "ring=2 (context=2): use ring=1 or a method of"),
        ({"ring": 2}, dict(method="ring"), "method='ring' uses one mesh axis"),
        (
            {"context": 8}, dict(seq_len=60),
            "seq_len=60 is not divisible by ring=1 * context=8 = 8; nearest: [56, 64]",
        ),
        ({"context": 8}, dict(method="ring", layout="zigzag", seq_len=24), "2 * ring=8 = 16"),
        (
            {"ring": 2, "context": 4}, dict(method="usp", layout="zigzag", seq_len=24),
            "seq_len=24 is not divisible by 2 * ring=2 * context=4 = 16 (zigzag order); nearest: [16, 32]",
        ),
        ({"context": 2}, dict(layout="zigzag"), "layout='zigzag' is for the methods"),
        ({"context": 2}, dict(method="upipe", layout="zigzag"), "nothing to balance"),
        ({}, dict(method="none", layout="zigzag"), "nothing to balance"),
        ({"data": 2, "fsdp": 3}, {}, "batch=4 is not divisible by data=2 * fsdp=3 = 6; nearest: [6]"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_with_numbers(sizes, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check(sizes, **changes)


def test_what_works_is_let_through():
    for method in METHODS:
        check({"context": 8}, method=method)
        check(make_mesh(data=2, context=2, tensor=2), method=method)
    check(None, method="none", seq_len=7, batch=1)
    for method in ("usp", "upipe_ring"):
        for layout in LAYOUTS:
            check({"ring": 2, "context": 4}, method=method, layout=layout)
            # One ring rank is legal for two-level methods.
            check({"context": 4}, method=method, layout=layout)
    # Key heads are repeated, and ring methods do not share heads at all.
    check({"context": 8}, num_heads=8, num_kv_heads=1)
    check({"context": 8}, method="ring", num_heads=3, num_kv_heads=3)
