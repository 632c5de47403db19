"""Does training on pass@k cost pass@1, when, and does protection win it back: three studies.

    python benchmarks/passk.py

Two exact toys (`passk_exact.py`), and a small network trained from samples, all seeds of an arm in one
vmapped program (`passk_network.py`). Writes passk_<platform>.json, .md and .png into --out.
"""  # fmt: skip

import argparse
import sys
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import passk_exact, passk_network  # noqa: E402
from benchmarks.machine import described, environment, publish  # noqa: E402


def over(x, digits: int = 3) -> str:
    """Mean +- standard deviation over the leading axis."""
    return f"{np.mean(x):.{digits}f} ± {np.std(x, ddof=1):.{digits}f}"


def table(header: list[str], rows: list[list]) -> list[str]:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["", *(f"| {' | '.join(map(str, line))} |" for line in lines), ""]


def toy_page(r: dict) -> list[str]:
    """Sections of the two exact toys."""
    g = r["gaussian"]
    n = len(g["J_1"])
    order = lambda names: sorted(names, key=lambda x: (int(x[2:].split(",")[0]), x))  # noqa: E731
    first = [x for x in order(g["cosine"]) if x != "k=1"]
    rows = [["cosine", *(over(g["cosine"][k]) for k in first)]]
    rows += [["weight decades", *(over(g["weight_decades"][k], 1) for k in first)]]
    lines = [
        "## Gaussian features, exact",
        "",
        f"2000 prompts, 30% hard, float64; mean ± sd over {n} draws. At the start J_1 "
        f"{over(g['J_1'], 4)}, easy {over(g['easy'], 4)}, hard {over(g['hard'], 4)}, |grad J_1|² "
        f"{over(g['grad_j1_sq'], 6)}, share of prompts against the others "
        f"{over(g['negative_fraction'])}. k* = {over(g['critical_k'], 1)} "
        f"({int(np.min(g['critical_k']))} to {int(np.max(g['critical_k']))}). The allowed step at k = 16: "
        f"dJ_16 {np.mean(g['step']['dJ_16']):.1e}, dJ_1 {np.mean(g['step']['dJ_1']):.1e}; both signs in "
        f"{int(np.sum((g['step']['dJ_16'] > 0) & (g['step']['dJ_1'] < 0)))} of {n}.",
        *table(["<grad J_k, grad J_1>", *first], rows),
        "300 steps of gradient ascent on J_k:",
    ]
    change = [
        [name, over(t["J_1"]), over(t["J_8"]), over(t["J_1"] - t["start J_1"], 4)]
        + [int(np.sum(t["J_1"] < t["start J_1"]))]
        for name, t in ((name, g["trained"][name]) for name in order(g["trained"]))
    ]
    lines += table(["objective", "J_1", "J_8", "change of J_1", f"fell, of {n}"], change)
    lines += ["## Prompts that look alike, exact", "", "A share of 0.3 wants the other answer."]
    rows = [
        [k, f"{a['pi']:.4f} ({a['closed pi']:.4f})", f"{a['J_1']:.4f} ({a['closed J_1']:.4f})"]
        + [f"{a['J_k']:.4f}"]
        for k, a in r["aliased"].items()
    ]
    return lines + table(["k", "best pi (closed form)", "J_1 (closed form)", "J_k"], rows)


def won_back(r: dict) -> dict:
    """{arm: share of the lost J_1 won back [seeds] against both baselines, and the cost in J_8}."""
    last = {name: {m: x[:, -1] for m, x in arm.items()} for name, arm in r["arms"].items()}
    lost = last["k=8"]
    out = {}
    for name in (x for x in last if "," in x):
        gain = np.mean(last[name]["J_1"] - lost["J_1"])
        out[name] = {
            "of the loss to k=1": gain / np.mean(last["k=1"]["J_1"] - lost["J_1"]),
            "of the loss to base": gain / np.mean(r["base"]["J_1"] - lost["J_1"]),
            "points of J_8": 100 * np.mean(lost["J_8"] - last[name]["J_8"]),
        }
    return out


