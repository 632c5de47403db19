"""The `jaxlab` command: parses, checks and reports; the work is done elsewhere."""

import argparse
import dataclasses
import difflib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Exit codes, also listed in docs/running.md.
OK, USAGE, DIVERGED, FAILED, STOPPED = 0, 2, 3, 74, 75

EPILOG = """exit codes: 0 done · 2 wrong invocation, nothing changed · 3 loss or gradient not finite ·
74 failed while running (disk, device), last checkpoint intact · 75 stopped by a signal, saved: run again ·
134 another process died, last checkpoint intact"""


class Preset:
    """A named configuration: its help text is known without importing anything heavy."""

    def __init__(self, name: str, doc: str, make: Callable[[], Any]):
        self.name, self.doc, self.make = name, doc.strip(), make

    @property
    def line(self) -> str:
        """First line of the preset's documentation."""
        return self.doc.splitlines()[0]


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="jaxlab", description="One sharded JAX trainer, from a laptop to a pod.", epilog=EPILOG
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, epilog=EPILOG)
        sub.add_argument("--debug", action="store_true", help="tracebacks and NaN checks")
        return sub

    train = add("train", "train a configuration; resumes if the run directory has a run")
    train.add_argument("config", help="name of a configuration, or a run directory")
    _overrides(train)
    train.add_argument("--run-dir", type=_folder, help="where the run lives (default: runs/CONFIG)")
    train.add_argument(
        "--fresh", action="store_true", help="set an earlier run in the directory aside, start anew"
    )
    train.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FIELD",
        help="a field that may differ on resuming; may be repeated",
    )
    train.add_argument("--profile", metavar="A:B", help="write an XProf trace of steps A to B")
    train.add_argument(
        "--plan", action="store_true", help="parameters, bytes, shardings; no training"
    )
    train.add_argument("--print", action="store_true", help="print the resolved configuration")
    train.add_argument("--fields", action="store_true", help="list every field that can be set")
    train.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    _cluster(train)

    evaluate = add("eval", "run the evaluators of a run on its newest (or a given) checkpoint")
    evaluate.add_argument("run", type=_folder, help="run directory")
    _overrides(evaluate)
    evaluate.add_argument("--step", type=int, help="checkpoint step (default: newest)")
    _cluster(evaluate)

    sample = add("sample", "write text with a trained run")
    sample.add_argument("run", type=_folder, help="run directory")
    sample.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="text to continue, default 'The '; may be repeated; -: every line of the input",
    )  # fmt: skip
    sample.add_argument("--tokens", type=_positive, default=200, help="tokens to write, at most")
    sample.add_argument("--n", type=_positive, default=1, help="continuations of each prompt")
    sample.add_argument("--temperature", type=_not_negative, default=0.8, help="0: greedy")
    sample.add_argument("--top-k", type=_positive, help="draw from the K most probable tokens")
    sample.add_argument("--top-p", type=float, help="from the fewest of together probability P")
    sample.add_argument("--min-p", type=float, help="from those P times as probable as the best")
    sample.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end there; may be repeated"
    )
    sample.add_argument("--seed", type=int, default=0, help="random seed")
    sample.add_argument("--step", type=int, help="checkpoint step (default: newest)")

    compile_ = add("compile", "compile the real train step for a TPU slice that is not here")
    compile_.add_argument("--config", required=True, help="name of a configuration")
    compile_.add_argument("--topology", required=True, help="v5p:2x2x2, v5e:2x4, v6e:2x4, ...")
    _overrides(compile_)

    import_ = add("import", "make a run directory of a model from elsewhere")
    import_.add_argument("format", choices=["hf"], help="a Hugging Face directory")
    import_.add_argument("folder", type=Path, help="with config.json and *.safetensors")
    _overrides(import_)
    import_.add_argument("--run-dir", type=Path, required=True, help="run directory to make")
    import_.add_argument("--lora", type=_positive, default=0, metavar="RANK", help="add adapters")
    import_.add_argument("--adapter", type=Path, help="adapter to start from, a PEFT folder")
    _cluster(import_)

    export = add("export", "write a checkpoint in the format of another library")
    export.add_argument("format", choices=["hf"], help="a Hugging Face directory")
    export.add_argument("checkpoint", type=Path, help="run directory, or checkpoints/STEP in it")
    export.add_argument("folder", type=Path, help="folder to write")
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights"
    )
    export.add_argument("--merge", action="store_true", help="of a LoRA run: the whole model")

    add("list", "list the configurations")

    inspect = add("inspect", "show what a checkpoint holds")
    inspect.add_argument(
        "checkpoint", type=_folder, help="run directory, or checkpoints/STEP in it"
    )
    return top


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments, with FIELD=VALUE allowed before, between and after the options."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    strange = [r for r in rest if r.startswith("-") or "=" not in r or "overrides" not in args]
    if strange:
        top.error(f"unrecognized arguments: {' '.join(strange)}")
    if rest:
        args.overrides += rest
    return args


