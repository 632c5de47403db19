"""Training with the sequence sharded is training: same losses, same checkpoints, by every method."""

import dataclasses

import jax
import numpy as np
import pytest

from configs import long_context
from models.decoder import DecoderConfig
from sharding.context import ContextConfig
from sharding.mesh import MeshShape, make_mesh
from train import trainer
from train.data.text import Text
from train.evaluate import HeldOut, Sample
from train.metrics import read, series
from train.objectives import NextToken
from train.optimizer import Optimizer
from train.run import Run
from train.state import init_params

RUN = Run(
    model=DecoderConfig(layers=2, d_model=16, heads=16, kv_heads=4, head_dim=4, mlp=32),
    objective=NextToken(tiles=2), source=Text(seq_len=64), evaluators=(HeldOut(batches=1),),
    mesh=MeshShape(data=1), steps=3, batch=4, log_every=1, save_every=2,
)  # fmt: skip

# Method, mesh, and what else the model is computed with.
WAYS = {
    # More heads a stage than devices.
    "upipe": (
        ContextConfig("upipe", 8), dict(fsdp=2, context=4), dict(remat="attn_y", mlp_tiles=4)
    ),
    "upipe, keys repeated": (ContextConfig("upipe"), dict(context=8), {}),
    "ulysses": (ContextConfig("ulysses"), dict(context=4, tensor=2), {}),
    "allgather": (ContextConfig("allgather", layout="zigzag"), dict(context=2), {}),
    "usp": (ContextConfig("usp", layout="zigzag"), dict(ring=2, context=2), {}),
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


SLOW = ("upipe, keys repeated", "ulysses", "allgather", "usp", "offload", "ring")


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
    """Saved by 8 devices in stages of 8 heads, gone on with one device, then with 4 in stages of 8."""
    eight = changed(RUN, *WAYS["upipe, keys repeated"][:2])
    fit(dataclasses.replace(eight, steps=1), tmp_path / "run")
    fit(dataclasses.replace(RUN, steps=2), tmp_path / "run")
    context, mesh, model = WAYS["upipe"]
    end = dataclasses.replace(
        changed(RUN, context, mesh, **model), evaluators=(HeldOut(batches=1), Sample(tokens=3))
    )
    losses, held_out = fit(end, tmp_path / "run")
    np.testing.assert_allclose(losses, plain[0], rtol=1e-5)
    np.testing.assert_allclose(held_out, plain[1], rtol=1e-5)


def test_shards_with_unequal_numbers_of_targets_weigh_tokens_alike():
    """Two targets on the first shard, none on the second, many on the others; loss and gradients."""
    random = np.random.default_rng(0)
    tokens, targets = random.integers(0, 256, (2, 2, 64)).astype(np.int32)
    targets[:, 2:40] = -1
    positions = np.broadcast_to(np.arange(64, dtype=np.int32), (2, 64))
    batch = dict(tokens=tokens, targets=targets, positions=positions, segment_ids=positions * 0 + 1)

    def of(config, params):
        module = config.build("cpu")

        def loss(params):
            apply = lambda p, *args, **how: module.apply({"params": p}, *args, **how)  # noqa: E731
            total, metrics = NextToken(tiles=2)(apply, params, batch, jax.random.key(0))
            return total / metrics["loss"][1]

        # Compilation is most of the time.
        quick = {"xla_backend_optimization_level": 0}
        return jax.jit(jax.value_and_grad(loss), compiler_options=quick)(params)

    spec = (jax.ShapeDtypeStruct((1, 64), np.int32),)
    params = jax.jit(lambda: init_params(RUN.model.build("cpu"), jax.random.key(0), spec))()
    expected = of(RUN.model, params)
    with jax.set_mesh(make_mesh(MeshShape(data=1, context=4))):
        got = of(changed(RUN, ContextConfig("upipe", 8)).model, params)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "context, mesh, model, source, message",
    [
        (
            ContextConfig("upipe", 6), dict(context=2), {}, {},
            r"model\.context\.heads_per_stage=6 is not legal for num_heads=16, num_kv_heads=4, context=2",
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


# The preset, with a warmup that the steps leave.
LONG = dataclasses.replace(
    long_context.run(), optimizer=Optimizer(warmup=1), steps=4, save_every=0, evaluators=()
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fit(changed(LONG, mlp_tiles=1), tmp_path_factory.mktemp("whole") / "run")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", [(ContextConfig("upipe"), dict(context=8)), WAYS["upipe_ring"][:2]], ids=["8", "4x2"]
)
def test_rows_of_32k_tokens_learn_as_on_one_device(way, whole, tmp_path):
    """8 shards of 4096 tokens, documents packed; losses over the steps to 1e-4."""
    sharded = fit(changed(LONG, *way), tmp_path / "sharded")[0]
    np.testing.assert_allclose(sharded, whole, rtol=1e-4)
    assert whole[-1] < whole[0]
