"""Time of an RL update's own arithmetic: group advantages, the loss and its gradient in the log-probabilities.

    python benchmarks/rl.py

The model is left out. Writes rl_<platform>.json and .md into --out; the baseline of a row is the plain
policy gradient, which reads the same arrays.
"""  # fmt: skip

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, publish, spread  # noqa: E402
from jaxlab import rl  # noqa: E402

CONFIGS = {
    "pg": rl.RLConfig(kind="pg"),
    "GRPO": rl.RLConfig(mode="seq_mean_token_mean", kl_coef=0.04),
    "DAPO": rl.RLConfig(eps_high=0.28, dual_clip=10.0),
    "GSPO": rl.RLConfig(ratio_level="sequence_token_grad", eps_low=3e-4, eps_high=4e-4),
    "CISPO": rl.RLConfig(kind="cispo"),
    "SAPO": rl.RLConfig(kind="sapo"),
    "GMPO": rl.RLConfig(kind="gmpo", mode="seq_mean_token_mean"),
}


def update(config: rl.RLConfig, groups: int):
    """Jitted (logp, batch, rewards, group) -> loss, gradient and metrics."""

    def run(logp, batch, rewards, group):
        batch = batch | {"adv": rl.group_advantage(rewards, group, groups)}
        return jax.value_and_grad(rl.rl_loss, has_aux=True)(logp, batch, config)

    return jax.jit(run)


def inputs(rows: int, tokens: int, groups: int) -> tuple:
    """Log-probabilities of four policies, a ragged mask, rewards and groups."""
    keys = jax.random.split(jax.random.key(0), 6)
    logp = -jax.random.exponential(keys[0], (rows, tokens))
    near = [logp + 0.1 * jax.random.normal(k, logp.shape) for k in keys[1:3]]
    lengths = jax.random.randint(keys[3], (rows, 1), 1, tokens + 1)
    batch = dict(logp_old=near[0], logp_ref=near[1], mask=jnp.arange(tokens) < lengths)
    rewards = jax.random.bernoulli(keys[4], 0.3, (rows,)).astype(jnp.float32)
    return logp, batch, rewards, jnp.arange(rows) % groups


def main() -> None:
    """Runs every configuration in turn, several rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--groups", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    arrays = inputs(args.rows, args.tokens, args.groups)
    compiled = {
        name: update(config, args.groups).lower(*arrays).compile()
        for name, config in CONFIGS.items()
    }
    seconds = {name: [] for name in CONFIGS}
    for _ in range(args.rounds + 1):  # the first round warms up
        for name, run in compiled.items():
            begin = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            seconds[name].append(time.perf_counter() - begin)
    record = environment() | {name: getattr(args, name) for name in ("rows", "tokens", "groups")}
    record["times"] = {name: spread(times[1:]) for name, times in seconds.items()}
    base = record["times"]["pg"]["median_s"]
    lines = [
        f"# RL update without its model, {record['date']}", "",
        f"{described(record)}. {args.rows} rows of {args.tokens} tokens in {args.groups} groups, float32: "
        "advantages, loss, gradient and metrics in one jitted call.",
        "", "| loss | median ms | min to max | times pg |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, t in record["times"].items():
        ms = {key: 1e3 * t[f"{key}_s"] for key in ("median", "min", "max")}
        lines.append(
            f"| {name} | {ms['median']:.1f} | {ms['min']:.1f} to {ms['max']:.1f} "
            f"| {t['median_s'] / base:.2f} |"
        )
    publish(record, "\n".join([*lines, ""]), args.out, "rl")


if __name__ == "__main__":
    main()
