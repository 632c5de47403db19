"""Discrete diffusion as its definitions are written: float64 NumPy, one token at a time."""

import numpy as np


def prior_vector(prior: str, mask_id, vocab: int) -> np.ndarray:
    return np.full(vocab, 1 / vocab) if prior == "uniform" else np.eye(vocab)[mask_id]


def forward(p, alpha, prior, mask_id=None):
    return alpha * p + (1 - alpha) * prior_vector(prior, mask_id, p.shape[-1])


def posterior(p, z, alpha_s, alpha_t, prior, mask_id=None):
    """q(z_s | z_t = z) for a clean token of law p [V], the formulas of section 3."""
    k, e = len(p), np.eye(len(p))
    if prior == "masked":
        if z != mask_id:
            return e[z]
        return (alpha_s - alpha_t) / (1 - alpha_t) * p + (1 - alpha_s) / (1 - alpha_t) * e[mask_id]
    ts = alpha_t / alpha_s
    top = k * alpha_t * p * e[z] + (ts - alpha_t) * e[z] + (alpha_s - alpha_t) * p
    return (top + (1 - ts) * (1 - alpha_s) / k) / (k * alpha_t * p[z] + 1 - alpha_t)


def psi(p, z, alpha_s, alpha_t, kappa, prior, mask_id=None):
    """Equation 12."""
    clean = posterior(p, z, 1.0, alpha_t, prior, mask_id)
    again = forward(clean, alpha_s, prior, mask_id)
    return kappa * posterior(p, z, alpha_s, alpha_t, prior, mask_id) + (1 - kappa) * again


def nelbo(p, z, x, alpha, slope):
    """Form A of section 4.2, one token."""
    k = len(p)
    bar = k * alpha * np.eye(k)[x] + 1 - alpha
    guess = k * alpha * p + 1 - alpha
    logs = np.log(guess[z] * bar / (guess * bar[z]))
    return slope / (k * alpha) * (k / bar[z] - k / guess[z] - np.sum(bar / bar[z] * logs))


def nelbo_release(p, z, x, alpha, slope):
    """Form C of section 4.2, one token."""
    k = len(p)
    r = k * alpha / (1 - alpha)
    c = 1 / (1 + r)
    s = np.sum(np.log1p(r * p)) - k * np.log1p(r * p[z])
    first = k / (1 - alpha)
    if z == x:
        brace = first * (c - 1 / (1 + r * p[z])) + c * s - (k - 1) * c * np.log(c)
    else:
        brace = first * (1 - 1 / (1 + r * p[z])) + s + (1 + r) * np.log(c)
        brace += r * (np.log1p(r * p[x]) - np.log1p(r * p[z]))
    return slope / (k * alpha) * brace
