"""Which claims about per-class epistemic uncertainty (arXiv 2602.21160) show on the digits of scikit-learn.

    python benchmarks/per_class.py

Deferral of critical classes, skewness, out-of-distribution detection and label noise: ten seeds, each with
its own split, noise and initialisation; all networks of a setting are trained in one vmapped program. Figures
are means over seeds with 95% intervals of Student's t; comparisons are paired by seed. Writes
per_class_<platform>.json, .md and .png into --out.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, load, publish  # noqa: E402
from benchmarks.per_class_page import draw, markdown  # noqa: E402
from jaxlab import uncertainty as un  # noqa: E402
from train.data.tabular import shipped  # noqa: E402

GRADES = np.array([0, 0, 0, 3, 0, 2, 0, 0, 3, 1])  # of each digit
SAFE, CRITICAL = (0, 1), (2, 3)
SCORES = ("entropy", "mi", "maxprob", "var_critical_max", "eu_var_critical", "ova_mi_critical",
          "c_critical_sum", "c_critical_max", "d_critical_max", "cbec", "c_critical_max_gated",
          "missed_critical_mass")  # fmt: skip
RATES = (0.1, 0.3, 0.5, 0.7)  # of dropout, in the study of skewness
ETAS = (0.0, 0.1, 0.2, 0.3, 0.4)


def graded(seed: int):
    """(train x, y, test x, y) of section 9.1: four imbalanced grades, noisy pixels; sizes do not vary."""
    x, digit = shipped("digits")
    y, random = GRADES[digit], np.random.default_rng(seed)
    x = x + 0.35 * random.standard_normal(x.shape).astype(np.float32)
    parts: tuple[list, list] = ([], [])
    for grade, few in enumerate(((None, None), (50, 60), (50, 60), (30, 40))):
        rows = random.permutation(np.flatnonzero(y == grade))
        cut = round(1097 / 1797 * len(rows))
        for part, chosen, most in zip(parts, (rows[:cut], rows[cut:]), few, strict=True):
            part.append(chosen[:most])
    # In random order: scores that tie are kept in the order of the data.
    train, test = (random.permutation(np.concatenate(p)) for p in parts)
    return x[train], y[train].astype(np.int32), x[test], y[test].astype(np.int32)


def shifted(seed: int, kinds: dict):
    """(train x, y, test x, y) of digits 0 to 7; `kinds` gets the inputs of each shift."""
    from sklearn.datasets import load_sample_images

    x, y = shipped("digits")
    random = np.random.default_rng(seed)
    inside = random.permutation(np.flatnonzero(y < 8))
    train, test = inside[:1000], inside[1000:]
    grey = [image.mean(-1) / 255 for image in load_sample_images().images]
    patches = []
    for _ in range(400):
        image = grey[random.integers(len(grey))]
        i, j = (random.integers(n - 8) for n in image.shape)
        patches.append(image[i : i + 8, j : j + 8].ravel())
    found = {
        "digits 8, 9": x[y >= 8][:350],
        "photographs": np.asarray(patches),
        "permuted pixels": random.permuted(x[test], axis=1),
        "uniform noise": random.random((400, 64)),
    }
    for name, value in found.items():
        kinds.setdefault(name, []).append(value.astype(np.float32))
    return x[train], y[train], x[test], y[test]


def init(key, classes: int):
    """A 64-64-64-classes network."""
    sizes = (64, 64, 64, classes)
    keys = jax.random.split(key, 3)
    draw = lambda k, a, b: jax.random.normal(k, (a, b)) * (2 / a) ** 0.5  # noqa: E731
    pairs = zip(keys, zip(sizes[:-1], sizes[1:], strict=True), strict=True)
    return [(draw(k, a, b), jnp.zeros(b)) for k, (a, b) in pairs]


def hidden(params, x, key, rate):
    """Features under dropout of `rate` on both layers, which may be traced: 0 leaves all."""
    for (w, b), k in zip(params[:-1], jax.random.split(key), strict=True):
        x = jax.nn.relu(x @ w + b)
        x = jnp.where(jax.random.uniform(k, x.shape) >= rate, x / (1 - rate), 0)
    return x


def logits(params, x, key, rate):
    """Of the classes."""
    return hidden(params, x, key, rate) @ params[-1][0] + params[-1][1]


def train(x, y, key, rate, classes: int, steps: int = 400):
    """Parameters after `steps` of AdamW on batches of 64."""
    tx = optax.adamw(2e-3, weight_decay=1e-4)
    params = init(key, classes)

    def step(carry, key):
        params, state = carry
        rows, mask = jax.random.split(key)
        rows = jax.random.randint(rows, (64,), 0, len(y))

        def loss(params):
            out = logits(params, x[rows], mask, rate)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(out, y[rows]))

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]


def dropout(x, y, tests, key, rate, classes: int, passes: int = 30):
    """[S, n, K] at each of `tests`, of MC dropout."""
    params = train(x, y, key, rate, classes)
    keys = jax.random.split(jax.random.fold_in(key, 2), passes)
    return [un.mc_predict(lambda p, x, k: logits(p, x, k, rate), params, t, keys) for t in tests]


def ensemble_and_laplace(x, y, tests, key, classes: int):
    """[5, n, K] of an ensemble, and [30, n, K] of the Laplace approximation of its first member's head."""
    stacked = jax.vmap(lambda k: train(x, y, k, 0.0, classes))(jax.random.split(key, 5))
    apply = lambda p, x: logits(p, x, key, 0.0)  # noqa: E731
    first = jax.tree.map(lambda a: a[0], stacked)
    features = lambda x: hidden(first, x, key, 0.0)  # noqa: E731
    post = un.laplace_last_layer_fit(features(x), *first[-1], prior_precision=1.0)
    draw = jax.random.fold_in(key, 2)
    return (
        [un.ensemble_predict(apply, stacked, t) for t in tests],
        [un.laplace_last_layer_sample(post, features(t), draw, 30) for t in tests],
    )


