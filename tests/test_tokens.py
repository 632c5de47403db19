"""Work on a device's own tokens: the numbers of one device, weights moved once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.tiled import tiled_mlp
from sharding.hlo import hlo_collectives
from sharding.mesh import MeshShape, make_mesh
from sharding.tokens import over_tokens

TILES = 4


def layer(x, w):
    """[b, t, d] by a matrix, in tiles."""
    return tiled_mlp(lambda tile: jnp.tanh(tile @ w), x, n_tiles=TILES, consecutive=True)


def norms(tokens, w):
    """Two scalars, and tokens of several shapes."""
    x, labels = tokens
    y = layer(x, w)
    return jnp.sum(y**2), jnp.sum(jnp.where(labels > 0, y[..., 0], 0))


def arrays(rows=4, length=32):
    random = np.random.default_rng(0)
    x, w = random.standard_normal((rows, length, 6)), random.standard_normal((6, 6))
    labels = jnp.asarray(random.integers(0, 2, (rows, length)))
    return jnp.asarray(x, "float32"), labels, jnp.asarray(w, "float32")


def both(x, labels, w):
    """A value and its gradients through a per-token result and through sums."""

    def loss(x, w):
        y = over_tokens(layer, x, w, pieces=TILES)
        a, b = over_tokens(norms, (y, labels), w, pieces=TILES, total=True)
        return a + 3 * b

    return jax.value_and_grad(loss, (0, 1))(x, w)


@pytest.mark.parametrize(
    "axes, rows",
    [
        (dict(data=2, ring=2, context=2), 4),
        (dict(data=1, fsdp=2, context=2, tensor=2), 4),
        (dict(data=1, context=8), 1),
        (dict(data=2, context=4), 3),  # which 2 does not divide: the plain call
    ],
)
def test_values_and_gradients_are_those_of_one_device(axes, rows):
    inputs = arrays(rows)
    expected = jax.jit(both)(*inputs)
    with jax.set_mesh(make_mesh(MeshShape(**axes))):
        got = jax.jit(both)(*inputs)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


def test_weights_are_moved_once_whatever_the_tiles():
    mesh = make_mesh(MeshShape(data=1, context=8))
    place = lambda x, *spec: jax.ShapeDtypeStruct(  # noqa: E731
        x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P(*spec))
    )
    x, _, w = arrays()
    x, w = place(x, None, "context"), place(jnp.zeros((8, 8)), "context")
    x = jax.ShapeDtypeStruct((4, 32, 8), x.dtype, sharding=x.sharding)

    def loss(x, w):
        return jnp.sum(over_tokens(layer, x, w, pieces=TILES) ** 2)

    with jax.set_mesh(mesh):
        text = jax.jit(jax.value_and_grad(loss, 1)).lower(x, w).compile().as_text()
    found = hlo_collectives(text)
    assert found["all-gather"][0] <= 2 and found["all-reduce"][0] <= 3
