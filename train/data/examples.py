"""Labelled examples in files: folders of images, Parquet, ArrayRecord of tf.train.Example.

Every file gives `Found`: the labels of its examples, read at once, and a way to read example i. Errors
name the file, and the row where there is one.
"""

import functools
import io
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from train.data.readers import find_files, open_array_record, open_parquet

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm")
TABLES = (".parquet", ".array_record")


class Found(NamedTuple):
    """What a file, or a folder of images, holds."""

    where: Callable[[int], str]
    labels: list[Any]  # texts or integers
    read: Callable[[int], Any]  # bytes of an image, or an array of numbers


def find_images(pattern: str, column: str, label: str, field: str) -> Iterator[Found]:
    """Images of a folder with a folder for each class, or of the tables that match a path or glob.

    `field` is what errors call the argument. FileNotFoundError where there is nothing, ValueError for
    what cannot be read.
    """
    folder = epath.Path(pattern).expanduser()
    if not folder.is_dir() or any(f.name.endswith(TABLES) for f in folder.iterdir()):
        for file in find_files(pattern, TABLES, field):
            yield _table(file, label, lambda names: image_column(names, column, label), True)
        return
    files, labels = [], []
    classes = (f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    for each in sorted(classes, key=lambda f: f.name):
        inside = sorted(f for f in each.iterdir() if f.name.lower().endswith(PICTURES))
        if not inside:
            deeper = any(f.is_dir() for f in each.iterdir())
            hint = f"; it holds folders: is {field}={each} meant?" if deeper else ""
            raise ValueError(
                f"{field}: {each} holds no image; {pattern!r} must have a folder of images "
                f"({', '.join(PICTURES)}) for each class{hint}"
            )
        files += inside
        labels += [each.name] * len(inside)
    if not files:
        raise FileNotFoundError(
            f"{field}: {pattern!r} must hold a folder of images for each class, or "
            f"{' or '.join(TABLES)} files"
        )
    yield Found(lambda i: str(files[i]), labels, lambda i: files[i].read_bytes())


def find_rows(pattern: str, columns: tuple[str, ...], label: str, field: str) -> Iterator[Found]:
    """Rows of numbers of the tables that match a path, folder or glob; () is every other column.

    Errors as in `find_images`.
    """
    for file in find_files(pattern, TABLES, field):
        yield _table(file, label, lambda names: columns or _others(names, label), False)


def _others(names: list[str], label: str) -> list[str]:
    return [name for name in names if name != label]


def image_column(names: list[str], column: str, label: str) -> list[str]:
    """The column of images: the one that was named, or the only one beside the label."""
    others = _others(names, label)
    if not column and len(others) == 1:
        return others
    return [column or "image"]


def _table(file: epath.Path, label: str, choose: Callable, images: bool) -> Found:
    reader = _array_record if file.name.endswith(".array_record") else _parquet
    return reader(file, label, choose, images)


def _parquet(file: epath.Path, label: str, choose: Callable, images: bool) -> Found:
    with file.open("rb") as raw:
        table = open_parquet(raw, file)
        names = table.schema_arrow.names
        chosen = list(choose(names))
        check_names(file, names, [label, *chosen])
        try:
            read = table.read(columns=[label, *chosen])
        except (OSError, ValueError) as error:  # of Arrow, which does not know the file
            raise ValueError(f"{file}: cannot be read: {error}") from error
    labels = read.column(label).to_pylist()
    where = lambda i: f"{file}:{i}"  # noqa: E731
    if images:
        column = read.column(chosen[0])
        kind = str(column.type)
        # The data sets of Hugging Face keep an image as {bytes, path}.
        inner = kind.startswith("struct") and "bytes: binary" in kind
        if not inner and kind not in ("binary", "large_binary"):
            raise ValueError(
                f"{file}: source.column={chosen[0]!r} is {kind}; it must hold the bytes of images"
            )
        pick = (lambda x: (x or {}).get("bytes")) if inner else lambda x: x
        return Found(where, labels, lambda i: pick(column[i].as_py()))
    parts = []
    for name in chosen:
        column = read.column(name)
        plain = column.to_numpy()
        values = plain[:, None] if plain.dtype.kind in "fiub" else column.to_pylist()
        parts.append(_numbers(values, f"{file}: column {name!r} ({column.type})"))
    rows = np.concatenate(parts, 1) if parts else np.zeros((len(labels), 0), np.float32)
    return Found(where, labels, lambda i: rows[i])


def _numbers(values: Any, what: str) -> np.ndarray:
    """[rows, values] of a column of numbers, or of lists of as many numbers each.

    float32, or float64 where that would round them: a large mean would hide the differences.
    """
    found = values
    if not isinstance(values, np.ndarray):
        try:
            found = np.asarray([[np.nan] if v is None else np.ravel(v) for v in values])
        except ValueError:
            raise ValueError(f"{what} must hold lists of one length") from None
    if len(found) and found.dtype.kind not in "fiub":
        raise ValueError(f"{what} must hold numbers: name those that do in source.columns")
    wide = np.result_type(found.dtype, np.float32)
    return found.reshape((len(values), -1) if len(values) else (0, 1)).astype(wide)


def _array_record(file: epath.Path, label: str, choose: Callable, images: bool) -> Found:
    reader, count = open_array_record(file)

    def record(i: int) -> dict[str, list]:
        try:
            return parse_example(reader.read([i])[0])
        except ValueError as error:
            raise ValueError(f"{file}:{i}: {error}") from None

    def values(example: dict[str, list], i: int) -> Any:
        names = sorted(example)
        chosen = list(choose(names))
        check_names(f"{file}:{i}", names, [label, *chosen])
        if images:
            found = example[chosen[0]]
            return found[0] if len(found) == 1 and isinstance(found[0], bytes) else None
        found = [_numbers([example[n]], f"{file}:{i}: feature {n!r}")[0] for n in chosen]
        return np.concatenate(found) if found else np.zeros(0, np.float32)

    labels, rows = [], []
    for i in range(count):
        example = record(i)
        got = values(example, i)
        labels += example[label] if len(example[label]) == 1 else [None]
        if not images:
            rows.append(got)
    labels = [x.decode(errors="replace") if isinstance(x, bytes) else x for x in labels]
    read = (lambda i: values(record(i), i)) if images else lambda i: rows[i]
    return Found(lambda i: f"{file}:{i}", labels, read)


def check_names(where: Any, names: list[str], wanted: list[str]) -> None:
    """ValueError, with what there is, unless all that is wanted is among `names`."""
    for field, name in zip(["label", *["column"] * len(wanted)], wanted, strict=False):
        if names.count(name) > 1:
            raise ValueError(f"{where}: there are {names.count(name)} columns {name!r}")
        if name not in names:
            raise ValueError(f"{where}: no source.{field}={name!r}; it has {names}")


def parse_example(record: bytes) -> dict[str, list]:
    """The features of a serialised tf.train.Example, by name; ValueError for other bytes."""
    kind, wrong = _example_type()
    example = kind()
    try:
        example.ParseFromString(record)
    except wrong as error:
        raise ValueError(f"not a tf.train.Example: {error}") from None
    return {
        entry.key: list(getattr(entry.value, entry.value.WhichOneof("kind") or "bytes_list").value)
        for entry in example.features.feature
    }


@functools.lru_cache
def _example_type() -> tuple[Any, type[Exception]]:
    """The message tf.train.Example, declared here so that TensorFlow is not needed, and its error."""
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory
    except ImportError as error:
        raise ImportError("reading tf.train.Example needs: pip install 'jaxlab[data]'") from error

    field = descriptor_pb2.FieldDescriptorProto
    package = "jaxlab.example"
    file = descriptor_pb2.FileDescriptorProto(
        name="jaxlab_example.proto", package=package, syntax="proto3"
    )

    def declare(name: str, *fields: tuple, oneof: str = "") -> None:
        new = file.message_type.add(name=name)
        for number, (key, kind, repeated) in enumerate(fields, 1):
            one = new.field.add(name=key, number=number)
            one.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if isinstance(kind, str):
                one.type, one.type_name = field.TYPE_MESSAGE, f".{package}.{kind}"
            else:
                one.type = kind
            if oneof:
                one.oneof_index = 0
        if oneof:
            new.oneof_decl.add(name=oneof)

    lists = {"Bytes": field.TYPE_BYTES, "Float": field.TYPE_FLOAT, "Int64": field.TYPE_INT64}
    for name, kind in lists.items():
        declare(f"{name}List", ("value", kind, True))
    declare("Feature", *((f"{n.lower()}_list", f"{n}List", False) for n in lists), oneof="kind")
    # A map is, on the wire, a repeated message of key and value.
    declare("Entry", ("key", field.TYPE_STRING, False), ("value", "Feature", False))
    declare("Features", ("feature", "Entry", True))
    declare("Example", ("features", "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = pool.FindMessageTypeByName(f"{package}.Example")
    return message_factory.GetMessageClass(found), message.DecodeError


def decode_image(raw: Any, side: int, channels: int, where: str) -> np.ndarray:
    """float32 [side, side] of 0 to 1, or [side, side, 3]: the largest central square, resized."""
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("reading images needs: pip install 'jaxlab[data]'") from error
    if not isinstance(raw, bytes):
        raise ValueError(f"{where}: there is no image")
    try:
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(raw)))
        if image.mode.startswith(("I", "F")):
            raise OSError(f"pixels of mode {image.mode!r}; 8 bits a value are read")
        image = image.convert("L" if channels == 1 else "RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{where}: not an image that can be read: no known format") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: not an image that can be read: {error}") from error
    if image.size != (side, side):
        least = min(image.size)
        left, top = ((n - least) // 2 for n in image.size)
        # Cut first: a resize of a box looks at pixels around it.
        image = image.crop((left, top, left + least, top + least))
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32) / 255
