"""Which of compute, memory and network bounds an attention layer on a sharded sequence, without compiling.

    python benchmarks/context_roofline.py --topology v5p:2x2x2 --model llama3_8b --tokens 1048576

Forward and backward of one layer, output kept (policy 'attn_y'), bfloat16, batch 1. FLOPs and the bytes
of collectives are counted in the traced program, every block of the causal mask included, so that compute
is at most twice too much; bytes of memory are those of operands and results of its matrix products, of
which each attention kernel reads keys and values once a block of queries. Rates are the published ones of
sharding/topology.py. Writes JSON and Markdown.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from sharding.topology import parse_topology, tpu_aot_environment

os.environ.update(tpu_aot_environment())  # before JAX is imported

import jax  # noqa: E402
from context_memory import MODELS, layer_step, ring_of  # noqa: E402

from sharding.flops import array_of, jaxpr_flops, live, repeats, sub_jaxprs  # noqa: E402
from sharding.plan import count_collectives, topology_devices  # noqa: E402

METHODS = "ulysses,usp,upipe:8,upipe:16,upipe:32,upipe_ring:8,ring,allgather"


def product_bytes(jaxpr) -> int:
    """Bytes that matrix products and kernels of one device read and write."""
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        arrays = [array_of(v) for v in (*eqn.invars, *eqn.outvars)]
        if name == "dot_general":
            total += sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
        elif name == "pallas_call":
            # Two blocks of every step of the grid: of keys and values, or of queries and gradients,
            # which are as large.
            block = eqn.params["grid_mapping"].block_mappings[1]
            size = math.prod(map(_length, block.block_shape)) * block.array_aval.dtype.itemsize
            total += 2 * size * repeats(eqn)
            total += sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
        else:
            total += sum(product_bytes(sub) for sub in sub_jaxprs(eqn)) * repeats(eqn)
    return total


def _length(dim: Any) -> int:
    """Of a block along one dimension, which may be squeezed."""
    return dim if isinstance(dim, int) else getattr(dim, "block_size", 1)


def sent_bytes(moved: dict[str, tuple[int, int]], devices: int, context: int) -> float:
    """What a device sends for operands of `moved`, each over a ring: heads go over `context` devices,
    gradients of weights over all."""
    stays = {"all_to_all": context}
    share = {"all_to_all": 1.0, "all_gather": devices, "ppermute": 1.0, "psum": 2.0}
    total = 0.0
    for kind, (_, size) in moved.items():
        n = stays.get(kind, devices)
        kept = 1.0 if kind == "ppermute" else (n - 1) / n
        total += share.get(kind, 1.0) * kept * size
    return total


def row(topology: str, model: str, tokens: int, method: str) -> dict:
    """Counts and the seconds that they take at the published rates."""
    slice_ = parse_topology(topology)
    chip, n = slice_.chip, slice_.devices
    step, args = layer_step(topology_devices(topology), MODELS[model], tokens, method)
    jaxpr = live(jax.make_jaxpr(step)(*args).jaxpr)
    flops, memory = jaxpr_flops(jaxpr) / n, product_bytes(jaxpr)
    moved = count_collectives(step, *args)
    sent = sent_bytes(moved, n, n // ring_of(method))
    seconds = {
        "compute": flops / chip.bf16_flops,
        "memory": memory / chip.hbm_bandwidth,
        "network": sent / (2 * chip.link_bandwidth),
    }
    return {
        "tokens": tokens, "method": method, "flops": flops, "memory_bytes": memory,
        "network_bytes": sent, "collectives": sum(c for c, _ in moved.values()), **seconds,
        "bound": max(seconds, key=lambda k: seconds[k]),
    }  # fmt: skip


def main() -> None:
    """Counts, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--topology", default="v5p:2x2x2")
    parser.add_argument("--model", choices=MODELS, default="llama3_8b")
    parser.add_argument("--tokens", default="131072,1048576,3145728")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    chip = parse_topology(args.topology).chip
    lines = [
        f"# Roofline of an attention layer of {args.model} on {args.topology}, a device", "",
        f"{chip.bf16_flops:.3g} FLOP/s, {chip.hbm_bandwidth:.3g} B/s of memory, "
        f"{2 * chip.link_bandwidth:.3g} B/s of network (one ring, both ways).", "",
        "| tokens | method | TFLOP | memory GB | network GB | collectives | compute s | memory s "
        "| network s | bound by |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    rows = []
    for tokens in map(int, args.tokens.split(",")):
        for method in args.methods.split(","):
            r = row(args.topology, args.model, tokens, method)
            rows.append(r)
            lines.append(
                f"| {tokens:,} | {method} | {r['flops'] / 1e12:.1f} | {r['memory_bytes'] / 1e9:.1f} "
                f"| {r['network_bytes'] / 1e9:.2f} | {r['collectives']} | {r['compute']:.4f} "
                f"| {r['memory']:.4f} | {r['network']:.4f} | {r['bound']} |"
            )
    file = args.out / f"context_roofline_{args.model}_{args.topology.replace(':', '_')}.json"
    file.write_text(json.dumps({"jax": jax.__version__, "rows": rows}, indent=1) + "\n")
    file.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
