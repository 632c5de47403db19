"""Rollouts: this project's sampler against `transformers.generate`, and where a step of RL spends its time.

    python benchmarks/rollout.py --peer-python PATH_OF_A_PYTHON_WITH_TRANSFORMERS

Both sides draw `--samples` answers of `--new` tokens to each prompt at temperature 1 from the same weights;
their greedy tokens must be identical before anything is timed. Rounds alternate. A step is that of
`rl_lm.py` (GRPO): generation alone, the sampler (generation, log-probabilities, verification), the
optimiser's step. Without --peer-python only this side is measured. Writes rollout_<platform>.json and .md.
"""  # fmt: skip

import argparse
import contextlib
import dataclasses
import functools
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import rl_lm  # noqa: E402
from benchmarks.generate import MODEL  # noqa: E402
from benchmarks.machine import described, environment, publish, spread  # noqa: E402
from benchmarks.peer import Peer  # noqa: E402
from jaxlab.sampling import GREEDY, PLAIN  # noqa: E402
from models.generate import generate  # noqa: E402
from train import trainer  # noqa: E402
from train.evaluate import Scene  # noqa: E402
from train.state import init_params  # noqa: E402

PEER = Path(__file__).parent / "peers" / "generate_transformers.py"
MODELS = {"tiny": rl_lm.MODEL, "0.1 B": MODEL}
CACHES = ("dynamic", "static")


def seconds(call, *args) -> float:
    """Wall time of a call and of what it returns."""
    begin = time.perf_counter()
    jax.block_until_ready(call(*args))
    return time.perf_counter() - begin


def sides(name: str, options, stack: contextlib.ExitStack, prompts) -> tuple[dict, dict]:
    """({side: call that returns its seconds}, what the peer is) of one model; greedy tokens agree."""
    config = MODELS[name]
    module = config.build(jax.default_backend())
    inputs = (jax.ShapeDtypeStruct((1, 8), jnp.int32),)
    params = jax.jit(lambda: init_params(module, jax.random.key(0), inputs))()
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    run = lambda **how: functools.partial(  # noqa: E731
        jax.jit(functools.partial(generate, module, new=options.new, **how)),
        params,
        prompts,
        lengths,
    )
    draw = run(samples=options.samples, sampling=PLAIN)
    found: dict[str, Any] = {"ours": lambda: seconds(draw, jax.random.key(1))}
    if not options.peer_python:
        return found, {}
    peer = Peer(options.peer_python, PEER)
    stack.callback(peer.close)
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "weights.npz"
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    np.savez(file, **{key: np.asarray(x, np.float32) for key, x in flat.items()})
    about = peer.ask("build", npz=str(file), sizes=dataclasses.asdict(config))
    greedy = np.asarray(run(sampling=GREEDY)(jax.random.key(0)).tokens[:, 0]).tolist()
    asked = {"prompts": prompts.tolist(), "new": options.new}
    if peer.ask("tokens", side="static cache", **asked) != greedy:
        raise ValueError(f"{name}: transformers does not continue as this side does: {about}")

    def theirs(cache: str) -> float:
        answer = peer.ask("time_samples", samples=options.samples, cache=cache, **asked)
        if isinstance(answer, dict):
            raise RuntimeError(f"the peer, {cache} cache: {answer['error']}")
        return answer

    for cache in CACHES:
        found[f"transformers, {cache} cache"] = functools.partial(theirs, cache)
    return found, about


def throughput(options, record: dict) -> None:
    """Seconds of every side, models in turn, rounds alternating."""
    rng = np.random.default_rng(0)
    for name in options.models:
        shape = (options.prompts, options.prompt)
        prompts = rng.integers(1, MODELS[name].vocab, shape).astype(np.int32)
        with contextlib.ExitStack() as stack:
            calls, about = sides(name, options, stack, prompts)
            record |= {"peer": about} if about else {}
            times: dict[str, list[float]] = {side: [] for side in calls}
            for _ in range(options.rounds + 1):  # the first round warms up
                for side, call in calls.items():
                    times[side].append(call())
        record["throughput"][name] = {side: spread(t[1:]) for side, t in times.items()}


