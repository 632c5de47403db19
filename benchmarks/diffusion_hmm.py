"""Error of Psi-samplers apart from that of a model: a hidden Markov source whose denoiser is exact.

    python benchmarks/diffusion_hmm.py

Rows written with 8 to 256 calls of the exact denoiser, and of one that errs at high noise (half of its
guess is then another law), by five samplers and both priors: the KL divergence of the law of neighbouring
tokens from that of the source, and the mean log-probability of a token under the source less that of true
rows. Writes diffusion_hmm_<platform>.json, .md and .png into --out.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, publish  # noqa: E402
from benchmarks.sampler_plot import curves  # noqa: E402
from jaxlab import diffusion as d  # noqa: E402

HIDDEN, VOCAB = 4, 8
SAMPLERS = {
    "ancestral": d.PsiSpec(),
    "psi constant": d.PsiSpec(low="constant-0.95"),
    "psi window": d.PsiSpec(middle="constant-0.9", high_frac=0.5, middle_frac=0.4),
    "remdm": d.PsiSpec(low="max-capped-0.02"),
    "greedy tail": d.PsiSpec(),
}


def source() -> d.HMM:
    """A chain that stays in a state for a while, with a few likely tokens in each."""
    random = np.random.default_rng(0)
    stay = 0.8 * np.eye(HIDDEN) + 0.2 * random.dirichlet(np.ones(HIDDEN), HIDDEN)
    return d.HMM(np.full(HIDDEN, 1 / HIDDEN), stay, random.dirichlet(np.full(VOCAB, 0.3), HIDDEN))


def erring(denoise):
    """The same, but where alpha < 0.5 half of the guess is a law that depends on z and the position."""

    def wrong(z, sigma):
        logits = denoise(z, sigma)
        number = jnp.arange(VOCAB) + (z + jnp.roll(z, 1, 1) + jnp.arange(z.shape[1]))[..., None]
        other = 1.0 + number % 3
        p = jax.nn.softmax(logits, -1)
        half = p.at[..., :VOCAB].set(
            (p[..., :VOCAB] + other / jnp.sum(other, -1, keepdims=True)) / 2
        )
        return jnp.where((sigma > np.log(2))[:, None, None], jnp.log(half), logits)

    return wrong


def divergence(counts: np.ndarray, law: np.ndarray) -> float:
    """KL(law of neighbours found || true) in nats, less the bias of a count of this size."""
    found = counts / counts.sum()
    some = found > 0
    bias = (some.sum() - 1) / (2 * counts.sum())
    return float(np.sum(found[some] * np.log(found[some] / law[some])) - bias)


def divergence_of_rows(x: np.ndarray, law: np.ndarray) -> tuple[float, float]:
    """The divergence of all rows, and its standard error from 8 groups of them."""
    groups = [divergence(neighbours(part), law) for part in np.array_split(x, 8)]
    return divergence(neighbours(x), law), float(np.std(groups, ddof=1) / 8**0.5)


def neighbours(x: np.ndarray) -> np.ndarray:
    """Counts [v, v] of neighbouring tokens."""
    return np.bincount((x[:, :-1] * VOCAB + x[:, 1:]).ravel(), minlength=VOCAB**2).reshape(
        VOCAB, VOCAB
    )


def true_neighbours(hmm: d.HMM, length: int) -> np.ndarray:
    """Their law, averaged over the places of a row."""
    state, total = hmm.initial, 0
    for _ in range(length - 1):
        total = total + hmm.emission.T @ (state[:, None] * hmm.transition) @ hmm.emission
        state = state @ hmm.transition
    return total / (length - 1)


def drawer(denoise, plain: d.SamplerConfig, removal: str, shape):
    """Compiled call of a key and the coefficients of a sampler."""
    cfg = dataclasses.replace(plain, removal=removal)
    return jax.jit(lambda key, coefs: d.sample(key, denoise, cfg, shape, coefs))


def true_rows(hmm: d.HMM, rows: int, length: int) -> dict:
    """What rows of the source itself are given: neighbours in one row are no independent pairs."""
    x = np.asarray(d.hmm_sample(jax.random.key(1), hmm, (20 * rows, length)))
    law = true_neighbours(hmm, length)
    kl = [divergence(neighbours(part), law) for part in np.split(x, 20)]
    logs = np.asarray(d.hmm_log_prob(hmm, x)) / length
    return {"log_prob": float(logs.mean()), "kl": float(np.mean(kl)), "kl_sd": float(np.std(kl))}


def measure(options) -> dict:
    """{prior/denoiser/sampler/calls: what is found}."""
    hmm, shape = source(), (options.rows, options.length)
    law = true_neighbours(hmm, options.length)
    score = jax.jit(lambda x: d.hmm_log_prob(hmm, x) / options.length)
    found = {"true rows": true_rows(hmm, options.rows, options.length)}
    for prior in ("uniform", "masked"):
        mask = VOCAB if prior == "masked" else None
        exact = d.hmm_denoiser(hmm, prior, mask)
        for kind, denoise in (("exact", exact), ("erring", erring(exact))):
            for calls in map(int, options.nfe.split(",")):
                plain = d.SamplerConfig(
                    VOCAB + (mask is not None), calls - 1, prior, mask, time_conditioning=True
                )
                draws = {r: drawer(denoise, plain, r, shape) for r in ("ancestral", "greedy")}
                for name, spec in SAMPLERS.items():
                    draw = draws["greedy" if name == "greedy tail" else "ancestral"]
                    coefs = d.step_coefs(dataclasses.replace(plain, psi=spec))
                    x = np.asarray(draw(jax.random.key(0), coefs))
                    logs = np.asarray(score(x))
                    kl, kl_error = divergence_of_rows(x, law)
                    found[f"{prior}/{kind}/{name}/{calls}"] = {
                        "kl": kl,
                        "kl_error": kl_error,
                        "log_prob": float(logs.mean()),
                        "error": float(logs.std() / len(logs) ** 0.5),
                    }
                print(prior, kind, calls, flush=True)
    return found


def markdown(r: dict) -> str:
    """The record as a page."""
    found, calls = r["found"], r["nfe"].split(",")
    # The fewest calls that a row has a token for, and the most.
    few, most = (
        min((n for n in calls if int(n) >= r["length"]), default=calls[0], key=int),
        calls[-1],
    )
    own = found["true rows"]
    true = own["log_prob"]
    lines = [
        f"# Samplers with a known denoiser, {r['date']}",
        "",
        f"{HIDDEN} hidden states, {VOCAB} tokens, {r['rows']} rows of {r['length']}; {described(r)}.",
        "",
        f"A cell: KL of the law of neighbouring tokens, in 1e-3 nats (bias of counts removed), and its "
        f"standard error from 8 groups of rows, which is too large near 0; log p of a token under the source "
        f"less that of true rows ({true:.4f}), in 1e-3 nats, standard error up to "
        f"{1e3 * max(v.get('error', 0) for v in found.values()):.0f}. Only KL is 0 exactly for the law itself: "
        f"text that is too probable has a positive difference. 20 sets of as many rows of the source have KL "
        f"{1e3 * own['kl']:.1f} with a deviation of {1e3 * own['kl_sd']:.1f}: less cannot be seen. The last "
        f"column is the change of KL from {few} to {most} calls, and its standard error; rows are independent.",
        "",
        f"| prior | denoiser | sampler | {' | '.join(calls)} | {most} less {few} |",
        f"|---|---|---|{'---|' * (len(calls) + 1)}",
    ]
    for prior in ("uniform", "masked"):
        for kind in ("exact", "erring"):
            for name in SAMPLERS:
                row = {n: found[f"{prior}/{kind}/{name}/{n}"] for n in calls}
                cells = [
                    f"{1e3 * x['kl']:.1f} ± {1e3 * x['kl_error']:.1f}; {1e3 * (x['log_prob'] - true):+.0f}"
                    for x in row.values()
                ]
                change = 1e3 * (row[most]["kl"] - row[few]["kl"])
                error = 1e3 * np.hypot(row[most]["kl_error"], row[few]["kl_error"])
                cells.append(f"{change:+.1f} ± {error:.1f}")
                lines.append(f"| {prior} | {kind} | {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Parses the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--nfe", default="8,16,32,64,128,256", help="calls of the denoiser")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    record = environment() | {"rows": options.rows, "length": options.length, "nfe": options.nfe}
    record["found"] = measure(options)
    publish(record, markdown(record), options.out, "diffusion_hmm")
    calls = list(map(int, options.nfe.split(",")))
    panels = {
        f"{prior}, {kind} denoiser": {
            # Less than the standard error is noise.
            name: [max(record["found"][f"{prior}/{kind}/{name}/{n}"]["kl"], 1e-3) for n in calls]
            for name in SAMPLERS
        }
        for kind in ("exact", "erring")
        for prior in ("uniform", "masked")
    }
    file = options.out / f"diffusion_hmm_{jax.default_backend()}.png"
    curves(calls, panels, "KL of neighbouring tokens, at least 1e-3", file)


if __name__ == "__main__":
    main()
