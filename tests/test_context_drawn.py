"""Every method on drawn sizes, masks and meshes, against one float64 layer in NumPy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import assert_close, layer_inputs, layer_oracle
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_context import run

from sharding.context import METHODS, legal_heads_per_stage
from sharding.context.checks import BALANCED, BY_HEADS, STAGED, TWO_LEVEL


class Drawn(NamedTuple):
    """Arguments of `test_context.run`, and sizes of its arrays."""

    method: str
    axes: dict[str, int]
    sizes: dict[str, int]
    mask: dict[str, Any]
    options: dict[str, Any]
    rotated: bool
    seed: int


@st.composite
def cases(draw) -> Drawn:
    """What is legal on at most eight devices, any heads a stage, segments and positions in any order."""
    one_of = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    method = one_of(*METHODS)
    context, room = one_of(1, 2, 4, 8), 8
    room //= context
    axes = {"context": context}
    for name in ("ring", "tensor", "fsdp"):
        legal = [n for n in (1, 2, 4, 8) if n <= room and (name == "ring" or n <= 2)]
        axes[name] = one_of(*legal) if name != "ring" or method in TWO_LEVEL else 1
        room //= axes[name]
    hk, group = one_of(1, 2, 3, 4, 8), one_of(1, 2, 3, 4, 5, 8)
    if method in BY_HEADS:  # to the nearest that the devices can share
        if hk % context and context % hk:
            hk = context
        group = group if hk * group % context == 0 else context // hk
    stage = None
    if method in STAGED:
        stage = one_of(None, *legal_heads_per_stage(hk * group, hk, context))
    zigzag = method in BALANCED and draw(st.booleans())
    shards = context * axes["ring"] * (2 if zigzag else 1)
    s, b = shards * one_of(1, 2, 3), axes["fsdp"] * one_of(1, 2)
    numbers = lambda low, high: st.integers(low, high)  # noqa: E731
    ids = lambda low, high: draw(  # noqa: E731
        st.none() | numbers(0, 99).map(lambda n: _integers(n, low, high, b, s))
    )
    mask = dict(
        causal=draw(st.booleans()),
        window=draw(st.none() | numbers(1, s + 2)),
        softcap=one_of(None, 0.7, 3.0),
        scale=one_of(None, 0.4, -0.6),
        segment_ids=ids(-1, 2),
    )
    options = dict(
        heads_per_stage=stage,
        layout="zigzag" if zigzag else "contiguous",
        core=one_of("auto", "dense"),
        stage_policy=one_of("nothing", "attn_out"),
        positions=ids(0, 40),
    )
    heads = dict(h=hk * group * axes["tensor"], hk=hk * axes["tensor"])
    sizes = dict(b=b, s=s, d=one_of(3, 6), k=one_of(2, 4), **heads)
    axes = {name: axes[name] for name in ("fsdp", "ring", "context", "tensor")}
    return Drawn(method, axes, sizes, mask, options, draw(st.booleans()), draw(numbers(0, 99)))


def _integers(seed: int, low: int, high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


def check(case: Drawn) -> None:
    """y and all gradients to 1e-11 of the largest, or of 0.01: those of a row with one key vanish."""
    half = case.sizes["k"] // 2
    inv_freq = np.linspace(1.0, 0.1, half) if case.rotated else None
    with jax.enable_x64(True):
        inputs = layer_inputs(case.seed, **case.sizes, dtype="float64")
        got = run(
            inputs, case.axes, case.method, **case.mask, **case.options,
            inv_freq=None if inv_freq is None else jnp.asarray(inv_freq),
        )  # fmt: skip
        positions = case.options["positions"]
        expected = layer_oracle(*inputs, positions=positions, inv_freq=inv_freq, **case.mask)
        assert_close(got, expected, 1e-11, least=0.01)


@pytest.mark.parametrize(
    "examples", [3, pytest.param(100, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_drawn_calls_are_one_layer(examples):
    # Not minimised: a smaller failure is not worth minutes of compilation.
    quick = settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        phases=(Phase.explicit, Phase.generate), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    quick(given(cases())(check))()
