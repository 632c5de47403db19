"""Linear attention and its relatives: every form against a token-by-token float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import linear_attention as la

B, H, K, V = 2, 2, 3, 4
# Most of the time of this file is compilation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
GATES = {
    "linear_attention": "",
    "gla": "g:k",
    "delta_rule": "beta",
    "gated_delta_rule": "g beta",
    "kda": "g:k beta",
}


def oracle(
    method, q, k, v, *gates, log_decay=None, momentum=None, rate_in=None, rate_out=None, scale=None,
    S=None, M=None, z=None, visibility="token", segment_ids=None, phi=lambda x: x, normalize=False,
):  # fmt: skip
    """(out, S, M, z) from the recurrences as they are written, a token at a time; complex is fine."""
    names = GATES[method].split()
    given = dict(zip((n.split(":")[0] for n in names), gates, strict=True))
    g, beta = given.get("g", log_decay), given.get("beta")
    (b, t, h, dk), dv = q.shape, v.shape[3]
    q, k, scale = phi(q), phi(k), dk**-0.5 if scale is None else scale
    dk = q.shape[3]
    kind = np.result_type(
        *[x for x in (q, k, v, g, beta, momentum, rate_in, rate_out, S, M, z) if x is not None]
    )
    out, s_all = np.zeros((b, t, h, dv), kind), np.zeros((b, h, dk, dv), kind)
    m_all, z_all = np.zeros_like(s_all), np.zeros((b, h, dk), kind)
    for n, a in np.ndindex(b, h):
        starts = ((s_all, S), (m_all, M), (z_all, z))
        s, m, norm = (0 * zero[n, a] if x is None else x[n, a] for zero, x in starts)
        for i in range(t):
            if segment_ids is not None and i and segment_ids[n, i] != segment_ids[n, i - 1]:
                s, m, norm = 0 * s, 0 * m, 0 * norm
            at = lambda x, default: default if x is None else x[n, i, a]  # noqa: E731, B023
            qi, ki, vi = q[n, i, a] * scale, k[n, i, a], v[n, i, a]
            before, norm_before = s, norm
            lam = np.exp(at(g, 0.0))
            if beta is None:
                m = at(momentum, 0.0) * m + np.outer(ki, at(rate_in, 1.0) * vi)
                s = np.reshape(lam, (-1, 1)) * s + at(rate_out, 1.0) * m
            else:
                s = np.reshape(lam, (-1, 1)) * s
                s = s + np.outer(ki, beta[n, i, a] * (vi - ki @ s))
            if normalize:
                norm = lam * norm + ki
            read, norm_read = (before, norm_before) if visibility == "exclusive" else (s, norm)
            out[n, i, a] = qi @ read
            if normalize:
                out[n, i, a] /= qi @ norm_read + 1e-10
        s_all[n, a], m_all[n, a], z_all[n, a] = s, m, norm
    return out, s_all, m_all, z_all


def draw(seed, method, t, arrays=""):
    """(positional arrays, keyword arrays) in float64: q k v gates, and those named in `arrays`."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape)  # noqa: E731
    decay = lambda *shape: -random.exponential(size=shape) * random.choice([0.1, 1, 30], shape)  # noqa: E731
    token = (B, t, H)
    gate = {
        "g": lambda: decay(*token),
        "g:k": lambda: decay(*token, K),
        "beta": lambda: random.uniform(0, 1, token),
    }
    args = [normal(*token, K), normal(*token, K), normal(*token, V)]
    if method != "linear_attention":
        # Unit keys, as the delta rule wants them; a zero key now and then.
        args[1] /= np.linalg.norm(args[1], axis=-1, keepdims=True)
        args[1] *= random.uniform(size=token)[..., None] > 0.1
    args += [gate[name]() for name in GATES[method].split()]
    make = {
        "log_decay": gate["g"],
        "momentum": lambda: random.choice([0, 1], token) * random.uniform(0, 1, token),
        "rate_in": lambda: normal(*token),
        "rate_out": lambda: normal(*token),
        "S": lambda: normal(B, H, K, V),
        "M": lambda: normal(B, H, K, V),
        "z": lambda: random.uniform(1, 2, (B, H, K)),
        "segment_ids": lambda: np.sort(random.integers(0, 3, (B, t)) ** 2)[:, ::-1].copy(),
    }
    return args, {name: make[name]() for name in arrays.split()}


def call(method, args, arrays, **options):
    """The library on the oracle's arguments: the state in one tuple."""
    arrays = dict(arrays)
    state = {name: arrays.pop(name) for name in "SMz" if name in arrays}
    if state:
        options["initial_state"] = la.LinAttnState(**{"S": jnp.zeros((B, H, K, V)), **state})
    return getattr(la, method)(*args, **arrays, **options)


def assert_close(got, expected, tolerance, name=""):
    x, y = np.asarray(got, np.float64), np.asarray(expected)
    assert x.shape == y.shape, name
    error = np.max(np.abs(x - y), initial=0)
    assert error <= tolerance * max(1, np.max(np.abs(y), initial=0)), (name, error)


