"""Fine-tuning by low-rank adapters: a model configuration around another, its parameters
{"base": ..., "lora": ...}. `optimizer.freeze=^base/` leaves the base as it is.

`jaxlab/lora.py` has the transformations of parameter trees, re-exported here.
"""

import dataclasses
import re
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxlab.lora import (
    Sides,
    lora_delta,
    lora_init,
    lora_merge,
    lora_num_params,
    lora_product,
    lora_scale,
    lora_stack,
    lora_unmerge,
)
from jaxlab.paths import flatten
from models.decoder import Decoder, DecoderConfig
from models.wrapped import Wrapped

__all__ = [
    "Lora",
    "LoraModule",
    "Sides",
    "lora_delta",
    "lora_init",
    "lora_merge",
    "lora_num_params",
    "lora_product",
    "lora_scale",
    "lora_stack",
    "lora_unmerge",
    "merged",
    "sides_of",
]

FROZEN_BASE = "^base/"


@dataclasses.dataclass(frozen=True)
class Lora(Wrapped):
    """A decoder with low-rank adapters on the matrices whose paths `targets` finds."""

    base: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)
    rank: Annotated[int, "of the adapters"] = 8
    alpha: Annotated[float, "the adapter counts alpha / rank"] = 16.0
    targets: Annotated[str, "regular expression of the paths of adapted matrices"] = "/w[qv]$"
    init: Annotated[Literal["normal", "kaiming"], "of A; B is zero"] = "normal"
    lora_dtype: Annotated[Literal["float32", "bfloat16"], "type of the adapters"] = "float32"

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError for what cannot be built, naming the field and what is allowed."""
        super().check(mesh_sizes)
        if self.rank < 1:
            raise ValueError(f"model.rank={self.rank} must be at least 1")
        if self.rank > self.base.d_model:
            raise ValueError(
                f"model.rank={self.rank} must be at most model.base.d_model={self.base.d_model}"
            )
        if not self.alpha > 0:
            raise ValueError(f"model.alpha={self.alpha} must be positive")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(f"model.targets={self.targets!r}: {error}") from error

    def build(self, platform: str) -> "LoraModule":
        """The base's module with adapters."""
        return LoraModule(self, self.base.build(platform))


class LoraModule(NamedTuple):
    """`init` and `apply` as a Flax module has them; the adapters apply in their low-rank form."""

    config: Lora
    base: Decoder

    @property
    def unrolled(self) -> bool:
        """Whether the base's blocks are a loop."""
        return self.base.unrolled

    def init(self, key: jax.Array, *args, **kwargs) -> dict[str, Any]:
        """{"params": {"base", "lora"}}, boxed with logical axis names as Flax's are."""
        base: Any = self.base.init(key, *args, **kwargs)["params"]
        return {"params": {"base": base, "lora": self.adapters(jax.random.fold_in(key, 1), base)}}

    def adapters(self, key: jax.Array, boxed: dict[str, Any]) -> dict[str, Any]:
        """Fresh adapters, boxed, of base parameters that are boxed.

        ValueError when `targets` finds no parameter or one that is not a matrix.
        """
        c, plain = self.config, nn.unbox(boxed)
        names = {p: _names(box) for p, box in flatten(boxed).items()}

        def target(path, leaf):
            return re.search(c.targets, path) is not None and sides_of(names[path], path)

        try:
            lora = lora_init(
                key, plain, rank=c.rank, target=target, dtype=jnp.dtype(c.lora_dtype), init=c.init
            )
        except ValueError as error:
            raise ValueError(f"model.targets={c.targets!r}: {error}") from error

        def box(path, leaf):
            *path, side = [part.key for part in path]
            axes = names["/".join(path)]
            stack, inputs = sides_of(axes, "/".join(path))
            cut = stack + inputs
            logical = (*axes[:cut], None) if side == "a" else (*axes[:stack], None, *axes[cut:])
            return nn.LogicallyPartitioned(leaf, logical)

        return jax.tree_util.tree_map_with_path(box, lora)

    def apply(self, variables: dict[str, Any], *args, **kwargs) -> Any:
        """As the base's, with `variables["params"]` = {"base", "lora"}."""
        params = variables["params"]
        lora = lora_scale(params["lora"], alpha=self.config.alpha)
        return self.base.apply(
            variables | {"params": params["base"], "lora": lora}, *args, **kwargs
        )


def merged(model: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(model configuration, parameters) of equal outputs without adapters; other models as they are."""
    if not isinstance(model, Lora):
        return model, params
    return model.base, lora_merge(params["base"], params["lora"], alpha=model.alpha)


def _names(box: Any) -> tuple[str | None, ...]:
    """Logical axis names of a boxed parameter."""
    return tuple(box.names) if isinstance(box, nn.Partitioned) else (None,) * box.ndim


def sides_of(axes: tuple[str | None, ...], path: str = "weight") -> Sides:
    """How a parameter of these logical axes is a matrix: `embed` is one side, what is left the other.

    ValueError for norms and look-up tables.
    """
    stack = int(axes[0] == "layers")
    rest = axes[stack:]
    if len(rest) < 2 or "embed" not in rest:
        raise ValueError(f"{path} with axes {axes} is not a matrix from or to the residual stream")
    inputs = 1 if rest[0] == "embed" else rest.index("embed")
    return Sides(stack, inputs)
