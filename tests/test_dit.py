"""DiT against the same network written in NumPy from its description; sharding; the release's names."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from models.dit import DiT, dit_params_from_torch
from sharding.context import ContextConfig
from sharding.mesh import MeshShape, make_mesh

V, D, H, N, C = 11, 16, 2, 3, 6
MODULE = DiT(V, D, H, N, C, dtype="float32")


def release_state(rng):
    """Random parameters under the release's names."""
    sizes = {"vocab_embed.embedding": (V, D), "output_layer.norm_final.weight": (D,)}

    def linear(name, n_in, n_out):
        sizes[f"{name}.weight"], sizes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    linear("sigma_map.mlp.0", 256, C)
    linear("sigma_map.mlp.2", C, C)
    linear("output_layer.adaLN_modulation", C, 2 * D)
    linear("output_layer.linear", D, V)
    for i in range(N):
        for name in ("norm1", "norm2"):
            sizes[f"blocks.{i}.{name}.weight"] = (D,)
        sizes[f"blocks.{i}.attn_qkv.weight"] = (3 * D, D)
        sizes[f"blocks.{i}.attn_out.weight"] = (D, D)
        linear(f"blocks.{i}.mlp.0", D, 4 * D)
        linear(f"blocks.{i}.mlp.2", 4 * D, D)
        linear(f"blocks.{i}.adaLN_modulation", C, 6 * D)
    state = {name: rng.normal(size=shape) / shape[-1] ** 0.5 for name, shape in sizes.items()}
    return state | {"rotary_emb.inv_freq": rng.normal(size=D // H // 2)}


def oracle(state, embedded, sigma):
    """Float64 logits of embeddings [b, t, d], section 8.1 of the note line by line."""
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    lin = lambda x, n: x @ state[f"{n}.weight"].T + state.get(f"{n}.bias", 0)  # noqa: E731
    f = np.exp(-np.log(1e4) * np.arange(128) / 128)
    features = np.concatenate([np.cos(sigma[:, None] * f), np.sin(sigma[:, None] * f)], -1)
    cond = silu(lin(silu(lin(features, "sigma_map.mlp.0")), "sigma_map.mlp.2"))

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * state[f"{name}.weight"]

    def rotate(x):  # [b, t, h, k], halves
        k = x.shape[-1]
        angle = np.arange(x.shape[1])[:, None] * 1e4 ** (-np.arange(0, k, 2) / k)
        cos, sin = (g(angle)[None, :, None] for g in (np.cos, np.sin))
        a, b = x[..., : k // 2], x[..., k // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731
    x, (b, t, d) = embedded, embedded.shape
    for i in range(N):
        at = f"blocks.{i}"
        six = np.split(lin(cond, f"{at}.adaLN_modulation")[:, None], 6, -1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = six
        y = norm(x, f"{at}.norm1") * (1 + scale_a) + shift_a
        qkv = lin(y, f"{at}.attn_qkv").reshape(b, t, 3, H, d // H)
        q, k, v = rotate(qkv[:, :, 0]), rotate(qkv[:, :, 1]), qkv[:, :, 2]
        p = softmax(np.einsum("bihk,bjhk->bhij", q, k) / np.sqrt(d // H), -1)
        y = np.einsum("bhij,bjhk->bihk", p, v).reshape(b, t, d)
        x = x + gate_a * lin(y, f"{at}.attn_out")
        y = norm(x, f"{at}.norm2") * (1 + scale_m) + shift_m
        x = x + gate_m * lin(gelu(lin(y, f"{at}.mlp.0")), f"{at}.mlp.2")
    shift, scale = np.split(lin(cond, "output_layer.adaLN_modulation")[:, None], 2, -1)
    return lin(norm(x, "output_layer.norm_final") * (1 + scale) + shift, "output_layer.linear")


@pytest.fixture(scope="module")
def release():
    rng = np.random.default_rng(0)
    state = release_state(rng)
    params = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32),
        dit_params_from_torch({f"backbone.{n}": a for n, a in state.items()}),
    )
    return state, params


def inputs_of(kind, rng):
    """(inputs, weights, embeddings of a table) for each way to give tokens."""
    if kind == "tokens":
        x = rng.integers(0, V, (2, 8))
        return x, None, lambda table: table[x]
    if kind == "mixture":
        x, w = rng.integers(0, V, (2, 8, 3)), rng.random((2, 8, 3)).astype(np.float32)
        return x, w, lambda table: np.einsum("btk,btkd->btd", w, table[x])
    x = rng.normal(size=(2, 8, V)).astype(np.float32)
    return x, None, lambda table: softmax(x.astype(np.float64), -1) @ table


@pytest.mark.parametrize("kind", ["tokens", "mixture", "soft"])
def test_logits_are_those_of_the_description(kind, release):
    state, params = release
    x, w, embed = inputs_of(kind, np.random.default_rng(1))
    sigma = np.array([0.3, 4.0], np.float32)
    got = jax.jit(MODULE.apply)({"params": params}, x, sigma, w)
    assert got.dtype == jnp.float32
    expected = oracle(state, embed(state["vocab_embed.embedding"]), sigma.astype(np.float64))
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max())


def test_new_parameters_have_the_shapes_of_the_release_and_give_its_flat_start(release):
    params = nn.unbox(MODULE.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.zeros(1)))
    assert jax.tree.map(jnp.shape, params["params"]) == jax.tree.map(jnp.shape, release[1])
    logits = MODULE.apply(params, jnp.ones((1, 4), jnp.int32), jnp.ones(1))
    np.testing.assert_array_equal(logits, jnp.zeros((1, 4, V)))


@pytest.mark.parametrize("method", ["ulysses", "ring", "allgather", "upipe"])
def test_sharded_over_the_sequence_gives_the_same_logits_and_gradients(method, release):
    params = release[1]
    sharded = dataclasses.replace(MODULE, context=ContextConfig(method), parent=None)
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, V)
    segments = jnp.array([[1] * 5 + [2] * 3, [1] * 8])
    sigma = jnp.array([0.1, 2.0])

    def loss(module, params):
        logits = module.apply({"params": params}, tokens, sigma, segment_ids=segments)
        return jnp.sum(jax.nn.log_softmax(logits) ** 2), logits

    whole = jax.jit(jax.value_and_grad(lambda p: loss(MODULE, p), has_aux=True))(params)
    mesh = make_mesh(MeshShape(data=2, context=2), jax.devices()[:4])
    with jax.set_mesh(mesh):
        split = jax.jit(jax.value_and_grad(lambda p: loss(sharded, p), has_aux=True))(params)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, float(jnp.abs(b).max())))