EXCLUSIVE = dict(visibility="exclusive")
NORMAL = dict(feature_map="softplus", normalize=True)
# What a case has: method, length, chunk, arrays besides q, k, v and gates, options.
CASES = {
    "plain": ("linear_attention", 11, 4, "", {}),
    "one token": ("linear_attention", 1, 4, "S log_decay", {}),
    "decay": ("linear_attention", 12, 3, "log_decay S", dict(scale=1.0)),
    "rates": ("linear_attention", 9, 16, "log_decay rate_in rate_out S segment_ids", {}),
    "momentum": ("linear_attention", 13, 4, "momentum S", dict(scale=1.0)),
    "all": ("linear_attention", 13, 5, "log_decay momentum rate_in rate_out S M segment_ids", {}),
    "lone buffer": ("linear_attention", 6, 4, "rate_in rate_out S M", {}),
    "exclusive": ("linear_attention", 10, 4, "rate_in S segment_ids", EXCLUSIVE),
    "exclusive, all": ("linear_attention", 11, 4, "log_decay momentum rate_out S M segment_ids", EXCLUSIVE),
    "normalised": ("linear_attention", 11, 4, "log_decay S z segment_ids", NORMAL),
    "normalised, exclusive": ("linear_attention", 7, 2, "S z", NORMAL | EXCLUSIVE),
    "gla": ("gla", 11, 4, "S segment_ids", {}),
    "gla, chunk 1": ("gla", 5, 1, "", {}),
    "delta": ("delta_rule", 11, 4, "S segment_ids", {}),
    "delta, one chunk": ("delta_rule", 7, 64, "", dict(scale=1.0)),
    "gated delta": ("gated_delta_rule", 21, 20, "S segment_ids", {}),
    "kda": ("kda", 11, 4, "S segment_ids", {}),
    "kda, long chunk": ("kda", 37, 35, "", dict(scale=0.5)),
}  # fmt: skip
MAPS = {"softplus": lambda x: np.log(1 + np.exp(x))}


def for_oracle(options):
    options = dict(options)
    if "feature_map" in options:
        options["phi"] = MAPS[options.pop("feature_map")]
    return options


SLOW = (
    "plain", "decay", "momentum", "normalised, exclusive", "lone buffer",
    "exclusive, all", "delta, one chunk", "kda, long chunk", "gla, chunk 1",
)  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(x, marks=pytest.mark.slow if x in SLOW else ()) for x in CASES]
)
def test_every_form_matches_the_oracle_with_its_gradient_in_float64(case):
    """Values, and gradients as directional derivatives of the oracle by complex steps."""
    method, t, chunk, names, options = CASES[case]
    impls = ["recurrent", "chunkwise", "scan"] + ["parallel"] * (method == "linear_attention")

    def run(args, arrays, segment_ids, impl):
        arrays = arrays if segment_ids is None else {**arrays, "segment_ids": segment_ids}
        out, state = call(method, args, arrays, impl=impl, chunk_size=chunk, **options)
        return out, *state

    @functools.partial(quick_jit, static_argnums=3)
    def measured(inputs, segments, weights, impl):
        forward = lambda inputs: run(*inputs, segments, impl)  # noqa: E731
        outs, vjp = jax.vjp(forward, inputs)
        weights = [w if x is not None else None for x, w in zip(outs, weights, strict=True)]
        return outs, vjp(tuple(weights))[0]

    @settings(max_examples=3, deadline=None, database=None, derandomize=True)
    @given(st.integers(0, 2**32 - 1))
    def check(seed):
        args, arrays = draw(seed, method, t, names)
        segments = arrays.pop("segment_ids", None)
        random = np.random.default_rng(seed + 1)
        reference = functools.partial(oracle, method, segment_ids=segments, **for_oracle(options))
        expected = reference(*args, **arrays)
        weights = [random.standard_normal(x.shape) for x in expected]
        results = {impl: measured((args, arrays), segments, weights, impl) for impl in impls}
        present = [x is not None for x in results["recurrent"][0]]
        # A buffer that the state does not carry has no weight in the derivative.
        pairs = [(n, w) for n, (w, p) in enumerate(zip(weights, present, strict=True)) if p]
        for outs, _ in results.values():
            for x, y in zip(outs, expected, strict=True):
                if x is not None:
                    assert x.dtype == jnp.float64
                    assert_close(x, y, 1e-12)
        keys = [*range(len(args)), *arrays]
        for key in keys:
            value = args[key] if isinstance(key, int) else arrays[key]
            step = random.standard_normal(value.shape)
            moved = value + 1e-30j * step
            if isinstance(key, int):
                outs = reference(*args[:key], moved, *args[key + 1 :], **arrays)
            else:
                outs = reference(*args, **{**arrays, key: moved})
            slope = sum(np.sum(w * outs[n].imag) for n, w in pairs) / 1e-30
            for impl, (_, (dargs, darrays)) in results.items():
                d = dargs[key] if isinstance(key, int) else darrays[key]
                size = np.sum(np.abs(d * step))
                assert abs(np.sum(d * step) - slope) <= 1e-12 * max(1, size), (impl, key)

    with jax.enable_x64(True):
        check()
