"""MC dropout: passes as one vmapped program against a loop in Python and PyTorch; moments streamed or not.

    python benchmarks/mc_dropout.py [--peer-python PYTHON with torch-uncertainty, or torch alone]

A network of two hidden layers with dropout. All forms must agree before any is timed, those of the peer,
whose masks are others, within 6 standard errors; rounds of the forms alternate. Writes
mc_dropout_<platform>.json and .md into --out.
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

from benchmarks.machine import cores, described, environment, load, publish, spread  # noqa: E402
from benchmarks.peer import Peer  # noqa: E402
from jaxlab import uncertainty as un  # noqa: E402

PEER = ROOT / "benchmarks" / "peers" / "mc_dropout_torch.py"
RATE, CHUNK = 0.3, 10
FORMS = {
    "loop": "a jitted pass a key, called from Python; moments of the stack",
    "vmapped": "`mc_predict` and `moments`, one program",
    "chunked": "`mc_predict` with chunk={chunk}, and `moments`, one program",
    "streamed": "a scan over keys with `moments_update`, one program",
    "peer loop": "a pass a call",
    "peer batched": "all passes in one batch",
}


def apply(params, x, key):
    """Logits with dropout on both hidden layers."""
    *hidden, last = params
    for w, k in zip(hidden, jax.random.split(key, len(hidden)), strict=True):
        x = jax.nn.relu(x @ w)
        x = jnp.where(jax.random.bernoulli(k, 1 - RATE, x.shape), x / (1 - RATE), 0)
    return x @ last


def vmapped(params, x, keys):
    """Moments of all samples at once."""
    return un.moments(un.mc_predict(apply, params, x, keys))


def chunked(params, x, keys):
    """Moments of all samples, made a few at a time."""
    return un.moments(un.mc_predict(apply, params, x, keys, chunk=CHUNK))


def streamed(params, x, keys):
    """Moments of one sample after another."""

    def step(state, key):
        return un.moments_update(state, apply(params, x, key), from_logits=True), None

    start = un.moments_init(x.shape[:1], params[-1].shape[1])
    return un.moments_finish(jax.lax.scan(step, start, keys)[0])


def ask(peer: Peer, do: str, **arguments):
    """An answer of the peer; RuntimeError where it is an error."""
    answer = peer.ask(do, **arguments)
    if isinstance(answer, dict) and "error" in answer:
        raise RuntimeError(f"the peer cannot {do}: {answer['error']}")
    return answer


def build_peer(peer: Peer, params, x, passes: int) -> str:
    """Gives the peer the same weights and inputs; what makes its passes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.npz"
        np.savez(file, *map(np.asarray, (*params, x)))
        return ask(peer, "build", file=str(file), passes=passes, rate=RATE)["peer"]


def check_peer(peer: Peer, form: str, m: un.Moments, passes: int) -> None:
    """AssertionError unless the peer's mean probabilities agree with ours within 6 standard errors."""
    theirs = ask(peer, "moments", form=form)
    # Masks are a row's own, so rows are independent: the error of a mean over the batch.
    error = np.sqrt(2 * np.asarray(m.var).mean(0) / passes / m.mean.shape[0])
    off = np.abs(np.asarray(theirs["mean"]) - np.asarray(m.mean).mean(0)) / error
    assert off.max() < 6, f"{form}: mean probabilities are {off.max():.1f} standard errors off"


def measure(options, batch: int, peer: Peer | None) -> tuple[dict, str]:
    """{form: times, and the temporary bytes of its programs} for a batch, and the peer's name."""
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
    whole = {f: jax.jit(f).lower(params, x, passes).compile() for f in (vmapped, chunked, streamed)}
    calls = {
        "loop": lambda: of_stack(jnp.stack([one(key) for key in passes])),
        "vmapped": lambda: whole[vmapped](params, x, passes),
        "chunked": lambda: whole[chunked](params, x, passes),
        "streamed": lambda: whole[streamed](params, x, passes),
    }
    programs = {"loop": of_stack} | {f.__name__: program for f, program in whole.items()}
    found = {name: jax.block_until_ready(call()) for name, call in calls.items()}
    for m in found.values():
        for a, b in zip(m, found["loop"], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    name = ""
    if peer:
        name = build_peer(peer, params, x, options.passes)
        for form in ("loop", "batched"):
            check_peer(peer, form, found["loop"], options.passes)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.repeats):
        for form, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[form].append(time.perf_counter() - begin)
        for form in ("loop", "batched") if peer else ():
            # More threads are no gain on small arrays, nor beside other work.
            took = min(ask(peer, "time", form=form, threads=n) for n in {1, cores()})
            times.setdefault(f"peer {form}", []).append(took)
    rows: dict[str, dict] = {form: spread(seconds) for form, seconds in times.items()}
    for form, program in programs.items():
        memory = program.memory_analysis()
        rows[form]["temporary_bytes"] = 0 if memory is None else memory.temp_size_in_bytes
    return rows, name


def markdown(r: dict) -> str:
    """The record as a page."""
    threads = f"1 or {r['hardware']['cores']} threads, whichever took less"
    peer = f" The peer is {r['peer']} with {threads}." if r["peer"] else ""
    lines = [
        f"# MC dropout, {r['date']}", "",
        f"{r['passes']} passes through {r['inputs']}-{r['width']}-{r['width']}-"
        f"{r['classes']}, float32; {described(r)}.", "",
        f"Least of {r['repeats']} alternating rounds in ms (median), against the loop by least times; "
        "temporary memory of the program that makes the moments." + peer, "",
        "| batch | form | ms | against the loop | MiB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for batch, forms in r["batches"].items():
        base = forms["loop"]["min_s"]
        for name, row in forms.items():
            ms = f"{1e3 * row['min_s']:.1f} ({1e3 * row['median_s']:.1f})"
            mib = f"{row['temporary_bytes'] / 2**20:.1f}" if "temporary_bytes" in row else "-"
            gain = f"{base / row['min_s']:.2f}x"
            lines.append(
                f"| {batch} | {name}: {FORMS[name].format(chunk=CHUNK)} | {ms} | {gain} | {mib} |"
            )
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
    parser.add_argument("--peer-python", help="interpreter with torch-uncertainty, or with torch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.repeats < 1 or options.passes < 2:
        parser.error("--repeats must be at least 1 and --passes at least 2")
    names = ("passes", "inputs", "width", "classes", "repeats")
    record = environment() | {name: getattr(options, name) for name in names}
    peer = Peer(options.peer_python, PEER) if options.peer_python else None
    record["batches"] = {}
    for batch in options.batches:
        record["batches"][batch], record["peer"] = measure(options, batch, peer)
    record["load"] += load()
    if peer:
        peer.close()
    publish(record, markdown(record), options.out, "mc_dropout")


if __name__ == "__main__":
    main()
