"""Documents of text files: plain text, JSON lines, Parquet, ArrayRecord, and an embedded corpus."""

import contextlib
import gzip
import json
import re
from collections.abc import Iterator

from etils import epath

TEXT = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT, ".jsonl", ".parquet", ".array_record")
BUILTIN = "builtin:pydoc"


def find_files(
    pattern: str, suffixes: tuple[str, ...] = SUFFIXES, field: str = "source.files"
) -> list[epath.Path]:
    """Files matching a path, folder or glob (local or gs://), sorted; `field` names it in errors.

    FileNotFoundError if there is none, ValueError for one that is not read, ImportError for gs://
    without the package that reads it.
    """
    readable = ", ".join(suffixes) + (" (text files may be .gz)" if ".txt" in suffixes else "")
    try:
        found = _matches(pattern, suffixes, readable, field)
    except ImportError as error:
        if not pattern.startswith("gs://"):
            raise
        raise ImportError(
            f"{field}: reading {pattern!r} needs: pip install 'jaxlab[gcs]'"
        ) from error
    for file in found:
        if _kind(file) not in suffixes:
            raise ValueError(f"{field}: {file} ends in none of {readable}")
    return found


def _matches(
    pattern: str, suffixes: tuple[str, ...], readable: str, field: str
) -> list[epath.Path]:
    path = epath.Path(pattern).expanduser()
    if any(c in pattern for c in "*?["):
        parts = path.parts
        first = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
        base = epath.Path(*parts[:first]) if first else epath.Path(".")
        found = sorted(p for p in base.glob("/".join(parts[first:])) if p.is_file())
    elif path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file() and _kind(p) in suffixes)
        if not found:
            raise FileNotFoundError(
                f"{field}: the folder {pattern!r} holds no file whose name ends in one of {readable}"
            )
    else:
        found = [path] if path.is_file() else []
    if not found:
        raise FileNotFoundError(f"{field}: nothing matches {pattern!r}")
    return found


def _kind(file: epath.Path) -> str:
    name = file.name.removesuffix(".gz")
    return next((s for s in SUFFIXES if name.endswith(s)), "")


def read_documents(pattern: str, column: str) -> Iterator[tuple[str, str]]:
    """(where it comes from, text) of every document.

    A plain file is one document; a JSON line and a Parquet row hold one in `column`; an ArrayRecord
    record is UTF-8 text. 'builtin:pydoc' is the Python manual that every CPython carries, without
    the paragraphs that an earlier topic holds (a fifth): held-out topics would be known by heart.
    ValueError, naming file and line, for what cannot be read.
    """
    if pattern == BUILTIN:
        from pydoc_data.topics import topics

        seen: set[str] = set()
        for name in sorted(topics):
            yield f"{BUILTIN}:{name}", _new_paragraphs(topics[name], seen)
        return
    if pattern.startswith("builtin:"):
        raise ValueError(f"source.files: {pattern!r} is not built in; there is {BUILTIN!r}")
    for file in find_files(pattern):
        kind = _kind(file)
        if kind == ".parquet":
            yield from _parquet(file, column)
        elif kind == ".array_record":
            yield from _array_record(file)
        elif kind == ".jsonl":
            yield from _json_lines(file, column)
        else:
            with _open(file) as handle:
                yield str(file), _utf8(handle.read(), file)


def _new_paragraphs(text: str, seen: set[str]) -> str:
    """`text` without paragraphs in `seen` (white space aside), which takes up the new ones."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if words not in seen:
            seen.add(words)
            kept.append(paragraph)
    return "\n\n".join(kept)


@contextlib.contextmanager
def _open(file: epath.Path):
    with file.open("rb") as raw:
        yield gzip.open(raw) if file.name.endswith(".gz") else raw


def _utf8(raw: bytes, where) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 at byte {error.start}") from error


def _json_lines(file: epath.Path, column: str) -> Iterator[tuple[str, str]]:
    with _open(file) as lines:
        for number, raw in enumerate(lines, 1):
            where = f"{file}:{number}"
            if not raw.strip():
                continue
            try:
                row = json.loads(_utf8(raw, where))
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON: {error.msg}") from error
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                has = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise ValueError(f"{where}: no text in source.column={column!r}; it has {has}")
            yield where, row[column]


def open_parquet(raw, file: epath.Path):
    """The pyarrow.parquet.ParquetFile of an open file; ImportError without pyarrow, ValueError if none."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError("reading Parquet needs: pip install 'jaxlab[data]'") from error
    try:
        return pq.ParquetFile(raw)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file: {error}") from error


def _parquet(file: epath.Path, column: str) -> Iterator[tuple[str, str]]:
    with file.open("rb") as raw:
        yield from _rows(open_parquet(raw, file), column, file)


def _rows(table, column: str, file: epath.Path) -> Iterator[tuple[str, str]]:
    names = table.schema_arrow.names
    if column not in names:
        raise ValueError(f"{file}: no source.column={column!r}; it has {names}")
    kind = table.schema_arrow.field(column).type
    if str(kind) not in ("string", "large_string"):
        raise ValueError(f"{file}: source.column={column!r} is {kind}, not a string")
    number = 0
    for batch in table.iter_batches(columns=[column]):
        for text in batch.column(0).to_pylist():
            if text is not None:
                yield f"{file}:{number}", text
            number += 1


def open_array_record(file: epath.Path):
    """(reader, number of records) of a file; ImportError without array-record, ValueError if none."""
    try:
        from array_record.python.array_record_module import ArrayRecordReader
    except ImportError as error:
        raise ImportError("reading ArrayRecord needs: pip install 'jaxlab[data]'") from error
    reader = ArrayRecordReader(str(file))
    if not reader.ok():
        raise ValueError(f"{file}: not an ArrayRecord file")
    return reader, reader.num_records()


def _array_record(file: epath.Path) -> Iterator[tuple[str, str]]:
    reader, count = open_array_record(file)
    for number in range(count):
        yield f"{file}:{number}", _utf8(reader.read([number])[0], f"{file}:{number}")
    reader.close()
