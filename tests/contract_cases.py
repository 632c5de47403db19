"""One row a public method of `jaxlab`: how to call it on small arrays. A new method adds its row here."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlab import linear_attention as la
from jaxlab import lora, sampling, ttt
from jaxlab.attention import blockwise_attention, cached_attention, dense_attention
from jaxlab.norm import rms_norm
from jaxlab.rope import apply_rope, rope_frequencies
from jaxlab.tiled import tiled_cross_entropy, tiled_mlp, token_log_probs


class Case(NamedTuple):
    """`call(*args(key, dtype))`: arrays in, arrays out, everything static closed over."""

    call: Callable[..., Any]
    args: Callable[[jax.Array, Any], tuple]
    out: str = "like"  # floating outputs are "like" the floating inputs, or always "wide" (float32)
    grad: bool = True


def _normal(key, dtype, *shapes):
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True))


def _qkv(key, dtype):
    q, k, v = _normal(key, dtype, (2, 5, 4, 8), (2, 5, 2, 8), (2, 5, 2, 8))
    return q, k, v, jnp.array([[1, 1, 1, 2, 2]] * 2)


def _cache(key, dtype):
    q, k, v = _normal(key, dtype, (2, 1, 4, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    return q, k, v, jnp.array([[3], [2]]), jnp.array([[0, 1, 2, 3, 9]] * 2)


def _logits(key, dtype):
    return _normal(key, dtype, (3, 7))


def _kept(filtered):
    """What a filter keeps, and 0 elsewhere, so that sums are finite."""
    return jnp.where(filtered > -jnp.inf, filtered, 0)


def _adapted(key, dtype):
    """Parameters, and an adapter of a stack of two matrices 6 x (4 2)."""
    w, a, b, x = _normal(key, dtype, (2, 6, 4, 2), (2, 6, 3), (2, 3, 4, 2), (5, 6))
    return {"w": w, "bias": x}, {"w": {"a": a, "b": b}}


def _adapter(key, dtype):
    return _adapted(key, dtype)[0]["bias"], jax.tree.map(
        lambda x: x[0], _adapted(key, dtype)[1]["w"]
    )


def _head(key, dtype):
    return *_normal(key, dtype, (2, 6, 8), (8, 11)), jnp.array([[3, 1, -1, 10, 0, 2]] * 2)


CASES: dict[str, Case] = {
    "jaxlab.attention.dense_attention": Case(
        lambda q, k, v, s: dense_attention(q, k, v, segment_ids=s, window=3, softcap=5.0), _qkv
    ),
    "jaxlab.attention.blockwise_attention": Case(
        lambda q, k, v, s: blockwise_attention(q, k, v, segment_ids=s, block_q=2, block_k=3), _qkv
    ),
    "jaxlab.attention.cached_attention": Case(cached_attention, _cache),
    "jaxlab.sampling.keep_top_k": Case(lambda z: _kept(sampling.keep_top_k(z, 3)), _logits),
    "jaxlab.sampling.keep_top_p": Case(lambda z: _kept(sampling.keep_top_p(z, 0.7)), _logits),
    "jaxlab.sampling.keep_min_p": Case(lambda z: _kept(sampling.keep_min_p(z, 0.2)), _logits),
    "jaxlab.sampling.keep_best": Case(lambda z: _kept(sampling.keep_best(z)), _logits),
    "jaxlab.sampling.sampling_logits": Case(
        lambda z: _kept(sampling.sampling_logits(z, sampling.Sampling(0.5, 4, 0.9, 0.1))),
        _logits,
        out="wide",
    ),
    "jaxlab.sampling.draw": Case(
        lambda z: sampling.draw(jax.random.split(jax.random.key(1), 3), z, sampling.PLAIN),
        _logits,
        out="wide",
    ),
    "jaxlab.sampling.entropy": Case(lambda z: sampling.entropy(jax.nn.log_softmax(z)), _logits),
    "jaxlab.lora.lora_delta": Case(
        lambda _, adapter: lora.lora_delta(adapter), _adapter, out="wide"
    ),
    "jaxlab.lora.lora_product": Case(lora.lora_product, _adapter),
    "jaxlab.lora.lora_scale": Case(lambda _, tree: lora.lora_scale(tree, alpha=8.0), _adapted),
    "jaxlab.lora.lora_merge": Case(lambda p, tree: lora.lora_merge(p, tree, alpha=8.0), _adapted),
    "jaxlab.lora.lora_unmerge": Case(
        lambda p, tree: lora.lora_unmerge(p, tree, alpha=8.0), _adapted
    ),
    "jaxlab.lora.lora_stack": Case(lambda _, tree: lora.lora_stack([tree, tree]), _adapted),
    "jaxlab.lora.lora_init": Case(
        lambda w: lora.lora_init(
            jax.random.key(0), {"w": w}, rank=2, target=lambda *_: True, init="normal"
        ),
        lambda key, dtype: _normal(key, dtype, (6, 4)),
        grad=False,
    ),
    "jaxlab.rope.apply_rope": Case(
        lambda x, p: apply_rope(x, p, jnp.asarray(rope_frequencies(8, 1e4))),
        lambda key, dtype: (*_normal(key, dtype, (2, 5, 4, 8)), jnp.array([[0, 1, 2, 0, 1]] * 2)),
    ),
    "jaxlab.norm.rms_norm": Case(rms_norm, lambda key, dtype: _normal(key, dtype, (2, 5, 8), (8,))),
    "jaxlab.tiled.tiled_mlp": Case(
        lambda x, w: tiled_mlp(lambda part: jax.nn.silu(part @ w), x, n_tiles=3),
        lambda key, dtype: _normal(key, dtype, (2, 6, 8), (8, 4)),
    ),
    "jaxlab.tiled.tiled_cross_entropy": Case(
        lambda h, w, y: tiled_cross_entropy(h, w, y, n_tiles=2, z_loss=1e-3), _head, out="wide"
    ),
    "jaxlab.tiled.token_log_probs": Case(
        lambda h, w, y: token_log_probs(h, w, y, n_tiles=2), _head, out="wide"
    ),
}


def _tokens(*more, t=(3,)):
    """Arguments q, k, v [2, *t, 2, 4], then arrays of the shapes in `more`, whose -1 is `t`."""

    def args(key, dtype):
        shapes = ((2, *t, 2, 4),) * 3 + more
        q, k, *rest = _normal(key, dtype, *shapes)
        return q, k / jnp.linalg.norm(k, axis=-1, keepdims=True), *rest

    return args


GATE, CHANNEL, S = (2, 3, 2), (2, 3, 2, 4), (2, 2, 4, 4)
WEIGHTS = ((2, 4, 4),) * 3
# Without Newton-Schulz, whose slope of 3.4 to 4 a step multiplies rounding at small singular values.
ORDER = ttt.InnerConfig(chunk_size=2, orthogonalize=None)
PLACES = jnp.array([[0, 1, 2], [0, 0, 1]])
open_unit, decays = jax.nn.sigmoid, lambda x: -jnp.abs(x)


def _step(fn, *gates):
    """Row of a `*_step`: the state's matrix first, `gates` make a gate of a normal number each."""

    def call(state, q, k, v, *raw):
        made = (gate(x) for gate, x in zip(gates, raw, strict=True))
        return fn(la.LinAttnState(state), q, k, v, *made)[1]

    shapes = [CHANNEL if gate is decays and "a_step" in fn.__name__ else GATE for gate in gates]
    args = _tokens(*((x[0], *x[2:]) for x in shapes), t=())
    return Case(call, lambda key, dtype: (*_normal(key, dtype, S), *args(key, dtype)))


