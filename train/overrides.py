"""Command-line overrides: `key.path=value` on nested frozen dataclasses, types checked.

A field that holds one of several dataclasses, or none, takes a class name (its defaults) or `none`:
`model.rope_scaling=YarnScaling model.rope_scaling.factor=8`. So does an entry of a tuple of them, or the
next one after its last: `evaluators.3=Tokens`.
"""

import ast
import dataclasses
import difflib
import functools
import importlib
import math
import operator
import types
import typing
from typing import Any, Literal


class Kinds(tuple[str, ...]):
    """In the annotation of a field of type Any, or of a tuple: "module:Class" of what is set by name.

    Imported only when the field is set.
    """

    def union(self) -> Any:
        """The union type of the classes."""
        named = (text.partition(":") for text in self)
        found = [getattr(importlib.import_module(module), name) for module, _, name in named]
        return functools.reduce(operator.or_, found)


def override(config: Any, assignments: list[str]) -> Any:
    """`config` with every "path=value" applied; ValueError names the nearest valid field or value."""
    given: dict[str, str] = {}
    for text in assignments:
        path, sep, value = text.partition("=")
        if not sep or not path:
            raise ValueError(
                f"override {text!r} must look like field=value, e.g. optimizer.lr=1e-3"
            )
        if path in given:
            raise ValueError(f"{path} is given twice: {path}={given[path]} and {text}")
        given[path] = value
        config = _set(config, path.split("."), value, path, config)
    return config


def _set(node: Any, keys: list[str], text: str, path: str, root: Any) -> Any:
    key, rest = keys[0], keys[1:]
    if isinstance(node, tuple):
        if not key.isdigit() or int(key) >= len(node):
            raise ValueError(f"{path}: {key!r} is not an index below {len(node)}")
        items = list(node)
        if not rest:
            raise ValueError(
                f"{path} is a group of fields, set one of: {_inside(items[int(key)], path)}"
            )
        items[int(key)] = _set(items[int(key)], rest, text, path, root)
        return tuple(items)
    if node is None:
        raise ValueError(
            f"{path}: the group is none, set it first (its types: jaxlab ... --fields)"
        )
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise ValueError(f"{path}: {type(node).__name__} has no field {key!r}")
    fields = [f.name for f in dataclasses.fields(node)]
    if key not in fields:
        raise ValueError(f"unknown field {path!r}: {_advice(path, keys, node, root)}")
    old = getattr(node, key)
    kinds = _kinds(node, key)
    if kinds and isinstance(old, tuple) and len(rest) < 2:
        entry = _entry(old, rest, text, path, kinds)
        return dataclasses.replace(node, **{key: entry})
    if rest:
        return dataclasses.replace(node, **{key: _set(old, rest, text, path, root)})
    hint = _hint(node, key)
    if dataclasses.is_dataclass(old) and not _choices(hint):
        raise ValueError(f"{path} is a group of fields, set one of: {_inside(old, path)}")
    return dataclasses.replace(node, **{key: parse(text, hint, path)})


def _inside(node: Any, path: str) -> str:
    """The paths of the fields of a dataclass."""
    return ", ".join(f"{path}.{f.name}" for f in dataclasses.fields(node))


def _entry(items: tuple, rest: list[str], text: str, path: str, kinds: Kinds) -> tuple:
    """`items` with another dataclass at an index, or one more."""
    if not rest or not rest[0].isdigit() or int(rest[0]) > len(items):
        raise ValueError(
            f"{path} is no entry: set {path.partition('.')[0]}.N=CLASS with N at most {len(items)}"
        )
    at = int(rest[0])
    return (*items[:at], parse(text, kinds.union(), path), *items[at + 1 :])


def _advice(path: str, keys: list[str], node: Any, root: Any) -> str:
    """What may have been meant by the first of `keys`, which is no field of `node`."""
    fields = [f.name for f in dataclasses.fields(node)]
    paths: dict[str, list[str]] = {}
    # A field of another group may have been written without its group.
    for known, *_ in field_help(root):
        paths.setdefault(known.rpartition(".")[2], []).append(known)
    before = path.split(".")[: -len(keys)]
    paths |= {name: [".".join([*before, name])] for name in fields}
    near = difflib.get_close_matches(keys[-1], paths, n=1, cutoff=0.6)
    meant = f"did you mean {' or '.join(paths[near[0]][:3])}? " if near else ""
    here = f"fields here: {', '.join(fields)}" if fields else f"{type(node).__name__} has no fields"
    return meant + here


