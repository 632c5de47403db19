"""Recurrences and TTT on a sharded sequence equal those on one device; what they send is constant."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxlab import linear_attention as la
from jaxlab.ttt import LADDER, FastWeights, InnerConfig, ttt
from sharding.context import context_recurrence, context_ttt
from sharding.context.linear import RECURRENCES
from sharding.hlo import Module
from sharding.plan import count_collectives

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
MESHES = {
    "context 8": {"context": 8},
    "data 2, context 2, tensor 2": {"data": 2, "context": 2, "tensor": 2},
    "ring 2, context 4": {"ring": 2, "context": 4},
}


def mesh_of(sizes):
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), (AxisType.Auto,) * len(sizes))


def inputs(method, t, seed=0, b=2, h=2, d=4):
    keys = jax.random.split(jax.random.key(seed), 5)
    q, k, v = (jax.random.normal(key, (b, t, h, d)) for key in keys[:3])
    args = {"q": q, "k": k / jnp.linalg.norm(k, axis=-1, keepdims=True), "v": v}
    names = RECURRENCES[method][1]
    if "log_decay" in names:
        shape = (b, t, h, d) if method in ("gla", "kda") else (b, t, h)
        args["log_decay"] = -jax.random.exponential(keys[3], shape) / 4
    if "beta" in names:
        args["beta"] = jax.random.uniform(keys[4], (b, t, h))
    return args


def outputs_and_gradients(fn, args):
    def loss(args):
        out = fn(args)
        return jnp.sum(jnp.sin(out)), out

    (_, out), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(args)
    return {"out": out, **grads}


def assert_close(got, want, tolerance):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


def some(names, quick):
    """All names as parameters, those that are not quick marked as slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("documents", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("method", some(RECURRENCES, ("gated_delta_rule",)))
def test_recurrences_are_those_of_one_device(method, documents):
    """Outputs and gradients in float64; documents end inside shards, on their borders, or span some."""
    mesh = list(MESHES)[len(method) % 3]
    with jax.enable_x64(True):
        args = jax.tree.map(lambda x: x.astype(jnp.float64), inputs(method, 48))
        segments = None
        if documents:
            ids = [np.repeat([1, 2, 3, 4], n) for n in ((5, 1, 30, 12), (24, 6, 6, 12))]
            segments = jnp.asarray(np.stack(ids))
        how = {"segment_ids": segments, "chunk_size": 5}
        run, _ = RECURRENCES[method]
        want = outputs_and_gradients(lambda args: run(**args, **how, impl="recurrent")[0], args)
        sharded = functools.partial(context_recurrence, method, mesh=mesh_of(MESHES[mesh]), **how)
        assert_close(outputs_and_gradients(lambda args: sharded(**args)[0], args), want, 1e-11)


FORMS = {
    "all": (("log_decay", "momentum", "rate_in", "rate_out"), "SM", {}),
    "exclusive": (("log_decay", "momentum", "rate_out"), "SM", {"visibility": "exclusive"}),
    "exclusive, no momentum": (("log_decay", "rate_in", "rate_out"), "S", {"visibility": "exclusive"}),
    "lone buffer": (("rate_out",), "SM", {"scale": 1.0, "impl": "scan"}),
    "normalised": (("log_decay",), "Sz", {"feature_map": "softplus", "normalize": True}),
    "gla": (("log_decay",), "S", {}),
    "delta_rule": (("beta",), "S", {}),
    "kda": (("log_decay", "beta"), "S", {"scale": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("documents", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("form", some(FORMS, ("kda",)))
def test_every_option_is_sharded_with_its_states(form, documents):
    """Outputs, final states and all gradients in float64, initial states and M among the inputs."""
    gates, states, how = FORMS[form]
    method = form if form in RECURRENCES else "linear_attention"
    with jax.enable_x64(True):
        args = inputs("kda" if "beta" in gates else "linear_attention", 24)
        args = {n: args[n] for n in "qkv"} | (
            inputs(method, 24) if method != "linear_attention" else {}
        )
        keys = dict(
            zip(
                ("momentum", "rate_in", "rate_out", "log_decay", *"SMz"),
                jax.random.split(jax.random.key(9), 7),
                strict=True,
            )
        )
        for name in gates:
            if name not in args:
                drawn = jax.random.uniform(keys[name], (2, 24, 2), minval=0.1)
                args[name] = -drawn if name == "log_decay" else drawn
        args["start"] = {
            n: jax.random.uniform(keys[n], (2, 2, 4) if n == "z" else (2, 2, 4, 4)) for n in states
        }
        args = jax.tree.map(lambda x: x.astype(jnp.float64), args)
        ids = np.stack([np.repeat([1, 2, 3, 4], n) for n in ((5, 1, 7, 11), (12, 3, 1, 8))])
        how = how | {"segment_ids": jnp.asarray(ids) if documents else None, "chunk_size": 2}

        def call(fn, args, **more):
            args = dict(args)
            state = la.LinAttnState(**args.pop("start"))
            out, after = fn(**args, initial_state=state, **(how | more))
            return jnp.concatenate([x.ravel() for x in (out, *after) if x is not None])

        run, _ = RECURRENCES[method]
        want = outputs_and_gradients(lambda args: call(run, args, impl="recurrent"), args)
        sharded = functools.partial(
            context_recurrence, method, mesh=mesh_of(MESHES["ring 2, context 4"])
        )
        assert_close(outputs_and_gradients(lambda args: call(sharded, args), args), want, 1e-11)


def test_a_linear_recurrence_needs_no_decay_and_keeps_types():
    args = inputs("linear_attention", 16)
    args.pop("log_decay")
    args = jax.tree.map(lambda x: x.astype(jnp.bfloat16), args)
    want = RECURRENCES["linear_attention"][0](**args)[0]
    got, _ = context_recurrence("linear_attention", **args, mesh=mesh_of({"context": 4}))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got), np.float32(want), atol=2e-2)
    with jax.set_mesh(mesh_of({"context": 4})):
        again = jax.jit(functools.partial(context_recurrence, "linear_attention"))(**args)[0]
    np.testing.assert_array_equal(np.float32(again), np.float32(got))
    alone = context_recurrence("linear_attention", **args)[0]
    np.testing.assert_array_equal(np.float32(alone), np.float32(want))


def ttt_inputs(cfg, t, b=2, h=2, d=4, dh=6):
    keys = jax.random.split(jax.random.key(1), 8)
    normal = lambda i, *shape: jax.random.normal(keys[i], shape)  # noqa: E731
    q, k, v = (normal(i, b, t, h, d) for i in range(3))
    # Of length one, as the layer makes them.
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    inner = d if cfg.net == "linear" else dh
    fw = FastWeights(normal(3, h, d, dh), normal(4, h, inner, d), normal(5, h, d, dh))
    rates = 0.3 * jax.nn.softplus(normal(6, b, t, h, 3))
    momentum = jax.nn.sigmoid(normal(7, b, t, h))
    return {"q": q, "k": k, "v": v, "fw": fw, "rates": rates, "momentum": momentum}


SMALL = {name: dataclasses.replace(cfg, chunk_size=4) for name, cfg in LADDER.items()}
CONFIGS = {
    "base": dataclasses.replace(SMALL["base"], chunk_size=8),
    "V1p": SMALL["V1p"],
    "V2": SMALL["V2"],
    "V6": SMALL["V6"],
    "V3, learns first, ascent": dataclasses.replace(
        SMALL["V3"], visibility="inclusive_chunk", sign=-1
    ),
    # Without orthogonalisation: with it, many steps on the error are chaotic, gradients 1e7.
    "squared, steps, q<-k": InnerConfig(
        loss="squared",
        steps=2,
        chunk_size=4,
        query="k",
        visibility="inclusive_chunk",
        orthogonalize=None,
    ),
}
MESH_OF = {"base": "ring 2, context 4", "V2": "context 8"}


@pytest.mark.parametrize("name", some(CONFIGS, ("V1p",)))
def test_ttt_is_that_of_one_device(name):
    cfg, mesh = CONFIGS[name], mesh_of(MESHES[MESH_OF.get(name, "data 2, context 2, tensor 2")])
    with jax.enable_x64(True):
        args = jax.tree.map(lambda x: x.astype(jnp.float64), ttt_inputs(cfg, 64))
        alone = lambda args: ttt(**args, cfg=cfg, impl="recurrent", return_state=False)[0]  # noqa: E731
        want = outputs_and_gradients(alone, args)
        got = outputs_and_gradients(lambda args: context_ttt(**args, cfg=cfg, mesh=mesh), args)
        assert_close(got, want, 1e-9)


def moved_bytes(fn, args):
    """Bytes of every collective of the gradient."""
    gradient = jax.grad(lambda args: jnp.sum(jnp.sin(fn(**args))))
    return {n: moved for n, (_, moved) in count_collectives(gradient, args).items()}


@pytest.mark.parametrize(
    "name",
    some([*RECURRENCES, "momentum", "V1p", "V2", "V6"], ("gated_delta_rule", "V1p")),
)
def test_what_is_sent_does_not_depend_on_the_length(name):
    mesh = mesh_of(MESHES["context 8"])
    if name in RECURRENCES:
        sharded = lambda **args: context_recurrence(name, **args, mesh=mesh)[0]  # noqa: E731
        short, long = (inputs(name, t) for t in (64, 256))
    elif name == "momentum":
        run = functools.partial(context_recurrence, "linear_attention", mesh=mesh)

        def sharded(**args):
            return jnp.concatenate([x.ravel() for x in jax.tree.leaves(run(**args))])

        short, long = (
            inputs("linear_attention", t)
            | {
                "momentum": jnp.ones((2, t, 2)),
                "rate_out": jnp.ones((2, t, 2)),
                "segment_ids": jnp.ones((2, t)),
            }
            for t in (64, 256)
        )
    else:
        sharded = functools.partial(context_ttt, cfg=SMALL[name], mesh=mesh)
        short, long = (ttt_inputs(SMALL[name], t) for t in (64, 256))
    first, second = moved_bytes(sharded, short), moved_bytes(sharded, long)
    assert first == second and sum(first.values()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*RECURRENCES, "V1p", "V2", "V6"])
def test_compiled_programs_send_as_much_for_any_length(name):
    mesh = mesh_of(MESHES["context 8"])

    def sent(t):
        if name in RECURRENCES:
            fn = lambda **args: context_recurrence(name, **args, mesh=mesh)[0]  # noqa: E731
            args = inputs(name, t)
        else:
            fn, args = (
                functools.partial(context_ttt, cfg=SMALL[name], mesh=mesh),
                ttt_inputs(SMALL[name], t),
            )
        gradient = jax.jit(jax.grad(lambda args: jnp.sum(jnp.sin(fn(**args)))))
        found = Module(gradient.lower(args).compile().as_text()).collectives()
        return sum(c.calls * c.bytes for c in found)

    assert sent(64) == sent(256) > 0


def test_spread_chunks_send_their_tokens_once_each_way_and_gradients_a_chunk():
    """Full LaCT: 4 arrays of tokens there, one back, and three matrices and a gate a chunk."""
    cfg, mesh = CONFIGS["base"], mesh_of(MESHES["context 8"])
    for t in (64, 128):
        sent = count_collectives(
            lambda args: context_ttt(**args, cfg=cfg, mesh=mesh), ttt_inputs(cfg, t)
        )
        width, chunks, rows = 3 * 4 + 3 + 1 + 4, t // 8, 2 * 2
        assert sent["all_to_all"][1] == 4 * rows * t // 8 * width
        summed = sum(sent[n][1] for n in sent if n.startswith("psum"))
        assert summed == 4 * rows * chunks * (3 * 24 + 1)


def test_what_cannot_be_sharded_says_why():
    mesh = mesh_of(MESHES["context 8"])
    qkv = lambda t: [jnp.ones((1, t, 1, 2))] * 3  # noqa: E731

    def sharded_ttt(name, t, **changes):
        cfg = dataclasses.replace(SMALL[name], **changes)
        return lambda: context_ttt(**ttt_inputs(cfg, t), cfg=cfg, mesh=mesh)

    assert context_recurrence("linear_attention", *qkv(0), mesh=mesh)[0].shape == (1, 0, 1, 2)
    for call, message in (
        (lambda: context_recurrence("rnn", *qkv(8), mesh=mesh), "method='rnn' must be one of"),
        (lambda: context_recurrence("gla", *qkv(8), mesh=mesh), "log_decay is missing"),
        (
            lambda: context_recurrence("linear_attention", *qkv(12), mesh=mesh),
            r"length 12 is not divisible by context = 8; nearest: \[8, 16\]",
        ),
        (sharded_ttt("V2", 48), "multiple of 8 shards . chunk_size=4 = 32"),
        (sharded_ttt("base", 64), "chunk_size one of 8"),
        (sharded_ttt("V6", 64, visibility="token"), "use context_recurrence"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
