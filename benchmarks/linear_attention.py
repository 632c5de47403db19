"""Speed of linear attention and its relatives: token by token against chunks, in one run.

    python benchmarks/linear_attention.py

Forward pass and gradient of every method at [1, 4096, 4, 64] in float32, with the temporary memory
of the compiled gradient. Rounds of the forms alternate, so that a busy machine slows all of them
alike. Writes linear_attention_<platform>.json and .md into --out.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, load, publish, spread  # noqa: E402
from jaxlab import linear_attention as la  # noqa: E402

FORMS = ("recurrent", "chunkwise", "scan")
# Name in the table: function, gates as keyword arguments.
METHODS = {
    "linear": (la.linear_attention, ()),
    "scalar decay": (la.linear_attention, ("log_decay",)),
    "momentum": (la.linear_attention, ("momentum",)),
    "GLA": (la.gla, ("log_decays",)),
    "DeltaNet": (la.delta_rule, ("beta",)),
    "Gated DeltaNet": (la.gated_delta_rule, ("log_decay", "beta")),
    "KDA": (la.kda, ("log_decays", "beta")),
}


def inputs(shape: tuple[int, ...]) -> dict[str, jax.Array]:
    """q, k, v [b, t, h, k] with unit keys, and every gate."""
    normal = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), 5)]
    q, k, v, decay, gate = normal
    return {
        "q": q,
        "k": k / jnp.linalg.norm(k, axis=-1, keepdims=True),
        "v": v,
        "log_decay": -jnp.abs(decay[..., 0]) / 10,
        "log_decays": -jnp.abs(decay) / 10,
        "momentum": jax.nn.sigmoid(gate[..., 0]),
        "beta": jax.nn.sigmoid(gate[..., 1]),
    }


def compiled(method: str, arrays: dict, impl: str, chunk_size: int) -> tuple[dict, int]:
    """({pass: call without arguments that waits}, temporary bytes of the gradient)."""
    fn, gates = METHODS[method]
    given = {name: arrays[name] for name in ("q", "k", "v", *gates)}
    given = {name.replace("decays", "decay"): x for name, x in given.items()}

    def forward(given):
        return fn(**given, impl=impl, chunk_size=chunk_size, return_state=False)[0]

    gradient = jax.grad(lambda given: jnp.sum(forward(given) ** 2))
    passes = {
        "forward": jax.jit(forward).lower(given).compile(),
        "gradient": jax.jit(gradient).lower(given).compile(),
    }
    calls = {n: (lambda run=run: jax.block_until_ready(run(given))) for n, run in passes.items()}
    memory = passes["gradient"].memory_analysis()
    return calls, 0 if memory is None else memory.temp_size_in_bytes


def seconds(call) -> float:
    """Wall-clock time of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def measure_method(method: str, arrays: dict, options) -> dict:
    """Times of all forms in alternating rounds, and the memory of each."""
    forms = {form: compiled(method, arrays, form, options.chunk_size) for form in FORMS}
    times = {form: {name: [] for name in calls} for form, (calls, _) in forms.items()}
    for rounds in range(options.repeats + 1):
        for form, (calls, _) in forms.items():
            for name, call in calls.items():
                spent = seconds(call)
                if rounds:  # the first warms up
                    times[form][name].append(spent)
    return {
        form: {name: spread(times[form][name]) for name in calls} | {"temporary_bytes": memory}
        for form, (calls, memory) in forms.items()
    }


def markdown(r: dict) -> str:
    """The record as a page."""
    b, t, h, d = r["shape"]
    lines = [
        f"# Linear attention, {r['date']}",
        "",
        f"[{b}, {t}, {h}, {d}] float32, chunks of {r['chunk_size']}; {described(r)}.",
        "",
        f"Least of {r['repeats']} alternating rounds in ms (median); speed-up over token by token "
        "by least times; temporary memory of the gradient.",
        "",
        "| method | form | forward | gradient | speed-up forward | gradient | MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, rows in r["methods"].items():
        base = rows["recurrent"]
        for form, row in rows.items():
            passes = [row["forward"], row["gradient"]]
            ms = [f"{1e3 * x['min_s']:.1f} ({1e3 * x['median_s']:.1f})" for x in passes]
            gain = [f"{base[n]['min_s'] / row[n]['min_s']:.1f}x" for n in ("forward", "gradient")]
            mib = f"{row['temporary_bytes'] / 2**20:.0f}"
            lines.append(f"| {method} | {form} | {' | '.join([*ms, *gain, mib])} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parses the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, default=(1, 4096, 4, 64), metavar="N")
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="timing rounds of each form")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats={options.repeats} must be at least 1")
    arrays = inputs(tuple(options.shape))
    record = environment() | {
        "shape": list(options.shape),
        "chunk_size": options.chunk_size,
        "repeats": options.repeats,
        "methods": {name: measure_method(name, arrays, options) for name in METHODS},
    }
    record["load"] += load()
    publish(record, markdown(record), options.out, "linear_attention")


if __name__ == "__main__":
    main()
