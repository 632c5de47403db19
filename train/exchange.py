"""`jaxlab import` and `jaxlab export`: runs from and to Hugging Face directories."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from models import hf
from models.hf_names import decoder_config
from models.json_object import read_json
from models.lora import FROZEN_BASE, Lora, LoraModule, merged
from models.peft import load_adapter, save_adapter
from sharding.mesh import MeshShape
from train.checkpoint import Checkpoints, check_space, state_bytes
from train.data.text import Text
from train.data.tokenizers import load_tokenizer, tokenizer_file
from train.evaluate import HeldOut
from train.folders import SOURCE_CONFIG, mesh_here, parameters
from train.objectives import NextToken
from train.optimizer import Optimizer
from train.overrides import override
from train.processes import all_or_none
from train.run import HOW, Run, described, load_run
from train.rundir import whole, write_description
from train.trainer import Program, build

# What belongs to a tokenizer, besides the tokenizer.json that this project reads.
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
# Fields of a model that do not change what the tensors in the files are.
COMPUTED_ANEW = (*HOW, "rope_theta", "rope_scaling", "base", "init", "lora_dtype")
LARGE = 500_000_000  # parameters from which activations are recomputed
TILE_LOGITS = 2**26  # numbers a row, at most, in a tile of the loss


def import_hf(
    source: Path,
    folder: Path,
    assignments: list[str],
    lora_rank: int = 0,
    adapter: Path | None = None,
) -> str:
    """A run directory whose step 0 is the model of the directory `source`; says what it made.

    `assignments` override any field of the run; `lora_rank` or a PEFT `adapter` wrap the model in
    `Lora` with its base frozen. Parameters are float32, a frozen base has the type of the files.
    Everything is checked before anything is allocated, and `folder` appears when all of it is there.
    """
    with all_or_none():
        hf.refuse_occupied(folder)
        directory = hf.Directory(source)
        model, held = _model(directory, lora_rank, adapter)
        wanted = _run(directory, model, assignments)
        _same_model(model, wanted.model, held is not None)
        _fits(directory, wanted)
        run = wanted.check(jax.device_count())
        program = build(run)
        check_space(folder, state_bytes(program.state.params))
    with whole(folder) as new:
        params = _params(program, directory, held)
        checkpoints = Checkpoints(new / "checkpoints", run.keep)
        meta = {"config": described(wanted, source), "parts": ["params"]}
        checkpoints.save(0, {"params": params}, meta)
        checkpoints.close()
        if jax.process_index() == 0:
            for name in TOKENIZER:
                if (source / name).is_file():
                    shutil.copyfile(source / name, new / name)
            shutil.copyfile(source / "config.json", new / SOURCE_CONFIG)
            if tokenizer_file(wanted.source.tokenizer) == source.absolute() / "tokenizer.json":
                inside = dataclasses.replace(
                    wanted.source, tokenizer=str(new.absolute() / "tokenizer.json")
                )
                wanted = dataclasses.replace(wanted, source=inside)
            write_description(wanted, new)
    count = sum(x.size for x in jax.tree.leaves(params))
    return (
        f"{folder}: {count:,} parameters from {source}\n"
        f"  jaxlab sample {folder} --prompt TEXT\n"
        f"  jaxlab train {folder} source.files=MY.txt steps=100"
    )


def _model(directory: hf.Directory, lora_rank: int, adapter: Path | None):
    """(model configuration, adapters of `adapter`). Small updates of bfloat16 would round to nothing."""
    if lora_rank and adapter is not None:
        raise ValueError(f"--lora {lora_rank} and --adapter {adapter} exclude each other")
    base = dataclasses.replace(
        directory.config,
        remat="full" if directory.parameters >= LARGE else "none",
        param_dtype=directory.dtype if lora_rank or adapter is not None else "float32",
    )
    if adapter is not None:
        return load_adapter(adapter, base)
    if lora_rank:
        return Lora(base=base, rank=lora_rank, alpha=2.0 * lora_rank), None
    return base, None


def _run(directory: hf.Directory, model: Any, assignments: list[str]) -> Run:
    """The run of an imported model; what is not assigned suits its size and the devices here."""
    given = {text.partition("=")[0] for text in assignments}
    file = directory.folder.absolute() / "tokenizer.json"
    if not file.is_file() and "source.tokenizer" not in given:
        raise ValueError(
            f"{directory.folder} has no tokenizer.json: give source.tokenizer=FILE, or "
            f"source.tokenizer=bytes for a model of bytes"
        )
    lora = isinstance(model, Lora)
    run = Run(
        model=model,
        objective=NextToken(),
        source=Text(tokenizer=str(file), seq_len=min(1024, directory.max_positions or 1024)),
        evaluators=(HeldOut(),),
        optimizer=Optimizer(
            lr=2e-4 if lora else 1e-5, weight_decay=0.0, freeze=FROZEN_BASE if lora else ""
        ),
        steps=1000,
        batch=8,
        origin=str(directory.folder.absolute()),
    )
    length = max(override(run, assignments).source.seq_len, 1)
    tiles = (n for n in range(1, length + 1) if length % n == 0)
    enough = next(n for n in tiles if model.vocab * length // n <= TILE_LOGITS or n == length)
    run = dataclasses.replace(run, objective=NextToken(tiles=enough))
    if jax.device_count() > 1 and not any(f.startswith("mesh.") for f in given):
        split = dataclasses.replace(run, mesh=MeshShape(data=1, fsdp=-1))
        try:
            build(override(split, assignments).check(jax.device_count()))
            run = split
        except ValueError:  # does not divide: replicas, or what is said of them
            pass
    return override(run, assignments)


def _same_model(model: Any, wanted: Any, adapted: bool) -> None:
    """ValueError when overrides changed the shape of what is in the files."""
    parts = [("model", "imported model", model, wanted)]
    if isinstance(model, Lora):
        parts = [("model.base", "imported model", model.base, wanted.base)]
        parts += [("model", "adapter", model, wanted)] if adapted else []
    for prefix, what, a, b in parts:
        for field in dataclasses.fields(a):
            old, new = getattr(a, field.name), getattr(b, field.name)
            if old != new and field.name not in COMPUTED_ANEW:
                raise ValueError(f"{prefix}.{field.name}={new} is not the {what}'s {old}")


def _fits(directory: hf.Directory, run: Run) -> None:
    """ValueError for rows longer than the positions the model was made for."""
    base = run.model.base if isinstance(run.model, Lora) else run.model
    most = directory.max_positions
    same = base.rope_scaling == directory.config.rope_scaling
    if same and most is not None and run.source.seq_len > most:
        raise ValueError(
            f"source.seq_len={run.source.seq_len} exceeds the model's max_position_embeddings={most}: "
            f"use less, or stretch them with model.rope_scaling"
        )


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
    `checkpoint`: a run directory, or checkpoints/STEP in one. Nothing but the parameters is read;
    `folder` appears when all of it is there.
    """
    hf.refuse_occupied(folder)
    where, step = checkpoint, None
    if checkpoint.name.isdigit() and checkpoint.parent.name == "checkpoints":
        where, step = checkpoint.parent.parent, int(checkpoint.name)
    run = load_run(where)
    adapter = isinstance(run.model, Lora) and not merge
    if merge and not isinstance(run.model, Lora):
        raise ValueError(f"--merge: {where} has no adapter to merge, export it without")
    devices = jax.device_count()
    mesh = mesh_here(run.mesh, devices, jax.process_count())
    run = dataclasses.replace(run, mesh=mesh, evaluators=()).check(devices)
    program, params, step = parameters(run, where, step)
    model, written = (run.model, params["lora"]) if adapter else merged(run.model, params)
    kind = jax.numpy.dtype(dtype or jax.tree.leaves(written)[0].dtype)
    check_space(folder, sum(x.size for x in jax.tree.leaves(written)) * kind.itemsize)
    with whole(folder) as new:
        if adapter:
            save_adapter(written, model, new, run.origin, dtype=dtype)
            return f"{folder}: adapter of {where} at step {step}, for peft.PeftModel"
        most, extra = _besides(run, model, where)
        hf.save(written, model, new, dtype=dtype, max_positions=most, extra=extra)
        for name, place in _tokenizer_files(run, where).items():
            shutil.copyfile(place, new / name)
    what = "model with its adapter merged" if merge else "model"
    return f"{folder}: {what} of {where} at step {step}, for transformers"


