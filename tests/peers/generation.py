"""Greedy generation by `transformers` for random tiny models on ragged batches, recorded as JSON.

    python tests/peers/generation.py tests/cases/generation.json

Needs torch, transformers and numpy. Models, weights and prompts follow from a seed through NumPy
alone, so that the replay (tests/test_generate_peers.py) needs nothing but this file's functions.
"""

import json
import sys
from pathlib import Path

import numpy as np

CASES, NEW = 20, 12


def sizes(seed: int) -> dict:
    """The shape of model `seed`: heads grouped 1, 2, 4 or 8, tied or not, odd vocabularies, QK-norm."""
    rng = np.random.default_rng([seed, 0])
    kv_heads, group = [(2, 1), (2, 2), (1, 4), (1, 8)][seed % 4]
    return {
        "vocab": int(rng.integers(41, 131)),
        "layers": int(rng.integers(1, 4)),
        "d_model": int(rng.choice([24, 32, 48])),
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "head_dim": int(rng.choice([4, 8, 16])),
        "mlp": int(rng.choice([40, 64])),
        "qk_norm": seed // 4 % 2 == 1,
        "tied": seed % 3 == 0,
        "rope_theta": float(rng.choice([1e4, 5e5])),
        "norm_eps": float(rng.choice([1e-5, 1e-6])),
    }


def weights(c: dict, seed: int) -> dict[str, np.ndarray]:
    """float32 parameters by their path in the decoder's tree, layers stacked."""
    rng = np.random.default_rng([seed, 1])
    n, d, h, hk, k, f = (
        c[name] for name in ("layers", "d_model", "heads", "kv_heads", "head_dim", "mlp")
    )
    shapes = {
        "embedding": (c["vocab"], d),
        "norm/scale": (d,),
        "blocks/mixer_norm_0/scale": (n, d),
        "blocks/mlp_norm_0/scale": (n, d),
        "blocks/mixer_0/wq": (n, d, h, k),
        "blocks/mixer_0/wk": (n, d, hk, k),
        "blocks/mixer_0/wv": (n, d, hk, k),
        "blocks/mixer_0/wo": (n, h, k, d),
        "blocks/mlp_0/w_gate": (n, d, f),
        "blocks/mlp_0/w_up": (n, d, f),
        "blocks/mlp_0/w_down": (n, f, d),
    }
    if c["qk_norm"]:
        shapes |= {f"blocks/mixer_0/{x}_norm/scale": (n, k) for x in "qk"}
    if not c["tied"]:
        shapes["head"] = (d, c["vocab"])
    found = {}
    for name, shape in shapes.items():
        x = 2 * rng.random(shape) - 1
        x = 1 + 0.3 * x if name.endswith("scale") else x * 2 * d**-0.5
        found[name] = x.astype(np.float32)
    return found


def prompts(c: dict, seed: int) -> tuple[list[list[int]], list[int]]:
    """Four prompts of unequal length, and the tokens that end generation."""
    rng = np.random.default_rng([seed, 2])
    lengths = rng.integers(1, 15, 4)
    texts = [rng.integers(1, c["vocab"], length).tolist() for length in lengths]
    return texts, rng.integers(1, c["vocab"], 3).tolist() if seed % 2 else []


def peer_model(c: dict, arrays: dict[str, np.ndarray]):
    """The same model in `transformers`: Qwen3 with QK-norm, else Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config, model = (
        (Qwen3Config, Qwen3ForCausalLM) if c["qk_norm"] else (LlamaConfig, LlamaForCausalLM)
    )
    model = model(
        config(
            vocab_size=c["vocab"], hidden_size=c["d_model"], intermediate_size=c["mlp"],
            num_hidden_layers=c["layers"], num_attention_heads=c["heads"],
            num_key_value_heads=c["kv_heads"], head_dim=c["head_dim"], rms_norm_eps=c["norm_eps"],
            rope_parameters={"rope_type": "default", "rope_theta": c["rope_theta"]},
            tie_word_embeddings=c["tied"], attention_bias=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    out = {"model.embed_tokens": arrays["embedding"], "model.norm": arrays["norm/scale"]}
    out["lm_head"] = arrays["embedding"] if c["tied"] else arrays["head"].T
    names = {
        "mixer_norm_0/scale": "input_layernorm", "mlp_norm_0/scale": "post_attention_layernorm",
        "mixer_0/wq": "self_attn.q_proj", "mixer_0/wk": "self_attn.k_proj",
        "mixer_0/wv": "self_attn.v_proj", "mixer_0/wo": "self_attn.o_proj",
        "mixer_0/q_norm/scale": "self_attn.q_norm", "mixer_0/k_norm/scale": "self_attn.k_norm",
        "mlp_0/w_gate": "mlp.gate_proj", "mlp_0/w_up": "mlp.up_proj",
        "mlp_0/w_down": "mlp.down_proj",
    }  # fmt: skip
    for ours, theirs in names.items():
        for i, x in enumerate(arrays.get(f"blocks/{ours}", ())):
            if x.ndim == 3:
                # wo [h, k, d] joins its first two axes, the projections [d, h, k] their last two.
                x = x.reshape(-1, x.shape[-1]) if ours.endswith("wo") else x.reshape(x.shape[0], -1)
            out[f"model.layers.{i}.{theirs}"] = x.T
    state = {f"{name}.weight": torch.tensor(np.ascontiguousarray(x)) for name, x in out.items()}
    model.load_state_dict(state, strict=True)
    return model.eval()


def record(seed: int) -> dict:
    """What `transformers` generates greedily for case `seed`, its prompts padded on the left."""
    import torch

    c = sizes(seed)
    model, (texts, stop) = peer_model(c, weights(c, seed)), prompts(c, seed)
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW,
            eos_token_id=stop or None, output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    top = torch.stack(out.scores).topk(2).values
    tokens = [row + [0] * (NEW - len(row)) for row in out.sequences[:, width:].tolist()]
    margin = (top[..., 0] - top[..., 1]).min().item()
    return {"seed": seed, "sizes": c, "stop": stop, "tokens": tokens, "margin": round(margin, 6)}


def main() -> None:
    """Records every case into the file named on the command line."""
    import torch
    import transformers

    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    cases = [record(seed) for seed in range(CASES)]
    lines = ",\n".join(json.dumps(case) for case in cases)
    text = f'{{"versions": {json.dumps(versions)},\n"cases": [\n{lines}\n]}}\n'
    Path(sys.argv[1]).write_text(text)


if __name__ == "__main__":
    main()
