"""Temporary memory of the loss and its gradient, tiled against plain, from the compiler; none is run.

    python benchmarks/loss_memory.py

Writes loss_memory_<platform>.json and .md into --out.
"""

import argparse
import sys
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import environment, publish  # noqa: E402
from jaxlab.tiled import tiled_cross_entropy  # noqa: E402
from sharding.plan import aot_memory  # noqa: E402


def temporaries(n_tiles: int, tokens: int, vocab: int, width: int, dtype: str) -> int:
    """Bytes the compiled value and gradient need beyond arguments and results."""

    def loss(h, w, labels):
        return tiled_cross_entropy(h, w, labels, n_tiles=n_tiles)[0]

    shapes = ((1, tokens, width), dtype), ((width, vocab), dtype), ((1, tokens), "int32")
    args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    return aot_memory(jax.value_and_grad(loss, (0, 1)), args).temp_bytes


def main() -> None:
    """Compiles, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    found = {
        width: {n: temporaries(n, args.tokens, args.vocab, width, args.dtype) for n in args.tiles}
        for width in args.widths
    }
    record = environment() | {"temp_bytes": found}
    record |= {name: getattr(args, name) for name in ("tokens", "vocab", "dtype")}
    logits = 4 * args.tokens * args.vocab / 2**30
    lines = [
        f"# Loss, {args.tokens} tokens, vocabulary {args.vocab:,}, {record['date']}", "",
        f"Temporaries of value and gradient in GiB (part of the plain form's), {args.dtype}, compiled "
        f"for {jax.default_backend()} by JAX {jax.__version__}. [tokens, vocabulary] in float32 is "
        f"{logits:.2f} GiB.",
        "", "| tiles |" + "".join(f" width {w} |" for w in found), "|---|" + "---|" * len(found),
    ]  # fmt: skip
    for n in args.tiles:
        cells = (f" {b[n] / 2**30:.3f} ({b[n] / b[args.tiles[0]]:.3f}) |" for b in found.values())
        lines.append(f"| {n} |" + "".join(cells))
    publish(record, "\n".join([*lines, ""]), args.out, "loss_memory")


if __name__ == "__main__":
    main()