def test_documents_of_a_row_do_not_see_each_other(release):
    apply = jax.jit(
        lambda x, s: MODULE.apply({"params": release[1]}, x, jnp.ones(1), segment_ids=s)
    )
    x = jnp.arange(8)[None] % V
    segments = jnp.array([[1] * 4 + [2] * 4])
    one, other = (apply(y, segments) for y in (x, x.at[0, 6].set(9)))
    np.testing.assert_array_equal(one[:, :4], other[:, :4])
    assert float(jnp.abs(one[:, 4:] - other[:, 4:]).min(-1).max()) > 0


def test_dropout_is_random_only_when_asked(release):
    x, sigma = jnp.arange(8)[None] % V, jnp.ones(1)
    call = lambda key: MODULE.apply(  # noqa: E731
        {"params": release[1]}, x, sigma, deterministic=False, rngs={"dropout": key}
    )
    one, same, other = (call(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert float(jnp.abs(one - other).max()) > 0


def test_errors_name_what_is_wrong(release):
    with pytest.raises(ValueError, match=r"lacks \['output_layer.linear.bias'\] and has unknown"):
        state = dict(release[0])
        state["output_layer.linear.bias2"] = state.pop("output_layer.linear.bias")
        dit_params_from_torch(state)
    x = jnp.zeros((1, 4), jnp.int32)
    for changes, labels, match in (
        ({"hidden_size": 15}, None, "hidden_size=15"),
        ({"dropout": 1.0}, None, "dropout=1.0"),
        ({"num_classes": 3}, None, "num_classes=3, but no labels"),
        ({}, jnp.zeros(1, jnp.int32), "num_classes=None, but labels"),
    ):
        module = dataclasses.replace(MODULE, **changes, parent=None)
        with pytest.raises(ValueError, match=match):
            module.init(jax.random.key(0), x, jnp.zeros(1), labels=labels)
