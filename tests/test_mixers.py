"""Every mixer of the decoder: packed documents, pieces, ragged prompts, meshes; and its errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.attention import dense_attention
from jaxlab.sampling import GREEDY
from jaxlab.ttt import LADDER, InnerConfig
from models.cache import NOWHERE, RingCache
from models.decoder import DecoderConfig, unroll
from models.generate import generate
from models.mixers import MIXERS, TTT, LaCT, LinearAttention
from sharding.context import ContextConfig
from sharding.context.cores import without_kernel
from sharding.mesh import MeshShape, make_mesh
from sharding.plan import count_collectives
from train.state import init_params

SMALL = DecoderConfig(
    vocab=61, layers=1, d_model=16, heads=4, kv_heads=4, head_dim=4, mlp=24,
    lact=LaCT(window=5, inner=InnerConfig(chunk_size=4), base_rate=0.1), ttt=TTT(chunk_size=3),
    linear=LinearAttention(chunk_size=4),
)  # fmt: skip
PATTERNS = {name: (name,) for name in MIXERS if name != "attention"}
CONFIGS = {n: dataclasses.replace(SMALL, pattern=p) for n, p in PATTERNS.items()}
CONFIGS["two to a block"] = dataclasses.replace(
    SMALL, layers=2, pattern=("gated_delta", "attention"), context=ContextConfig(core="dense")
)
CONFIGS["V2, blockwise"] = dataclasses.replace(
    SMALL, pattern=("lact",), context=ContextConfig(core="dense"),
    lact=LaCT(window=3, inner=dataclasses.replace(LADDER["V2"], chunk_size=3), low_rank=2),
)  # fmt: skip
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# One of a family in the quick suite, all of them in the slow one.
QUICK = ("lact", "ttt_linear", "gated_delta")
some = lambda name: pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)  # noqa: E731
every = pytest.mark.parametrize("name", [some(name) for name in CONFIGS])


@functools.lru_cache
def model(name):
    module = CONFIGS[name].build("cpu")
    inputs = (jax.ShapeDtypeStruct((1, 4), jnp.int32),)
    return module, quick_jit(lambda: init_params(module, jax.random.key(7), inputs))()


@functools.lru_cache
def forward(name):
    """Logits of whole rows by the training path."""
    module, params = model(name)
    return quick_jit(lambda *args: module.apply({"params": params}, *args))


def tokens(seed, *shape):
    return np.random.default_rng(seed).integers(0, SMALL.vocab, shape).astype(np.int32)


@every
def test_documents_of_a_row_do_not_see_each_other(name):
    """Packed rows give each document what it gets alone, with its positions or whatever they are."""
    lengths, row = (7, 1, 4), tokens(0, 1, 12)
    segments = np.repeat([1, 2, 3], lengths)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32)
    packed = np.asarray(forward(name)(row, positions, segments))
    at = 0
    for n in lengths:
        alone = np.zeros((1, 12), np.int32)
        alone[0, :n] = row[0, at : at + n]
        want = np.asarray(forward(name)(alone))[0, :n]
        np.testing.assert_allclose(packed[0, at : at + n], want, atol=2e-5)
        at += n


@every
def test_pieces_of_any_length_give_the_logits_of_the_whole(name):
    module, params = model(name)
    row = tokens(1, 2, 11)
    positions = np.broadcast_to(np.arange(11, dtype=np.int32), row.shape)
    whole = forward(name)(row)

    @quick_jit
    def extend(*arguments):
        hidden, states = module.apply({"params": params}, *arguments, method="extend")
        return module.apply({"params": params}, hidden, method="logits"), states

    states, at = module.init_state(2, 13), 0
    for size in (4, 1, 1, 4, 1):
        piece = slice(at, at + size)
        logits, after = extend(row[:, piece], states, positions[:, piece])
        np.testing.assert_allclose(logits, whole[:, piece], atol=2e-5)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), states
        )
        states, at = after, at + size


@every
def test_prompts_of_unequal_length_are_continued_as_full_passes_would(name):
    module, params = model(name)
    module, params = unroll(module, params) if name in ("lact", "ttt_mlp") else (module, params)
    lengths = np.array([9, 1, 5], np.int32)
    prompts = tokens(2, 3, 9)
    run = quick_jit(functools.partial(generate, module, new=6, samples=2, sampling=GREEDY))
    out = run(params, prompts, lengths, jax.random.key(0))
    for i, n in enumerate(lengths):
        row = np.zeros((1, 16), np.int32)
        row[0, :n], row[0, n : n + 6] = prompts[i, :n], out.tokens[i, 1]
        logits = np.asarray(forward(name)(row), np.float64)[0, n - 1 : n + 5]
        logs = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
        np.testing.assert_allclose(out.logprobs[i, 1], logs.max(-1), atol=2e-5)
        np.testing.assert_array_equal(out.tokens[i, 0], logits.argmax(-1))


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "two to a block"])
def test_memory_of_decoding_does_not_grow_with_the_tokens(name):
    module, _ = model(name)
    sizes = [sum(x.size for x in jax.tree.leaves(module.init_state(1, n))) for n in (100, 10_000)]
    assert sizes[0] == sizes[1]


MESHES = (dict(data=2, context=4), dict(data=2, context=2, tensor=2))


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("name", [some(n) for n in ("lact", "ttt_linear", "gated_delta", "kda")])
@pytest.mark.parametrize("documents", [True, False])
def test_a_mesh_changes_nothing(name, documents, axes):
    """Loss, logits and gradients, tokens split; LaCT and the recurrences by their sharded forms."""
    if (axes, documents) != (MESHES[0], True) and name != "lact":
        pytest.skip("the slow form of this is in tests/test_context_linear.py")
    module, params = model(name)
    rows = tokens(3, 4, 16)
    segments = np.repeat([[1, 2]], 4, 0).repeat((5, 11), 1).astype(np.int32) if documents else None

    def loss(params, rows, segments):
        logits = module.apply({"params": params}, rows, None, segments)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), rows[:, 1:, None], -1)
        return -jnp.mean(chosen), logits

    run = quick_jit(jax.value_and_grad(loss, has_aux=True))
    want = run(params, rows, segments)
    with jax.set_mesh(make_mesh(MeshShape(**axes))):
        sharded = jax.value_and_grad(loss, has_aux=True)
        if name == "lact":  # chunks spread over the devices, one all-to-all an array of tokens
            assert count_collectives(sharded, params, rows, segments)["all_to_all"][0] > 0
        got = quick_jit(sharded)(params, rows, segments)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Newton-Schulz of a chunk shorter than the head is wide amplifies rounding.
        np.testing.assert_allclose(a, b, atol=1e-4 if name == "lact" else 2e-5)


@pytest.mark.parametrize("core", ["dense", "blockwise"])
def test_a_ring_holds_the_last_keys_of_rows_of_any_length(core):
    """Against attention with a window over all tokens of each row."""
    t, size, lengths = 12, 4, np.array([12, 3, 7])
    q, k, v = (jax.random.normal(jax.random.key(i), (3, t, 2, 4)) for i in range(3))
    ring, seen = RingCache.empty(3, 2, size, 4, jnp.float32), np.zeros(3, int)
    want = dense_attention(q, k, v, causal=True, window=size)
    for step in (6, 1, 3, 1, 1):
        take = np.clip(lengths - seen, 0, step)
        at = np.minimum(seen[:, None] + np.arange(step), t - 1)
        rows = np.arange(3)[:, None]
        real = np.arange(step) < take[:, None]
        positions = np.where(real, at, NOWHERE).astype(np.int32)
        out, ring = ring.attend(
            without_kernel(core), q[rows, at], k[rows, at], v[rows, at], jnp.asarray(at), positions
        )
        for i in range(3):
            got = np.asarray(out[i, : take[i]])
            np.testing.assert_allclose(got, want[i, seen[i] : seen[i] + take[i]], atol=1e-5)
        seen = seen + take
    kept = [sorted(p for p in row if p != NOWHERE) for row in np.asarray(ring.positions).tolist()]
    assert kept == [[8, 9, 10, 11], [0, 1, 2], [3, 4, 5, 6]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pattern": ("lstm",)}, r"model.pattern has 'lstm'; allowed are \['attention', 'delta'"),
        ({"lact": LaCT(heads=3)}, "model.pattern has 'lact', for which ttt_heads=3 must divide"),
        ({"lact": LaCT(inner=InnerConfig(steps=2))}, "model.lact.inner.visibility='exclusive' and steps=2"),
        ({"pattern": ("ttt_mlp",), "heads": 16, "kv_heads": 16}, "num_heads=16 must divide"),
        ({"pattern": ("gla",), "linear": LinearAttention(chunk_size=0)}, "chunk_size=0"),
    ],
)  # fmt: skip
def test_what_a_decoder_cannot_have_is_named_before_anything_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIGS["lact"], **changes).check({})
