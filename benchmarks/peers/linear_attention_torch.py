"""Linear attention and its relatives in plain PyTorch, driven line by line over stdin and stdout.

The naive chunk form: all chunks' in-chunk products at once, then a Python loop over chunks that carries
the state. Written from the published formulas (GLA 2312.06635, DeltaNet 2406.06484, Gated DeltaNet
2412.06464, KDA 2510.26692). With CUDA and `fla` the sides are fla's Triton kernels instead: that
branch was never run. `build`, `compile`, `out`, `time`; needs torch and numpy.
"""

import importlib
import importlib.util
import platform
import time

import numpy as np
import torch
from serve import serve

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ARRAYS, CALLS, SIZE = {}, {}, {}
# fla's module and function.
FLA = {
    "linear": ("linear_attn", "chunk_linear_attn"),
    "scalar decay": ("simple_gla", "chunk_simple_gla"),
    "GLA": ("gla", "chunk_gla"),
    "DeltaNet": ("delta_rule", "chunk_delta_rule"),
    "Gated DeltaNet": ("gated_delta_rule", "chunk_gated_delta_rule"),
    "KDA": ("kda", "chunk_kda"),
}


def pairs(a, k, g):
    """sum_d a_t[d] k_i[d] exp(G_t[d] - G_i[d]) over t >= i, one column after another."""
    columns = []
    for i in range(k.shape[-2]):
        fade = torch.exp((g - g[..., i : i + 1, :]).clamp(max=0))
        columns.append((a * fade * k[..., i : i + 1, :]).sum(-1))
    return torch.stack(columns, -1).tril()


def chunked(q, k, v, log_decay=None, beta=None):
    """out [b, t, h, v]; log_decay [b, t, h] or [b, t, h, k], beta [b, t, h]; t is a multiple of a chunk."""
    size = SIZE["chunk"]

    def cut(x):
        x = x.transpose(1, 2)
        return x.reshape(*x.shape[:2], -1, size, *x.shape[3:])

    q, k, v = cut(q) * q.shape[-1] ** -0.5, cut(k), cut(v)
    b, h, n, _, width = q.shape
    vector = log_decay is not None and log_decay.ndim == 4
    if log_decay is None:
        g = q.new_zeros(b, h, n, size, 1)
    else:
        g = cut(log_decay if vector else log_decay[..., None]).cumsum(-2)
    strong = k if beta is None else k * cut(beta)[..., None]
    if vector:
        inner = pairs(q, k, g)
        lower = None if beta is None else pairs(strong, k, g)
    else:
        gap = (g - g.mT).clamp(max=0).exp()
        inner = (q @ k.mT * gap).tril()
        lower = None if beta is None else strong @ k.mT * gap
    into, after = g.exp(), (g[..., -1:, :] - g).exp()
    erase = None
    if lower is not None:
        unit = lower.tril(-1) + torch.eye(size, device=q.device)
        both = torch.cat([v * cut(beta)[..., None], strong * into], -1)
        both = torch.linalg.solve_triangular(unit, both, upper=False, unitriangular=True)
        v, erase = both.split([v.shape[-1], width], -1)
    q, k, whole = q * into, k * after, into[..., -1, :, None]
    state, out = q.new_zeros(b, h, width, v.shape[-1]), []
    for i in range(n):
        new = v[:, :, i] if erase is None else v[:, :, i] - erase[:, :, i] @ state
        out.append(q[:, :, i] @ state + inner[:, :, i] @ new)
        state = whole[:, :, i] * state + k[:, :, i].mT @ new
    return torch.stack(out, 2).reshape(b, h, -1, v.shape[-1]).transpose(1, 2)


def kernel(method):
    """fla's Triton kernel under our names of the gates. Never run."""
    module, name = FLA[method]
    run = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    more = {"normalize": False} if method == "linear" else {}

    def call(q, k, v, log_decay=None, beta=None):
        gates = {"g": log_decay, "beta": beta}
        return run(q, k, v, **{n: x for n, x in gates.items() if x is not None}, **more)[0]

    return call


def build(npz, chunk_size):
    """Takes the arrays; versions and what the sides are."""
    SIZE["chunk"] = chunk_size
    ARRAYS.update({n: torch.tensor(x, device=DEVICE) for n, x in np.load(npz).items()})
    found = CUDA and importlib.util.find_spec("fla") is not None
    form = "fla's Triton kernels" if found else "naive chunk form"
    for method in FLA:
        CALLS[method, "eager"] = kernel(method) if found else chunked
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "form": form,
    }


def compile_(method, gates):
    """Compiles forward and backward; the seconds that took."""
    CALLS[method, "compiled"] = torch.compile(CALLS[method, "eager"])
    return {"seconds": time_(method, "compiled", "gradient", gates)}


def inputs(gates, grad):
    """Fresh leaves of q, k, v and the gates, under the functions' names."""
    names = {n: n.replace("decays", "decay") for n in ("q", "k", "v", *gates)}
    return {to: ARRAYS[n].detach().requires_grad_(grad) for n, to in names.items()}


def out(method, gates, path):
    """Writes the output of a forward pass."""
    with torch.no_grad():
        np.save(path, CALLS[method, "eager"](**inputs(gates, False)).cpu().numpy())
    return {}


def time_(method, side, what, gates):
    """Seconds of a forward pass, or of a forward and a backward pass of the summed squares."""
    given = inputs(gates, what == "gradient")
    begin = time.perf_counter()
    if what == "gradient":
        (CALLS[method, side](**given) ** 2).sum().backward()
    else:
        with torch.no_grad():
            CALLS[method, side](**given)
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    serve({"build": build, "out": out, "time": time_, "compile": compile_})
