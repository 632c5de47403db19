"""Does a TTT layer memorise? Three probes of 2602.21204 (section 4) on a small language model.

    python benchmarks/ttt_probes.py

The model of `configs/lact.py` is trained as it is, with gradient ascent inside, and with keys in the
place of queries at the read-out, each with some seeds. The first is then read with 1, 2, 4 and 8 inner
steps: the inner loss -<f(k), v> after learning from a chunk, and the loss of the task.
Writes ttt_probes_<platform>.json and .md into --out.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, load, publish  # noqa: E402
from benchmarks.small_lm import experiment, mean_and_error, train_seeds, verdict  # noqa: E402
from jaxlab.ttt import LADDER, InnerConfig, ttt  # noqa: E402
from models.decoder import DecoderConfig, unroll  # noqa: E402

BASE = LADDER["base"]
RETRAINED = {
    "as it is": BASE,
    "gradient ascent": dataclasses.replace(BASE, sign=-1),
    "q <- k": dataclasses.replace(BASE, query="k"),
}


def inner_loss(cfg: InnerConfig, k, v, fw, rates, mu) -> jax.Array:
    """Mean of -<f(k), v> over tokens, f learnt from their own chunk too."""
    after = dataclasses.replace(cfg, visibility="inclusive_chunk", query="k")
    return -jnp.mean(jnp.sum(ttt(k, k, v, fw, rates, mu, after)[0] * v, -1))


def read_with_steps(config: DecoderConfig, params: Any, tokens, targets, steps: int) -> tuple:
    """(inner loss, task loss) of a trained model whose layers take `steps` inner steps a chunk."""
    inner = dataclasses.replace(config.lact.inner, steps=steps)
    changed = dataclasses.replace(config, lact=dataclasses.replace(config.lact, inner=inner))
    module, apart = unroll(changed.build(jax.default_backend()), params)

    @jax.jit
    def measure(params, tokens, targets):
        logits, sown = module.apply({"params": params}, tokens, mutable=["intermediates"])
        found = jax.tree.leaves(
            sown["intermediates"], is_leaf=lambda x: isinstance(x, tuple) and len(x) == 5
        )
        inside = jnp.mean(jnp.stack([inner_loss(inner, *x) for x in found]))
        logs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(logs, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
        return inside, -jnp.sum(jnp.where(targets >= 0, picked, 0)) / jnp.sum(targets >= 0)

    return tuple(map(float, measure(apart, tokens, targets)))


def measure(options) -> dict:
    """The record: losses by probe and seed, and inner and task losses by steps and seed."""
    losses, kept = {}, []
    for name, cfg in RETRAINED.items():
        run = experiment(cfg, options.steps, options.batch)
        params, losses[name] = train_seeds(run, options.seeds, options.batches)
        kept = kept or params
        print(f"{name}: {losses[name]}", file=sys.stderr)
    run = experiment(BASE, options.steps, options.batch)
    rows: Any = run.source.make(32, seed=0, split="valid")
    batch = rows.batch_at(0)
    by_steps = {
        steps: [
            read_with_steps(run.model, params, batch["tokens"], batch["targets"], steps)
            for params in kept
        ]
        for steps in options.inner
    }
    return {"losses": losses, "by_steps": by_steps, "seq_len": run.source.seq_len}


def markdown(r: dict) -> str:
    """The record as a page."""
    say = lambda values: "{:.3f} ± {:.3f}".format(*mean_and_error(values))  # noqa: E731
    lines = [
        f"# Probes of test-time training, {r['date']}",
        "",
        f"{described(r)}, float32.",
        "",
        f"Held-out nats per byte after {r['steps']} steps of {r['batch']} x {r['seq_len']} tokens, mean of "
        f"{r['seeds']} seeds and its standard error; differences are paired by seed.",
        "",
        "| trained with | loss | minus the first |",
        "|---|---|---|",
    ]
    first = r["losses"]["as it is"]
    for name, losses in r["losses"].items():
        gap = "" if losses is first else say(list(np.subtract(losses, first)))
        lines.append(f"| {name} | {say(losses)} | {gap} |")
    lines += [
        "",
        "Trained as it is, read with more inner steps (32 rows, documents not apart):",
        "",
    ]
    lines += ["| inner steps | inner loss | task loss |", "|---|---|---|"]
    for steps, pairs in r["by_steps"].items():
        inner, task = zip(*pairs, strict=True)
        lines.append(f"| {steps} | {say(list(inner))} | {say(list(task))} |")
    ends = min(r["by_steps"]), max(r["by_steps"])
    few, many = (list(zip(*r["by_steps"][steps], strict=True)) for steps in ends)
    lines += [
        "",
        f"In the paper more steps lower the inner loss (here: {verdict(few[0], many[0], -1)}) and raise "
        f"that of the task (here: {verdict(few[1], many[1], 1)}).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps of each model")
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--inner", type=int, nargs="+", default=[1, 2, 4, 8], help="inner steps")
    parser.add_argument("--batches", type=int, default=8, help="held-out batches; 0: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    for name in ("steps", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)} must be at least 1")
    record = {name: x for name, x in vars(options).items() if name != "out"}
    record |= environment() | measure(options)
    record["load"] += load()
    publish(record, markdown(record), options.out, "ttt_probes")


if __name__ == "__main__":
    main()