def _overrides(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "overrides", nargs="*", metavar="FIELD=VALUE", help="e.g. steps=50 optimizer.lr=1e-3"
    )


def _cluster(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("several processes")
    group.add_argument(
        "--distributed", action="store_true", help="find the others by TPU metadata, SLURM or MPI"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="or name process 0 by hand,")
    group.add_argument(
        "--processes", type=_positive, metavar="N", help="with the number of processes"
    )
    group.add_argument("--process-id", type=int, metavar="I", help="and which of them this is")


def _folder(text: str) -> Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is an address, not a folder: mount the bucket and give the path where it is "
            f"mounted (docs/running.md)"
        )
    return Path(text)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{value} must be at least 0")
    return value


def main(presets: Mapping[str, Preset], argv: list[str] | None = None) -> int:
    """Runs one command; every foreseeable mistake ends in one line and exit code 2."""
    args = parse(argv)
    quiet_libtpu()
    commands = {
        "train": train, "eval": evaluate, "sample": sample,
        "compile": compile_, "list": list_, "inspect": inspect,
        "import": import_, "export": export,
    }  # fmt: skip
    try:
        return commands[args.command](args, presets)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except (ValueError, OSError, ImportError) as error:
        if args.debug:
            traceback.print_exc()
        text = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename:
            text = f"{error.filename}: {error.strerror}"
        return _fail(text, USAGE)
    except RuntimeError as error:
        if (
            type(error).__name__ != "RunFailed" or args.debug
        ):  # a name: no import before it is needed
            raise
        code = _fail(str(error), FAILED)
        if sys.modules["jax"].process_count() > 1:
            # The runtime's own shutdown waits for every process, a dead one too, and then aborts.
            sys.stdout.flush()
            os._exit(code)
        return code


def quiet_libtpu() -> None:
    """Keeps JAX from looking for TPUs where libtpu is only there to compile for them."""
    if (
        "JAX_PLATFORMS" in os.environ
        or find_spec("libtpu") is None
        or find_spec("jax_cuda13_plugin")
    ):
        return
    if not any(Path("/dev").glob("accel*")) and not any(Path("/dev/vfio").glob("[0-9]*")):
        os.environ["JAX_PLATFORMS"] = "cpu"


def _fail(text: str, code: int) -> int:
    print(f"jaxlab: {text}", file=sys.stderr)
    return code


def resolve(presets: Mapping[str, Preset], name: str, assignments: list[str]) -> Any:
    """The configuration `name` with overrides applied."""
    from train.overrides import override

    if name not in presets and (Path(name) / "config.json").is_file():
        from train.run import load_run

        return override(load_run(Path(name)), assignments)
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(presets)}"
        raise ValueError(f"no configuration named {name!r}: {hint} (jaxlab list)")
    return override(presets[name].make(), assignments)


