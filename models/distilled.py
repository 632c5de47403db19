"""A student beside its teacher: a model configuration around another, its parameters
{"student": ..., "teacher": ...}. `optimizer.freeze=^teacher/` leaves the teacher as it is.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

from models.dit import DiTConfig

FROZEN_TEACHER = "^teacher/"


@dataclasses.dataclass(frozen=True)
class Distilled:
    """Two denoisers of one shape; the student is the model, and the teacher what it learns from."""

    base: DiTConfig = dataclasses.field(default_factory=DiTConfig)

    @property
    def vocab(self) -> int:
        """Vocabulary of both."""
        return self.base.vocab

    @property
    def cond(self) -> int:
        """Width of the noise level's embedding of both."""
        return self.base.cond

    @property
    def dtype(self) -> str:
        """Compute type of both."""
        return self.base.dtype

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError for what cannot be built, naming the field and what is allowed."""
        self._of_base(self.base.check, mesh_sizes)

    def order(self, mesh_sizes: dict[str, int], length: int) -> np.ndarray | None:
        """As the base's."""
        return self._of_base(self.base.order, mesh_sizes, length)

    def _of_base(self, call, *args) -> Any:
        """`call(*args)`, fields named as they are here in its errors."""
        try:
            return call(*args)
        except ValueError as error:
            raise ValueError(str(error).replace("model.", "model.base.")) from None

    def inputs(self, batch: dict[str, jax.ShapeDtypeStruct]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """As the base's."""
        return self.base.inputs(batch)

    def build(self, platform: str) -> "DistilledModule":
        """The base's module, for two sets of parameters."""
        return DistilledModule(self.base.build(platform))


class DistilledModule(NamedTuple):
    """`init` and `apply` as a Flax module has them."""

    base: Any

    def init(self, key: jax.Array, *args, **kwargs) -> dict[str, Any]:
        """Boxed parameters, the same for both."""
        both = self.base.init(key, *args, **kwargs)["params"]
        return {"params": {"student": both, "teacher": both}}

    def apply(self, variables: dict[str, Any], *args, who: str = "student", **kwargs) -> Any:
        """The base applied with the parameters of `who`, student or teacher."""
        return self.base.apply({"params": variables["params"][who]}, *args, **kwargs)
