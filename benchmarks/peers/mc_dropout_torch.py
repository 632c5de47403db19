"""MC dropout in PyTorch, driven line by line over stdin and stdout.

Every line in is a JSON command, every line out its JSON answer: `build` (a file of weights and inputs,
passes, rate; names what makes the passes), `moments` (means over the batch) and `time` (seconds of one
call of a form, `loop` or `batched`, with some threads). The passes are those of torch-uncertainty where it
is installed, else its two forms written out; the moments of the stack are plain PyTorch. Needs torch and
NumPy.
"""

import time

import numpy as np
import torch
from serve import serve
from torch import nn

try:
    from torch_uncertainty.methods import mc_dropout
except ImportError:
    mc_dropout = None


class Plain(nn.Module):
    """A pass a call, or all rows of all passes in one batch, dropout left on."""

    def __init__(self, core_model, num_estimators, on_batch):
        super().__init__()
        self.core_model, self.passes, self.on_batch = core_model, num_estimators, on_batch

    def forward(self, x):
        if self.on_batch:
            return self.core_model(x.repeat(self.passes, 1))
        return torch.cat([self.core_model(x) for _ in range(self.passes)])


class Passes:
    """The network and its inputs."""

    def __init__(self, file, passes, rate):
        stored = np.load(file)
        *weights, self.x = (torch.from_numpy(stored[name]) for name in stored.files)
        self.passes = passes
        layers = []
        for w in weights:
            layer = nn.Linear(*w.shape, bias=False)
            layer.weight = nn.Parameter(w.T.contiguous())
            layers += [layer, nn.ReLU(), nn.Dropout(rate)]
        model = nn.Sequential(*layers[:-2])
        make = mc_dropout or (lambda *args, on_batch: Plain(*args, on_batch).train())
        self.forms = {name: make(model, passes, on_batch=name == "batched") for name in FORMS}
        if mc_dropout:
            for form in self.forms.values():
                form.eval()

    def moments(self, form):
        """Mean, second to fourth moment and covariance over passes."""
        with torch.inference_mode():
            p = torch.softmax(self.forms[form](self.x), -1)
            p = p.reshape(self.passes, len(self.x), -1)
            mean = p.mean(0)
            dev = p - mean
            cov = torch.einsum("sni,snj->nij", dev, dev) / self.passes
            return mean, *((dev**n).mean(0) for n in (2, 3, 4)), cov

    def seconds(self, form, threads):
        """Of one call."""
        torch.set_num_threads(threads)
        begin = time.perf_counter()
        self.moments(form)
        return time.perf_counter() - begin


FORMS, BUILT = ("loop", "batched"), []


def build(**arguments):
    """What is timed."""
    torch.manual_seed(0)
    BUILT[:] = [Passes(**arguments)]
    if not mc_dropout:
        return {"peer": f"PyTorch {torch.__version__}"}
    from importlib.metadata import version

    made = version("torch-uncertainty")
    return {"peer": f"torch-uncertainty {made} on PyTorch {torch.__version__}"}


def moments(form):
    """Mean and variance of each class, over the batch: what the other side compares."""
    mean, var, *_ = BUILT[0].moments(form)
    return {"mean": mean.mean(0).tolist(), "var": var.mean(0).tolist()}


if __name__ == "__main__":
    serve({"build": build, "moments": moments, "time": lambda **how: BUILT[0].seconds(**how)})
