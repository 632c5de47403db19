"""What is printed about a run: plan, compiled plan, checkpoint contents, final summary."""

import dataclasses
import math
import os
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from train.run import Run


def spec_text(array: Any) -> str:
    """Type, shape and sharding in one word: float32[64@fsdp,256@tensor]."""
    sharding = getattr(array, "sharding", None)
    # Orbax's metadata spells the specification out.
    spec = getattr(sharding, "spec", None) or getattr(sharding, "partition_spec", None) or ()
    parts = []
    for size, part in zip(array.shape, (*spec, *[None] * len(array.shape)), strict=False):
        axes = (part,) if isinstance(part, str) else (part or ())
        parts.append(f"{size}@{'+'.join(axes)}" if axes else str(size))
    return f"{array.dtype}[{','.join(parts)}]"


def per_device_bytes(tree: Any) -> int:
    """Bytes one device holds of a tree of sharded shapes."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


def human(n: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1024
    return f"{n} B"


def _rows(tree: Any) -> list[str]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    width = max(map(len, names), default=0)
    return [f"  {n:<{width}}  {spec_text(a)}" for n, (_, a) in zip(names, flat, strict=True)]


def plan(run: Run) -> str:
    """Parameters, per-device bytes and shardings, from shapes alone."""
    from train.meter import forward_flops
    from train.trainer import build

    program = build(run.check(jax.device_count()))
    params = program.state.params
    count = sum(math.prod(a.shape) for a in jax.tree.leaves(params))
    mesh = " x ".join(f"{k}={v}" for k, v in program.mesh.shape.items())
    return "\n".join([
        f"parameters          {count:,}",
        f"mesh                {mesh}",
        f"bytes per device    parameters {human(per_device_bytes(params))}, optimiser "
        f"{human(per_device_bytes(program.state.opt))}, batch "
        f"{human(per_device_bytes(program.batch))}",
        f"FLOPs per step      {3 * forward_flops(program):.3e} (forward x 3)",
        *_rows(params),
    ])  # fmt: skip


def compile_for(run: Run, topology: str) -> str:
    """Compiles the train step of `run` for a TPU `topology` and tabulates what it needs."""
    from sharding.plan import format_report

    head, report = compiled(run, topology)
    return f"{head}\n{format_report(report)}"


def compiled(run: Run, topology: str) -> tuple[str, Any]:
    """A line about the train step of `run` on a TPU `topology`, and its `CompileReport`."""
    from sharding.plan import compile_report
    from sharding.topology import parse_topology, topology_devices
    from train.meter import forward_flops
    from train.trainer import build

    parse_topology(topology)
    devices = topology_devices(topology)
    if run.mesh == type(run.mesh)():
        # A pod slice holds one sharded copy of the model unless the configuration says otherwise.
        run = dataclasses.replace(run, mesh=type(run.mesh)(data=1, fsdp=-1))
    program = build(run.check(len(devices)), devices)
    flops = 3 * forward_flops(program)
    with jax.set_mesh(program.mesh):
        report = compile_report(
            program.step, (program.state, program.batch), topology=topology, flops=flops
        )
    mesh = " x ".join(f"{k}={v}" for k, v in program.mesh.shape.items() if v > 1)
    shape = " x ".join(map(str, next(iter(program.batch.values())).shape))
    return f"{topology}: {len(devices)} devices, mesh {mesh}, batch {shape}", report


def locate(path: Path) -> tuple[Path, int | None]:
    """Run directory and step that `path` means: RUN, RUN/checkpoints or RUN/checkpoints/STEP."""
    if path.is_file():
        raise ValueError(f"{path} is a file, not a run directory")
    if path.name.isdigit() and path.parent.name == "checkpoints":
        return path.parent.parent, int(path.name)
    return (path.parent if path.name == "checkpoints" else path), None


def describe_checkpoint(path: Path, verify: bool = False) -> str:
    """Tree, shapes, step and configuration of a checkpoint; `verify` reads it and checks its sums."""
    from train.checkpoint import Checkpoints
    from train.run import flatten

    folder, step = locate(path)
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    steps = checkpoints.steps()
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(f"no checkpoint at {path}; steps in {folder}: {steps}")
    step = steps[-1] if step is None else step
    verified = "its checksums were not compared (--verify)"
    try:
        meta, tree = checkpoints.meta(step), checkpoints.shapes(step)
        if verify:
            one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            give = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one)  # noqa: E731
            checkpoints.restore(jax.tree.map(give, tree.tree), step)
            verified = "all its checksums are right"
    except Exception as error:  # Orbax, TensorStore and JSON each raise their own
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ValueError(f"{checkpoints.folder / str(step)} is damaged: {why}") from error
    checkpoints.close()
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))
    config = [f"  {k} = {v}" for k, v in flatten(meta["config"]).items() if not k.endswith("type")]
    return "\n".join([
        f"{folder}: step {step} of steps {steps}, {human(size)}; {verified}",
        "state, as it was sharded", *_rows(tree), "config", *config,
    ])  # fmt: skip


def opening(run: Run, folder: Path, config: str) -> str:
    """The first line of a run, printed before anything is compiled."""
    device = jax.devices()[0]
    sizes = dataclasses.asdict(run.mesh).items()
    mesh = " x ".join(f"{name}={size}" for name, size in sizes if size > 1) or "of one"
    return (
        f"{config}: {jax.device_count()} x {device.device_kind}, mesh {mesh}, batch {run.batch}, "
        f"{run.steps} steps, in {folder}; compiling"
    )


def program_name() -> str:
    """What to type here to run this program again."""
    program = Path(sys.argv[0])
    if program.name == "__main__.py":
        return f"{shlex.quote(_from_here(Path(sys.executable)))} -m {program.parent.name}"
    found = shutil.which(program.name)
    if found and program.exists() and os.path.samefile(found, program):
        return program.name
    return shlex.quote(_from_here(program))


def _from_here(path: Path) -> str:
    relative = os.path.relpath(path)
    if relative.startswith(os.pardir):
        return str(path.absolute())
    return relative if os.sep in relative else os.path.join(os.curdir, relative)


def summary(
    run: Run, folder: Path, config: str, assignments: list[str], outcome: Any, seconds: float
) -> str:
    """The last screen of a run: figures, where things are, and what to try next."""
    from train.metrics import perplexity, plot_loss
    from train.rollout.plot import plot_policy

    picture = plot_loss(folder)
    values = outcome.values
    lines = [f"\n{config}: {outcome.step} steps in {seconds:.0f} s"]
    if "valid/loss" in values:
        loss = values["valid/loss"]
        lines.append(
            f"  held-out loss   {loss:.4f} nats per token (perplexity {perplexity(loss):.2f})"
        )
    if "valid/bigram" in values:
        bar = values["valid/bigram"]
        verdict = "beaten" if values.get("valid/loss", math.inf) < bar else "not beaten"
        lines.append(f"  bigram model    {bar:.4f} nats per token: {verdict}")
    if "sample" in values:
        text = "\n    ".join(values["sample"].strip().splitlines()[:8])
        lines += ["  sample", f"    {text}"]
    if (curves := plot_policy(folder)) is not None:
        passed = [n for n in values if n.startswith("valid/pass@") and f"{n}_ci95" in values]
        lines += [f"  {n[6:]:<15} {values[n]:.3f} ± {values[f'{n}_ci95']:.3f}" for n in passed]
        lines.append(f"  pass@k, interference over time: {curves}")
    board = shlex.quote(f"{folder}/tensorboard")
    lines += [
        f"  run directory   {folder}  (config.json, metrics.jsonl, checkpoints/)",
        f"  loss curve      {picture}",
        f"  TensorBoard     pip install tensorboard && tensorboard --logdir {board}",
        "next",
        *(f"  {program_name()} {line}" for line in _next(run, folder, config, assignments)),
    ]
    return "\n".join(lines)


def _next(run: Run, folder: Path, config: str, assignments: list[str]) -> list[str]:
    """Commands to try after a run, as one would type them."""
    from train.evaluate import HeldOut

    there, lines = shlex.quote(str(folder)), []
    denoises = hasattr(run.objective, "prior")  # whole rows, without a prompt
    if denoises:
        lines.append(f"sample {there} --views 4")
    elif getattr(run.source, "tokenizer", "words") != "words":
        prompt = (
            "The for statement" if "builtin:pydoc" in getattr(run.source, "files", ()) else "The"
        )
        lines.append(f'sample {there} --prompt "{prompt}"')
    if run.evaluators:
        whole = [
            f"evaluators.{i}.batches=0"
            for i, e in enumerate(run.evaluators)
            if isinstance(e, HeldOut) and e.batches
        ]
        lines.append(" ".join(["eval", there, *whole]))
    if run.origin:  # a run in another folder would have no weights to start from
        if denoises:
            return [*lines, "list"]
        return [*lines, f"export hf {there} {shlex.quote(f'{folder}-hf')}", "list"]
    kept = [shlex.quote(a) for a in assignments if a.partition("=")[0] != "steps"]
    longer = shlex.quote(f"{folder}-longer")
    more = ["train", shlex.quote(config), *kept, f"steps={run.steps * 3}", "--run-dir", longer]
    return [*lines, " ".join(more), "list"]


def print_rows(prompts: Sequence[str], samples: int, made: Iterable[tuple[int, str, bool]]) -> None:
    """Prints continuations one after the other, each as it is made, with titles if there are several."""
    several = len(prompts) * samples > 1
    waiting: dict[int, str] = {}
    complete: set[int] = set()
    row = 0

    def title() -> str:
        prompt, sample = divmod(row, samples)
        line = f"--- prompt {prompt + 1}, sample {sample + 1} ---\n" if several else ""
        return line + prompts[prompt]

    print(title(), end="", flush=True)
    for i, text, ended in made:
        waiting[i] = waiting.get(i, "") + text
        complete |= {i} if ended else set()
        print(waiting.pop(row, ""), end="", flush=True)
        while row in complete:
            row += 1
            print()
            if row < len(prompts) * samples:
                print(title() + waiting.pop(row, ""), end="", flush=True)
