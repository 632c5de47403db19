"""The device mesh: five named axes, any of which may be 1."""

import dataclasses
import math
from typing import Annotated

AXES = ("data", "fsdp", "ring", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes; one of them may be -1 and takes the devices that are left."""

    data: Annotated[int, "replicas of the model (-1: all devices that are left)"] = -1
    fsdp: Annotated[int, "shards of the parameters; the batch is split over data and fsdp"] = 1
    ring: Annotated[int, "outer axis of two-level context parallelism"] = 1
    context: Annotated[int, "shards of the sequence"] = 1
    tensor: Annotated[int, "shards of heads, MLP width and vocabulary"] = 1

    def resolve(self, n_devices: int) -> "MeshShape":
        """Replaces -1 by what is left of `n_devices`; ValueError when the sizes cannot fit."""
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(f"mesh.{name}={size} must be >= 1, or -1 for what is left")
        free = [name for name, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ValueError(f"only one mesh axis may be -1, got {' and '.join(free)}")
        used = math.prod(size for size in sizes.values() if size != -1)
        if free:
            if n_devices % used:
                raise ValueError(
                    f"mesh axes {_spell(sizes)} need a multiple of {used} devices, "
                    f"there are {n_devices}; their product must be one of {_divisors(n_devices)}"
                )
            sizes[free[0]] = n_devices // used
        elif used > n_devices:
            raise ValueError(
                f"mesh {_spell(sizes)} needs {used} devices, there are {n_devices}; "
                f"use sizes whose product is at most {n_devices}"
            )
        return MeshShape(**sizes)

    @property
    def size(self) -> int:
        """Number of devices of a resolved shape."""
        return math.prod(dataclasses.astuple(self))


def _spell(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name}={size}" for name, size in sizes.items() if size != 1) or "1"


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def make_mesh(shape: MeshShape, devices=None):
    """A `jax.sharding.Mesh` with Auto axes named `AXES` over `devices` (default: all).

    A shape smaller than the machine uses the first devices, with a single process only.
    """
    import jax
    from jax.sharding import AxisType, Mesh

    devices = list(jax.devices() if devices is None else devices)
    shape = shape.resolve(len(devices))
    sizes = dataclasses.astuple(shape)
    if shape.size < len(devices) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {_spell(dataclasses.asdict(shape))} uses {shape.size} of {len(devices)} devices;"
            f" with several processes it must use them all (set one axis to -1)"
        )
    devices = devices[: shape.size]
    types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "tpu":
        from jax.experimental import mesh_utils

        return Mesh(mesh_utils.create_device_mesh(sizes, devices), AXES, axis_types=types)
    return jax.make_mesh(sizes, AXES, types, devices=devices)
