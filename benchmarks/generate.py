"""Decode speed: this project's generation against `transformers.generate`, in one run.

    python benchmarks/generate.py --peer-python PATH_OF_A_PYTHON_WITH_TRANSFORMERS

Both sides continue the same prompts greedily from the same weights; the tokens must be identical
before anything is timed. Decoding time is that of a call that makes many tokens less that of a call
that makes one. Rounds of the sides alternate. Without --peer-python only this side is measured.
Writes generate_<platform>.json and .md into --out.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, publish, spread  # noqa: E402
from benchmarks.peer import Peer  # noqa: E402
from jaxlab.sampling import GREEDY  # noqa: E402
from models.decoder import DecoderConfig, unroll  # noqa: E402
from models.generate import generate  # noqa: E402
from train.state import init_params  # noqa: E402

PEER = Path(__file__).parent / "peers" / "generate_transformers.py"
# A tenth of a billion parameters in the shape of Llama 3: its weights do not fit the caches.
MODEL = DecoderConfig(
    vocab=32_000, layers=8, d_model=768, heads=12, kv_heads=4, head_dim=64, mlp=2048
)


class Ours:
    """This side: a jitted call of `generate`, blocks scanned or unrolled."""

    def __init__(self, module, params):
        self.params = params
        self._calls = functools.cache(
            lambda new: jax.jit(functools.partial(generate, module, new=new, sampling=GREEDY))
        )

    def tokens(self, prompts, new: int) -> list[list[int]]:
        """Greedy tokens of one call."""
        lengths = np.full(len(prompts), prompts.shape[1], np.int32)
        out = self._calls(new)(self.params, prompts, lengths, jax.random.key(0))
        return np.asarray(out.tokens[:, 0]).tolist()

    def time(self, prompts, new: int) -> float:
        """Seconds of one call."""
        begin = time.perf_counter()
        self.tokens(prompts, new)
        return time.perf_counter() - begin


class Theirs:
    """The peer under the same two questions; RuntimeError when it fails."""

    def __init__(self, peer: Peer, side: str):
        self.peer, self.side = peer, side

    def _ask(self, do: str, prompts, new: int):
        answer = self.peer.ask(do, side=self.side, prompts=prompts.tolist(), new=new)
        if isinstance(answer, dict):
            raise RuntimeError(answer["error"])
        return answer

    def tokens(self, prompts, new: int) -> list[list[int]]:
        """Greedy tokens of one call."""
        return self._ask("tokens", prompts, new)

    def time(self, prompts, new: int) -> float:
        """Seconds of one call."""
        return self._ask("time", prompts, new)


def add_peer(options, stack, sides: dict, params, record: dict) -> None:
    """Starts the peer with our weights and adds its sides; a failure to compile is recorded."""
    peer = Peer(options.peer_python, PEER)
    stack.callback(peer.close)
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights.npz"
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    np.savez(file, **{name: np.asarray(x, np.float32) for name, x in flat.items()})
    sizes = dataclasses.asdict(MODEL)
    record["peer"] = peer.ask("build", npz=str(file), sizes=sizes)
    if record["peer"].get("parameters") != record["parameters"]:
        raise ValueError(f"the peer is not the same model: {record['peer']}")
    names = ["static cache"]
    if options.compile:
        peer.ask("compile", npz=str(file), sizes=sizes)
        names.append("static cache, compiled")
    for name in names:
        sides[f"transformers, {name}"] = Theirs(peer, name)


def measure_batch(options, sides: dict, batch: int) -> dict:
    """Rows of the table for one batch size: sides that fail leave their error instead."""
    shape = (batch, options.prompt)
    prompts = np.random.default_rng(0).integers(1, MODEL.vocab, shape).astype(np.int32)
    expected, rows = None, {}
    for name, side in sides.items():
        try:
            # Twice: torch.compile compiles some shapes at the second call only.
            for _ in range(2):
                found = side.tokens(prompts, options.new + 1)
                side.tokens(prompts, 1)
        except RuntimeError as error:
            rows[name] = {"error": str(error)}
            continue
        expected = expected or found
        if found != expected:
            raise ValueError(f"{name} makes other tokens than the first side, batch {batch}")
        rows[name] = {"first": [], "whole": []}
    for _ in range(options.repeats):
        for name, side in sides.items():
            if "error" not in rows[name]:
                rows[name]["first"].append(side.time(prompts, 1))
                rows[name]["whole"].append(side.time(prompts, options.new + 1))
    for row in rows.values():
        if "error" not in row:
            first, whole = (row[kind] for kind in ("first", "whole"))
            # Of medians and of least times, as single differences can be negative on a busy machine.
            row["decode"] = {
                "median_s": statistics.median(whole) - statistics.median(first),
                "min_s": min(whole) - min(first),
            }
            row |= {"first": spread(first), "whole": spread(whole)}
            row["tokens_per_second"] = batch * options.new / row["decode"]["median_s"]
    best = rows["unrolled"]["decode"]
    for row in rows.values():
        if "error" not in row:
            row["ours_over_this"] = row["decode"]["median_s"] / best["median_s"]
            row["ours_over_this_least"] = row["decode"]["min_s"] / best["min_s"]
    return rows


def measure(options) -> dict:
    """Runs everything; the record that is written."""
    module = MODEL.build(jax.default_backend())
    inputs = (jax.ShapeDtypeStruct((1, 8), jnp.int32),)
    params = jax.jit(lambda: init_params(module, jax.random.key(0), inputs))()
    record = environment() | {
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "dtype": module.config.dtype,
        "prompt": options.prompt,
        "new": options.new,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }
    sides = {"unrolled": Ours(*unroll(module, params)), "scanned": Ours(module, params)}
    with contextlib.ExitStack() as stack:
        if options.peer_python:
            add_peer(options, stack, sides, params, record)
        record["batches"] = {b: measure_batch(options, sides, b) for b in options.batch}
    return record


def markdown(r: dict) -> str:
    """The record as a page."""
    versions = ""
    if peer := r.get("peer"):
        versions += (
            f"; transformers {peer['transformers']}, PyTorch {peer['torch']} on Python "
            f"{peer['python']}, {peer['threads']} threads, OMP_WAIT_POLICY {r['omp_wait_policy']}"
        )
    lines = [
        f"# Decoding, {r['date']}",
        "",
        f"{r['parameters']:,} parameters, {r['dtype']}, prompts of {r['prompt']} tokens, "
        f"{r['new']} tokens more, greedy; all sides make the same tokens.",
        f"{described(r)}{versions}.",
        "",
        "| batch | side | ms a step, by medians (by least) | tokens/s | unrolled / this, by medians "
        "(by least) |",
        "|---|---|---|---|---|",
    ]
    for batch, rows in r["batches"].items():
        for name, row in rows.items():
            if "error" in row:
                lines.append(f"| {batch} | {name} | does not run: {row['error']} | | |")
                continue
            median, least = (1e3 * row["decode"][key] / r["new"] for key in ("median_s", "min_s"))
            lines.append(
                f"| {batch} | {name} | {median:.1f} ({least:.1f}) | "
                f"{row['tokens_per_second']:,.1f} | {row['ours_over_this']:.2f}x "
                f"({row['ours_over_this_least']:.2f}x) |"
            )
    return "\n".join([*lines, ""])


def main() -> None:
    """Parses the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="a Python that has torch, transformers and numpy")
    parser.add_argument("--compile", action="store_true", help="the peer under torch.compile too")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens timed a round")
    parser.add_argument("--repeats", type=int, default=5, help="timing rounds of each side")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    for name, value in (
        ("new", options.new),
        ("repeats", options.repeats),
        ("prompt", options.prompt),
    ):
        if value < 1:
            parser.error(f"--{name}={value} must be at least 1")
    record = measure(options)
    publish(record, markdown(record), options.out, "generate")


if __name__ == "__main__":
    main()
