"""Speed of one training step: this trainer against the same decoder in PyTorch, in one run.

    python benchmarks/train_step.py --peer-python PATH_OF_A_PYTHON_WITH_TORCH

Timing rounds of the sides alternate, so that a busy machine slows all of them alike. Before any
timing the peer must have as many parameters and, from the same weights, the same losses over five
AdamW steps. Also timed: `trainer.fit` against the bare jitted step. Without --peer-python only this
side is measured. Writes train_step_<platform>.json and .md into --out.
"""

import argparse
import contextlib
import dataclasses
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

import flax.traverse_util
import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, matmul_peak, publish, spread  # noqa: E402
from benchmarks.peer import Peer  # noqa: E402
from configs.__main__ import large_pages  # noqa: E402
from models.decoder import DecoderConfig  # noqa: E402
from sharding.topology import peak_flops  # noqa: E402
from train import trainer  # noqa: E402
from train.feed import global_batch  # noqa: E402
from train.meter import forward_flops  # noqa: E402
from train.metrics import read  # noqa: E402
from train.optimizer import Optimizer  # noqa: E402

PEER = Path(__file__).parent / "peers" / "decoder_torch.py"
STEPS_COMPARED = 5
TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-2}  # of the loss, nats a token

# About a billion parameters, bfloat16 compute: the shape for the GPU.
BILLION = DecoderConfig(
    vocab=32_768, layers=16, d_model=2048, heads=16, kv_heads=8, head_dim=128, mlp=7168,
    remat="none",
)  # fmt: skip


class Ours:
    """The trainer's own jitted step on one fixed batch."""

    def __init__(self, run, batch):
        self.program = trainer.build(run)
        spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
        fetch = lambda rows: {name: x[rows] for name, x in batch.items()}  # noqa: E731
        self.batch = global_batch(fetch, spec, self.program.mesh)
        with jax.set_mesh(self.program.mesh):
            self.state = self.program.init()
        params = flax.traverse_util.flatten_dict(self.state.params, sep="/")
        self.weights = {name: np.asarray(x, np.float32) for name, x in params.items()}

    def losses(self, steps: int) -> list[float]:
        """Losses of the first steps."""
        found = []
        for _ in range(steps):
            loss, weight = self.step()["loss"]
            found.append(float(loss) / float(weight))
        return found

    def step(self):
        """One step; returns its metrics."""
        with jax.set_mesh(self.program.mesh):
            self.state, metrics = self.program.step(self.state, self.batch)
        return metrics

    def time(self, steps: int) -> float:
        """Seconds a step, over `steps` steps after one that is not counted."""
        jax.block_until_ready(self.step())
        begin = time.perf_counter()
        for _ in range(steps):
            metrics = self.step()
        jax.block_until_ready(metrics)
        return (time.perf_counter() - begin) / steps


