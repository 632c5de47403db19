"""The network of benchmarks/mc_dropout.py in PyTorch: passes in a loop, driven by JSON lines.

Dropout is PyTorch's own, so only the law of its masks is the same. The weights are given.
"""

import json
import sys
import time

import torch


def main() -> None:
    """Answers the commands of the other side."""
    net = x = None
    for line in sys.stdin:
        request = json.loads(line)
        if request.pop("do") == "build":
            torch.set_num_threads(request["threads"])
            weights = [torch.tensor(w) for w in request["weights"]]
            layers: list[torch.nn.Module] = []
            for w in weights:
                layer = torch.nn.Linear(*w.shape, bias=False)
                layer.weight.data = w.T.contiguous()
                layers += [layer, torch.nn.ReLU(), torch.nn.Dropout(request["rate"])]
            net, x = torch.nn.Sequential(*layers[:-2]).train(), torch.tensor(request["x"])
            answer = {"version": torch.__version__}
        else:
            passes = request["passes"]
            begin = time.perf_counter()
            with torch.inference_mode():
                p = torch.stack([net(x).softmax(-1) for _ in range(passes)])
                mean, var = p.mean(0), p.var(0, correction=0)
            seconds = time.perf_counter() - begin
            answer = {"seconds": seconds, "mean": mean.tolist(), "var": var.tolist()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