def _besides(run: Run, model: Any, where: Path) -> tuple[int, dict[str, Any]]:
    """(positions, other fields) of the exported config.json: what was imported, or the run's own."""
    scaling, file = model.rope_scaling, where / SOURCE_CONFIG
    old = getattr(scaling, "original_max_position_embeddings", 0)
    most = max(run.source.seq_len, int(getattr(scaling, "factor", 1) * old))
    if file.is_file():
        source = read_json(file)
        if decoder_config(source).rope_scaling == scaling:
            most = source.get("max_position_embeddings") or most
        return most, source
    path = tokenizer_file(run.source.tokenizer)
    if path is not None and not path.is_file():
        return most, {}
    tokenizer = load_tokenizer(run.source.tokenizer)
    return most, {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}


def _tokenizer_files(run: Run, where: Path) -> dict[str, Path]:
    """{name: file} of the run's tokenizer and what lies beside it, or beside the run."""
    file = tokenizer_file(run.source.tokenizer)
    found = {n: where / n for n in TOKENIZER if (where / n).is_file()}
    if file is None or not file.is_file():
        return found
    beside = {n: file.parent / n for n in TOKENIZER if (file.parent / n).is_file()}
    if file.parent.absolute() != where.absolute():
        found = {n: f for n, f in found.items() if n == "generation_config.json"}
    return found | beside | {"tokenizer.json": file}
