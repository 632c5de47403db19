"""Seconds to compile the train step against the number of layers, which a scan keeps constant.

    python benchmarks/compile_depth.py

Rounds of the depths alternate; the compilation cache is off. Processor seconds, over all threads,
do not depend on what else the machine does. Writes compile_depth_<platform>.json and .md into --out.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, publish  # noqa: E402
from configs import presets  # noqa: E402
from train import trainer  # noqa: E402


def compile_once(config: str, layers: int) -> tuple[float, float]:
    """(seconds, processor seconds) of lowering and compiling the step from nothing."""
    run = presets()[config].make()
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, layers=layers))
    program = trainer.build(run.check(jax.device_count()))
    jax.clear_caches()
    wall, busy = time.perf_counter(), time.process_time()
    with jax.set_mesh(program.mesh):
        program.step.lower(program.state, program.batch).compile()
    return time.perf_counter() - wall, time.process_time() - busy


def main() -> None:
    """Compiles, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="tiny", help="preset of configs/")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    compile_once(args.config, args.layers[0])  # imports and the compiler's own first time
    times: dict[int, list] = {n: [] for n in args.layers}
    for _ in range(args.rounds):
        for n, found in times.items():
            found.append(compile_once(args.config, n))
    record = environment() | {"config": args.config, "seconds": times}
    medians = {n: [statistics.median(x) for x in zip(*t, strict=True)] for n, t in times.items()}
    first = medians[args.layers[0]]
    lines = [
        f"# Compiling the train step, {args.config}, {record['date']}", "",
        f"{described(record)}. Medians of {args.rounds} rounds.", "",
        "| layers | seconds | processor seconds | of the first |", "|---|---|---|---|",
        *(f"| {n} | {w:.2f} | {b:.2f} | {b / first[1]:.2f}x |" for n, (w, b) in medians.items()),
    ]  # fmt: skip
    publish(record, "\n".join([*lines, ""]), args.out, "compile_depth")


if __name__ == "__main__":
    main()
