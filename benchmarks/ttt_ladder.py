"""The ladder from LaCT to linear attention: exactness, speed and loss of every variant, in one run.

    python benchmarks/ttt_ladder.py

Of the operator, at [1, 2048, 2, 64] in float32 with chunks of 256: the greatest error of the parallel
against the recurrent form, outputs and gradients, relative to the greatest value; tokens/s of both,
forward and with the gradient, in alternating rounds. Of the language model of `configs/lact.py`: the
held-out loss with three seeds, and which orderings of the paper (2602.21204, table 1) it shows.
Writes ttt_ladder_<platform>.json and .md into --out.
"""

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, load, publish, spread  # noqa: E402
from benchmarks.small_lm import experiment, mean_and_error, train_seeds, verdict  # noqa: E402
from jaxlab.ttt import LADDER, FastWeights, ttt  # noqa: E402

# (first, second, sign): in the paper the loss of the second is above (1) or below (-1) the first's.
ORDERINGS = (
    ("base", "V1", -1), ("V1", "V2", 1), ("V2", "V3", -1), ("V3", "V4", -1), ("V4", "V5", -1),
    ("V5", "V6", 1), ("base", "V6", 1), ("base", "V5", -1),
)  # fmt: skip


def inputs(shape: tuple[int, ...]) -> tuple:
    """q, k, v [b, t, h, d], square fast weights, rates and gates, as a layer makes them."""
    *bth, d = shape
    keys = jax.random.split(jax.random.key(0), 8)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    q, k, v = (jax.random.normal(key, shape) for key in keys[:3])
    fw = FastWeights(*(jax.random.normal(key, (shape[2], d, d)) * d**-0.5 for key in keys[3:6]))
    rates = jax.nn.softplus(jax.random.normal(keys[6], (*bth, 3)) - 2)
    return unit(q), unit(k), v, fw, rates, jax.nn.sigmoid(jax.random.normal(keys[7], bth))


def forms_of(cfg) -> list[str]:
    """The implementations that there are of a variant."""
    legal = cfg.update == ("w1",) and cfg.weight_norm != "post"
    return ["recurrent", "parallel"] if legal else ["recurrent"]


def compiled(cfg, impl: str, args: tuple) -> dict:
    """{pass: compiled function of `args`}."""
    forward = functools.partial(ttt, cfg=cfg, impl=impl, return_state=False)
    gradient = jax.grad(lambda args: jnp.sum(jnp.sin(forward(*args)[0])))
    return {
        "forward": jax.jit(lambda args: forward(*args)[0]).lower(args).compile(),
        "gradient": jax.jit(gradient).lower(args).compile(),
    }


def error(first, second) -> float:
    """The greatest over arrays of the greatest difference over the greatest value."""
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return max(float(jnp.max(jnp.abs(a - b)) / (jnp.max(jnp.abs(b)) + 1e-30)) for a, b in pairs)


def measure_operator(options) -> dict:
    """Errors and times of every variant; rounds of all forms alternate."""
    args = inputs(tuple(options.shape))
    rows, calls = {}, {}
    for name, cfg in LADDER.items():
        cfg = dataclasses.replace(cfg, chunk_size=options.chunk_size)
        forms = {impl: compiled(cfg, impl, args) for impl in forms_of(cfg)}
        found = {impl: {n: f(args) for n, f in form.items()} for impl, form in forms.items()}
        rows[name] = {"times": {impl: {n: [] for n in form} for impl, form in forms.items()}}
        if "parallel" in found:
            for n in ("forward", "gradient"):
                rows[name][f"{n}_error"] = error(found["parallel"][n], found["recurrent"][n])
        calls[name] = forms
    for _ in range(options.repeats):
        for name, forms in calls.items():
            for impl, form in forms.items():
                for n, call in form.items():
                    begin = time.perf_counter()
                    jax.block_until_ready(call(args))
                    rows[name]["times"][impl][n].append(time.perf_counter() - begin)
    for row in rows.values():
        row["times"] = {
            impl: {n: spread(x) for n, x in form.items()} for impl, form in row["times"].items()
        }
    return rows


def measure_losses(options) -> dict:
    """Held-out losses by variant and seed, and what became of the paper's orderings."""
    losses = {}
    for name, cfg in LADDER.items():
        run = experiment(cfg, options.steps, options.batch)
        losses[name] = train_seeds(run, options.seeds, options.batches)[1]
        print(f"{name}: {losses[name]}", file=sys.stderr)
    found = [(*o, verdict(losses[o[0]], losses[o[1]], o[2])) for o in ORDERINGS]
    return {"losses": losses, "orderings": found}


def markdown(r: dict) -> str:
    """The record as a page."""
    b, t, h, d = r["shape"]
    lines = [
        f"# The ladder from LaCT to linear attention, {r['date']}",
        "",
        f"{described(r)}, float32.",
        "",
        f"Operator at [{b}, {t}, {h}, {d}], chunks of {r['chunk_size']}: thousands of tokens/s by the "
        f"least of {r['repeats']} alternating rounds, forward / with the gradient. Errors of parallel "
        "against recurrent, output / gradient. Language model: held-out nats per byte after "
        f"{r['steps']} steps of {r['batch']} x {r['seq_len']} tokens, mean of {r['seeds']} seeds and "
        "its standard error.",
        "",
        "| variant | recurrent | parallel | speed-up | error | loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in r["operator"].items():
        least = {
            impl: [form[n]["min_s"] for n in ("forward", "gradient")]
            for impl, form in row["times"].items()
        }
        speed = {
            impl: " / ".join(f"{b * t / x / 1e3:,.0f}" for x in seconds)
            for impl, seconds in least.items()
        }
        gain = errors = "n/a"
        if "parallel" in least:
            pairs = zip(least["recurrent"], least["parallel"], strict=True)
            gain = " / ".join(f"{a / c:.2f}x" for a, c in pairs)
            errors = f"{row['forward_error']:.0e} / {row['gradient_error']:.0e}"
        mean, spare = mean_and_error(r["losses"][name])
        lines.append(
            f"| {name} | {speed['recurrent']} | {speed.get('parallel', 'n/a')} | {gain} | {errors} | "
            f"{mean:.3f} ± {spare:.3f} |"
        )
    lines += ["", "The paper's orderings of the loss (760M parameters), here, paired by seed:", ""]
    for first, second, sign, found in r["orderings"]:
        lines.append(f"* {second} {'above' if sign > 0 else 'below'} {first}: {found}")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parses the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, default=(1, 2048, 2, 64), metavar="N")
    parser.add_argument("--chunk-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5, help="timing rounds")
    parser.add_argument("--steps", type=int, default=100, help="training steps of each model")
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8, help="held-out batches; 0: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    for name in ("repeats", "steps", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}={getattr(options, name)} must be at least 1")
    record = {name: x for name, x in vars(options).items() if name != "out"}
    record |= environment() | {
        "seq_len": experiment(LADDER["base"], 1, options.batch).source.seq_len,
        "operator": measure_operator(options),
        **measure_losses(options),
    }
    record["load"] += load()
    publish(record, markdown(record), options.out, "ttt_ladder")


if __name__ == "__main__":
    main()
