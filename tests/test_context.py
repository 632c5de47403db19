"""Attention on a sharded sequence against one float64 layer in NumPy, and what it sends and computes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import assert_close, draw_segments, layer_inputs, layer_oracle, make_mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_attention import equations

from jaxlab.attention import blockwise_attention, dense_attention
from jaxlab.rope import rope_frequencies
from sharding.context import (
    ContextConfig,
    attention_layer,
    context_attention,
    legal_heads_per_stage,
    zigzag_permutation,
)
from sharding.flops import live
from sharding.plan import count_collectives

INV_FREQ = rope_frequencies(4, 100.0)
# Most of the time of this file is compilation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def rings(method, axes):
    """Ranks of the zigzag order."""
    return axes.get("ring", 1) if method in ("usp", "upipe_ring") else axes.get("context", 1)


def run(inputs, axes, method, *, layout="contiguous", segment_ids=None, positions=None, **options):
    """y and all gradients of `attention_layer`, tokens given and returned in natural order."""
    *args, dy = inputs
    order = np.arange(dy.shape[1])
    if layout == "zigzag":
        order = zigzag_permutation(dy.shape[1], rings(method, axes))
    put = lambda a: None if a is None else jnp.asarray(a)[:, order]  # noqa: E731

    @quick_jit
    def both(x, wq, wk, wv, wo, dy):
        def layer(x, *weights):
            y = attention_layer(
                put(x), *weights, mesh=make_mesh(**axes) if axes else None, method=method,
                layout=layout, segment_ids=put(segment_ids), positions=put(positions), **options,
            )  # fmt: skip
            return y[:, np.argsort(order)]

        y, pull = jax.vjp(layer, x, wq, wk, wv, wo)
        return y, *pull(dy)

    return both(*args, dy)


# Sizes of the layer, the mesh, the method and its options. Between them: every method, layout and core,
# rep 1, 2, 4 and 8, one and several chunks and slices, every mask.
CASES = {
    "none": (dict(), {}, "none", dict(core="dense")),
    "ulysses": (dict(hk=2), dict(data=2, context=4), "ulysses", dict(window=5)),
    "ulysses, one key head": (dict(hk=1), dict(context=8), "ulysses", dict(causal=False)),
    "upipe": (dict(h=16, hk=4), dict(context=2), "upipe", dict(softcap=2.0)),
    "upipe, tensor": (
        dict(h=16, hk=4), dict(fsdp=2, context=2, tensor=2), "upipe",
        dict(heads_per_stage=4, stage_policy="attn_out"),
    ),
    "upipe, eight devices": (dict(h=16, hk=2), dict(context=8), "upipe", {}),
    "upipe, own keys": (dict(h=8, hk=8), dict(context=4), "upipe", dict(core="dense", scale=0.3)),
    "ring": (dict(h=3, hk=1), dict(context=4), "ring", dict(layout="zigzag")),
    "ring, full": (dict(), dict(context=4), "ring", dict(causal=False, window=6, softcap=2.0)),
    "allgather": (dict(h=2, hk=2), dict(context=4), "allgather", dict(layout="zigzag", window=7)),
    "usp": (dict(h=4, hk=2), dict(ring=2, context=4), "usp", dict(layout="zigzag")),
    "upipe_ring": (
        dict(h=8, hk=4), dict(ring=4, context=2), "upipe_ring",
        dict(layout="zigzag", heads_per_stage=4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_method_is_one_layer_in_float64(case):
    """Segments cross shards, heads * head dim is not the width, batch 2, gradients of everything."""
    sizes, axes, method, options = CASES[case]
    mask = {k: v for k, v in options.items() if k in ("causal", "window", "softcap", "scale")}
    segments = None if case in ("none", "ring, full") else draw_segments(1)
    with jax.enable_x64(True):
        inputs = layer_inputs(0, **sizes, dtype="float64")
        inv_freq = jnp.asarray(INV_FREQ, "float64")
        got = run(inputs, axes, method, segment_ids=segments, inv_freq=inv_freq, **options)
        assert all(x.dtype == jnp.float64 for x in got)
        expected = layer_oracle(*inputs, inv_freq=INV_FREQ, segment_ids=segments, **mask)
        assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("method, axes", [("upipe", dict(context=4)), ("ring", dict(context=4))])
def test_narrow_types(method, axes, dtype, tolerance):
    """Positions are RoPE's only: the mask goes by natural order."""
    inputs = layer_inputs(2, h=8, hk=4, dtype=dtype)
    positions = np.random.default_rng(3).integers(0, 40, (2, 16))
    got = run(inputs, axes, method, positions=positions, inv_freq=jnp.asarray(INV_FREQ))
    assert all(str(x.dtype) == dtype for x in got)
    expected = layer_oracle(*inputs, positions=positions, inv_freq=INV_FREQ)
    assert_close(got, expected, tolerance)


