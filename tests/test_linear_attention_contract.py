"""Linear attention: steps, splitting, causality, strong gates, types, memory, shard_map, errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxlab import linear_attention as la

pytestmark = pytest.mark.slow

B, T, H, K, V = 2, 9, 2, 3, 4
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RELATIVES = {
    "gla": ("channel",),
    "delta_rule": ("beta",),
    "gated_delta_rule": ("token", "beta"),
    "kda": ("channel", "beta"),
}
READINGS = (
    {},
    {"visibility": "exclusive"},
    {"normalize": True, "feature_map": "elu1"},
)
METHODS = ("linear_attention", *RELATIVES)
every = pytest.mark.parametrize("method", METHODS)


def slow(case):
    return pytest.param(case, marks=pytest.mark.slow)


forms = pytest.mark.parametrize("impl", [slow("recurrent"), "chunkwise", slow("scan")])


def draw(method, seed=0, t=T, b=B, h=H, dk=K, dv=V, dtype="float32"):
    """q, k, v and the gates of a relative; keys of norm 1."""
    random = np.random.default_rng(seed)
    q, k, v = (random.standard_normal((b, t, h, d)) for d in (dk, dk, dv))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    gates = {
        "channel": -random.exponential(size=(b, t, h, dk)),
        "token": -random.exponential(size=(b, t, h)),
        "beta": random.uniform(0, 1, (b, t, h)),
    }
    args = [q, k, v, *(gates[name] for name in RELATIVES.get(method, ()))]
    return [jnp.asarray(x, dtype) for x in args]


def rates(seed=0, t=T):
    random = np.random.default_rng(seed)
    uniform = lambda low=0.0: jnp.asarray(random.uniform(low, 1, (B, t, H)), "float32")  # noqa: E731
    return dict(log_decay=-uniform(), momentum=uniform(), rate_in=uniform(-1), rate_out=uniform(-1))


def close(x, y, tolerance=2e-6):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.max(np.abs(x - y), initial=0) <= tolerance * max(1, np.max(np.abs(y), initial=0))


@pytest.mark.parametrize("options", READINGS, ids=str)
@every
def test_steps_and_pieces_are_the_whole(method, options):
    """Prefill in two pieces, and token by token as a scan, equal one run; state keeps its type."""
    if method != "linear_attention" and options:
        pytest.skip("the relatives read inclusively")
    args, gates = draw(method), {}
    if method == "linear_attention" and not options.get("normalize"):
        gates = rates()
    fn, step = getattr(la, method), getattr(la, f"{method}_step")
    momentum, normalize = "momentum" in gates, bool(options.get("normalize"))
    start = la.init_state(B, H, K, V, momentum=momentum, normalize=normalize)
    run = quick_jit(functools.partial(fn, chunk_size=4, **options))
    whole, final = run(*args, **gates, initial_state=start)
    cut = lambda part: ([x[:, part] for x in args], {n: x[:, part] for n, x in gates.items()})  # noqa: E731
    state, pieces = start, []
    for part in (slice(0, 4), slice(4, 5), slice(5, None)):
        a, g = cut(part)
        out, state = run(*a, **g, initial_state=state)
        pieces.append(out)

    def body(state, token):
        return step(state, *token[0], **token[1], **options)

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (args, gates))
    last, outs = jax.lax.scan(body, start, tokens)
    for out, end in ((jnp.concatenate(pieces, 1), state), (jnp.moveaxis(outs, 0, 1), last)):
        close(out, whole)
        assert jax.tree.map(jnp.shape, end) == jax.tree.map(jnp.shape, start)
        jax.tree.map(close, end, final)


@pytest.mark.parametrize("impl", ["recurrent", "chunkwise", "scan", "parallel"])
@pytest.mark.parametrize("visibility", ["token", "exclusive"])
def test_a_token_changes_nothing_before_it(impl, visibility):
    args, gates = draw("linear_attention"), rates()
    run = lambda args, gates: la.linear_attention(  # noqa: E731
        *args, **gates, impl=impl, chunk_size=4, visibility=visibility
    )[0]
    at = 5
    changed = [x.at[:, at].add(1) for x in args[1:]]
    other = {name: x.at[:, at].multiply(0.5) for name, x in gates.items()}
    difference = run([args[0], *changed], other) - run(args, gates)
    first = at + (visibility == "exclusive")
    close(difference[:, :first], 0 * difference[:, :first], 1e-6)
    assert np.all(np.max(np.abs(difference[:, first]), -1) > 1e-4)


@forms
@every
def test_strong_decay_zero_keys_and_no_momentum_have_finite_gradients(method, impl):
    args, gates = draw(method), rates() if method == "linear_attention" else {}
    args[1] = args[1].at[:, 3].set(0)

    def loss(args, gates):
        out, state = getattr(la, method)(*args, **gates, impl=impl, chunk_size=4)
        return jnp.sum(out**2) + jnp.sum(state.S**2)

    grad = quick_jit(jax.grad(loss, (0, 1)))
    for decay in (-40.0, -1e30, -np.inf):
        if gates:
            gates["momentum"] = 0 * gates["momentum"]
            gates["log_decay"] = gates["log_decay"].at[:, 2:6].set(decay)
        elif method != "delta_rule":
            args[3] = args[3].at[:, 2:6].set(decay)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grad(args, gates)))


@every
def test_narrow_inputs_are_summed_in_float32(method):
    narrow = draw(method, t=40, dtype="bfloat16")
    wide = [x.astype("float32") for x in narrow]
    fn = functools.partial(getattr(la, method), chunk_size=16)
    (out, state), (expected, final) = fn(*narrow), fn(*wide)
    assert out.dtype == jnp.bfloat16 and state.S.dtype == jnp.float32
    close(out, expected, 2**-8)
    close(state.S, final.S)
    grads = jax.grad(lambda q: jnp.sum(fn(q, *narrow[1:])[0]).astype("float32"))(narrow[0])
    assert grads.dtype == jnp.bfloat16


@pytest.mark.slow
def test_a_run_of_many_chunks_keeps_float32_accuracy():
    """Momentum near 0.5 over 128 chunks, where dividing by cumulative products has lost all."""
    args = draw("linear_attention", t=512, b=1, h=1)
    random = np.random.default_rng(0)
    gates = {"momentum": jnp.asarray(random.uniform(0.4, 0.6, (1, 512, 1)), "float32")}
    run = lambda impl: la.linear_attention(*args, **gates, impl=impl, chunk_size=4)[0]  # noqa: E731
    expected = run("recurrent")
    for impl in ("chunkwise", "scan", "parallel"):
        close(run(impl), expected, 1e-5)


def test_the_delta_rule_retrieves_and_agrees_with_its_neighbours():
    with jax.enable_x64(True):
        q, k, v, beta = draw("delta_rule", dtype="float64")
        one = jnp.ones_like(beta)
        state = la.init_state(B, H, K, V, dtype=jnp.float64)
        for i in range(T):
            state, _ = la.delta_rule_step(state, q[:, i], k[:, i], v[:, i], one[:, i])
            close(jnp.einsum("bhk,bhkv->bhv", k[:, i], state.S), v[:, i], 1e-13)
        out, _ = la.delta_rule(q, k, v, beta)
        close(la.gated_delta_rule(q, k, v, 0 * beta, beta)[0], out, 1e-13)
        close(la.kda(q, k, v, 0 * k, beta)[0], out, 1e-13)
        # Orthonormal keys: nothing to correct.
        eye = jnp.broadcast_to(jnp.eye(K)[None, :, None], (B, K, H, K))
        head = [x[:, :K] for x in (q, eye, v, beta)]
        close(la.delta_rule(*head)[0], la.linear_attention(*head[:3], rate_in=head[3])[0], 1e-13)
        # A small beta leaves gated linear attention, with an error of second order.
        g = -jnp.abs(q[..., 0])
        gap = []
        for small in (1e-3, 1e-4):
            plain = la.linear_attention(q, k, v, log_decay=g, rate_in=small * beta)[0]
            gap.append(jnp.max(jnp.abs(la.gated_delta_rule(q, k, v, g, small * beta)[0] - plain)))
        assert 50 < gap[0] / gap[1] < 200


@pytest.mark.parametrize("length", [1, 2, 5, 16, 37, 64])
def test_triangular_pieces_match_closed_forms(length):
    random = np.random.default_rng(length)
    with jax.enable_x64(True):
        low = np.tril(random.standard_normal((2, length, length)), -1) / length**0.5
        inverse = np.linalg.inv(np.eye(length) + low)
        close(la.tri_inverse_unit_lower(jnp.asarray(low)), inverse, 1e-12)
        g = -random.exponential(size=(2, length))
        total = np.cumsum(g, -1)
        decay = np.tril(np.exp(total[..., :, None] - total[..., None, :]))
        close(la.decay_matrix(jnp.asarray(g)), decay, 1e-12)
        lam, mu, eout = random.uniform(0, 1, (3, 2, length))
        mu[:, length // 2] = 0
        got = la.momentum_coefficients(*(jnp.asarray(x) for x in (lam, mu, eout)))
    p, c = np.zeros((2, 2, length, length))
    psi, pi, run = np.zeros((2, length)), np.cumprod(mu, -1), np.zeros(2)
    for t in range(length):
        run = lam[:, t] * run + eout[:, t] * pi[:, t]
        psi[:, t] = run
        for i in range(t + 1):
            p[:, t, i] = np.prod(mu[:, i + 1 : t + 1], -1)
            c[:, t, i] = (lam[:, t] * c[:, t - 1, i] if t > i else 0) + eout[:, t] * p[:, t, i]
    for x, y in zip(got, (c, p, psi, pi, np.cumprod(lam, -1)), strict=True):
        close(x, y, 1e-12)


@pytest.mark.parametrize("impl", ["chunkwise", slow("scan")])
@every
def test_gradient_memory_is_far_below_a_state_for_each_token(method, impl):
    t, d = 1024, 32
    args = draw(method, t=t, b=1, h=1, dk=d, dv=d)

    def temp(impl):
        loss = lambda *args: jnp.sum(  # noqa: E731
            getattr(la, method)(*args, impl=impl, chunk_size=32)[0] ** 2
        )
        grad = jax.jit(jax.grad(loss, tuple(range(len(args)))))
        return grad.lower(*args).compile().memory_analysis().temp_size_in_bytes

    states = 4 * t * d * d
    assert temp("recurrent") > states
    assert temp(impl) < states


def test_doubling_the_length_adds_only_chunk_states_to_the_gradient():
    d = 64

    def temp(t):
        args = draw("linear_attention", t=t, b=1, h=1, dk=d, dv=d)
        loss = lambda *args: jnp.sum(la.linear_attention(*args)[0] ** 2)  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # A chunk of 64 has inputs, products and states of 64 x 64 numbers: some dozens of them.
    assert temp(2048) - temp(1024) < 1024 / 64 * 24 * 4 * d * d


@forms
@every
def test_inside_shard_map_gradients_are_those_outside(method, impl):
    """Batch over one axis, heads over the other."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), (AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    args = draw(method)
    ids = jnp.asarray(np.arange(T)[None] // 4 + np.zeros((B, 1), int))
    local = lambda ids, *args: getattr(la, method)(  # noqa: E731
        *args, impl=impl, chunk_size=4, segment_ids=ids, return_state=False
    )[0]
    spec = P("data", None, "tensor")
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P("data"), *[spec] * len(args)), out_specs=spec
    )
    grads = [
        quick_jit(jax.grad(lambda args, f=f: jnp.sum(jnp.sin(f(ids, *args)))))(args)
        for f in (local, sharded)
    ]
    jax.tree.map(close, *grads)