def _ttt_tokens(key, dtype):
    return *_tokens(GATE, GATE)(key, dtype), ttt.FastWeights(*_normal(key, dtype, *WEIGHTS))


def _ttt_step(q, k, v, rate, mu, fw):
    state = ttt.init_ttt_state(fw, 2, ORDER)
    for _ in range(3):
        state, out = ttt.ttt_step(state, q, k, v, open_unit(rate), open_unit(mu), ORDER)
    return out


def _ttt_step_args(key, dtype):
    *tokens, fw = _ttt_tokens(key, dtype)
    return *(x[:, 0] for x in tokens), fw


MINI = {
    "linear": (ttt.TTTLinearParams, ((2, 4, 4), (2, 1, 4), (2, 4), (2, 4))),
    "mlp": (
        ttt.TTTMLPParams,
        ((2, 4, 16), (2, 1, 16), (2, 16, 4), (2, 1, 4), (2, 4), (2, 4)),
    ),
}


def _mini(kind, step=False):
    """Arguments of TTT-Linear or TTT-MLP: q, k, v, two rates, parameters."""
    params, shapes = MINI[kind]

    def args(key, dtype):
        tokens = _tokens(GATE, GATE)(key, dtype)
        tokens = tuple(x[:, 0] for x in tokens) if step else tokens
        return *tokens, params(*(0.5 * x for x in _normal(key, dtype, *shapes)))

    return args


def _mini_step(init, step):
    def call(q, k, v, rate_in, rate_out, params):
        state = init(params, 2)
        for _ in range(3):
            state, out = step(state, q, k, v, open_unit(rate_in), open_unit(rate_out), chunk_size=2)
        return out

    return call


