"""Generation against full forward passes: cached steps, ragged prompts, shared prefills, meshes."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.rope import YarnScaling
from jaxlab.sampling import GREEDY, Sampling
from models.decoder import DecoderConfig, unroll
from models.generate import decode, generate, prefill
from sharding.context import ContextConfig
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import shardings
from train.state import init_params, logical_axes

BASE = dict(vocab=61, layers=2, d_model=32, head_dim=8, mlp=48)
MODELS = {
    "mha, remat": DecoderConfig(**BASE, heads=4, kv_heads=4, remat="full"),
    "gqa4, qk-norm, tied, yarn": DecoderConfig(
        **BASE,
        heads=4,
        kv_heads=1,
        qk_norm=True,
        tied=True,
        rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=8),
    ),
    "gqa2, two to a block, dense": DecoderConfig(
        **BASE,
        heads=8,
        kv_heads=4,
        pattern=("attention", "attention"),
        context=ContextConfig(core="dense"),
    ),
}
LENGTHS = (9, 1, 5, 8)
# Most of the time of this file is compilation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)


@functools.lru_cache
def model(config):
    module = config.build("cpu")
    inputs = (jax.ShapeDtypeStruct((1, 4), jnp.int32),)
    return module, quick_jit(lambda: init_params(module, jax.random.key(7), inputs))()


def prompts(config, seed=0, lengths=LENGTHS):
    """Random prompts; the padding holds random tokens too, which must not matter."""
    shape = (len(lengths), max(lengths))
    tokens = np.random.default_rng(seed).integers(0, config.vocab, shape).astype(np.int32)
    return tokens, np.asarray(lengths, np.int32)


@functools.lru_cache
def compiled(config, unrolled, options):
    module, params = model(config)
    if unrolled:
        module, params = unroll(module, params)
    return quick_jit(functools.partial(generate, module, **dict(options))), params


def run(config, tokens, lengths, key, unrolled=False, **options):
    call, params = compiled(config, unrolled, tuple(options.items()))
    return call(params, tokens, lengths, key)


@functools.lru_cache
def training_path(config):
    module, params = model(config)
    return quick_jit(lambda tokens: module.apply({"params": params}, tokens))


def full_forward(config, row):
    """float32 logits of one row by the training path; what follows a token does not change them."""
    padded = np.zeros((1, 24), np.int32)
    padded[0, : len(row)] = row
    return np.asarray(training_path(config)(padded))[0, : len(row)]


@pytest.mark.parametrize(
    "config, unrolled",
    [(c, False) for c in MODELS.values()] + [(MODELS["gqa4, qk-norm, tied, yarn"], True)],
    ids=[*MODELS, "unrolled"],
)
def test_pieces_of_any_length_give_the_logits_of_the_whole(config, unrolled):
    module, params = model(config)
    tokens = np.random.default_rng(1).integers(0, config.vocab, (2, 11)).astype(np.int32)
    positions = np.broadcast_to(np.arange(11, dtype=np.int32), tokens.shape)
    whole = training_path(config)(tokens)
    if unrolled:
        module, params = unroll(module, params)
        loop = quick_jit(lambda tokens: module.apply({"params": params}, tokens))
        np.testing.assert_allclose(loop(tokens), whole, atol=1e-5)

    @quick_jit
    def extend(*arguments):
        hidden, states = module.apply({"params": params}, *arguments, method="extend")
        return module.apply({"params": params}, hidden, method="logits"), states

    states = module.init_state(2, 13)
    at = 0
    for size in (4, 1, 1, 4, 1):
        piece = slice(at, at + size)
        logits, states = extend(tokens[:, piece], states, positions[:, piece])
        np.testing.assert_allclose(logits, whole[:, piece], atol=1e-5)
        at += size


@every_model
def test_numbers_are_those_of_a_full_forward_pass(config):
    tokens, lengths = prompts(config)
    sampling = Sampling(1.3, top_k=20, top_p=0.95)
    out = run(config, tokens, lengths, jax.random.key(3), new=7, samples=2, sampling=sampling)
    for i, j in np.ndindex(out.tokens.shape[:2]):
        made = np.asarray(out.tokens[i, j])
        row = np.concatenate([tokens[i, : lengths[i]], made])
        logits = full_forward(config, row)[lengths[i] - 1 : -1].astype(np.float64)
        logs = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
        np.testing.assert_allclose(out.logprobs[i, j], logs[np.arange(7), made], atol=1e-5)
        np.testing.assert_allclose(out.entropies[i, j], -np.sum(np.exp(logs) * logs, -1), atol=1e-5)
        assert np.all(np.asarray(out.sampling_logprobs[i, j]) < 0)
    assert len({tuple(row) for row in np.asarray(out.tokens).reshape(-1, 7)}) == 8


def test_greedy_is_the_argmax_of_full_forward_passes():
    config = MODELS["gqa4, qk-norm, tied, yarn"]
    tokens, lengths = prompts(config)
    out = run(config, tokens, lengths, jax.random.key(0), new=6, sampling=GREEDY)
    for i, length in enumerate(lengths):
        row = list(tokens[i, :length])
        for _ in range(6):
            row.append(int(np.argmax(full_forward(config, row)[-1])))
        assert row[length:] == out.tokens[i, 0].tolist()


def test_ragged_batch_equals_each_prompt_alone():
    config = MODELS["gqa4, qk-norm, tied, yarn"]
    tokens, lengths = prompts(config)
    key = jax.random.key(11)
    out = run(config, tokens, lengths, key, new=8, samples=2)
    for i, length in enumerate(lengths[:3]):
        own = jax.random.fold_in(key, i)[None]
        alone = run(config, tokens[i : i + 1, :length], lengths[i : i + 1], own, new=8, samples=2)
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[i])
        np.testing.assert_allclose(alone.logprobs[0], out.logprobs[i], atol=1e-5)


def test_samples_equal_repeated_prompts():
    config = MODELS["gqa4, qk-norm, tied, yarn"]
    tokens, lengths = prompts(config)
    key = jax.random.key(2)
    out = run(config, tokens, lengths, key, new=8, samples=3)
    fold = jax.random.fold_in
    keys = jnp.stack([fold(fold(key, i), j) for i in range(4) for j in range(3)])
    again = run(config, np.repeat(tokens, 3, 0), np.repeat(lengths, 3), keys[:, None], new=8)
    np.testing.assert_array_equal(out.tokens.reshape(12, 8), again.tokens[:, 0])
    fewer = run(config, tokens, lengths, key, new=8, samples=1)
    np.testing.assert_array_equal(out.tokens[:, :1], fewer.tokens)


def test_the_prompts_are_read_once_whatever_the_samples():
    """No product over the prompt's length has as many rows as there are samples."""
    config = MODELS["mha, remat"]
    module, params = model(config)
    tokens, lengths = prompts(config)
    call = functools.partial(prefill, module, room=20, samples=5)
    text = str(jax.make_jaxpr(call)(params, tokens, lengths, jax.random.key(0)))
    assert "f32[4,9,32]" in text and "f32[20,9,32]" not in text


