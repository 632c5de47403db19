"""Names, shapes and configuration of Llama and Qwen3 checkpoints on the Hugging Face hub."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxlab.lora import Sides
from jaxlab.rope import LinearScaling, Llama3Scaling, Scaling, YarnScaling
from models.decoder import DecoderConfig

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
SCALINGS: dict[str, type] = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}

# Parameter of a block -> (name inside `model.layers.N.`, input axes of a matrix; None: a vector).
BLOCK: dict[str, tuple[str, int | None]] = {
    "mixer_{}/wq": ("self_attn.q_proj", 1),
    "mixer_{}/wk": ("self_attn.k_proj", 1),
    "mixer_{}/wv": ("self_attn.v_proj", 1),
    "mixer_{}/wo": ("self_attn.o_proj", 2),
    "mixer_{}/q_norm/scale": ("self_attn.q_norm", None),
    "mixer_{}/k_norm/scale": ("self_attn.k_norm", None),
    "mixer_norm_{}/scale": ("input_layernorm", None),
    "mlp_norm_{}/scale": ("post_attention_layernorm", None),
    "mlp_{}/w_gate": ("mlp.gate_proj", 1),
    "mlp_{}/w_up": ("mlp.up_proj", 1),
    "mlp_{}/w_down": ("mlp.down_proj", 1),
}


class Entry(NamedTuple):
    """One parameter of ours and the tensors that are its layers there (one where it is not stacked).

    A matrix there is [outputs, inputs] with each side flat: the transpose of ours under `sides`;
    `sides` None: equal layouts.
    """

    path: str
    modules: tuple[str, ...]
    shape: tuple[int, ...]
    sides: Sides | None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(f"{m}.weight" for m in self.modules)

    @property
    def stacked(self) -> bool:
        """Whether the first axis of ours counts layers."""
        return self.path.startswith("blocks/")

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of each tensor there."""
        rest = self.shape[self.stacked :]
        if self.sides is None:
            return rest
        n = self.sides.inputs
        return math.prod(rest[n:]), math.prod(rest[:n])


