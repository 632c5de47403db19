"""DiT: a bidirectional transformer modulated by the noise level, the denoiser of text diffusion.

Source: Peebles and Xie, 2212.09748; note on Psi-samplers, section 8.1.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.diffusion.curriculum import mix_embeddings
from jaxlab.rope import rope_frequencies
from models.decoder import DecoderConfig
from models.layers import compute_dtype, weight
from models.mixers import MIXERS
from sharding.context import ContextConfig, attention_layer
from sharding.rules import constrain

FEATURES = 256  # of the noise level


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shape of a DiT on tokens; defaults train in minutes on a laptop. The masked prior's mask is the
    last id of the vocabulary."""

    takes: ClassVar[str] = "mixtures"  # of a denoiser: of tokens, as well as tokens

    vocab: Annotated[int, "vocabulary, with the mask if there is one; at least the tokenizer's"] = (
        256
    )
    layers: Annotated[int, "number of blocks"] = 4
    d_model: Annotated[int, "width of the residual stream"] = 128
    heads: Annotated[int, "heads; d_model is an even multiple"] = 4
    cond: Annotated[int, "width of the noise level's embedding"] = 128
    dropout: Annotated[float, "of mixer and MLP outputs, in training"] = 0.1
    mixer: Annotated[str, "'attention', or a causal mixer to use both ways"] = "attention"
    context: ContextConfig = ContextConfig()
    remat: Annotated[Literal["none", "full"], "what the backward recomputes"] = "none"
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "compute type; auto: f32 on CPU"] = (
        "auto"
    )
    param_dtype: Annotated[Literal["float32", "bfloat16"], "type of the parameters"] = "float32"

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError for what cannot be built, naming the field and what is allowed."""
        if self.mixer not in MIXERS:
            raise ValueError(
                f"model.mixer={self.mixer!r} must be one of {', '.join(sorted(MIXERS))}"
            )
        self._like().check(mesh_sizes)
        if self.cond < 1:
            raise ValueError(f"model.cond={self.cond} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be in [0, 1)")
        if self.context.layout != "contiguous":
            raise ValueError(
                f"model.context.layout={self.context.layout!r} balances causal attention; "
                "here use 'contiguous'"
            )

    def order(
        self, mesh_sizes: dict[str, int], length: int, platform: str = "", packed: bool = True
    ) -> None:
        """None, the natural order of tokens; ValueError for rows that the context cannot have."""
        self._like().order(mesh_sizes, length, platform, packed)

    def inputs(self, batch: dict[str, jax.ShapeDtypeStruct]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What `init` is traced with, one row of a batch of this kind."""
        tokens = batch["tokens"]
        return (
            jax.ShapeDtypeStruct((1, *tokens.shape[1:]), tokens.dtype),
            jax.ShapeDtypeStruct((1,), jnp.float32),
        )

    def build(self, platform: str) -> "DiT":
        """The module, with `dtype='auto'` settled for `platform` (cpu, gpu, tpu)."""
        dtype = compute_dtype(self.dtype, platform)
        like = dataclasses.replace(self._like(), dtype=dtype)
        mixer = None if self.mixer == "attention" else partial(MIXERS[self.mixer], like)
        return DiT(
            self.vocab, self.d_model, self.heads, self.layers, self.cond, self.dropout,
            dtype=dtype, param_dtype=self.param_dtype, mixer=mixer, context=self.context,
            remat=self.remat == "full",
        )  # fmt: skip

    def _like(self) -> DecoderConfig:
        """The decoder of the same shape, whose mixers and checks are used."""
        if self.heads < 1 or self.d_model % self.heads:
            legal = [n for n in range(1, self.d_model + 1) if self.d_model % (2 * n) == 0]
            raise ValueError(
                f"model.heads={self.heads} must divide model.d_model={self.d_model}: use {legal}"
            )
        return DecoderConfig(
            vocab=self.vocab, layers=self.layers, d_model=self.d_model, heads=self.heads,
            kv_heads=self.heads, head_dim=self.d_model // self.heads, mlp=4 * self.d_model,
            pattern=(self.mixer,), context=self.context, dtype=self.dtype,
            param_dtype=self.param_dtype,
        )  # fmt: skip


