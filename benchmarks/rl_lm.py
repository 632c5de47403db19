"""A tiny language model on reasoning tasks: supervised, then GRPO, RLOO, DAPO, pass@k, protected pass@k.

    python benchmarks/rl_lm.py --seeds 3

Every run lies in --runs and goes on where it was cut off; a finished one is read, not run. Writes
rl_lm_<platform>.json, .md and .png into --out after every run. Pass@k is on held-out problems, the same
for every arm of a seed.
"""  # fmt: skip

import argparse
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.rl_lm_page import KS, publish_page, record  # noqa: E402
from configs import rl_reason, sft_reason  # noqa: E402
from jaxlab.rl import RLConfig  # noqa: E402
from models.decoder import DecoderConfig  # noqa: E402
from train import trainer  # noqa: E402
from train.metrics import read  # noqa: E402
from train.policy import Policy  # noqa: E402
from train.rollout.advantages import Advantage  # noqa: E402
from train.rollout.evaluate import Interference, PassAtK  # noqa: E402
from train.run import Run  # noqa: E402

MODEL = DecoderConfig(layers=2, d_model=96, heads=4, kv_heads=4, head_dim=24, mlp=256)
TASKS = dict(
    tasks=(
        "chain_sum min_terms=2 max_terms=2 min_digits=1 max_digits=2",
        "spell_backward min_word_len=3 max_word_len=4",
        "lcm min_value=2 max_value=12",
    ),
    prompt=74, new=5,
)  # fmt: skip


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
    preset = sft_reason.run()
    return dataclasses.replace(
        preset, model=MODEL, steps=args.sft_steps, batch=64, seed=seed, save_every=50,
        source=dataclasses.replace(preset.source, **TASKS),
        optimizer=dataclasses.replace(preset.optimizer, lr=3e-3, warmup=50),
        evaluators=(PassAtK(args.problems, 16, KS),),
    )  # fmt: skip


def reinforced(args: argparse.Namespace, seed: int, arm: str, start: Path) -> Run:
    """One arm, from the supervised run in `start`."""
    loss, advantage, protect = ARMS[arm]
    preset = rl_reason.run()
    source = dataclasses.replace(
        preset.source, **TASKS, advantage=advantage, samples=args.samples
    )  # fmt: skip
    return dataclasses.replace(
        preset, model=MODEL, steps=args.steps, batch=args.batch, seed=seed, start=str(start),
        eval_every=args.every, save_every=args.every, objective=Policy(loss), source=source,
        optimizer=dataclasses.replace(preset.optimizer, lr=args.lr, protect=protect),
        evaluators=(PassAtK(args.problems, 16, KS), Interference(16, 16, 8)),
    )  # fmt: skip


def finished(run: Run, folder: Path) -> list[dict]:
    """The records of a run, which is trained to its end first."""
    rows = read(folder)
    if not any(r["kind"] == "stop" and r["step"] == run.steps for r in rows):
        outcome = trainer.fit(run, folder, quiet=True)
        if outcome.code:
            raise SystemExit(f"{folder} ended with code {outcome.code}")
        rows = read(folder)
    return rows


def main() -> None:
    """Trains what is missing, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (
        ("seeds", 3), ("sft-steps", 250), ("steps", 50), ("batch", 64), ("samples", 8), ("every", 25),
        ("problems", 96),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--lr", type=float, default=1e-4)
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
            publish_page(args, records)


if __name__ == "__main__":
    main()