def entries(c: DecoderConfig) -> Iterator[Entry]:
    """Every parameter of the decoder `c`; ValueError if it has no counterpart there."""
    if set(c.pattern) != {"attention"}:
        raise ValueError(f"model.pattern={c.pattern}: only 'attention' has a Hugging Face form")
    d, h, hk, k, f = c.d_model, c.heads, c.kv_heads, c.head_dim, c.mlp
    shapes = {
        "wq": (d, h, k), "wk": (d, hk, k), "wv": (d, hk, k), "wo": (h, k, d),
        "w_gate": (d, f), "w_up": (d, f), "w_down": (f, d),
    }  # fmt: skip
    yield Entry("embedding", ("model.embed_tokens",), (c.vocab, d), None)
    p = len(c.pattern)
    n = c.layers // p
    for i in range(p):
        for path, (name, inputs) in BLOCK.items():
            leaf = path.partition("/")[2].removesuffix("/scale")
            if leaf in ("q_norm", "k_norm") and not c.qk_norm:
                continue
            shape = shapes.get(leaf, (k,) if leaf in ("q_norm", "k_norm") else (d,))
            modules = tuple(f"model.layers.{j * p + i}.{name}" for j in range(n))
            sides = None if inputs is None else Sides(1, inputs)
            yield Entry("blocks/" + path.format(i), modules, (n, *shape), sides)
    yield Entry("norm/scale", ("model.norm",), (d,), None)
    if not c.tied:
        yield Entry("head", ("lm_head",), (d, c.vocab), Sides(0, 1))


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """The decoder that a config.json of Llama or Qwen3 describes.

    Reads both forms of rotary settings (`rope_theta` with `rope_scaling`, and `rope_parameters`).
    ValueError naming the field for everything this decoder does not compute.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(ARCHITECTURES):
        raise ValueError(f"architectures={names} is not one of {list(ARCHITECTURES)}")
    for name, legal in (
        ("hidden_act", ("silu", "swish")), ("attention_bias", (False,)), ("mlp_bias", (False,)),
        ("use_sliding_window", (False,)), ("pretraining_tp", (1,)), ("quantization_config", ()),
        ("partial_rotary_factor", (1.0,)),
    ):  # fmt: skip
        if config.get(name) is not None and config[name] not in list(legal):
            allowed = f"must be {' or '.join(map(repr, legal))}" if legal else "must be absent"
            raise ValueError(f"{name}={config[name]!r} is not supported, it {allowed}")
    kinds = config.get("layer_types") or ["full_attention"]
    if kinds != ["full_attention"] * len(kinds):
        raise ValueError(f"layer_types has {kinds}, supported is full_attention only")
    if names[0] == "LlamaForCausalLM" and config.get("sliding_window") is not None:
        raise ValueError(f"sliding_window={config['sliding_window']} is not supported")
    needed = ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads",
              "intermediate_size")  # fmt: skip
    optional = ("num_key_value_heads", "head_dim", "max_position_embeddings")
    for name in (*needed, *(n for n in optional if config.get(n) is not None)):
        positive(name, config.get(name), int)
    heads, qwen = config["num_attention_heads"], names[0] == "Qwen3ForCausalLM"
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads={kv_heads} must divide num_attention_heads={heads}")
    head_dim = config.get("head_dim") or (128 if qwen else config["hidden_size"] // heads)
    if head_dim % 2 or not head_dim:
        raise ValueError(f"head_dim={head_dim} must be even and positive (rotary positions)")
    theta, scaling = _rope(config)
    return DecoderConfig(
        vocab=config["vocab_size"],
        layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp=config["intermediate_size"],
        qk_norm=qwen,
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6), float),
    )


def positive(name: str, value: Any, kind: type[int] | type[float]) -> Any:
    """`value` as an int or a float; ValueError, naming the field, when it is none or not above 0."""
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not fits or not 0 < value < math.inf:
        what = "integer" if kind is int else "finite number"
        raise ValueError(f"{name}={value!r} must be a positive {what}")
    return kind(value)


def _rope(config: dict[str, Any]) -> tuple[float, Scaling | None]:
    forms = {
        n: _settings(n, config[n]) for n in ("rope_parameters", "rope_scaling") if config.get(n)
    }
    thetas = [form.pop("rope_theta", None) for form in forms.values()] + [config.get("rope_theta")]
    thetas = [t for t in thetas if t is not None]
    if any(t != thetas[0] for t in thetas):
        raise ValueError(f"rope_theta is given as {' and as '.join(map(str, thetas))}")
    if len(forms) == 2 and forms["rope_parameters"] != forms["rope_scaling"]:
        raise ValueError("rope_parameters and rope_scaling contradict each other: keep one of them")
    theta = positive("rope_theta", thetas[0] if thetas else 10_000.0, float)
    rope = next(iter(forms.values()), {})
    kind = rope.pop("rope_type", "default")
    if kind != "default" and kind not in SCALINGS:
        raise ValueError(f"rope_type={kind!r} is not one of default, {', '.join(SCALINGS)}")
    cls = SCALINGS.get(kind)
    known = {f.name for f in dataclasses.fields(cls)} if cls else set()
    if extra := sorted(set(rope) - known):
        raise ValueError(f"rope_type={kind!r} with {', '.join(extra)} is not supported")
    if cls is None:
        return theta, None
    if "factor" not in rope:
        raise ValueError(f"rope_type={kind!r} needs a factor")
    if "original_max_position_embeddings" in known:
        most = config.get("max_position_embeddings") or 8192
        rope.setdefault("original_max_position_embeddings", most)
    for name, value in rope.items():
        if name == "truncate":
            if not isinstance(value, bool):
                raise ValueError(f"truncate={value!r} must be true or false")
            continue
        positive(name, value, int if name.startswith("original") else float)
    return theta, cls(**rope)


def _settings(name: str, rope: Any) -> dict[str, Any]:
    """What a rotary setting says, in one spelling: nothing null, nothing neutral."""
    if not isinstance(rope, dict):
        raise ValueError(f"{name}={rope!r} must be an object")
    rope = {k: v for k, v in rope.items() if v is not None}
    old = rope.pop("type", None)
    kind = rope.setdefault("rope_type", old or "default")
    if not isinstance(kind, str):
        raise ValueError(f"{name}: rope_type={kind!r} must be a name")
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    return rope


def hf_config(c: DecoderConfig, dtype: str, max_positions: int) -> dict[str, Any]:
    """A config.json of the decoder `c`, rotary settings in the old form and the new.

    ValueError for a decoder that is neither a Llama nor a Qwen3.
    """
    list(entries(c))
    name = "Qwen3ForCausalLM" if c.qk_norm else "LlamaForCausalLM"
    scaling = None
    if c.rope_scaling is not None:
        kind = next(k for k, cls in SCALINGS.items() if type(c.rope_scaling) is cls)
        given = {k: v for k, v in dataclasses.asdict(c.rope_scaling).items() if v is not None}
        scaling = {"rope_type": kind, **given}
    return {
        "architectures": [name],
        "model_type": ARCHITECTURES[name],
        "vocab_size": c.vocab,
        "hidden_size": c.d_model,
        "intermediate_size": c.mlp,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": c.rope_theta},
        "tie_word_embeddings": c.tied,
        "attention_bias": False,
        "use_cache": True,
        "torch_dtype": dtype,
    }