def test_many_stages_lose_no_digits_of_a_narrow_sum():
    """128 stages of one head in bfloat16: y as near as that of one stage."""
    *args, dy = layer_inputs(4, s=8, d=16, h=128, hk=128, dtype="bfloat16")
    expected = layer_oracle(*args, dy)

    def error(u):
        got = run((*args, dy), dict(context=1), "upipe", heads_per_stage=u, core="dense")
        return [
            np.max(np.abs(np.asarray(a, float) - b)) / np.max(np.abs(b))
            for a, b in zip(got, expected, strict=True)
        ]

    many, one = error(1), error(128)
    assert many[0] <= 1.2 * one[0] < 6e-3
    # The gradient of x is summed in its own type.
    assert max(many) < 3e-2


def test_second_derivatives_by_stages():
    """A penalty on gradients, with a core that can be differentiated twice."""
    with jax.enable_x64(True):
        *args, _ = layer_inputs(5, h=8, hk=4, dtype="float64")

        def penalty(method, *args):
            mesh = make_mesh(context=2) if method != "none" else None

            def loss(x, wq):
                how = dict(mesh=mesh, method=method, core="dense")
                return jnp.sum(attention_layer(x, wq, *args[2:], **how) ** 2)

            dx, dwq = jax.grad(loss, (0, 1))(*args[:2])
            return jnp.sum(dx**3) + jnp.sum(dwq**2)

        got, expected = (
            quick_jit(jax.grad(functools.partial(penalty, method), (0, 1)))(*args)
            for method in ("upipe", "none")
        )
        for x, y in zip(got, expected, strict=True):
            assert jnp.max(jnp.abs(x - y)) <= 1e-12 * jnp.max(jnp.abs(y))


def test_no_method_takes_any_heads():
    """More tensor ranks than key heads: nothing is shared out by hand."""
    inputs = layer_inputs(6, h=4, hk=1)
    got = run(inputs, dict(tensor=2), "none", core="dense")
    assert_close(got, layer_oracle(*inputs), 1e-6)


GRID = [
    (c, g, kv)
    for c, g, kv in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8))
    if (g * kv) % c == 0 and g * kv <= 16
]


