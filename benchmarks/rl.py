"""Time of an RL update's own arithmetic: group advantages, the loss and its gradient in the log-probabilities.

    python benchmarks/rl.py --peer-python PATH_OF_A_PYTHON_WITH_TRL

The model is left out. The peer is TRL on the same arrays: its own loss, and the same formulas in plain
PyTorch, eager and under torch.compile. Before any timing losses must agree within 1e-5, and gradients
within 1e-5 of their largest value. Rounds alternate. Without --peer-python only this side is measured. Writes
rl_<platform>.json and .md into --out.
"""  # fmt: skip

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, publish, spread  # noqa: E402
from benchmarks.peer import Peer  # noqa: E402
from jaxlab import rl  # noqa: E402

PEER = Path(__file__).parent / "peers" / "grpo_trl.py"
BY_ROW = dict(mode="seq_mean_token_mean", rows="all", log_ratio_clamp=None)
CONFIGS = {
    "pg": rl.RLConfig(kind="pg"),
    "GRPO": rl.RLConfig(kl_coef=0.04, **BY_ROW),
    "DAPO": rl.RLConfig(eps_high=0.28, log_ratio_clamp=None),
    "GSPO": rl.RLConfig(ratio_level="sequence", eps_low=3e-4, eps_high=4e-4, **BY_ROW),
    "CISPO": rl.RLConfig(kind="cispo", eps_low=1.0, eps_high=4.0, log_ratio_clamp=None),
    "SAPO": rl.RLConfig(kind="sapo", **BY_ROW),
    "GMPO": rl.RLConfig(kind="gmpo", mode="seq_mean_token_mean"),
}
OURS = {"ours": True, "bare": False}  # with metrics or without
SIDES = {"trl": "TRL", "plain": "plain PyTorch", "compiled": "torch.compile"}


def update(config: rl.RLConfig, groups: int, metrics: bool = True):
    """Jitted (logp, batch, rewards, group) -> (loss, metrics or None) and gradient."""

    def run(logp, batch, rewards, group):
        if not config.kl_coef:  # a reference would be measured against; TRL does not without its KL
            batch = {name: x for name, x in batch.items() if name != "logp_ref"}
        batch = batch | {"adv": rl.group_advantage(rewards, group, groups, eps=1e-4)}
        (loss, aux), gradient = jax.value_and_grad(rl.rl_loss, has_aux=True)(logp, batch, config)
        return (loss, aux if metrics else None), gradient

    return jax.jit(run)


def inputs(rows: int, tokens: int, groups: int) -> tuple:
    """Log-probabilities of four policies, a ragged mask, rewards and groups."""
    keys = jax.random.split(jax.random.key(0), 6)
    logp = -jax.random.exponential(keys[0], (rows, tokens))
    near = [logp + 0.1 * jax.random.normal(k, logp.shape) for k in keys[1:3]]
    lengths = jax.random.randint(keys[3], (rows, 1), 1, tokens + 1)
    batch = dict(logp_old=near[0], logp_ref=near[1], mask=jnp.arange(tokens) < lengths)
    rewards = jax.random.bernoulli(keys[4], 0.3, (rows,)).astype(jnp.float32)
    return logp, batch, rewards, jnp.arange(rows) // (rows // groups)


class Theirs:
    """The peer on our arrays; `sides` holds those that run and agree with `ours`, (loss, gradient)."""

    def __init__(self, peer: Peer, arrays: tuple, groups: int, ours: dict, record: dict):
        self.peer, self.sides = peer, {}
        logp, batch, rewards, _ = arrays
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "arrays.npz"
            named = {"logp": logp, "rewards": rewards} | batch
            np.savez(file, **{k: np.asarray(x, np.float32) for k, x in named.items()})
            record["peer"] = peer.ask("build", npz=str(file), groups=groups)
            if "error" in record["peer"]:
                raise RuntimeError(f"the peer: {record['peer']['error']}")
            for setting in ("GRPO", "DAPO", "GSPO", "CISPO", "SAPO"):
                for side in SIDES:
                    self.check(side, setting, Path(folder) / "g.npy", *ours[setting], record)

    def check(self, side, setting, file, loss, gradient, record):
        """Adds a side, or records why it fails; ValueError if it computes something else."""
        answer = self.peer.ask("check", side=side, setting=setting, npy=str(file))
        if "error" in answer:
            record.setdefault("failed", {})[f"{setting}, {side}"] = answer["error"]
            return
        away = abs(answer["loss"] - loss)
        off = np.abs(np.load(file) - gradient).max() / np.abs(gradient).max()
        if not (away <= 1e-5 and off <= 1e-5):
            raise ValueError(
                f"{setting}, {side}: loss differs by {away:.1e}, gradient by {off:.1e}"
            )
        record.setdefault("differs", {})[f"{setting}, {side}"] = [float(away), float(off)]
        self.sides[setting, side] = lambda: self.peer.ask("time", side=side, setting=setting)


