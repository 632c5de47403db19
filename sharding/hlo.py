"""Reading compiled HLO text: collectives, loop trip counts and memory traffic of one step."""

import functools
import operator
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^{}]*)\})?")
_FREE = set(
    "parameter constant tuple get-tuple-element bitcast while call conditional after-all iota "
    "partition-id replica-id opt-barrier domain add-dependency async-start async-update".split()
)
_SLICES = ("slice", "dynamic-slice", "gather")


class Instruction(NamedTuple):
    """One line of HLO: `name = type op(operands), attributes`."""

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    text: str  # between the parentheses
    attributes: str

    def called(self, *keys: str) -> list[str]:
        """Names of the computations in attributes `keys`."""
        found = []
        for key in keys:
            if match := re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes):
                found += [n.strip().lstrip("%") for n in (match[1] or match[2]).split(",")]
        return found


class Computation(NamedTuple):
    """A computation: its instructions by name, in order, and the root's name."""

    name: str
    body: dict[str, Instruction]
    root: str


class Collective(NamedTuple):
    """A collective of one device: operand bytes of one call, devices that take part, calls a step."""

    kind: str
    bytes: int
    group: int
    calls: int

    @property
    def ring_bytes(self) -> float:
        """Bytes each direction-pair of a ring's links carries for one call, a device.

        Ring algorithms: all-gather g-1 pieces, reduce-scatter (g-1)/g of the operand, all-reduce
        both; an all-to-all travels g/4 hops on average; a permute uses one direction of the two.
        """
        g = self.group
        share = (g - 1) / g
        factors = {
            "all-gather": g - 1,
            "reduce-scatter": share,
            "all-reduce": 2 * share,
            "collective-permute": 2.0,
        }
        return self.bytes * factors.get(self.kind, max(share, g / 4))


