"""pyproject.toml declares what the packages import."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ROOMS = ("jaxlab", "sharding", "models", "train", "configs")


def plain(name: str) -> str:
    """The normal form of a distribution's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(requirements: list[str]) -> set[str]:
    return {plain(re.match(r"[\w.-]+", line)[0]) for line in requirements}


ALWAYS = declared(PROJECT["dependencies"])
EXTRAS = {name: declared(lines) for name, lines in PROJECT["optional-dependencies"].items()}


def imported(tree: ast.AST, optional: bool = False):
    """(package, whether its absence is caught) of every absolute import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], optional) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").split(".")[0], optional
        caught = isinstance(node, ast.Try) and any(
            "ImportError" in ast.unparse(handler) for handler in node.handlers
        )
        yield from imported(node, optional or caught)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_are_declared(room):
    names = packages_distributions()
    for file in (ROOT / room).rglob("*.py"):
        for package, optional in imported(ast.parse(file.read_text())):
            if package in ROOMS or package in sys.stdlib_module_names:
                continue
            known = {plain(name) for name in names.get(package, [package])}
            optionals = (EXTRAS[name] for name in ("data", "games", "hf", "rl"))
            users = set().union(*optionals) if optional else set()
            assert known & (ALWAYS | users), f"{file.name} imports {package}: {known}"


def test_messages_name_extras_that_exist():
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            for extra in re.findall(r"jaxlab\[([\w,-]+)\]'", file.read_text()):
                assert set(extra.split(",")) <= set(EXTRAS), f"{file.name}: {extra}"


def test_every_declared_dependency_is_imported():
    names = packages_distributions()
    found: set[str] = set()
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            for package, _ in imported(ast.parse(file.read_text())):
                found |= {plain(name) for name in names.get(package, [])}
    assert ALWAYS <= found, ALWAYS - found