@pytest.mark.slow
@pytest.mark.parametrize("c, group, kv", GRID)
def test_every_stage_of_every_ratio(c, group, kv):
    """Masks of one kind here: tests/test_context_drawn.py has the others."""
    with jax.enable_x64(True):
        inputs = layer_inputs(1, h=group * kv, hk=kv, dtype="float64")
        segments = draw_segments(1)
        expected = layer_oracle(*inputs, segment_ids=segments)
        for u in legal_heads_per_stage(group * kv, kv, c):
            options = dict(heads_per_stage=u, segment_ids=segments)
            assert_close(run(inputs, dict(context=c), "upipe", **options), expected, 1e-12)
            if 8 // c > 1:
                axes = dict(ring=8 // c, context=c)
                got = run(inputs, axes, "upipe_ring", layout="zigzag", **options)
                assert_close(got, expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("method", ["ring", "allgather", "usp"])
@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_every_ring(method, layout, shape):
    axes = dict(ring=shape[0], context=shape[1])
    if method != "usp":
        axes = dict(data=1, context=shape[0])
    for seed, causal, packed, window in itertools.product(
        (1,), (True, False), (True, False), (None, 4)
    ):
        segments = draw_segments(seed) if packed else None
        mask = dict(causal=causal, window=window)
        with jax.enable_x64(True):
            inputs = layer_inputs(seed, h=8, hk=4, dtype="float64")
            got = run(inputs, axes, method, layout=layout, segment_ids=segments, **mask)
            assert_close(got, layer_oracle(*inputs, segment_ids=segments, **mask), 1e-12)


def test_all_heads_in_one_stage_are_ulysses():
    inputs = layer_inputs(4, h=8, hk=4)
    got = run(inputs, dict(context=4), "upipe", heads_per_stage=8)
    assert_close(got, run(inputs, dict(context=4), "ulysses"), 1e-6)


@pytest.mark.parametrize("method", ["ulysses", "ring", "allgather", "usp", "none"])
def test_projected_queries_and_keys(method):
    """`context_attention` is the attention of jaxlab; the mesh is that of `jax.set_mesh`."""
    random = np.random.default_rng(5)
    shapes = (2, 16, 4, 4), (2, 16, 2, 4), (2, 16, 2, 4)
    q, k, v = (jnp.asarray(random.standard_normal(s), "float32") for s in shapes)
    segments = draw_segments(6)
    mask = dict(segment_ids=jnp.asarray(segments), window=9, softcap=3.0)
    axes = dict(ring=2, context=4) if method == "usp" else dict(data=2, context=4)

    @functools.partial(quick_jit, static_argnums=0)
    def both(attend, *qkv):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, **mask), *qkv)
        return out, *pull(qkv[0])

    with jax.set_mesh(make_mesh(**axes)):
        got = both(functools.partial(context_attention, method=method), q, k, v)
    for x, y in zip(got, both(dense_attention, q, k, v), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * float(jnp.max(jnp.abs(y))))


@pytest.mark.parametrize("method", ["upipe", "upipe_ring"])
def test_any_sharding_of_the_arguments_inside_an_outer_jit(method):
    """Weights sharded over fsdp, tokens replicated; a checkpoint around the call; set_mesh."""
    *args, dy = layer_inputs(7, h=8, hk=4, d=8)
    ring = 2 if method == "upipe_ring" else 1
    mesh = make_mesh(fsdp=2, ring=ring, context=2, tensor=2 // ring)
    specs = P(), P("fsdp"), P("fsdp"), P(None, None, "fsdp"), P(None, None, "fsdp")
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(args, specs, strict=True)]

    @jax.jit
    def both(*args):
        layer = jax.checkpoint(lambda *a: attention_layer(*a, method=method))
        y, pull = jax.vjp(layer, *args)
        return y, *pull(dy)

    with jax.set_mesh(mesh):
        got = both(*placed)
    assert_close(got, layer_oracle(*args, dy), 1e-6)


def test_a_core_of_ones_own_is_called_once_a_stage_and_differentiated():
    """Also: types inside shard_map unchecked, as for kernels, give the gradients of checked ones."""
    calls = []

    def core(q, k, v, *, causal, scale, segment_ids, window, softcap):
        calls.append((q.shape, k.shape, causal, scale, window, softcap))
        assert segment_ids.shape == (1, 16)
        return dense_attention(
            q, k, v, causal=causal, scale=scale, segment_ids=segment_ids, window=window,
            softcap=softcap,
        )  # fmt: skip

    inputs = layer_inputs(8, h=8, hk=4)
    axes = dict(data=2, context=2, tensor=2)
    options = dict(segment_ids=draw_segments(9), window=7, softcap=4.0)
    got = run(inputs, axes, "upipe", core=core, heads_per_stage=2, **options)
    assert set(calls) == {((1, 16, 1, 4), (1, 16, 1, 4), True, 0.5, 7, 4.0)}
    assert_close(got, layer_oracle(*inputs, **options), 1e-6)
    assert_close(got, run(inputs, axes, "upipe", core="dense", heads_per_stage=2, **options), 1e-6)


