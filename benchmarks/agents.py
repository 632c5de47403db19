"""SELAUR against GiGPO and GRPO on text-houses: success over iterations, with intervals over seeds.

    python benchmarks/agents.py

All arms and seeds are one vmapped program (`agents_network.py`); arms share warm starts, houses and keys,
so differences are paired. Writes agents_<platform>.json, .md and .png into --out.
"""  # fmt: skip

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import agents_network  # noqa: E402
from benchmarks.machine import described, environment, publish  # noqa: E402
from benchmarks.passk import plain, table  # noqa: E402
from jaxlab.envs.house import VERBS  # noqa: E402

MAIN = ("GRPO", "GiGPO", "SELAUR")


def interquartile_mean(x: np.ndarray) -> np.ndarray:
    """Mean of the middle half over the last axis, as rliable has it (arXiv 2108.13264)."""
    x = np.sort(x, -1)
    cut = x.shape[-1] // 4
    return x[..., cut : x.shape[-1] - cut].mean(-1)


def interval(x: np.ndarray, statistic=interquartile_mean, draws: int = 5000) -> list[float]:
    """[statistic, 2.5%, 97.5%] of values [seeds], by the bootstrap over seeds."""
    chance = np.random.default_rng(0)
    again = statistic(x[chance.integers(0, len(x), (draws, len(x)))])
    return [float(statistic(x)), *map(float, np.quantile(again, [0.025, 0.975]))]


def steps_to(curve: np.ndarray, level: float, every: int) -> np.ndarray:
    """Iterations until held-out success [seeds, evaluations] first reaches a level; NaN: never."""
    reached = curve >= level
    return np.where(reached.any(1), (reached.argmax(1) + 1.0) * every, np.nan)


def summary(record: dict, study: agents_network.Study) -> dict:
    """{arm: figures}: last is the mean of the last three evaluations, area that of all of them."""
    out = {}
    last = lambda x: x[:, -3:].mean(1)  # noqa: E731
    mean = lambda x: x.mean(-1)  # noqa: E731
    for name, arm in record["arms"].items():
        held = arm["held_out"]
        reach = steps_to(held, 0.5, study.eval_every)
        out[name] = {
            "last": interval(last(held)),
            "area": interval(held.mean(1)),
            "iterations to 50%": float(np.nanmedian(reach)) if np.isfinite(reach).any() else None,
            "seeds that reach 50%": int(np.isfinite(reach).sum()),
            "u of failures, first and last 10": [
                float(np.nanmean(arm["u_failed"][:, at])) for at in (slice(10), slice(-10, None))
            ],
            "gate open": float(arm["gate"].mean()),
            "first open": float(np.median(np.where(arm["gate"].any(1), arm["gate"].argmax(1), -1))),
            "anchor group": float(arm["anchor_group"].mean()),
            "tasks all failed": float(arm["all_failed"].mean()),
            "invalid": float(arm["invalid"][:, -10:].mean()),
        }
        for other in ("GiGPO", "GRPO"):
            base = record["arms"][other]["held_out"]
            pairs = {"last": last(held) - last(base), "area": held.mean(1) - base.mean(1)}
            out[name] |= {f"{k} minus {other}": interval(x, mean) for k, x in pairs.items()}
    return out


