"""Weights of Llama and Qwen3 from and to Hugging Face directories, shard by shard.

Reading, each device's part of a parameter is assembled from slices of the files in memory the device
then owns: the host holds the model once, whatever the mesh. Writing, one file of bounded size is held
at a time.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.paths import flatten, unflatten
from models.decoder import DecoderConfig
from models.hf_names import Entry, decoder_config, entries, hf_config
from models.json_object import read_json

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


def safetensors() -> Any:
    """The library; ImportError that says how to install it."""
    try:
        import safetensors as library
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("Hugging Face directories need: pip install 'jaxlab[hf]'") from error
    return library


class Directory:
    """A checkpoint folder, verified when opened: configuration, and where each tensor lies.

    FileNotFoundError or ValueError, before anything is allocated, for what cannot be read: one error
    lists every missing, unexpected and misshapen tensor.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        path = self.folder / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no Hugging Face directory: it has no config.json")
        self.json = read_json(path)
        try:
            self.config = decoder_config(self.json)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        self.found = self._scan()
        self._verify()

    def _scan(self) -> dict[str, tuple[Path, tuple[int, ...], str]]:
        """{tensor: (file, shape, type)} of every file, from their headers."""
        index = self.folder / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            names: list[Any] = [*weight_map.values()] if isinstance(weight_map, dict) else [None]
            if strange := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
                raise ValueError(
                    f"{index}: weight_map must name files of the folder, not {strange[0]}"
                )
            files = [self.folder / name for name in sorted(set(names))]
            if gone := [str(f.name) for f in files if not f.is_file()]:
                raise FileNotFoundError(f"{index} names files that are not there: {gone}")
            if (self.folder / SINGLE).is_file() and SINGLE not in names:
                raise ValueError(f"{self.folder} has both {SINGLE} and {INDEX}: take one away")
        else:
            files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{self.folder} has no *.safetensors file")
        found = {}
        for file in files:
            try:
                with safetensors().safe_open(str(file), framework="np") as handle:
                    for name in handle.keys():  # noqa: SIM118  (the handle is no mapping)
                        if name in found:
                            twice = f"{found[name][0].name} and {file.name}"
                            raise ValueError(f"{self.folder}: {name} is in two files, {twice}")
                        part = handle.get_slice(name)
                        found[name] = (file, tuple(part.get_shape()), part.get_dtype())
            except safetensors().SafetensorError as error:
                raise ValueError(f"{file} is no safetensors file: {error}") from error
        return found

    def _verify(self) -> None:
        wanted = {name: e.hf_shape for e in entries(self.config) for name in e.names}
        # A tied head may be stored a second time; rotary frequencies once were.
        spare = {"lm_head.weight"} if self.config.tied else set()
        problems = [f"{n} is missing" for n in wanted if n not in self.found]
        for name, (_, shape, dtype) in self.found.items():
            if name not in wanted:
                if name not in spare and not name.endswith("rotary_emb.inv_freq"):
                    problems.append(f"{name} is not expected")
            elif shape != wanted[name]:
                problems.append(f"{name} has shape {shape}, expected {wanted[name]}")
            elif dtype not in DTYPES:
                problems.append(f"{name} has type {dtype}, supported are {list(DTYPES)}")
        if problems:
            lines = "\n  ".join(problems)
            raise ValueError(
                f"{self.folder} does not hold the model of its config.json:\n  {lines}"
            )
        if self.config.tied and "lm_head.weight" in self.found and not self._head_is_embedding():
            raise ValueError(
                f"{self.folder}: tie_word_embeddings is true, but lm_head.weight is not the embedding"
            )

    def _head_is_embedding(self) -> bool:
        names = ("lm_head.weight", EMBEDDING)
        if self.found[names[0]][1] != self.found[names[1]][1]:
            return False
        for start in range(0, self.config.vocab, 4096):  # rows, to hold little
            rows = (slice(start, min(start + 4096, self.config.vocab)),)
            if not np.array_equal(self.read(names[0], rows), self.read(names[1], rows)):
                return False
        return True

    @property
    def dtype(self) -> str:
        """bfloat16 where every matrix is; else float32, which holds all types exactly."""
        kinds = {self.found[n][2] for e in entries(self.config) if e.sides for n in e.names}
        kinds.add(self.found[EMBEDDING][2])
        return "bfloat16" if kinds == {"BF16"} else "float32"

    @property
    def parameters(self) -> int:
        """Number of values."""
        return sum(math.prod(e.shape) for e in entries(self.config))

    @property
    def max_positions(self) -> int | None:
        """Length the model was made for, where config.json says it."""
        return self.json.get("max_position_embeddings")

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A slice of one tensor. The file is opened for it alone, so that no page stays mapped."""
        with safetensors().safe_open(str(self.found[name][0]), framework="np") as handle:
            return handle.get_slice(name)[index]


def load(directory: Directory, abstract: dict[str, Any]) -> dict[str, Any]:
    """Parameters placed as `abstract` (shapes, types, shardings) asks, read from the files.

    Every process reads what its own devices hold, once for replicas.
    """
    flat, out = flatten(abstract), {}
    for entry in entries(directory.config):
        leaf = flat[entry.path]

        made: dict[tuple, np.ndarray] = {}

        def part(index, entry=entry, dtype=leaf.dtype, made=made):
            key = tuple((s.start, s.stop) for s in index)
            if key not in made:
                made[key] = _assemble(directory, entry, index, dtype)
            return made[key]

        out[entry.path] = jax.make_array_from_callback(leaf.shape, leaf.sharding, part)
    return unflatten(out)


def _assemble(directory: Directory, entry: Entry, index, dtype) -> np.ndarray:
    """The part `index` of a parameter of ours, layer by layer."""
    spans = [range(size)[i] for i, size in zip(index, entry.shape, strict=True)]
    out = _aligned(tuple(map(len, spans)), np.dtype(dtype))
    if not entry.stacked:
        out[...] = _matrix(directory, entry, entry.names[0], spans)
    else:
        for row, layer in enumerate(spans[0]):
            out[row] = _matrix(directory, entry, entry.names[layer], spans[1:])
    return out


def _matrix(directory: Directory, entry: Entry, name: str, spans: list[range]) -> np.ndarray:
    """A part of one layer in our layout: whole rows of the leading axis of each side are read."""
    if entry.sides is None:
        return directory.read(name, tuple(slice(s.start, s.stop) for s in spans))
    shape = entry.shape[entry.stacked :]
    n = entry.sides.inputs
    sides = []
    for axes in (range(n, len(shape)), range(n)):
        width = math.prod(shape[a] for a in axes[1:])
        lead = spans[axes[0]]
        inner = [slice(spans[a].start, spans[a].stop) for a in axes[1:]]
        sides.append((slice(lead.start * width, lead.stop * width), len(lead), axes, inner))
    (rows, many_out, out_axes, inner_out), (cols, many_in, in_axes, inner_in) = sides
    block = directory.read(name, (rows, cols))
    block = block.reshape(
        many_out, *(shape[a] for a in out_axes[1:]), many_in, *(shape[a] for a in in_axes[1:])
    )
    block = block[(slice(None), *inner_out, slice(None), *inner_in)]
    return np.moveaxis(block, range(len(out_axes)), range(n, len(shape)))


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that a CPU device takes over without a copy: 64-byte aligned."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def tensors(
    params: Mapping[str, Any], config: DecoderConfig
) -> Iterator[tuple[str, Entry, Callable[[], np.ndarray]]]:
    """(name, its entry, function that fetches it in their layout) of every tensor, layer by layer."""
    flat = flatten(dict(params))
    for entry in entries(config):
        for layer, name in enumerate(entry.names):

            def fetch(entry=entry, layer=layer):
                leaf = flat[entry.path]
                value = np.asarray(leaf[layer] if entry.stacked else leaf)
                if entry.sides is not None:
                    n = entry.sides.inputs
                    value = value.reshape(math.prod(value.shape[:n]), -1).T
                return np.ascontiguousarray(value)

            yield name, entry, fetch


def save(
    params: Mapping[str, Any],
    config: DecoderConfig,
    folder: Path | str,
    *,
    dtype: str | None = None,
    shard_bytes: int = 4 * 2**30,
    max_positions: int = 32_768,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json and the weights, in files of at most `shard_bytes` (and one tensor at least).

    `dtype` None keeps the type of the parameters; `extra` has further fields of config.json, where
    those of the decoder win. ValueError, before anything is written, for a folder
    that is not empty, for parameters that are not the configuration's or for a decoder without a form
    there.
    """
    folder = Path(folder)
    refuse_occupied(folder)
    flat = flatten(dict(params))
    shapes = {e.path: e.shape for e in entries(config)}
    wrong = [f"{p} is missing" for p in shapes if p not in flat]
    wrong += [f"{p} is not expected" for p in flat if p not in shapes]
    wrong += [
        f"{p} has shape {flat[p].shape}, expected {s}"
        for p, s in shapes.items()
        if p in flat and flat[p].shape != s
    ]
    if wrong:
        raise ValueError("the parameters are not those of the model:\n  " + "\n  ".join(wrong))
    kind = jnp.dtype(dtype or flat["embedding"].dtype)
    shards: list[list[tuple[str, Any]]] = [[]]
    held = 0
    for name, entry, fetch in tensors(params, config):
        size = math.prod(entry.hf_shape) * kind.itemsize
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((name, fetch))
        held += size
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    total = sum(math.prod(s) for s in shapes.values()) * kind.itemsize
    for i, shard in enumerate(shards, 1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        arrays = {name: fetch().astype(kind) for name, fetch in shard}
        write_tensors(arrays, folder / file)
        weight_map |= dict.fromkeys(arrays, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write(folder / INDEX, index)
    # `dtype` would be a second name of torch_dtype.
    besides = {k: v for k, v in (extra or {}).items() if k not in ("dtype", "_name_or_path")}
    _write(folder / "config.json", besides | hf_config(config, kind.name, max_positions))


def write_tensors(arrays: dict[str, np.ndarray], path: Path) -> None:
    """A safetensors file; OSError when the disk does not take it."""
    try:
        safetensors().numpy.save_file(arrays, str(path), metadata={"format": "pt"})
    except safetensors().SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error


def refuse_occupied(folder: Path) -> None:
    """ValueError when `folder` is a file, or a folder with something in it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: give another folder, nothing was touched")


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
