"""The arguments of the `jaxlab` command; nothing heavy is imported to parse them."""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

EPILOG = """exit codes: 0 done · 2 wrong invocation, nothing changed · 3 loss or gradient not finite ·
74 failed while running (disk, device), last checkpoint intact · 75 stopped by a signal, saved: run again ·
130 interrupted at once, last checkpoint intact · 134 another process died, last checkpoint intact"""

MOST_TOKENS = 100_000  # the room for them is allocated before the first


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other mistake is said."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with exit code 2."""
        print(f"jaxlab: {message} ({self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(
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
    evaluate.add_argument("--step", type=_integer(0), help="checkpoint step (default: newest)")
    _cluster(evaluate)

    sample = add("sample", "write text with a trained run")
    sample.add_argument("run", type=_folder, help="run directory")
    sample.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="text to continue, default 'The '; may be repeated; -: every line of the input",
    )  # fmt: skip
    sample.add_argument(
        "--tokens", type=_integer(1, MOST_TOKENS), help="tokens to write, at most; default 200"
    )
    sample.add_argument(
        "--n", type=_integer(1), default=1, help="continuations of each prompt; rows, in diffusion"
    )
    sample.add_argument(
        "--psi",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="how a diffusion model writes: steps=256, high=constant-0.9, ...; may be repeated",
    )
    sample.add_argument(
        "--views", type=_integer(1), default=1, metavar="N",
        help="show the rows of a diffusion model at N moments",
    )  # fmt: skip
    sample.add_argument("--temperature", type=_number(0), help="0: greedy; default 0.8")
    sample.add_argument("--top-k", type=_integer(1), help="draw from the K most probable tokens")
    sample.add_argument("--top-p", type=_number(), help="from the fewest of together probability P")
    sample.add_argument(
        "--min-p", type=_number(), help="from those P times as probable as the best"
    )
    sample.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end there; may be repeated"
    )
    sample.add_argument("--seed", type=_integer(0, 2**32 - 1), default=0, help="random seed")
    sample.add_argument("--step", type=_integer(0), help="checkpoint step (default: newest)")

    compile_ = add("compile", "compile the real train step for a TPU slice that is not here")
    compile_.add_argument("--config", required=True, help="name of a configuration")
    compile_.add_argument("--topology", required=True, help="v5p:2x2x2, v5e:2x4, v6e:2x4, ...")
    compile_.add_argument(
        "--sweep", action="append", default=[], metavar="FIELD=A,B,...",
        help="compile for each of these values; may be repeated: every combination",
    )  # fmt: skip
    compile_.add_argument(
        "--out", type=Path, default=Path("sweep.json"), metavar="FILE",
        help="rows of a sweep, kept as they are made; table and plot beside it",
    )  # fmt: skip
    _overrides(compile_)

    import_ = add("import", "make a run directory of a model from elsewhere")
    import_.add_argument(
        "format",
        choices=["hf", "teacher"],
        help="a Hugging Face directory, or a run that a distillation (dcd) starts from",
    )
    import_.add_argument(
        "folder", type=_folder, help="with config.json, and *.safetensors or checkpoints"
    )
    _overrides(import_)
    import_.add_argument(
        "--run-dir", type=_folder, help="run directory to make (default: runs/NAME of the folder)"
    )
    adapters = import_.add_mutually_exclusive_group()
    adapters.add_argument(
        "--lora", type=_integer(1), default=0, metavar="RANK", help="add adapters"
    )
    adapters.add_argument("--adapter", type=_folder, help="adapter to start from, a PEFT folder")
    _cluster(import_)

    export = add("export", "write a checkpoint in the format of another library")
    export.add_argument("format", choices=["hf"], help="a Hugging Face directory")
    export.add_argument("checkpoint", type=_folder, help="run directory, or checkpoints/STEP in it")
    export.add_argument("folder", type=_folder, help="folder to write")
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights"
    )
    export.add_argument("--merge", action="store_true", help="of a LoRA run: the whole model")

    add("list", "list the configurations")

    inspect = add("inspect", "show what a checkpoint holds")
    inspect.add_argument(
        "checkpoint", type=_folder, help="run directory, or checkpoints/STEP in it"
    )
    inspect.add_argument(
        "--verify", action="store_true", help="read it, on one device, and compare its checksums"
    )
    return top


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments, with FIELD=VALUE allowed before, between and after the options."""
    args, rest = parser().parse_known_args(argv)
    strange = [r for r in rest if r.startswith("-") or "=" not in r or "overrides" not in args]
    if strange:
        Parser(prog=f"jaxlab {args.command}").error(f"unrecognized arguments: {' '.join(strange)}")
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
        "--processes", type=_integer(1), metavar="N", help="with the number of processes"
    )
    group.add_argument(
        "--process-id", type=_integer(0), metavar="I", help="and which of them this is"
    )


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("'' must not be empty")
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is an address, not a folder: mount the bucket and give the path where it is "
            f"mounted (docs/running.md)"
        )
    return Path(text)


def _integer(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} must be at least {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{value} must be at most {most}")
        return value

    return parse


def _number(least: float = -math.inf) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not least <= value < math.inf:
            bound = "" if least == -math.inf else f" and at least {least:g}"
            raise argparse.ArgumentTypeError(f"{value} must be finite{bound}")
        return value

    return parse
