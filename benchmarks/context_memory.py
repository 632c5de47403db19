"""Memory of one attention layer on a sharded sequence, by the real TPU compiler, without a TPU.

    python benchmarks/context_memory.py --topology v5p:2x2x2 --model llama3_8b \
        --tokens 131072,262144 --methods ulysses,upipe:8,upipe:16,upipe:32,ring,allgather

Projections, rotary positions, attention and output projection, forward and backward, bfloat16, batch 1,
the output kept (policy 'attn_y'); each row is one program, compiled for the slice as far as the
assignment of its memory (see assigned.py) and never run. Rows
are added to the JSON of the topology and the model; those that are there are not compiled again. The
table and the plot are made of all rows. Needs the extra tpu-aot; a row takes some ten seconds.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sharding.topology import parse_topology, tpu_aot_environment

os.environ.update(tpu_aot_environment())  # before JAX is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from assigned import in_a_process, print_and_end  # noqa: E402
from jax.sharding import AxisType, Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from configs import llama3_8b, qwen3_32b  # noqa: E402
from sharding.context import attention_layer  # noqa: E402
from sharding.context.checks import BALANCED, TWO_LEVEL  # noqa: E402
from sharding.plan import memory_model, topology_devices  # noqa: E402

MODELS = {"llama3_8b": llama3_8b.run().model, "qwen3_32b": qwen3_32b.run().model}
GIB = 2**30


def split(method: str) -> tuple[str, int | None]:
    """'upipe:8' as method and heads_per_stage."""
    name, _, stage = method.partition(":")
    return name, int(stage) if stage else None


def ring_of(method: str) -> int:
    """Devices of the ring: methods of two levels exchange heads over half of a slice."""
    return 2 if split(method)[0] in TWO_LEVEL else 1


def layer_step(devices: list, c: Any, tokens: int, method: str) -> tuple[Callable, tuple]:
    """Forward and backward of one layer of model `c` on `devices`, and its abstract arguments."""
    name, stage = split(method)
    shape = np.array(devices).reshape(ring_of(method), -1)
    mesh = Mesh(shape, ("ring", "context"), axis_types=(AxisType.Auto,) * 2)

    def placed(*shape, spec=()):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    x = placed(1, tokens, c.d_model, spec=(None, ("ring", "context")))
    heads = [placed(c.d_model, n, c.head_dim) for n in (c.heads, c.kv_heads, c.kv_heads)]
    wo = placed(c.heads, c.head_dim, c.d_model)
    keep = jax.checkpoint_policies.save_only_these_names("attn_y")

    def layer(*args):
        return attention_layer(
            *args, mesh=mesh, method=name, heads_per_stage=stage,
            inv_freq=np.ones(c.head_dim // 2, np.float32),
            layout="zigzag" if name in BALANCED else "contiguous",
        )  # fmt: skip

    def step(dy, *args):
        y, pull = jax.vjp(jax.checkpoint(layer, policy=keep), *args)
        return y, pull(dy)

    return step, (x, x, *heads, wo)


def row(topology: str, model: str, tokens: int, method: str) -> dict:
    """What one layer needs, in bytes a device."""
    c, (name, stage) = MODELS[model], split(method)
    ring, devices = ring_of(method), parse_topology(topology).devices
    model_ = memory_model(
        name, seq_len=tokens, num_heads=c.heads, num_kv_heads=c.kv_heads, head_dim=c.head_dim,
        model_dim=c.d_model, context=devices // ring, ring=ring, heads_per_stage=stage,
    )  # fmt: skip
    formula = {"unit_bytes": model_.unit_bytes, "paper_backward_bytes": model_.backward_bytes}
    needs = in_a_process(__file__, "--row", topology, model, str(tokens), method)
    return {"tokens": tokens, "method": method} | formula | needs


def compile_row(topology: str, model: str, tokens: str, method: str) -> None:
    """Prints what the compiler says of one layer."""
    step, args = layer_step(topology_devices(topology), MODELS[model], int(tokens), method)
    lowered = jax.jit(step).lower(*args)
    usable = parse_topology(topology).chip.usable_bytes
    print_and_end(lambda options: lowered.compile(compiler_options=options), usable)


def table(rows: list[dict], title: str) -> str:
    """Markdown."""
    lines = [f"# {title}", "", "GiB a device; T is one tensor of queries of one device.", ""]
    names = ["tokens", "method", "fits", "temporaries", "in T", "with arguments and results"]
    names += ["formula of the backward", "T", "compiled by"]
    lines += [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for r in sorted(rows, key=lambda r: (r["tokens"], r["method"])):
        gib = lambda name, r=r: f"{r[name] / GIB:.2f}" if r.get(name) else "-"  # noqa: E731
        fits = "yes" if r["fits"] else f"no: needs {r['needs_bytes'] / GIB:.1f}"
        in_t = f"{r['temp_bytes'] / r['unit_bytes']:.2f}" if r["temp_bytes"] else "-"
        cells = [f"{r['tokens']:,}", r["method"], fits, gib("temp_bytes"), in_t, gib("needs_bytes")]
        cells += [gib("paper_backward_bytes"), gib("unit_bytes")]
        cells += [f"JAX {r['jax']}, libtpu {r['libtpu']}, {r['date']}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], title: str, file: Path) -> None:
    """Temporaries against tokens, a line a method."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for method in sorted({r["method"] for r in rows}):
        mine = sorted((r["tokens"], r["temp_bytes"]) for r in rows if r["method"] == method)
        points = [(t, b / GIB) for t, b in mine if b]
        axes.plot(*zip(*points, strict=True), "o-", label=method) if points else None
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="temporaries, GiB", title=title)
    lengths = sorted({r["tokens"] for r in rows})
    axes.set_xticks(lengths, [f"{n // 1024}k" for n in lengths])
    axes.set_xticks([], minor=True)
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")


def main() -> None:
    """Compiles what is missing, writes JSON, Markdown and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--topology", default="v5p:2x2x2")
    parser.add_argument("--model", choices=MODELS, default="llama3_8b")
    parser.add_argument("--tokens", default="131072,262144")
    parser.add_argument("--methods", default="ulysses,upipe:8,upipe:16,upipe:32,ring,allgather")
    parser.add_argument("--row", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if args.row:
        compile_row(*args.row)
    stem = f"context_memory_{args.model}_{args.topology.replace(':', '_')}"
    file = args.out / f"{stem}.json"
    record = json.loads(file.read_text()) if file.exists() else {"rows": []}
    title = f"Attention layer of {args.model} on {args.topology}"
    for tokens in map(int, args.tokens.split(",")):
        for method in args.methods.split(","):
            if any((r["tokens"], r["method"]) == (tokens, method) for r in record["rows"]):
                continue
            record["rows"].append(row(args.topology, args.model, tokens, method))
            file.write_text(json.dumps(record, indent=1) + "\n")
            print(json.dumps(record["rows"][-1]), flush=True)
    text = table(record["rows"], title)
    file.with_suffix(".md").write_text(text)
    plot(record["rows"], title, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
