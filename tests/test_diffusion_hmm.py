"""The hidden Markov source: its law, draws and exact denoiser against enumeration in float64."""

import itertools

import jax
import numpy as np
import pytest

from jaxlab.diffusion import HMM, SamplerConfig, hmm_denoiser, hmm_log_prob, hmm_sample, sample

LENGTH, VOCAB = 4, 3


def chain(seed=0, hidden=2, vocab=VOCAB):
    random = np.random.default_rng(seed)
    law = lambda *shape: random.dirichlet(np.full(shape[-1], 0.7), shape[:-1])  # noqa: E731
    return HMM(law(hidden), law(hidden, hidden), law(hidden, vocab))


def rows(base, length=LENGTH):
    return np.array(list(itertools.product(range(base), repeat=length)))


def law(hmm):
    """p(x) of all rows, by summing over all paths of states."""
    x, total = rows(VOCAB), 0
    for path in itertools.product(range(len(hmm.initial)), repeat=LENGTH):
        p = hmm.initial[path[0]] * np.prod(
            [hmm.transition[a, b] for a, b in itertools.pairwise(path)]
        )
        total = total + p * np.prod([hmm.emission[s, x[:, i]] for i, s in enumerate(path)], axis=0)
    return total


@pytest.mark.parametrize("seed", [0, 1])
def test_log_probabilities_are_those_of_all_paths(seed):
    hmm = chain(seed)
    np.testing.assert_allclose(np.exp(hmm_log_prob(hmm, rows(VOCAB))), law(hmm), rtol=1e-5)


def test_draws_have_the_law():
    hmm, n = chain(), 40000
    x = np.asarray(hmm_sample(jax.random.key(0), hmm, (n, LENGTH)))
    found = np.bincount(x @ VOCAB ** np.arange(LENGTH)[::-1], minlength=VOCAB**LENGTH) / n
    p = law(hmm)
    assert np.all(np.abs(found - p) < 5 * np.sqrt(p * (1 - p) / n) + 1e-9)


@pytest.mark.parametrize("prior", ["uniform", "masked"])
def test_the_denoiser_is_the_law_given_all_other_tokens(prior):
    hmm, alpha = chain(2), 0.6
    x, p = rows(VOCAB), law(hmm)
    masked = prior == "masked"
    z = rows(VOCAB + masked)[::5]
    noise = np.eye(VOCAB, VOCAB + masked) * alpha
    noise = noise + ((1 - alpha) * np.eye(VOCAB + 1)[-1] if masked else (1 - alpha) / VOCAB)
    each = noise[x[:, None], z[None]]  # [x, z, position]
    denoise = hmm_denoiser(hmm, prior, VOCAB if masked else None)
    logits = denoise(z, np.full(len(z), -np.log(alpha), np.float32))
    found = np.asarray(jax.nn.softmax(logits, -1))
    for i in range(LENGTH):
        joint = p[:, None] * np.prod(np.delete(each, i, -1), -1)
        wanted = np.stack([joint[x[:, i] == v].sum(0) for v in range(VOCAB)], -1)
        wanted /= wanted.sum(-1, keepdims=True)
        np.testing.assert_allclose(found[:, i, :VOCAB], wanted, rtol=2e-5)
        if masked:
            assert not found[:, i, VOCAB].any()


def test_the_exact_denoiser_writes_the_law():
    """Ancestral steps, 64 of them: the error is of order 1 / steps, far below 4 sigma here."""
    hmm, n = chain(1), 10000
    draw = jax.jit(
        lambda key: sample(key, hmm_denoiser(hmm), SamplerConfig(VOCAB, 64), (n, LENGTH))
    )
    x = np.asarray(draw(jax.random.key(0)))
    found = np.bincount(x @ VOCAB ** np.arange(LENGTH)[::-1], minlength=VOCAB**LENGTH) / n
    p = law(hmm)
    assert 0.5 * np.abs(found - p).sum() < 0.5 * np.sqrt(p / n).sum() + 0.01


def test_what_is_no_chain_is_refused():
    good = chain()
    for bad, name in (
        (good._replace(initial=np.ones(3) / 3), "initial"),
        (good._replace(transition=2 * good.transition), "transition"),
        (good._replace(emission=good.emission[:, :1]), "emission|initial"),
    ):
        with pytest.raises(ValueError, match=name):
            hmm_denoiser(bad)
    with pytest.raises(ValueError, match="mask_id=1"):
        hmm_denoiser(good, "masked", 1)
