"""The page and the plot of a record of `diffusion_lm.py`."""

import math
from pathlib import Path

from benchmarks.machine import described
from benchmarks.sampler_plot import curves
from benchmarks.small_lm import mean_and_error

LENGTH = 64  # bytes a row


def grid(record: dict) -> tuple[list[str], list[str], list[int]]:
    """(model/nucleus pairs that wrote, samplers, numbers of calls), in order of appearance."""
    keys = [key.split("/") for key in record["written"]]
    unique = lambda found: list(dict.fromkeys(found))  # noqa: E731
    return (
        unique(f"{model}/{nucleus}" for model, _, nucleus, _ in keys),
        unique(sampler for _, sampler, _, _ in keys),
        sorted({int(calls) for *_, calls in keys}),
    )


def cell(record: dict, which: str, sampler: str, calls: int) -> dict | None:
    """What was found for a model and nucleus, a sampler and a number of calls."""
    model, nucleus = which.split("/")
    return record["written"].get(f"{model}/{sampler}/{nucleus}/{calls}")


def changes(r: dict, which: str, samplers: list[str], calls: list[int]) -> list[str]:
    """From the calls that are at least the length of a row to the most: change in log-perplexity."""
    known = lambda n: all(cell(r, which, sampler, n) for sampler in samplers)  # noqa: E731
    some = [n for n in calls if n >= LENGTH and known(n)]
    if len(some) < 2:
        return []
    lines = [
        f"Judge nats a byte, {some[-1]} calls less {some[0]}, and its standard error; at most calls less "
        "ancestral; rows are independent:",
        "",
    ]
    log = lambda c: (math.log(c["perplexity"]), c["error"] / c["perplexity"])  # noqa: E731
    base, base_error = log(cell(r, which, samplers[0], some[-1]))
    for sampler in samplers:
        (a, u), (b, v) = (log(cell(r, which, sampler, n)) for n in (some[0], some[-1]))
        lines.append(
            f"* {sampler}: {b - a:+.3f} ± {math.hypot(u, v):.3f}; {b - base:+.3f} ± "
            f"{math.hypot(v, base_error):.3f}"
        )
    return lines


def page(r: dict) -> str:
    """Markdown: bounds by objective, then perplexity and entropy by sampler and calls."""
    true, (models, samplers, calls) = r["held_out"], grid(r)
    size = "".join(f" {b['parameters']:,} parameters." for b in [*r["bounds"].values()][:1])
    least = min(c["rows"] for c in r["written"].values())
    lines = [
        f"# Diffusion language models on the embedded text, {r['date']}",
        "",
        f"{described(r)}. {r['steps']} steps of 32 x 64 bytes; the curricula cover the first half.{size}",
        "",
    ]
    if r["bounds"]:
        lines += ["| objective | held-out bound, nats a byte | seeds | each |", "|---|---|---|---|"]
    else:
        lines.append("Held-out bounds: not measured.")
    for name in dict.fromkeys(key.split("/")[0] for key in r["bounds"]):
        losses = [v["loss"] for k, v in r["bounds"].items() if k.split("/")[0] == name]
        mean, error = mean_and_error(losses)
        spare = f" ± {error:.3f}" if len(losses) > 1 else ""
        each = ", ".join(f"{x:.3f}" for x in losses)
        lines.append(f"| {name} | {mean:.3f}{spare} | {len(losses)} | {each} |")
    lines += [
        "",
        f"{least} rows of 64 bytes (a cell that says so has more) of the models of seed 0: perplexity a byte "
        f"under a decoder trained on the same text ({true['judge_loss']:.3f} nats on held-out rows of 256), "
        "its standard error, perplexity under a bigram model, unigram entropy in nats. The first 64 "
        f"held-out rows so long have {true['perplexity']:.1f} ± {true['error']:.1f}, "
        f"{true['bigram']:.1f} and {true['entropy']:.2f}.",
    ]
    for which in models:
        model, nucleus = which.split("/")
        lines += ["", f"## {model}, nucleus {nucleus}", ""]
        lines += [f"| sampler | {' | '.join(map(str, calls))} |", f"|---|{'---|' * len(calls)}"]
        for sampler in samplers:
            cells = []
            for n in calls:
                c = cell(r, which, sampler, n)
                more = f" ({c['rows']} rows)" if c and c["rows"] > least else ""
                cells.append("" if c is None else (
                    f"{c['perplexity']:.1f} ± {c['error']:.1f}; {c['bigram']:.1f}; {c['entropy']:.2f}{more}"
                ))  # fmt: skip
            lines.append(f"| {sampler} | {' | '.join(cells)} |")
        lines += ["", *changes(r, which, samplers, calls)]
    return "\n".join([*lines, ""])


def plot(record: dict, file: Path) -> None:
    """Judge perplexity and entropy against calls, a row of panels a model."""
    models, samplers, calls = grid(record)
    panels = {}
    for which in models:
        for what in ("perplexity", "entropy"):
            panels[f"{which.split('/')[0]}, nucleus {which.split('/')[1]}: {what}"] = {
                s: [(cell(record, which, s, n) or {}).get(what, float("nan")) for n in calls]
                for s in samplers
            }
    curves(calls, panels, "", file)
