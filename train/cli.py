"""The `jaxlab` command: parses, checks and reports; the work is done elsewhere."""

import argparse
import difflib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from train.arguments import parse
from train.devices import quiet_libtpu, start
from train.errors import NoUsableCheckpoint, RunFailed
from train.folders import blame, check_folder, end_tokens, open_run

# Exit codes, also listed in docs/running.md.
OK, USAGE, FAILED, INTERRUPTED = 0, 2, 74, 130


class Preset:
    """A named configuration: its help text is known without importing anything heavy."""

    def __init__(self, name: str, doc: str, make: Callable[[], Any]):
        self.name, self.doc, self.make = name, doc.strip(), make

    @property
    def line(self) -> str:
        """First line of the preset's documentation."""
        return self.doc.splitlines()[0] if self.doc else "(its file has no docstring)"


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
        kept = "; the newest checkpoint stays, the same command goes on from it"
        return _fail("interrupted" + (kept if args.command == "train" else ""), INTERRUPTED)
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
        if args.debug:
            traceback.print_exc()
        code = _fail(_failure(args.command, error), FAILED)
        jax = sys.modules.get("jax")
        if jax is not None and jax.distributed.is_initialized():
            # The runtime's own shutdown waits for every process, a dead one too, and then aborts.
            sys.stdout.flush()
            os._exit(code)
        return code


def _failure(command: str, error: RuntimeError) -> str:
    if isinstance(error, RunFailed):
        return str(error)
    why = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if "RESOURCE_EXHAUSTED" in why:
        why += " (out of memory: smaller batch, or more devices with mesh.fsdp)"
    return f"{command} failed: {why} (--debug shows where)"


def _fail(text: str, code: int) -> int:
    print(f"jaxlab: {text}", file=sys.stderr)
    return code


def resolve(presets: Mapping[str, Preset], name: str, assignments: list[str]) -> Any:
    """The configuration `name` with overrides applied."""
    from train.overrides import override

    if name not in presets and Path(name).is_dir():
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

    check_fields(run, args.allow, "--allow")
    is_run = args.config not in presets
    folder = args.run_dir or (Path(args.config) if is_run else Path("runs") / args.config)
    run = run.check(start(args))
    if args.plan:
        from train.report import plan

        print(plan(run))
        return OK
    check_folder(folder, args.fresh)
    import jax

    from train import trainer
    from train.report import opening, summary

    first = jax.process_index() == 0
    if first and not args.quiet:
        print(opening(run, folder, args.config), file=sys.stderr, flush=True)
    begin = time.perf_counter()
    try:
        outcome = trainer.fit(
            run, folder, allow=tuple(args.allow), fresh=args.fresh, profile=profile,
            debug=args.debug, quiet=args.quiet,
        )  # fmt: skip
    except NoUsableCheckpoint as error:
        raise ValueError(
            f"{error}; put one back from a copy, or set the run aside and start anew with --fresh"
        ) from error
    except OSError as error:
        raise blame(error, run, folder) from error
    if first and outcome.code == trainer.DONE:
        seconds = time.perf_counter() - begin
        print(summary(run, folder, args.config, args.overrides, outcome, seconds))
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
    from train.overrides import field_help

    rows = [("field", "type", "value", "what it is"), *field_help(run)]
    if not sys.stdout.isatty():
        # One line a field, whatever its length: for grep.
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        for row in rows:
            cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
            print("  ".join([*cells, row[3]]).rstrip())
        return OK
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold")
    for name in rows[0]:
        table.add_column(name, overflow="fold", no_wrap=name == "field")
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    Console().print(table)
    return OK


