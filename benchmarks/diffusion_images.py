"""Uniform diffusion of images: the U-Net on handwritten digits, and how its samplers draw.

    python benchmarks/diffusion_images.py

The preset `unet` through the one trainer, then images by several samplers with 8 to 64 calls of the network,
and with guidance: Frechet distance of a small classifier's features from the training images, and how often the
classifier sees the digit that was asked for. A checkpoint under --work is not trained again. Writes
diffusion_images_<platform>.json, .md and .png, and diffusion_images_<platform>_drawn.png, into --out.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.diffusion_lm import Writer, trained  # noqa: E402
from benchmarks.machine import described, environment, publish  # noqa: E402
from benchmarks.sampler_plot import curves  # noqa: E402
from configs import unet  # noqa: E402
from train import trainer  # noqa: E402
from train.denoise import Psi, every_class  # noqa: E402
from train.evaluate import HeldOut  # noqa: E402
from train.frechet import draw, figures, judge  # noqa: E402

WINDOW = Psi(middle="constant-0.95", high_frac=0.5, middle_frac=0.4)
SAMPLERS = {
    "ancestral": Psi(),
    "psi window": WINDOW,
    "psi constant": Psi(low="constant-0.95"),
    "remdm": Psi(low="max-capped-0.005"),
    "window, guidance 2": dataclasses.replace(WINDOW, guidance=2.0),
}


def measure(options) -> tuple[dict, np.ndarray]:
    """(record, the images of the window with the most calls)."""
    run = dataclasses.replace(unet.run(), evaluators=(HeldOut(batches=0),), steps=options.steps)
    begin = time.perf_counter()
    program, params, values = trained(run, options.work)
    seconds, calls = time.perf_counter() - begin, list(map(int, options.nfe.split(",")))
    jury, labels = judge(run.source), every_class(run, options.rows)
    # What an untrained network writes: the far end of the scale.
    fresh = trainer.build(run.check(1), jax.devices()[:1]).init().params
    start = Writer(program, fresh, options.rows)(Psi(), 1.0, calls[0])
    record = environment() | {
        "steps": options.steps,
        "rows": options.rows,
        "nfe": calls,
        "loss": values["valid/loss"],
        "seconds": seconds,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "untrained": figures(jury, start, labels),
        "written": {},
    }
    writer, kept = Writer(program, params, options.rows), start
    for n in calls:
        for name, psi in SAMPLERS.items():
            tokens = writer(psi, 1.0, n)
            found = record["written"][f"{name}/{n}"] = figures(jury, tokens, labels)
            print(name, n, found, flush=True)
            kept = tokens if name == "psi window" else kept
    return record, kept


def markdown(r: dict) -> str:
    """The record as a page."""
    some, calls = next(iter(r["written"].values())), r["nfe"]
    lines = [
        f"# Diffusion of handwritten digits, {r['date']}",
        "",
        f"{described(r)}. {r['parameters']:,} parameters, {r['steps']} steps of 64 images in "
        f"{r['seconds']:.0f} s; held-out bound {r['loss']:.3f} nats a pixel of 17 grey levels.",
        "",
        f"A cell: Frechet distance of {r['rows']} written images from the training part, in features of a "
        f"perceptron (accuracy {some['classifier']:.3f} on held-out images); share whose digit it sees as "
        f"the one asked for. As many held-out images are {some['held_out']:.2f} away; an untrained network "
        f"writes at {r['untrained']['distance']:.1f} and {r['untrained']['right']:.2f}.",
        "",
        f"| sampler | {' | '.join(map(str, calls))} |",
        f"|---|{'---|' * len(calls)}",
    ]
    for name in SAMPLERS:
        cells = [r["written"][f"{name}/{n}"] for n in calls]
        text = " | ".join(f"{c['distance']:.2f}; {c['right']:.2f}" for c in cells)
        lines.append(f"| {name} | {text} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parses the command line, trains, writes, publishes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--rows", type=int, default=512, help="images a sampler writes")
    parser.add_argument("--nfe", default="8,16,32,64", help="calls of the network")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "diffusion_images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    record, images = measure(options)
    publish(record, markdown(record), options.out, "diffusion_images")
    panels = {
        what: {
            name: [record["written"][f"{name}/{n}"][what] for n in record["nfe"]]
            for name in SAMPLERS
        }
        for what in ("distance", "right")
    }
    file = options.out / f"diffusion_images_{jax.default_backend()}.png"
    curves(record["nfe"], panels, "", file)
    draw(file.with_stem(f"{file.stem}_drawn"), images, unet.run().source)


if __name__ == "__main__":
    main()
