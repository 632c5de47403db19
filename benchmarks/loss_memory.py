"""Temporary memory of the loss and its gradient, tiled against plain, from the compiler; none is run.

    python benchmarks/loss_memory.py

Writes loss_memory_<platform>.json and .md into --out.
"""

import argparse
import functools
import json
import sys
import time
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
    parser.add_argument("--width", type=int, default=256, help="of the hidden activations")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    measure = functools.partial(
        temporaries, tokens=args.tokens, vocab=args.vocab, width=args.width, dtype=args.dtype
    )
    found = {n: measure(n) for n in (1, 2, 4, 8, 16, 32, 64)}
    # Float32 gradient of the output matrix: whatever the tiles, it is there in full.
    floor = 4 * args.width * args.vocab
    lines = [
        f"# Loss, {args.tokens} tokens, vocabulary {args.vocab:,}, {time.strftime('%Y-%m-%d')}", "",
        f"Width {args.width}, {args.dtype}; value and gradient compiled for "
        f"{jax.default_backend()} by JAX {jax.__version__}. [tokens, vocabulary] in float32 is "
        f"{4 * args.tokens * args.vocab / 2**30:.2f} GiB, the output matrix {floor / 2**30:.2f} GiB.",
        "", "| tiles | temporaries, GiB | of the plain form |", "|---|---|---|",
        *(f"| {n} | {b / 2**30:.3f} | {b / found[1]:.3f} |" for n, b in found.items()),
    ]  # fmt: skip
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"loss_memory_{jax.default_backend()}"
    record = {"jax": jax.__version__, "temp_bytes": found} | {
        name: getattr(args, name) for name in ("tokens", "vocab", "width", "dtype")
    }
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
