"""Counted FLOPs against closed forms, XLA's own count, and counting by hand."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlab.attention import blockwise_attention, dense_attention
from jaxlab.loops import loop_at_most
from sharding.flops import count_flops


def shape(*sizes, dtype="float32"):
    return jax.ShapeDtypeStruct(sizes, dtype)


X, W = shape(8, 16), shape(16, 16)
ONE = 2 * 8 * 16 * 16  # one X @ W


def xla_flops(fn, *args) -> float:
    """XLA's count of the uncompiled program, elementwise operations included."""
    return jax.jit(fn).lower(*args).cost_analysis().get("flops", 0.0)


def square_scan(x, w, length=5):
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w), None), x, None, length=length)[0]


@pytest.mark.parametrize(
    "equation, shapes, expected",
    [
        ("mk,kn->mn", [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        ("bthk,bshk->bhts", [(2, 3, 4, 5), (2, 7, 4, 5)], 2 * 2 * 4 * 3 * 7 * 5),
        ("ij,ij->", [(6, 4), (6, 4)], 2 * 24),
        ("i,j->ij", [(6,), (4,)], 2 * 24),
        ("btd,dhk,hkf->btf", [(2, 3, 8), (8, 2, 4), (2, 4, 6)], 2 * 2 * 3 * 8 * 8 + 2 * 6 * 8 * 6),
    ],
)
def test_einsums_have_their_closed_form(equation, shapes, expected):
    fn = lambda *a: jnp.einsum(equation, *a, optimize=[(0, 1)] * (len(a) - 1))  # noqa: E731
    args = [shape(*s) for s in shapes]
    if equation == "i,j->ij":  # an outer product may be written as a multiplication
        assert count_flops(fn, *args) in (0, expected)
    else:
        assert count_flops(fn, *args) == expected


sizes = st.integers(1, 6)


@settings(max_examples=20, deadline=None)
@given(b=sizes, m=sizes, k=sizes, n=sizes)
def test_batched_matmuls_agree_with_xla(b, m, k, n):
    dims = (((2,), (1,)), ((0,), (0,)))
    fn = lambda x, y: jax.lax.dot_general(x, y, dims)  # noqa: E731
    args = shape(b, m, k), shape(b, k, n)
    assert count_flops(fn, *args) == xla_flops(fn, *args) == 2 * b * m * k * n


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(5, 9), st.integers(5, 9)),
    window=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stride=st.integers(1, 3),
    low=st.integers(0, 3),
    high=st.integers(0, 2),
    holes=st.integers(1, 3),
    spacing=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
)
def test_convolutions_agree_with_xla(size, window, stride, low, high, holes, spacing, groups):
    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (stride, 1), [(low, high), (1, 0)], (holes, 1), (1, spacing),
            ("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
        )  # fmt: skip

    args = shape(2, *size, 4), shape(*window, 4 // groups, 8)
    assert count_flops(conv, *args) == xla_flops(conv, *args)


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_a_convolution_agree_with_xla(groups):
    def conv(x, k):
        return jax.lax.conv_general_dilated(
            x, k, (2,), [(1, 2)], (1,), (2,), ("NHC", "HIO", "NHC"), feature_group_count=groups
        )

    x, k = shape(2, 11, 4), shape(3, 4 // groups, 8)
    out = jax.eval_shape(conv, x, k)
    backward = lambda x, k, g: jax.vjp(conv, x, k)[1](g)  # noqa: E731
    assert count_flops(backward, x, k, out) == xla_flops(backward, x, k, out)


def test_the_gradient_of_a_matmul_costs_three_matmuls():
    loss = lambda x, w: jnp.sum(jnp.sin(x @ w))  # noqa: E731
    assert count_flops(loss, X, W) == ONE
    assert count_flops(jax.grad(loss, (0, 1)), X, W) == 3 * ONE


@pytest.mark.parametrize("length", [1, 5, 1000])
def test_a_scan_counts_its_length_where_xla_counts_it_once(length):
    fn = lambda x, w: square_scan(x, w, length)  # noqa: E731
    assert count_flops(fn, X, W) == length * ONE
    assert count_flops(jax.grad(lambda x, w: fn(x, w).sum(), (0, 1)), X, W) == 3 * length * ONE
    if length == 1000:
        assert xla_flops(fn, X, W) < 3 * ONE


def test_nested_scans_multiply_and_a_while_loop_counts_once():
    outer = lambda x, w: jax.lax.scan(lambda c, _: (square_scan(c, w, 3), None), x, None, 4)[0]  # noqa: E731
    assert count_flops(outer, X, W) == 12 * ONE
    loop = lambda x, w: jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c @ w, x)  # noqa: E731
    assert count_flops(loop, X, W) == ONE


def test_recomputation_is_counted_where_it_happens():
    def loss(wrap):
        body = wrap(lambda x, w: jnp.sin(jnp.tanh(x @ w) @ w))
        return lambda x, w: body(x, w).sum()

    remat = lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable)  # noqa: E731
    kept = lambda f: jax.checkpoint(f, policy=jax.checkpoint_policies.everything_saveable)  # noqa: E731
    for wrap, matmuls in ((lambda f: f, 6), (remat, 8), (kept, 6)):
        assert count_flops(loss(wrap), X, W) == 2 * ONE
        assert count_flops(jax.value_and_grad(loss(wrap), (0, 1)), X, W) == matmuls * ONE