def test_stop_tokens_end_rows_one_by_one():
    config = MODELS["mha, remat"]
    tokens, lengths = prompts(config)
    key = jax.random.key(4)
    free = np.asarray(run(config, tokens, lengths, key, new=16, samples=2).tokens)
    stop = (int(free[0, 0, 3]), int(free[2, 1, 5]), int(free[1, 0, 0]))
    out = run(config, tokens, lengths, key, new=16, samples=2, stop=stop, pad=60)
    for i, j in np.ndindex(free.shape[:2]):
        hits = np.flatnonzero(np.isin(free[i, j], stop))
        length = int(hits[0]) + 1 if len(hits) else 16
        assert int(out.lengths[i, j]) == length and bool(out.done[i, j]) == bool(len(hits))
        np.testing.assert_array_equal(out.tokens[i, j, :length], free[i, j, :length])
        assert np.all(np.asarray(out.tokens[i, j, length:]) == 60)
        for numbers in (out.logprobs, out.entropies, out.sampling_logprobs):
            assert not np.any(np.asarray(numbers[i, j, length:]))


def test_the_loop_ends_when_all_rows_have():
    config = MODELS["mha, remat"]
    tokens, lengths = prompts(config)
    module, params = model(config)

    @quick_jit
    def call(params):
        start = prefill(module, params, tokens, lengths, jax.random.key(0), room=109)
        return decode(module, params, start, steps=100, stop=tuple(range(61)))

    after, out = call(params)
    assert int(after.made) == 1 and np.all(np.asarray(after.done))
    assert np.all(np.asarray(out.lengths) == 1)


