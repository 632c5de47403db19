"""An attention layer in float64 NumPy, with its gradients by hand, and meshes of any shape."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from test_attention import oracle


def make_mesh(**axes):
    """A mesh with these axes over the first devices."""
    n = int(np.prod(list(axes.values())))
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), types, devices=jax.devices()[:n])


def rotate(x, positions, inv_freq, sign=1.0):
    """RoPE by complex numbers; sign -1 undoes it."""
    half = x.shape[-1] // 2
    turn = np.exp(1j * sign * np.asarray(positions)[..., None, None] * np.asarray(inv_freq))
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)


def layer_oracle(x, wq, wk, wv, wo, dy, *, positions=None, inv_freq=None, **mask):
    """y, dx, dwq, dwk, dwv, dwo in float64, heads one by one."""
    x, wq, wk, wv, wo, dy = (np.asarray(a, np.float64) for a in (x, wq, wk, wv, wo, dy))
    if positions is None:
        positions = np.broadcast_to(np.arange(x.shape[1]), x.shape[:2])
    turn = lambda a, sign: a if inv_freq is None else rotate(a, positions, inv_freq, sign)  # noqa: E731
    q, k, v = (np.einsum("bsd,dhk->bshk", x, w) for w in (wq, wk, wv))
    q, k = turn(q, 1), turn(k, 1)
    dout = np.einsum("bsd,hkd->bshk", dy, wo)
    out, _, dq, dk, dv = oracle(q, k, v, dout, np.zeros(q.shape[:3]), **mask)
    dq, dk = turn(dq, -1), turn(dk, -1)
    dx = sum(np.einsum("bshk,dhk->bsd", a, w) for a, w in ((dq, wq), (dk, wk), (dv, wv)))
    grads = (np.einsum("bsd,bshk->dhk", x, a) for a in (dq, dk, dv))
    return np.einsum("bshk,hkd->bsd", out, wo), dx, *grads, np.einsum("bshk,bsd->hkd", out, dy)


def layer_inputs(seed, b=2, s=16, d=6, h=8, hk=2, k=4, dtype="float32"):
    """x, wq, wk, wv, wo, dy, of the size that a network has; h * k is not d."""
    draw = np.random.default_rng(seed).standard_normal
    shapes = (b, s, d), (d, h, k), (d, hk, k), (d, hk, k), (h, k, d), (b, s, d)
    scales = 1, d**-0.5, d**-0.5, d**-0.5, (h * k) ** -0.5, 1
    pairs = zip(shapes, scales, strict=True)
    return tuple(jnp.asarray(scale * draw(shape), dtype) for shape, scale in pairs)


def draw_segments(seed, b=2, s=16):
    """Sorted ids that change anywhere."""
    return np.sort(np.random.default_rng(seed).integers(0, 3, (b, s)), 1).astype(np.int32)


def assert_close(got, expected, tolerance, least=0.0):
    """Largest error below `tolerance` times the largest value, or `least`, array by array."""
    assert len(got) == len(expected)
    for name, x, y in zip(("y", "dx", "dwq", "dwk", "dwv", "dwo"), got, expected, strict=False):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        error = np.max(np.abs(x - y)) / max(np.max(np.abs(y)), least)
        assert error <= tolerance, (name, error)
