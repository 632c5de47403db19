"""The decoder of `models/decoder.py` in PyTorch, driven line by line over stdin and stdout.

Every line in is a JSON command, every line out its JSON answer: `build` (sizes, weights and batch
from an .npz, optimiser, device), `losses` (training steps from the given weights), `time` (seconds
of each step of a round), `matmul` (FLOP/s of a square product), `quit`. Needs only torch and numpy.
"""

import json
import platform
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Pre-norm attention (grouped queries, rotary) and SwiGLU."""

    def __init__(self, c):
        super().__init__()
        d, f, k = c["d_model"], c["mlp"], c["head_dim"]
        self.h, self.hk, self.k, self.eps = c["heads"], c["kv_heads"], k, c["norm_eps"]
        self.mixer_norm, self.mlp_norm = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.wq = nn.Linear(d, self.h * k, bias=False)
        self.wk = nn.Linear(d, self.hk * k, bias=False)
        self.wv = nn.Linear(d, self.hk * k, bias=False)
        self.wo = nn.Linear(self.h * k, d, bias=False)
        self.w_gate, self.w_up = nn.Linear(d, f, bias=False), nn.Linear(d, f, bias=False)
        self.w_down = nn.Linear(f, d, bias=False)

    def heads(self, x, n, cos, sin):
        x = x.unflatten(-1, (n, self.k)).transpose(1, 2)
        if cos is None:
            return x
        x1, x2 = x.float().chunk(2, -1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).to(x.dtype)

    def forward(self, x, cos, sin, mask):
        y = F.rms_norm(x, x.shape[-1:], self.mixer_norm, self.eps)
        q = self.heads(self.wq(y), self.h, cos, sin)
        k = self.heads(self.wk(y), self.hk, cos, sin)
        v = self.heads(self.wv(y), self.hk, None, None)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.h != self.hk
        )
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        y = F.rms_norm(x, x.shape[-1:], self.mlp_norm, self.eps)
        return x + self.w_down(F.silu(self.w_gate(y)) * self.w_up(y))


class Decoder(nn.Module):
    """Returns the mean cross-entropy of the targets that are not negative."""

    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embedding = nn.Embedding(c["vocab"], c["d_model"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["layers"]))
        self.norm = nn.Parameter(torch.ones(c["d_model"]))
        if not c["tied"]:
            self.head = nn.Linear(c["d_model"], c["vocab"], bias=False)
        half = c["head_dim"] // 2
        frequency = c["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("frequency", frequency.float(), persistent=False)

    def forward(self, tokens, targets, positions, mask):
        angle = positions[:, None, :, None].float() * self.frequency
        cos, sin = angle.cos(), angle.sin()
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cos, sin, mask)
        x = F.rms_norm(x, x.shape[-1:], self.norm, self.c["norm_eps"])
        w = self.embedding.weight if self.c["tied"] else self.head.weight
        logits = F.linear(x, w).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def load(model, weights):
    """Copies the other side's parameters in: its matrices are [in, out], layers stacked first."""
    tensor = lambda name: torch.from_numpy(weights[name])  # noqa: E731
    with torch.no_grad():
        model.embedding.weight.copy_(tensor("embedding"))
        model.norm.copy_(tensor("norm/scale"))
        if not model.c["tied"]:
            model.head.weight.copy_(tensor("head").T)
        for i, block in enumerate(model.blocks):
            block.mixer_norm.copy_(tensor("blocks/mixer_norm_0/scale")[i])
            block.mlp_norm.copy_(tensor("blocks/mlp_norm_0/scale")[i])
            for name in ("wq", "wk", "wv"):
                getattr(block, name).weight.copy_(tensor(f"blocks/mixer_0/{name}")[i].flatten(1).T)
            block.wo.weight.copy_(tensor("blocks/mixer_0/wo")[i].flatten(0, 1).T)
            for name in ("w_gate", "w_up", "w_down"):
                getattr(block, name).weight.copy_(tensor(f"blocks/mlp_0/{name}")[i].T)


class Peer:
    """A model, its optimiser and one batch; `kinds` are the ways to run the same step."""

    def __init__(self, npz, sizes, optimizer, dtype, document_mask):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        data = np.load(npz)
        self.weights = {k[2:]: data[k] for k in data if k.startswith("p:")}
        self.model = Decoder(sizes).to(self.device)
        batch = {
            k[2:]: torch.from_numpy(data[k]).long().to(self.device) for k in data if k[:2] == "b:"
        }
        mask = None
        if document_mask:
            ids, length = batch["segment_ids"], batch["tokens"].shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
            mask = (ids[:, :, None] == ids[:, None, :])[:, None] & causal
        self.inputs = (batch["tokens"], batch["targets"], batch["positions"], mask)
        self.optimizer, self.bfloat16 = optimizer, dtype == "bfloat16"
        self.forward = {"eager": self.model, "compile": torch.compile(self.model)}
        self.reset()

    def reset(self):
        """The given weights and a fresh optimiser."""
        o = self.optimizer
        load(self.model, self.weights)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": o["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.tx = torch.optim.AdamW(groups, o["lr"], (o["b1"], o["b2"]), eps=1e-8, fused=True)

    def step(self, kind):
        """One training step; returns the loss as a tensor."""
        self.tx.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss = self.forward[kind](*self.inputs)
        loss.backward()
        if self.optimizer["clip"]:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.optimizer["clip"])
        self.tx.step()
        return loss.detach()

    def wait(self):
        """Until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def losses(self, kind, steps):
        """Losses of `steps` steps from the given weights."""
        self.reset()
        return [self.step(kind).item() for _ in range(steps)]

    def time(self, kind, steps):
        """Seconds a step, over `steps` steps after one that is not counted."""
        self.step(kind)
        self.wait()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step(kind)
        self.wait()
        return (time.perf_counter() - begin) / steps


def matmul(n, dtype, repeats=8):
    """Best FLOP/s of an [n, n] by [n, n] product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    best = 0.0
    for _ in range(repeats):
        begin = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * n**3 / (time.perf_counter() - begin))
    return best


def serve():
    """Answers commands until `quit` or the end of the input."""
    out, sys.stdout = sys.stdout, sys.stderr  # only answers go to stdout
    peer = None
    for line in sys.stdin:
        command = json.loads(line)
        do = command.pop("do")
        if do == "build":
            peer = Peer(**command)
            answer = {
                "parameters": sum(p.numel() for p in peer.model.parameters()),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
                "device": torch.cuda.get_device_name() if peer.device.type == "cuda" else "cpu",
            }
        elif do == "losses":
            answer = peer.losses(**command)
        elif do == "time":
            answer = peer.time(**command)
        elif do == "matmul":
            answer = matmul(**command)
        else:
            break
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    serve()