def test_pieces_with_a_donated_state_equal_one_call():
    config = MODELS["gqa2, two to a block, dense"]
    tokens, lengths = prompts(config)
    whole = run(config, tokens, lengths, jax.random.key(6), new=12, samples=2, stop=(5, 9))
    module, params = unroll(*model(config))
    start = quick_jit(functools.partial(prefill, module, room=9 + 12, samples=2))
    step = quick_jit(functools.partial(decode, module, steps=4, stop=(5, 9)), donate_argnums=1)
    progress, pieces = start(params, tokens, lengths, jax.random.key(6)), []
    for _ in range(3):
        progress, piece = step(params, progress)
        pieces.append(piece)
    for name in ("tokens", "logprobs", "entropies", "sampling_logprobs"):
        joined = np.concatenate([getattr(piece, name) for piece in pieces], -1)
        np.testing.assert_allclose(joined, getattr(whole, name), atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(sum(p.lengths for p in pieces), whole.lengths)
    np.testing.assert_array_equal(pieces[-1].done, whole.done)


@pytest.mark.parametrize(
    "shape, unrolled",
    [
        (MeshShape(data=8), False),
        (MeshShape(data=1, fsdp=2, tensor=4), True),
        (MeshShape(data=2, context=2, tensor=2), False),
    ],
    ids=["data8", "fsdp2 x tensor4, unrolled", "data2 x context2 x tensor2"],
)
def test_a_mesh_changes_no_token(shape, unrolled):
    config = DecoderConfig(**{**BASE, "vocab": 64}, heads=8, kv_heads=4, qk_norm=True)
    module, params = model(config)
    tokens, lengths = prompts(config)
    options = dict(new=6, samples=2, stop=(3, 4), sampling=Sampling(1.1, top_p=0.9))
    expected = run(config, tokens, lengths, jax.random.key(8), **options)
    mesh = make_mesh(shape)
    axes = logical_axes(module, (jax.ShapeDtypeStruct((1, 4), jnp.int32),))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings(axes, mesh))

        @quick_jit
        def rollout(params, key):
            pair = unroll(module, params) if unrolled else (module, params)
            start = prefill(*pair, tokens, lengths, key, room=16, samples=2)
            return generate(*pair, tokens, lengths, key, **options), start.states

        out, states = rollout(params, jax.random.key(8))
    np.testing.assert_array_equal(out.tokens, expected.tokens)
    np.testing.assert_array_equal(out.lengths, expected.lengths)
    np.testing.assert_allclose(out.logprobs, expected.logprobs, atol=1e-5)
    cache = jax.tree.leaves(states)[0]
    local = cache.addressable_shards[0].data.size
    assert local * mesh.devices.size == cache.size * mesh.shape["context"]


def test_a_second_call_compiles_nothing():
    config = MODELS["mha, remat"]
    module, params = model(config)
    traces = []

    @jax.jit
    def call(params, tokens, lengths, key, heat, p):
        traces.append(1)
        sampling = Sampling(heat, top_p=p)
        return generate(module, params, tokens, lengths, key, new=4, sampling=sampling)

    for seed, heat, p in ((0, 1.0, 0.9), (1, 0.0, 0.5), (2, 0.3, 1.0)):
        tokens, lengths = prompts(config, seed)
        call(params, tokens, np.roll(lengths, seed), jax.random.key(seed), heat, p)
    assert len(traces) == 1 and call._cache_size() == 1


def test_bfloat16_state_and_numbers():
    config = DecoderConfig(**BASE, heads=4, kv_heads=2, dtype="bfloat16")
    module, params = model(config)
    tokens, lengths = prompts(config)
    assert module.init_state(1, 3)[0].keys.dtype == jnp.bfloat16
    scanned, unrolled = (
        run(config, tokens, lengths, jax.random.key(0), new=5, unrolled=u) for u in (False, True)
    )
    np.testing.assert_array_equal(scanned.tokens, unrolled.tokens)
    assert scanned.logprobs.dtype == jnp.float32
    dtypes = {x.dtype for x in jax.tree.leaves(unroll(module, params)[1]) if x.ndim > 1}
    assert dtypes == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(new=0), "new=0 must be at least 1"),
        (dict(samples=0), "samples=0 must be at least 1"),
        (dict(stop=(3, 61)), r"stop=\[61\] are no tokens of the model, which has 61"),
        (dict(sampling=Sampling(-1.0)), "temperature=-1.0"),
        (dict(lengths=np.ones(3, np.int32)), r"lengths must be \(4,\)"),
        (dict(prompts=np.ones(9, np.int32)), r"prompts must be \[batch, length\], none 0"),
        (dict(key=jax.random.split(jax.random.key(0), 3)), r"shape \(\), \(4,\) or \(4, 1\), got"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    config = MODELS["mha, remat"]
    tokens, lengths = prompts(config)
    arguments = dict(prompts=tokens, lengths=lengths, key=jax.random.key(0), new=2) | change
    with pytest.raises(ValueError, match=message):
        generate(*model(config), **arguments)


def test_the_documentation_runs():
    text = (Path(__file__).parent.parent / "docs" / "generation.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {})
