"""A multilayer perceptron that classifies rows or small images, and ensembles of any classifier.

A classifier maps a batch to logits; `deterministic=False` leaves its dropout on, which then asks for
the rng "dropout". `features=True` gives what its last layer, `head` and `bias`, is applied to instead.
"""

import dataclasses
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from models.layers import compute_dtype, constant, linear
from models.vittt import ViTTTConfig
from sharding.rules import constrain


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Shape of a perceptron; images are taken as rows of their pixels."""

    classes: Annotated[int, "classes to tell apart"] = 10
    features: Annotated[int, "values of an input"] = 64
    layers: Annotated[int, "hidden layers"] = 2
    d_model: Annotated[int, "width of a hidden layer"] = 64
    dropout: Annotated[float, "rate after every hidden layer"] = 0.0
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], "compute type; auto: f32 on CPU"] = (
        "auto"
    )
    param_dtype: Annotated[Literal["float32", "bfloat16"], "type of the parameters"] = "float32"

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError for what cannot be built, naming the field and what is allowed."""
        for name in ("classes", "features", "layers", "d_model"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout={self.dropout} must be in [0, 1)")

    def inputs(self, batch: dict[str, jax.ShapeDtypeStruct]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What `init` is traced with, one row of a batch of this kind."""
        rows = batch["images" if "images" in batch else "features"]
        return (jax.ShapeDtypeStruct((1, *rows.shape[1:]), rows.dtype),)

    def build(self, platform: str) -> "MLP":
        """The module, with `dtype='auto'` settled for `platform` (cpu, gpu, tpu)."""
        return MLP(dataclasses.replace(self, dtype=compute_dtype(self.dtype, platform)))


class MLP(nn.Module):
    """Hidden layers with ReLU and dropout, logits in float32."""

    config: MLPConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "b *f"], deterministic: bool = True, features: bool = False
    ) -> Float[Array, "b v"]:
        """Logits, or with `features` the last hidden layer [b, d], float32."""
        c, kind = self.config, self.config.param_dtype
        x = x.reshape(x.shape[0], -1).astype(c.dtype)
        if x.shape[1] != c.features:
            raise ValueError(f"inputs {x.shape} must have model.features={c.features} values a row")
        for i in range(c.layers):
            size, std = (x.shape[1], c.d_model), (2 / x.shape[1]) ** 0.5
            y = linear(self, f"hidden_{i}", size, (None, "embed"), std, kind)(x)
            y = y + constant(self, f"hidden_bias_{i}", (c.d_model,), 0.0, kind).astype(y.dtype)
            x = constrain(jax.nn.relu(y), "batch", "act_embed")
            x = nn.Dropout(c.dropout)(x, deterministic=deterministic)
        x = x.astype(jnp.float32)
        if features:
            return x
        std = c.d_model**-0.5
        logits = linear(self, "head", (c.d_model, c.classes), ("embed", None), std, kind)(x)
        return logits + constant(self, "bias", (c.classes,), 0.0, kind)


@dataclasses.dataclass(frozen=True)
class EnsembleConfig:
    """Members of one kind, each with an initialisation and dropout of its own, trained in one program.

    All see the same batches: what differs is where they start (Fort et al., 1912.02757).
    """

    base: Annotated[MLPConfig | ViTTTConfig, "a member"] = MLPConfig()
    members: Annotated[int, "how many; at least 2"] = 5

    @property
    def classes(self) -> int:
        """Classes of a member."""
        return self.base.classes

    @property
    def image(self) -> int | None:
        """Pixels a side that a member takes, None for rows."""
        return getattr(self.base, "image", None)

    @property
    def channels(self) -> int:
        """Values of a pixel that a member takes."""
        return getattr(self.base, "channels", 1)

    @property
    def features(self) -> int | None:
        """Values of a row that a member takes, None for images of a side."""
        return getattr(self.base, "features", None)

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError for what cannot be built, naming the field and what is allowed."""
        if self.members < 2:
            raise ValueError(f"model.members={self.members} must be at least 2")
        self.base.check(mesh_sizes)

    def inputs(self, batch: dict[str, jax.ShapeDtypeStruct]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What `init` is traced with, one row of a batch of this kind."""
        return self.base.inputs(batch)

    def build(self, platform: str) -> "Ensemble":
        """The module, with `dtype='auto'` settled for `platform` (cpu, gpu, tpu)."""
        return Ensemble(self.base.build(platform), self.members)


class Ensemble(nn.Module):
    """Logits [members, b, v] of as many modules as `base`, parameters stacked."""

    base: Any
    members: int

    @nn.compact
    def __call__(self, x: Float[Array, "b *f"], deterministic: bool = True):
        def one(member, x):
            return member(x, deterministic)

        every = nn.vmap(
            one,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=None,  # pyright: ignore[reportArgumentType]
            axis_size=self.members,
            metadata_params={nn.PARTITION_NAME: "members"},
        )
        return every(self.base, x)
