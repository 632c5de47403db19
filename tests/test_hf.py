"""Hugging Face directories without PyTorch: recorded logits, round trips, slices, refusals."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs import presets
from jaxlab.rope import LinearScaling, Llama3Scaling, YarnScaling
from models import hf
from models.decoder import DecoderConfig
from models.hf_names import decoder_config, entries, hf_config
from sharding.mesh import MeshShape, make_mesh
from sharding.rules import shardings
from train import trainer
from train.checkpoint import Checkpoints
from train.exchange import export_hf, import_hf
from train.metrics import read, series
from train.run import load_run
from train.state import logical_axes

CASES = Path(__file__).parent / "cases"
SMALL = DecoderConfig(
    vocab=260, layers=2, d_model=32, heads=4, kv_heads=2, head_dim=16, mlp=48, qk_norm=True
)


ONE = MeshShape(data=1)


def place(directory, dtype=None, shape=ONE):
    """Parameters on the first devices of a mesh of `shape`."""
    config = dataclasses.replace(directory.config, param_dtype=dtype or directory.dtype)
    module = config.build("cpu")
    mesh = make_mesh(shape, jax.devices()[: shape.size])
    placed = shardings(logical_axes(module, (jax.ShapeDtypeStruct((1, 4), jnp.int32),)), mesh)
    shapes = jax.eval_shape(
        lambda: nn.unbox(module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]
    )
    give = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
    return hf.load(directory, jax.tree.map(give, shapes, placed))


def logits(config, params, tokens):
    """Ours in float32."""
    module = config.build("cpu")
    return np.asarray(jax.jit(module.apply)({"params": params}, jnp.asarray(tokens)))


def replay(name, folder):
    """A recorded case as (Hugging Face directory, tokens, logits of transformers)."""
    tensors = load_file(CASES / f"hf-{name}.safetensors")
    case = {k: tensors.pop(k) for k in ("case.tokens", "case.logits")}
    config = json.loads((CASES / f"hf-{name}.json").read_text())["config"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder, case["case.tokens"], case["case.logits"]


NAMES = sorted(p.stem.removeprefix("hf-") for p in CASES.glob("hf-*.json"))


def test_cases_are_there():
    assert len(NAMES) >= 10 and {n.split("-")[0] for n in NAMES} == {"llama", "qwen3"}


@pytest.mark.parametrize("name", NAMES)
def test_recorded_logits_of_transformers(name, tmp_path):
    folder, tokens, expected = replay(name, tmp_path)
    directory = hf.Directory(folder)
    got = logits(directory.config, place(directory), tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def write(folder, config=SMALL, dtype="float32", seed=0, scale=1.0, **changes):
    """A directory with random weights; `changes` go into its config.json."""
    rng = np.random.default_rng(seed)
    kind = jnp.dtype(dtype)
    arrays = {
        name: (scale * rng.standard_normal(e.hf_shape)).astype(kind)
        for e in entries(config)
        for name in e.names
    }
    folder.mkdir(exist_ok=True)
    save_file(arrays, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(config, dtype, 128) | changes))
    return arrays


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (1, 2, 1, 1, 2), (2, 2, 1, 1, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_shard_holds_the_transposed_slice(shape, dtype, tmp_path):
    """Oracle: each tensor read whole and transposed by NumPy."""
    arrays = write(tmp_path / "m", dtype=dtype)
    params = place(hf.Directory(tmp_path / "m"), None, MeshShape(*shape))
    kind = "float32" if dtype == "float16" else dtype
    wq = np.stack([arrays[f"model.layers.{i}.self_attn.q_proj.weight"].T for i in range(2)])
    wo = np.stack([arrays[f"model.layers.{i}.self_attn.o_proj.weight"].T for i in range(2)])
    down = np.stack([arrays[f"model.layers.{i}.mlp.down_proj.weight"].T for i in range(2)])
    expected = {
        ("blocks", "mixer_0", "wq"): wq.reshape(2, 32, 4, 16),
        ("blocks", "mixer_0", "wo"): wo.reshape(2, 4, 16, 32),
        ("blocks", "mlp_0", "w_down"): down,
        ("embedding",): arrays["model.embed_tokens.weight"],
        ("head",): arrays["lm_head.weight"].T,
    }
    for path, value in expected.items():
        leaf = params
        for key in path:
            leaf = leaf[key]
        assert leaf.dtype == kind
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(
                np.asarray(shard.data), value[shard.index].astype(kind), err_msg=str(path)
            )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_bytes", [5000, 2**30])
def test_round_trip_is_bit_identical(tied, shard_bytes, tmp_path):
    config = dataclasses.replace(SMALL, tied=tied, rope_scaling=YarnScaling(factor=3.0))
    arrays = write(tmp_path / "a", config, "bfloat16")
    directory = hf.Directory(tmp_path / "a")
    assert directory.config == config
    hf.save(place(directory), config, tmp_path / "b", shard_bytes=shard_bytes)
    again = hf.Directory(tmp_path / "b")
    assert again.config == config
    files = list((tmp_path / "b").glob("*.safetensors"))
    assert (len(files) > 2) == (shard_bytes == 5000)
    for name, value in arrays.items():
        np.testing.assert_array_equal(again.read(name, (slice(None),) * value.ndim), value)


@pytest.mark.parametrize(
    "scaling", [None, LinearScaling(3.0), Llama3Scaling(), YarnScaling(attention_factor=1.2)]
)
@pytest.mark.parametrize("form", ["old", "new", "both"])
def test_rotary_settings_in_both_forms(scaling, form):
    config = dataclasses.replace(SMALL, rope_theta=5e5, rope_scaling=scaling)
    data = hf_config(config, "float32", 128)
    for name in {"old": ["rope_parameters"], "new": ["rope_theta", "rope_scaling"]}.get(form, []):
        del data[name]
    assert decoder_config(data) == config


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architectures": ["MistralForCausalLM"]}, "architectures="),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not one of"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": 1}}, "with mscale"),
        ({"rope_parameters": {"rope_type": "linear"}}, "needs a factor"),
        ({"rope_parameters": "yarn"}, "rope_parameters='yarn' must be an object"),
        ({"rope_parameters": None, "rope_scaling": {"factor": 8}}, "'default' with factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "with full_attention"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "contradict each other"),
        ({"rope_theta": 5e5}, "rope_theta is given as"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor='2' must be"),
        ({"vocab_size": None}, "vocab_size=None must be a positive integer"),
        ({"vocab_size": "260"}, "vocab_size='260' must be a positive integer"),
        ({"num_hidden_layers": -2}, "num_hidden_layers=-2 must be"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be"),
        ({"architectures": None}, "architectures=None is not one of"),
    ],
)
def test_configurations_that_are_not_computed_are_refused(changes, message, tmp_path):
    write(tmp_path / "m", **changes)
    with pytest.raises(ValueError, match=message):
        hf.Directory(tmp_path / "m")


@pytest.mark.parametrize("name", ["config.json", hf.INDEX])
@pytest.mark.parametrize(
    "text, message",
    [("[]", "must hold a JSON object, not list"), ("{", "is not JSON"), ("\xff", "is not JSON")],
)
def test_files_without_an_object_are_named(name, text, message, tmp_path):
    write(tmp_path / "m")
    (tmp_path / "m" / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} {message}"):
        hf.Directory(tmp_path / "m")


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": "../model.safetensors"}])
def test_an_index_names_files_of_its_folder(weight_map, tmp_path):
    write(tmp_path / "m")
    (tmp_path / "m" / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="weight_map must name files of the folder"):
        hf.Directory(tmp_path / "m")


def test_what_is_there_twice_is_refused(tmp_path):
    arrays = write(tmp_path / "m")
    save_file({"model.norm.weight": np.ones(32)}, tmp_path / "m" / "z.safetensors")
    with pytest.raises(ValueError, match=r"norm.weight is in two files, model.safe.* and z.safe"):
        hf.Directory(tmp_path / "m")
    (tmp_path / "m" / hf.INDEX).write_text(json.dumps({"weight_map": {"a": "z.safetensors"}}))
    with pytest.raises(ValueError, match="both model.safetensors and model.safetensors.index"):
        hf.Directory(tmp_path / "m")
    arrays = write(tmp_path / "t", dataclasses.replace(SMALL, tied=True))
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    save_file(arrays, tmp_path / "t" / "model.safetensors")
    hf.Directory(tmp_path / "t")
    arrays["lm_head.weight"][-1, -1] += 1
    save_file(arrays, tmp_path / "t" / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is not the embedding"):
        hf.Directory(tmp_path / "t")


def test_replicas_are_read_once(tmp_path, monkeypatch):
    write(tmp_path / "m")
    directory, read = hf.Directory(tmp_path / "m"), []
    plain = directory.read
    monkeypatch.setattr(directory, "read", lambda n, i: read.append(n) or plain(n, i))
    place(directory, None, MeshShape(data=4, fsdp=2))
    assert read.count("model.norm.weight") == 1 and read.count("lm_head.weight") == 2


def test_a_directory_is_bfloat16_only_if_all_matrices_are(tmp_path):
    arrays = write(tmp_path / "m", dtype="bfloat16")
    assert hf.Directory(tmp_path / "m").dtype == "bfloat16"
    arrays["lm_head.weight"] = arrays["lm_head.weight"].astype(np.float32)
    save_file(arrays, tmp_path / "m" / "model.safetensors")
    assert hf.Directory(tmp_path / "m").dtype == "float32"


def test_one_error_lists_every_bad_tensor(tmp_path):
    arrays = write(tmp_path / "m")
    del arrays["model.norm.weight"]
    arrays["model.layers.0.self_attn.q_proj.weight"] = np.zeros((3, 3), np.float32)
    arrays["model.layers.1.self_attn.q_proj.bias"] = np.zeros(3, np.float32)
    arrays["lm_head.weight"] = arrays["lm_head.weight"].astype(np.int32)
    save_file(arrays, tmp_path / "m" / "model.safetensors")
    with pytest.raises(ValueError) as error:
        import_hf(tmp_path / "m", tmp_path / "run", [])
    text = str(error.value)
    for part in (
        "model.norm.weight is missing",
        "q_proj.weight has shape (3, 3), expected (64, 32)",
        "q_proj.bias is not expected",
        "lm_head.weight has type I32",
    ):
        assert part in text
    assert not (tmp_path / "run").exists()


def test_missing_shard_and_occupied_folders(tmp_path):
    write(tmp_path / "m")
    (tmp_path / "m" / hf.INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match="gone.safetensors"):
        hf.Directory(tmp_path / "m")
    (tmp_path / "busy").mkdir()
    (tmp_path / "busy" / "x").write_text("precious")
    for call in (
        lambda: import_hf(tmp_path / "m", tmp_path / "busy", []),
        lambda: export_hf(tmp_path / "m", tmp_path / "busy"),
        lambda: hf.save({}, SMALL, tmp_path / "busy"),
    ):
        with pytest.raises(ValueError, match="is not empty"):
            call()
    assert [p.name for p in (tmp_path / "busy").iterdir()] == ["x"]


FIELDS = [
    "source.tokenizer=bytes",
    "source.seq_len=32",
    "steps=2",
    "optimizer.lr=0.001",
    "mesh.fsdp=2",
    "mesh.data=4",
]


def test_imported_run_trains_resumes_and_exports(tmp_path):
    arrays = write(tmp_path / "m")
    import_hf(tmp_path / "m", tmp_path / "run", FIELDS)
    export_hf(tmp_path / "run", tmp_path / "same")
    assert load_file(tmp_path / "same" / "model.safetensors").keys() == arrays.keys()
    for name, value in load_file(tmp_path / "same" / "model.safetensors").items():
        np.testing.assert_array_equal(value, arrays[name])
    run = dataclasses.replace(load_run(tmp_path / "run"), steps=1, evaluators=())
    assert trainer.fit(run, tmp_path / "run", quiet=True).step == 1
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps() == [0, 1]
    with pytest.raises(ValueError, match="optimizer.lr: 0.001 there, 0.5 now"):
        other = dataclasses.replace(run.optimizer, lr=0.5)
        trainer.fit(dataclasses.replace(run, optimizer=other), tmp_path / "run", quiet=True)
    export_hf(tmp_path / "run", tmp_path / "after", dtype="bfloat16")
    after = load_file(tmp_path / "after" / "model.safetensors")
    assert after["model.norm.weight"].dtype == jnp.bfloat16
    assert not np.array_equal(after["lm_head.weight"], arrays["lm_head.weight"].astype("bfloat16"))


def test_fine_tuning_an_imported_model_is_the_same_on_1_and_8_devices(tmp_path, monkeypatch):
    """All parameters, twenty steps."""
    write(tmp_path / "m", scale=0.2)
    losses, devices = {}, jax.devices()
    fields = ["source.tokenizer=bytes", "source.seq_len=32", "steps=20", "optimizer.lr=0.01"]
    for n, mesh in ((1, ["mesh.data=1"]), (8, ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"])):
        monkeypatch.setattr(jax, "device_count", lambda n=n: n)
        monkeypatch.setattr(
            trainer, "make_mesh", lambda s, d=None, n=n: make_mesh(s, d or devices[:n])
        )
        folder = tmp_path / str(n)
        import_hf(tmp_path / "m", folder, [*fields, *mesh])
        trainer.fit(dataclasses.replace(load_run(folder), log_every=1), folder, quiet=True)
        losses[n] = series(read(folder), "train", "loss")[1]
    print("final losses", losses[1][-1], losses[8][-1])
    assert len(losses[1]) == 20 and losses[1][-1] < losses[1][0] - 0.3
    np.testing.assert_allclose(losses[8], losses[1], rtol=0, atol=1e-4)


def test_another_model_than_imported_is_refused(tmp_path):
    write(tmp_path / "m")
    with pytest.raises(ValueError, match="model.layers=4 is not the imported model's 2"):
        import_hf(tmp_path / "m", tmp_path / "run", ["source.tokenizer=bytes", "model.layers=4"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("llama3_1b", 1_235_814_400),
        ("llama3_8b", 8_030_261_248),
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_32b", 32_762_123_264),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, parameters):
    """As counted in the published checkpoints' safetensors."""
    module = presets()[preset].make().model.build("cpu")
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters
