"""What benchmarks/context_roofline.py counts, against counting by hand."""

import importlib
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.flops import live


@pytest.fixture
def roofline(monkeypatch):
    """The script, whose environment for the TPU compiler is not left behind."""
    before = dict(os.environ)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield importlib.import_module("context_roofline")
    os.environ.clear()
    os.environ.update(before)


def test_products_count_once_a_turn_of_their_loop(roofline):
    def f(x, w):
        def body(x, _):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(body, x, None, length=5)[0]

    x, w = jnp.zeros((4, 8)), jnp.zeros((8, 8))
    jaxpr = live(jax.make_jaxpr(f)(x, w).jaxpr)
    assert roofline.product_bytes(jaxpr) == 5 * 4 * (4 * 8 + 8 * 8 + 4 * 8)


def test_what_goes_over_the_wire(roofline):
    """Heads are exchanged over `context` devices of the 8, weights' gradients summed over all."""
    moved = {"all_to_all": (3, 800), "psum": (1, 80), "all_gather": (2, 8), "ppermute": (9, 5)}
    expected = 800 * 3 / 4 + 2 * 80 * 7 / 8 + 8 * 7 + 5
    np.testing.assert_allclose(roofline.sent_bytes(moved, 8, 4), expected)
