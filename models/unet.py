"""U-Net on the bytes of colour images, the denoiser of image diffusion, and its discretised logistic.

Source: Ho et al., 2006.11239; Campbell et al., 2205.14987; note on Psi-samplers, section 8.2.
"""

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from jaxlab.attention import dense_attention
from models.layers import compute_dtype

HALF = 2**-0.5  # keeps the variance of a sum of two


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Shape of a U-Net on square images; defaults train in minutes on 8 x 8 digits on a laptop. The
    masked prior's mask is the last id of the vocabulary. Parameters are on every device."""

    takes: ClassVar[str] = "tokens"  # of a denoiser: "mixtures" of them too, or not

    vocab: Annotated[int, "values of a pixel, with the mask if there is one"] = 17
    side: Annotated[int, "pixels a side"] = 8
    colours: Annotated[int, "values of a place"] = 1
    channels: Annotated[int, "channels at the finest scale, a multiple of 4"] = 32
    multipliers: Annotated[tuple[int, ...], "times `channels`, for each scale; halves the side"] = (
        1,
        2,
    )
    blocks: Annotated[int, "residual blocks a scale"] = 1
    attention: Annotated[tuple[int, ...], "scales with attention; 0: the finest"] = (1,)
    classes: Annotated[int | None, "classes that it is told; none: none"] = 10
    dropout: Annotated[float, "in residual blocks, in training"] = 0.1
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "compute type; auto: f32 on CPU"] = (
        "auto"
    )

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError for what cannot be built, naming the field and what is allowed."""
        counts = {"vocab": 2, "side": 1, "colours": 1, "channels": 1, "blocks": 1, "classes": 1}
        for name, least in counts.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"model.{name}={value} must be at least {least}")
        if self.channels % 4:
            raise ValueError(f"model.channels={self.channels} must be a multiple of 4")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(
                f"model.multipliers={self.multipliers} must be numbers of at least 1, one a scale"
            )
        if self.side % (step := 2 ** (len(self.multipliers) - 1)):
            raise ValueError(
                f"model.side={self.side} must be a multiple of {step}, "
                f"with {len(self.multipliers)} scales"
            )
        if not set(self.attention) <= set(range(len(self.multipliers))):
            raise ValueError(
                f"model.attention={self.attention} must be scales below {len(self.multipliers)}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be in [0, 1)")

    def inputs(self, batch: dict[str, jax.ShapeDtypeStruct]) -> tuple[Any, ...]:
        """What `init` is traced with, one row of a batch of this kind."""
        tokens = batch["tokens"]
        first = (
            jax.ShapeDtypeStruct((1, *tokens.shape[1:]), tokens.dtype),
            jax.ShapeDtypeStruct((1,), jnp.float32),
        )
        label = jax.ShapeDtypeStruct((1,), jnp.int32)
        return first if self.classes is None else (*first, None, label)

    def build(self, platform: str) -> "UNet":
        """The module, with `dtype='auto'` settled for `platform` (cpu, gpu, tpu)."""
        return UNet(
            self.vocab, self.colours, self.channels, self.multipliers, self.blocks, self.attention,
            self.dropout, self.classes, dtype=compute_dtype(self.dtype, platform),
        )  # fmt: skip


def truncated_logistic(
    net_out: Float[Array, "b c2 y x"], vocab_size: int, fix_logistic: bool = False
) -> Float[Array, "b n v"]:
    """Log-probabilities, up to a constant, of `vocab_size` bins of [-1, 1] under logistics.

    The first half of the channels of `net_out` are means in [-1, 1], the rest log scales; n runs over
    (channel, row, column). `fix_logistic` takes the lesser of this and the same from the upper tail.
    ValueError for an odd number of channels or fewer than 2 bins.
    """
    if net_out.ndim != 4 or net_out.shape[1] % 2:
        raise ValueError(f"net_out must be [b, 2 channels, y, x], got {net_out.shape}")
    if vocab_size < 2:
        raise ValueError(f"vocab_size={vocab_size} must be at least 2")
    dtype = jnp.promote_types(net_out.dtype, jnp.float32)
    mean, log_scale = jnp.split(rearrange(net_out.astype(dtype), "b c y x -> b (c y x)"), 2, 1)
    width = 2 / vocab_size
    inverse = jnp.exp(2 - log_scale)[..., None]
    left = jnp.asarray(-1 + width * np.arange(vocab_size), dtype)
    low = (left - mean[..., None]) * inverse
    high = (left + width - mean[..., None]) * inverse
    # cdf(high) - cdf(low) = sigmoid(high) sigmoid(-low) inside, without a difference.
    inside = -jnp.expm1(-width * inverse)
    below = jax.nn.log_sigmoid(high) + jnp.log(jax.nn.sigmoid(-low) * inside + 1e-6)
    if not fix_logistic:
        return below
    above = jax.nn.log_sigmoid(-low) + jnp.log(jax.nn.sigmoid(high) * inside + 1e-6)
    return jnp.minimum(below, above)


def _norm(x):
    return nn.GroupNorm(min(x.shape[-1] // 4, 32), epsilon=1e-6, dtype=x.dtype)(x)


class ResBlock(nn.Module):
    """Two convolutions, the noise level between them, and a skip."""

    channels: int
    dropout: float
    deterministic: bool

    @nn.compact
    def __call__(self, x, level):
        c, conv = self.channels, (3, 3)
        h = nn.Conv(c, conv, dtype=x.dtype)(jax.nn.silu(_norm(x)))
        h += nn.Dense(c, dtype=x.dtype)(level)[:, None, None]
        h = nn.Dropout(self.dropout, deterministic=self.deterministic)(jax.nn.silu(_norm(h)))
        h = nn.Conv(c, conv, dtype=x.dtype, kernel_init=nn.initializers.zeros)(h)
        skip = x if x.shape[-1] == c else nn.Dense(c, dtype=x.dtype)(x)
        return (skip + h) * HALF


class PixelAttention(nn.Module):
    """One head of attention over all pixels, and a skip."""

    @nn.compact
    def __call__(self, x):
        y, c = x.shape[1], x.shape[-1]
        h = rearrange(_norm(x), "b y x c -> b (y x) 1 c")
        q, k, v = jnp.split(nn.Dense(3 * c, dtype=x.dtype)(h), 3, -1)
        h = dense_attention(q, k, v, causal=False)
        h = nn.Dense(c, dtype=x.dtype, kernel_init=nn.initializers.zeros)(h)
        return (x + rearrange(h, "b (y x) 1 c -> b y x c", y=y)) * HALF


class UNet(nn.Module):
    """Logits of clean bytes from noisy ones and their noise level sigma = -log alpha.

    Tokens are (channel, row, column) of square images. `attention` are the scales, 0 the finest, that
    have it beside the middle. `dtype` None is float32 on CPUs and bfloat16 elsewhere. Labels are those
    of `DiT`.
    """

    vocab_size: int = 256
    colours: int = 3
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (1,)
    dropout: float = 0.1
    num_classes: int | None = None
    fix_logistic: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        inputs: Int[Array, "b n"],
        sigma: Float[Array, "b"],
        weights: None = None,
        labels: Int[Array, "b"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "b n v"]:
        """Logits in float32; `weights` are for curricula, which images do not have."""
        side = self.check(inputs, weights, labels)
        dtype = compute_dtype(
            "auto" if self.dtype is None else jnp.dtype(self.dtype).name, jax.default_backend()
        )
        c, wide = self.channels, 4 * self.channels
        level = nn.Dense(wide)(_waves(1000 * sigma.astype(jnp.float32), c))
        level = nn.Dense(wide)(jax.nn.silu(level))
        if labels is not None:
            level += nn.Embed((self.num_classes or 0) + 1, wide)(labels)
        level = jax.nn.silu(level).astype(dtype)
        scaled = 2 * inputs.astype(jnp.float32) / self.vocab_size - 1
        image = rearrange(scaled, "b (c y x) -> b y x c", c=self.colours, y=side)

        def residual(h, channels):
            return ResBlock(channels, self.dropout, deterministic)(h, level)

        h = nn.Conv(c, (3, 3), dtype=dtype)(image.astype(dtype))
        skips = [h]
        for scale, times in enumerate(self.multipliers):
            for _ in range(self.blocks):
                h = residual(h, times * c)
                h = PixelAttention()(h) if scale in self.attention else h
                skips.append(h)
            if scale < len(self.multipliers) - 1:
                pad = ((0, 1), (0, 1))
                h = nn.Conv(times * c, (3, 3), 2, pad, dtype=dtype)(h)
                skips.append(h)
        h = residual(PixelAttention()(residual(h, h.shape[-1])), h.shape[-1])
        for scale, times in reversed(list(enumerate(self.multipliers))):
            for _ in range(self.blocks + 1):
                h = residual(jnp.concatenate([h, skips.pop()], -1), times * c)
                h = PixelAttention()(h) if scale in self.attention else h
            if scale:
                h = nn.Conv(times * c, (3, 3), dtype=dtype)(h.repeat(2, 1).repeat(2, 2))
        zeros = nn.initializers.zeros
        h = nn.Conv(2 * self.colours, (3, 3), kernel_init=zeros)(
            jax.nn.silu(_norm(h)).astype(jnp.float32)
        )
        shift, log_scale = jnp.split(h, 2, -1)
        out = jnp.concatenate([jnp.tanh(image + shift), log_scale], -1)
        out = rearrange(out, "b y x c -> b c y x")
        return truncated_logistic(out, self.vocab_size, self.fix_logistic)

    def check(self, inputs, weights, labels) -> int:
        """The side of the images; ValueError for what cannot be."""
        side = round((inputs.shape[-1] / self.colours) ** 0.5)
        step = 2 ** (len(self.multipliers) - 1)
        if inputs.shape[-1] != self.colours * side**2 or side % step:
            raise ValueError(
                f"inputs {inputs.shape} must be [b, {self.colours} side^2] with a side that is a "
                f"multiple of {step}"
            )
        if weights is not None:
            raise ValueError("weights are for tokens that are mixed, which images do not have")
        if (labels is None) != (self.num_classes is None):
            got = "no labels" if labels is None else "labels"
            raise ValueError(f"num_classes={self.num_classes}, but {got} given")
        return side


def _waves(x: Float[Array, "b"], width: int) -> Float[Array, "b w"]:
    """sin and cos of x at width / 2 frequencies from 1 to 1e-4."""
    half = width // 2
    angles = x[:, None] * jnp.exp(-jnp.log(1e4) * jnp.arange(half) / (half - 1))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