def test_qk_norm_and_yarn_inside_a_stage():
    x, wq, wk, wv, wo, dy = layer_inputs(10, h=8, hk=4)
    gains = jnp.linspace(0.5, 2, 4), jnp.linspace(2, 0.5, 4)

    def both(method, axes):
        def layer(x, wq, gains):
            return attention_layer(
                x, wq, wk, wv, wo, mesh=axes and make_mesh(**axes), method=method,
                inv_freq=jnp.asarray(INV_FREQ), rope_factor=1.3, q_norm=gains[0], k_norm=gains[1],
                norm_eps=1e-3,
            )  # fmt: skip

        @quick_jit
        def run(*args):
            y, pull = jax.vjp(layer, *args)
            return y, *pull(dy)

        return run(x, wq, gains)

    got, plain = both("upipe", dict(context=4)), both("none", None)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.max(jnp.abs(b))))


# ---- what is sent, and how often attention is computed ----

H, HKV, D_HEAD, S, C = 32, 8, 4, 64, 8


def layer_and_step(method, heads_per_stage=None, axes=None, **options):
    """attention_layer of the spec's heads, its gradient, and the gradient with only y kept."""
    mesh = make_mesh(**(axes or dict(context=C)))

    def layer(*args):
        return attention_layer(
            *args, mesh=mesh, method=method, heads_per_stage=heads_per_stage, **options
        )

    def step(f):
        def both(*args):
            y, pull = jax.vjp(f, *args)
            return y, pull(y)

        return both

    keep = jax.checkpoint_policies.save_only_these_names("attn_y")
    args = layer_inputs(0, b=1, s=S, d=8, h=H, hk=HKV, k=D_HEAD)[:5]
    return layer, step(layer), step(jax.checkpoint(layer, policy=keep)), args


@pytest.mark.parametrize("u, stages, chunks", [(8, 4, 1), (16, 2, 1), (32, 1, 1), (None, 4, 1)])
def test_keys_are_sent_once_and_everything_three_times_a_step(u, stages, chunks):
    layer, step, kept, args = layer_and_step("upipe", u)
    unit = S // C * D_HEAD * 4
    calls = 2 * stages + 2 * chunks
    assert count_collectives(layer, *args) == {"all_to_all": (calls, (2 * H + 2 * HKV) * unit)}
    for f in (step, kept):
        assert count_collectives(f, *args)["all_to_all"] == (3 * calls, 240 * unit)


def test_several_chunks_of_keys_are_each_sent_once():
    layer, _, kept, args = layer_and_step("upipe", 4, dict(context=4))
    unit = S // 4 * D_HEAD * 4
    assert count_collectives(layer, *args) == {"all_to_all": (2 * 8 + 2 * 2, 80 * unit)}
    assert count_collectives(kept, *args)["all_to_all"] == (3 * 20, 240 * unit)


def test_other_methods_send_what_the_model_says():
    unit = S // C * D_HEAD * 4
    layer, step, kept, args = layer_and_step("ulysses")
    assert count_collectives(layer, *args) == {"all_to_all": (4, 80 * unit)}
    assert count_collectives(step, *args)["all_to_all"] == (8, 160 * unit)
    assert count_collectives(kept, *args)["all_to_all"] == (12, 240 * unit)
    layer, step, _, args = layer_and_step("ring")
    there, home = (C - 1) * 2 * HKV, C * 2 * HKV
    assert count_collectives(layer, *args) == {"ppermute": (C - 1, there * unit)}
    assert count_collectives(step, *args)["ppermute"] == (3 * C - 2, (2 * there + home) * unit)
    layer, *_, args = layer_and_step("allgather")
    assert count_collectives(layer, *args) == {"all_gather": (2, 2 * HKV * unit)}
    layer, *_, args = layer_and_step("usp", axes=dict(ring=2, context=4))
    # Keys of one device after the exchange: all its tokens, its heads.
    assert count_collectives(layer, *args) == {
        "all_to_all": (4, 80 * unit), "ppermute": (1, 2 * HKV * unit)
    }  # fmt: skip


