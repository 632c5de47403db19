"""Cost of the sparse curriculum and of a Psi-sampler step, in one run.

    python benchmarks/psi.py [--peer-python PATH_OF_A_PYTHON_WITH_TORCH]

Embeddings of relaxed tokens, dense against sparse, with temporary memory at two vocabularies; one
sampler step after the logits against posterior and Gumbel noise; compilations of a sweep over
kappa; with a peer, the plain formulas in PyTorch beside both. Rounds alternate, so that a busy machine
slows all alike. Writes psi_<platform>.json and .md into --out.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import described, environment, load, publish, spread  # noqa: E402
from benchmarks.peer import Peer  # noqa: E402
from jaxlab import diffusion as d  # noqa: E402

LEVEL = (0.98, 0.2, 1e-3)  # alpha, sigma, tau


def curricula(tokens: int, vocab: int, width: int, k: int) -> dict:
    """{name: compiled call of a key, its arguments, temporary bytes}: relaxed tokens to embeddings."""
    x0 = jax.random.randint(jax.random.key(0), (1, tokens), 0, vocab)
    table = jax.random.normal(jax.random.key(1), (vocab, width))

    def dense(key, x0, table):
        soft, z = d.dense_relaxation(key, x0, *LEVEL, vocab)
        return soft @ table, z

    def sparse(key, x0, table):
        ids, weights, z = d.sparse_relaxation(key, x0, *LEVEL, k, vocab)
        return d.mix_embeddings(table, ids, weights), z

    return {fn.__name__: compiled(fn, x0, table) for fn in (dense, sparse)}


def steps(tokens: int, vocab: int) -> dict:
    """The same for one step of the uniform sampler, from logits to tokens."""
    logits = 3 * jax.random.normal(jax.random.key(0), (1, tokens, vocab))
    z = jax.random.randint(jax.random.key(1), (1, tokens), 0, vocab)
    coef = jax.tree.map(lambda x: x[5], d.step_coefs(d.SamplerConfig(vocab, 10)))

    def gumbel(key, logits, z):
        p = jax.nn.softmax(logits, -1)
        law = d.psi_probs(p, z, coef.alpha_s, coef.alpha_t, coef.kappa, "uniform")
        return jax.random.categorical(key, jnp.log(law))

    def mixture(key, logits, z):
        return d.categorical_step(key, logits, z, coef)

    return {fn.__name__: compiled(fn, logits, z) for fn in (gumbel, mixture)}


def compiled(fn, *args) -> tuple:
    """(call that waits, temporary bytes)."""
    key = jax.random.key(2)
    run = jax.jit(fn).lower(key, *args).compile()
    memory = run.memory_analysis()
    temporary = 0 if memory is None else memory.temp_size_in_bytes
    return lambda: jax.block_until_ready(run(key, *args)), temporary


def measure(what: str, calls: dict, repeats: int, peer: Peer | None) -> dict:
    """Times in alternating rounds, the first of which warms up, and temporary bytes."""
    times = {name: [] for name in [*calls, *(["torch"] if peer else [])]}
    for rounds in range(repeats + 1):
        for name in times:
            begin = time.perf_counter()
            if name == "torch":
                seconds = peer.ask("time", what=what)
            else:
                calls[name][0]()
                seconds = time.perf_counter() - begin
            if rounds:
                times[name].append(seconds)
    memory = {name: {"temporary_bytes": temporary} for name, (_, temporary) in calls.items()}
    return {name: spread(x) | memory.get(name, {}) for name, x in times.items()}


def compilations(n: int) -> int:
    """How often a sampler is compiled for n schedules of kappa."""
    cfg = d.SamplerConfig(vocab=11, steps=16)
    run = jax.jit(
        lambda key, coefs: d.sample(
            key, lambda z, _: z[..., None] * jnp.ones(11), cfg, (2, 8), coefs
        )
    )
    for i in range(n):
        psi = d.PsiSpec(low=f"max-capped-{i / n}")
        run(jax.random.key(0), d.step_coefs(dataclasses.replace(cfg, psi=psi)))
    return run._cache_size()


def markdown(r: dict) -> str:
    """The record as a page."""
    lines = [
        f"# Psi-samplers and the sparse curriculum, {r['date']}",
        "",
        f"{r['tokens']} tokens, K = {r['vocab']}, width {r['width']}, float32; {described(r)}.",
        "",
        f"Least of {r['repeats']} alternating rounds in ms (median); temporary memory.",
        "",
        "| what | form | ms | MiB | times faster | times smaller |",
        "|---|---|---|---|---|---|",
    ]
    for what in ("curriculum", "step"):
        base = next(iter(r[what].values()))
        for form, row in r[what].items():
            ms = f"{1e3 * row['min_s']:.2f} ({1e3 * row['median_s']:.2f})"
            faster, mib, smaller = base["min_s"] / row["min_s"], "", ""
            if (own := row.get("temporary_bytes")) is not None:
                mib, smaller = f"{own / 2**20:.2f}", f"{base['temporary_bytes'] / max(own, 1):.1f}"
            lines.append(f"| {what} | {form} | {ms} | {mib} | {faster:.1f} | {smaller} |")
    small, large = (r["relaxation_temporary_bytes"][str(v)] for v in r["vocabularies"])
    lines += [
        "",
        f"Temporaries of the sparse relaxation: {small} bytes at K = {r['vocabularies'][0]}, {large} "
        f"at K = {r['vocabularies'][1]}. Compilations for {r['schedules']} schedules of kappa: "
        f"{r['compilations']}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timing rounds of each form")
    parser.add_argument("--peer-python", help="interpreter with torch, for the plain formulas")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats={options.repeats} must be at least 1")
    sizes = options.tokens, options.vocab, options.width
    vocabularies, schedules = [10**3, options.vocab], 8
    x0 = jnp.zeros((1, options.tokens), int)
    relaxed = {
        str(v): compiled(
            lambda key, x0, v=v: d.sparse_relaxation(key, x0, *LEVEL, options.k, v), x0
        )[1]
        for v in vocabularies
    }
    peer, torch = None, {}
    if options.peer_python:
        peer = Peer(options.peer_python, ROOT / "benchmarks" / "peers" / "psi_torch.py")
        coef = d.step_coefs(d.SamplerConfig(options.vocab, 10))
        alphas = float(coef.alpha_s[5]), float(coef.alpha_t[5])
        given = dict(zip(("tokens", "vocab", "width"), sizes, strict=True))
        torch = peer.ask("build", **given, level=LEVEL, alphas=alphas)
    rounds = options.repeats, peer
    record = (
        environment()
        | torch
        | {
            "tokens": options.tokens,
            "vocab": options.vocab,
            "width": options.width,
            "k": options.k,
            "repeats": options.repeats,
            "curriculum": measure("curriculum", curricula(*sizes, options.k), *rounds),
            "step": measure("step", steps(options.tokens, options.vocab), *rounds),
            "vocabularies": vocabularies,
            "relaxation_temporary_bytes": relaxed,
            "schedules": schedules,
            "compilations": compilations(schedules),
        }
    )
    record["load"] += load()
    if peer:
        peer.close()
    publish(record, markdown(record), options.out, "psi")


if __name__ == "__main__":
    main()
