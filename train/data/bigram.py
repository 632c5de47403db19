"""The bar a language model must beat: a smoothed bigram model of the same tokens."""

import numpy as np


def _pairs(rows) -> tuple[np.ndarray, np.ndarray]:
    found = [(t[y >= 0], y[y >= 0]) for t, y in rows.pairs()]
    return (
        np.concatenate([a for a, _ in found]).astype(np.int64),
        np.concatenate([b for _, b in found]).astype(np.int64),
    )


def bigram_loss(train, valid, vocab: int) -> float:
    """Mean -log p(next | token) in nats on `valid` rows of a bigram model fitted on `train` rows.

    p(b | a) = (count(a, b) + k * p(b)) / (count(a) + k), p(b) add-one smoothed. k is the best of a
    grid on the held-out rows themselves, which flatters the bigram model: an honest bar.
    """
    a, b = _pairs(train)
    va, vb = _pairs(valid)
    single = np.bincount(b, minlength=vocab) + 1.0
    prior = (single / single.sum())[vb]
    codes, counts = np.unique(a * vocab + b, return_counts=True)
    wanted = va * vocab + vb
    at = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
    pair = np.where(codes[at] == wanted, counts[at], 0)
    first = np.bincount(a, minlength=vocab)[va]
    grid = 2.0 ** np.arange(-4, 12)
    return float(min(-np.log((pair + k * prior) / (first + k)).mean() for k in grid))
