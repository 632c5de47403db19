"""The U-Net: its discretised logistic against float64, its size, its gradient, its errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, log_expit

from models.unet import UNet, truncated_logistic

SMALL = UNet(16, channels=8, multipliers=(1, 2), blocks=1, dtype="float32")


def bins(net_out, v, fix):
    """The description's own formula in float64."""
    out = net_out.astype(np.float64).reshape(len(net_out), 2, -1)
    mean, inverse = out[:, 0, :, None], np.exp(-(out[:, 1, :, None] - 2))
    centre, w = np.linspace(-1 + 1 / v, 1 - 1 / v, v), 2 / v
    low, high = (centre - w / 2 - mean) * inverse, (centre + w / 2 - mean) * inverse
    minus = lambda a, b: a + np.log1p(-np.exp(b - a) + 1e-6)  # noqa: E731
    below = minus(log_expit(high), log_expit(low))
    above = minus(log_expit(-low), log_expit(-high))
    return np.minimum(below, above) if fix else below


@pytest.mark.parametrize("fix", [False, True])
@pytest.mark.parametrize("v", [2, 16, 256])
def test_bins_of_the_logistic_are_those_of_float64(v, fix):
    rng = np.random.default_rng(v)
    mean = np.tanh(rng.normal(size=(2, 3, 2, 2)) * 2)
    net_out = np.concatenate([mean, rng.uniform(-4, 4, (2, 3, 2, 2))], 1).astype(np.float32)
    got = jax.jit(lambda x: truncated_logistic(x, v, fix))(net_out)
    np.testing.assert_allclose(got, bins(net_out, v, fix), rtol=2e-4, atol=2e-4)
    assert got.shape == (2, 12, v)


def test_bins_hold_the_probability_of_the_logistic():
    """Softmax of the bins is the logistic's mass in each, cut off outside of [-1, 1]."""
    mean, log_scale, v = 0.2, 0.5, 32
    out = jnp.stack([jnp.full((1, 1, 1), mean), jnp.full((1, 1, 1), log_scale)], 1)
    edges = np.linspace(-1, 1, v + 1)
    mass = np.diff(expit((edges - mean) * np.exp(2 - log_scale)))
    got = jax.nn.softmax(truncated_logistic(out, v))[0, 0]
    np.testing.assert_allclose(got, mass / mass.sum(), atol=1e-4)


def test_network_depends_on_image_level_and_class_and_has_gradients():
    module = SMALL.clone(num_classes=3)
    x = jax.random.randint(jax.random.key(0), (2, 3 * 4 * 4), 0, 16)
    sigma, labels = jnp.array([0.1, 2.0]), jnp.array([0, 3])
    params = nn.unbox(module.init(jax.random.key(1), x, sigma, labels=labels))["params"]
    # The last convolutions start at zero: move them, lest nothing be seen.
    params = jax.tree.map(lambda a: a + 0.05, params)

    def loss(params, x, sigma, labels):
        logs = jax.nn.log_softmax(module.apply({"params": params}, x, sigma, labels=labels))
        return jnp.mean(logs[..., 3])

    call = jax.jit(jax.value_and_grad(loss))
    value, grads = call(params, x, sigma, labels)
    flat = jax.tree.leaves(grads)
    assert np.isfinite(value) and all(np.all(np.isfinite(g)) for g in flat)
    assert sum(bool(jnp.any(g)) for g in flat) > 0.9 * len(flat)
    for other in ((1 - x % 2, sigma, labels), (x, sigma + 1, labels), (x, sigma, labels - labels)):
        assert call(params, *other)[0] != value


def test_default_is_the_network_of_the_release():
    """35 million parameters, as the note says."""
    x = jax.ShapeDtypeStruct((1, 3072), jnp.int32)
    shapes = jax.eval_shape(
        UNet().init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), "float32")
    )
    assert 34.5e6 < sum(a.size for a in jax.tree.leaves(shapes)) < 36.5e6


def test_errors_name_what_is_wrong():
    x, sigma = jnp.zeros((1, 48), jnp.int32), jnp.zeros(1)
    for module, arguments, match in (
        (SMALL, {"inputs": x[:, :47]}, "multiple of 2"),
        (SMALL, {"inputs": x, "weights": x}, "weights"),
        (SMALL, {"inputs": x, "labels": jnp.zeros(1, jnp.int32)}, "num_classes=None"),
        (SMALL.clone(num_classes=2), {"inputs": x}, "num_classes=2"),
    ):
        with pytest.raises(ValueError, match=match):
            module.init(jax.random.key(0), sigma=sigma, **arguments)
    with pytest.raises(ValueError, match="net_out"):
        truncated_logistic(jnp.zeros((1, 3, 2, 2)), 4)
    with pytest.raises(ValueError, match="vocab_size=1"):
        truncated_logistic(jnp.zeros((1, 2, 2, 2)), 1)
