"""Low-rank adapters from and to PEFT's format: adapter_config.json, adapter_model.safetensors."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxlab.lora import Sides, pairs
from jaxlab.paths import unflatten
from models.decoder import DecoderConfig
from models.hf import refuse_occupied, safetensors, write_tensors
from models.hf_names import Entry, entries, positive
from models.json_object import read_json
from models.lora import Lora

WEIGHTS, CONFIG, PREFIX = "adapter_model.safetensors", "adapter_config.json", "base_model.model."
# Fields that are read here, or that change nothing about the tensors and what they compute. Any other
# changes an adapter in a way that is not computed here, unless it is null, false or empty.
NEUTRAL = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
}  # fmt: skip
HARMLESS: dict[str, tuple[Any, ...]] = {"bias": ("none",), "init_lora_weights": (True, "gaussian")}


def save_adapter(
    lora: dict[str, Any],
    model: Lora,
    folder: Path | str,
    base: str = "",
    *,
    dtype: str | None = None,
) -> None:
    """Writes the adapters of `model` into `folder`; `base` names the base model for PEFT.

    `dtype` None keeps the type of the adapters.

    ValueError, before anything is written, for a folder that is not empty or an adapter that does not
    fit the decoder.
    """
    folder = Path(folder)
    refuse_occupied(folder)
    table = _matrices(model.base)
    arrays: dict[str, np.ndarray] = {}
    adapted = pairs(lora)
    if wrong := [p for p, _ in adapted if p not in table]:
        raise ValueError(f"adapters {wrong} are on no matrix of the decoder: {sorted(table)}")
    modules = [m for path, _ in adapted for m in table[path].modules]
    for path, adapter in adapted:
        entry = table[path]
        a, b = (np.asarray(x) if dtype is None else np.asarray(x).astype(dtype) for x in
                (adapter["a"], adapter["b"]))  # fmt: skip
        for i, module in enumerate(entry.modules):
            one, two = (a[i], b[i]) if entry.stacked else (a, b)
            rank = one.shape[-1]
            name = f"{PREFIX}{module}.lora_"
            arrays[name + "A.weight"] = np.ascontiguousarray(one.reshape(-1, rank).T)
            arrays[name + "B.weight"] = np.ascontiguousarray(two.reshape(rank, -1).T)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(arrays, folder / WEIGHTS)
    short = sorted({m.rpartition(".")[2] for m in modules})
    whole = sum(e.modules[0].rpartition(".")[2] in short for e in table.values()) == len(adapted)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base or None,
        "r": model.rank,
        "lora_alpha": model.alpha,
        "lora_dropout": 0.0,
        "target_modules": short if whole else modules,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_adapter(folder: Path | str, base: DecoderConfig) -> tuple[Lora, dict[str, Any]]:
    """(model around `base`, adapter tree of NumPy arrays) of a PEFT folder.

    Rank-stabilised scaling (alpha / sqrt(rank)) becomes the alpha of the same effect. ValueError that
    lists every tensor that is missing, unexpected or misshapen, or names the setting not supported.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no PEFT adapter: it has no {name}")
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type={config.get('peft_type')!r} must be 'LORA'")
    for name, value in config.items():
        if name not in NEUTRAL and value and value not in HARMLESS.get(name, ()):
            raise ValueError(f"{folder}: {name}={value!r} is not supported")
    try:
        rank = positive("r", config.get("r"), int)
        alpha = positive("lora_alpha", config.get("lora_alpha"), float)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    if config.get("use_rslora"):
        alpha *= math.sqrt(rank)
    try:
        held = safetensors().numpy.load_file(str(folder / WEIGHTS))
    except safetensors().SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is no safetensors file: {error}") from error
    wanted, out, chosen = set(), {}, []
    problems = []
    for path, entry in _matrices(base).items():
        present = [f"{PREFIX}{m}.lora_A.weight" in held for m in entry.modules]
        if not any(present):
            continue
        chosen.append(path)
        rows, columns = entry.hf_shape
        n, rest = entry.sides.inputs, entry.shape[entry.stacked :]
        sides: dict[str, list[np.ndarray]] = {"a": [], "b": []}
        for module in entry.modules:
            for side, tail, shape in (("a", "A", (rank, columns)), ("b", "B", (rows, rank))):
                name = f"{PREFIX}{module}.lora_{tail}.weight"
                wanted.add(name)
                got = held.get(name)
                if got is None or got.shape != shape:
                    problems.append(
                        f"{name} is missing"
                        if got is None
                        else f"{name} has shape {got.shape}, expected {shape}"
                    )
                    continue
                ours = (*rest[:n], rank) if side == "a" else (rank, *rest[n:])
                sides[side].append(got.T.reshape(ours))
        if not problems:
            out[path] = {
                k: np.stack(v) if entry.stacked else v[0]
                for k, v in sides.items()
            }  # fmt: skip
    problems += [f"{name} is not expected" for name in held if name not in wanted]
    if problems or not out:
        lines = "\n  ".join(problems or ["it holds no adapter of this decoder"])
        raise ValueError(f"{folder} does not fit the base model:\n  {lines}")
    targets = "^(" + "|".join(map(re.escape, chosen)) + ")$"
    return Lora(base=base, rank=rank, alpha=alpha, targets=targets), unflatten(out)


def _matrices(config: DecoderConfig) -> dict[str, "Matrix"]:
    return {e.path: Matrix(*e) for e in entries(config) if e.sides is not None}


class Matrix(Entry):
    """An `Entry` that is a matrix."""

    sides: Sides
