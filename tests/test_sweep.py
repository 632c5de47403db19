"""`jaxlab compile --sweep`: every combination, kept as it is made, with a table and a plot."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from train import sweep as module
from train.sweep import points, sweep


def test_points_are_every_combination():
    assert points(["a=1,2", "b=x,y"]) == [
        ["a=1", "b=x"],
        ["a=1", "b=y"],
        ["a=2", "b=x"],
        ["a=2", "b=y"],
    ]
    for wrong in ("a", "a=", "=1", "a=1,,2"):
        with pytest.raises(ValueError, match="must be FIELD=VALUE,VALUE"):
            points([wrong])


def test_rows_are_made_once_and_refusals_say_why(tmp_path, monkeypatch):
    made: list[Any] = []
    make: Any = list

    def compiled(run, topology):
        made.append(run)
        if "n=3" in run:
            raise ValueError("n=3 is odd\nuse 2 or 4")
        memory = SimpleNamespace(_asdict=lambda: {"temp_bytes": 2**30, "argument_bytes": 2**29})
        return "", SimpleNamespace(
            fits="n=4" not in run, needs_bytes=3 * 2**30, hbm_bytes=2**32, message="",
            step_flops=1.0, model_flops=1.0, compute_seconds=1.0, hbm_seconds=None,
            ici_seconds=None, memory=memory,
        )  # fmt: skip

    monkeypatch.setattr(module, "compiled", compiled)
    file = tmp_path / "rows" / "sweep.json"
    text = sweep(make, ["m=a,b", "n=2,3"], "v5e:2x4", "tiny", file)
    assert len(made) == 4
    assert "| m=a, n=2 | yes | 3.00 | 1.00 | 0.50 | - | 1.0 | - | - |" in text
    assert "| m=b, n=3 | n=3 is odd |" in text
    again = sweep(make, ["m=a", "n=2,4"], "v5e:2x4", "tiny", file)
    assert len(made) == 5 and "| m=a, n=4 | no |" in again
    assert len(json.loads(file.read_text())["rows"]) == 5
    assert file.with_suffix(".md").read_text() == again
    assert file.with_suffix(".png").stat().st_size > 0
    with pytest.raises(ValueError, match="name another"):
        sweep(make, ["m=a"], "v5p:2x2x2", "tiny", file)