def uniform(bound: float) -> Callable:
    """Initialiser: uniform on [-bound, bound]."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def affine(module: nn.Module, name: str, shape, axes, dtype, *, zero: bool = False) -> Callable:
    """Declares w_`name` and b_`name`, uniform on +-1/sqrt(inputs) or zero: x -> x w + b."""
    init = uniform(0.0 if zero else shape[0] ** -0.5)
    w = weight(module, f"w_{name}", shape, axes, init, dtype)
    b = weight(module, f"b_{name}", shape[1:], ("norm",), init, dtype)
    return lambda x: x @ w.astype(x.dtype) + b.astype(x.dtype)


def layer_norm(
    module: nn.Module, name: str, x: Float[Array, "*b d"], dtype
) -> Float[Array, "*b d"]:
    """LayerNorm with a learnt scale and no bias, in float32."""
    ones = nn.with_logical_partitioning(nn.initializers.ones_init(), ("norm",))
    scale = jnp.asarray(module.param(name, ones, x.shape[-1:], dtype))
    return (nn.standardize(x.astype(jnp.float32), epsilon=1e-5) * scale).astype(x.dtype)


def modulate(x, shift, scale):
    """x (1 + scale) + shift, levels [b, d] on x [b, t, d]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class Bidirectional(nn.Module):
    """The sum of two causal mixers of a kind, one that reads the sequence backwards."""

    make: Callable[..., Any]

    @nn.compact
    def __call__(self, x, positions, segment_ids):
        turn = lambda a: None if a is None else jnp.flip(a, 1)  # noqa: E731
        there = self.make(name="there")(x, positions, segment_ids)
        return there + turn(self.make(name="back")(turn(x), positions, turn(segment_ids)))


