"""Overrides: types, paths, and messages that name the nearest valid thing."""

import dataclasses
import json
from typing import Annotated, Literal

import pytest

from configs import presets
from train.overrides import check_fields, describe, field_help, override, spell
from train.run import difference, flatten, from_json, load_run, to_json


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: Annotated[float, "a rate"] = 0.1
    kind: Literal["cosine", "linear"] = "cosine"


@dataclasses.dataclass(frozen=True)
class Empty:
    pass


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = (Inner(), Inner(0.2))
    size: int = 3
    on: bool = True
    names: tuple[str, ...] = ()
    limit: int | None = None
    empty: Empty = Empty()


@pytest.mark.parametrize(
    "text, path, expected",
    [
        ("size=7", "size", 7),
        ("size=1e3", "size", 1000),
        ("inner.rate=2", "inner.rate", 2.0),
        ("inner.kind=linear", "inner.kind", "linear"),
        ("on=False", "on", False),
        ("names=a,b", "names", ("a", "b")),
        ("names=", "names", ()),
        ("limit=4", "limit", 4),
        ("limit=none", "limit", None),
        ("parts.1.rate=0.5", "parts.1.rate", 0.5),
    ],
)
def test_values_are_parsed_by_the_type_of_their_field(text, path, expected):
    value = override(Outer(), [text])
    for key in path.split("."):
        value = value[int(key)] if isinstance(value, tuple) else getattr(value, key)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "text, message",
    [
        ("sise=3", "did you mean size"),
        ("inner.rat=3", "did you mean inner.rate"),
        ("rat=3", "did you mean inner.rate or parts.0.rate or parts.1.rate"),
        ("inner.rate=inf", "inner.rate=inf must be finite"),
        ("inner.rate=nan", "must be finite"),
        ("parts.0.empty=1", "fields here: rate, kind"),
        ("empty.x=1", "Empty has no fields"),
        ("size=x", "'x' is not an integer"),
        ("size=1.5", "not an integer"),
        ("inner.rate=fast", "not a number"),
        ("inner.kind=cosin", "did you mean 'cosine'"),
        ("on=yes", "true or false"),
        ("inner=3", "inner.rate, inner.kind"),
        ("parts.7.rate=1", "not an index below 2"),
        ("parts.0=1", "parts.0 is a group of fields, set one of: parts.0.rate, parts.0.kind"),
        ("size", "must look like field=value"),
        ("size.x=1", "has no field 'x'"),
        ("limit=x", "integer or"),
    ],
)
def test_mistakes_name_the_field_and_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=message):
        override(Outer(), [text])


def test_sources_and_evaluators_are_set_by_name():
    run = presets()["demo"].make()
    count = len(run.evaluators)
    more = override(run, ["source=Table", "source.files=a,b", f"evaluators.{count}=Tokens",
                          f"evaluators.{count}.critical=xyz", "evaluators.0=Uncertainty"])  # fmt: skip
    assert more.source.files == ("a", "b") and type(more.source).__name__ == "Table"
    assert more.evaluators[count].critical == "xyz" and len(more.evaluators) == count + 1
    assert type(more.evaluators[0]).__name__ == "Uncertainty"
    for text, message in (
        ("source=Picture", "source='Picture' is not Text or Images or Table"),
        ("evaluators.0=Toks", "evaluators.0='Toks' is not HeldOut or"),
        (f"evaluators.{count + 1}=Tokens", f"N at most {count}"),
        ("evaluators=Tokens", "evaluators is no entry: set evaluators.N=CLASS"),
    ):
        with pytest.raises(ValueError, match=message):
            override(run, [text])


def test_a_field_set_twice_is_refused():
    with pytest.raises(ValueError, match="size is given twice: size=3 and size=4"):
        override(Outer(), ["size=3", "on=true", "size=4"])


def test_values_and_types_are_shown_as_one_would_type_them():
    assert spell(("a", "b")) == "a,b" and spell(None) == "none" and spell(True) == "true"
    assert describe(tuple[float, ...]) == "list of numbers, comma-separated"
    with pytest.raises(ValueError, match=r"^--allow sise: .*did you mean size"):
        check_fields(Outer(), ["sise"], "--allow")
    with pytest.raises(ValueError, match="it starts inner, parts"):
        check_fields(Outer(), ["qqq"], "--allow")


@pytest.mark.parametrize("name", presets())
def test_every_preset_survives_json_and_documents_every_field(name):
    run = presets()[name].make()
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    assert presets()[name].line.endswith(".")
    rows = field_help(run)
    assert all(text for _, _, _, text in rows), [r for r in rows if not r[3]]
    for path, _, value, _ in rows:
        if "(" not in value:
            assert override(run, [f"{path}={value}"]) == run


def test_difference_lists_changed_leaves():
    run = presets()["tiny"].make()
    other = override(run, ["optimizer.lr=0.5", "steps=7"])
    assert difference(to_json(run), other) == [("optimizer.lr", 3e-3, 0.5), ("steps", 20, 7)]
    assert flatten(run)["mesh.data"] == -1


def test_foreign_types_are_not_built(tmp_path):
    (tmp_path / "config.json").write_text('{"type": "os:system"}')
    with pytest.raises(ValueError, match="not of this project"):
        load_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a run directory"):
        load_run(tmp_path / "none")
