"""Accelerators by name: published figures, and TPU slices described without having one."""

import difflib
import importlib.util
import math
import re
from typing import Any, NamedTuple

GIB = 1 << 30


class Chip(NamedTuple):
    """Published dense figures of one JAX device: half a chip on TPU7x, a whole chip elsewhere."""

    name: str
    hbm_bytes: float
    hbm_bandwidth: float  # bytes/s
    bf16_flops: float  # FLOP/s
    f32_flops: float  # FLOP/s of float32 inputs at JAX's default precision: bf16 (TPU) or TF32
    link_bandwidth: float = 0.0  # bytes/s one way of one inter-chip link; 0: no torus
    dims: int = 0  # dimensions of the torus
    max_chips: int = 0  # largest slice
    per_chip: int = 1  # JAX devices a chip
    usable_bytes: float = 0.0  # of the HBM, what the TPU compiler gives to a program


# Sources: cloud.google.com/tpu/docs pages v4, v5e, v5p, v6e and tpu7x (bidirectional interconnect
# bandwidth a chip / number of links / 2); NVIDIA data sheets of the A100, H100 and H200.
# usable_bytes is the limit that libtpu 0.0.42 names when a program is too large.
CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", 32 * GIB, 1228e9, 275e12, 275e12, 50e9, 3, 4096, 1, 30.75 * GIB),
    "v5e": Chip("TPU v5e", 16 * GIB, 819e9, 197e12, 197e12, 50e9, 2, 256, 1, 15.75 * GIB),
    "v5p": Chip("TPU v5p", 95 * GIB, 2765e9, 459e12, 459e12, 100e9, 3, 6144, 1, 95.74 * GIB),
    "v6e": Chip("TPU v6e", 32 * GIB, 1600e9, 918e12, 918e12, 100e9, 2, 256, 1, 31.25 * GIB),
    "tpu7x": Chip("TPU7x", 96 * GIB, 3690e9, 1153.5e12, 1153.5e12, 100e9, 3, 9216, 2, 94.75 * GIB),
    "A100 40GB": Chip("A100 40GB", 40e9, 1555e9, 312e12, 156e12),
    "A100 80GB": Chip("A100 80GB", 80e9, 2039e9, 312e12, 156e12),
    "A100 80GB PCIe": Chip("A100 80GB PCIe", 80e9, 1935e9, 312e12, 156e12),
    "H100": Chip("H100 SXM", 80e9, 3350e9, 989e12, 494.5e12),
    "H100 PCIe": Chip("H100 PCIe", 80e9, 2000e9, 756e12, 378e12),
    "H100 NVL": Chip("H100 NVL", 94e9, 3900e9, 835e12, 417.5e12),
    "H200": Chip("H200 SXM", 141e9, 4800e9, 989e12, 494.5e12),
    "H200 NVL": Chip("H200 NVL", 141e9, 4800e9, 835e12, 417.5e12),
}
TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")

# Whole device_kind strings, so that an H20, a GH200 or a MIG slice is not taken for another GPU.
_KINDS = {
    r"TPU v4": "v4",
    r"TPU v5 lite|TPU v5e": "v5e",
    r"TPU v5|TPU v5p": "v5p",
    r"TPU v6 lite|TPU v6e": "v6e",
    r"TPU7x|TPU v7x?": "tpu7x",
    r"(NVIDIA )?A100-(SXM4|SXM|PCIE)-40GB": "A100 40GB",
    r"(NVIDIA )?A100-SXM4?-80GB": "A100 80GB",
    r"(NVIDIA )?A100(-PCIE-80GB| 80GB PCIe)": "A100 80GB PCIe",
    r"(NVIDIA )?H100( 80GB HBM3| SXM5?)?": "H100",
    r"(NVIDIA )?H100 PCIe": "H100 PCIe",
    r"(NVIDIA )?H100 NVL": "H100 NVL",
    r"(NVIDIA )?H200( SXM5?)?": "H200",
    r"(NVIDIA )?H200 NVL": "H200 NVL",
}
_PLANE = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


