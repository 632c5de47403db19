"""What a TTT layer is: who sees whom, which variants coincide, sharding, compilation, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ttt_cases import (
    CASES,
    INCLUSIVE,
    TOKEN,
    assert_close,
    assert_trees_close,
    config,
    inputs,
    quick_jit,
    replace,
)

from jaxlab.linear_attention import linear_attention
from jaxlab.ttt import LADDER, FastWeights, InnerConfig, init_ttt_state, ttt, ttt_apply, ttt_step

pytestmark = pytest.mark.slow


def test_an_exclusive_chunk_sees_earlier_chunks_only():
    cfg = config("base")
    args = inputs(9, cfg, dtype="float32")
    run = quick_jit(functools.partial(ttt, cfg=cfg))
    out = run(*args)[0]
    for at in (0, 5, 10):
        k, v = (x.at[:, at].add(1.0) for x in args[1:3])
        changed = np.any(run(args[0], k, v, *args[3:])[0] != out, axis=(0, 2, 3))
        assert not changed[: at // 4 * 4 + 4].any() and changed[at // 4 * 4 + 4 :].all()


def test_token_visibility_is_causal_and_its_chunk_size_means_nothing():
    cfg = config("V2", **TOKEN)
    with jax.enable_x64(True):
        args = inputs(10, cfg)
        out = ttt(*args, cfg)[0]
        for size in (1, 3, 64):
            assert_close(ttt(*args, replace(cfg, chunk_size=size))[0], out, 1e-12)
        k = args[1].at[:, 5].add(1.0)
        changed = np.any(ttt(args[0], k, *args[2:], cfg)[0] != out, axis=(0, 2, 3))
        assert changed.tolist() == [False] * 5 + [True] * 6
        assert np.any(np.abs(ttt(*args, config("V2", orthogonalize=None))[0] - out) > 0.1)


@pytest.mark.parametrize("visibility", ["exclusive", "token"])
def test_v6_is_linear_attention(visibility):
    cfg = config("V6", chunk_size=1, visibility=visibility)
    with jax.enable_x64(True):
        q, k, v, fw, *_ = inputs(11, cfg)
        expected, state = linear_attention(
            q,
            k,
            v,
            scale=1.0,
            initial_state=jnp.broadcast_to(fw.w1, (2, 2, 3, 4)),
            visibility=visibility,
        )
        out, after = ttt(q, k, v, fw, cfg=cfg)
        assert_close(out, expected, 1e-12)
        if visibility == "token":
            assert_close(after.fw.w1, state.S, 1e-12)


def test_steps_of_the_ladder_coincide_where_they_should():
    with jax.enable_x64(True):
        args = q, k, v, fw, rates, mu = inputs(12, config("base"))
        run = lambda *args, **kwargs: ttt(*args, **kwargs)[0]  # noqa: E731
        frozen = rates.at[..., 0].set(0).at[..., 2].set(0)
        no_norm = config("base", weight_norm=None)
        assert_close(run(q, k, v, fw, frozen, mu, no_norm), run(*args, config("V2")), 1e-12)
        line = FastWeights(None, fw.w1[:, :3], None)
        assert_close(
            run(q, k, v, line, rates, 0 * mu, config("V4")),
            run(q, k, v, line, cfg=config("V5")),
            1e-12,
        )
        v5 = config("V5", orthogonalize=None)
        assert v5 == config("V6")
        ignored = FastWeights(fw.w0, line.w1, fw.w2)
        assert_close(run(q, k, v, ignored, cfg=v5), run(q, k, v, line, cfg=v5), 0)


def test_ascent_is_descent_on_negated_values():
    cfg = config("V2", orthogonalize=None)
    with jax.enable_x64(True):
        q, k, v, fw, rates, mu = inputs(13, cfg)
        up = ttt(q, k, v, fw, rates, mu, replace(cfg, sign=-1))[0]
        assert_close(up, ttt(q, k, -v, fw, rates, mu, cfg)[0], 1e-12)


def test_query_k_ignores_q():
    for cfg in (config("base", query="k"), config("V2", query="k", **TOKEN)):
        q, k, v, fw, rates, mu = inputs(14, cfg, dtype="float32")
        loss = lambda q, k, cfg=cfg, rest=(v, fw, rates, mu): jnp.sum(  # noqa: E731
            ttt(q, k, *rest, cfg)[0] ** 2
        )
        to_q, to_k = quick_jit(jax.grad(loss, (0, 1)))(q, k)
        assert not np.any(to_q) and np.any(to_k)


def test_squared_error_falls_with_steps_and_dot_steps_are_a_larger_rate():
    with jax.enable_x64(True):
        cfg = config("base", loss="squared", chunk_size=11, momentum=False, orthogonalize=None,
                     weight_norm=None, **INCLUSIVE)  # fmt: skip
        q, k, v, fw, rates, _ = inputs(15, cfg)
        losses = [np.sum((ttt(k, k, v, fw, 0 * rates, cfg=cfg)[0] - v) ** 2)]
        for steps in (1, 2, 4, 8):
            out = ttt(k, k, v, fw, 0.01 * rates, cfg=replace(cfg, steps=steps))[0]
            losses.append(np.sum((out - v) ** 2))
        assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
        dot = replace(cfg, loss="dot", update=("w1",))
        for impl in ("recurrent", "parallel"):
            many = ttt(q, k, v, fw, rates, cfg=replace(dot, steps=3), impl=impl)[0]
            assert_close(many, ttt(q, k, v, fw, 3 * rates, cfg=dot)[0], 1e-12)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-14), ("float32", 1e-6)])
def test_post_norm_keeps_the_norm_of_every_output_channel(dtype, tolerance):
    """W / (|W| + 1e-5) misses by 1e-5 / |W|, |W| being that of the sum before the division."""
    cfg = config("base", momentum=False, **INCLUSIVE)
    with jax.enable_x64(dtype == "float64"):
        q, k, v, fw, rates, _ = inputs(16, cfg, t=12, dtype=dtype)
        state, given = init_ttt_state(fw, 2, cfg), fw
        learn = quick_jit(lambda state, part: ttt(*part[:3], state, part[3], None, cfg)[1])
        unnormalised = replace(cfg, weight_norm=None)
        add = quick_jit(lambda fw, part: ttt(*part[:3], fw, part[3], None, unnormalised)[1].fw)
        for start in (0, 4, 8):
            part = [x[:, start : start + 4] for x in (q, k, v, rates)]
            sums, state = add(state.fw, part), learn(state, part)
            for name in FastWeights._fields:
                norm, total, first = (
                    np.linalg.norm(np.asarray(getattr(w, name), np.float64), axis=-2)
                    for w in (state.fw, sums, given)
                )
                expected = first * total / (total + 1e-5)
                np.testing.assert_allclose(norm, expected, rtol=tolerance)


def test_inside_shard_map_outputs_and_gradients_are_those_outside():
    """Batch over one axis, heads over the other."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (AxisType.Auto,) * 2)
    specs = (*(P("data", None, "tensor"),) * 3, P("tensor"), *(P("data", None, "tensor"),) * 2)
    for name, impl in (("base", "recurrent"), ("V1p", "parallel")):
        cfg = config(name)
        args = inputs(17, cfg, h=4, dtype="float32")
        local = lambda *args, cfg=cfg, impl=impl: ttt(*args, cfg, impl=impl)[0]  # noqa: E731
        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=specs, out_specs=P("data", None, "tensor")
        )
        both = lambda f: quick_jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), range(6)))  # noqa: E731
        assert_trees_close(both(sharded)(*args), both(local)(*args), 1e-4)


