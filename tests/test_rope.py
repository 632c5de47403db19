"""Rotary positions: published frequency formulas step by step in float64, rotation as complex numbers."""

import cmath
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab.attention import apply_rope
from jaxlab.rope import (
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    rope_frequencies,
    yarn_attention_factor,
)

TURN = 2 * math.pi


def base(head_dim, theta):
    return [1 / theta ** (2 * i / head_dim) for i in range(head_dim // 2)]


def llama3(frequency, c):
    """By wavelength, three cases, as published with Llama 3.1."""
    wavelength = TURN / frequency
    if wavelength < c.original_max_position_embeddings / c.high_freq_factor:
        return frequency
    if wavelength > c.original_max_position_embeddings / c.low_freq_factor:
        return frequency / c.factor
    smooth = c.original_max_position_embeddings / wavelength - c.low_freq_factor
    smooth /= c.high_freq_factor - c.low_freq_factor
    return (1 - smooth) * frequency / c.factor + smooth * frequency


def yarn(i, frequency, head_dim, theta, c):
    """Section 3.2 of the paper with its code's ramp, linear in the index of the dimension."""

    def index_with(turns):
        # theta^(-2 i / d) * length = 2 pi turns, solved for i.
        return head_dim / 2 * math.log(c.original_max_position_embeddings / (TURN * turns), theta)

    first, last = index_with(c.beta_fast), index_with(c.beta_slow)
    if c.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    position = (i - first) / (last - first) if first != last else math.inf * (i - first + 1e-9)
    gamma = 1 - min(max(position, 0), 1)
    return (1 - gamma) * frequency / c.factor + gamma * frequency


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(
    st.sampled_from([2, 8, 64, 128]),
    st.sampled_from([1e4, 5e5, 1e6]),
    st.floats(1, 64),
    st.sampled_from([64, 512, 8192, 32_768, 2**30]),
    st.booleans(),
)
def test_frequencies_are_the_published_formulas(head_dim, theta, factor, length, truncate):
    plain = base(head_dim, theta)
    table = {
        None: plain,
        LinearScaling(factor): [f / factor for f in plain],
        (c := Llama3Scaling(factor, 1.0, 4.0, length)): [llama3(f, c) for f in plain],
        (c := Llama3Scaling(factor, 0.5, 9.0, length)): [llama3(f, c) for f in plain],
    }
    for c in (
        YarnScaling(factor, 32, 1, length, truncate=truncate),
        YarnScaling(factor, 1e6, 0.5, length, truncate=truncate),
    ):
        table[c] = [yarn(i, f, head_dim, theta, c) for i, f in enumerate(plain)]
    for scaling, expected in table.items():
        got = rope_frequencies(head_dim, theta, scaling)
        assert got.dtype == np.float64 and got.shape == (head_dim // 2,)
        np.testing.assert_allclose(got, expected, rtol=1e-12, err_msg=repr(scaling))


def test_long_wavelengths_are_stretched_and_short_ones_kept():
    plain = rope_frequencies(128, 5e5)
    for scaling in (Llama3Scaling(), YarnScaling(factor=8.0)):
        ratio = plain / rope_frequencies(128, 5e5, scaling)
        assert ratio[0] == 1 and ratio[-1] == 8
        assert np.all(np.diff(ratio) >= -1e-6) and np.any((ratio > 1.1) & (ratio < 7.9))


def test_yarn_attention_factor():
    assert yarn_attention_factor(YarnScaling(factor=math.e**2)) == pytest.approx(1.2)
    assert yarn_attention_factor(YarnScaling(factor=1.0)) == 1
    assert yarn_attention_factor(YarnScaling(factor=4.0, attention_factor=0.7)) == 0.7


@pytest.mark.parametrize(
    "dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 1e-2)]
)
def test_rotation_multiplies_complex_numbers(dtype, tolerance):
    random = np.random.default_rng(0)
    frequency = random.random(3)
    positions = random.integers(0, 50, (2, 5))
    with jax.enable_x64(True):
        x = jnp.asarray(random.standard_normal((2, 5, 2, 6)), dtype)
        inv_freq = jnp.asarray(frequency, "float64" if dtype == "float64" else "float32")
        got = jax.jit(apply_rope)(x, positions, inv_freq)
        assert got.dtype == x.dtype
        source = np.asarray(x, np.float64)
    got = np.asarray(got, np.float64)
    for b, t, h, i in np.ndindex(2, 5, 2, 3):
        turned = complex(source[b, t, h, i], source[b, t, h, i + 3])
        turned *= cmath.exp(1j * positions[b, t] * float(inv_freq[i]))
        assert abs(complex(got[b, t, h, i], got[b, t, h, i + 3]) - turned) < tolerance * 4


def test_scores_depend_on_the_distance_only_and_no_frequency_is_the_identity():
    random = np.random.default_rng(1)
    q, k = (jnp.asarray(random.standard_normal((1, 1, 2, 8)), "float32") for _ in range(2))
    q, k = (jnp.broadcast_to(x, (1, 6, 2, 8)) for x in (q, k))
    inv_freq = rope_frequencies(8, 1e4)
    near = jnp.arange(6)[None]
    at = lambda x, positions: apply_rope(x, positions, inv_freq)  # noqa: E731
    scores = jnp.einsum("bthk,bshk->bhts", at(q, near + 3), at(k, near))
    np.testing.assert_allclose(scores[..., 1:, 1:], scores[..., :-1, :-1], atol=1e-5)
    assert np.max(np.abs(scores[..., 0, 1:] - scores[..., 0, :-1])) > 0.01
    far = jnp.einsum("bthk,bshk->bhts", at(q, near + 103), at(k, near + 100))
    np.testing.assert_allclose(far, scores, atol=1e-4)
    assert apply_rope(q, near, None) is q
    np.testing.assert_allclose(at(at(q, near), -near), q, atol=1e-6)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rope_frequencies(7, 1e4), "head_dim=7 must be even and positive"),
        (lambda: rope_frequencies(0, 1e4), "head_dim=0 must be even and positive"),
        (lambda: rope_frequencies(8, 1.0), "theta=1.0 must be above 1"),
        (lambda: rope_frequencies(8, 1e4, "yarn"), "scaling='yarn' is not one of LinearScaling"),
        (lambda: LinearScaling(0.0), "factor=0.0 must be positive"),
        (lambda: YarnScaling(-1.0), "factor=-1.0 must be positive"),
        (lambda: YarnScaling(beta_fast=1, beta_slow=1), "beta_slow=1 must be below beta_fast=1"),
        (
            lambda: Llama3Scaling(low_freq_factor=4.0),
            "low_freq_factor=4.0 must be below high_freq_factor=4.0",
        ),
        (
            lambda: apply_rope(jnp.zeros((2, 3, 1, 8)), jnp.zeros((2, 3), int), jnp.ones(8)),
            r"inv_freq \(8,\) must be half the head dim of x \(2, 3, 1, 8\)",
        ),
        (
            lambda: apply_rope(jnp.zeros((2, 3, 1, 8)), jnp.zeros((3,), int), jnp.ones(4)),
            r"positions must be \(2, 3\) or \(1, 3\), got \(3,\)",
        ),
    ],
)
def test_illegal_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