def network_page(r: dict) -> list[str]:
    """Section of the sampled study."""
    n, start = len(r["base"]["J_1"]), r["start"]
    fields = ("J_1", "J_8", "easy", "hard")
    rows = [["base", *(over(r["base"][f]) for f in fields)]]
    rows += [[name, *(over(arm[f][:, -1]) for f in fields)] for name, arm in r["arms"].items()]
    lines = [
        "## A small network, sampled",
        "",
        "1200 prompts, 128 x 16 samples a step, 400 steps of Adam(2e-3) from a supervised base; "
        f"mean ± sd over {n} seeds in one vmapped program an arm; J_1 and J_8 exact.",
        *table(["objective", *fields], rows),
        "Protection against k=8: share of the lost J_1 that comes back, of means over seeds, and its price.",
    ]
    rows = [
        [name, f"{b['of the loss to k=1']:.0%}", f"{b['of the loss to base']:.0%}"]
        + [f"{b['points of J_8']:.1f}"]
        for name, b in won_back(r).items()
    ]
    lines += table(["protection", "of the loss to k=1", "to base", "points of J_8"], rows)
    lines += [
        "Interference of the base policies. k* from the exact kernel: "
        f"{', '.join(str(int(x)) for x in start['critical_k'])} (by seed). Estimates of <grad J_k, grad J_1>: "
        f"{start['k=8']['same'].shape[1]} batches a seed, mean ± s.e. over all of them."
    ]
    rows = []
    for k in (x for x in start if x.startswith("k=")):
        s = start[k]
        within = lambda x: f"{x.mean():.2e} ± {x.std(ddof=1) / np.sqrt(x.size):.0e}"  # noqa: E731
        rows.append([k, over(s["cosine"]), f"{np.mean(s['inner_product']):.2e}"])
        rows[-1] += [within(s[name]) for name in ("crossfit", "halves", "same")]
    header = ["k", "cosine", "exact product", "other prompts", "other samples", "same samples"]
    return lines + table(header, rows)


def markdown(r: dict) -> str:
    """The record as a page."""
    lines = [f"# pass@k against pass@1, {r['date']}", "", f"{described(r)}.", ""]
    return "\n".join([*lines, *toy_page(r), *network_page(r["network"])])


def plot(r: dict, file: Path) -> None:
    """J_1 and J_8 over the steps of the sampled study, with a band of one sd over seeds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, field in zip(axes, ("J_1", "J_8"), strict=True):
        for name in (
            "k=1",
            "k=2",
            "k=4",
            "k=8",
            "k=8, exact, after Adam",
            "k=8, average, after Adam",
        ):
            curve = r["network"]["arms"][name][field]
            curve = np.concatenate([r["network"]["base"][field][:, None], curve], 1)
            steps = np.linspace(0, passk_network.Study().steps, curve.shape[1])
            mean, sd = curve.mean(0), curve.std(0, ddof=1)
            axis.plot(steps, mean, label=name)
            axis.fill_between(steps, mean - sd, mean + sd, alpha=0.2)
        axis.set(xlabel="steps", title="pass@1" if field == "J_1" else "pass@8")
    axes[1].legend(fontsize=8, loc="center right")
    figure.savefig(file, dpi=110)


def plain(x):
    """A tree of arrays as JSON: rounded lists, and keys that are strings."""
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if np.ndim(x) else float(f"{x:.6g}")


def write(studies: dict, out: Path) -> None:
    """JSON, page and plot of {"gaussian", "aliased", "network"}."""
    r = environment() | studies
    numbers = {name: plain(x) for name, x in studies.items()}
    numbers["network"]["won_back"] = plain(won_back(r["network"]))
    # Estimates of single batches are summed up on the page.
    for name, start in numbers["network"]["start"].items():
        if name.startswith("k="):
            start |= {x: plain(np.mean(start[x], 1)) for x in ("crossfit", "halves", "same")}
    publish(environment() | numbers, markdown(r), out, "passk")
    plot(r, out / f"passk_{jax.default_backend()}.png")


def main() -> None:
    """Runs the three studies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=20, help="of the Gaussian toy")
    parser.add_argument("--seeds", type=int, default=5, help="of the sampled study")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    studies = {
        "gaussian": passk_exact.gaussians(args.draws),
        "aliased": passk_exact.aliased(),
        "network": jax.tree.map(np.asarray, passk_network.run(args.seeds)),
    }
    write(studies, args.out)


if __name__ == "__main__":
    main()
