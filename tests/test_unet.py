"""The U-Net: its discretised logistic against float64, its size, its gradient, its errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special
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


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def silu(x):
    return x * expit(x)


def norm(x, p):
    """GroupNorm of [b, y, x, c] with min(c / 4, 32) groups."""
    groups = min(x.shape[-1] // 4, 32)
    parts = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, var = parts.mean((1, 3), keepdims=True), parts.var((1, 3), keepdims=True)
    return ((parts - mean) / np.sqrt(var + 1e-6)).reshape(x.shape) * p["scale"] + p["bias"]


def conv(x, p, stride=1, pad=(1, 1)):
    n = (x.shape[1] + sum(pad) - 3) // stride + 1
    x, out = np.pad(x, ((0, 0), pad, pad, (0, 0))), p["bias"]
    for i, j in np.ndindex(3, 3):
        out = (
            out + x[:, i : i + stride * n : stride, j : j + stride * n : stride] @ p["kernel"][i, j]
        )
    return out


def residual(x, level, p):
    h = conv(silu(norm(x, p["GroupNorm_0"])), p["Conv_0"])
    h = h + dense(level, p["Dense_0"])[:, None, None]
    h = conv(silu(norm(h, p["GroupNorm_1"])), p["Conv_1"])
    return ((dense(x, p["Dense_1"]) if "Dense_1" in p else x) + h) / np.sqrt(2)


def attention(x, p):
    q, k, v = np.split(
        dense(norm(x, p["GroupNorm_0"]).reshape(len(x), -1, x.shape[-1]), p["Dense_0"]), 3, -1
    )
    mixed = special.softmax(q @ k.swapaxes(1, 2) / np.sqrt(x.shape[-1]), -1) @ v
    return (x + dense(mixed, p["Dense_1"]).reshape(x.shape)) / np.sqrt(2)


def described(p, tokens, sigma, labels, v=16, c=8):
    """Section 8.2 of the note for two scales, one block each, attention at the second: [b, 2, 3, y, x]."""
    side = int((tokens.shape[1] / 3) ** 0.5)
    image = (2 * tokens / v - 1).reshape(-1, 3, side, side).transpose(0, 2, 3, 1)
    half = np.arange(c // 2)
    angles = 1000 * sigma[:, None] * np.exp(-np.log(1e4) * half / (c // 2 - 1))
    level = dense(np.concatenate([np.sin(angles), np.cos(angles)], -1), p["Dense_0"])
    level = dense(silu(level), p["Dense_1"]) + p["Embed_0"]["embedding"][labels]
    res = [lambda x, i=i: residual(x, silu(level), p[f"ResBlock_{i}"]) for i in range(8)]
    att = [lambda x, i=i: attention(x, p[f"PixelAttention_{i}"]) for i in range(4)]
    skips = [conv(image, p["Conv_0"])]
    skips.append(res[0](skips[-1]))
    skips.append(conv(skips[-1], p["Conv_1"], 2, (0, 1)))
    skips.append(att[0](res[1](skips[-1])))
    h = res[3](att[1](res[2](skips[-1])))
    for i in (4, 5):
        h = att[i - 2](res[i](np.concatenate([h, skips.pop()], -1)))
    h = conv(h.repeat(2, 1).repeat(2, 2), p["Conv_2"])
    for i in (6, 7):
        h = res[i](np.concatenate([h, skips.pop()], -1))
    h = conv(silu(norm(h, p["GroupNorm_0"])), p["Conv_3"])
    return np.concatenate([np.tanh(image + h[..., :3]), h[..., 3:]], -1).transpose(0, 3, 1, 2)


MODULE = SMALL.clone(num_classes=3)


@pytest.fixture(scope="module")
def case():
    """(parameters, tokens, levels, labels)."""
    random = np.random.default_rng(0)
    x, sigma, labels = random.integers(0, 16, (2, 48)), np.float32([0.1, 2.0]), np.array([0, 3])
    shapes = jax.eval_shape(MODULE.init, jax.random.key(1), x, sigma, labels=labels)
    draw = lambda a: np.float32(random.normal(0.1, 0.3, a.shape))  # noqa: E731
    return jax.tree.map(draw, nn.unbox(shapes)["params"]), x, sigma, labels


def test_network_is_the_description(case):
    """Logits against float64; they depend on image, level and class."""
    params, x, sigma, labels = case
    call = jax.jit(lambda *args: MODULE.apply({"params": params}, *args[:2], labels=args[2]))
    logits = call(x, sigma, labels)
    wide = jax.tree.map(np.float64, params)
    want = bins(described(wide, x, np.float64(sigma), labels), 16, False)
    np.testing.assert_allclose(logits, want, rtol=3e-4, atol=3e-4)
    for other in ((1 - x % 2, sigma, labels), (x, sigma + 1, labels), (x, sigma, labels - labels)):
        assert np.any(call(*other) != logits)


@pytest.mark.slow
def test_every_parameter_has_a_gradient(case):
    params, x, sigma, labels = case

    @jax.jit
    def gradient(params):
        def loss(params):
            logs = jax.nn.log_softmax(MODULE.apply({"params": params}, x, sigma, labels=labels))
            return jnp.mean(logs[..., 3])

        return jax.grad(loss)(params)

    flat = jax.tree.leaves(gradient(params))
    assert all(np.all(np.isfinite(g)) for g in flat)
    assert sum(bool(jnp.any(g)) for g in flat) > 0.9 * len(flat)


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
