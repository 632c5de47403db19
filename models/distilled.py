"""A student beside its teacher: a model configuration around another, its parameters
{"student": ..., "teacher": ...}. `optimizer.freeze=^teacher/` leaves the teacher as it is.
"""

import dataclasses
from typing import Any, NamedTuple

import jax

from models.dit import DiTConfig
from models.wrapped import Wrapped

FROZEN_TEACHER = "^teacher/"


@dataclasses.dataclass(frozen=True)
class Distilled(Wrapped):
    """Two denoisers of one shape; the student is the model, and the teacher what it learns from."""

    base: DiTConfig = dataclasses.field(default_factory=DiTConfig)

    @property
    def takes(self) -> str:
        """As the base."""
        return self.base.takes

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
