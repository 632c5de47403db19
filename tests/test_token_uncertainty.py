"""Uncertainty of next tokens: the tiled function against whole arrays, dropout in decoders, the evaluator."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import presets
from jaxlab import uncertainty as un
from models.decoder import Block, DecoderConfig
from train import trainer
from train.cli import main
from train.data.text import Text, load_tokenizer
from train.evaluate import Scene
from train.objectives import NextToken
from train.optimizer import Optimizer
from train.posterior import Dropout, Laplace, Runs, Swag
from train.run import Run
from train.state import init_params
from train.tokens import Tokens, names_of

# Most of the time of this file is compilation.
FAST = {"xla_backend_optimization_level": 0}
quick_jit = functools.partial(jax.jit, compiler_options=FAST)
S, B, T, D, V = 4, 2, 6, 3, 7
CLASSES = (5, 0, 3)


def xlogx(x):
    return np.where(x > 0, x * np.log(np.where(x > 0, x, 1)), 0)


def oracle(hidden, head, targets):
    """From whole probabilities, in float64."""
    hidden, head = np.asarray(hidden, np.float64), np.asarray(head, np.float64)
    z = np.einsum("sbtd,dv->sbtv" if head.ndim == 2 else "sbtd,sdv->sbtv", hidden, head)
    p = np.exp(z - z.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    mu, var = p.mean(0), p.var(0)
    c, d = var / (2 * mu), xlogx(p).mean(0) - xlogx(mu)
    chosen = np.take_along_axis(mu, np.maximum(targets, 0)[..., None], -1)[..., 0]
    at = list(CLASSES)
    return un.TokenUncertainty(
        -xlogx(mu).sum(-1), d.sum(-1), c.sum(-1), 1 - mu.max(-1),
        np.where(targets >= 0, -np.log(chosen), 0), mu.argmax(-1), c.argmax(-1),
        c[..., at], d[..., at], mu[..., at],
    )  # fmt: skip


def drawn(seed, own_heads):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(S, B, T, D))
    head = random.normal(size=(S, D, V) if own_heads else (D, V))
    return hidden, head, random.integers(-1, V, (B, T))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("tiles, own_heads", [(1, True), (3, False), (6, True)])
def test_tokens_against_whole_probabilities(tiles, own_heads, dtype):
    with jax.enable_x64(dtype == "float64"):
        hidden, head, targets = drawn(tiles, own_heads)
        hidden, head = hidden.astype(dtype), head.astype(dtype)
        fn = quick_jit(un.token_uncertainty, static_argnames=("classes", "n_tiles"))
        found = fn(hidden, head, targets, CLASSES, n_tiles=tiles)
        want = oracle(hidden, head, targets)
        tolerance = {"float32": 1e-6, "float64": 1e-13}[dtype]
        for name, x, y in zip(found._fields, found, want, strict=True):
            np.testing.assert_allclose(x, y, tolerance, tolerance, err_msg=name)
        assert found.mi.dtype == dtype and found.dominant.dtype == jnp.int32
        assert fn(hidden, head, targets, (), n_tiles=tiles).c.shape == (B, T, 0)


def test_memory_is_that_of_a_tile():
    shapes = [jax.ShapeDtypeStruct(s, t) for s, t in
              (((8, 1, 64, 4), "float32"), ((4, 512), "float32"), ((1, 64), "int32"))]  # fmt: skip
    temporary = {}
    for n in (1, 16):
        fn = jax.jit(lambda h, w, y, n=n: un.token_uncertainty(h, w, y, n_tiles=n))
        temporary[n] = fn.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert temporary[16] < temporary[1] / 8


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (dict(hidden=np.ones((1, B, T, D))), ValueError, r"hidden=\(1, 2, 6, 3\).*at least 2"),
        (dict(hidden=np.ones((S, T, D))), ValueError, r"hidden=\(4, 6, 3\)"),
        (dict(hidden=np.full((S, B, T, D), np.nan)), ValueError, "hidden must be finite"),
        (
            dict(head=np.ones((D + 1, V))),
            ValueError,
            r"head=\(4, 7\) must be \[3, v\] or \[4, 3, v\]",
        ),
        (dict(head=np.ones((D, 1))), ValueError, "v at least 2"),
        (dict(targets=np.zeros((B, T))), ValueError, "targets=.* float"),
        (dict(targets=np.full((B, T), V)), ValueError, "targets must be below the vocabulary 7"),
        (dict(classes=(V,)), ValueError, "classes=.7,.*below 7"),
        (dict(classes=(1, 1)), ValueError, "classes=.1, 1.*different"),
        (dict(n_tiles=4), ValueError, "n_tiles=4 must divide the 6 tokens"),
        (dict(n_tiles=0), ValueError, "n_tiles=0"),
    ],
    ids=lambda x: "",
)
def test_errors_name_what_is_wrong(change, kind, message):
    good = dict(zip(("hidden", "head", "targets"), drawn(0, False), strict=True))
    with pytest.raises(kind, match=message):
        un.token_uncertainty(**(good | {"classes": CLASSES} | change))


SMALL = DecoderConfig(layers=2, d_model=16, heads=2, kv_heads=2, head_dim=8, mlp=16, dropout=0.3)
TOKENS = jnp.arange(24).reshape(2, 12)


def built(config):
    module = config.build("cpu")
    inputs = (jax.ShapeDtypeStruct((1, 12), jnp.int32),)
    return module, quick_jit(lambda key: init_params(module, key, inputs))(jax.random.key(0))


def test_dropout_is_on_where_an_rng_is_given():
    module, params = built(SMALL)
    call = lambda p, key: module.apply({"params": p}, TOKENS, rngs={"dropout": key})  # noqa: E731
    keys = jax.vmap(jax.random.key)(jnp.array([1, 1, 2]))
    one, same, other = quick_jit(jax.vmap(call, (None, 0)))(params, keys)
    plain = quick_jit(lambda p: module.apply({"params": p}, TOKENS))(params)
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, other) and not np.allclose(one, plain)
    # Parameters are those of a model without it, and so is what it says when there is no rng.
    without, fresh = built(dataclasses.replace(SMALL, dropout=0.0))
    jax.tree.map(np.testing.assert_array_equal, params, fresh)
    said = quick_jit(lambda p: without.apply({"params": p}, TOKENS))(params)
    np.testing.assert_array_equal(said, plain)


def test_what_is_dropped_and_what_is_scaled():
    """A block whose mixer says nothing: x + mask / keep * MLP(x), 3 in 10 of the mask zero."""
    block, x = Block(SMALL), jax.random.normal(jax.random.key(1), (2, 12, 16))
    rest = (x, (None,), jnp.tile(jnp.arange(12), (2, 1)), None, jnp.ones(4))
    params = nn.unbox(quick_jit(block.init)(jax.random.key(0), *rest))["params"]
    params["mixer_0"]["wo"] *= 0
    say = lambda **how: block.apply({"params": params}, *rest, **how)[0] - x  # noqa: E731
    branch = np.asarray(quick_jit(say)())
    noisy = quick_jit(jax.vmap(lambda key: say(rngs={"dropout": key})))
    found = np.asarray(noisy(jax.random.split(jax.random.key(3), 300)))
    kept = np.isclose(found, branch / 0.7, atol=1e-5) & ~np.isclose(found, 0, atol=1e-7)
    assert np.all(kept | (found == 0))
    assert abs(kept.mean() - 0.7) < 0.005


def training_gradient(dropout):
    """The compiled text of the gradient of a training step."""
    module, params = built(dataclasses.replace(SMALL, layers=1, dropout=dropout))
    batch = run_of().source.make(2, seed=0, split="train").batch_at(0) | {"step": jnp.int32(0)}
    apply = lambda p, *a, **k: module.apply({"params": p}, *a, **k)  # noqa: E731
    grad = jax.grad(lambda p, key: NextToken()(apply, p, batch, key)[0])
    return jax.jit(grad).lower(params, jax.random.key(0)).compile(FAST).as_text()


def run_of(**changes):
    fields = dict(
        model=SMALL, objective=NextToken(), source=Text(seq_len=32),
        evaluators=(Tokens(Dropout(4), critical="(1)", batches=1, tiles=4),),
        optimizer=Optimizer(warmup=0), steps=4, batch=8, log_every=1, save_every=2,
    )  # fmt: skip
    return Run(**(fields | changes))


def test_no_dropout_costs_nothing():
    """The step of a model without it draws no random number."""
    words = re.compile(r"rng|threefry|shift-right-logical")
    assert not words.search(training_gradient(0.0)) and words.search(training_gradient(0.3))


@pytest.mark.slow
def test_masks_do_not_depend_on_the_mesh(tmp_path):
    """Same losses on one device and on eight; evaluation draws the same samples."""
    outcomes = []
    for data in (1, 8):
        run = run_of(mesh=dataclasses.replace(run_of().mesh, data=data))
        outcomes.append(trainer.fit(run, tmp_path / str(data), quiet=True).values)
    assert set(outcomes[0]) == set(outcomes[1])
    for name in outcomes[0]:
        np.testing.assert_allclose(outcomes[0][name], outcomes[1][name], 2e-3, 1e-4, err_msg=name)


def test_masks_change_by_step_in_training_only():
    module, params = built(SMALL)
    apply = lambda p, *a, **k: module.apply({"params": p}, *a, **k)  # noqa: E731
    batch = run_of().source.make(2, seed=0, split="train").batch_at(0)
    loss = lambda key, **more: NextToken()(apply, params, batch | more, key)[0]  # noqa: E731
    first, second = (jax.random.fold_in(jax.random.key(0), i) for i in (0, 1))
    train = quick_jit(lambda key: loss(key, step=0))
    assert train(first) != train(second) and train(first) == train(first)
    held_out = quick_jit(loss)
    assert held_out(first) == held_out(second)


def test_tokens_that_look_alike_keep_their_own_names():
    """The two bytes of one character show as the same sign."""
    tokens = tuple("é1".encode())
    assert names_of(load_tokenizer("bytes"), tokens) == [r"\ufffd#195", r"\ufffd#169", "1"]


SWAG = pytest.param(Swag(3, steps=4, every=2, rank=2), marks=pytest.mark.slow)


@pytest.mark.parametrize("posterior", [Dropout(3), SWAG], ids=["dropout", "swag"])
def test_the_evaluator_reports_what_whole_arrays_give(posterior, tmp_path):
    run = run_of(evaluators=(Tokens(posterior, critical="ae", batches=2, tiles=8),)).check(1)
    program = trainer.build(run, jax.devices()[:1])
    params = program.init().params
    (evaluator,) = run.evaluators
    scene = Scene(run, program.apply, program.mesh, (0, 1), None, tmp_path)
    with jax.set_mesh(program.mesh):
        values = evaluator.make(scene)(params, 0)
        samples = posterior.make(scene)
        fitted, rows = samples.prepare(params), run.source.make(8, seed=0, split="valid")
        p, y = [], []
        for i in range(2):
            batch = rows.batch_at(i)
            inputs = tuple(batch[n] for n in ("tokens", "positions", "segment_ids"))
            key = jax.random.fold_in(jax.random.key(0), i)
            p.append(jax.jit(samples.predict)(fitted, inputs, key))
            y.append(batch["targets"])
    real = np.concatenate(y) >= 0
    p, y = np.concatenate(p, 1)[:, real], np.concatenate(y)[real]
    mean, wrong = p.mean(0), p.mean(0).argmax(-1) != y
    want = {
        "tokens": len(y), "accuracy": np.mean(~wrong), "nll": -np.log(mean[np.arange(len(y)), y]).mean(),
        "mi": un.mutual_information(p).mean(),
        "error_auroc/mi": un.auroc(un.mutual_information(p), wrong),
        "token/a/c": un.contributions(p).mean(0)[ord("a")],
    }  # fmt: skip
    for name, x in want.items():
        np.testing.assert_allclose(values[f"uncertainty/{name}"], x, 1e-3, 1e-6, err_msg=name)
    at = [ord(c) for c in "ae"]
    critical, said = np.isin(y, at), np.isin(mean.argmax(-1), at)
    score = np.where(said, 0, mean[:, at].sum(-1))
    kept = np.argsort(score, kind="stable")[: int(np.ceil(0.8 * len(y)))]
    fnr = 1 - said[kept][critical[kept]].mean()
    deferred = 1 - critical[kept].sum() / critical.sum()
    assert 0 < deferred < 1
    for name, x in (("fnr", fnr), ("deferred", deferred)):  # rounding may swap two of the order
        found = values[f"uncertainty/critical_{name}/missed_critical_mass"]
        assert abs(found - x) <= 1.01 / critical.sum(), name
    page = (tmp_path / "uncertainty" / "tokens.md").read_text()
    assert page.count("\n|") == 14 and "uncertain about" in page


@pytest.mark.slow
def test_an_ensemble_of_runs_and_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        run = run_of(seed=seed, steps=2, evaluators=())
        trainer.fit(run, tmp_path / name, quiet=True)
    fields = ["evaluators.0=Tokens", "evaluators.0.batches=1", "evaluators.0.posterior=Runs",
              "evaluators.0.posterior.runs=b"]  # fmt: skip
    capsys.readouterr()
    assert main(presets(), ["eval", "a", *fields]) == 0, capsys.readouterr().err
    assert "uncertainty/mi" in capsys.readouterr().out
    assert (tmp_path / "a" / "uncertainty" / "tokens.md").is_file()
    other = dataclasses.replace(run, model=dataclasses.replace(SMALL, mlp=24))
    with pytest.raises(
        ValueError, match="posterior Runs: runs=b: its model.mlp is 16, here it is 24"
    ):
        Runs(("b",)).check(other)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": dataclasses.replace(SMALL, dropout=0.0)}, "Dropout needs model.dropout above 0"),
        ({"model": dataclasses.replace(SMALL, dropout=1.0)}, "model.dropout=1.0"),
        ({"evaluators": (Tokens(tiles=5),)}, "tiles=5 divide source.seq_len=32"),
        ({"evaluators": (Tokens(coverage=0.0),)}, "coverage=0.0"),
        ({"evaluators": (Tokens(batches=-1),)}, "batches=-1"),
        ({"evaluators": (Tokens(Runs()),)}, "must name at least one run"),
        ({"evaluators": (Tokens(Laplace()),)}, "Laplace needs a classifier"),  # pyright: ignore
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_cannot_work_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        run_of(**changes).check(1)
    with pytest.raises(ValueError, match="Tokens needs a language model"):
        dataclasses.replace(presets()["digits"].make(), evaluators=(Tokens(),)).check(1)