def _mini_init(kind, init):
    params, shapes = MINI[kind]
    return Case(
        lambda p: init(p, 2), lambda key, dtype: (params(*_normal(key, dtype, *shapes)),), "wide"
    )


def _net(params, x):
    return jnp.tanh(x @ params["theta"]) @ params["w"]


def _one_sequence(key, dtype):
    q, k, v, mu, theta, w = _normal(key, dtype, (3, 4), (3, 4), (3, 4), (3,), (4, 5), (5, 4))
    return q, k, v, mu, {"theta": theta, "w": w}


def _lower(key, dtype):
    return tuple(x / 4 for x in _normal(key, dtype, (2, 5, 5)))


CASES |= {
    "jaxlab.linear_attention.linear_attention": Case(
        lambda q, k, v, g, mu: la.linear_attention(
            q, k, v, log_decay=decays(g), momentum=open_unit(mu), chunk_size=2
        )[0],
        _tokens(GATE, GATE),
    ),
    "jaxlab.linear_attention.gla": Case(
        lambda q, k, v, g: la.gla(q, k, v, decays(g), chunk_size=2)[0], _tokens(CHANNEL)
    ),
    "jaxlab.linear_attention.delta_rule": Case(
        lambda q, k, v, b: la.delta_rule(q, k, v, open_unit(b), chunk_size=2)[0], _tokens(GATE)
    ),
    "jaxlab.linear_attention.gated_delta_rule": Case(
        lambda q, k, v, g, b: la.gated_delta_rule(q, k, v, decays(g), open_unit(b), chunk_size=2)[
            0
        ],
        _tokens(GATE, GATE),
    ),
    "jaxlab.linear_attention.kda": Case(
        lambda q, k, v, g, b: la.kda(q, k, v, decays(g), open_unit(b), chunk_size=2)[0],
        _tokens(CHANNEL, GATE),
    ),
    "jaxlab.linear_attention.linear_attention_step": _step(la.linear_attention_step),
    "jaxlab.linear_attention.gla_step": _step(la.gla_step, decays),
    "jaxlab.linear_attention.delta_rule_step": _step(la.delta_rule_step, open_unit),
    "jaxlab.linear_attention.gated_delta_rule_step": _step(
        la.gated_delta_rule_step, decays, open_unit
    ),
    "jaxlab.linear_attention.kda_step": _step(la.kda_step, decays, open_unit),
    "jaxlab.linear_attention.feature_map": Case(
        la.feature_map("elu1"), lambda key, dtype: _normal(key, dtype, (3, 4))
    ),
    "jaxlab.linear_attention.decay_matrix": Case(
        lambda g: la.decay_matrix(decays(g)), lambda key, dtype: _normal(key, dtype, (2, 5))
    ),
    "jaxlab.linear_attention.momentum_coefficients": Case(
        lambda *x: la.momentum_coefficients(*map(open_unit, x)),
        lambda key, dtype: _normal(key, dtype, *[(2, 5)] * 3),
    ),
    "jaxlab.linear_attention.tri_inverse_unit_lower": Case(la.tri_inverse_unit_lower, _lower),
    "jaxlab.ttt.ttt": Case(
        lambda q, k, v, r, mu, fw: ttt.ttt(q, k, v, fw, open_unit(r), open_unit(mu), ORDER)[0],
        _ttt_tokens,
    ),
    "jaxlab.ttt.ttt_step": Case(_ttt_step, _ttt_step_args),
    "jaxlab.ttt.ttt_apply": Case(
        lambda q, fw: ttt.ttt_apply(fw, q, ORDER),
        lambda key, dtype: (_ttt_tokens(key, dtype)[0], _ttt_tokens(key, dtype)[-1]),
    ),
    "jaxlab.ttt.init_ttt_state": Case(
        lambda fw: ttt.init_ttt_state(fw, 2, ORDER),
        lambda key, dtype: (_ttt_tokens(key, dtype)[-1],),
        out="wide",
    ),
    "jaxlab.ttt.swiglu_minus_grads": Case(
        lambda k, v, rates, fw: ttt.swiglu_minus_grads(fw, k, v, rates, "squared"),
        lambda key, dtype: (
            *_normal(key, dtype, (2, 3, 4), (2, 3, 4), (2, 3, 3)),
            ttt.FastWeights(*_normal(key, dtype, *WEIGHTS)),
        ),
        out="wide",
    ),
    "jaxlab.ttt.newton_schulz": Case(
        ttt.newton_schulz,
        lambda key, dtype: (jnp.eye(3, 4, dtype=dtype) + _normal(key, dtype, (2, 3, 4))[0] / 8,),
    ),
    "jaxlab.ttt.ttt_autodiff": Case(
        lambda q, k, v, mu, params: ttt.ttt_autodiff(
            q, k, v, params, _net, momentum=open_unit(mu), chunk_size=2
        )[0],
        _one_sequence,
    ),
    "jaxlab.ttt.to_linear_attention": Case(
        lambda q, k, v, mu, params: ttt.to_linear_attention(
            q, k, v, params, lambda theta, x: jnp.tanh(x @ theta), momentum=open_unit(mu)
        ),
        _one_sequence,
        out="wide",
    ),
    "jaxlab.ttt.ttt_linear": Case(
        lambda q, k, v, a, b, p: ttt.ttt_linear(
            q, k, v, p, open_unit(a), open_unit(b), chunk_size=2
        )[0],
        _mini("linear"),
    ),
    "jaxlab.ttt.ttt_mlp": Case(
        lambda q, k, v, a, b, p: ttt.ttt_mlp(q, k, v, p, open_unit(a), open_unit(b), chunk_size=2)[
            0
        ],
        _mini("mlp"),
    ),
    "jaxlab.ttt.ttt_linear_step": Case(
        _mini_step(ttt.ttt_linear_init, ttt.ttt_linear_step), _mini("linear", step=True)
    ),
    "jaxlab.ttt.ttt_mlp_step": Case(
        _mini_step(ttt.ttt_mlp_init, ttt.ttt_mlp_step), _mini("mlp", step=True)
    ),
    "jaxlab.ttt.ttt_linear_init": _mini_init("linear", ttt.ttt_linear_init),
    "jaxlab.ttt.ttt_mlp_init": _mini_init("mlp", ttt.ttt_mlp_init),
    "jaxlab.ttt.ttt_packed": Case(
        lambda q, k, v, r, mu, fw: ttt.ttt_packed(
            q, k, v, fw, open_unit(r), open_unit(mu), ORDER, PLACES
        )[0],
        _ttt_tokens,
    ),
    "jaxlab.ttt.ttt_minibatch_packed": Case(
        lambda q, k, v, a, b, p: ttt.ttt_minibatch_packed(
            q, k, v, p, open_unit(a), open_unit(b), PLACES, chunk_size=2
        )[0],
        _mini("linear"),
    ),
    "jaxlab.ttt.vittt_glu": Case(
        lambda q, k, v, w1, w2: ttt.vittt_glu(q, k, v, w1, w2)[0], _tokens(*WEIGHTS[:2])
    ),
    "jaxlab.ttt.vittt_dwconv": Case(
        lambda q, k, v, w3: ttt.vittt_dwconv(q, k, v, w3)[0],
        _tokens((4, 3, 3)),
    ),
}

