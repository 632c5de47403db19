"""Low-rank adapters: the algebra against NumPy, the frozen base bit for bit, PEFT folders."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_hf import CASES, place, replay

from jaxlab.paths import flatten
from jaxlab.sampling import GREEDY
from models import hf
from models.decoder import DecoderConfig
from models.generate import generate
from models.lora import (
    Lora,
    Sides,
    lora_init,
    lora_merge,
    lora_num_params,
    lora_stack,
    lora_unmerge,
    sides_of,
)
from models.peft import load_adapter, save_adapter
from sharding.mesh import MeshShape, make_mesh
from train import trainer
from train.checkpoint import Checkpoints
from train.data.text import Text
from train.metrics import read, series
from train.objectives import NextToken
from train.optimizer import Optimizer, join, split
from train.run import Run, load_run

BASE = DecoderConfig(layers=2, d_model=32, heads=4, kv_heads=2, head_dim=8, mlp=48)
EVERY = "/w|head"
FREEZE = "^base/"


def made(config, seed=0):
    """(module, parameters) with adapters that are not zero."""
    module = config.build("cpu")
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = nn.unbox(module.init(jax.random.key(seed), tokens))["params"]
    draw = lambda x: 0.05 * jax.random.normal(jax.random.key(seed + x.size), x.shape, x.dtype)  # noqa: E731
    return module, params | {"lora": jax.tree.map(draw, params["lora"])}


SHAPES = st.tuples(st.integers(0, 2), st.integers(1, 2), st.integers(1, 2))


@settings(max_examples=8, deadline=None, database=None, derandomize=True)
@given(SHAPES, st.integers(1, 5), st.floats(0.5, 40), st.integers(0, 9))
def test_merge_is_w_plus_scaled_ab(axes, rank, alpha, seed):
    stack, inputs, outputs = axes
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 5, stack + inputs + outputs))
    params = {"x": {"w": jnp.asarray(rng.standard_normal(shape), jnp.float32)}, "y": jnp.ones(3)}
    target = lambda path, leaf: path == "x/w" and Sides(stack, inputs)  # noqa: E731
    lora = lora_init(jax.random.key(seed), params, rank=rank, target=target)
    assert not np.any(lora["x"]["w"]["b"]) and np.any(lora["x"]["w"]["a"])
    same = lora_merge(params, lora, alpha=alpha)
    np.testing.assert_array_equal(same["x"]["w"], params["x"]["w"])
    b = rng.standard_normal(lora["x"]["w"]["b"].shape)
    lora = {"x": {"w": {"a": lora["x"]["w"]["a"], "b": jnp.asarray(b, jnp.float32)}}}
    a = np.asarray(lora["x"]["w"]["a"], np.float64)
    groups = int(np.prod(shape[:stack]))
    rows = int(np.prod(shape[stack : stack + inputs]))
    delta = np.stack(
        [
            x @ y * alpha / rank
            for x, y in zip(a.reshape(groups, rows, rank), b.reshape(groups, rank, -1), strict=True)
        ]
    )
    merged = lora_merge(params, lora, alpha=alpha)
    expected = np.asarray(params["x"]["w"], np.float64) + delta.reshape(shape)
    np.testing.assert_allclose(merged["x"]["w"], expected, rtol=1e-5, atol=1e-4)
    assert merged["y"] is params["y"]
    back = lora_unmerge(merged, lora, alpha=alpha)
    np.testing.assert_allclose(back["x"]["w"], params["x"]["w"], atol=1e-4)
    assert lora_num_params(lora) == a.size + b.size


def test_plain_matrices_need_no_sides_and_others_do():
    params = {"w": jnp.ones((3, 4)), "cube": jnp.ones((2, 3, 4)), "v": jnp.ones(3)}
    lora = lora_init(jax.random.key(0), params, rank=2, target=lambda p, _: p == "w")
    assert lora["w"]["a"].shape == (3, 2) and lora["w"]["b"].shape == (2, 4)
    with pytest.raises(ValueError, match="cube of shape .* by Sides"):
        lora_init(jax.random.key(0), params, rank=2, target=lambda p, _: p == "cube")
    with pytest.raises(ValueError, match="v of shape .* is no matrix"):
        lora_init(jax.random.key(0), params, rank=2, target=lambda p, _: p == "v")
    with pytest.raises(ValueError, match="rank=0"):
        lora_init(jax.random.key(0), params, rank=0, target=lambda p, _: True)
    with pytest.raises(ValueError, match="matches none"):
        lora_init(jax.random.key(0), params, rank=1, target=lambda p, _: False)
    with pytest.raises(ValueError, match="does not fit"):
        lora_merge({"w": jnp.ones((4, 3))}, lora, alpha=1)
    with pytest.raises(ValueError, match="belongs to none"):
        lora_merge({"u": jnp.ones((4, 3))}, lora, alpha=1)


def test_initial_scales():
    params = {"w": jnp.ones((400, 3))}
    for init, std in (("normal", 1 / 20), ("kaiming", 1 / 20 / 3**0.5)):
        lora = lora_init(jax.random.key(0), params, rank=50, target=lambda *_: True, init=init)
        assert np.std(lora["w"]["a"]) == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("pattern", [("attention",), ("attention", "attention")])
@pytest.mark.parametrize("targets", ["/w[qv]$", "wo$|w_down", EVERY])
def test_merged_equals_unmerged(targets, pattern):
    config = Lora(base=dataclasses.replace(BASE, pattern=pattern), rank=3, targets=targets)
    module, params = made(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 256)
    low_rank = jax.jit(module.apply)({"params": params}, tokens)
    merged = lora_merge(params["base"], params["lora"], alpha=config.alpha)
    whole = module.base.apply({"params": merged}, tokens)
    plain = module.base.apply({"params": params["base"]}, tokens)
    assert jnp.abs(whole - plain).max() > 0.01
    np.testing.assert_allclose(low_rank, whole, rtol=0, atol=1e-5)


def test_gradient_of_the_low_rank_form_is_that_of_the_merged():
    config = Lora(base=BASE, rank=2, targets=EVERY)
    module, params = made(config)
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)

    def loss(apply):
        return lambda lora: jnp.mean(jnp.sin(apply(lora)))

    low = loss(lambda lora: module.apply({"params": params | {"lora": lora}}, tokens))
    whole = loss(
        lambda lora: module.base.apply(
            {"params": lora_merge(params["base"], lora, alpha=config.alpha)}, tokens
        )
    )
    a, b = jax.grad(low)(params["lora"]), jax.grad(whole)(params["lora"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), a, b)


def test_generation_with_an_adapter_is_that_of_the_merged_model():
    config = Lora(BASE, rank=3, targets=EVERY)
    module, params = made(config)
    merged = lora_merge(params["base"], params["lora"], alpha=config.alpha)
    prompts, lengths = jnp.array([[5, 6, 7], [9, 0, 0]]), jnp.array([3, 1])
    got, expected = (
        generate(m, p, prompts, lengths, jax.random.key(0), new=6, sampling=GREEDY)
        for m, p in ((module, params), (BASE.build("cpu"), merged))
    )
    np.testing.assert_array_equal(got.tokens, expected.tokens)
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-5)


def test_an_adapter_an_example_under_vmap():
    config = Lora(base=BASE, rank=2, targets=EVERY)
    module, params = made(config)
    others = [made(config, seed)[1]["lora"] for seed in range(3)]
    tokens = jax.random.randint(jax.random.key(1), (3, 7), 0, 256)

    def one(lora, row):
        return module.apply({"params": params | {"lora": lora}}, row[None])[0]

    together = jax.jit(jax.vmap(one))(lora_stack(others), tokens)
    for i, lora in enumerate(others):
        np.testing.assert_allclose(together[i], one(lora, tokens[i]), rtol=0, atol=1e-5)
    assert jnp.abs(together[0] - one(others[1], tokens[0])).max() > 0.01


def test_sides_follow_the_logical_axes():
    assert sides_of(("layers", "embed", "heads", "head_dim")) == Sides(1, 1)
    assert sides_of(("layers", "heads", "head_dim", "embed")) == Sides(1, 2)
    assert sides_of(("embed", "vocab")) == Sides(0, 1)
    for axes in (("layers", "norm"), ("vocab_in", None)):
        with pytest.raises(ValueError, match="not a matrix"):
            sides_of(axes)
    with pytest.raises(ValueError, match="model.targets='norm': .* is not a matrix"):
        made(Lora(base=BASE, targets="norm"))
    with pytest.raises(ValueError, match="model.base.kv_heads=3"):
        Lora(base=dataclasses.replace(BASE, kv_heads=3)).check({})


RUN = Run(
    model=Lora(base=BASE, rank=4),
    objective=NextToken(),
    source=Text(seq_len=32),
    optimizer=Optimizer(lr=0.02, warmup=5, freeze=FREEZE, ema=0.5),
    steps=20,
    batch=8,
    log_every=1,
    save_every=0,
)


def test_fine_tune_leaves_the_base_bit_identical_on_1_and_8_devices(tmp_path, monkeypatch):
    """Also: the optimiser holds nothing for the base, and both meshes agree."""
    losses, devices = {}, jax.devices()
    for n, mesh in ((1, MeshShape(data=1)), (8, MeshShape(data=2, fsdp=2, tensor=2))):
        monkeypatch.setattr(jax, "device_count", lambda n=n: n)
        monkeypatch.setattr(
            trainer, "make_mesh", lambda s, d=None, n=n: make_mesh(s, d or devices[:n])
        )
        folder = tmp_path / str(n)
        trainer.fit(dataclasses.replace(RUN, mesh=mesh), folder, quiet=True)
        losses[n] = series(read(folder), "train", "loss")[1]
        program = trainer.build(load_run(folder))
        with jax.set_mesh(program.mesh):
            first = program.init()
        checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
        last = trainer.restore(program, checkpoints).state
        checkpoints.close()
        for tree in (last.params, last.ema):
            pairs_ = zip(
                jax.tree.leaves(tree["base"]), jax.tree.leaves(first.params["base"]), strict=True
            )
            assert all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs_)
        assert not np.any(first.params["lora"]["blocks"]["mixer_0"]["wq"]["b"])
        assert np.any(last.params["lora"]["blocks"]["mixer_0"]["wq"]["b"])
        held = sum(x.size for x in jax.tree.leaves(last.opt))
        assert held <= 2 * lora_num_params(last.params["lora"]) + 8
    print("final losses", losses[1][-1], losses[8][-1])
    np.testing.assert_allclose(losses[8], losses[1], rtol=0, atol=1e-4)
    assert losses[1][-1] < losses[1][0] - 0.3


@pytest.mark.parametrize("name", ["adamw", "muon", "sgd"])
def test_frozen_parameters_keep_their_bits_even_minus_zero(name):
    config = dataclasses.replace(RUN, optimizer=Optimizer(name=name, lr=0.1, freeze=FREEZE))
    program = trainer.build(dataclasses.replace(config, mesh=MeshShape(data=1)))
    rows = config.source.make(8, seed=0, split="train").batch_at(0)
    with jax.set_mesh(program.mesh):
        state = program.init()
        base = jax.tree.map(lambda x: jnp.where(x < 0, -0.0, x), state.params["base"])
        state = state._replace(params=state.params | {"base": base})
        before = jax.tree.map(lambda x: np.asarray(x).tobytes(), state.params)
        state, _ = program.step(state, rows)
    after = jax.tree.map(lambda x: np.asarray(x).tobytes(), state.params)
    assert after["base"] == before["base"] and after["lora"] != before["lora"]


def test_split_and_join():
    tree = {"a": {"x": 1, "y": 2}, "b": 3}
    assert split(tree, "") == (tree, {})
    assert split(tree, "^a/x$") == ({"a": {"y": 2}, "b": 3}, {"a": {"x": 1}})
    assert join(*split(tree, "x|b")) == tree
    with pytest.raises(ValueError, match="freezes no parameter"):
        split(tree, "nothing")
    with pytest.raises(ValueError, match="freezes every parameter"):
        split(tree, ".")
    with pytest.raises(ValueError, match=r"optimizer.freeze='\('"):
        Optimizer(freeze="(").check()


@pytest.mark.parametrize("targets", ["/w[qv]$", EVERY])
def test_peft_folder_round_trip(targets, tmp_path):
    config = Lora(base=BASE, rank=3, alpha=5.0, targets=targets)
    _, params = made(config)
    save_adapter(params["lora"], config, tmp_path / "a")
    got, lora = load_adapter(tmp_path / "a", BASE)
    assert (got.rank, got.alpha) == (3, 5.0)
    jax.tree.map(np.testing.assert_array_equal, lora, params["lora"])
    again = made(got)[1]["lora"]
    assert jax.tree.structure(again) == jax.tree.structure(lora)
    held = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    wq = params["lora"]["blocks"]["mixer_0"]["wq"]
    np.testing.assert_array_equal(held[name], np.asarray(wq["b"][1]).reshape(3, 32).T)
    held[name] = held[name][:5]
    held.pop(name.replace("layers.1", "layers.0"))
    held["other"] = held[name]
    save_file(held, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError) as error:
        load_adapter(tmp_path / "a", BASE)
    for part in ("is missing", "has shape (5, 3), expected (32, 3)", "other is not expected"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["lora", "rslora"])
def test_recorded_logits_of_peft(name, tmp_path):
    """An adapter that PEFT made, on a model that transformers made."""
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter").mkdir()
    replay("qwen3-linear", tmp_path / "base")
    tensors = load_file(CASES / f"peft-{name}.safetensors")
    tokens, expected = (tensors.pop(f"case.{k}") for k in ("tokens", "logits"))
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((CASES / f"peft-{name}.json").read_text())["config"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    directory = hf.Directory(tmp_path / "base")
    model, lora = load_adapter(tmp_path / "adapter", directory.config)
    params = {"base": place(directory), "lora": lora}
    got = np.asarray(jax.jit(model.build("cpu").apply)({"params": params}, tokens))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_every_adapter_is_used():
    """The gradient reaches each adapter: none is silently ignored by a layer."""
    module, params = made(Lora(base=BASE, rank=2, targets=EVERY))
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)

    def loss(lora):
        out = module.apply({"params": params | {"lora": lora}}, tokens)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(out, tokens))

    grads = flatten(jax.grad(loss)(params["lora"]))
    assert len(grads) == 16 and all(np.any(g) for g in grads.values())