def evaluate(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab eval`."""
    run, program, params, step = open_run(args, args.overrides, evaluators=True)
    import jax

    from train.evaluate import Scene
    from train.feed import row_shard

    values: dict[str, Any] = {}
    with jax.set_mesh(program.mesh):
        rows = row_shard(program.mesh, run.batch)
        scene = Scene(run, program.apply, program.mesh, rows, program.order, args.run)
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
    for text in prompts:
        if text != text.encode(errors="ignore").decode():  # half of a character
            raise ValueError(f"--prompt {text!r} is no UTF-8 text")
    if not prompts:
        raise ValueError("--prompt -: the input has no lines")
    if "" in args.stop:
        raise ValueError("--stop '' must not be empty")
    temperature = 0.8 if args.temperature is None else args.temperature
    sampling = Sampling(temperature, args.top_k, args.top_p, args.min_p).check()
    run, program, params, _ = open_run(args, [], evaluators=False)
    if hasattr(run.objective, "prior"):
        return _denoise(args, run, program, params)
    if not hasattr(run.source, "tokenizer"):
        raise ValueError(f"{args.run} is not a run on text: it has no source.tokenizer")
    for name in ("psi", "views"):
        if getattr(args, name) not in ([], 1):
            raise ValueError(f"--{name} is for diffusion models; {args.run} has another objective")
    import jax

    from models.decoder import unroll
    from models.lora import merged
    from train.report import print_rows
    from train.writer import Writer

    with jax.set_mesh(program.mesh):
        model, params = merged(run.model, params)
        module, params = unroll(model.build(program.mesh.devices.flat[0].platform), params)
        writer = Writer(
            module, run.source.make_tokenizer(), prompts, tokens=args.tokens or 200,
            samples=args.n, sampling=sampling, stop=args.stop, ends=end_tokens(args.run), piece=8,
        )  # fmt: skip
        print_rows(prompts, args.n, writer.write(params, jax.random.key(args.seed)))
    return OK


def _denoise(args: argparse.Namespace, run: Any, program: Any, params: Any) -> int:
    """`jaxlab sample` of a diffusion model, which writes whole rows."""
    if args.prompt or args.stop:
        raise ValueError(
            "--prompt and --stop mean nothing to a diffusion model: it writes whole rows"
        )
    for name in ("tokens", "temperature", "top_k", "top_p", "min_p"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise ValueError(
                f"--{option} means nothing to a diffusion model, whose rows have a length: use --psi, "
                f"such as --psi nucleus=0.9"
            )
    import jax

    from train.denoise import Psi, write_rows
    from train.overrides import override

    psi = override(Psi(), args.psi)
    with jax.set_mesh(program.mesh):
        for caption, rows in write_rows(run, program, params, psi, args.n, args.seed, args.views):
            for i, text in enumerate(rows):
                titles = [caption] * (args.views > 1) + [f"row {i + 1}"] * (args.n > 1)
                print(*([f"--- {', '.join(titles)} ---"] if titles else []), text, sep="\n")
    return OK


def import_(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab import`."""
    folder = args.run_dir or Path("runs") / args.folder.absolute().name
    check_folder(folder, False)
    start(args)
    if args.format == "teacher":
        if args.lora or args.adapter:
            raise ValueError("--lora and --adapter mean nothing to a distillation")
        from train.distill import start_distillation

        preset = presets["dcd"].make()
        print(start_distillation(args.folder, preset, folder, args.overrides))
        return OK
    from train.exchange import import_hf

    print(import_hf(args.folder, folder, args.overrides, args.lora, args.adapter))
    return OK


def export(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab export`."""
    start(args)
    from train.exchange import export_hf

    print(export_hf(args.checkpoint, args.folder, args.dtype, args.merge))
    return OK


def compile_(args: argparse.Namespace, presets: Mapping[str, Preset]) -> int:
    """`jaxlab compile`."""
    run = resolve(presets, args.config, args.overrides)
    from sharding.topology import tpu_aot_environment

    os.environ.update(tpu_aot_environment())
    if args.sweep:
        from train.sweep import sweep

        make = lambda point: resolve(presets, args.config, [*args.overrides, *point])  # noqa: E731
        base = " ".join([args.config, *args.overrides])
        print(sweep(make, args.sweep, args.topology, base, args.out))
        return OK
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
    start(args)
    from train.report import describe_checkpoint

    print(describe_checkpoint(args.checkpoint, args.verify))
    return OK