# Public functions that are no methods on arrays, and why.
EXEMPT: dict[str, str] = {
    "jaxlab.linear_attention.init_state": "zeros of sizes, tested in test_linear_attention_contract.py",
    "jaxlab.ttt.document_places": "integers, tested in test_ttt_packed.py",
    "jaxlab.ttt.packed_state": "zeros of sizes, tested in test_ttt_packed.py",
    "jaxlab.ttt.packed_minibatch_state": "zeros of sizes, tested in test_ttt_packed.py",
    "jaxlab.rope.rope_frequencies": "static numbers, tested in test_rope.py",
    "jaxlab.lora.lora_num_params": "a static number, tested in test_lora.py",
    "jaxlab.lora.pairs": "walks a tree, computes nothing",
    "jaxlab.paths.flatten": "walks a tree, computes nothing",
    "jaxlab.paths.unflatten": "walks a tree, computes nothing",
    "jaxlab.rope.rope_factor": "a static number, tested in test_rope.py",
    "jaxlab.rope.yarn_attention_factor": "a static number, tested in test_rope.py",
}

# Modules that other modules of jaxlab are made of; their functions are not public.
INTERNAL = {
    f"jaxlab.{name}" for name in ("affine", "arguments", "loops", "masks", "blockwise", "varying")
}

# Rows of a package in a file of its own, which takes `Case` from here.
import diffusion_contract_cases  # noqa: E402
import envs_contract_cases  # noqa: E402
import rl_contract_cases  # noqa: E402
import uncertainty_contract_cases  # noqa: E402

for package in (
    diffusion_contract_cases,
    envs_contract_cases,
    rl_contract_cases,
    uncertainty_contract_cases,
):
    CASES |= package.CASES
    EXEMPT |= package.EXEMPT
