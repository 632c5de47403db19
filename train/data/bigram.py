"""The bar a language model must beat: a smoothed bigram model of the same tokens."""

import numpy as np


def _pairs(rows) -> tuple[np.ndarray, np.ndarray]:
    found = [(t[y >= 0], y[y >= 0]) for t, y in rows.pairs()]
    return (
        np.concatenate([a for a, _ in found]).astype(np.int64),
        np.concatenate([b for _, b in found]).astype(np.int64),
    )


def fit_bigram(train, valid, vocab: int):
    """Function (tokens, next tokens) -> mean -log p(next | token) in nats, fitted on `train` rows.

    p(b | a) = (count(a, b) + k * p(b)) / (count(a) + k), p(b) add-one smoothed. k is the best of a
    grid on the `valid` rows.
    """
    a, b = _pairs(train)
    single = np.bincount(b, minlength=vocab) + 1.0
    single /= single.sum()
    codes, counts = np.unique(a * vocab + b, return_counts=True)
    seen = np.bincount(a, minlength=vocab)

    def losses(a, b, ks):
        wanted = a * vocab + b
        at = np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)
        pair = np.where(codes[at] == wanted, counts[at], 0)
        return [-np.log((pair + k * single[b]) / (seen[a] + k)).mean() for k in ks]

    grid = 2.0 ** np.arange(-4, 12)
    best = [grid[np.argmin(losses(*_pairs(valid), grid))]]
    wide = lambda x: np.asarray(x, np.int64)  # noqa: E731
    return lambda a, b: float(losses(wide(a), wide(b), best)[0])


def bigram_loss(train, valid, vocab: int) -> float:
    """Loss on `valid` rows of a bigram model fitted on `train` rows, in nats.

    Its smoothing is the best on those very rows, which flatters it: an honest bar.
    """
    return fit_bigram(train, valid, vocab)(*_pairs(valid))
