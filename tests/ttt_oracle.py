"""TTT in float64 NumPy loops, from the papers' pseudo-code: column convention, token by token."""

import numpy as np

LACT = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
MUON = [(3.4445, -4.7750, 2.0315)] * 50


def orthogonalised(g, kind, steps):
    tall = g.shape[0] > g.shape[1]
    x = g.T if tall else g
    x = x / (np.sqrt(np.sum(x * x)) + 1e-7)
    for a, b, c in (LACT if kind == "lact" else MUON)[:steps]:
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x


def row_norms(w):
    return np.sqrt(np.sum(w * w, 1, keepdims=True))


def silu(x):
    return x / (1 + np.exp(-x))


def net(w, x, kind):
    h = x if kind == "linear" else silu(w["w0"] @ x) * (w["w2"] @ x)
    return w["w1"] @ h


def chunk_grads(w, k, v, eta, kind, loss):
    """Minus the gradients of one chunk: one outer product a token and matrix."""
    total = {name: np.zeros_like(x) for name, x in w.items()}
    for i in range(len(k)):
        if kind == "linear":
            h = k[i]
        else:
            a, b = w["w0"] @ k[i], w["w2"] @ k[i]
            sigma = 1 / (1 + np.exp(-a))
            h = a * sigma * b
        u = v[i] if loss == "dot" else v[i] - w["w1"] @ h
        total["w1"] += eta[i, 1] * np.outer(u, h)
        if kind == "swiglu":
            p = w["w1"].T @ u
            total["w0"] += eta[i, 0] * np.outer(p * b * sigma * (1 + a * (1 - sigma)), k[i])
            total["w2"] += eta[i, 2] * np.outer(p * a * sigma, k[i])
    return total


def one_head(q, k, v, w, eta, mu, cfg, norms):
    """(outputs, weights of the last read) of one sequence and head; mu None without momentum."""
    moving = [n for n in cfg.update if n in w]
    main = dict(w)
    delta = {n: np.zeros_like(w[n]) for n in moving}
    size, t = cfg.chunk_size, len(q)
    out = np.zeros((t, v.shape[1]))
    for start in range(0, t, size):
        part = slice(start, min(start + size, t))
        exclusive = cfg.visibility == "exclusive"
        if exclusive:
            for i in range(part.start, part.stop):
                out[i] = net(w, q[i], cfg.net)
            if part.stop == t:
                break
        for _ in range(cfg.steps):
            grads = chunk_grads(w, k[part], v[part], eta[part], cfg.net, cfg.loss)
            w, main = dict(w), dict(main)
            for n in moving:
                step = grads[n]
                if mu is not None:
                    step = delta[n] = grads[n] + np.mean(mu[part]) * delta[n]
                if cfg.orthogonalize:
                    step = orthogonalised(step, cfg.orthogonalize, cfg.ns_steps)
                if cfg.weight_norm == "pre":
                    main[n] = main[n] + cfg.sign * step
                    w[n] = main[n] / (row_norms(main[n]) + 1e-5) * norms[n]
                else:
                    w[n] = w[n] + cfg.sign * step
                    if cfg.weight_norm == "post":
                        w[n] = w[n] / (row_norms(w[n]) + 1e-5) * norms[n]
        if not exclusive:
            for i in range(part.start, part.stop):
                out[i] = net(w, q[i], cfg.net)
    return out, w


def token_head(q, k, v, w, eta, mu, cfg):
    """Visibility "token": every token writes, then reads."""
    phi = lambda x: x if cfg.net == "linear" else silu(w["w0"] @ x) * (w["w2"] @ x)  # noqa: E731
    state, delta, out = w["w1"], np.zeros_like(w["w1"]), np.zeros((len(q), v.shape[1]))
    for i in range(len(q)):
        delta = eta[i, 1] * np.outer(v[i], phi(k[i])) + (0 if mu is None else mu[i]) * delta
        state = state + cfg.sign * delta
        out[i] = state @ phi(q[i])
    return out, {**w, "w1": state}


def layer(q, k, v, fw, rates, mu, cfg, norm_of=None):
    """[b, t, h, d] of everything, like `ttt`: (outputs, {name: [b, h, in, out]} of the last read).

    `norm_of` are the weights whose norms are restored, None being `fw`: fixed while `fw` is varied,
    they are what a detached norm means.
    """
    b, t, h, _ = q.shape
    names = ("w1",) if cfg.net == "linear" else ("w0", "w1", "w2")
    fw, norm_of = (
        {n: np.broadcast_to(getattr(x, n), (b, *getattr(x, n).shape[-3:])) for n in names}
        for x in (fw, fw if norm_of is None else norm_of)
    )
    eta = np.ones((b, t, h, 3))
    if rates is not None and cfg.token_rates:
        eta = eta * (rates if rates.ndim == 4 else rates[..., None])
    mu = mu if cfg.momentum else None
    q = k if cfg.query == "k" else q
    out = np.zeros((b, t, h, v.shape[-1]))
    after = {n: np.array(x, np.float64) for n, x in fw.items()}
    for i, j in np.ndindex(b, h):
        w = {n: fw[n][i, j].T for n in names}
        gate = None if mu is None else mu[i, :, j]
        args = q[i, :, j], k[i, :, j], v[i, :, j], w, eta[i, :, j], gate, cfg
        if cfg.visibility == "token":
            o, w = token_head(*args)
        else:
            o, w = one_head(*args, {n: row_norms(norm_of[n][i, j].T) for n in names})
        out[i, :, j] = o
        for n in names:
            after[n][i, j] = w[n].T
    return out, after
