"""The sampled study of benchmarks/passk.py, made small: its signs."""

import jax
import numpy as np
import pytest

from benchmarks import passk_network as study


@pytest.mark.slow
def test_training_on_passk_costs_pass1_and_the_protected_step_wins_some_back():
    names = ("k=1", "k=8", "k=8, exact, after Adam")
    small = study.Study(prompts=600, steps=200, blocks=4)
    r = jax.tree.map(
        np.asarray, study.run(3, small, {name: study.ARMS[name] for name in names}, 40)
    )
    one, eight, protected = (r["arms"][name] for name in names)
    last = lambda arm, field: arm[field][:, -1].mean()  # noqa: E731
    assert last(one, "J_1") > r["base"]["J_1"].mean() > last(eight, "J_1")
    assert last(eight, "J_8") > r["base"]["J_8"].mean() + 0.05
    assert last(protected, "J_1") > last(eight, "J_1") + 0.01
    assert last(protected, "J_8") > last(eight, "J_8") - 0.02
    start = r["start"]["k=8"]
    assert (start["inner_product"] < 0).all() and (r["start"]["critical_k"] <= 8).all()
    other, same = start["crossfit"], start["same"]
    error = other.std(ddof=1) / np.sqrt(other.size)
    assert abs(other.mean() - start["inner_product"].mean()) < 4 * error
    assert same.mean() > other.mean() + 4 * error  # the bias of the same samples
