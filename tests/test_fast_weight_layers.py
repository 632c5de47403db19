"""The layers of LaCT, TTT and ViTTT from tensors in the original layout, against NumPy in float64."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ttt_oracle import one_head, row_norms, silu

from jaxlab.ttt import LADDER, InnerConfig
from models.lact import LaCTLayer, lact_params_from_torch
from models.ttt import TTTLayer, ViTTTMixer, ttt_params_from_torch, vittt_params_from_torch

B, T, C = 2, 11, 16
sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
softplus = lambda x: np.log1p(np.exp(x))  # noqa: E731
gelu = lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731


def shapes(params):
    return jax.tree.map(lambda y: y.shape, params)


def declared(layer):
    """Shapes of the parameters that a layer makes for itself."""
    made = lambda: nn.unbox(layer.init(jax.random.key(0), jnp.zeros((B, T, C))))  # noqa: E731
    return shapes(jax.eval_shape(made)["params"])


def draws(seed):
    random = np.random.default_rng(seed)
    return lambda *shape, scale=1.0: scale * random.standard_normal(shape)


def rms(x, w):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-5) * w


def rotate(x, angle):
    """Pairs (x[i], x[i + half]) of one head."""
    (a, b), (cos, sin) = np.split(x, 2), (np.cos(angle), np.sin(angle))
    return np.concatenate([a * cos - b * sin, b * cos + a * sin])


def lact_tensors(ha, hf, multi, rank, bias, qk_norm, inner, scale, seed=0):
    draw, d = draws(seed), C // hf
    dh = d if inner.net == "linear" else multi * d
    s = {"qkv.weight": draw(3 * C, C, scale=C**-0.5), "o_proj.weight": draw(C, C, scale=C**-0.5)}
    s |= {"qk_scale": 1 + draw(C, 2, scale=0.2), "qk_offset": draw(C, 2, scale=0.2)}
    s |= {"lr_proj.weight": draw(3 * hf, C), "lr_proj.bias": 3 + draw(3 * hf)}
    s |= {"ttt_norm.weight": 1 + draw(d, scale=0.2), "w1": draw(hf, d, dh, scale=dh**-0.5)}
    if bias:
        s["qkv.bias"] = draw(3 * C)
    if qk_norm:
        s |= {f"{n}_norm.weight": 1 + draw(C, scale=0.2) for n in "qk"}
    if inner.momentum:
        s |= {"momentum_proj.0.weight": draw(hf, C), "momentum_proj.0.bias": draw(hf)}
    if scale:
        s |= {"ttt_scale_proj.weight": draw(hf, C), "ttt_scale_proj.bias": draw(hf)}
    for name in ("w0", "w2"):
        if rank:
            s |= {f"{name}.w_left": draw(hf, dh, rank), f"{name}.w_right": draw(hf, rank, d)}
        else:
            s[name] = draw(hf, dh, d, scale=d**-0.5)
    return s


def lact_oracle(s, x, ha, hf, window, inner, rope, v_silu, theta, base_rate=1e-3):
    """Section 2.3 of the note, token by token, weights in columns."""
    d, k = C // hf, C // ha
    out = np.zeros_like(x)
    inv_freq = theta ** (-np.arange(0, k, 2) / k)
    for n in range(len(x)):
        q, key, v = np.split(x[n] @ s["qkv.weight"].T + s.get("qkv.bias", 0), 3, -1)
        if "q_norm.weight" in s:
            q, key = rms(q, s["q_norm.weight"]), rms(key, s["k_norm.weight"])
        fq, fk = (y * s["qk_scale"][:, i] + s["qk_offset"][:, i] for i, y in enumerate((q, key)))
        turn = lambda y: np.stack([  # noqa: E731
            np.concatenate([rotate(h, t * inv_freq) for h in np.split(row, ha)])
            for t, row in enumerate(y)
        ])  # fmt: skip
        unit = lambda y: np.concatenate(  # noqa: E731
            [h / (np.linalg.norm(h, axis=-1, keepdims=True) + 1e-5)
             for h in np.split(silu(y), hf, -1)], -1)  # fmt: skip
        fq, fk = unit(fq), unit(fk)
        if rope:
            fq, fk = turn(fq), turn(fk)
        fv = silu(v) if v_silu else v
        eta = softplus(
            x[n] @ s["lr_proj.weight"].T + s["lr_proj.bias"] + np.log(np.expm1(base_rate))
        )
        mixed = np.zeros_like(x[n])
        for h in range(hf):
            part = slice(h * d, (h + 1) * d)
            w = {"w1": s["w1"][h]}
            for name in ("w0", "w2") if inner.net == "swiglu" else ():
                if f"{name}.w_left" in s:
                    low = s[f"{name}.w_left"][h] @ s[f"{name}.w_right"][h]
                    w[name] = low + 0.5 * np.eye(*low.shape)
                else:
                    w[name] = s[name][h]
            rates = eta[:, 3 * h : 3 * h + 3] if inner.token_rates else np.ones((T, 3))
            mu = None
            if inner.momentum:
                p = s["momentum_proj.0.weight"][h], s["momentum_proj.0.bias"][h]
                mu = sigmoid(x[n] @ p[0] + p[1])
            norms = {name: row_norms(y) for name, y in w.items()}
            y = one_head(fq[:, part], fk[:, part], fv[:, part], w, rates, mu, inner, norms)[0]
            y = rms(y, s["ttt_norm.weight"])
            if "ttt_scale_proj.weight" in s:
                p = s["ttt_scale_proj.weight"][h], s["ttt_scale_proj.bias"][h]
                y = y * silu(x[n] @ p[0] + p[1])[:, None]
            mixed[:, part] += y
        q, key = turn(q), turn(key)
        for h in range(ha):
            part = slice(h * k, (h + 1) * k)
            for t in range(T):
                seen = slice(max(0, t - window + 1), t + 1)
                z = key[seen, part] @ q[t, part] * k**-0.5
                p = np.exp(z - z.max())
                mixed[t, part] += p / p.sum() @ v[seen, part]
        out[n] = mixed @ s["o_proj.weight"].T
    return out


BASE = dataclasses.replace(LADDER["base"], chunk_size=4)
LACT = {
    "base, low rank, norm, bias": (4, 2, 1, 3, True, True, BASE, True, True),
    "wide, whole, no rope": (2, 4, 2, None, False, False, BASE, False, False),
    "V2": (2, 2, 2, 2, False, False, dataclasses.replace(LADDER["V2"], chunk_size=3), True, True),
    "V6": (4, 1, 1, None, False, True, dataclasses.replace(LADDER["V6"], chunk_size=4), True, True),
}


@pytest.mark.parametrize("case", LACT.values(), ids=LACT)
def test_lact_layer_is_its_equations(case):
    ha, hf, multi, rank, bias, norm, inner, scale, rope = case
    tensors = lact_tensors(ha, hf, multi, rank, bias, norm, inner, scale)
    x = draws(9)(B, T, C)
    layer = LaCTLayer(
        C, ha, hf, multi, window=5, inner=inner, low_rank=rank, qkv_bias=bias, qk_norm=norm,
        ttt_rope=rope, v_silu=rope, learnable_scale=scale, rope_theta=100.0,
    )  # fmt: skip
    params = lact_params_from_torch({n: jnp.asarray(y, jnp.float32) for n, y in tensors.items()})
    if inner.token_rates:
        assert shapes(params) == declared(layer)
    got = jax.jit(layer.apply)({"params": params}, jnp.asarray(x, jnp.float32))
    want = lact_oracle(tensors, x, ha, hf, 5, inner, rope, rope, 100.0)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())


def test_gradients_pass_through_the_imports():
    """A finite difference along a random direction of all the original tensors."""
    inner = dataclasses.replace(BASE, orthogonalize=None)
    tensors = lact_tensors(2, 2, 1, 2, True, True, inner, True)
    with jax.enable_x64(True):
        layer = LaCTLayer(
            C, 2, 2, window=5, inner=inner, low_rank=2, qkv_bias=True, dtype="float64"
        )
        x = jnp.asarray(draws(9)(1, T, C))

        def loss(tensors):
            params = lact_params_from_torch(tensors)
            return jnp.sum(jnp.sin(layer.apply({"params": params}, x)))

        loss = jax.jit(loss)
        direction = {n: draws(i)(*y.shape) for i, (n, y) in enumerate(tensors.items())}
        slope = sum(jnp.sum(g * direction[n]) for n, g in jax.grad(loss)(tensors).items())
        at = lambda e: loss({n: y + e * direction[n] for n, y in tensors.items()})  # noqa: E731
        np.testing.assert_allclose(slope, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-5)


def layer_norm(x, w, b, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * w + b


def ttt_tensors(kind, h, size, gate, seed=1):
    draw, f = draws(seed), C // h
    wide = f if kind == "linear" else 4 * f
    s = {f"{n}_proj.weight": draw(C, C, scale=C**-0.5) for n in "qkvo"}
    s |= {"learnable_ttt_lr_weight": draw(h, 1, C), "learnable_ttt_lr_bias": draw(h, 1)}
    s |= {
        "learnable_token_idx": draw(size, scale=0.3),
        "ttt_norm_weight": 1 + draw(h, f, scale=0.2),
    }
    s |= {"ttt_norm_bias": draw(h, f, scale=0.2), "W1": draw(h, f, wide), "b1": draw(h, 1, wide)}
    if kind == "mlp":
        s |= {"W2": draw(h, wide, f, scale=0.3), "b2": draw(h, 1, f)}
    s |= {"post_norm.weight": 1 + draw(C, scale=0.2), "post_norm.bias": draw(C, scale=0.2)}
    return s | ({"g_proj.weight": draw(C, C, scale=C**-0.5)} if gate else {})


def ttt_oracle(s, x, h, size, base_rate, theta):
    """Section 2.5 with the weights of every token in full, the inner gradient by hand."""
    f, out = C // h, np.zeros_like(x)
    inv_freq = theta ** (-np.arange(0, f, 2) / f)
    for n, i in np.ndindex(len(x), h):
        part = slice(i * f, (i + 1) * f)
        q, k, v = (x[n] @ s[f"{m}_proj.weight"].T[:, part] for m in "qkv")
        gamma, beta = s["ttt_norm_weight"][i], s["ttt_norm_bias"][i]
        layers = [(s[f"W{j}"][i], s[f"b{j}"][i, 0]) for j in (1, 2) if f"W{j}" in s]
        sums = []
        for t in range(T):
            place = t % size
            if place == 0:
                if sums:
                    pairs = zip(layers, sums, strict=True)
                    layers = [(w - tok * a, b - tok * c) for (w, b), (a, c) in pairs]
                sums = [(0 * w, 0 * b) for w, b in layers]
            tok = max(1 / (place + 1) + s["learnable_token_idx"][place], 0)
            rate = s["learnable_ttt_lr_weight"][i, 0] @ x[n, t] + s["learnable_ttt_lr_bias"][i, 0]
            rate = base_rate * sigmoid(rate) / f
            turn = lambda y, place=place: np.stack([  # noqa: E731
                y[0::2] * np.cos(place * inv_freq) - y[1::2] * np.sin(place * inv_freq),
                y[1::2] * np.cos(place * inv_freq) + y[0::2] * np.sin(place * inv_freq),
            ], -1).reshape(-1)  # fmt: skip
            qt, kt = turn(q[t]), turn(k[t])
            zs, inputs = [], [kt]
            for w, b in layers:
                zs.append(inputs[-1] @ w + b)
                inputs.append(gelu(zs[-1]))
            centred = zs[-1] - zs[-1].mean()
            sd = np.sqrt(np.mean(centred**2) + 1e-6)
            r = (gamma * centred / sd + beta - (v[t] - kt)) * gamma
            g = (r - r.mean() - centred / sd * np.mean(r * centred / sd)) / sd
            for j in reversed(range(len(layers))):
                w = layers[j][0]
                sums[j] = (sums[j][0] + rate * np.outer(inputs[j], g), sums[j][1] + rate * g)
                if j:
                    slope = (gelu(zs[j - 1] + 1e-6) - gelu(zs[j - 1] - 1e-6)) / 2e-6
                    g = (w @ g) * slope
            y = qt
            for j, ((w, b), (a, c)) in enumerate(zip(layers, sums, strict=True)):
                y = (gelu(y) if j else y) @ (w - tok * a) + b - tok * c
            out[n, t, part] = qt + layer_norm(y, gamma, beta)
    out = layer_norm(out, s["post_norm.weight"], s["post_norm.bias"])
    if "g_proj.weight" in s:
        out = gelu(x @ s["g_proj.weight"].T) * out
    return out @ s["o_proj.weight"].T


@pytest.mark.parametrize("kind, h, gate", [("linear", 2, False), ("mlp", 4, True)])
def test_ttt_layer_is_its_equations(kind, h, gate):
    tensors, x = ttt_tensors(kind, h, 4, gate), draws(8)(B, T, C)
    layer = TTTLayer(kind, C, h, chunk_size=4, base_rate=0.5, rope_theta=100.0, use_gate=gate)
    params = ttt_params_from_torch({n: jnp.asarray(y, jnp.float32) for n, y in tensors.items()})
    assert shapes(params) == declared(layer)
    got = jax.jit(layer.apply)({"params": params}, jnp.asarray(x, jnp.float32))
    want = ttt_oracle(tensors, x, h, 4, 0.5, 100.0)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def vittt_oracle(s, x, h, grid):
    """Section 2.4: a GLU a head and a depthwise 3x3 kernel a channel, one clipped step each."""
    d, (rows, columns) = C // h, grid
    n, out = rows * columns, []
    for image in x:
        y = image @ s["qkv.weight"].T + s.get("qkv.bias", 0)
        q1, k1, v1, q2, k2, v2 = np.split(y, [C, 2 * C, 3 * C, 3 * C + d, 3 * C + 2 * d], -1)
        parts = []
        for i in range(h):
            q, k, v = (a[:, i * d : (i + 1) * d] for a in (q1, k1, v1))
            w1, w2, e = s["w1"][0, i], s["w2"][0, i], -v / 3 / n
            z = k @ w2
            slope = sigmoid(z) * (1 + z * (1 - sigmoid(z)))
            g1, g2 = k.T @ (e * silu(z)), k.T @ (e * (k @ w1) * slope)
            w1, w2 = (w - g / (np.linalg.norm(g, axis=0) + 1) for w, g in ((w1, g1), (w2, g2)))
            parts.append((q @ w1) * silu(q @ w2))
        conv = np.zeros((n, d))
        for channel in range(d):
            q, k = (np.pad(a[:, channel].reshape(grid), 1) for a in (q2, k2))
            e = -v2[:, channel].reshape(grid) / 3 / n
            at = lambda a, i, j: a[i : i + rows, j : j + columns]  # noqa: E731
            g = np.array([[np.sum(at(k, i, j) * e) for j in range(3)] for i in range(3)])
            w = s["w3"][channel, 0] - g / (np.sqrt(np.sum(g * g)) + 1)
            taps = sum(w[i, j] * at(q, i, j) for i in range(3) for j in range(3))
            conv[:, channel] = taps.reshape(-1)
        out.append(np.concatenate([*parts, conv], -1) @ s["proj.weight"].T + s["proj.bias"])
    return np.stack(out)


@pytest.mark.parametrize("bias", [True, False])
def test_vittt_mixer_is_its_equations(bias):
    h, grid = 2, (3, 4)
    draw, d = draws(3), C // h
    tensors = {"qkv.weight": draw(3 * C + 3 * d, C), "w1": draw(1, h, d, d), "w2": draw(1, h, d, d)}
    tensors |= {"w3": draw(d, 1, 3, 3), "proj.weight": draw(C, C + d), "proj.bias": draw(C)}
    if bias:
        tensors["qkv.bias"] = draw(3 * C + 3 * d)
    params = vittt_params_from_torch({n: jnp.asarray(y, jnp.float32) for n, y in tensors.items()})
    x, layer = draw(B, 12, C), ViTTTMixer(C, h, qkv_bias=bias)
    got = layer.apply({"params": params}, jnp.asarray(x, jnp.float32), grid=grid)
    want = vittt_oracle(tensors, x, h, grid)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    "layer, message",
    [
        (LaCTLayer(C, 3, 2), "attn_heads=3 must divide hidden_size=16"),
        (LaCTLayer(C, 16, 2), "attn_heads=16 must leave an even width"),
        (LaCTLayer(C, 2, 5), "ttt_heads=5 must divide"),
        (LaCTLayer(C, 2, 2, low_rank=0), "low_rank=0 must be at least 1"),
        (LaCTLayer(C, 2, 2, window=0), "window=0"),
        (TTTLayer("cnn", C, 2), "kind='cnn' must be"),
        (TTTLayer("mlp", C, 16), "num_heads=16 must divide"),
        (TTTLayer("mlp", C, 2, chunk_size=0), "chunk_size=0"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_sizes_that_do_not_fit_are_named(layer, message):
    with pytest.raises(ValueError, match=message):
        layer.init(jax.random.key(0), jnp.zeros((1, 3, C)))


def test_a_grid_that_does_not_hold_the_tokens_is_named():
    with pytest.raises(ValueError, match=r"expected \[b, 6, 16\] for grid=\(2, 3\)"):
        ViTTTMixer(C, 2).init(jax.random.key(0), jnp.zeros((1, 7, C)), grid=(2, 3))
    with pytest.raises(ValueError, match="num_heads=3 must divide"):
        ViTTTMixer(C, 3).init(jax.random.key(0), jnp.zeros((1, 6, C)), grid=(2, 3))


def test_a_layer_needs_no_gates_without_momentum_and_learns_bidirectionally():
    """The order of novel-view synthesis: learn, then read; a later token changes an earlier output."""
    inner = InnerConfig(visibility="inclusive_chunk", chunk_size=T, momentum=False)
    layer = LaCTLayer(C, 2, 2, inner=inner, window=1, low_rank=None)
    x = jnp.asarray(draws(2)(1, T, C), jnp.float32)
    params = layer.init(jax.random.key(0), x)
    assert not [n for n in params["params"] if "momentum" in n]
    moved = layer.apply(params, x.at[0, -1].add(1.0)) - layer.apply(params, x)
    assert np.abs(moved[0, 0]).max() > 1e-6
