"""One short file an experiment: model x objective x source x sharding."""

import ast
import importlib
from pathlib import Path

from train.cli import Preset


def presets() -> dict[str, Preset]:
    """Every configuration of this folder by name; a module is imported only when it is used."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("[a-z]*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        make = lambda name=path.stem: importlib.import_module(f"configs.{name}").run()  # noqa: E731
        found[path.stem] = Preset(path.stem, doc, make)
    return found