class DiTBlock(nn.Module):
    """Mixer and MLP, each normalised, modulated, gated and added."""

    hidden_size: int
    n_heads: int
    cond_dim: int
    dropout: float
    deterministic: bool
    mixer: Callable[..., Any] | None  # makes a causal mixer; None is attention
    context: ContextConfig
    param_dtype: str

    @nn.compact
    def __call__(self, x, cond, positions, segment_ids):
        d, kind = self.hidden_size, self.param_dtype
        x = constrain(x, "batch", "length", "act_embed")
        six = affine(self, "modulation", (self.cond_dim, 6 * d), (None, "embed"), kind, zero=True)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(six(cond), 6, -1)
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        y = modulate(layer_norm(self, "norm_1", x, kind), shift_a, scale_a)
        if self.mixer is None:
            y = self.attend(y, positions, segment_ids)
        else:
            y = Bidirectional(self.mixer, name="mixer")(y, positions, segment_ids)
        x = x + drop(gate_a[:, None] * y)
        y = modulate(layer_norm(self, "norm_2", x, kind), shift_m, scale_m)
        y = affine(self, "up", (d, 4 * d), ("embed", "mlp"), kind)(y)
        y = jax.nn.gelu(constrain(y, "batch", "length", "act_mlp"))
        y = affine(self, "down", (4 * d, d), ("mlp", "embed"), kind)(y)
        return x + drop(gate_m[:, None] * y), None

    def attend(self, x, positions, segment_ids):
        """Attention to every token of the segment, with rotary positions."""
        d, h, kind = self.hidden_size, self.n_heads, self.param_dtype
        # Matrices are square, so that parameters do not depend on the number of heads.
        draw = uniform(d**-0.5)
        ins = [weight(self, name, (d, d), ("embed", "heads"), draw, kind) for name in _QKV]
        out = weight(self, "wo", (d, d), ("heads", "embed"), draw, kind)
        if self.is_initializing():  # of one row, which a mesh cannot split
            return x
        wq, wk, wv = (w.reshape(d, h, d // h) for w in ins)
        return attention_layer(
            x, wq, wk, wv, out.reshape(h, d // h, d),
            positions=positions, segment_ids=segment_ids, inv_freq=jnp.asarray(rope_frequencies(d // h, 1e4)),
            causal=False, **dataclasses.asdict(self.context),
        )  # fmt: skip


_QKV = ("wq", "wk", "wv")


class DiT(nn.Module):
    """Logits of the clean tokens from noisy ones and their noise level sigma = -log alpha.

    `dtype` is that of blocks and head, None float32 on CPUs and bfloat16 elsewhere; embedding and
    logits are float32. `mixer` makes a causal mixer, which is used both ways, in place of attention;
    `context` says how attention is computed and sharded. ValueError for sizes that do not fit.
    """

    vocab_size: int
    hidden_size: int = 768
    n_heads: int = 12
    n_blocks: int = 12
    cond_dim: int = 128
    dropout: float = 0.1
    num_classes: int | None = None
    dtype: Any = None
    param_dtype: str = "float32"
    mixer: Callable[..., Any] | None = None
    context: ContextConfig = ContextConfig()
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        inputs: Int[Array, "b t"] | Int[Array, "b t k"] | Float[Array, "b t v"],
        sigma: Float[Array, "b"],
        weights: Float[Array, "b t k"] | None = None,
        labels: Int[Array, "b"] | None = None,
        deterministic: bool = True,
        positions: Int[Array, "b t"] | None = None,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> Float[Array, "b t v"]:
        """Logits in float32; `inputs` and `weights` are the x and weights of `mix_embeddings`.

        `labels` in [0, num_classes], that number standing for no class, are given iff the model has
        classes. Not `deterministic`, dropout takes the random stream "dropout".
        """
        self.check(labels)
        d, c, v, kind = self.hidden_size, self.cond_dim, self.vocab_size, self.param_dtype
        dtype = compute_dtype(
            "auto" if self.dtype is None else jnp.dtype(self.dtype).name, jax.default_backend()
        )
        draw = uniform(d**-0.5)
        table = weight(self, "embedding", (v, d), ("vocab_in", None), draw, kind)
        level = affine(self, "level_in", (FEATURES, c), (None, None), kind)(level_features(sigma))
        level = affine(self, "level_out", (c, c), (None, None), kind)(jax.nn.silu(level))
        if labels is not None:
            shape = ((self.num_classes or 0) + 1, c)  # the last: no class
            level += weight(self, "classes", shape, (None, None), uniform(c**-0.5), kind)[labels]
        cond = jax.nn.silu(level).astype(dtype)
        x = mix_embeddings(table, inputs, weights).astype(dtype)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        block = nn.remat(DiTBlock, prevent_cse=False) if self.remat else DiTBlock
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(nn.broadcast,) * 3,  # pyright: ignore[reportArgumentType]
            length=self.n_blocks,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = blocks(
            d, self.n_heads, c, self.dropout, deterministic, self.mixer, self.context, kind,
            name="blocks",
        )(x, cond, positions, segment_ids)  # fmt: skip
        two = affine(self, "modulation", (c, 2 * d), (None, "embed"), kind, zero=True)(cond)
        x = modulate(layer_norm(self, "norm", x, kind), *jnp.split(two, 2, -1))
        return affine(self, "head", (d, v), ("embed", "vocab"), kind, zero=True)(x).astype(
            jnp.float32
        )

    def check(self, labels) -> None:
        """ValueError for sizes that do not fit, and for labels without classes or the reverse."""
        d, h = self.hidden_size, self.n_heads
        for name in ("vocab_size", "hidden_size", "n_heads", "n_blocks", "cond_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if d % h or d // h % 2:
            raise ValueError(
                f"hidden_size={d} must be n_heads={h} times an even number (rotary positions)"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
        if (labels is None) != (self.num_classes is None):
            got = "no labels" if labels is None else "labels"
            raise ValueError(f"num_classes={self.num_classes}, but {got} given")


def level_features(sigma: Float[Array, "b"]) -> Float[Array, "b f"]:
    """cos and sin of sigma at 128 frequencies from 1 down to nearly 1e-4, in float32."""
    half = FEATURES // 2
    angles = sigma.astype(jnp.float32)[:, None] * jnp.exp(-jnp.log(1e4) * jnp.arange(half) / half)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def dit_params_from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of a `DiT` of the same sizes from the release's state dict, as NumPy arrays.

    Names may begin with "backbone."; buffers are ignored. ValueError that lists missing and unknown
    names.
    """
    given = {name.removeprefix("backbone."): np.asarray(a) for name, a in state.items()}
    given = {name: a for name, a in given.items() if not name.endswith("inv_freq")}
    depth = 1 + max((int(n.split(".")[1]) for n in given if n.startswith("blocks.")), default=-1)
    used: set[str] = set()
    missing: list[str] = []

    def take(name: str) -> np.ndarray:
        used.add(name)
        if name not in given:
            missing.append(name)
        return given.get(name, np.zeros((3, 1)))

    def pair(ours: str, theirs: str) -> dict[str, np.ndarray]:
        return {f"w_{ours}": take(f"{theirs}.weight").T, f"b_{ours}": take(f"{theirs}.bias")}

    def block(i: int) -> dict[str, np.ndarray]:
        name = f"blocks.{i}."
        qkv = np.split(take(f"{name}attn_qkv.weight"), 3)
        return {
            **{ours: w.T for ours, w in zip(_QKV, qkv, strict=True)},
            "wo": take(f"{name}attn_out.weight").T,
            "norm_1": take(f"{name}norm1.weight"),
            "norm_2": take(f"{name}norm2.weight"),
            **pair("up", f"{name}mlp.0"),
            **pair("down", f"{name}mlp.2"),
            **pair("modulation", f"{name}adaLN_modulation"),
        }

    blocks = [block(i) for i in range(depth)]
    params = {
        "embedding": take("vocab_embed.embedding"),
        **pair("level_in", "sigma_map.mlp.0"),
        **pair("level_out", "sigma_map.mlp.2"),
        "norm": take("output_layer.norm_final.weight"),
        **pair("modulation", "output_layer.adaLN_modulation"),
        **pair("head", "output_layer.linear"),
    }
    if depth == 0:
        missing.append("blocks.0")
    unknown = sorted(set(given) - used)
    if missing or unknown:
        raise ValueError(f"state lacks {missing} and has unknown {unknown}")
    return params | {"blocks": {n: np.stack([b[n] for b in blocks]) for n in blocks[0]}}
