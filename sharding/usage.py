"""How a compiled TPU program fills its memory, from the report that the compiler writes on demand.

The report is a protocol buffer without a published schema. What is read of it: the memories (field 1)
with their size (1), colour (2; 0 is HBM, 5 the host's) and allocations (3); of these the size (2) and a
text (6) with a line for every place: its size, and the shapes of the values that take turns in it.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_LINE = re.compile(r"\s*[\d.]+\w+\([ \d]+%\);\s+([\d.]+)(\w+);\s+\d+;\s+\d+; (.*)")


class Usage(NamedTuple):
    """Bytes of HBM with arguments and results, of the heap of temporaries in it, in the host's memory,
    and the largest places of the heap: (bytes, shapes in turn)."""

    hbm_bytes: int
    heap_bytes: int
    host_bytes: int
    largest: tuple[tuple[int, str], ...]


def dump_options(folder: str | Path) -> dict[str, str | bool]:
    """Options that make the compiler write its report into `folder`."""
    return {"xla_dump_to": str(folder), "xla_dump_hlo_as_proto": True}


def read_usage(folder: str | Path, most: int = 8) -> Usage | None:
    """What the report in `folder` says, with the `most` largest places; None without one that can be read."""
    files = sorted(Path(folder).glob("*memory-usage-report.pb"))
    try:
        return _usage(files[-1].read_bytes(), most) if files else None
    except (IndexError, KeyError, TypeError, ValueError):
        return None


def _usage(data: bytes, most: int) -> Usage:
    memories = [_message(value) for number, value in _fields(data) if number == 1]
    by_colour = {memory.get(2, [0])[0]: memory for memory in memories}
    hbm, host = by_colour[0], by_colour.get(5, {1: [0]})
    heap = max((_message(a) for a in hbm[3]), key=lambda a: a[2][0])
    lines = [_LINE.match(line) for text in heap.get(6, []) for line in _texts(text)]
    places = [(int(float(m[1]) * _UNITS[m[2]]), m[3].strip()) for m in lines if m]
    return Usage(
        hbm[1][0], heap[2][0], host[1][0], tuple(sorted(places, key=lambda place: -place[0])[:most])
    )


def _texts(data: bytes) -> list[str]:
    """Lines of the table inside a message that holds it."""
    start = data.find(b"  cumulative_size;")
    return data[start:].decode(errors="replace").splitlines() if start >= 0 else []


def _message(data: Any) -> dict[int, list]:
    found: dict[int, list] = {}
    for number, value in _fields(data):
        found.setdefault(number, []).append(value)
    return found


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of an encoded message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[kind]
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