def timed(run, arrays):
    """Call -> its seconds."""

    def call():
        begin = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        return time.perf_counter() - begin

    return call


def markdown(record: dict) -> str:
    """The record as a page."""
    lines = [
        f"# RL update without its model, {record['date']}", "",
        f"{described(record)}. {record['rows']} rows of {record['tokens']} tokens in {record['groups']} "
        "groups, float32: advantages, loss, gradient and metrics in one jitted call, and without metrics; "
        "log-probabilities of a reference only where the loss has a KL, as in TRL. "
        f"Median ms (min to max) of {record['rounds']} alternating rounds.", "",
    ]  # fmt: skip
    if peer := record.get("peer"):
        loss, gradient = (max(x[i] for x in record["differs"].values()) for i in (0, 1))
        lines += [
            f"TRL {peer['trl']} and PyTorch {peer['torch']}, {peer['threads']} threads, OMP_WAIT_POLICY "
            f"{record['omp_wait_policy']}, on the same arrays. The column TRL is its own `_compute_loss`, "
            "metrics included; its advantages are inline in the trainer and were written out. Plain PyTorch "
            f"has the formulas only, no metrics. Losses agree within {loss:.0e}, gradients within "
            f"{gradient:.0e} of their largest value. In brackets: times ours with metrics, by least times.", "",
        ]  # fmt: skip
    lines += [f"failed: {name}: {why}\n" for name, why in record.get("failed", {}).items()]
    lines += [
        f"| loss | ours | no metrics | {' | '.join(SIDES.values())} |",
        "|---|---|---|---|---|---|",
    ]
    for name in CONFIGS:
        cells = [name]
        for side in (*OURS, *SIDES):
            t = record["times"].get(f"{name}, {side}")
            ms = {key: 1e3 * t[f"{key}_s"] for key in ("median", "min", "max")} if t else {}
            cell = "{median:.1f} ({min:.1f} to {max:.1f})".format(**ms) if t else "-"
            ratio = t and t["min_s"] / record["times"][f"{name}, ours"]["min_s"]
            cells.append(f"{cell} [{ratio:.2f}]" if t and side != "ours" else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Runs every configuration on every side in turn, several rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peer-python", help="a Python that has torch, trl and numpy")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.rows % args.groups:
        parser.error(f"--rows {args.rows} must divide by --groups {args.groups}")
    arrays = inputs(args.rows, args.tokens, args.groups)
    compiled = {
        (name, side): update(config, args.groups, metrics).lower(*arrays).compile()
        for name, config in CONFIGS.items()
        for side, metrics in OURS.items()
    }
    sizes = ("rows", "tokens", "groups", "rounds")
    record = environment() | {name: getattr(args, name) for name in sizes}
    record["omp_wait_policy"] = os.environ.get("OMP_WAIT_POLICY", "unset")
    calls = {name: timed(run, arrays) for name, run in compiled.items()}
    with contextlib.ExitStack() as stack:
        if args.peer_python:
            peer = Peer(args.peer_python, PEER)
            stack.callback(peer.close)
            ours = {}
            for name in CONFIGS:
                (loss, _), gradient = compiled[name, "ours"](*arrays)
                ours[name] = float(loss), np.asarray(gradient)
            calls |= Theirs(peer, arrays, args.groups, ours, record).sides
        seconds = {name: [] for name in calls}
        for _ in range(args.rounds + 1):  # the first round warms up
            for name, call in calls.items():
                seconds[name].append(call())
    record["times"] = {", ".join(name): spread(times[1:]) for name, times in seconds.items()}
    publish(record, markdown(record), args.out, "rl")


if __name__ == "__main__":
    main()
