"""A tiny language model on reasoning tasks: supervised, then GRPO, RLOO, DAPO, pass@k, protected pass@k.

    python benchmarks/rl_lm.py --seeds 3

Every run lies in --runs and goes on where it was cut off; a finished one is read, not run. Writes
rl_lm_<platform>.json and .md into --out. Pass@k is on held-out problems, the same for every arm of a seed.
"""  # fmt: skip

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, publish  # noqa: E402
from benchmarks.small_lm import mean_and_error  # noqa: E402
from configs import rl_reason, sft_reason  # noqa: E402
from jaxlab.rl import RLConfig  # noqa: E402
from models.decoder import DecoderConfig  # noqa: E402
from train import trainer  # noqa: E402
from train.metrics import read, series  # noqa: E402
from train.policy import Policy  # noqa: E402
from train.rollout.advantages import Advantage  # noqa: E402
from train.rollout.evaluate import Interference, PassAtK  # noqa: E402
from train.run import Run  # noqa: E402

MODEL = DecoderConfig(layers=2, d_model=96, heads=4, kv_heads=4, head_dim=24, mlp=256)
KS = (1, 4, 8)


def _passk(k: int, protect: float = 0.0) -> tuple:
    # The unbiased gradient of pass@k: whole answers, every row counts.
    loss = RLConfig(kind="pg", mode="seq_mean_token_sum", rows="all")
    return loss, Advantage("pkpo_wrloo", k), protect


ARMS = {
    "GRPO": (RLConfig(mode="seq_mean_token_mean"), Advantage("grpo"), 0.0),
    "RLOO": (RLConfig(kind="pg"), Advantage("rloo"), 0.0),
    "DAPO": (RLConfig(eps_high=0.28, dual_clip=10.0), Advantage("grpo", dynamic=True), 0.0),
    **{f"pass@{k}": _passk(k) for k in KS},
    "pass@8 protected": _passk(8, 0.9),
}


def supervised(args: argparse.Namespace, seed: int) -> Run:
    """The start of every arm."""
    return dataclasses.replace(
        sft_reason.run(), model=MODEL, steps=args.sft_steps, seed=seed, save_every=50,
        evaluators=(PassAtK(args.problems, 16, KS),),
    )  # fmt: skip


def reinforced(args: argparse.Namespace, seed: int, arm: str, start: Path) -> Run:
    """One arm, from the supervised run in `start`."""
    loss, advantage, protect = ARMS[arm]
    preset = rl_reason.run()
    return dataclasses.replace(
        preset, model=MODEL, steps=args.steps, seed=seed, start=str(start), eval_every=args.every,
        save_every=args.every, objective=Policy(loss),
        source=dataclasses.replace(preset.source, advantage=advantage, samples=args.samples),
        optimizer=dataclasses.replace(preset.optimizer, lr=args.lr, protect=protect),
        evaluators=(PassAtK(args.problems, 16, KS), Interference(16, 16, 8)),
    )  # fmt: skip


def finished(run: Run, folder: Path) -> list[dict]:
    """The evaluations of a run, which is trained to its end first."""
    rows = read(folder)
    if not any(r["kind"] == "stop" and r["step"] == run.steps for r in rows):
        outcome = trainer.fit(run, folder, quiet=True)
        if outcome.code:
            raise SystemExit(f"{folder} ended with code {outcome.code}")
        rows = read(folder)
    return [r for r in rows if r["kind"] == "eval"]


def record(arm: str, seed: int, evals: list[dict]) -> dict:
    """First and last pass@k of a run, and its interference averaged over the evaluations."""
    out: dict = {"arm": arm, "seed": seed}
    for k in KS:
        values = series(evals, "eval", f"valid/pass@{k}")[1]
        out |= {f"before@{k}": values[0], f"after@{k}": values[-1]}
    for name in ("crossfit", "same_samples", "negative_fraction", "critical_k"):
        values = series(evals, "eval", f"interference/{name}")[1]
        out |= {name: float(np.mean(values))} if values else {}
    tasks = [n for n in evals[-1] if n.startswith("valid/pass@1/")]
    return out | {n.removeprefix("valid/"): evals[-1][n] for n in tasks}


def table(records: list[dict]) -> list[list[str]]:
    """One line an arm: means over seeds, with 95% intervals where there are several."""
    lines = []
    for arm in dict.fromkeys(r["arm"] for r in records):
        mine = [r for r in records if r["arm"] == arm]
        cells = [arm, str(len(mine))]
        for name in [f"after@{k}" for k in KS] + ["crossfit", "negative_fraction"]:
            values = [r[name] for r in mine if name in r]
            mean, error = mean_and_error(values) if values else (float("nan"), 0.0)
            digits = ".2e" if name == "crossfit" else ".3f"
            interval = f" ± {1.96 * error:{digits}}" if len(values) > 1 else ""
            cells.append(f"{mean:{digits}}{interval}" if values else "")
        lines.append(cells)
    return lines


def main() -> None:
    """Trains what is missing, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (
        ("seeds", 3), ("sft-steps", 400), ("steps", 60), ("samples", 8), ("every", 20), ("problems", 64),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--runs", type=Path, default=Path("runs/rl_lm"))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    records = []
    for seed in range(args.seeds):
        start = args.runs / f"sft-{seed}"
        records.append(record("supervised", seed, finished(supervised(args, seed), start)))
        for arm in args.arms:
            folder = args.runs / f"{arm.replace(' ', '-')}-{seed}"
            run = reinforced(args, seed, arm, start)
            records.append(record(arm, seed, finished(run, folder)))
            print(records[-1], flush=True)
    publish_table(args, records)


def publish_table(args: argparse.Namespace, records: list[dict]) -> None:
    """JSON and Markdown of what there is."""
    head = ["arm", "seeds", *(f"pass@{k}" for k in KS), "crossfit <g_8, g_1>", "negative share"]
    rows = [head, ["---"] * len(head), *table(records)]
    text = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    result = environment() | {"settings": {k: str(v) for k, v in vars(args).items()}}
    page = f"# Reinforcement learning of a tiny language model\n\n{described(result)}.\n\n{text}\n"
    publish(result | {"records": records}, page, args.out, "rl_lm")


if __name__ == "__main__":
    main()