def verdict(pair: list[float], what: str) -> str:
    """What an interval of a paired difference says."""
    mean, low, high = pair
    if low > 0 or high < 0:
        return f"{what} {'higher' if low > 0 else 'lower'}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"
    return f"no difference in {what}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def markdown(r: dict) -> str:
    """The record as a page."""
    s, found = r["study"], r["summary"]
    triple = lambda x: f"{x[0]:.3f} [{x[1]:.3f}, {x[2]:.3f}]"  # noqa: E731
    rows = [
        [name, triple(a["last"]), triple(a["area"]), triple(a["last minus GiGPO"])]
        + [f"{a['iterations to 50%'] or float('nan'):.0f} ({a['seeds that reach 50%']})"]
        for name, a in found.items()
    ]
    lines = [
        f"# Agents in text-houses, {r['date']}",
        "",
        f"{described(r)}. {r['seeds']} seeds, {r['seconds']:.0f} s in all.",
        "",
        f"Houses of {s['house']['rooms']} rooms, {s['house']['receptacles']} receptacles, "
        f"{s['house']['objects']} objects; goals in {1 + s['house']['conditions']} conditions; "
        f"{s['horizon']} actions, of {r['actions']} pairs of verb and noun. A network of width "
        f"{s['width']}, warm-started by {s['warm']} supervised steps to {100 * r['start']:.0f}% "
        f"held-out success; {s['tasks']} houses x {s['samples']} episodes an iteration, "
        f"{r['iterations']} iterations, {s['epochs']} updates of Adam({s['lr']:g}) with PPO-clip 0.2 and "
        "0.01 KL (k3) each; mean_norm. Held-out success: "
        f"{s['eval_tasks']} other houses at temperature {s['eval_temperature']:g}.",
        "",
        "Interquartile mean over seeds with a 95% bootstrap interval; differences are paired by seed "
        "(mean). last: mean of the last three evaluations; area: of all of them; in brackets, seeds.",
        *table(["arm", "last", "area", "last minus GiGPO", "iterations to 50%"], rows),
    ]
    lines += [
        "What the figures say; the bootstrap of so few seeds is a little narrow, and nothing is corrected "
        f"for the {2 * len(found)} comparisons, so an interval that barely leaves 0 says little:",
        "",
    ]
    for name, other in [(name, "GiGPO") for name in found] + [("SELAUR", "GRPO")]:
        if name != other and name in found:
            said = [
                verdict(found[name][f"{what} minus {other}"], what) for what in ("last", "area")
            ]
            lines += [f"* {name} against {other}: {'; '.join(said)}."]
    rows = [
        [name, *(f"{x:.3f}" for x in a["u of failures, first and last 10"])]
        + [f"{a['gate open']:.2f}", f"{a['first open']:.0f}", f"{a['anchor group']:.2f}"]
        + [f"{a['tasks all failed']:.2f}", f"{a['invalid']:.3f}"]
        for name, a in found.items()
    ]
    header = ["arm", "u of failures, first 10", "last 10", "gate open", "first open at"]
    header += ["steps an anchor", "tasks all failed", "invalid, last 10"]
    lines += ["", "What was watched, means over seeds and iterations:", *table(header, rows)]
    return "\n".join(lines)


def plot(record: dict, study: agents_network.Study, file: Path) -> None:
    """Held-out success over iterations, interquartile means with 95% intervals over seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    arms = {name: np.asarray(arm["held_out"]) for name, arm in record["arms"].items()}
    others = [name for name in arms if name not in ("GRPO", "SELAUR")]
    for axis, names in zip(axes, (MAIN, others), strict=True):
        for i, (name, held) in enumerate(arms.items()):
            if name not in names:
                continue
            at = np.arange(1, held.shape[1] + 1) * study.eval_every
            bands = np.array([interval(column, draws=1000) for column in held.T])
            axis.plot(at, bands[:, 0], label=name, color=f"C{i}")
            axis.fill_between(at, bands[:, 1], bands[:, 2], alpha=0.15, color=f"C{i}")
        axis.set(xlabel="iterations", ylabel="held-out success", ylim=(0, 1))
        axis.legend(fontsize=8, loc="lower right")
        axis.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main() -> None:
    """Runs the study."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=agents_network.Study.iterations)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    study = agents_network.Study(iterations=args.iterations)
    begin = time.perf_counter()
    for record in agents_network.run(args.seeds, study):
        done = record["arms"]["GiGPO"]["success"].shape[1]
        seconds = time.perf_counter() - begin
        print(f"{done} iterations, {seconds:.0f} s", file=sys.stderr, flush=True)
        if done % 50 == 0:
            write(record, study, args.seeds, seconds, args.out)


def write(record: dict, study: agents_network.Study, seeds: int, seconds: float, out: Path) -> None:
    """JSON, page and plot."""
    arms = {
        name: {curve: plain(x) for curve, x in arm.items() if curve in ("held_out", "success")}
        for name, arm in record["arms"].items()
    }
    r = environment() | {
        "seeds": seeds,
        "seconds": seconds,
        "iterations": len(record["arms"]["GiGPO"]["success"][0]),
        "study": dataclasses.asdict(study),
        "actions": len(VERBS) * len(study.house.nouns),
        "start": float(record["start"].mean()),
        "summary": summary(record, study),
        "arms": arms,
    }
    publish(r, markdown(r), out, "agents")
    plot(record, study, out / f"agents_{jax.default_backend()}.png")


if __name__ == "__main__":
    main()
