"""ViTTT image classifier: blocks of a ViTTT mixer and an MLP (ViTTT, 2512.01643)."""

import dataclasses
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jaxlab.ttt.vittt import depthwise
from models.layers import compute_dtype, constant, linear, weight
from models.ttt import LayerNorm, ViTTTMixer
from sharding.rules import constrain


@dataclasses.dataclass(frozen=True)
class ViTTTConfig:
    """Shape of a classifier of square images."""

    classes: Annotated[int, "classes to tell apart"] = 10
    image: Annotated[int, "pixels a side"] = 28
    channels: Annotated[int, "values of a pixel: 1 grey, 3 colours"] = 1
    patch: Annotated[int, "pixels a side of a token; divides image"] = 4
    layers: Annotated[int, "number of blocks"] = 3
    d_model: Annotated[int, "width of a token"] = 64
    heads: Annotated[int, "heads of the mixer; divides d_model"] = 4
    mlp: Annotated[int, "hidden width of the MLP"] = 256
    dropout: Annotated[float, "rate after the mixer and the MLP of every block"] = 0.0
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "compute type; auto: f32 on CPU"] = (
        "auto"
    )
    param_dtype: Annotated[Literal["float32", "bfloat16"], "type of the parameters"] = "float32"

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError for what cannot be built, naming the field and what is allowed."""
        sizes = "classes image channels patch layers d_model heads mlp"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.image % self.patch:
            raise ValueError(f"model.patch={self.patch} must divide model.image={self.image}")
        if self.d_model % self.heads:
            raise ValueError(f"model.heads={self.heads} must divide model.d_model={self.d_model}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be in [0, 1)")

    def inputs(self, batch: dict[str, jax.ShapeDtypeStruct]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What `init` is traced with, one image of a batch of this kind."""
        images = batch["images"]
        return (jax.ShapeDtypeStruct((1, *images.shape[1:]), images.dtype),)

    def build(self, platform: str) -> "ViTTT":
        """The module, with `dtype='auto'` settled for `platform` (cpu, gpu, tpu)."""
        return ViTTT(dataclasses.replace(self, dtype=compute_dtype(self.dtype, platform)))


class ViTTTBlock(nn.Module):
    """A 3x3 depthwise convolution that tells positions, the mixer, an MLP: all residual."""

    config: Any
    deterministic: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"], _=None) -> tuple[Float[Array, "b t d"], None]:
        c = self.config
        d, kind, side = c.d_model, c.param_dtype, c.image // c.patch
        norm = lambda name: LayerNorm(1e-6, kind, name=name)  # noqa: E731
        drop = lambda y: nn.Dropout(c.dropout)(y, deterministic=self.deterministic)  # noqa: E731
        x = constrain(x, "batch", None, "act_embed")
        kernel = weight(self, "position", (d, 3, 3), ("embed", None, None), 0.1, kind)
        maps = depthwise(rearrange(x, "b (y x) d -> b y x d", y=side), kernel.astype(x.dtype))
        x = x + rearrange(maps, "b y x d -> b (y x) d")
        mixer = ViTTTMixer(
            d, c.heads, depth=c.layers, dtype=c.dtype, param_dtype=kind, name="mixer"
        )
        x = x + drop(mixer(norm("mixer_norm")(x), grid=(side, side)))
        up = linear(self, "w_up", (d, c.mlp), ("embed", "mlp"), d**-0.5, kind)
        std = (c.mlp * 2 * c.layers) ** -0.5
        down = linear(self, "w_down", (c.mlp, d), ("mlp", "embed"), std, kind)
        return x + drop(down(jax.nn.gelu(up(norm("mlp_norm")(x))))), None


class ViTTT(nn.Module):
    """Patches, blocks scanned over stacked parameters, the mean over tokens, logits in float32."""

    config: ViTTTConfig

    @nn.compact
    def __call__(
        self, images: Float[Array, "b y x *c"], deterministic: bool = True, features: bool = False
    ) -> Float[Array, "b v"]:
        """Logits of images (grey ones without their last axis), or with `features` the mean over tokens
        [b, d] that they are made of."""
        c, kind = self.config, self.config.param_dtype
        shape = (c.image, c.image, *((c.channels,) if c.channels > 1 else ()))
        if images.shape[1:] != shape:
            raise ValueError(f"images {images.shape} must be [b, {', '.join(map(str, shape))}]")
        images = images.reshape(-1, c.image, c.image, c.channels)
        x = rearrange(images, "b (y p) (x q) c -> b (y x) (p q c)", p=c.patch, q=c.patch)
        values = c.patch**2 * c.channels
        patches = linear(self, "patches", (values, c.d_model), (None, "embed"), values**-0.5, kind)
        x = patches(x.astype(c.dtype))
        blocks = nn.scan(
            ViTTTBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = blocks(c, deterministic, name="blocks")(x, None)
        x = jnp.mean(LayerNorm(1e-6, kind, name="norm")(x).astype(jnp.float32), 1)
        if features:
            return x
        std = c.d_model**-0.5
        logits = linear(self, "head", (c.d_model, c.classes), ("embed", None), std, kind)(x)
        return logits + constant(self, "bias", (c.classes,), 0.0, kind)