@every
def test_no_tokens_leave_the_state_alone(method):
    args = [x[:, :0] for x in draw(method)]
    start = la.LinAttnState(jnp.ones((B, H, K, V)))
    out, state = getattr(la, method)(*args, initial_state=start)
    assert out.shape == (B, 0, H, V)
    np.testing.assert_array_equal(state.S, start.S)


def test_compiles_once_and_vmaps():
    traces = []

    @jax.jit
    def run(q, k, v):
        traces.append(0)
        return la.linear_attention(q, k, v)[0]

    stack = [jnp.stack(pair) for pair in zip(*(draw("", seed) for seed in (0, 1)), strict=True)]
    singles = jnp.stack([run(*(x[n] for x in stack)) for n in (0, 1)])
    assert len(traces) == 1
    close(jax.vmap(la.linear_attention)(*stack)[0], singles)


def test_errors_name_the_argument_before_anything_is_computed():
    q, k, v = draw("linear_attention")
    gate, channel = jnp.ones((B, T, H)), jnp.ones((B, T, H, K))
    linear = functools.partial(la.linear_attention, q, k, v)
    state = la.init_state(B, H, K, V)
    cases = [
        (lambda: la.linear_attention(q[0], k, v), "q="),
        (lambda: la.linear_attention(q, k[:, 1:], v), "k="),
        (lambda: la.linear_attention(q, k[..., 1:], v), "k="),
        (lambda: la.linear_attention(q, k, v[:, :, 1:]), "v="),
        (lambda: linear(momentum=gate[1:]), "momentum="),
        (lambda: linear(log_decay=channel), "log_decay="),
        (lambda: linear(rate_in=gate[..., 0]), "rate_in="),
        (lambda: linear(initial_state=state.S[..., 1:]), "initial_state.S="),
        (lambda: linear(initial_state=state._replace(z=gate)), "initial_state.z="),
        (lambda: linear(chunk_size=0), "chunk_size=0"),
        (lambda: linear(chunk_size=2.0), "chunk_size=2.0"),
        (lambda: linear(impl="fast"), "impl='fast'"),
        (lambda: linear(visibility="all"), "visibility='all'"),
        (lambda: linear(feature_map="exp"), "feature_map='exp'"),
        (lambda: la.feature_map("exp"), "feature_map='exp'"),
        (lambda: la.feature_map(["relu"]), "feature_map="),
        (lambda: linear(segment_ids=jnp.zeros((B, T + 1), int)), "segment_ids="),
        (lambda: linear(normalize=True), "non-negative"),
        (lambda: linear(normalize=True, feature_map="silu"), "non-negative"),
        (lambda: linear(normalize=True, feature_map="elu1", momentum=gate), "momentum"),
        (lambda: linear(normalize=True, feature_map="elu1", rate_out=gate), "rate_out"),
        (lambda: la.gla(q, k, v, gate), "log_decay="),
        (lambda: la.kda(q, k, v, channel, channel), "beta="),
        (lambda: la.delta_rule(q, k, v, gate, impl="parallel"), "impl='parallel'"),
        (lambda: la.delta_rule(q, k, v, None), "beta="),
        (lambda: la.linear_attention_step(state, q, k, v), "q="),
        (lambda: la.gla_step(state, q[:, 0], k[:, 0], v[:, 0], gate[:, 0]), "log_decay="),
        (lambda: la.tri_inverse_unit_lower(gate), "Lo="),
    ]
    for wrong, words in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            wrong()
    for at in range(3):
        args = [q, k, v]
        args[at] = args[at].astype(int)
        with pytest.raises(TypeError, match=f"{'qkv'[at]} has dtype int32"):
            la.linear_attention(*args)
