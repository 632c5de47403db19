"""What a model configuration around another leaves to it."""

from typing import Any

import jax
import numpy as np


class Wrapped:
    """Beside a field `base`: the base's sizes, inputs and checks, its fields named `model.base.*`."""

    base: Any

    @property
    def vocab(self) -> int:
        """Vocabulary of the base."""
        return self.base.vocab

    @property
    def dtype(self) -> str:
        """Compute type of the base."""
        return self.base.dtype

    def check(self, mesh_sizes: dict[str, int]) -> None:
        """ValueError for what cannot be built, naming the field and what is allowed."""
        self._of_base(self.base.check, mesh_sizes)

    def order(
        self, mesh_sizes: dict[str, int], length: int, platform: str = "", packed: bool = True
    ) -> np.ndarray | None:
        """As the base's."""
        return self._of_base(self.base.order, mesh_sizes, length, platform, packed)

    def inputs(self, batch: dict[str, jax.ShapeDtypeStruct]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """As the base's."""
        return self.base.inputs(batch)

    def _of_base(self, call, *args) -> Any:
        """`call(*args)`, fields named as they are here in its errors."""
        try:
            return call(*args)
        except ValueError as error:
            raise ValueError(str(error).replace("model.", "model.base.")) from None