def _choices(hint: Any) -> list[Any]:
    """The dataclasses that a field of a union type may hold."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return []
    return [a for a in typing.get_args(hint) if dataclasses.is_dataclass(a)]


def _hint(node: Any, key: str) -> Any:
    kinds = _kinds(node, key)
    return kinds.union() if kinds else typing.get_type_hints(type(node), include_extras=True)[key]


def _kinds(node: Any, key: str) -> Kinds | None:
    hint = typing.get_type_hints(type(node), include_extras=True)[key]
    return next((x for x in getattr(hint, "__metadata__", ()) if isinstance(x, Kinds)), None)


def parse(text: str, hint: Any, path: str) -> Any:
    """`text` as a value of the type `hint`."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    wrong = ValueError(f"{path}={text!r} is not {describe(hint)}")
    if origin is Literal:
        if text in args:
            return text
        near = difflib.get_close_matches(text, args, n=1, cutoff=0.4)
        hint_text = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path}={text!r} is not one of {', '.join(args)}{hint_text}")
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return parse(text, option, path)
            except ValueError:
                continue
        raise wrong
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if text == hint.__name__:
            return hint()
        raise wrong
    if hint is type(None):
        if text.lower() in ("none", "null"):
            return None
        raise wrong
    if hint is str:
        return text
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{path}={text!r} is not true or false")
    if origin is tuple:
        parts = [p for p in text.strip("()[]").split(",") if p.strip()]
        return tuple(parse(p.strip().strip("'\""), args[0], path) for p in parts)
    if hint is float:
        try:
            number = float(text)
        except ValueError:
            raise wrong from None
        if not math.isfinite(number):
            raise ValueError(f"{path}={text} must be finite")
        return number
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise wrong from None
    if hint is int and (type(value) is int or (type(value) is float and value.is_integer())):
        return int(value)
    raise wrong


def check_fields(config: Any, paths: list[str], what: str) -> None:
    """ValueError, beginning with `what`, unless each of `paths` is a field or group of `config`."""
    known = [row[0] for row in field_help(config)]
    for path in paths:
        if not any(k == path or k.startswith(path + ".") for k in known):
            near = difflib.get_close_matches(path, known, n=3, cutoff=0.5)
            groups = [f.name for f in dataclasses.fields(config)]
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"it starts {', '.join(groups)}"
            )
            raise ValueError(f"{what} {path}: there is no such field; {hint}")


def describe(hint: Any) -> str:
    """A type in words, for help and errors."""
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is tuple:
        many = {int: "integers", float: "numbers", str: "texts"}.get(args[0], describe(args[0]))
        return f"list of {many}, comma-separated"
    return {
        int: "an integer",
        float: "a number",
        bool: "true|false",
        str: "text",
        type(None): "none",
    }.get(hint, getattr(hint, "__name__", str(hint)))


def spell(value: Any) -> str:
    """A value as one would type it: (1, 2) -> '1,2', None -> 'none', True -> 'true'."""
    if isinstance(value, tuple):
        return ",".join(map(spell, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def field_help(config: Any, prefix: str = "") -> list[tuple[str, str, str, str]]:
    """(path, type, value, help line) of every leaf, in order."""
    rows = []
    if isinstance(config, tuple):
        for i, item in enumerate(config):
            rows += field_help(item, f"{prefix}{i}.")
        return rows
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), prefix + field.name
        group = isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])
        if dataclasses.is_dataclass(value) or group:
            rows += field_help(value, path + ".")
        else:
            hint = hints[field.name]
            annotated = typing.get_origin(hint) is typing.Annotated
            text = typing.get_args(hint)[1] if annotated else ""
            rows.append((path, describe(hint), spell(value), text))
    return rows
