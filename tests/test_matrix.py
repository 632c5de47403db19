"""The composition matrix: model x objective x source x sharding. Each issue adds its rows.

Every legal cell trains, saves, resumes to the same parameters and evaluates, on eight devices; an
illegal one says why before anything is compiled. By default every choice is in some cell; `slow`
walks cells with every pair of choices and some of the rest.
"""

import dataclasses
import itertools
import shutil

import jax
import numpy as np
import pytest

from jaxlab.ttt import InnerConfig
from models.classifier import EnsembleConfig, MLPConfig
from models.decoder import DecoderConfig
from models.dit import DiTConfig
from models.lora import FROZEN_BASE, Lora
from models.mixers import TTT, LaCT, LinearAttention
from models.vittt import ViTTTConfig
from sharding.context import ContextConfig
from sharding.mesh import MeshShape
from train import trainer
from train.checkpoint import Checkpoints
from train.data.digits import Digits
from train.data.tabular import Shipped
from train.data.text import Text
from train.denoise import Denoised, Psi
from train.diffusion import Curriculum, Diffusion, duo_pp, mdlm
from train.evaluate import HeldOut, Sample
from train.metrics import read, series
from train.objectives import Classify, NextToken
from train.optimizer import Optimizer
from train.run import Run, load_run

SMALL = DecoderConfig(layers=2, d_model=16, heads=4, kv_heads=4, head_dim=4, mlp=32)
MODELS = {
    "decoder": SMALL,
    "qk-norm-tied-remat": dataclasses.replace(
        SMALL,
        context=ContextConfig(core="dense"),
        qk_norm=True,
        tied=True,
        remat="full",
        dropout=0.1,
    ),
    "two-mixers": dataclasses.replace(SMALL, pattern=("attention", "attention"), remat="attention"),
}
MODELS["lact-gated-delta"] = dataclasses.replace(
    SMALL, pattern=("lact", "gated_delta"), linear=LinearAttention(chunk_size=8), remat="dots",
    lact=LaCT(heads=4, window=8, inner=InnerConfig(chunk_size=8), low_rank=2),
)  # fmt: skip
MODELS["ttt-mlp-kda"] = dataclasses.replace(SMALL, pattern=("ttt_mlp", "kda"), ttt=TTT(gate=True))
OBJECTIVES = {"next-token": NextToken(), "tiled-z": NextToken(tiles=4, z_loss=1e-4)}
SOURCES = {
    "concat": Text(seq_len=32),
    "first-fit": Text(seq_len=32, packing="first_fit"),
    "mixture": Text(seq_len=32, files=("builtin:pydoc",) * 2, weights=(3.0, 1.0)),
}
SHARDINGS = {
    "data8": MeshShape(data=8),
    "fsdp8": MeshShape(data=1, fsdp=8),
    "data2-tensor4": MeshShape(data=2, tensor=4),
    "fsdp4-context2": MeshShape(data=1, fsdp=4, context=2),
    "all": MeshShape(data=1, fsdp=2, context=2, tensor=2),
}
MODELS["lora"] = Lora(base=SMALL, rank=2)
MODELS["upipe-zigzag"] = dataclasses.replace(
    SMALL, context=ContextConfig("upipe_ring", layout="zigzag"), remat="attn_y", mlp_tiles=2
)
OPTIMIZERS = (
    Optimizer(name="adamw", ema=0.9),
    Optimizer(name="muon"),
    Optimizer(name="sgd", lr=0.1),
)
AXES = (MODELS, OBJECTIVES, SOURCES, SHARDINGS)
WHOLE = list(itertools.product(*AXES))
DIT = DiTConfig(vocab=264, layers=2, d_model=16, heads=4, cond=8)
DENOISERS = {
    "dit": DIT,
    "dit-ulysses": dataclasses.replace(DIT, context=ContextConfig("ulysses"), remat="full"),
    "dit-gated-delta": dataclasses.replace(DIT, mixer="gated_delta"),
}
NOISES = {"mdlm": mdlm(), "duo++": duo_pp(end=2)}
WHOLE += itertools.product(DENOISERS, NOISES, SOURCES, SHARDINGS)
# Images are not split over a context axis.
ROWS = {name: SHARDINGS[name] for name in ("data8", "fsdp8", "data2-tensor4")}
PERCEPTRON = MLPConfig(features=64, layers=1, d_model=16, dropout=0.2)
CLASSIFIERS = {
    "mlp-dropout": PERCEPTRON,
    "ensemble": EnsembleConfig(PERCEPTRON, 2),
    "vittt-dropout": ViTTTConfig(image=8, layers=1, d_model=16, mlp=16, dropout=0.2),
}
PICTURES = {"shipped": Shipped(), "drawn": Digits(image=8, held_out=16)}
WHOLE += itertools.product(CLASSIFIERS, ("classify",), PICTURES, ROWS)
MODELS |= DENOISERS | CLASSIFIERS
OBJECTIVES |= NOISES | {"classify": Classify()}
SOURCES |= PICTURES
# Models that take a minute to compile: slow, one cell each and some of the rest.
HEAVY = {
    "lact-gated-delta": ("next-token", "first-fit", "all"),
    "ttt-mlp-kda": ("tiled-z", "concat", "fsdp4-context2"),
    "dit-gated-delta": ("duo++", "concat", "all"),
    "vittt-dropout": ("classify", "drawn", "data2-tensor4"),
}


