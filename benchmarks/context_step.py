"""The whole train step of Llama 3 8B on 8 chips: which context fits, by method, without the chips.

    python benchmarks/context_step.py --topology v5p:2x2x2 --tokens 1048576,3145728,5242880 \
        --methods ulysses,upipe,ring --remat offload

Forward, backward and AdamW of the 32 layers (scanned), batch 1, parameters and optimiser in float32 and
sharded over the same chips, MLP and loss in tiles, each layer's input and attention output in the host's
memory (remat 'offload'; 'offload_input': the input only). Each row is compiled as far as the assignment of
its memory, see assigned.py; `jaxlab compile` does the rest too, in many minutes. Needs the extra tpu-aot.
"""

import argparse
import json
import os
from pathlib import Path

from sharding.topology import parse_topology, tpu_aot_environment

os.environ.update(tpu_aot_environment())  # before JAX is imported

import jax  # noqa: E402
from assigned import in_a_process, print_and_end  # noqa: E402

from configs import llama3_8b  # noqa: E402
from sharding.context.checks import TWO_LEVEL  # noqa: E402
from sharding.plan import topology_devices  # noqa: E402
from train.overrides import override  # noqa: E402
from train.trainer import build  # noqa: E402

GIB = 2**30
BASE = "batch=1 accumulate=1 mesh.data=1 mesh.fsdp=1 model.mlp_tiles=64 objective.tiles=256"


def assignments(chips: int, tokens: int, method: str, remat: str) -> list[str]:
    """What is changed in the configuration llama3_8b."""
    name, _, stage = method.partition(":")
    ring = 2 if name in TWO_LEVEL else 1
    changes = [*BASE.split(), f"mesh.context={chips // ring}", f"mesh.ring={ring}"]
    changes += [f"model.remat={remat}", f"model.context.method={name}", f"source.seq_len={tokens}"]
    changes += [f"model.context.heads_per_stage={stage}"] if stage else []
    return changes + (["model.context.layout=zigzag"] if name == "ring" or ring > 1 else [])


def compile_row(topology: str, tokens: str, method: str, remat: str) -> None:
    """Prints what the compiler says of one step."""
    devices = topology_devices(topology)
    changes = assignments(len(devices), int(tokens), method, remat)
    program = build(override(llama3_8b.run(), changes).check(len(devices)), devices)
    usable = parse_topology(topology).chip.usable_bytes
    with jax.set_mesh(program.mesh):
        lowered = program.step.lower(program.state, program.batch)
        print_and_end(lambda options: lowered.compile(compiler_options=options), usable)


def longest(rows: list[dict]) -> str:
    """What fits and what does not of a method's rows."""
    fits = [r["tokens"] for r in rows if r["fits"]]
    not_fits = [r["tokens"] for r in rows if not r["fits"] and r["tokens"] > max(fits, default=0)]
    found = f"{max(fits) / 2**20:g} fit" if fits else "none fits"
    return found + (f", {min(not_fits) / 2**20:g} do not" if not_fits else ", longer was not tried")


def table(rows: list[dict], title: str) -> str:
    """Markdown."""
    names = [
        "tokens",
        "method",
        "kept",
        "fits",
        "HBM",
        "temporaries",
        "on the host",
        "largest places",
    ]
    lines = [
        f"# {title}",
        "",
        "GiB a chip.",
        "",
        f"| {' | '.join(names)} |",
        "|---" * len(names) + "|",
    ]
    order = sorted(rows, key=lambda r: (r["remat"], r["method"], r["tokens"]))
    for r in order:
        gib = lambda size: f"{size / GIB:.2f}" if size else "-"  # noqa: E731
        most = "; ".join(
            f"{gib(size)} {shapes.split(', ')[0]}" for size, shapes in r["largest"][:2]
        )
        cells = [f"{r['tokens']:,}", r["method"], r["remat"], "yes" if r["fits"] else "no"]
        cells += [gib(r["needs_bytes"]), gib(r["temp_bytes"]), gib(r["host_bytes"]), most]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Longest context in millions (2^20) of tokens:",
        "",
    ]
    for key in dict.fromkeys((r["remat"], r["method"]) for r in order):
        own = [r for r in order if (r["remat"], r["method"]) == key]
        lines.append(f"* {key[1]}, {key[0]}: {longest(own)}")
    stamp = {f"JAX {r['jax']}, libtpu {r['libtpu']}, {r['date']}" for r in rows}
    return "\n".join(
        [*lines, "", f"Compiled by {'; '.join(sorted(stamp))}, up to the assignment of memory.", ""]
    )


def main() -> None:
    """Compiles what is missing, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--topology", default="v5p:2x2x2")
    parser.add_argument("--tokens", default="1048576,3145728,5242880")
    parser.add_argument("--methods", default="ulysses,upipe")
    parser.add_argument("--remat", default="offload")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.row:
        compile_row(*args.row)
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"context_step_llama3_8b_{args.topology.replace(':', '_')}.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for tokens in map(int, args.tokens.split(",")):
        for method in args.methods.split(","):
            key = {"tokens": tokens, "method": method, "remat": args.remat}
            if any(key.items() <= row.items() for row in rows):
                continue
            how = args.topology, str(tokens), method, args.remat
            rows.append(key | in_a_process(__file__, "--row", *how))
            file.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
            print(json.dumps(rows[-1]), flush=True)
    title = f"Train step of Llama 3 8B on {args.topology}, sequence over all chips"
    file.with_suffix(".md").write_text(table(rows, title))


if __name__ == "__main__":
    main()