def posteriors(data, tests, classes: int, rate: float = 0.3) -> dict[str, list]:
    """{source: samples [seeds, S, n, K] at each of `tests`}; every network of a source in one program."""
    x, y = (jnp.asarray(np.stack(part)) for part in list(zip(*data, strict=True))[:2])
    tests = [jnp.asarray(np.stack(t)) for t in tests]
    keys = jax.random.split(jax.random.key(0), len(x))
    run = lambda f: jax.jit(jax.vmap(f))(x, y, tests, keys)  # noqa: E731
    of_dropout = run(lambda x, y, t, k: dropout(x, y, t, k, rate, classes))
    members, laplace = run(partial(ensemble_and_laplace, classes=classes))
    return {"MC dropout": of_dropout, "ensemble": members, "Laplace": laplace}


def deferral(p, y, safe=SAFE, critical=CRITICAL) -> dict[str, np.ndarray]:
    """Every figure of deferral by seed, [seeds], from samples [seeds, S, n, K]."""

    def one(p, y):
        m = un.moments(p)
        yhat, scores = jnp.argmax(m.mean, -1), un.critical_scores(p, safe, critical)
        found = {"accuracy": jnp.mean(yhat == y)}
        for name in SCORES:
            found[f"ausc/{name}"] = un.ausc(y, yhat, scores[name], critical)
            curve = un.selective_curve(y, yhat, scores[name], critical, (0.8,), num_classes=4)
            found[f"fnr80/{name}"] = curve.critical_fnr[0]
            found[f"deferred80/{name}"] = curve.deferred_critical[0]
        rho = un.skewness_ratio(m.mean, m.var, m.m3)[:, jnp.asarray(critical)]
        found["rho"] = jnp.mean(rho)
        found["reliable"] = jnp.mean(un.reliable_mask(rho))
        found["pearson"] = jnp.corrcoef(scores["c_sum"], scores["mi"])[0, 1]
        return found

    return {k: np.asarray(v) for k, v in jax.jit(jax.vmap(one))(p, y).items()}


def detection(inside, outside) -> dict[str, np.ndarray]:
    """AUROC of each score by seed, and the skewness of either side."""

    def scores(p):
        m = un.moments(p)
        c, d = un.contributions_from_moments(m).sum(-1), un.mutual_information(p)
        rho = jnp.mean(un.skewness_ratio(m.mean, m.var, m.m3))
        return {"mi": d, "eu_var": m.var.sum(-1), "c_sum": c, "msp": 1 - m.mean.max(-1)}, rho

    def one(a, b):
        (sa, rho_in), (sb, rho_out) = scores(a), scores(b)
        positive = jnp.concatenate([jnp.zeros(a.shape[1]), jnp.ones(b.shape[1])])
        found = {k: un.auroc(jnp.concatenate([sa[k], sb[k]]), positive) for k in sa}
        return found | {"rho_in": rho_in, "rho_out": rho_out}

    return {k: np.asarray(v) for k, v in jax.jit(jax.vmap(one))(inside, outside).items()}


def label_noise(seeds: int) -> dict[str, dict]:
    """Relative change of MI, sum of C and E[H], by source and share of wrong labels, [seeds]."""
    data = [shifted(s, {}) for s in range(seeds)]
    levels: dict = {}
    for eta in ETAS:
        wrong = []
        for seed, (x, y, *_) in enumerate(data):
            random = np.random.default_rng([seed, 1])
            flip = random.random(len(y)) < eta
            wrong.append((x, np.where(flip, (y + random.integers(1, 8, len(y))) % 8, y)))
        for source, (p,) in posteriors(wrong, [[d[2] for d in data]], 8).items():
            means = jax.jit(jax.vmap(lambda p: {
                "mi": un.mutual_information(p).mean(), "c_sum": un.contributions(p).sum(-1).mean(),
                "au": un.expected_entropy(p).mean(),
            }))(p)  # fmt: skip
            levels.setdefault(source, []).append({k: np.asarray(v) for k, v in means.items()})
    return {
        source: {
            name: [row[name] / rows[0][name] - 1 for row in rows[1:]] for name in rows[0]
        }
        for source, rows in levels.items()
    }  # fmt: skip