def parts(options, record: dict) -> None:
    """Seconds of the parts of a step of GRPO in the setting of `rl_lm.py`."""
    plain = argparse.Namespace(problems=2, batch=64, samples=8, steps=1, every=1, lr=1e-4)
    run = rl_lm.reinforced(plain, 0, "GRPO", Path("none"))
    run = dataclasses.replace(run, start="", evaluators=()).check(1)
    program = trainer.build(run, jax.devices()[:1])
    source: Any = run.source.make(run.batch, seed=0, split="train")
    source.attach(Scene(run, program.apply, program.mesh, (0, 1)))
    module = run.model.build(jax.default_backend())
    state = program.init()
    count, width = run.batch // run.source.samples, run.source.prompt
    alone = jax.jit(
        functools.partial(
            generate, module, new=run.source.new, samples=run.source.samples, sampling=PLAIN
        )
    )
    prompts = np.ones((count, width), np.int32)
    asked = prompts, np.full(count, width, np.int32), jax.random.key(0)
    names = ("generation alone", "whole rollout", "optimiser's step")
    times: dict[str, list[float]] = {name: [] for name in names}
    for step in range(options.rounds + 2):
        times["generation alone"].append(seconds(alone, state.params, *asked))
        begin = time.perf_counter()
        batch = jax.block_until_ready(source.batch_from(step, state.params))
        times["whole rollout"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
        state, metrics = jax.block_until_ready(program.step(state, batch))
        times["optimiser's step"].append(time.perf_counter() - begin)
    record["parts"] = {name: spread(t[2:]) for name, t in times.items()}
    least = {name: part["min_s"] for name, part in record["parts"].items()}
    whole = least["whole rollout"] + least["optimiser's step"]
    record["outside_generation"] = 1 - least["generation alone"] / whole
    record["step"] = {"rows": run.batch, "prompt": width, "new": run.source.new}


def markdown(record: dict, options) -> str:
    """The record as a page."""
    rows = options.prompts * options.samples
    about = ""
    if peer := record.get("peer"):
        about = f" transformers {peer['transformers']}, PyTorch {peer['torch']}, {peer['threads']} threads."
    lines = [
        f"# Rollouts, {record['date']}", "", f"{described(record)}.{about}", "",
        f"{options.prompts} prompts of {options.prompt} tokens, {options.samples} samples each, "
        f"{options.new} tokens a sample at temperature 1, float32; the call as a whole, prefill included. "
        "Ours prefills a prompt once, transformers each of its samples. Median of "
        f"{options.rounds} alternating rounds, in brackets the best one.", "",
        "| model | side | tokens/s | ours takes, of its time |", "|---|---|---|---|",
    ]  # fmt: skip
    for model, found in record["throughput"].items():
        ours = found["ours"]
        for side, t in found.items():
            speed, best = (rows * options.new / t[key] for key in ("median_s", "min_s"))
            ratio, least = (ours[key] / t[key] for key in ("median_s", "min_s"))
            share = "" if side == "ours" else f"{ratio:.2f} [{least:.2f}]"
            lines.append(f"| {model} | {side} | {speed:,.0f} [{best:,.0f}] | {share} |")
    step = record["step"]
    lines += [
        "", f"A step of GRPO of the tiny model (`rl_lm.py`): {step['rows']} answers of at most "
        f"{step['new']} tokens to prompts of at most {step['prompt']}. The whole rollout is generation, "
        "log-probabilities under the policy, verification and the batch.", "",
        "| part | ms, median [least] |", "|---|---|",
    ]  # fmt: skip
    for name, t in record["parts"].items():
        lines.append(f"| {name} | {1e3 * t['median_s']:.0f} [{1e3 * t['min_s']:.0f}] |")
    outside = 100 * record["outside_generation"]
    return "\n".join(
        [*lines, "", f"Outside generation: {outside:.0f}% of a step, by least times.", ""]
    )


def main() -> None:
    """Parses the command line, measures, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", help="a Python that has torch, transformers and numpy")
    for name, value in (("prompts", 8), ("samples", 8), ("prompt", 64), ("new", 16), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    record = environment() | {"options": {k: str(v) for k, v in vars(options).items()}}
    record["throughput"] = {}
    throughput(options, record)
    parts(options, record)
    publish(record, markdown(record, options), options.out, "rollout")


if __name__ == "__main__":
    main()