def loop_windows(run, steps: int) -> list[float]:
    """Seconds a step of `trainer.fit` with default logging, one figure a log record.

    The first record holds the compilation and is left out; evaluations and checkpoints are off.
    """
    run = dataclasses.replace(run, steps=steps, evaluators=(), eval_every=0, save_every=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer.fit(run, Path(folder), quiet=True)
        rows = [row for row in read(Path(folder)) if row["kind"] == "train"]
    tokens = run.batch * run.source.seq_len
    return [tokens / row["tokens_per_second"] for row in rows[1:]]


def fixed_batch(run, mask: str) -> dict[str, np.ndarray]:
    """A batch: the source's own documents, or random tokens in one segment."""
    if mask == "document":
        source = run.source.make(run.batch, seed=run.seed, split="train")
        return source.batch_at(0)
    shape, rng = (run.batch, run.source.seq_len), np.random.default_rng(0)
    tokens = rng.integers(0, run.model.vocab, (shape[0], shape[1] + 1), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "segment_ids": np.ones(shape, np.int32),
    }


def build_peer(peer: Peer, run, dtype: str, mask: str, ours: Ours, folder: Path) -> dict:
    """Hands weights and batch over; the peer's description. ValueError unless sizes are equal."""
    weights = {f"p:{name}": x for name, x in ours.weights.items()}
    batch = {f"b:{name}": np.asarray(x) for name, x in ours.batch.items()}
    np.savez(folder / "same.npz", **weights, **batch)
    o = run.optimizer
    described = peer.ask(
        "build",
        npz=str(folder / "same.npz"),
        sizes=dataclasses.asdict(run.model),
        optimizer={n: getattr(o, n) for n in ("lr", "b1", "b2", "weight_decay", "clip")},
        dtype=dtype,
        document_mask=mask == "document",
    )
    count = sum(x.size for x in ours.weights.values())
    if described["parameters"] != count:
        raise ValueError(f"the peer has {described['parameters']} parameters, this side {count}")
    return described


def check_same(ours: list[float], peer: list[float], name: str, tolerance: float) -> float:
    """Largest difference of the losses; ValueError when it is too large to be the same model."""
    worst = max(abs(a - b) for a, b in zip(ours, peer, strict=True))
    if not worst <= tolerance:
        raise ValueError(f"losses differ by {worst:.2e} from PyTorch {name}: {ours} and {peer}")
    return worst


def settings(options, on_gpu: bool):
    """The run that is timed: the preset under AdamW; on a GPU the model has 1e9 parameters."""
    run = importlib.import_module(f"configs.{options.config}").run()
    if on_gpu:
        source = dataclasses.replace(run.source, seq_len=4096)
        run = dataclasses.replace(run, model=BILLION, source=source, batch=4)
    # AdamW at one rate on both sides: Muon has no agreed counterpart in PyTorch.
    rule = Optimizer(name="adamw", lr=1e-3, schedule="constant", warmup=0)
    run = dataclasses.replace(run, optimizer=rule).check(1)
    if run.model.qk_norm or set(run.model.pattern) != {"attention"}:
        raise ValueError(f"--config {options.config}: the peer has softmax attention, no QK-norm")
    return run


def measure_sides(options, run, ours: Ours, dtype: str, n: int) -> dict:
    """Step times of all sides in alternating rounds, losses compared first, and matmul peaks."""
    found = {"losses": ours.losses(STEPS_COMPARED), "matmul_flops": {"jax": matmul_peak(n, dtype)}}
    sides = {"ours": ours.time}
    with contextlib.ExitStack() as stack:
        if options.peer_python:
            peer = Peer(options.peer_python, PEER)
            stack.callback(peer.close)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            found["peer"] = build_peer(peer, run, dtype, options.mask, ours, folder)
            found["matmul_flops"]["torch"] = peer.ask("matmul", n=n, dtype=dtype)
            for kind in ("eager", "compile"):
                theirs = peer.ask("losses", kind=kind, steps=STEPS_COMPARED)
                worst = check_same(found["losses"], theirs, kind, TOLERANCE[dtype])
                found["peer"][f"loss_difference_{kind}"] = worst
                sides[f"torch {kind}"] = lambda steps, kind=kind: peer.ask(
                    "time", kind=kind, steps=steps
                )
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.repeats):
            for name, side in sides.items():
                times[name].append(side(options.steps))
    return found | {"step": {name: spread(seconds) for name, seconds in times.items()}}


def measure_loop(options, run, ours: Ours) -> dict:
    """The bare step against `trainer.fit`, in alternation, in as many pieces of as many steps."""
    bare, loop = [], []
    for _ in range(options.fits):
        windows = loop_windows(run, options.fit_steps)
        bare += [ours.time(run.log_every) for _ in windows]
        loop += windows
    return {
        "bare": spread(bare),
        "fit": spread(loop),
        "overhead": statistics.median(loop) / statistics.median(bare) - 1,
        "overhead_least": min(loop) / min(bare) - 1,
    }