def interval(values) -> list[float]:
    """[mean, half width of the 95% interval of Student's t] over seeds."""
    values = np.asarray(values, np.float64)
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return [float(values.mean()), float(half)]


def paired(rows: dict, a: str, b: str) -> list[float]:
    """`interval` of a - b by seed."""
    return interval(rows[a] - rows[b])


def measure(seeds: int) -> dict:
    """Every figure of the record."""
    data = [graded(s) for s in range(seeds)]
    tests, y = [[d[2] for d in data]], jnp.asarray(np.stack([d[3] for d in data]))
    found: dict = {"sizes": [len(data[0][1]), len(data[0][3])], "deferral": {}, "skewness": {}}
    differences: dict = {}
    summary = lambda rows: {k: interval(v) for k, v in rows.items()}  # noqa: E731
    x, labels = (jnp.asarray(np.stack(part)) for part in list(zip(*data, strict=True))[:2])
    keys = jax.random.split(jax.random.key(0), seeds)
    sources = {k: v[0] for k, v in posteriors(data, tests, 4).items()}
    # The rate of dropout is traced: one program serves all of them.
    program = jax.jit(jax.vmap(
        lambda x, y, t, k, r: dropout(x, y, [t], k, r, 4)[0], (0, 0, 0, 0, None)
    ))  # fmt: skip
    skewed = {
        f"MC dropout {r}": program(x, labels, jnp.asarray(np.stack(tests[0])), keys, r)
        for r in RATES
    }
    skewed |= {name: sources[name] for name in ("ensemble", "Laplace")}
    for name, p in sources.items():
        rows = deferral(p, y)
        found["deferral"][name] = summary(rows)
        differences[name] = {
            f"c_critical_max - {b}": paired(rows, "ausc/c_critical_max", f"ausc/{b}")
            for b in ("mi", "var_critical_max", "entropy", "cbec", "d_critical_max",
                      "missed_critical_mass")
        }  # fmt: skip
    for name, p in skewed.items():
        several = deferral(p, y)
        single = deferral(p, y, (0, 1, 2), (3,))
        found["skewness"][name] = {
            "rho": interval(several["rho"]), "reliable": interval(several["reliable"]),
            "pearson": interval(several["pearson"]),
            "cbec": interval(several["ausc/cbec"]),
            "cbec - c_critical_max": paired(several, "ausc/cbec", "ausc/c_critical_max"),
            "one critical: cbec": interval(single["ausc/cbec"]),
            "one critical: cbec - c_critical_max": paired(
                single, "ausc/cbec", "ausc/c_critical_max"
            ),
        }  # fmt: skip
    found["paired"] = differences
    kinds: dict = {}
    data = [shifted(s, kinds) for s in range(seeds)]
    found["ood"] = {}
    for source, (inside, *outside) in posteriors(
        data, [[d[2] for d in data], *kinds.values()], 8
    ).items():
        for kind, p in zip(kinds, outside, strict=True):
            rows = detection(inside, p)
            found["ood"][f"{source}/{kind}"] = summary(rows) | {
                "c_sum - mi": paired(rows, "c_sum", "mi"),
                "rho_out - rho_in": paired(rows, "rho_out", "rho_in"),
            }
    found["label_noise"] = {}
    for source, changes in label_noise(seeds).items():
        found["label_noise"][source] = {
            k: [interval(v) for v in values] for k, values in changes.items()
        } | {
            f"ratio {k}": interval(changes[k][-1] / changes["au"][-1]) for k in ("mi", "c_sum")
        } | {
            "|ratio c_sum| - |ratio mi|": interval(
                np.abs(changes["c_sum"][-1] / changes["au"][-1])
                - np.abs(changes["mi"][-1] / changes["au"][-1])
            )
        }  # fmt: skip
    return found


def main() -> None:
    """Parses the command line, measures, writes, draws and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="at least 2")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error(f"--seeds {options.seeds} must be at least 2")
    begin = time.perf_counter()
    record = environment() | {"seeds": options.seeds} | measure(options.seeds)
    record |= {"seconds": time.perf_counter() - begin, "etas": ETAS, "rates": RATES}
    record["load"] += load()
    publish(record, markdown(record, described(record)), options.out, "per_class")
    draw(record, options.out / f"per_class_{jax.default_backend()}.png")


if __name__ == "__main__":
    main()
