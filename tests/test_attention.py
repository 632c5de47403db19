"""Attention: both forms against a row-by-row float64 oracle, and what surrounds them."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.attention import (
    blockwise_attention,
    cached_attention,
    dense_attention,
    vary_like,
)
from jaxlab.blockwise import Plan, default_block, even_block, key_blocks, query_blocks
from jaxlab.masks import Rule

FORMS = {
    "dense": dense_attention,
    "blockwise": functools.partial(blockwise_attention, block_q=5, block_k=4),
}
# Most of the time of this file is compilation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
form = pytest.mark.parametrize("attend", FORMS.values(), ids=FORMS)


def oracle(
    q, k, v, dout, dlse, *, causal=True, scale=None, window=None, softcap=None,
    segment_ids=None, k_segment_ids=None, q_positions=None, k_positions=None,
):  # fmt: skip
    """out, lse, dq, dk, dv one row at a time: the mask from its words, the softmax's Jacobian."""
    q, k, v, dout, dlse = (np.asarray(x, np.float64) for x in (q, k, v, dout, dlse))
    (b, t, h, d), s, group = q.shape, k.shape[1], q.shape[2] // k.shape[2]
    scale = d**-0.5 if scale is None else scale
    index = lambda x, n: np.broadcast_to(np.arange(n) if x is None else np.asarray(x), (b, n))  # noqa: E731
    qp, kp = index(q_positions, t), index(k_positions, s)
    k_segment_ids = segment_ids if k_segment_ids is None else k_segment_ids
    qs = np.zeros((b, t)) if segment_ids is None else np.asarray(segment_ids)
    ks = np.zeros((b, s)) if k_segment_ids is None else np.asarray(k_segment_ids)
    out, lse = np.zeros((b, t, h, v.shape[3])), np.full((b, t, h), -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for n, i, a in np.ndindex(b, t, h):
        c = a // group
        sees = [
            j for j in range(s)
            if (not causal or kp[n, j] <= qp[n, i])
            and (window is None or abs(qp[n, i] - kp[n, j]) < window)
            and qs[n, i] == ks[n, j]
        ]  # fmt: skip
        if not sees:
            continue
        z = k[n, sees, c] @ q[n, i, a] * scale
        slope = np.full_like(z, scale)
        if softcap is not None:
            slope *= 1 - np.tanh(z / softcap) ** 2
            z = softcap * np.tanh(z / softcap)
        weight = np.exp(z - z.max())
        p = weight / weight.sum()
        out[n, i, a] = p @ v[n, sees, c]
        lse[n, i, a] = z.max() + np.log(weight.sum())
        dp = v[n, sees, c] @ dout[n, i, a]
        dz = slope * ((np.diag(p) - np.outer(p, p)) @ dp + p * dlse[n, i, a])
        dq[n, i, a] += dz @ k[n, sees, c]
        dk[n, sees, c] += np.outer(dz, q[n, i, a])
        dv[n, sees, c] += np.outer(p, dout[n, i, a])
    return out, lse, dq, dk, dv


def measured(attend):
    """What the oracle returns, of `attend`, in one jitted program."""

    @quick_jit
    def run(q, k, v, dout, dlse, **arrays):
        call = lambda q, k, v: attend(q, k, v, return_lse=True, **arrays)  # noqa: E731
        (out, lse), vjp = jax.vjp(call, q, k, v)
        return out, lse, *vjp((dout, dlse))

    return run


def assert_close(got, expected, tolerance):
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, expected, strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        seen = np.isfinite(y)
        np.testing.assert_array_equal(np.isneginf(x), ~seen, err_msg=name)
        error = np.max(np.abs(x[seen] - y[seen]), initial=0)
        assert error <= tolerance * max(1, np.max(np.abs(y[seen]), initial=0)), (name, error)


def inputs(seed, b=2, t=9, s=None, h=4, hk=2, d=6, dv=5, dtype="float64"):
    draw = np.random.default_rng(seed).standard_normal
    s = t if s is None else s
    shapes = (b, t, h, d), (b, s, hk, d), (b, s, hk, dv), (b, t, h, dv), (b, t, h)
    q, k, v, dout, dlse = (jnp.asarray(draw(shape), dtype) for shape in shapes)
    return q, k, v, dout, dlse.astype(jnp.promote_types(dtype, "float32"))


# Sizes, static options, which arrays of a mask: those are drawn, any values being legal.
CASES = {
    "causal": (dict(t=11), dict(), "", (4, 3)),
    "full": (dict(b=1, t=5, h=3, hk=1), dict(causal=False), "", (8, 2)),
    "window": (dict(t=11, d=1), dict(window=3), "segments", (3, 5)),
    "both sides": (dict(), dict(causal=False, window=4, softcap=2.0, scale=20.0), "", (2, 3)),
    "one token": (dict(t=1, s=9), dict(softcap=1.0), "positions", (1, 4)),
    "any positions": (dict(t=7, s=10), dict(), "positions segments", (3, 4)),
    "short keys": (dict(t=10, s=5, hk=4), dict(causal=False, window=2), "positions", (512, 512)),
    "itself only": (dict(h=2), dict(window=1, softcap=2.0), "segments", (5, 2)),
}


def draw_mask(kinds, seed, b=2, t=9, s=None, **_):
    random, arrays, s = np.random.default_rng(seed), {}, t if s is None else s
    if "positions" in kinds:
        arrays["q_positions"] = random.integers(0, 12, (random.choice([1, b]), t))
        arrays["k_positions"] = random.integers(0, 12, (b, s))
    if "segments" in kinds:
        arrays["segment_ids"] = np.sort(random.integers(0, 3, (b, t)))
        arrays["k_segment_ids"] = np.sort(random.integers(0, 4, (b, s)))
    return arrays


@pytest.mark.parametrize("case", CASES)
def test_both_forms_match_the_oracle_in_float64(case):
    sizes, options, kinds, (block_q, block_k) = CASES[case]
    blockwise = functools.partial(blockwise_attention, block_q=block_q, block_k=block_k)
    forms = [measured(functools.partial(f, **options)) for f in (dense_attention, blockwise)]

    @settings(max_examples=8, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1))
    def check(seed):
        args, arrays = inputs(seed, **sizes), draw_mask(kinds, seed, **sizes)
        expected = oracle(*args, **options, **arrays)
        for form in forms:
            got = form(*args, **arrays)
            assert all(x.dtype == jnp.float64 for x in got)
            assert_close(got, expected, 1e-12)

    with jax.enable_x64(True):
        check()


