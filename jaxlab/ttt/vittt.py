"""The two inner nets of ViTTT: one gradient step on all tokens of an image, then the read-out.

Not causal. Gradients are clipped smoothly, g / (|g| + 1). Sources: ViTTT, 2512.01643, section 3;
2602.21204, section 3.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.arguments import wide_type
from jaxlab.ttt.arguments import batched, check_tokens
from jaxlab.ttt.net import outer_sum
from jaxlab.ttt.orthogonal import safe_norm


def _moved(w: jax.Array, g: jax.Array, axis, rate: float, clip: bool) -> jax.Array:
    return w - rate * (g / (safe_norm(g, axis) + 1) if clip else g)


def vittt_glu(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h k"],
    w1: Float[Array, "*b h k k"],
    w2: Float[Array, "*b h k k"],
    *,
    rate: float = 1.0,
    grad_scale: float = 1 / 3,
    clip: bool = True,
) -> tuple[Float[Array, "b t h k"], tuple[Float[Array, "b h k k"], Float[Array, "b h k k"]]]:
    """Gated linear unit (x w1) * silu(x w2), trained on -<f(k), v> * grad_scale / t, read with q.

    A step is w - rate * g, g divided by its norm over inputs plus 1 if `clip`. Returns (outputs in
    v's type, (w1, w2) after the step with a batch axis, float32 or v's wider type). ValueError for
    shapes that do not fit, TypeError for tokens that are not floating.
    """
    q, k, v = check_tokens(q, k, v, "B N H d")
    if v.shape != q.shape:
        raise ValueError(f"v has shape {v.shape}; expected that of q, {q.shape}")
    (b, n, h, d), wide, out_type = q.shape, wide_type(v), v.dtype
    w1, w2 = (batched(name, w, (h, d, d), b, wide) for name, w in {"w1": w1, "w2": w2}.items())
    q, k, v = (jnp.swapaxes(x.astype(wide), 1, 2) for x in (q, k, v))
    error = -v * (grad_scale / max(n, 1))
    gate, pull = jax.vjp(jax.nn.silu, k @ w2)
    g1 = outer_sum(k, error * gate)
    g2 = outer_sum(k, pull(error * (k @ w1))[0])
    w1, w2 = (_moved(w, g, -2, rate, clip) for w, g in ((w1, g1), (w2, g2)))
    out = (q @ w1) * jax.nn.silu(q @ w2)
    return jnp.swapaxes(out, 1, 2).astype(out_type), (w1, w2)


def _shifted(x: jax.Array) -> list[jax.Array]:
    """Maps [b, y, x, d] as the nine taps of a 3x3 kernel see them, row by row, zeros outside."""
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [x[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]


def depthwise(x: Float[Array, "b y x d"], w3: Float[Array, "*b d 3 3"]) -> Float[Array, "b y x d"]:
    """Cross-correlation of each channel with its own 3x3 kernel, zeros outside.

    Nine products, as compilers for CPUs have no quick gradient of a grouped convolution.
    """
    taps = jnp.moveaxis(w3.reshape(*w3.shape[:-2], 9), -1, 0)
    kernels = taps if w3.ndim == 3 else taps[:, :, None, None]
    parts = [tap * part for tap, part in zip(kernels, _shifted(x), strict=True)]
    return jnp.asarray(sum(parts))


def vittt_dwconv(
    q: Float[Array, "b y x d"],
    k: Float[Array, "b y x d"],
    v: Float[Array, "b y x d"],
    w3: Float[Array, "*b d 3 3"],
    *,
    rate: float = 1.0,
    grad_scale: float = 1 / 3,
    clip: bool = True,
) -> tuple[Float[Array, "b y x d"], Float[Array, "b d 3 3"]]:
    """Depthwise 3x3 convolution trained on -<f(k), v> * grad_scale / (y x), read with q.

    A cross-correlation with zeros outside: tap (i, j) of `w3` reads the pixel at (i - 1, j - 1) from
    the centre. Steps, types and errors as in `vittt_glu`; the norm is that of a kernel. Returns
    (outputs, w3 after the step, one kernel an image and channel).
    """
    q, k, v = check_tokens(q, k, v, "B h w d")
    if v.shape != q.shape:
        raise ValueError(f"v has shape {v.shape}; expected that of q, {q.shape}")
    (b, h, w, d), wide, out_type = q.shape, wide_type(v), v.dtype
    w3 = batched("w3", w3, (d, 3, 3), b, wide)
    q, k, v = (x.astype(wide) for x in (q, k, v))
    error = -v * (grad_scale / max(h * w, 1))
    taps = [jnp.sum(x * error, (1, 2)) for x in _shifted(k)]
    w3 = _moved(w3, jnp.stack(taps, -1).reshape(b, d, 3, 3), (-2, -1), rate, clip)
    return depthwise(q, w3).astype(out_type), w3