def test_custom_derivatives_are_followed():
    @jax.custom_vjp
    def f(x, w):
        return x @ w

    # A backward pass of five matmuls on purpose: the rule must be counted, not the derivative.
    f.defvjp(
        lambda x, w: (x @ w, (x, w)),
        lambda saved, g: (g @ saved[1] @ saved[1] @ saved[1] @ saved[1], saved[0].T @ g),
    )

    @jax.custom_jvp
    def h(x, w):
        return x @ w

    h.defjvp(lambda p, t: (h(*p), t[0] @ p[1] @ p[1] @ p[1]))
    assert count_flops(f, X, W) == count_flops(h, X, W) == ONE
    assert count_flops(jax.value_and_grad(lambda x, w: f(x, w).sum(), (0, 1)), X, W) == 6 * ONE
    assert count_flops(jax.value_and_grad(lambda x, w: h(x, w).sum()), X, W) == 4 * ONE


def test_a_conditional_counts_its_dearest_branch():
    fn = lambda i, x, w: jax.lax.switch(i, [lambda: x, lambda: x @ w @ w, lambda: x @ w])  # noqa: E731
    assert count_flops(fn, shape(dtype="int32"), X, W) == 2 * ONE


@pytest.mark.parametrize(
    "w_spec, out_spec, axes, expected",
    [
        (P(None, "y"), P("x", "y"), {"x", "y"}, ONE),
        # The same columns on both devices of y: the program does the work twice.
        (P(), P("x"), {"x", "y"}, 2 * ONE),
        (P(), P("x"), {"x"}, ONE),
    ],
)
def test_shard_map_counts_every_device_of_its_manual_axes(w_spec, out_spec, axes, expected):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)
    fn = jax.shard_map(
        lambda x, w: x @ w,
        mesh=mesh,
        in_specs=(P("x"), w_spec),
        out_specs=out_spec,
        axis_names=axes,
    )
    assert count_flops(jax.jit(fn), X, W) == expected
    twice = lambda x, w: jax.lax.scan(lambda c, _: (fn(c, w), None), x, None, length=2)[0]  # noqa: E731
    assert count_flops(twice, X, W) == 2 * expected


def test_typed_keys_vmap_and_jit_are_seen_through():
    key = shape(dtype=jax.random.key(0).dtype)
    fn = lambda key, w: jax.random.normal(key, (8, 16)) @ w  # noqa: E731
    assert count_flops(jax.jit(jax.jit(fn)), key, W) == ONE
    keys = shape(3, dtype=jax.random.key(0).dtype)
    assert count_flops(jax.vmap(fn, (0, None)), keys, W) == 3 * ONE


def test_a_scan_free_network_agrees_with_xla():
    def net(x, w):
        return jax.lax.dot(jax.lax.dot(x, w), w)

    backward = lambda x, w, g: jax.vjp(net, x, w)[1](g)  # noqa: E731
    assert xla_flops(net, X, W) == count_flops(net, X, W) == 2 * ONE
    # The second matmul of the forward pass is dead; XLA adds the two gradients of w, 16 * 16.
    assert xla_flops(backward, X, W, X) - 16 * 16 == count_flops(backward, X, W, X) == 5 * ONE