def test_blocks_skipped_by_index_are_just_those_that_see_nothing():
    """Every size up to 7 in every block, against the enumerated mask of the padded square."""
    sizes = [(t, bq, bk) for t in (1, 4, 7) for bq in (1, 2, 3, 5) for bk in (1, 2, 3, 5)]
    for (t, bq, bk), causal, window in itertools.product(sizes, (True, False), (None, 1, 2, 4)):
        plan = Plan(Rule(causal, 1.0, window, None), t, t, min(bq, t), min(bk, t), True)
        i, j = np.indices((plan.n_q * plan.block_q, plan.n_k * plan.block_k))
        allowed = np.full(i.shape, True) if window is None else abs(i - j) < window
        allowed &= (j <= i) | (not causal)
        blocks = rearrange(allowed, "(n q) (m k) -> n m (q k)", q=plan.block_q, k=plan.block_k)
        for row, seen in enumerate(blocks.any(-1)):
            low, high = key_blocks(plan, row)
            assert np.flatnonzero(seen).tolist() == list(range(low, high)), plan
        for column, seen in enumerate(blocks.any(-1).T):
            low, high = query_blocks(plan, column)
            assert np.flatnonzero(seen).tolist() == list(range(low, high)), plan


@form
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_narrow_types_keep_a_float32_softmax(attend, dtype, tolerance):
    args = inputs(0, t=13, d=8, dtype=dtype)
    segments = np.sort(np.random.default_rng(0).integers(0, 3, (2, 13)))
    got = measured(attend)(*args, segment_ids=segments)
    assert [str(x.dtype) for x in got] == [dtype, "float32", dtype, dtype, dtype]
    assert_close(got, oracle(*args, segment_ids=segments), tolerance)
    np.testing.assert_allclose(got[1], oracle(*args, segment_ids=segments)[1], atol=2e-6)


@form
def test_rows_that_see_nothing_are_zero_with_zero_gradient(attend):
    *args, dlse = inputs(1, dtype="float32")
    blind = np.zeros((2, 9), bool)
    blind[0, :3], blind[1, 7:] = True, True
    segments, others = np.where(blind, 5, 0), np.zeros((2, 9), int)
    # A gradient through the logarithm of nothing is infinite or NaN; it must not spread.
    dlse = jnp.where(blind[..., None], jnp.nan, dlse)
    run = measured(attend)
    out, lse, dq, dk, dv = run(*args, dlse, segment_ids=segments, k_segment_ids=others)
    assert np.all(out[blind] == 0) and np.all(np.isneginf(lse[blind])) and np.all(dq[blind] == 0)
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(lse[~blind]))
    assert all(np.all(np.isfinite(x)) and np.any(x != 0) for x in (dq, dk, dv))
    nothing = run(*args, dlse, segment_ids=others + 1, k_segment_ids=others)
    assert np.all(np.isneginf(nothing[1]))
    assert all(np.all(x == 0) for x in (nothing[0], *nothing[2:]))


@form
def test_logits_of_any_size_do_not_overflow(attend):
    q, k, v, dout, dlse = inputs(2, dtype="float32")
    got = measured(attend)(1e4 * q, 1e4 * k, v, dout, dlse)
    assert all(np.all(np.isfinite(x)) for x in got)
    assert np.max(np.abs(got[0])) <= np.max(np.abs(v)) * (1 + 1e-6)


@pytest.mark.parametrize(
    "options, poison, clean",
    [
        (dict(), slice(8, 16), slice(0, 8)),
        (dict(window=4, causal=False), slice(0, 4), slice(8, 16)),
        (dict(segment_ids=np.arange(14)[None] // 4, causal=False), slice(0, 4), slice(4, 14)),
        (
            dict(q_positions=np.arange(16)[None] % 8, k_positions=np.arange(16)[None]),
            slice(8, 16),
            slice(0, 16),
        ),
    ],
    ids=["causal", "window", "segments", "positions"],
)
def test_blocks_in_which_nothing_is_allowed_are_never_computed(options, poison, clean):
    t = options["segment_ids"].shape[1] if "segment_ids" in options else 16
    q, k, v, dout, dlse = inputs(3, b=1, t=t, dtype="float32")
    k, v = k.at[:, poison].set(jnp.nan), v.at[:, poison].set(jnp.nan)
    static = {x: options[x] for x in options if x in ("causal", "window")}
    arrays = {x: options[x] for x in options if x not in static}
    for attend, skips in ((blockwise_attention, True), (dense_attention, False)):
        blocks = dict(block_q=4, block_k=4) if skips else {}
        got = measured(functools.partial(attend, **static, **blocks))(q, k, v, dout, dlse, **arrays)
        assert np.all(np.isfinite(got[0][:, clean])) == skips
        assert np.all(np.isfinite(got[2][:, clean])) == skips


@form
def test_vmap_is_a_loop(attend):
    args = [
        jnp.stack(pair) for pair in zip(*(inputs(s, dtype="float32") for s in (4, 5)), strict=True)
    ]
    segments = jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (2, 2, 9))))
    run = measured(attend)
    mapped = jax.vmap(lambda segment_ids, *args: run(*args, segment_ids=segment_ids))(
        segments, *args
    )
    for n in range(2):
        single = run(*(x[n] for x in args), segment_ids=segments[n])
        assert_close([x[n] for x in mapped], single, 1e-6)


