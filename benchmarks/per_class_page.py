"""The page and the picture of benchmarks/per_class.py: tables, and which claims its figures bear out."""

from pathlib import Path

SOURCES = ("MC dropout", "ensemble", "Laplace")


def pm(pair, digits: int = 3) -> str:
    """Mean and half width of the interval."""
    return f"{pair[0]:.{digits}f}±{pair[1]:.{digits}f}"


def verdict(pairs, sign: int) -> str:
    """How many of the intervals lie wholly on the side of `sign`, and how many on the other."""
    with_it = sum(sign * mean - half > 0 for mean, half in pairs)
    against = sum(-sign * mean - half > 0 for mean, half in pairs)
    word = "yes" if with_it == len(pairs) else "no" if not with_it else "in part"
    return f"{word}: {with_it} of {len(pairs)} for, {against} against"


def claims(r: dict) -> list[tuple[str, str, str]]:
    """(claim, where it is from, what the figures say); an interval that holds 0 is neither."""
    against = lambda name: [r["paired"][s][f"c_critical_max - {name}"] for s in SOURCES]  # noqa: E731
    percent = lambda name: ", ".join(  # noqa: E731
        f"{100 * (r['deferral'][s]['ausc/c_critical_max'][0] / r['deferral'][s][f'ausc/{name}'][0] - 1):+.0f}%"
        for s in SOURCES
    )
    skew, ood, noise = r["skewness"], r["ood"], r["label_noise"]
    best = lambda one: "one critical: " * one + "cbec - c_critical_max"  # noqa: E731
    skewed = [v for v in skew.values() if v["reliable"][0] < 0.5]
    good = [v for v in skew.values() if v["reliable"][0] >= 0.5]
    return [
        ("max C of the critical classes defers better than MI", "paper, -35%",
         f"{verdict(against('mi'), -1)} ({percent('mi')})"),
        ("... than the variance of the critical classes", "paper, -56%",
         f"{verdict(against('var_critical_max'), -1)} ({percent('var_critical_max')})"),
        ("... than entropy", "paper's variational network; its MC dropout says the opposite",
         f"{verdict(against('entropy'), -1)} ({percent('entropy')})"),
        ("... than CBEC", "paper's variational network; its MC dropout and ensemble say the opposite",
         f"{verdict(against('cbec'), -1)} ({percent('cbec')})"),
        ("C is as good as the exact D", "ours", f"{verdict(against('d_critical_max'), -1)} (C better)"),
        ("... better than the plug-in risk, missed_critical_mass", "control, ours",
         verdict(against("missed_critical_mass"), -1)),
        ("sum C follows MI, Pearson above 0.95", "paper, 0.964 to 0.996",
         ", ".join(f"{s} {r['deferral'][s]['pearson'][0]:.3f}" for s in SOURCES)),
        ("CBEC is better than max C where few rho < 0.3 (below half)", "project page",
         verdict([v[best(False)] for v in skewed], -1) if skewed else "no such setting"),
        ("max C is better than CBEC where most rho < 0.3", "project page",
         verdict([v[best(False)] for v in good], 1) if good else "no such setting"),
        ("with one critical class CBEC is better", "notebooks",
         verdict([v[best(True)] for v in skew.values()], -1)),
        ("sum C detects better than MI", "paper",
         verdict([v["c_sum - mi"] for v in ood.values()], 1)),
        ("... with the ensemble alone", "paper",
         verdict([v["c_sum - mi"] for k, v in ood.items() if k.startswith("ens")], 1)),
        ("mean rho rises under shift", "paper",
         verdict([v["rho_out - rho_in"] for v in ood.values()], 1)),
        ("under label noise sum C is less entangled than MI", "paper, 19 of 20",
         verdict([v["|ratio c_sum| - |ratio mi|"] for v in noise.values()], -1)),
    ]  # fmt: skip