def test_what_no_output_needs_is_not_counted():
    assert count_flops(lambda x, w: (x @ w, (x @ w) @ w)[0], X, W) == ONE
    unused = lambda x, w: jax.lax.scan(lambda c, _: (c @ w, (c @ w) @ w), x, None, length=4)[0]  # noqa: E731
    assert count_flops(jax.jit(unused), X, W) == 4 * ONE


def attention_shapes(b=2, t=64, h=4, hk=2, k=8):
    return shape(b, t, h, k), shape(b, t, hk, k), shape(b, t, hk, k)


MASKS = [
    {},
    {"causal": False},
    {"window": 20},
    {"causal": False, "window": 20},
    {"segment_ids": True},
    {"segment_ids": True, "window": 9},
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("hk", [4, 2, 1])
@pytest.mark.parametrize("block", [(16, 16), (8, 32), (64, 8)])
def test_blockwise_attention_counts_in_full_whatever_the_mask(mask, hk, block):
    mask = dict(mask)
    if mask.get("segment_ids"):
        mask["segment_ids"] = jnp.zeros((2, 64), jnp.int32)
    args = attention_shapes(hk=hk)
    sizes = dict(zip(("block_q", "block_k"), block, strict=True))
    dense = lambda *a: dense_attention(*a, **mask).sum()  # noqa: E731
    blocks = lambda *a: blockwise_attention(*a, **mask, **sizes).sum()  # noqa: E731
    matmul = 2 * 2 * 4 * 64 * 64 * 8  # [t, k] @ [k, s] of every head and row
    assert count_flops(blocks, *args) == count_flops(dense, *args) == 2 * matmul
    # The gradient: four matmuls from kept probabilities, five where they are made again.
    assert count_flops(jax.value_and_grad(dense, (0, 1, 2)), *args) == (2 + 4) * matmul
    assert count_flops(jax.value_and_grad(blocks, (0, 1, 2)), *args) == (2 + 5) * matmul


@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable"])
def test_layers_of_blockwise_attention_count_their_number_scanned_remat_and_vmapped(policy):
    args = attention_shapes(b=1)
    matmul = 2 * 4 * 64 * 64 * 8

    def layer(q, k, v):
        return blockwise_attention(q, k, v, block_q=16, block_k=16)

    def loss(q, k, v):
        body = jax.checkpoint(layer, policy=getattr(jax.checkpoint_policies, policy))
        return jax.lax.scan(lambda x, _: (body(x, k, v), None), q, None, length=3)[0].sum()

    again = 2 if policy == "nothing_saveable" else 0
    gradient = jax.value_and_grad(loss, (0, 1, 2))
    assert count_flops(loss, *args) == 3 * 2 * matmul
    assert count_flops(gradient, *args) == 3 * (2 + again + 5) * matmul
    rows = [shape(5, *a.shape) for a in args]
    assert count_flops(jax.vmap(gradient), *rows) == 5 * count_flops(gradient, *args)
    assert count_flops(jax.jit(jax.vmap(layer)), *rows) == 5 * 2 * matmul


def test_the_bound_of_a_loop_is_its_own():
    """A loop inside a bounded one, or beside it, is still of unknown length."""

    def search(x, w):
        return jax.lax.while_loop(lambda c: c.sum() < 1, lambda c: c @ w, x)

    def fn(n, x, w):
        x = loop_at_most(6, 0, n, lambda _, c: search(c, w), x)
        return search(loop_at_most(5, n, 5, lambda _, c: c @ w, x), w)

    n = shape(dtype="int32")
    assert count_flops(fn, n, X, W) == (6 + 5 + 1) * ONE
    whole = jax.vmap(lambda n, x, w: loop_at_most(7, 0, n, lambda _, c: c @ w, x), (0, 0, None))
    assert count_flops(whole, shape(3, dtype="int32"), shape(3, 8, 16), W) == 3 * 7 * ONE


def test_a_bounded_loop_computes_what_fori_loop_does():
    for low, high in ((0, 5), (2, 5), (4, 4), (5, 2)):
        body = lambda i, c: c * 3 + i  # noqa: E731
        want = jax.lax.fori_loop(low, high, body, 1)
        for wrap in (lambda f: f, jax.jit):
            got = wrap(lambda a, b: loop_at_most(5, a, b, body, 1))(low, high)  # noqa: B023
            assert int(got) == int(want)
