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
            largest=(), collectives={},
            step_flops=1.0, model_flops=1.0, compute_seconds=1.0, hbm_seconds=None,
            ici_seconds=0.0, memory=memory,
        )  # fmt: skip

    monkeypatch.setattr(module, "compiled", compiled)
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: f"{name} 1")
    file = tmp_path / "rows" / "sweep.json"
    text = sweep(make, ["m=a,b", "n=2,3"], "v5e:2x4", "tiny", file)
    assert len(made) == 4
    assert "| m=a, n=2 | yes | 3.00 | 1.00 | 0.50 | - | 1.0 | - | 0.0 |" in text
    assert "| m=b, n=3 | n=3 is odd |" in text
    again = sweep(make, ["m=a", "n=2,4,3"], "v5e:2x4", "tiny", file)
    # What fitted is not made again; what was refused is tried again, and is not in the file.
    assert len(made) == 6 and "| m=a, n=4 | no |" in again
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 3 and rows[0]["jax"] == "jax 1" and "date" in rows[0]
    assert file.with_suffix(".md").read_text() == again
    assert file.with_suffix(".png").stat().st_size > 0
    with pytest.raises(ValueError, match="name another"):
        sweep(make, ["m=a"], "v5p:2x2x2", "tiny", file)


def test_a_wrong_assignment_stops_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "compiled", None)

    def make(point):
        if point[0] == "n=x":
            raise ValueError("n=x is no number")
        raise AssertionError("compiled")

    with pytest.raises(ValueError, match="n=x is no number"):
        sweep(make, ["n=x,2"], "v5e:2x4", "tiny", tmp_path / "sweep.json")


def test_the_plot_is_over_a_field_that_is_a_number_everywhere(tmp_path, monkeypatch):
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda _, x, *__, **k: drawn.append((x, k)))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *_, **__: None)
    row = {"needs_bytes": 1.0, "hbm_bytes": 2.0}
    several = [{"point": [f"n={n}", f"u={u}"]} | row for u in ("none", "8") for n in (1, 2)]
    module.plot(several, "title", tmp_path / "plot.png")
    assert drawn == [((1, 2), {"label": "u=8"}), ((1, 2), {"label": "u=none"})]
    module.plot([{"point": ["u=none"]} | row], "title", tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()
