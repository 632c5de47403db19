"""Training with the sequence sharded is training: same losses, same checkpoints, by every method."""

import dataclasses

import numpy as np
import pytest

from configs import long_context
from models.decoder import DecoderConfig
from sharding.context import ContextConfig
from sharding.mesh import MeshShape
from train import trainer
from train.data.text import Text
from train.evaluate import HeldOut, Sample
from train.metrics import read, series
from train.objectives import NextToken
from train.run import Run

RUN = Run(
    model=DecoderConfig(layers=2, d_model=16, heads=8, kv_heads=4, head_dim=4, mlp=32),
    objective=NextToken(tiles=2), source=Text(seq_len=64), evaluators=(HeldOut(batches=1),),
    mesh=MeshShape(data=1), steps=3, batch=4, log_every=1, save_every=2,
)  # fmt: skip

# Method, mesh, and what else the model is computed with.
WAYS = {
    "upipe": (ContextConfig("upipe"), dict(fsdp=2, context=4), dict(remat="attn_y", mlp_tiles=4)),
    "offload": (
        ContextConfig("upipe", stage_policy="attn_out"), dict(context=2, tensor=2),
        dict(remat="offload"),
    ),
    "ring": (ContextConfig("ring", layout="zigzag"), dict(context=8), dict(remat="full")),
    "upipe_ring": (ContextConfig("upipe_ring", layout="zigzag"), dict(ring=4, context=2), {}),
}  # fmt: skip


def changed(run: Run, context=None, mesh=None, **model) -> Run:
    model = dataclasses.replace(run.model, context=context or ContextConfig(), **model)
    return dataclasses.replace(run, model=model, mesh=MeshShape(data=1, **(mesh or {})))


def fit(run: Run, folder) -> tuple[list[float], float]:
    """Losses of the steps, and of the held-out batch."""
    out = trainer.fit(run, folder, quiet=True, allow=("steps",))
    assert out.code == trainer.DONE
    return series(read(folder), "train", "loss")[1], out.values.get("valid/loss", 0.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return fit(RUN, tmp_path_factory.mktemp("plain") / "run")


SLOW = ("offload", "ring")


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=pytest.mark.slow) if w in SLOW else w for w in WAYS]
)
def test_losses_are_those_of_one_device(way, plain, tmp_path):
    """Packed documents; held-out loss too, whose batches are put into the same order."""
    context, mesh, model = WAYS[way]
    losses, held_out = fit(changed(RUN, context, mesh, **model), tmp_path / "run")
    np.testing.assert_allclose(losses, plain[0], rtol=1e-5)
    np.testing.assert_allclose(held_out, plain[1], rtol=1e-5)


def test_a_checkpoint_goes_on_with_any_method(plain, tmp_path):
    """Saved by stages on 4 x 2, gone on with one device, then with a ring; and it writes text."""
    context, mesh, model = WAYS["upipe"]
    run = dataclasses.replace(changed(RUN, context, mesh, **model), steps=1)
    fit(run, tmp_path / "run")
    fit(dataclasses.replace(RUN, steps=2), tmp_path / "run")
    ring = changed(RUN, *WAYS["upipe_ring"][:2])
    end = dataclasses.replace(ring, evaluators=(HeldOut(batches=1), Sample(tokens=3)))
    losses, held_out = fit(end, tmp_path / "run")
    np.testing.assert_allclose(losses, plain[0], rtol=1e-5)
    np.testing.assert_allclose(held_out, plain[1], rtol=1e-5)


@pytest.mark.parametrize(
    "context, mesh, model, source, message",
    [
        (
            ContextConfig("upipe", 6), dict(context=2), {}, {},
            r"model\.context\.heads_per_stage=6 is not legal for num_heads=8, num_kv_heads=4, context=2",
        ),
        (ContextConfig("ulysses"), dict(ring=2), {}, {}, r"model\.context\.method=.ulysses. .* ring=2"),
        (ContextConfig("ring", layout="zigzag"), dict(context=8), {}, dict(seq_len=72),
         r"model\.context\.method=.ring.: seq_len=72 is not divisible by 2 \* ring=8"),
        (ContextConfig("ulysses"), dict(context=8), dict(heads=6, kv_heads=6), {},
         r"model\.context\.method=.ulysses.: num_heads=6 is not divisible by context=8"),
        (ContextConfig(layout="zigzag"), {}, {}, {}, r"model\.context\.layout='zigzag' is for"),
        (ContextConfig("upipe", core="flash"), {}, {}, {}, r"model\.context\.core='flash' must be"),
        (ContextConfig("upipe", core="splash"), dict(context=4), {}, {},
         r"model\.context\.core='splash' cannot be used: splash needs a length and a head dim"),
        (ContextConfig(core="cudnn"), {}, {}, {}, r"model\.context\.core='cudnn' cannot be used"),
        (ContextConfig("ring", core="dense"), dict(context=4), {}, {},
         r"model\.context\.core='dense' is not used, 'ring' has attention of its own"),
        (ContextConfig("ulysses", stage_policy="attn_out"), dict(context=4), {}, {},
         r"model\.context\.stage_policy='attn_out' is for the methods"),
        (ContextConfig(), dict(tensor=4), dict(heads=6, kv_heads=3), {},
         r"model\.heads=6 is not divisible by mesh\.tensor=4; use mesh\.tensor in \[1, 3\]"),
        (ContextConfig("upipe"), dict(context=4), dict(mlp_tiles=32), {},
         r"model\.mlp_tiles=32 must divide the 16 tokens of a device"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_said_before_compiling(context, mesh, model, source, message, tmp_path):
    run = changed(RUN, context, mesh, **model)
    run = dataclasses.replace(run, source=dataclasses.replace(run.source, **source))
    with pytest.raises(ValueError, match=message):
        trainer.fit(run, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [(ContextConfig("upipe"), dict(context=8)), WAYS["upipe_ring"][:2]], ids=["8", "4x2"]
)
def test_rows_of_32k_tokens_learn_as_on_one_device(way, tmp_path):
    """The preset: 8 shards of 4096 tokens, documents packed; losses over the steps to 1e-4."""
    preset = dataclasses.replace(long_context.run(), steps=3, save_every=0, evaluators=())
    whole = fit(changed(preset, mlp_tiles=1), tmp_path / "whole")[0]
    sharded = fit(changed(preset, *way), tmp_path / "sharded")[0]
    np.testing.assert_allclose(sharded, whole, rtol=1e-4)
