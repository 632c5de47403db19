"""Against transformers and PEFT themselves; leaves the cases that tests/test_hf.py replays.

A case is recorded when its file is not there: delete tests/cases/hf-* to make them anew.
"""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from models import hf  # noqa: E402
from models.lora import Lora  # noqa: E402
from models.peft import load_adapter, save_adapter  # noqa: E402
from tests.test_hf import CASES, logits, place, replay  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("default")]

LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 3.0}
VARIANTS = {
    "llama": {},
    "llama-gqa2-linear": dict(kv=4, rope=LINEAR),
    "llama-gqa4-llama3-tied": dict(kv=2, rope=LLAMA3, tie_word_embeddings=True),
    "llama-gqa8-yarn": dict(kv=1, rope=YARN),
    "llama-derived-head": dict(kv=2, head_dim=None, hidden_size=64, num_hidden_layers=1),
    "qwen3-gqa8-tied": dict(kv=1, tie_word_embeddings=True),
    "qwen3-gqa2-yarn": dict(kv=4, rope=YARN | {"truncate": False, "beta_fast": 8.0}),
    "qwen3-gqa4-llama3": dict(kv=2, rope=LLAMA3, vocab_size=41),
    "qwen3-linear": dict(rope=LINEAR),
    "qwen3-yarn-factor": dict(kv=1, rope=YARN | {"attention_factor": 1.3}),
}


def make(name, seed=0):
    """A random model of transformers, with weights large enough for attention to matter."""
    options = dict(VARIANTS[name])
    qwen = name.startswith("qwen3")
    kind = transformers.Qwen3Config if qwen else transformers.LlamaConfig
    rope = options.pop("rope", {"rope_type": "default"}) | {"rope_theta": 500.0}
    fields = dict(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=options.pop("kv", 8), head_dim=8,
        max_position_embeddings=64, rope_parameters=rope, rms_norm_eps=1e-5,
    )  # fmt: skip
    config = kind(**(fields | options))
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    cls = transformers.Qwen3ForCausalLM if qwen else transformers.LlamaForCausalLM
    model = cls(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.ndim == 1:
                value.copy_(1 + 0.3 * torch.randn_like(value))
            else:
                scale = 1.0 if "embed" in key else 1.5 / value.shape[1] ** 0.5
                value.copy_(torch.randn_like(value) * scale)
    return model


def their_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def tokens_of(model):
    return np.random.default_rng(1).integers(0, model.config.vocab_size, (2, 40))


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_match_and_exports_load(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "theirs")
    tokens = tokens_of(model)
    expected = their_logits(model, tokens)
    directory = hf.Directory(tmp_path / "theirs")
    params = place(directory)
    got = logits(directory.config, params, tokens)
    error = float(np.abs(got - expected).max())
    print(f"{name}: max |logit| {np.abs(expected).max():.2f}, max error {error:.2e}")
    assert np.abs(expected).max() > 1 and error < 1e-4

    hf.save(params, directory.config, tmp_path / "ours", shard_bytes=8000, max_positions=64)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert np.abs(their_logits(again, tokens) - expected).max() < 1e-6
    record(name, tmp_path / "theirs", tokens, expected)


def record(name, folder, tokens, expected):
    """One file of weights, tokens and logits, and their config.json with the versions."""
    from safetensors.numpy import load_file, save_file

    path = CASES / f"hf-{name}.safetensors"
    if path.exists():
        return
    case = {"case.tokens": tokens.astype(np.int32), "case.logits": expected}
    save_file(load_file(folder / "model.safetensors") | case, path)
    versions = {m.__name__: m.__version__ for m in (torch, transformers)}
    config = json.loads((folder / "config.json").read_text())
    path.with_suffix(".json").write_text(
        json.dumps({"versions": versions, "config": config}, indent=1) + "\n"
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_the_recorded_case_is_theirs(name, tmp_path):
    """What was recorded is still what transformers computes from the recorded weights."""
    folder, tokens, expected = replay(name, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert np.abs(their_logits(model, tokens) - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(dtype, tmp_path):
    model = make("llama-gqa2-linear").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    # Read back, because `.to` rounds the rotary frequencies, which no file holds.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", attn_implementation="eager", dtype=torch.float32
    )
    directory = hf.Directory(tmp_path / "theirs")
    params = place(directory, "float32")
    tokens = tokens_of(model)
    expected = their_logits(model, tokens)
    assert np.abs(logits(directory.config, params, tokens) - expected).max() < 1e-4


@pytest.mark.parametrize("name", ["llama-gqa2-linear", "qwen3-gqa4-llama3"])
@pytest.mark.parametrize("targets", ["/w[qv]$", "w.$|/w_|head"])
def test_peft_loads_our_adapters(name, targets, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "base")
    directory = hf.Directory(tmp_path / "base")
    params, tokens = place(directory), tokens_of(model)
    config = Lora(base=directory.config, rank=3, alpha=5.0, targets=targets)
    module = config.build("cpu")
    zeros = jnp.zeros((1, 4), jnp.int32)
    fresh = nn.unbox(module.init(jax.random.key(0), zeros))["params"]["lora"]
    draw = lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.2  # noqa: E731
    lora = jax.tree.map(draw, fresh)
    ours = np.asarray(module.apply({"params": {"base": params, "lora": lora}}, tokens))
    save_adapter(lora, config, tmp_path / "adapter")
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = adapted(torch.tensor(tokens)).logits.numpy()
    plain = logits(directory.config, params, tokens)
    print(f"{name} {targets}: max error {np.abs(ours - theirs).max():.2e}")
    assert np.abs(ours - plain).max() > 0.1 and np.abs(ours - theirs).max() < 1e-4


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_adapters_of_peft(rslora, tmp_path):
    (tmp_path / "base").mkdir()
    replay("qwen3-linear", tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", attn_implementation="eager", dtype=torch.float32
    )
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=7, target_modules=["q_proj", "o_proj", "down_proj"], use_rslora=rslora,
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = tokens_of(model)
    with torch.no_grad():
        theirs = adapted(torch.tensor(tokens)).logits.numpy()
    directory = hf.Directory(tmp_path / "base")
    lora_model, lora = load_adapter(tmp_path / "adapter", directory.config)
    params = {"base": place(directory), "lora": lora}
    ours = np.asarray(lora_model.build("cpu").apply({"params": params}, tokens))
    plain = logits(directory.config, params["base"], tokens)
    assert np.abs(ours - plain).max() > 0.1 and np.abs(ours - theirs).max() < 1e-4
    record_adapter("rslora" if rslora else "lora", tmp_path / "adapter", tokens, theirs)


def record_adapter(name, folder, tokens, expected):
    """The adapter, tokens and logits; its base is the recorded case qwen3-linear."""
    from safetensors.numpy import load_file, save_file

    path = CASES / f"peft-{name}.safetensors"
    if path.exists():
        return
    case = {"case.tokens": tokens.astype(np.int32), "case.logits": expected}
    save_file(load_file(folder / "adapter_model.safetensors") | case, path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None  # a folder of the machine that recorded
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft)}
    path.with_suffix(".json").write_text(
        json.dumps({"versions": versions, "config": config}, indent=1) + "\n"
    )