@pytest.mark.parametrize("policy, forwards", [("nothing", (2, 2)), ("attn_out", (1, 2))])
def test_attention_runs_forward_twice_and_backward_once_a_stage(policy, forwards):
    """Marked by its cosine, which nothing else here computes, and its gradient, a sine."""

    @jax.custom_vjp
    def marked(q, k, v):
        return jnp.cos(q) + k + v

    def forward(q, k, v):
        out = jax.ad_checkpoint.checkpoint_name(jnp.cos(q) + k + v, "attn_out")
        return out, (q, out)

    marked.defvjp(forward, lambda saved, g: (g * jnp.sin(saved[0]) * saved[1],) * 3)

    def core(q, k, v, **_):
        return marked(q, k, v)

    _, *steps, args = layer_and_step("upipe", 8, core=core, stage_policy=policy)
    for step, times in zip(steps, forwards, strict=True):
        found = [e.primitive.name for e in equations(live(jax.make_jaxpr(step)(*args).jaxpr))]
        # The loop over stages is one body in each pass.
        assert (found.count("cos"), found.count("sin")) == (times, 1)


def test_the_mask_lets_a_ring_skip_and_rows_that_see_nothing_do_not_matter():
    """Segments that no other shard has: every visit but a rank's own is empty."""
    inputs = layer_inputs(11, h=2, hk=1)
    segments = np.repeat(np.arange(4), 4)[None].repeat(2, 0).astype(np.int32)
    got = run(inputs, dict(context=4), "ring", segment_ids=segments, causal=False)
    assert all(np.all(np.isfinite(x)) for x in got)
    assert_close(got, layer_oracle(*inputs, segment_ids=segments, causal=False), 1e-6)
    # What is skipped is not computed: nothing of the last rank reaches the others.
    poisoned = (inputs[0].at[:, 12:].set(jnp.nan), *inputs[1:])
    y = run(poisoned, dict(context=4), "ring", segment_ids=segments, causal=False)[0]
    assert_close([y[:, :12]], [got[0][:, :12]], 1e-6)


# ---- what is refused ----


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(core="cudnn", segment_ids=np.zeros((2, 16), np.int32)), "takes no segment_ids"),
        (dict(core="cudnn", softcap=2.0), "has no softcap=2.0"),
        (dict(core="cudnn"), "needs bfloat16 or float16"),
        (dict(core="splash"), "divisible by 128, got 16 and 4"),
        (dict(core="flash"), "core='flash' must be one of"),
        (dict(method="ring", core=blockwise_attention), "'ring' has attention of its own"),
        (dict(stage_policy="all"), "stage_policy='all' must be one of"),
        (dict(window=0), "window=0 must be an integer of at least 1"),
        (dict(positions=np.zeros((3, 16), int)), r"positions must be integers \(2, 16\)"),
        (dict(segment_ids=np.zeros((2, 4), int)), r"segment_ids must be \(2, 16\)"),
        (dict(method="upipe", heads_per_stage=6), "heads_per_stage=6 is not legal"),
        (dict(mesh=None), "needs a mesh"),
        (dict(inv_freq=[1.0] * 3), r"inv_freq must be \(2,\)"),
        (dict(window=2.5), "window=2.5 must be an integer"),
        (dict(window=True), "window=True must be an integer"),
        (dict(causal="no"), "causal='no' must be True or False"),
        (dict(segment_ids=np.zeros((2, 16))), "segment_ids must be integers, got float"),
        (dict(positions=np.zeros((2, 16))), "positions must be integers"),
        (dict(method="upipe", heads_per_stage=4.0), "heads_per_stage=4.0 must be an integer"),
        (dict(mesh={"context": 4}), "mesh must be a jax.sharding.Mesh or None, got dict"),
        (dict(mesh=jax.make_mesh((1,), ("context",))), "all must be AxisType.Auto"),
    ],
)
def test_arguments_that_cannot_work_are_refused_before_anything_runs(options, message):
    *args, _ = layer_inputs(12)
    with pytest.raises(ValueError, match=message):
        attention_layer(*args, **(dict(mesh=make_mesh(context=4), method="ulysses") | options))


