"""`jaxlab import` and `jaxlab export`: runs from and to Hugging Face directories."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import multihost_utils

from models import hf
from models.lora import FROZEN_BASE, Lora, LoraModule, merged
from models.peft import load_adapter, save_adapter
from train import trainer
from train.checkpoint import Checkpoints, check_space, state_bytes
from train.data.text import Text
from train.evaluate import HeldOut
from train.objectives import NextToken
from train.optimizer import Optimizer
from train.overrides import override
from train.run import Run, load_run, to_json
from train.rundir import write_description
from train.trainer import Program, build

# What belongs to a tokenizer, besides the tokenizer.json that this project reads.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def import_hf(
    source: Path,
    folder: Path,
    assignments: list[str],
    lora_rank: int = 0,
    adapter: Path | None = None,
) -> str:
    """A run directory whose step 0 is the model of the directory `source`; says what it made.

    `assignments` override any field of the run; `lora_rank` or a PEFT `adapter` wrap the model in
    `Lora` with its base frozen. Everything is checked before anything is allocated or written.
    """
    hf.refuse_occupied(folder)
    directory = hf.Directory(source)
    model: Any = dataclasses.replace(directory.config, param_dtype=directory.dtype)
    held = None
    if adapter is not None:
        model, held = load_adapter(adapter, model)
    elif lora_rank:
        model = Lora(base=model, rank=lora_rank, alpha=2.0 * lora_rank)
    lora = isinstance(model, Lora)
    has_tokenizer = (source / "tokenizer.json").is_file()
    tokenizer = str(folder.absolute() / "tokenizer.json") if has_tokenizer else "bytes"
    length = directory.json.get("max_position_embeddings") or 1024
    wanted = Run(
        model=model,
        objective=NextToken(),
        source=Text(tokenizer=tokenizer, seq_len=min(1024, length)),
        evaluators=(HeldOut(),),
        optimizer=Optimizer(
            lr=2e-4 if lora else 1e-5, weight_decay=0.0, freeze=FROZEN_BASE if lora else ""
        ),
        steps=1000,
        batch=8,
    )
    wanted = override(wanted, assignments)
    _same_model(model, wanted.model)
    run = wanted.check(jax.device_count())
    program = build(run)
    check_space(folder, state_bytes(program.state.params))
    params = _params(program, directory, held)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("every process has read the model")
    if jax.process_index() == 0:
        write_description(wanted, folder)
        for name in TOKENIZER:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    checkpoints = Checkpoints(folder / "checkpoints", run.keep)
    checkpoints.save(0, {"params": params}, {"config": to_json(wanted), "parts": ["params"]})
    checkpoints.close()
    count = sum(x.size for x in jax.tree.leaves(params))
    return (
        f"{folder}: {count:,} parameters from {source}\n"
        f"  jaxlab sample {folder} --prompt TEXT\n"
        f"  jaxlab train {folder} source.files=MY.txt steps=100"
    )


def _same_model(model: Any, wanted: Any) -> None:
    """ValueError when overrides changed the shape of what is in the files."""
    a, b = (m.base if isinstance(m, Lora) else m for m in (model, wanted))
    free = ("dtype", "param_dtype", "remat", "attention", "rope_theta", "rope_scaling")
    for field in dataclasses.fields(a):
        old, new = getattr(a, field.name), getattr(b, field.name)
        if old != new and field.name not in free:
            raise ValueError(f"model.{field.name}={new} is not the imported model's {old}")


def _params(program: Program, directory: hf.Directory, held: dict[str, Any] | None):
    """The parameters of the run: read, and for `Lora` with adapters that are fresh or `held`."""
    abstract, model = program.state.params, program.run.model
    if not isinstance(model, Lora):
        return hf.load(directory, abstract)
    base = hf.load(directory, abstract["base"])
    module = model.build(program.mesh.devices.flat[0].platform)
    placed = jax.tree.map(lambda a: a.sharding, abstract["lora"])
    if held is not None:
        cast = lambda x, a: x.astype(a.dtype)  # noqa: E731
        return {
            "base": base,
            "lora": jax.device_put(jax.tree.map(cast, held, abstract["lora"]), placed),
        }
    return {"base": base, "lora": _fresh(module, program, placed)}


def _fresh(module: LoraModule, program: Program, placed):
    tokens = jax.ShapeDtypeStruct((1, program.run.source.seq_len), "int32")
    key = jax.random.key(program.run.seed)
    boxed = jax.eval_shape(module.base.init, key, tokens)["params"]
    make = jax.jit(lambda: nn.unbox(module.adapters(key, boxed)), out_shardings=placed)
    return make()


def export_hf(checkpoint: Path, folder: Path, dtype: str | None = None, merge: bool = False) -> str:
    """Writes the model of a checkpoint as a Hugging Face directory; says what it wrote.

    A `Lora` run gives its adapter in PEFT's format, or with `merge` the whole model, merged.
    `checkpoint`: a run directory, or checkpoints/STEP in one.
    """
    hf.refuse_occupied(folder)
    where, step = checkpoint, None
    if checkpoint.name.isdigit() and checkpoint.parent.name == "checkpoints":
        where, step = checkpoint.parent.parent, int(checkpoint.name)
    run = load_run(where)
    run = dataclasses.replace(run, mesh=type(run.mesh)(data=1)).check(jax.device_count())
    checkpoints = Checkpoints(where / "checkpoints", read_only=True)
    if step is not None and step not in checkpoints.steps():
        raise ValueError(f"{where} has checkpoints of steps {checkpoints.steps()}, not {step}")
    got = trainer.restore(build(run), checkpoints, step)
    checkpoints.close()
    params = got.state.ema if run.optimizer.ema else got.state.params
    if isinstance(run.model, Lora) and not merge:
        save_adapter(params["lora"], run.model, folder)
        return f"{folder}: adapter of {where} at step {got.step}, for peft.PeftModel"
    model, params = merged(run.model, params)
    what = "model with its adapter merged" if merge else "model"
    hf.save(params, model, folder, dtype=dtype)
    for name in TOKENIZER:
        if (where / name).is_file():
            shutil.copyfile(where / name, folder / name)
    return f"{folder}: {what} of {where} at step {got.step}, for transformers"
