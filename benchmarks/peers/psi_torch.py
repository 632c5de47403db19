"""The plain formulas of Duo in PyTorch, driven line by line over stdin and stdout.

Every line in is a JSON command, every line out its JSON answer: `build` (tokens, vocab, width, level),
`time` (seconds of one call of `curriculum`, the dense relaxation to embeddings, or of `step`, posterior
and Gumbel noise after the logits). Needs only torch.
"""

import time

import torch
from serve import serve


class Plain:
    """Inputs of both calls, at log-linear levels alpha_s and alpha_t."""

    def __init__(self, tokens, vocab, width, level, alphas):
        torch.manual_seed(0)
        self.vocab, self.level, self.alphas = vocab, level, alphas
        self.x0 = torch.randint(vocab, (1, tokens))
        self.table = torch.randn(vocab, width)
        self.logits = 3 * torch.randn(1, tokens, vocab)
        self.z = torch.randint(vocab, (1, tokens))

    def curriculum(self):
        """softmax(w / tau) of the noisy one-hot vector times the table, and its argmax."""
        alpha, sigma, tau = self.level
        w = sigma * torch.randn(*self.x0.shape, self.vocab)
        w.scatter_add_(-1, self.x0[..., None], torch.full((*self.x0.shape, 1), alpha))
        return torch.softmax(w / tau, -1) @ self.table, w.argmax(-1)

    def step(self):
        """A draw of the uniform posterior, by an argmax with Gumbel noise."""
        s, t = self.alphas
        k, at, p = self.vocab, self.z[..., None], torch.softmax(self.logits, -1)
        p_z = p.gather(-1, at)
        law = (s - t) * p + (1 - t / s) * (1 - s) / k
        law.scatter_add_(-1, at, k * t * p_z + t / s - t)
        law /= k * t * p_z + 1 - t
        noise = -torch.log(torch.empty_like(law).exponential_())
        return (torch.log(law) + noise).argmax(-1)

    def seconds(self, what):
        """Of one call."""
        begin = time.perf_counter()
        with torch.no_grad():
            getattr(self, what)()
        return time.perf_counter() - begin


PLAIN = []


def build(**sizes):
    """The arrays of what is timed."""
    PLAIN[:] = [Plain(**sizes)]
    return {"torch": torch.__version__}


if __name__ == "__main__":
    serve({"build": build, "time": lambda what: PLAIN[0].seconds(what)})