def markdown(r: dict, machine: str) -> str:
    """The record as a page."""
    lines = [
        f"# Per-class uncertainty, {r['date']}", "",
        f"{r['seeds']} seeds in {r['seconds']:.0f} s; {machine}.", "",
        "Mean over seeds ± half of the 95% interval (Student's t). Networks 64-64-64-K; MC dropout of 0.3, 30 "
        "passes; ensembles of 5; Laplace of the last layer, 30 draws.", "",
        "## Claims", "",
        "An interval of paired differences that does not hold 0 counts for or against; the rest is undecided. "
        "Percentages: MC dropout, ensemble, Laplace.", "",
        "| claim | from | here |", "|---|---|---|",
        *(f"| {a} | {b} | {c} |" for a, b, c in claims(r)), "",
        "## Deferral", "",
        f"Digits as four grades, {r['sizes'][0]} training and {r['sizes'][1]} test rows; 2 and 3 are critical. "
        "Area under the critical false-negative rate over coverage / the rate at 80% coverage / share of all "
        "critical rows that is deferred there. Lower areas are better.", "",
        "| score | " + " | ".join(SOURCES) + " |", "|---|---|---|---|",
    ]  # fmt: skip
    d = r["deferral"]
    for name in (k[5:] for k in d[SOURCES[0]] if k.startswith("ausc/")):
        cells = [
            f"{pm(d[s]['ausc/' + name])} / {d[s]['fnr80/' + name][0]:.3f} / "
            f"{d[s]['deferred80/' + name][0]:.2f}"
            for s in SOURCES
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name in ("accuracy", "pearson", "reliable"):
        lines.append(f"| *{name}* | " + " | ".join(pm(d[s][name]) for s in SOURCES) + " |")
    lines += [
        "", "## Skewness and CBEC", "",
        "Share of (row, critical class) with rho < 0.3; areas of CBEC, alone and less that of max C; below 0 "
        "CBEC is better. One critical class: grade 3 alone.", "",
        "| posterior | rho < 0.3 | Pearson | CBEC | CBEC - max C | one critical: CBEC | CBEC - max C |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, v in r["skewness"].items():
        cells = ("reliable", "pearson", "cbec", "cbec - c_critical_max", "one critical: cbec",
                 "one critical: cbec - c_critical_max")  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(pm(v[c]) for c in cells) + " |")
    lines += [
        "", "## Out of distribution", "",
        "AUROC; digits 0 to 7 are known. The last column: mean rho known, unknown.", "",
        "| posterior, unknown | MI | variance | sum C | 1 - max p | sum C - MI | rho |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, v in r["ood"].items():
        cells = [pm(v[k]) for k in ("mi", "eu_var", "c_sum", "msp", "c_sum - mi")]
        rho = f"{v['rho_in'][0]:.2f}, {v['rho_out'][0]:.2f}"
        lines.append(f"| {name.replace('/', ', ')} | " + " | ".join([*cells, rho]) + " |")
    lines += [
        "", "## Label noise", "",
        "Relative change from clean labels to a share of wrong ones. Ratio: change of the epistemic measure "
        "over that of E[H], at the largest share; a definition of ours, the paper's is not known to us.", "",
        "| posterior | measure | " + " | ".join(map(str, r["etas"][1:])) + " | ratio |",
        "|---|---|" + "---|" * len(r["etas"]),
    ]  # fmt: skip
    for source, v in r["label_noise"].items():
        for name in ("mi", "c_sum", "au"):
            ratio = pm(v[f"ratio {name}"]) if name != "au" else ""
            cells = " | ".join(pm(x, 2) for x in v[name])
            lines.append(f"| {source} | {name} | {cells} | {ratio} |")
    return "\n".join([*lines, ""])


def draw(r: dict, path: Path) -> None:
    """Areas of deferral by score and source, and changes under label noise."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = [k[5:] for k in r["deferral"][SOURCES[0]] if k.startswith("ausc/")]
    for i, source in enumerate(SOURCES):
        pairs = [r["deferral"][source][f"ausc/{n}"] for n in names]
        left.barh(
            [j + 0.27 * (i - 1) for j in range(len(names))], [p[0] for p in pairs], 0.25,
            xerr=[p[1] for p in pairs], label=source,
        )  # fmt: skip
    left.set_yticks(range(len(names)), names)
    left.invert_yaxis()
    left.set(xlabel="area under the critical false-negative rate (lower is better)")
    left.legend()
    for source, style in zip(SOURCES, ("-", "--", ":"), strict=True):
        for name, colour in (("mi", "#2b6cb0"), ("c_sum", "#c05621")):
            pairs = r["label_noise"][source][name]
            right.errorbar(
                r["etas"][1:], [p[0] for p in pairs], [p[1] for p in pairs], color=colour, ls=style,
                label=f"{source}, {name}", capsize=2,
            )  # fmt: skip
    right.axhline(0, color="#718096", lw=0.8)
    right.set(xlabel="share of wrong training labels", ylabel="relative change on clean test rows")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)
