"""Masked and uniform diffusion trained on the embedded text, and how their samplers write.

    python benchmarks/diffusion_lm.py

MDLM, UDLM, Duo and Duo++ (k = 2) through the one trainer, three seeds each: held-out bounds. Then rows
written by five samplers with 16 to 1024 calls of the network: perplexity under an autoregressive judge
(the preset `demo`) and under a bigram model, with unigram entropy. What the JSON holds, or a checkpoint
under --work, is not done again. Writes diffusion_lm_<platform>.json, .md and .png into --out.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.diffusion_lm_page import page, plot  # noqa: E402
from benchmarks.machine import environment  # noqa: E402
from configs import demo, mdlm  # noqa: E402
from jaxlab.diffusion import sample, step_coefs, unigram_entropy  # noqa: E402
from models.dit import DiTConfig  # noqa: E402
from train import trainer  # noqa: E402
from train.checkpoint import Checkpoints  # noqa: E402
from train.data.bigram import fit_bigram  # noqa: E402
from train.denoise import Psi, denoiser, every_class  # noqa: E402
from train.diffusion import duo, duo_pp, udlm  # noqa: E402
from train.diffusion import mdlm as masked  # noqa: E402
from train.evaluate import HeldOut  # noqa: E402

SAMPLERS = {
    "ancestral": Psi(),
    "psi constant": Psi(low="constant-0.95"),
    "psi window": Psi(middle="constant-0.9", high_frac=0.5, middle_frac=0.4),
    "remdm": Psi(low="max-capped-0.02"),
    "greedy tail": Psi(removal="greedy"),
}


def experiment(objective, steps: int, seed: int):
    """The preset `mdlm` with a smaller network, shorter rows and another objective."""
    preset = mdlm.run()
    vocab = preset.model.vocab if objective.prior == "masked" else 256
    return dataclasses.replace(
        preset, model=DiTConfig(vocab=vocab, layers=3, d_model=96), objective=objective,
        source=dataclasses.replace(preset.source, seq_len=64), evaluators=(HeldOut(batches=0, passes=8),),
        steps=steps, seed=seed, eval_every=0, log_every=50, save_every=0,
    )  # fmt: skip


def trained(run, folder: Path):
    """(program, parameters, last evaluation) after training, which a checkpoint may hold already."""
    out = trainer.fit(run, folder, quiet=True)
    if out.code != trainer.DONE:
        raise RuntimeError(f"training in {folder} ended with code {out.code}")
    program = trainer.build(run.check(1), jax.devices()[:1])
    state = trainer.restore(program, Checkpoints(folder / "checkpoints", read_only=True)).state
    return program, state.ema or state.params, out.values


class Judges:
    """What is said of rows of tokens: perplexities, the error of a mean, entropy."""

    def __init__(self, folder: Path, seq_len: int):
        run = dataclasses.replace(demo.run(), evaluators=(HeldOut(batches=0),), eval_every=0)
        program, params, self.values = trained(run, folder)

        @jax.jit
        def losses(tokens):
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1] - 1), tokens[:, 1:].shape)
            logits = program.apply(params, tokens[:, :-1], positions, jnp.ones_like(positions))
            logs = jax.nn.log_softmax(logits.astype(jnp.float32))
            return -jnp.mean(jnp.take_along_axis(logs, tokens[:, 1:, None], -1)[..., 0], -1)

        self.losses = losses
        source = dataclasses.replace(run.source, seq_len=seq_len)
        rows = [source.make(64, seed=0, split=s) for s in ("train", "valid")]
        self.bigram = fit_bigram(*rows, 264)
        self.held_out = np.asarray(rows[1].batch_at(0)["tokens"])

    def __call__(self, tokens: np.ndarray) -> dict[str, float]:
        # A mask that is left over is no byte: the judge reads it as byte 0.
        nll = np.asarray(self.losses(np.where(tokens < 256, tokens, 0)))
        return {
            "perplexity": float(np.exp(nll.mean())),
            "error": float(np.exp(nll.mean()) * nll.std(ddof=1) / len(nll) ** 0.5),
            "bigram": float(np.exp(self.bigram(tokens[:, :-1], tokens[:, 1:]))),
            "entropy": float(jnp.mean(unigram_entropy(tokens, 264))),
        }


class Writer:
    """Rows written by a trained model; one compilation serves all samplers of a number of steps."""

    def __init__(self, program, params, rows: int):
        self.run, self.params = program.run, params
        shape, labels = (rows, self.run.source.seq_len), every_class(self.run, rows)

        def write(params, key, coefs, config):
            return sample(key, denoiser(program.apply, params), config, shape, coefs, labels)

        self.write = jax.jit(write, static_argnames="config")

    def __call__(self, psi: Psi, nucleus: float, nfe: int) -> np.ndarray:
        # The removal is a call too.
        psi = dataclasses.replace(psi, steps=nfe - 1, nucleus=nucleus)
        config = psi.of(self.run)
        plain = dataclasses.replace(config, psi=Psi().sampler(4, "uniform").psi)
        return np.asarray(self.write(self.params, jax.random.key(0), step_coefs(config), plain))


def main() -> None:
    """Trains and writes what is missing, saving after each piece."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="training steps of each model")
    parser.add_argument("--objectives", default="mdlm,udlm,duo,duo_pp", help="those that train")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--rows", type=int, default=32, help="rows a sampler writes; more replace fewer"
    )
    parser.add_argument("--models", default="mdlm,duo_pp", help="those that write")
    parser.add_argument("--nfe", default="16,32,64,128,256,512,1024", help="calls of the network")
    parser.add_argument("--samplers", default=",".join(SAMPLERS), help="some of the default")
    parser.add_argument("--nucleus", default="0.9", help="several: 0.9,1")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "diffusion_lm")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    half = options.steps // 2
    objectives = {"mdlm": masked(), "udlm": udlm(), "duo": duo(half), "duo_pp": duo_pp(half)}
    for name, known in (
        ("models", objectives),
        ("objectives", objectives),
        ("samplers", SAMPLERS),
    ):
        if unknown := set(getattr(options, name).split(",")) - set(known):
            parser.error(f"--{name}: {sorted(unknown)} must be of {list(known)}")
    file = options.out / f"diffusion_lm_{jax.default_backend()}.json"
    options.out.mkdir(parents=True, exist_ok=True)
    record = json.loads(file.read_text()) if file.exists() else {"bounds": {}, "written": {}}
    if record.get("steps", options.steps) != options.steps:
        parser.error(f"--steps={options.steps}: {file} is of {record['steps']}; use another --out")

    def note(part: str, name: str, found: dict) -> None:
        record[part][name] = found
        record.update(environment())
        file.write_text(json.dumps(record, indent=1) + "\n")
        print(name, json.dumps(found), flush=True)

    for seed in range(options.seeds):
        for name in options.objectives.split(","):
            if (key := f"{name}/{seed}") in record["bounds"]:
                continue
            run = experiment(objectives[name], options.steps, seed)
            begin = time.perf_counter()
            _, params, values = trained(run, options.work / f"{name}_{seed}")
            found = {"loss": values["valid/loss"], "seconds": time.perf_counter() - begin}
            size = sum(x.size for x in jax.tree.leaves(params))
            note("bounds", key, found | {"parameters": size})
    judges = Judges(options.work / "judge", 64)
    record["held_out"] = judges(judges.held_out) | {"judge_loss": judges.values["valid/loss"]}
    record["steps"] = options.steps
    for name in options.models.split(","):
        run = dataclasses.replace(experiment(objectives[name], options.steps, 0), evaluators=())
        writer = Writer(*trained(run, options.work / f"{name}_0")[:2], options.rows)
        for nucleus in map(float, options.nucleus.split(",")):
            for nfe in map(int, options.nfe.split(",")):
                for kind in options.samplers.split(","):
                    psi = SAMPLERS[kind]
                    key = f"{name}/{kind}/{nucleus:g}/{nfe}"
                    # A row does not depend on how many there are: more rows contain the fewer.
                    if record["written"].get(key, {}).get("rows", 0) >= options.rows:
                        continue
                    begin = time.perf_counter()
                    found = judges(writer(psi, nucleus, nfe)) | {"rows": options.rows}
                    note("written", key, found | {"seconds": time.perf_counter() - begin})
    file.with_suffix(".md").write_text(page(record))
    plot(record, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