def test_inside_shard_map_replicated_weights_get_the_sum_of_gradients():
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])
    tokens = P("data")
    for case in ("base plain", "V1p", "V2 token", "affine"):
        cfg, sizes = CASES[case]
        args = inputs(18, cfg, dtype="float32", **{**sizes, "b": 2})
        local = lambda *args, cfg=cfg: ttt(*args, cfg)[0]  # noqa: E731
        specs = (tokens, tokens, tokens, P(), tokens, tokens)
        sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=tokens)
        loss = lambda *args, f: jnp.sum(jnp.sin(f(*args)))  # noqa: E731
        grad = lambda f, args=args, loss=loss: quick_jit(  # noqa: E731
            jax.grad(functools.partial(loss, f=f), range(6))
        )(*args)
        assert_trees_close(grad(sharded), grad(local), 1e-4)


def test_one_compilation_a_shape():
    cfg, traces = config("base"), []

    @functools.partial(jax.jit, static_argnames="cfg")
    def run(*args, cfg):
        traces.append(cfg)
        return ttt(*args, cfg)

    args = inputs(19, cfg, dtype="float32")
    for seed in range(3):
        run(*inputs(seed, cfg, dtype="float32"), cfg=config("base"))
    assert len(traces) == 1
    run(*args, cfg=config("base", update=["w2", "w1", "w0"]))
    assert len(traces) == 1