@form
@pytest.mark.parametrize("masked", ["segments", "natural"])
def test_inside_shard_map_gradients_are_those_outside(attend, masked):
    """Batch over one axis, query heads over the other; keys, one head, are replicated over it."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
    args = inputs(6, b=4, h=2, hk=1, dtype="float32")
    arrays = {}
    if masked == "segments":
        arrays = {"segment_ids": jnp.asarray(np.arange(9)[None] // [[4], [2], [9], [3]])}
    heads, keys = P("data", None, "tensor"), P("data")

    def local(q, k, v, arrays):
        return attend(q, k, v, return_lse=True, **arrays)

    def sharded(q, k, v, return_lse, **arrays):
        specs = (heads, keys, keys, keys)
        f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(heads, heads))
        return f(q, k, v, arrays)

    got = measured(sharded)(*args, **arrays)
    assert_close(got, measured(attend)(*args, **arrays), 1e-6)


@form
def test_sharded_batch_and_heads_move_no_tokens(attend):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), (AxisType.Auto,) * 2)
    place = lambda *spec: NamedSharding(mesh, P(*spec))  # noqa: E731
    x = jax.ShapeDtypeStruct((4, 9, 4, 2), "float32", sharding=place("data", None, "tensor"))
    segments = jax.ShapeDtypeStruct((4, 9), "int32", sharding=place("data"))

    def gradient(q, k, v, segments):
        return jax.vjp(lambda *qkv: attend(*qkv, segment_ids=segments), q, k, v)[1](q)

    program = quick_jit(gradient).lower(x, x, x, segments).compile().as_text()
    moves = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
    moved = " ".join(re.findall(rf"= (.*) (?:{moves})(?:-start)?\(", program))
    # Only which blocks to skip, 2 by 3, is agreed over the batch, outside the loops.
    shapes = set(re.findall(r"\w+\[[\d,]*\]", moved))
    assert shapes == (set() if attend is dense_attention else {"pred[2,3]"})


def test_vary_like_is_the_identity_outside_and_a_type_inside():
    x = jnp.arange(8.0)
    assert vary_like(x, x) is x
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))

    def total(x):
        start = vary_like(jnp.zeros(()), {"any": x})
        return jax.lax.scan(lambda carry, y: (carry + y, None), start, x)[0][None]

    got = jax.shard_map(total, mesh=mesh, in_specs=P("data"), out_specs=P("data"))(jnp.arange(16.0))
    np.testing.assert_array_equal(got, np.arange(16.0).reshape(8, 2).sum(1))


def equations(jaxpr):
    """Every equation of a jaxpr and of all inside it, a loop's body once."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


@form
def test_remat_policies_can_save_the_output_by_name(attend):
    q, k, v, *_ = inputs(7, dtype="float32")

    def tanhs(policy):
        f = jax.checkpoint(lambda q: jnp.sum(attend(q, k, v, softcap=3.0) ** 2), policy=policy)
        found = equations(jax.make_jaxpr(jax.grad(f))(q).jaxpr)
        return sum(eqn.primitive.name == "tanh" for eqn in found)

    policies = jax.checkpoint_policies
    saved = tanhs(policies.save_only_these_names("attn_out", "attn_lse"))
    recomputed = tanhs(policies.nothing_saveable)
    # Autodiff of the dense form needs its own softmax again; blockwise has all it needs.
    assert (saved, recomputed) == ((2, 2) if attend is dense_attention else (2, 3))


def test_memory_grows_with_the_length_not_its_square():
    def temporary(attend, t):
        x = jax.ShapeDtypeStruct((1, t, 1, 8), jnp.float32)
        f = jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v) ** 2), (0, 1, 2))
        return jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    blockwise = functools.partial(blockwise_attention, block_q=64, block_k=64)
    (short, long), (dense, longer) = (
        [temporary(attend, t) for t in (1024, 4096)] for attend in (blockwise, dense_attention)
    )
    assert long < 4.5 * short and longer > 12 * dense
    assert long < 0.02 * longer


ints = functools.partial(jnp.zeros, dtype=jnp.int32)