def train(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab train`."""
    run = resolve(presets, args.config, args.overrides)
    if args.fields:
        return _print_fields(run)
    if args.print:
        from train.run import to_json

        print(json.dumps(to_json(run), indent=1))
        return OK
    profile = _profile_range(args.profile, run.steps)
    from train.overrides import check_fields

    check_fields(run, args.allow)
    is_run = args.config not in presets
    folder = args.run_dir or (Path(args.config) if is_run else Path("runs") / args.config)
    start_cluster(args)
    import jax

    run.check(jax.device_count())
    if args.plan:
        from train.report import plan

        print(plan(run))
        return OK
    from train import trainer
    from train.report import summary

    if args.fresh and folder.exists():
        aside = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%dT%H%M%S')}")
        if jax.process_index() == 0:
            folder.rename(aside)
            print(f"jaxlab: the earlier run is now {aside}", file=sys.stderr)
    begin = time.perf_counter()
    outcome = trainer.fit(
        run, folder, allow=tuple(args.allow), profile=profile, debug=args.debug, quiet=args.quiet
    )
    if jax.process_index() == 0 and outcome.code == trainer.DONE:
        print(summary(run, folder, args.config, outcome, time.perf_counter() - begin))
    return outcome.code


def _profile_range(text: str | None, steps: int) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.split(":")
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        raise ValueError(f"--profile {text!r} must look like A:B, two steps")
    a, b = int(parts[0]), int(parts[1])
    if not a < b <= steps:
        raise ValueError(f"--profile {text}: steps must satisfy A < B <= steps={steps}")
    return a, b


def _print_fields(run: Any) -> int:
    from rich.console import Console
    from rich.table import Table

    from train.overrides import field_help

    table = Table(box=None, header_style="bold")
    for column in ("field", "type", "value", "what it is"):
        table.add_column(column, overflow="fold")
    for row in field_help(run):
        table.add_row(*row)
    Console().print(table)
    return OK


def start_cluster(args: argparse.Namespace) -> None:
    """Joins the other processes, if the command line says there are any."""
    named = (args.coordinator, args.processes, args.process_id)
    if any(v is not None for v in named):
        if any(v is None for v in named):
            raise ValueError("--coordinator, --processes and --process-id belong together")
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator {args.coordinator!r} must look like HOST:PORT")
        if not 0 <= args.process_id < args.processes:
            raise ValueError(
                f"--process-id {args.process_id} must be in 0..{args.processes - 1} (--processes)"
            )
    elif not args.distributed:
        return
    import jax

    # A dead process is noticed after this many seconds; the others then end.
    jax.distributed.initialize(
        args.coordinator, args.processes, args.process_id, heartbeat_timeout_seconds=30
    )


def _open_run(folder: Path, assignments: list[str], step: int | None):
    """Run, program, parameters and step of a run directory."""
    import jax

    from train import trainer
    from train.checkpoint import Checkpoints
    from train.overrides import override
    from train.run import load_run

    run = load_run(folder)
    mesh = dataclasses.replace(type(run.mesh)(), data=1)
    run = override(dataclasses.replace(run, mesh=mesh), assignments).check(jax.device_count())
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    if step is not None and step not in checkpoints.steps():
        raise ValueError(f"--step {step}: {folder} has checkpoints of steps {checkpoints.steps()}")
    program = trainer.build(run)
    got = trainer.restore(program, checkpoints, step)
    for at, why in got.rejected.items():
        print(f"jaxlab: checkpoint step {at} passed over: {why}", file=sys.stderr)
    checkpoints.close()
    params = got.state.ema if run.optimizer.ema else got.state.params
    return run, program, params, got.step


def evaluate(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab eval`."""
    start_cluster(args)
    import jax

    from train.evaluate import Scene
    from train.feed import row_shard

    run, program, params, step = _open_run(args.run, args.overrides, args.step)
    values: dict[str, Any] = {}
    with jax.set_mesh(program.mesh):
        scene = Scene(run, program.apply, program.mesh, row_shard(program.mesh, run.batch))
        for evaluator in run.evaluators:
            values |= evaluator.make(scene)(params, step)
    if jax.process_index() == 0:
        print(json.dumps({"step": step, **values}, indent=1))
    return OK


def sample(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab sample`."""
    from jaxlab.sampling import Sampling

    prompts = [
        text
        for given in args.prompt or ["The "]
        for text in (sys.stdin.read().splitlines() if given == "-" else [given])
    ]
    if not prompts:
        raise ValueError("--prompt -: the input has no lines")
    if "" in args.stop:
        raise ValueError("--stop '' must not be empty")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p).check()
    import jax

    from models.decoder import unroll
    from train.data.tokenizers import load_tokenizer
    from train.report import print_rows
    from train.writer import Writer

    run, program, params, _ = _open_run(args.run, [], args.step)
    module = run.model.build(program.mesh.devices.flat[0].platform)
    with jax.set_mesh(program.mesh):
        module, params = unroll(module, params)
        writer = Writer(
            module, load_tokenizer(run.source.tokenizer), prompts, tokens=args.tokens,
            samples=args.n, sampling=sampling, stop=args.stop, piece=8,
        )  # fmt: skip
        print_rows(prompts, args.n, writer.write(params, jax.random.key(args.seed)))
    return OK


def import_(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab import`."""
    start_cluster(args)
    from train.exchange import import_hf

    print(import_hf(args.folder, args.run_dir, args.overrides, args.lora, args.adapter))
    return OK


def export(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab export`."""
    from train.exchange import export_hf

    print(export_hf(args.checkpoint, args.folder, args.dtype, args.merge))
    return OK


def compile_(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab compile`."""
    run = resolve(presets, args.config, args.overrides)
    from sharding.topology import tpu_aot_environment

    os.environ.update(tpu_aot_environment())
    from train.report import compile_for

    print(compile_for(run, args.topology))
    return OK


def list_(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab list`."""
    width = max(map(len, presets))
    for preset in presets.values():
        print(f"{preset.name:<{width}}  {preset.line}")
    return OK


def inspect(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab inspect`."""
    from train.report import describe_checkpoint

    print(describe_checkpoint(args.checkpoint))
    return OK