class Topology(NamedTuple):
    """A TPU slice: `shape` counts chips along the torus axes, `devices` what JAX will show."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    devices: int


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind `jax.Device.device_kind`; None when it is not in the table (a CPU, say)."""
    for pattern, name in _KINDS.items():
        if re.fullmatch(pattern, device_kind, re.IGNORECASE):
            return CHIPS[name]
    return None


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Published dense FLOP/s of one device for matmuls of `dtype`; None when unknown.

    `dtype` is a name: bfloat16, float16, float32, or auto (bfloat16 on accelerators). float32 is
    meant at JAX's default matmul precision, which is one bfloat16 pass on TPUs and TF32 on the GPUs
    listed; under `jax_default_matmul_precision='highest'` a utilisation computed from it is too low.
    float16 is unknown on TPUs. CPUs are unknown: their rate is not a property of their name.
    """
    chip = chip_of(device_kind)
    if chip is None:
        return None
    rates = {"bfloat16": chip.bf16_flops, "auto": chip.bf16_flops, "float32": chip.f32_flops}
    if not chip.dims:
        rates["float16"] = chip.bf16_flops
    return rates.get(dtype)


def tpu_aot_environment() -> dict[str, str]:
    """Environment for compiling with libtpu where there is no TPU; set it before importing jax.

    JAX itself runs on the CPU; libtpu neither asks the cloud's metadata server nor takes its lock.
    """
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }


def parse_topology(name: str) -> Topology:
    """'v5p:2x2x2' as a Topology; ValueError naming the nearest slices that exist.

    v5e and v6e come as 2-D slices up to 16x16, v4, v5p and tpu7x as 3-D ones: 2x2x1, 2x2x2, 2x2x4,
    2x4x4, or three multiples of 4 in ascending order.
    """
    kind, colon, text = name.strip().lower().partition(":")
    if kind not in TPUS:
        near = (
            difflib.get_close_matches(
                kind.split("-")[0].replace("litepod", "e"), TPUS, n=2, cutoff=0.4
            )
            or TPUS
        )
        examples = [_nearest(CHIPS[k], k, 8)[0] for k in near]
        raise ValueError(
            f"topology {name!r}: no TPU named {kind!r} (there are {', '.join(TPUS)}); "
            f"write CHIP:SHAPE, for example {' or '.join(examples)}"
        )
    chip = CHIPS[kind]
    sizes = text.split("x")
    well_formed = bool(colon) and all(size.isdigit() for size in sizes)
    shape = tuple(int(size) for size in sizes) if well_formed else ()
    if shape not in _shapes(chip):
        wanted = min(max(math.prod(shape), 1), chip.max_chips)
        near = _nearest(chip, kind, wanted if shape else 8)
        raise ValueError(
            f"topology {name!r}: {chip.name} slices have {chip.dims} sizes in chips, "
            f"smallest first, up to {chip.max_chips} chips; nearest: {', '.join(near)}"
        )
    return Topology(f"{kind}:{text}", chip, shape, math.prod(shape) * chip.per_chip)


def _shapes(chip: Chip) -> list[tuple[int, ...]]:
    if chip.dims == 2:
        return list(_PLANE)
    fours = range(4, chip.max_chips // 16 + 1, 4)
    cubes = []
    for a in fours:
        for b in range(a, chip.max_chips // (a * a) + 1, 4):
            cubes += [(a, b, c) for c in range(b, chip.max_chips // (a * b) + 1, 4)]
    return [*_SMALL_CUBES, *cubes]


def _nearest(chip: Chip, kind: str, chips: int) -> list[str]:
    """Three slices of about `chips` chips, nearest first and the more cubic first."""
    order = sorted(
        _shapes(chip), key=lambda s: (abs(math.log(math.prod(s) / chips)), max(s) / min(s))
    )
    return [f"{kind}:{'x'.join(map(str, shape))}" for shape in order[:3]]


def topology_devices(name: str) -> list[Any]:
    """The devices of TPU slice `name`, good for meshes, lowering and compiling, not for running.

    ValueError for an unknown slice, before libtpu is touched; ImportError without libtpu. The
    process needs `tpu_aot_environment()` in its environment, set before jax was imported.
    """
    slice_ = parse_topology(name)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"compiling for {name} needs the TPU compiler: pip install 'jaxlab[tpu-aot]' (no TPU needed)"
        )
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if slice_.chip.name == "TPU v4":
        # Two cores act as one device on real v4 machines; the compiler's default is two devices.
        options["chip_config_name"] = "megacore"
    if math.prod(slice_.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    description = topologies.get_topology_desc(platform="tpu", topology_name=slice_.name, **options)
    return list(description.devices)