def measure(options) -> dict:
    """Runs everything; the record that is written."""
    backend = jax.default_backend()
    run = settings(options, backend == "gpu")
    ours = Ours(run, fixed_batch(run, options.mask))
    dtype = str(run.model.build(backend).config.dtype)
    flops, tokens = 3 * forward_flops(ours.program), run.batch * run.source.seq_len
    device = jax.devices()[0].device_kind
    record = environment() | {
        "config": options.config,
        "parameters": sum(x.size for x in ours.weights.values()),
        "batch": run.batch,
        "seq_len": run.source.seq_len,
        "dtype": dtype,
        "mask": options.mask,
        "flops_per_step": flops,
    }
    record |= measure_sides(options, run, ours, dtype, 8192 if backend == "gpu" else 2048)
    record["loop"] = measure_loop(options, run, ours)

    best = max(record["matmul_flops"].values())
    chip = peak_flops(device, dtype)
    mine = record["step"]["ours"]
    for row in record["step"].values():
        seconds = row["median_s"]
        row["tokens_per_second"] = tokens / seconds
        row["ours_over_this"] = seconds / mine["median_s"]
        row["ours_over_this_least"] = row["min_s"] / mine["min_s"]
        row["of_matmul_peak"] = flops / seconds / best
        row["mfu"] = flops / seconds / chip if chip else None
    return record


def markdown(r: dict) -> str:
    """The record as a page."""
    peer = r.get("peer")
    versions = ""
    if peer:
        versions += (
            f"; PyTorch {peer['torch']} on Python {peer['python']}, {peer['threads']} threads"
        )
    peaks = ", ".join(f"{name} {flops / 1e9:,.0f}" for name, flops in r["matmul_flops"].items())
    attention = "causal, one segment a row" if r["mask"] == "causal" else "causal within documents"
    lines = [
        f"# Train step, {r['config']}, {r['date']}",
        "",
        f"{r['parameters']:,} parameters, batch {r['batch']} x {r['seq_len']}, {r['dtype']}, AdamW "
        f"with clipping, {attention}.",
        f"{described(r)}{versions}.",
        "",
        "| side | ms a step, median (min to max) | tokens/s | ours / this, by medians (by least) "
        "| of matmul peak | MFU |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in r["step"].items():
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"| {name} | {1e3 * row['median_s']:.1f} ({1e3 * row['min_s']:.1f} to "
            f"{1e3 * row['max_s']:.1f}) | {row['tokens_per_second']:,.0f} | "
            f"{row['ours_over_this']:.2f}x ({row['ours_over_this_least']:.2f}x) | "
            f"{row['of_matmul_peak']:.0%} | {mfu} |"
        )
    bare, fit = r["loop"]["bare"], r["loop"]["fit"]
    lines += [
        "",
        f"Square matmul, measured in the same run: {peaks} GFLOP/s. A step counts as three times "
        f"the forward pass, {r['flops_per_step'] / 1e9:,.1f} GFLOP (full attention, no skipping).",
    ]
    if peer:
        worst = max(peer["loss_difference_eager"], peer["loss_difference_compile"])
        lines.append(
            f"Largest difference of the losses over {len(r['losses'])} steps from the same "
            f"weights: {worst:.1e}."
        )
    lines += [
        "",
        f"Trainer loop: {1e3 * fit['median_s']:.1f} ms a step ({1e3 * fit['min_s']:.1f} to "
        f"{1e3 * fit['max_s']:.1f}) against {1e3 * bare['median_s']:.1f} "
        f"({1e3 * bare['min_s']:.1f} to {1e3 * bare['max_s']:.1f}) of the bare step: "
        f"{r['loop']['overhead']:+.1%} by medians, {r['loop']['overhead_least']:+.1%} by least.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="a Python that has torch and numpy")
    parser.add_argument("--config", default="demo", help="preset of configs/ (CPU only)")
    parser.add_argument("--mask", choices=("causal", "document"), default="causal")
    parser.add_argument("--repeats", type=int, default=5, help="timing rounds of each side")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a round")
    parser.add_argument("--fits", type=int, default=3, help="runs of trainer.fit")
    parser.add_argument("--fit-steps", type=int, default=60, help="steps of each of them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    large_pages()  # as the command does, and for the peer too
    for name, least in (("repeats", 1), ("steps", 1), ("fits", 1), ("fit_steps", 20)):
        if getattr(options, name) < least:
            given = f"--{name.replace('_', '-')}={getattr(options, name)}"
            parser.error(f"{given} must be at least {least}")
    record = measure(options)
    publish(record, markdown(record), options.out, "train_step")


if __name__ == "__main__":
    main()