@pytest.mark.parametrize("name, impl", [("base", "recurrent"), ("V1p", "parallel")])
def test_memory_of_gradients_holds_weights_of_chunks_not_of_tokens(name, impl):
    cfg, d, t = config(name, chunk_size=128), 64, 1024
    shapes = jax.eval_shape(
        lambda: inputs(0, cfg, b=1, t=t, h=1, dk=d, dv=d, dh=d, dtype="float32")
    )
    loss = lambda *args: jnp.sum(ttt(*args, cfg, impl=impl)[0])  # noqa: E731
    compiled = jax.jit(jax.grad(loss, range(6))).lower(*shapes).compile()
    per_token = t * d * d * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * per_token


# Errors: each names its argument before anything is computed.

CFG = config("base")
V2 = config("V2")


def call(cfg=CFG, impl="auto", **changes):
    """`ttt` on inputs of which some are replaced, by a value or by what a function makes of them."""
    names = ("q", "k", "v", "fw", "rates", "momentum")
    args = dict(zip(names, inputs(0, CFG, dtype="float32"), strict=True))
    for name, change in changes.items():
        args[name] = change(args[name]) if callable(change) else change
    return ttt(**args, cfg=cfg, impl=impl)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(q=lambda x: x[0]), "q has shape"),
        (dict(k=lambda x: x[..., :2]), "k has shape"),
        (dict(k=lambda x: x[:, :5]), "k has shape"),
        (dict(v=lambda x: x[:, :, :1]), "v has shape"),
        (dict(v=lambda x: x[:1]), "v has shape"),
        (dict(rates=lambda x: x[..., :2]), "rates has shape"),
        (dict(rates=lambda x: x[:, :3]), "rates has shape"),
        (dict(momentum=lambda x: x[..., None]), "momentum has shape"),
        (dict(fw=lambda w: w._replace(w0=None)), "fw.w0 has None"),
        (dict(fw=lambda w: w._replace(w1=w.w1[..., :2])), "fw.w1 has shape"),
        (dict(fw=lambda w: w._replace(w2=w.w2[..., :2])), "fw.w2 has shape"),
        (dict(fw=lambda w: w._replace(w1=w.w1[:1])), "fw.w1 has shape"),
        (dict(cfg=config("V3")), r"fw.w1 of a linear net has shape .* \(2, 3, 4\)"),
        (dict(impl="fast"), "impl='fast' must be one of"),
        (dict(impl="parallel"), "update=.*features must stand still"),
        (dict(impl="parallel", cfg=config("V1")), "weight_norm='post' makes the state no sum"),
        (dict(impl="parallel", cfg=replace(V2, loss="squared")), "use impl='affine'"),
        (dict(impl="parallel", cfg=replace(V2, steps=2)), "not associative"),
        (dict(impl="parallel", cfg=replace(V2, steps=2, orthogonalize=None)), "not associative"),
        (dict(impl="affine"), "impl='affine' is impossible: it needs net='linear'"),
        (dict(impl="affine", cfg=config("V3", loss="squared")), "it needs momentum=False"),
        (dict(cfg=replace(CFG, visibility="token")), "'token' is impossible: it needs update"),
        (dict(cfg=replace(V2, visibility="token")), "'token' is impossible: it needs steps=1"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_tokens_that_are_not_floating_and_weights_of_another_kind_are_type_errors():
    for name in "qkv":
        with pytest.raises(TypeError, match=f"{name} has dtype int32"):
            call(**{name: lambda x: x.astype("int32")})
    with pytest.raises(TypeError, match="fw is a tuple"):
        call(fw=tuple)
    with pytest.raises(TypeError, match="q has dtype"):
        ttt_apply(inputs(0, CFG, dtype="float32")[3], jnp.ones((2, 3, 2, 3), int), CFG)


@pytest.mark.parametrize(
    "field, value",
    [
        ("net", "mlp"), ("loss", "l1"), ("update", ("w3",)), ("update", "w1"), ("update", 3),
        ("visibility", "all"),
        ("chunk_size", 0), ("chunk_size", 2.0), ("chunk_size", True), ("steps", 0), ("ns_steps", 6),
        ("ns_steps", -1), ("orthogonalize", "svd"), ("weight_norm", "both"), ("sign", 0),
        ("query", "v"), ("momentum", None), ("token_rates", 1), ("detach_norm", "no"),
    ],
)  # fmt: skip
def test_a_configuration_checks_its_values(field, value):
    with pytest.raises(ValueError, match=field):
        replace(InnerConfig(), **{field: value})


def test_a_configuration_is_a_value():
    assert hash(InnerConfig(update=iter(["w2", "w0"]))) == hash(InnerConfig(update=("w0", "w2")))
    assert replace(InnerConfig(), orthogonalize="muon", ns_steps=9).ns_steps == 9
    assert {f.name for f in dataclasses.fields(InnerConfig)} == set(
        dataclasses.asdict(LADDER["V6"])
    )
    settings = lambda name: [  # noqa: E731
        getattr(LADDER[name], field)
        for field in ("net", "update", "weight_norm", "token_rates", "momentum", "orthogonalize")
    ]
    every = ("w0", "w1", "w2")
    assert {name: settings(name) for name in LADDER} == {
        "base": ["swiglu", every, "post", True, True, "lact"],
        "V1": ["swiglu", ("w1",), "post", True, True, "lact"],
        "V1p": ["swiglu", ("w1",), "pre", True, True, "lact"],
        "V2": ["swiglu", ("w1",), None, True, True, "lact"],
        "V3": ["linear", ("w1",), None, True, True, "lact"],
        "V4": ["linear", ("w1",), None, False, True, "lact"],
        "V5": ["linear", ("w1",), None, False, False, "lact"],
        "V6": ["linear", ("w1",), None, False, False, None],
    }
    assert LADDER["base"] == InnerConfig()


def test_states_are_checked_against_the_call():
    args = inputs(0, CFG, dtype="float32")
    q, k, v, fw, rates, mu = args
    _, state = ttt(*args, CFG)
    with pytest.raises(ValueError, match="3 tokens into a chunk of chunk_size=4"):
        ttt(q, k, v, state, rates, mu, CFG)
    token = (q[:, 0], k[:, 0], v[:, 0], rates[:, 0], mu[:, 0])
    with pytest.raises(ValueError, match="3 tokens into a chunk, at most chunk_size=2"):
        ttt_step(state, *token, replace(CFG, chunk_size=2))
    _, state = ttt(q[:, :8], k[:, :8], v[:, :8], fw, rates[:, :8], mu[:, :8], CFG)
    with pytest.raises(ValueError, match="steps=2 cannot continue"):
        two = replace(CFG, steps=2)
        ttt(q, k, v, init_ttt_state(fw, 2, two), rates, mu, two)
    with pytest.raises(ValueError, match="made for another cfg"):
        ttt(q, k, v, state, rates, mu, V2)
    with pytest.raises(ValueError, match="fw.w"):
        ttt(q[:1], k[:1], v[:1], state, rates[:1], mu[:1], CFG)
    with pytest.raises(ValueError, match="state.fw.w0 has shape"):
        ttt_step(init_ttt_state(fw, 3, CFG), *token, CFG)
    for cfg in (replace(CFG, visibility="inclusive_chunk"), replace(CFG, steps=2)):
        with pytest.raises(ValueError, match="ttt_step is possible with"):
            ttt_step(state, *token, cfg)
    for bad, name in ((token[0][:, :1], "q"), (token[0][0], "q")):
        with pytest.raises(ValueError, match=f"(k|{name}) has shape"):
            ttt_step(state, bad, *token[1:], CFG)
    with pytest.raises(ValueError, match="rate has shape"):
        ttt_step(state, *token[:3], rates, mu[:, 0], CFG)
    with pytest.raises(ValueError, match="batch=-1"):
        init_ttt_state(fw, -1, CFG)
    with pytest.raises(ValueError, match="fw.w1 has shape"):
        init_ttt_state(FastWeights(*(x[0] for x in fw)), 2, CFG)


def test_nothing_in_nothing_out():
    for cfg in (CFG, config("V1p", **INCLUSIVE), config("V6", **TOKEN)):
        q, k, v, fw, rates, mu = inputs(0, cfg, t=0, dtype="bfloat16")
        out, state = ttt(q, k, v, fw, rates, mu, cfg)
        assert out.shape == v.shape and out.dtype == v.dtype
        assert_trees_close(state, init_ttt_state(fw, 2, cfg), 0)
        assert ttt(q, k, v, fw, rates, mu, cfg, return_state=False)[1] is None
    for impl in ("recurrent", "parallel"):
        args = inputs(1, V2, dtype="float32")
        out, state = ttt(*args, V2, impl=impl, return_state=False)
        assert state is None
        assert_close(out, ttt(*args, V2)[0], 1e-5)
