"""`transformers.generate` with a static cache, driven line by line over stdin and stdout.

`build` (sizes and weights from an .npz, compiled or not), `tokens` (greedy tokens), `time` (seconds
of one call), `time_samples` (seconds of one call that samples). Every line in is a JSON command, every
line out its JSON answer. Needs torch, transformers and numpy.
"""

import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from serve import serve

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "peers"))
from generation import peer_model  # noqa: E402

SIDES = {}


def build(npz, sizes):
    """The model as it is; `compile` adds the compiled one."""
    SIDES["static cache"] = peer_model(sizes, dict(np.load(npz)))
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in SIDES["static cache"].parameters()),
    }


def compile_(npz, sizes):
    """`transformers` itself compiles on accelerators only, so the forward pass is compiled by hand."""
    model = peer_model(sizes, dict(np.load(npz)))
    model.forward = torch.compile(model.forward)
    SIDES["static cache, compiled"] = model
    return {}


def run(side, prompts, new):
    """Greedy tokens of one call."""
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = SIDES[side].generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, cache_implementation="static",
            max_new_tokens=new, min_new_tokens=new,
        )  # fmt: skip
    return out[:, ids.shape[1] :].tolist()


def time_(side, prompts, new):
    """Seconds of one call."""
    begin = time.perf_counter()
    run(side, prompts, new)
    return time.perf_counter() - begin


def time_samples(prompts, new, samples, cache):
    """Seconds of one call that draws `samples` answers a prompt at temperature 1."""
    ids = torch.tensor(prompts)
    begin = time.perf_counter()
    with torch.inference_mode():
        SIDES["static cache"].generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0,
            num_return_sequences=samples, cache_implementation=cache, max_new_tokens=new,
            min_new_tokens=new,
        )  # fmt: skip
    return time.perf_counter() - begin


if __name__ == "__main__":
    serve(
        {
            "build": build,
            "compile": compile_,
            "tokens": run,
            "time": time_,
            "time_samples": time_samples,
        }
    )
