"""Evaluator of a language model's uncertainty: by token, and about which tokens it is."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from jaxlab import uncertainty as un
from train.classified import areas, rates
from train.evaluate import Scene
from train.feed import global_batch
from train.objectives import inputs_of
from train.posterior import Dropout, Runs, Swag

SCORES = ("entropy", "mi", "c_sum", "maxprob")  # of a token; of critical ones also those of `about`


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Figures of the held-out part's next tokens, from samples of a posterior; `jaxlab eval` also writes
    the places where the model knows least.

    Names: tokens, accuracy, nll, the mean entropy and mi; by score error_auroc, aurc, eaurc and augrc. With
    critical tokens: how uncertain the model is about them (token/X/c, the mean C), and by score the area
    under the rate of critical tokens that are predicted as none, that rate at `coverage`, and the share
    of critical tokens deferred there.
    """

    posterior: Annotated[Dropout | Swag | Runs, "where the samples come from"] = Dropout()
    critical: Annotated[str, "text whose tokens must not be missed; '': none"] = ""
    batches: Annotated[int, "batches of the held-out split; 0: all of it"] = 2
    tiles: Annotated[int, "sequence tiles of the logits; more tiles, less memory"] = 8
    coverage: Annotated[float, "share that is kept where rates are reported"] = 0.8

    def check(self, run: Any) -> None:
        """ValueError when it cannot be applied to this run."""
        if not hasattr(run.model, "vocab") or not hasattr(run.source, "tokenizer"):
            raise ValueError("evaluator Tokens needs a language model of text")
        if hasattr(run.objective, "prior"):
            raise ValueError("evaluator Tokens needs a model of the next token, not of diffusion")
        if jax.process_count() > 1:
            raise ValueError("evaluator Tokens runs in one process")
        if self.batches < 0 or self.tiles < 1 or run.source.seq_len % self.tiles:
            raise ValueError(
                f"evaluator Tokens: batches={self.batches} must be at least 0, and tiles={self.tiles} "
                f"divide source.seq_len={run.source.seq_len}"
            )
        if not 0 < self.coverage <= 1:
            raise ValueError(f"evaluator Tokens: coverage={self.coverage} must be in (0, 1]")
        self.posterior.check(run)

    def make(self, scene: Scene):
        from train.data.text import load_tokenizer

        run = scene.run
        tokenizer = load_tokenizer(run.source.tokenizer)
        critical = tuple(sorted({int(i) for i in tokenizer.encode(self.critical)}))
        samples = self.posterior.make(scene)
        draws: Any = samples.draws

        @jax.jit
        def look(fitted, batch, key) -> un.TokenUncertainty:
            stacked, net = draws(fitted, key)
            hidden = jax.vmap(lambda one: net(one, *inputs_of(batch), method="hidden"))(stacked)
            head_of = lambda one: net(one, method="unembedding")  # noqa: E731
            if samples.same_params:  # S copies of the output matrix would not fit
                head = head_of(jax.tree.map(lambda x: x[0], stacked))
            else:
                head = jax.vmap(head_of)(stacked)
            return un.token_uncertainty(
                hidden, head, batch["targets"], critical, n_tiles=self.tiles
            )

        def evaluate(params, step: int) -> dict[str, float | str]:
            fitted = samples.prepare(params)
            rows = run.source.make(run.batch, seed=run.seed, split="valid")
            count = min(self.batches, rows.num_batches) if self.batches else rows.num_batches
            natural = slice(None) if scene.order is None else np.argsort(scene.order)
            parts, texts = [], []
            for i in range(count):
                fetch = lambda r, i=i: rows.batch_at(i, r)  # noqa: E731
                batch = global_batch(fetch, rows.spec, scene.mesh, scene.order)
                found = look(fitted, batch, jax.random.fold_in(jax.random.key(run.seed), i))
                parts.append(jax.tree.map(lambda x: np.asarray(x)[:, natural], found))
                texts.append(rows.batch_at(i))
            u = jax.tree.map(lambda *x: np.concatenate(x), *parts)
            text = {k: np.concatenate([t[k] for t in texts]) for k in ("tokens", "targets")}
            values = figures(u, text["targets"], critical, self.coverage)
            for j, name in enumerate(names_of(tokenizer, critical)):
                values[f"token/{name}/c"] = u.c[text["targets"] >= 0][:, j].mean()
            if scene.folder is not None:
                page = places(u, text, tokenizer, step, type(self.posterior).__name__)
                write(scene.folder / "uncertainty", page)
            return {f"uncertainty/{name}": float(v) for name, v in values.items()}

        return evaluate