def cover(cells: list[tuple], size: int) -> list[tuple]:
    """A few of the cells in which all that stands in some cell, `size` choices at once, does (greedy)."""
    sets = lambda cell: set(itertools.combinations(enumerate(cell), size))  # noqa: E731
    left, chosen = set().union(*map(sets, cells)), []
    while left:
        best = max(cells, key=lambda cell: len(sets(cell) & left))
        left -= sets(best)
        chosen.append(best)
    return chosen


def build(cell: tuple) -> Run:
    model, objective, source, sharding = (axis[name] for axis, name in zip(AXES, cell, strict=True))
    optimizer = OPTIMIZERS[WHOLE.index(cell) % 3]
    if isinstance(model, Lora):
        optimizer = dataclasses.replace(optimizer, freeze=FROZEN_BASE)
    writes = (Denoised(Psi(steps=2), rows=2) if cell[0] in DENOISERS else Sample(tokens=3),)
    writes = () if cell[0] in CLASSIFIERS else writes
    return Run(
        model=model, objective=objective, source=source, mesh=sharding,
        evaluators=(HeldOut(batches=1), *writes), optimizer=optimizer,
        steps=3, batch=8, log_every=1, save_every=2,
    )  # fmt: skip


def parameters(folder) -> list[np.ndarray]:
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    program = trainer.build(load_run(folder))
    state = checkpoints.restore(program.state).state
    checkpoints.close()
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def walk(cell: tuple, folder) -> None:
    run = build(cell)
    out = trainer.fit(run, folder, quiet=True)
    assert out.code == trainer.DONE and out.step == 3 and np.isfinite(out.values["valid/loss"])
    whole, losses = parameters(folder), series(read(folder), "train", "loss")[1]
    assert len(losses) == 3 and np.all(np.isfinite(losses))
    shutil.rmtree(folder / "checkpoints" / "3")
    again = trainer.fit(run, folder, quiet=True)
    assert again.values == out.values
    for a, b in zip(parameters(folder), whole, strict=True):
        np.testing.assert_array_equal(a, b)


LIGHT = [cell for cell in WHOLE if cell[0] not in HEAVY]
PAIRS = cover(LIGHT, 2)
QUICK = cover(PAIRS, 1)
SLOW = [cell for cell in PAIRS if cell not in QUICK]
SLOW += [(model, *rest) for model, rest in HEAVY.items()]
SLOW += [cell for cell in WHOLE if cell not in PAIRS + SLOW][::9]


@pytest.mark.parametrize("cell", QUICK, ids="+".join)
def test_every_choice_in_some_cell(cell, tmp_path):
    walk(cell, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("cell", SLOW, ids="+".join)
def test_every_pair_of_choices_in_some_cell(cell, tmp_path):
    walk(cell, tmp_path / "run")


ILLEGAL = [
    ("decoder", "next-token", "concat", "data8", {"objective": mdlm()}, "needs a denoiser"),
    ("dit", "mdlm", "concat", "data8", {"model": dataclasses.replace(DIT, vocab=256)},
     "model.vocab=257 or more"),
    ("dit", "duo++", "concat", "data8", {"objective": duo_pp(end=2, k=300)}, "curriculum.k=300"),
    ("dit", "duo++", "concat", "data8", {"objective": Diffusion("masked", Curriculum())},
     "needs prior='uniform'"),
    ("dit", "mdlm", "concat", "data8", {"evaluators": (Denoised(Psi(high="x")),)}, "high='x'"),
    ("dit", "mdlm", "concat", "data8",
     {"model": dataclasses.replace(DIT, context=ContextConfig("ring", layout="zigzag"))},
     "use 'contiguous'"),
    ("decoder", "tiled-z", "concat", "data8", {"source": Text(seq_len=30)}, "objective.tiles=4"),
    ("decoder", "next-token", "concat", "all", {"source": Text(seq_len=31)}, "mesh.context=2"),
    ("decoder", "next-token", "concat", "data8", {"batch": 12}, "use a multiple of 8"),
    ("decoder", "next-token", "concat", "data2-tensor4",
     {"model": dataclasses.replace(SMALL, heads=2, kv_heads=2)}, "mesh.tensor=4"),
    ("decoder", "next-token", "first-fit", "fsdp8", {"model": dataclasses.replace(SMALL, vocab=9)},
     "model.vocab=9"),
    ("mlp-dropout", "classify", "shipped", "data8", {"objective": NextToken()}, "needs a language model"),
    ("vittt-dropout", "classify", "drawn", "data8", {"mesh": MeshShape(data=4, context=2)},
     "mesh.context=2 must be 1"),
    ("ensemble", "classify", "shipped", "data8", {"source": Digits()}, "must equal source.features=784"),
    ("decoder", "next-token", "concat", "fsdp8",
     {"model": dataclasses.replace(SMALL, d_model=12)}, "not divisible by fsdp=8"),
]  # fmt: skip


@pytest.mark.parametrize("case", ILLEGAL, ids=lambda c: c[-1])
def test_an_illegal_cell_says_why_before_compiling(case, tmp_path, monkeypatch):
    *cell, changes, message = case
    run = dataclasses.replace(build(tuple(cell)), **changes)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_: pytest.fail("compiled"))
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        trainer.fit(run, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
