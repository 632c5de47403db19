"""The house: imports only go down, jaxlab stays light, files stay short."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ("jaxlab", "sharding", "models", "train", "configs")
PURE = {"jax", "numpy", "einops", "jaxtyping", "chex"}
FILES = [path for room in ORDER for path in sorted((ROOT / room).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level names of every import in a file, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path):
    room = path.relative_to(ROOT).parts[0]
    above = set(ORDER[ORDER.index(room) + 1 :])
    assert not imported(path) & above
    if room == "jaxlab":
        outside = imported(path) - PURE - {"jaxlab"} - set(sys.stdlib_module_names)
        assert not outside


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_short_and_documented(path):
    text = path.read_text()
    assert text.count("\n") <= 500, "one file is one idea"
    assert ast.get_docstring(ast.parse(text))


def test_the_trainer_fits_in_400_lines():
    assert (ROOT / "train" / "trainer.py").read_text().count("\n") <= 400


def test_jaxlab_imports_no_framework_and_is_quick():
    code = (
        "import jax, sys, time; t = time.time(); import importlib, pkgutil, jaxlab\n"
        "for m in pkgutil.walk_packages(jaxlab.__path__, 'jaxlab.'): importlib.import_module(m.name)\n"
        "bad = {'flax', 'orbax', 'grain', 'optax'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "print(time.time() - t)"
    )
    start = time.time()
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert float(out.stdout) < max(1.0, 0.5 * (time.time() - start))