@form
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(q=jnp.zeros((9, 4, 6))), r"q must be \[batch, length, heads, head dim\]"),
        (dict(k=jnp.zeros((2, 0, 2, 6))), r"k must be .* none 0, got \(2, 0, 2, 6\)"),
        (dict(k=jnp.zeros((2, 9, 2, 7))), r"k must be \[2, length, heads, 6\]"),
        (dict(v=jnp.zeros((2, 8, 2, 6))), r"v begin as k does; .* v \(2, 8, 2, 6\)"),
        (dict(q=jnp.zeros((2, 9, 3, 6))), "query heads 3 must be a multiple of key/value heads 2"),
        (dict(window=0), "window=0 must be an integer of at least 1"),
        (dict(softcap=0.0), "softcap=0.0 must be positive or None"),
        (dict(q=jnp.zeros((2, 3, 4, 6))), "lengths 3 of q and 9 of k differ: give q_positions"),
        (dict(q_positions=ints((2, 9))), "q_positions and k_positions must be given together"),
        (dict(k_segment_ids=ints((2, 9))), "k_segment_ids needs segment_ids"),
        (dict(segment_ids=ints((1, 9))), r"segment_ids must be \(2, 9\), got \(1, 9\)"),
        (
            dict(segment_ids=ints((2, 9)), k_segment_ids=ints((2, 8))),
            r"k_segment_ids must be \(2, 9\), got \(2, 8\)",
        ),
        (
            dict(q_positions=ints((9,)), k_positions=ints((1, 9))),
            r"q_positions must be \(2, 9\) or \(1, 9\), got \(9,\)",
        ),
        (
            dict(q_positions=ints((2, 9)), k_positions=ints((3, 9))),
            r"k_positions must be \(2, 9\) or \(1, 9\), got \(3, 9\)",
        ),
    ],
)
def test_illegal_arguments_are_named(attend, change, message):
    q, k, v, *_ = inputs(0, dtype="float32")
    with pytest.raises(ValueError, match=message):
        attend(**{"q": q, "k": k, "v": v, **change})


def test_blocks_are_as_many_as_asked_for_with_little_padding():
    assert even_block(513, 512) == 264
    for length, block in itertools.product(range(1, 80), range(1, 40)):
        even, n = even_block(length, block), math.ceil(length / block)
        assert even <= block and math.ceil(length / even) == n
        assert n * even - length < 8 * n


@pytest.mark.parametrize("rows, block", [(1, 512), (4, 512), (5, 256), (16, 256), (17, 128)])
def test_default_blocks_shrink_as_rows_grow(rows, block):
    assert default_block(rows) == block and default_block(1000) == 128
    q, k, v, *_ = (jax.ShapeDtypeStruct(x, "float32") for x in [(rows, 1024, 1, 2)] * 3)
    jaxpr = jax.make_jaxpr(blockwise_attention)(q, k, v).jaxpr
    shapes = {x.aval.shape for eqn in equations(jaxpr) for x in eqn.outvars}
    assert max(shape[-1] for shape in shapes if shape[:1] == (rows,) and len(shape) == 5) == block


def test_blocks_must_be_positive():
    q, k, v, *_ = inputs(0, dtype="float32")
    with pytest.raises(ValueError, match="block_q=0 and block_k=2 must be at least 1 or None"):
        blockwise_attention(q, k, v, block_q=0, block_k=2)


@pytest.mark.parametrize("h, hk, t", [(4, 4, 1), (4, 1, 1), (6, 2, 3)])
def test_attention_to_a_cache_is_the_dense_form_in_another_layout(h, hk, t):
    with jax.enable_x64(True):
        q, k, v, *rest = inputs(5, t=t, s=8, h=h, hk=hk)
        positions = draw_mask("positions", 5, t=t, s=8)
        out, *_ = oracle(q, k, v, *rest, **positions)
        k, v = (rearrange(x, "b s h k -> b h s k") for x in (k, v))
        got = cached_attention(q, k, v, positions["q_positions"], positions["k_positions"])
        np.testing.assert_allclose(got, out, rtol=1e-12, atol=1e-12)
        with pytest.raises(ValueError, match="k_positions must be"):
            cached_attention(q, k, v, positions["q_positions"], positions["k_positions"][:, 1:])
