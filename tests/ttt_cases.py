"""Configurations of TTT that cover its contract, inputs for them, and comparison of trees."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.ttt import LADDER, FastWeights

# Most of the time of this file is compilation.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
replace = dataclasses.replace


def inputs(
    seed, cfg, b=2, t=11, h=2, dk=3, dv=4, dh=5, dtype="float64", shared=True, per_matrix=True
):
    """q, k, v, fast weights, rates and gates; weights of a scale at which silu is not a line."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), dtype)  # noqa: E731
    lead = (h,) if shared else (b, h)
    linear = cfg.net == "linear"
    w1 = draw(*lead, dk if linear else dh, dv)
    fw = FastWeights(
        *(None, w1, None) if linear else (draw(*lead, dk, dh), w1, draw(*lead, dk, dh))
    )
    rates = random.uniform(0.05, 0.4, (b, t, h, 3) if per_matrix else (b, t, h))
    mu = random.uniform(0.1, 0.9, (b, t, h))
    tokens = draw(b, t, h, dk), draw(b, t, h, dk), draw(b, t, h, dv)
    return *tokens, fw, jnp.asarray(rates, dtype), jnp.asarray(mu, dtype)


def config(name, **changes):
    return replace(LADDER[name], **{"chunk_size": 4, **changes})


INCLUSIVE = {"visibility": "inclusive_chunk"}
TOKEN = {"visibility": "token", "orthogonalize": None}
SQUARED = {"loss": "squared", "momentum": False, "orthogonalize": None}
# Configuration, sizes; tokens do not divide into chunks unless a case says so.
CASES = {
    "base": (config("base"), {}),
    "base inclusive": (config("base", detach_norm=True, orthogonalize="muon", **INCLUSIVE), dict(t=10)),
    "base squared": (config("base", loss="squared"), dict(shared=False)),
    "base plain": (config("base", weight_norm=None, orthogonalize=None, sign=-1), dict(per_matrix=False)),
    "base pre": (config("base", weight_norm="pre", steps=2, momentum=False), dict(t=9, b=1)),
    "kernel only": (config("base", update=("w2", "w0"), steps=2), dict(t=9)),
    "V1": (config("V1", ns_steps=3), dict(t=12)),
    "V1p": (config("V1p"), dict(t=14)),
    "V1p inclusive": (config("V1p", orthogonalize=None, detach_norm=True, **INCLUSIVE), {}),
    "V1p steps": (config("V1p", orthogonalize=None, momentum=False, steps=3), {}),
    "V2": (config("V2"), dict(shared=False)),
    "V2 inclusive": (config("V2", orthogonalize="muon", query="k", **INCLUSIVE), {}),
    "V2 sums": (config("V2", orthogonalize=None, sign=-1), dict(t=12, per_matrix=False)),
    "V2 token": (config("V2", sign=-1, **TOKEN), {}),
    "V3": (config("V3"), {}),
    "V4": (config("V4", **INCLUSIVE), dict(t=8)),
    "V5": (config("V5"), {}),
    "V6": (config("V6", steps=2, **INCLUSIVE), {}),
    "V6 token": (config("V6", **TOKEN), {}),
    "affine": (config("V3", **SQUARED), dict(per_matrix=False)),
    "affine steps": (config("V3", **SQUARED, **INCLUSIVE, steps=3, sign=-1), {}),
    "one chunk": (config("base"), dict(t=4)),
    "one token": (config("base"), dict(t=1)),
    "one token inclusive": (config("V1p", **INCLUSIVE), dict(t=1)),
    "chunks of one": (config("V1p", chunk_size=1), dict(t=5)),
}  # fmt: skip


def legal(cfg):
    """Implementations that must exist for `cfg`, from the words of the specification."""
    names = ["recurrent", "auto"]
    static = cfg.net == "linear" or cfg.update == ("w1",)
    if static and cfg.loss == "dot" and cfg.weight_norm != "post":
        if cfg.steps == 1 or not (cfg.momentum or cfg.orthogonalize):
            names.append("parallel")
    if cfg.net == "linear" and cfg.loss == "squared":
        if not (cfg.momentum or cfg.weight_norm or cfg.orthogonalize):
            names.append("affine")
    return names


def as_numpy(args):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), args)


def assert_close(got, expected, tolerance, name=""):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape, (name, got.shape, expected.shape)
    error = np.max(np.abs(got - expected), initial=0)
    assert error <= tolerance * max(1, np.max(np.abs(expected), initial=0)), (name, error)


def assert_trees_close(got, expected, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, x), y in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        assert_close(x, y, tolerance, jax.tree_util.keystr(path))
