"""MC dropout: passes as one vmapped program against a loop in Python, and moments streamed or not.

    python benchmarks/mc_dropout.py

A network of two hidden layers with dropout. All forms must agree before any is timed; rounds of the
forms alternate. Writes mc_dropout_<platform>.json and .md into --out.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, load, publish, spread  # noqa: E402
from jaxlab import uncertainty as un  # noqa: E402

FORMS = {
    "loop": "a jitted pass a key, called from Python; moments of the stack",
    "vmapped": "`mc_predict` and `moments`, one program",
    "streamed": "a scan over keys with `moments_update`, one program",
}


def apply(params, x, key):
    """Logits with dropout of 0.3 on both hidden layers."""
    *hidden, last = params
    for w, k in zip(hidden, jax.random.split(key, len(hidden)), strict=True):
        x = jax.nn.relu(x @ w)
        x = jnp.where(jax.random.bernoulli(k, 0.7, x.shape), x / 0.7, 0)
    return x @ last


def vmapped(params, x, keys):
    """Moments of all samples at once."""
    return un.moments(un.mc_predict(apply, params, x, keys))


def streamed(params, x, keys):
    """Moments of one sample after another."""

    def step(state, key):
        return un.moments_update(state, apply(params, x, key), from_logits=True), None

    start = un.moments_init(x.shape[:1], params[-1].shape[1])
    return un.moments_finish(jax.lax.scan(step, start, keys)[0])


def measure(options, batch: int) -> dict:
    """{form: times, and the temporary bytes of its programs} for a batch."""
    sizes = (options.inputs, options.width, options.width, options.classes)
    *keys, last = jax.random.split(jax.random.key(0), len(sizes) + 1)
    params = [
        jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5
        for key, shape in zip(keys, zip(sizes[:-1], sizes[1:], strict=True), strict=False)
    ]
    x = jax.random.normal(keys[-1], (batch, options.inputs))
    passes = jax.random.split(last, options.passes)
    one = jax.jit(lambda key: jax.nn.softmax(apply(params, x, key), -1)).lower(passes[0]).compile()
    of_stack = jax.jit(un.moments).lower(jnp.zeros((options.passes, batch, options.classes)))
    of_stack = of_stack.compile()
    whole = {f: jax.jit(f).lower(params, x, passes).compile() for f in (vmapped, streamed)}
    calls = {
        "loop": lambda: of_stack(jnp.stack([one(key) for key in passes])),
        "vmapped": lambda: whole[vmapped](params, x, passes),
        "streamed": lambda: whole[streamed](params, x, passes),
    }
    programs = {"loop": of_stack, "vmapped": whole[vmapped], "streamed": whole[streamed]}
    found = {name: jax.block_until_ready(call()) for name, call in calls.items()}
    for m in found.values():
        for a, b in zip(m, found["loop"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
    memory = {name: program.memory_analysis() for name, program in programs.items()}
    return {
        name: spread(times[name]) | {"temporary_bytes": 0 if m is None else m.temp_size_in_bytes}
        for name, m in memory.items()
    }


def markdown(r: dict) -> str:
    """The record as a page."""
    lines = [
        f"# MC dropout, {r['date']}", "",
        f"{r['passes']} passes through {r['inputs']}-{r['width']}-{r['width']}-"
        f"{r['classes']}, float32; {described(r)}.", "",
        f"Least of {r['repeats']} alternating rounds in ms (median), against the loop by least times; "
        "temporary memory of the program that makes the moments.", "",
        "| batch | form | ms | against the loop | MiB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for batch, forms in r["batches"].items():
        base = forms["loop"]["min_s"]
        for name, row in forms.items():
            ms = f"{1e3 * row['min_s']:.1f} ({1e3 * row['median_s']:.1f})"
            mib = f"{row['temporary_bytes'] / 2**20:.1f}"
            gain = f"{base / row['min_s']:.2f}x"
            lines.append(f"| {batch} | {name}: {FORMS[name]} | {ms} | {gain} | {mib} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parses the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--inputs", type=int, default=784)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=10, help="timing rounds of each form")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.repeats < 1 or options.passes < 2:
        parser.error("--repeats must be at least 1 and --passes at least 2")
    names = ("passes", "inputs", "width", "classes", "repeats")
    record = environment() | {name: getattr(options, name) for name in names}
    record["batches"] = {batch: measure(options, batch) for batch in options.batches}
    record["load"] += load()
    publish(record, markdown(record), options.out, "mc_dropout")


if __name__ == "__main__":
    main()