def figures(u: un.TokenUncertainty, targets, critical, coverage: float) -> dict[str, Any]:
    """Named figures of the places [b, t] that have a target."""
    real = targets >= 0
    u, targets = jax.tree.map(lambda x: x[real], u), targets[real]
    if not len(targets):
        raise ValueError("evaluator Tokens: the held-out part has no token to predict")
    wrong = (u.predicted != targets).astype(np.int32)
    values = {"tokens": len(targets), "accuracy": 1 - wrong.mean(), "nll": u.nll.mean()}
    values |= {name: getattr(u, name).mean() for name in ("entropy", "mi", "c_sum")}
    for name in SCORES:
        score = getattr(u, name)
        values[f"error_auroc/{name}"] = jax.jit(un.auroc)(score, wrong)
        for area, value in areas(score, wrong).items():
            values[f"{area}/{name}"] = value
    if critical:
        # Two classes: one of the critical tokens, or none of them.
        y, said = (np.isin(x, critical).astype(np.int32) for x in (targets, u.predicted))
        for name, score in about(u, said).items():
            for rate, value in rates(y, said, score, (1,), coverage, 2).items():
                values[f"critical_{rate}/{name}"] = value
    return values


def about(u: un.TokenUncertainty, said) -> dict[str, Any]:
    """Scores of places, where critical tokens must not be missed; `said`: one of them is predicted."""
    return {name: getattr(u, name) for name in SCORES} | {
        "c_critical_sum": u.c.sum(-1),
        "c_critical_max": u.c.max(-1),
        "d_critical_sum": u.exact.sum(-1),
        "missed_critical_mass": np.where(said == 1, 0, u.mean.sum(-1)),
    }


def places(u: un.TokenUncertainty, text, tokenizer, step: int, posterior: str, count=12) -> str:
    """A page of the places of most mutual information."""
    mi = np.where(text["targets"] >= 0, u.mi, -1.0)
    worst = np.argsort(-mi, axis=None, kind="stable")[: min(count, int((mi >= 0).sum()))]
    lines = [
        f"step {step}, {int((mi >= 0).sum())} held-out tokens ({posterior})", "",
        "| mutual information | entropy | text before | next | predicted | uncertain about |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for at in worst:
        b, t = np.unravel_index(at, mi.shape)
        before = show(tokenizer, text["tokens"][b, max(0, t - 30) : t + 1])
        cells = (show(tokenizer, [x[b, t]]) for x in (text["targets"], u.predicted, u.dominant))
        lines.append(f"| {u.mi[b, t]:.4f} | {u.entropy[b, t]:.4f} | `{before}` | "
                     + " | ".join(f"`{c}`" for c in cells) + " |")  # fmt: skip
    return "\n".join([*lines, ""])


def names_of(tokenizer: Any, tokens: tuple[int, ...]) -> list[str]:
    """What `show` says of each token, with its number where others look alike, as parts of a character."""
    shown = [show(tokenizer, [i]) for i in tokens]
    return [x if shown.count(x) == 1 else f"{x}#{i}" for x, i in zip(shown, tokens, strict=True)]


def show(tokenizer: Any, ids) -> str:
    """Tokens as text in one cell of a table, or of a name."""
    text = tokenizer.decode([int(i) for i in ids if i < tokenizer.vocab_size])
    return text.encode("unicode_escape").decode().replace("|", "\\x7c").replace("`", "\\x60")


def write(folder: Path, page: str) -> None:
    """Puts the page into `folder`/tokens.md and on the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.md").write_text(page)
    print(page, file=sys.stderr)