def test_a_mesh_or_a_scale_of_another_program_is_refused():
    *args, _ = layer_inputs(15)
    mesh, other = make_mesh(context=4), make_mesh(context=2)
    layer = functools.partial(attention_layer, *args, mesh=mesh, method="ulysses")
    with (
        jax.set_mesh(other),
        pytest.raises(ValueError, match="{'context': 4} is not that of jax.set"),
    ):
        layer()
    inside = jax.shard_map(layer, mesh=mesh, in_specs=(), out_specs=P())
    with pytest.raises(ValueError, match="cannot be used inside one"):
        inside()
    for name in ("scale", "softcap"):
        with pytest.raises(ValueError, match=f"{name} must be known while tracing"):
            jax.make_jaxpr(lambda value, name=name: layer(**{name: value}))(0.5)


@pytest.mark.parametrize("method", ["upipe", "ring"])
def test_calls_are_mapped_over_an_axis(method):
    """Value and gradients of three layers at once, one by one."""
    three = [layer_inputs(seed, b=1, s=8, h=4, hk=4) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *three)

    def both(x, *rest):
        *weights, dy = rest
        layer = functools.partial(attention_layer, mesh=make_mesh(context=2), method=method)
        y, pull = jax.vjp(layer, x, *weights)
        return y, *pull(dy)

    got = quick_jit(jax.vmap(both))(*stacked)
    for i, inputs in enumerate(three):
        assert_close([a[i] for a in got], layer_oracle(*inputs), 1e-6)


def test_weights_that_do_not_fit_and_staged_attention_are_refused():
    x, wq, wk, wv, wo, _ = layer_inputs(13)
    with pytest.raises(ValueError, match=r"wo must be \(8, 4, 6\) for wq \(6, 8, 4\)"):
        attention_layer(x, wq, wk, wv, wo[:4])
    with pytest.raises(ValueError, match="method='upipe' needs attention_layer"):
        q = jnp.zeros((1, 8, 2, 4))
        context_attention(q, q, q, mesh=make_mesh(context=2), method="upipe")


def test_rings_take_values_as_wide_as_keys():
    q, v = jnp.zeros((1, 8, 2, 4)), jnp.zeros((1, 8, 2, 6))
    with pytest.raises(ValueError, match="v must have the head dim 4 of k, got 6"):
        context_attention(q, q, v, mesh=make_mesh(context=2), method="ring")
    assert context_attention(q, q, v, mesh=make_mesh(context=2), method="ulysses").shape == v.shape


def test_the_config_is_the_keywords():
    *args, _ = layer_inputs(14, h=8, hk=4)
    config = ContextConfig("upipe", 8, core="dense", stage_policy="attn_out")
    keywords = dict(
        method="upipe", heads_per_stage=8, layout="contiguous", core="dense",
        stage_policy="attn_out",
    )  # fmt: skip
    assert vars(config) == keywords
    # Concrete arrays too, one by one through autodiff.
    layer = functools.partial(attention_layer, mesh=make_mesh(context=4), **keywords)
    y, pull = jax.vjp(layer, *args)
    assert_close((y, *pull(args[0])), layer_oracle(*args, args[0]), 1e-6)
