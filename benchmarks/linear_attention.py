"""Speed and memory of linear attention and its relatives, in one run.

    python benchmarks/linear_attention.py --peer-python PATH_OF_A_PYTHON_WITH_TORCH [--compile]

Forward pass and gradient of every method at [1, 4096, 4, 64] in float32: token by token, in chunks,
and the same formulas in PyTorch (`peers/linear_attention_torch.py`; outputs must agree first). Beside
them the memory floor, and the temporaries of the compiled gradient at T and 4T. Rounds of all sides
alternate, so that a busy machine slows them alike. Without --peer-python only this side is measured.
Writes linear_attention_<platform>.json and .md into --out.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, load, publish, spread  # noqa: E402
from benchmarks.peer import Peer  # noqa: E402
from jaxlab import linear_attention as la  # noqa: E402

PEER = Path(__file__).parent / "peers" / "linear_attention_torch.py"
TOLERANCE = 1e-4  # of the largest output
PASSES = ("forward", "gradient")
FORMS = ("recurrent", "chunkwise", "scan")
UNKNOWN_TO_PEER = ("momentum",)  # fla has no such method
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


def given(method: str, arrays: dict) -> dict:
    """The arguments of a method."""
    names = ("q", "k", "v", *METHODS[method][1])
    return {name.replace("decays", "decay"): arrays[name] for name in names}


def programs(method: str, arrays: dict, impl: str, chunk_size: int, passes=PASSES) -> dict:
    """The compiled forward pass, and the gradient of the sum of squares."""

    def forward(arguments):
        fn = METHODS[method][0]
        return fn(**arguments, impl=impl, chunk_size=chunk_size, return_state=False)[0]

    gradient = jax.grad(lambda arguments: jnp.sum(forward(arguments) ** 2))
    arguments = given(method, arrays)
    found = {"forward": forward, "gradient": gradient}
    return {name: jax.jit(found[name]).lower(arguments).compile() for name in passes}


def temporaries(method: str, arrays: dict, impl: str, chunk_size: int, times: int) -> int:
    """Temporary bytes of the compiled gradient with `times` as many tokens; 0 where not known."""
    longer = lambda x: jax.ShapeDtypeStruct((x.shape[0], times * x.shape[1], *x.shape[2:]), x.dtype)  # noqa: E731
    structs = {name: longer(x) for name, x in arrays.items()}
    (program,) = programs(method, structs, impl, chunk_size, ("gradient",)).values()
    memory = program.memory_analysis()
    return 0 if memory is None else memory.temp_size_in_bytes


def bandwidth(mib: int = 256, repeats: int = 8) -> float:
    """Best bytes/s of adding one to an array in place: all of it is read and written."""
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = add(jnp.zeros(mib * 2**18))
    best = 0.0
    for _ in range(repeats):
        x = jax.block_until_ready(x)
        begin = time.perf_counter()
        x = jax.block_until_ready(add(x))
        best = max(best, 2 * x.nbytes / (time.perf_counter() - begin))
    return best


def floors(method: str, arrays: dict, rate: float) -> dict:
    """Seconds to move what must be moved: inputs and output; inputs and their gradients."""
    arguments = given(method, arrays)
    read = sum(x.nbytes for x in arguments.values())
    return {"forward": (read + arguments["v"].nbytes) / rate, "gradient": 2 * read / rate}


def ours(method: str, arrays: dict, form: str, chunk_size: int) -> dict:
    """{pass: a call that returns its seconds}."""
    arguments = given(method, arrays)

    def timed(run):
        begin = time.perf_counter()
        jax.block_until_ready(run(arguments))
        return time.perf_counter() - begin

    runs = programs(method, arrays, form, chunk_size)
    return {name: (lambda run=run: timed(run)) for name, run in runs.items()}


def theirs(peer: Peer, method: str, arrays: dict, options) -> tuple[dict, dict]:
    """({side: {pass: call}}, what was found) of the peer, whose output must equal ours."""
    gates = list(METHODS[method][1])
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "out.npy")
        found = peer.ask("out", method=method, gates=gates, path=path)
        if "error" in found:
            return {}, found
        run = programs(method, arrays, "chunkwise", options.chunk_size, ("forward",))["forward"]
        mine, other = np.asarray(run(given(method, arrays))), np.load(path)
    found["error_of_output"] = float(abs(mine - other).max() / abs(mine).max())
    if not found["error_of_output"] < TOLERANCE:
        raise ValueError(f"{method}: outputs differ by {found['error_of_output']} of the largest")
    sides = ["eager"]
    if options.compile:
        found["compile"] = peer.ask("compile", method=method, gates=gates)
        sides += [] if "error" in found["compile"] else ["compiled"]

    def call(side, what):
        return lambda: peer.ask("time", method=method, side=side, what=what, gates=gates)

    return {f"torch {side}": {what: call(side, what) for what in PASSES} for side in sides}, found


def measure_method(method: str, arrays: dict, options, peer: Peer | None) -> dict:
    """Times of all sides in alternating rounds, and the memory of ours."""
    calls = {form: ours(method, arrays, form, options.chunk_size) for form in FORMS}
    found = {}
    if peer is not None and method not in UNKNOWN_TO_PEER:
        more, found = theirs(peer, method, arrays, options)
        calls |= more
    times = {side: {name: [] for name in PASSES} for side in calls}
    for rounds in range(options.repeats + 1):
        for side, passes in calls.items():
            for name, call in passes.items():
                spent = call()
                if rounds:  # the first warms up
                    times[side][name].append(spent)
    rows = {side: {name: spread(times[side][name]) for name in PASSES} for side in calls}
    for form in FORMS:
        rows[form]["temporary_bytes"] = [
            temporaries(method, arrays, form, options.chunk_size, times) for times in (1, 4)
        ]
    print(method, {side: row["gradient"]["min_s"] for side, row in rows.items()}, file=sys.stderr)
    return {"rows": rows, "peer": found}


def ratios(other: dict, row: dict) -> list[str]:
    """How many times as long as `row` the other takes, forward and gradient, by least times."""
    return [f"{other[n]['min_s'] / row[n]['min_s']:.1f}x" for n in PASSES]


def markdown(r: dict) -> str:
    """The record as a page."""
    b, t, h, d = r["shape"]
    peer = r["peer"]
    naive = (
        f" PyTorch {peer['torch']} with {peer['threads']} threads, {peer['form']}: in-chunk products of "
        "all chunks at once, a Python loop over chunks that carries the state, as fla's reference "
        "implementations do; its triangular system goes to `torch.linalg.solve_triangular`, where "
        "those substitute row by row."
        if peer
        else ""
    )
    lines = [
        f"# Linear attention, {r['date']}",
        "",
        f"[{b}, {t}, {h}, {d}] float32, chunks of {r['chunk_size']}; {described(r)}.{naive}",
        "",
        f"Least of {r['repeats']} alternating rounds in ms (median), forward and gradient (forward and "
        "backward). Times faster: than token by token, and for our chunks than PyTorch eager, by least "
        f"times. Floor: inputs and output, or inputs and gradients, at {r['bandwidth'] / 1e9:.1f} GB/s "
        "(measured in this run, load included). Temporaries of the compiled gradient at T and 4T; a "
        f"state a token would be {b * h * t * d * d * 4 / 2**20:.0f} and "
        f"{b * h * t * d * d * 16 / 2**20:.0f} MiB (B H T Dk Dv 4 bytes).",
        "",
        "| method | form | forward | gradient | x token forward | gradient | x torch forward "
        "| gradient | floor forward | gradient | MiB at T | 4T |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for method, measured in r["methods"].items():
        rows, floor = measured["rows"], measured["floor"]
        for form, row in rows.items():
            cells = [
                f"{1e3 * row[n]['min_s']:.1f} ({1e3 * row[n]['median_s']:.1f})" for n in PASSES
            ]
            cells += ratios(rows["recurrent"], row)
            eager = rows.get("torch eager") if form in FORMS else None
            cells += ratios(eager, row) if eager else ["", ""]
            cells += [f"{1e3 * floor[n]:.1f}" for n in PASSES]
            cells += [f"{x / 2**20:.0f}" for x in row.get("temporary_bytes", [])] or ["", ""]
            lines.append(f"| {method} | {form} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parses the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, default=(1, 4096, 4, 64), metavar="N")
    parser.add_argument("--chunk-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="timing rounds of each form")
    parser.add_argument("--peer-python", help="a Python with torch; without it only this side")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too: minutes a method"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats={options.repeats} must be at least 1")
    if options.peer_python and options.shape[1] % options.chunk_size:
        parser.error(f"--shape={options.shape}: the peer needs T divisible by --chunk-size")
    arrays = inputs(tuple(options.shape))
    peer, about = None, {}
    if options.peer_python:
        peer = Peer(options.peer_python, PEER)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "arrays.npz"
            np.savez(path, **{name: np.asarray(x) for name, x in arrays.items()})
            about = peer.ask("build", npz=str(path), chunk_size=options.chunk_size)
    rate = bandwidth()
    record = environment() | {
        "shape": list(options.shape),
        "chunk_size": options.chunk_size,
        "repeats": options.repeats,
        "bandwidth": rate,
        "peer": about,
        "methods": {
            name: measure_method(name, arrays, options, peer)
            | {"floor": floors(name, arrays, rate)}
            for name in METHODS
        },
    }
    if peer is not None:
        peer.close()
    record["load"] += load()
    publish(record, markdown(record), options.out, "linear_attention")


if __name__ == "__main__":
    main()