class Module:
    """Parsed HLO text, as `compiled.as_text()` gives it. ValueError when it has no entry."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self.unknown_loops: set[str] = set()
        match = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(match[1]) if match else 1
        self._parse(text)
        if not self.entry:
            raise ValueError("text has no ENTRY computation; it must be that of compiled HLO")

    def _parse(self, text: str) -> None:
        name, body, root = "", {}, ""
        for line in text.splitlines():
            if not name:
                if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$", line):
                    name, body, root = match[2], {}, ""
                    self.entry = name if match[1] else self.entry
            elif line.startswith("}"):
                self.computations[name] = Computation(name, body, root)
                name = ""
            elif parsed := _instruction(line):
                body[parsed.name] = parsed
                root = parsed.name if line.lstrip().startswith("ROOT") else root

    def walk(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every instruction that is executed, with its computation and how often a step runs it.

        Both branches of a conditional are walked; a loop of unknown length runs once.
        """
        yield from self._walk(self.computations[self.entry], 1, None)

    def _walk(self, computation, times: int, carry):
        for instruction in computation.body.values():
            yield instruction, computation, times
            if instruction.op == "while":
                body, count, inner = self._loop(instruction, computation, carry)
                yield from self._walk(body, times * count, inner)
            else:
                keys = {
                    "call": ("to_apply",),
                    "conditional": (
                        "branch_computations",
                        "true_computation",
                        "false_computation",
                    ),
                    "async-start": ("calls",),
                }.get(instruction.op, ())
                for name in instruction.called(*keys):
                    yield from self._walk(self.computations[name], times, None)

    def _loop(self, loop: Instruction, outside: Computation, carry):
        """(body, trip count, first carry) of a while loop."""
        (body,), (condition,) = loop.called("body"), loop.called("condition")
        body, condition = self.computations[body], self.computations[condition]

        @functools.cache
        def first(index: int) -> int:
            start = outside.body[loop.operands[0]]
            if start.op != "tuple":
                raise LookupError(start.name)
            return self._value(outside, start.operands[index], carry)

        if match := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
            return body, int(match[1]), first
        try:
            return body, self._trips(body, condition, first), first
        except (LookupError, RecursionError):
            self.unknown_loops.add(loop.name)
            return body, 1, first

    def _trips(self, body: Computation, condition: Computation, first) -> int:
        """Steps until `condition` turns false, for a counter with a constant stride."""
        root = body.body[body.root]
        changed: set[int] = set()

        def at(step: int) -> Callable[[int], int]:
            def value(index: int) -> int:
                begin = first(index)
                stride = self._value(body, root.operands[index], first) - begin
                if stride:
                    changed.add(index)
                return begin + step * stride

            return value

        def runs(step: int) -> bool:
            return bool(self._value(condition, condition.root, at(step)))

        if not runs(0):
            return 0
        if not changed:
            raise LookupError("a loop without a counter")
        high = 1
        while runs(high):
            high *= 2
            if high > 1 << 40:
                raise LookupError("a loop without an end")
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if runs(middle) else (low, middle)
        return high

    def _value(self, computation: Computation, name: str, carry) -> int:
        """Integer value of a scalar; LookupError when the text does not tell."""
        i = computation.body[name]
        if i.op == "constant":
            return int(i.text == "true") if i.text in ("true", "false") else _int(i.text)
        if i.op == "parameter" and carry is not None:
            return carry(int(i.text))
        if i.op == "get-tuple-element":
            index = int(_find(r"index=(\d+)", i.attributes))
            source = computation.body[i.operands[0]]
            if source.op == "parameter" and carry is not None:
                return carry(index)
            if source.op == "tuple":
                return self._value(computation, source.operands[index], carry)
            if source.op == "while":
                # What a loop hands through unchanged is what it was given.
                (body,) = source.called("body")
                inner = self.computations[body]
                out = inner.body[inner.body[inner.root].operands[index]]
                if out.op == "get-tuple-element" and f"index={index}" in out.attributes:
                    start = computation.body[source.operands[0]]
                    return self._value(computation, start.operands[index], carry)
            raise LookupError(name)
        read = lambda n: self._value(computation, n, carry)  # noqa: E731
        if i.op in ("copy", "bitcast", "convert", "reshape"):
            return read(i.operands[0])
        if i.op in ("fusion", "call"):
            inner = self.computations[i.called("calls", "to_apply")[0]]
            return self._value(inner, inner.root, lambda p: read(i.operands[p]))
        if i.op == "compare":
            a, b = map(read, i.operands)
            direction = _find(r"direction=(\w+)", i.attributes)
            return int(getattr(operator, direction.lower())(a, b))
        if i.op in _ARITHMETIC:
            return _ARITHMETIC[i.op](*map(read, i.operands))
        raise LookupError(name)

    def collectives(self) -> list[Collective]:
        """The collectives of a step; asynchronous pairs once, fused ones by what they do."""
        found = []
        for i, computation, times in self.walk():
            for inner, home, kind in self._communicating(i, computation):
                size = sum(_bytes(home.body[o].type) for o in inner.operands if o in home.body)
                found.append(Collective(kind, size, _group(inner, self.devices), times))
        return found

    def _communicating(self, i: Instruction, home: Computation):
        kind = i.op.removesuffix("-start")
        if kind in COLLECTIVES:
            yield i, home, kind
        elif i.op == "fusion":
            (name,) = i.called("calls")
            inside = self.computations[name]
            for inner in inside.body.values():
                for found, where, kind in self._communicating(inner, inside):
                    # TPUs write reduce-scatter as a fusion of all-reduce and slice.
                    scatter = kind == "all-reduce" and "all-reduce-scatter" in name
                    yield found, where, "reduce-scatter" if scatter else kind

    def traffic(self) -> int:
        """Bytes a step moves between HBM and the core: operands and results, each once.

        Values the compiler placed on chip are free; of an operand that is only sliced, the slices
        count, of a buffer updated in place, the update.
        """
        total = 0
        for i, computation, times in self.walk():
            if i.op not in _FREE and not i.op.endswith("-done"):
                total += times * self._moved(i, computation)
        return total

    def _moved(self, i: Instruction, home: Computation) -> int:
        types = [home.body[o].type for o in i.operands if o in home.body]
        if i.op == "fusion":
            inside = self.computations[i.called("calls")[0]]
            reads = sum(
                min(self._read(inside, number), _bytes(kind)) * (_bytes(kind, True) > 0)
                for number, kind in enumerate(types)
            )
            return reads + self._written(inside, inside.root, i.type)
        if i.op in _SLICES:
            read = _bytes(i.type) * (_bytes(types[0], True) > 0)
            return read + _bytes(i.type, True)
        if i.op == "dynamic-update-slice":
            return _bytes(types[1], True) + _bytes(types[1]) * (_bytes(i.type, True) > 0)
        if i.op in ("slice-start", "dynamic-slice-start"):
            return 2 * _bytes(_members(i.type)[1])
        if i.op.endswith("-start") and i.type.startswith("("):
            return _bytes(i.type, True)  # operand and result are both in the type
        return sum(_bytes(kind, True) for kind in types) + _bytes(i.type, True)

    def _read(self, inside: Computation, number: int) -> int:
        """Bytes a fusion reads of its parameter `number`, if it reads it whole or in slices."""
        names = {n for n, i in inside.body.items() if i.op == "parameter" and i.text == str(number)}
        total = 0
        for i in inside.body.values():
            for position, operand in enumerate(i.operands):
                if operand not in names:
                    continue
                if i.op == "bitcast":
                    names.add(i.name)
                elif i.op in _SLICES and position == 0:
                    total += _bytes(i.type)
                elif i.op == "dynamic-update-slice" and position == 0:
                    pass
                elif i.op == "fusion":
                    total += self._read(self.computations[i.called("calls")[0]], position)
                else:
                    total += _bytes(inside.body[operand].type)
        return total

    def _written(self, inside: Computation, name: str, kind: str) -> int:
        root = inside.body[name]
        if root.op == "tuple":
            parts = zip(root.operands, _members(kind), strict=True)
            return sum(self._written(inside, operand, part) for operand, part in parts)
        if not _bytes(kind, True):
            return 0
        if root.op == "bitcast":
            return self._written(inside, root.operands[0], kind)
        if root.op == "dynamic-update-slice":
            return _bytes(inside.body[root.operands[1]].type)
        if root.op == "fusion":
            inner = self.computations[root.called("calls")[0]]
            return self._written(inner, inner.root, kind)
        return _bytes(kind, True)


