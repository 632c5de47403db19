"""The ViTTT classifier: its images, its block, and that it trains, resumes and says what cannot be."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.vittt import run as vittt
from jaxlab.ttt.vittt import depthwise
from models.decoder import DecoderConfig
from models.vittt import ViTTTConfig
from sharding.mesh import MeshShape
from train import trainer
from train.data.digits import Digits, bilinear, glyphs
from train.data.text import Text
from train.objectives import Classify, NextToken

SMALL = ViTTTConfig(image=12, layers=2, d_model=16, heads=2, mlp=24)


def test_images_are_a_function_of_step_and_row():
    source = Digits(image=12)
    rows = source.make(8, seed=3, split="train")
    whole = rows.batch_at(5)
    assert whole["images"].shape == (8, 12, 12) and whole["images"].dtype == np.float32
    again = source.make(8, seed=3, split="train", process_index=1, process_count=2)
    part = again.batch_at(5, slice(2, 5))
    np.testing.assert_array_equal(part["images"], whole["images"][2:5])
    np.testing.assert_array_equal(part["labels"], whole["labels"][2:5])
    # Another batch size cuts the same images elsewhere; another split or seed has others.
    other = source.make(4, seed=3, split="train").batch_at(11)
    np.testing.assert_array_equal(other["images"], whole["images"][4:])
    for seed, split in ((4, "train"), (3, "valid")):
        other = source.make(8, seed=seed, split=split).batch_at(5)
        assert not np.array_equal(other["images"], whole["images"])
    labels = np.concatenate([rows.batch_at(i)["labels"] for i in range(40)])
    assert set(labels) == set(range(10)) and np.bincount(labels).min() > 10


def test_glyphs_are_ten_different_shapes_a_font():
    for split in ("train", "valid"):
        found = glyphs(split)
        assert found.min() == 0 and found.max() == 1
        for font in found:
            gaps = np.abs(font[:, None] - font[None]).mean((2, 3))
            assert np.min(gaps + np.eye(10)) > 0.01


def test_bilinear_values_lie_between_pixels_and_are_zero_outside():
    ramp = np.arange(25.0).reshape(5, 5)
    at = np.array([-1.0, -0.25, 0.6, 1.0])
    y, x = np.meshgrid(at, at, indexing="ij")
    want = 5 * (y + 1) * 2 + (x + 1) * 2  # a plane, which interpolation keeps
    np.testing.assert_allclose(bilinear(ramp, y, x), want, atol=1e-12)
    assert not bilinear(ramp, np.array([1.6, 0.0]), np.array([0.0, -3.0])).any()


def test_depthwise_is_a_grouped_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 3))
    w = jax.random.normal(jax.random.key(1), (3, 3, 3))
    want = jax.lax.conv_general_dilated(
        x, jnp.moveaxis(w, 0, -1)[:, :, None], (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=3,
    )  # fmt: skip
    np.testing.assert_allclose(depthwise(x, w), want, atol=1e-5)
    each = depthwise(x, jnp.broadcast_to(w, (2, 3, 3, 3)))
    np.testing.assert_allclose(each, want, atol=1e-5)


def test_the_objective_is_the_mean_log_probability():
    logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 3.0]])
    batch = {"images": jnp.zeros((2, 4, 4)), "labels": jnp.array([0, 1])}
    loss, metrics = Classify()(lambda params, images: logits, None, batch, None)
    want = -(2 - np.log(np.exp(2) + 2)) - (1 - np.log(1 + np.e + np.exp(3)))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert metrics["accuracy"] == (1, 2) and metrics["loss"] == (loss, 2)


@pytest.mark.slow
def test_it_trains_resumes_and_evaluates_on_a_mesh(tmp_path):
    run = dataclasses.replace(
        vittt(), model=SMALL, source=Digits(image=12, held_out=32), steps=3, batch=8, log_every=1,
        save_every=2, eval_every=0, mesh=MeshShape(data=2, fsdp=2, tensor=2),
    )  # fmt: skip
    out = trainer.fit(run, tmp_path / "run", quiet=True)
    assert out.code == trainer.DONE and np.isfinite(out.values["valid/loss"])
    assert 0 <= out.values["valid/accuracy"] <= 1
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    assert trainer.fit(run, tmp_path / "run", quiet=True).values == out.values


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": ViTTTConfig(image=28, patch=5)}, "model.patch=5 must divide model.image=28"),
        ({"model": ViTTTConfig(heads=5)}, "model.heads=5 must divide"),
        ({"model": ViTTTConfig(layers=0)}, "model.layers=0"),
        ({"model": ViTTTConfig(classes=7)}, "model.classes=7 must equal source.classes=10"),
        ({"source": Digits(image=20)}, "model.image=28 must equal source.image=20"),
        ({"source": Digits(turn=-1)}, "source.turn=-1"),
        ({"source": Digits(image=4)}, "source.image=4 must be at least 8"),
        ({"mesh": MeshShape(data=4, context=2)}, "mesh.context=2 must be 1"),
        ({"source": Text()}, "objective classify needs labels: source has no classes"),
        ({"model": DecoderConfig()}, "objective classify needs labels: model has no classes"),
        ({"objective": NextToken()}, "needs a language model"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_work_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(vittt(), **changes).check(8)