_ARITHMETIC = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "maximum": max,
    "minimum": min,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "select": lambda p, a, b: a if p else b,
}


def hlo_collectives(text: str) -> dict[str, tuple[int, int]]:
    """{kind: (calls, bytes)} of the collectives one device runs in a step, from compiled HLO text.

    Bytes are those of the operands. A `-start`/`-done` pair counts once; the body of a loop counts
    as often as the loop runs: its known_trip_count, or, where the backend does not write one (TPU),
    the count worked out from the loop's counter; a loop of unknown length counts once.
    """
    total: dict[str, tuple[int, int]] = {}
    for c in Module(text).collectives():
        calls, size = total.get(c.kind, (0, 0))
        total[c.kind] = (calls + c.calls, size + c.calls * c.bytes)
    return total


def _int(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise LookupError(text) from error


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    at = _close(line, match.end()) if line[match.end()] == "(" else line.find(" ", match.end())
    kind, rest = line[match.end() : at], line[at:].lstrip()
    start = rest.find("(")
    end = _close(rest, start)
    inside = rest[start + 1 : end - 1]
    names = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(match[1], kind, rest[:start], names, inside.strip(), rest[end:])


def _close(text: str, start: int) -> int:
    """Position after the parenthesis that closes the one at `start`."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if not depth:
            return at + 1
    raise ValueError(f"unbalanced parentheses in HLO line: {text[:120]}")


def _members(type_: str) -> list[str]:
    """The members of a tuple type."""
    parts, depth, begin = [], 0, 1
    for at, letter in enumerate(type_):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (letter == ")" and depth == 0):
            parts.append(type_[begin:at])
            begin = at + 1
    return parts


def _find(pattern: str, text: str) -> str:
    """The first group of `pattern` in `text`; LookupError when it is not there."""
    if not (match := re.search(pattern, text)):
        raise LookupError(f"no {pattern} in {text!r}")
    return match[1]


def _bytes(type_: str, hbm_only: bool = False) -> int:
    """Bytes of an HLO type; `hbm_only` leaves out arrays placed in on-chip or host memory."""
    total = 0
    for kind, sizes, layout in _ARRAY.findall(type_):
        space = re.search(r"S\((\d+)\)", layout)
        if hbm_only and space and space[1] != "0":
            continue
        bits = _BITS.get(kind)
        if bits is None:
            bits = int(_find(r"(\d+)", kind))
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += (count * bits + 7) // 8
    return total


def _group(i: Instruction, devices: int) -> int:
    """How many devices talk to each other in a collective."""
    text = i.attributes
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(match[1])
    if match := re.search(r"replica_groups=\w*mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", match[1]))
        size = 1
        for axis, part in re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", match[2]):
            size *= int(part or sizes[axis])
        return size
    return devices
