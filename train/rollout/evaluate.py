"""Evaluators of a policy: pass@k with confidence intervals, and how prompts interfere."""

import dataclasses
import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import rl
from train.data.reason import Reason
from train.rollout.sampler import Sampler
from train.state import init_params

# Numbers that the gradients of `Interference` may take, 1 GiB of float32.
ROOM = 2**28


def _check_reason(evaluator: Any, run: Any) -> None:
    if not isinstance(run.source, Reason) or not hasattr(run.model, "vocab"):
        raise ValueError(
            f"evaluator {type(evaluator).__name__} needs a language model and a source of problems"
        )


@dataclasses.dataclass(frozen=True)
class PassAtK:
    """Unbiased pass@k on held-out problems, with 95% intervals over problems, and pass@1 by task.

    Beside them the share of problems that got right and wrong answers: only these teach a policy.
    """

    problems: Annotated[int, "held-out problems"] = 64
    samples: Annotated[int, "answers a problem"] = 16
    ks: Annotated[tuple[int, ...], "the k of pass@k"] = (1, 4, 8)

    def check(self, run) -> None:
        _check_reason(self, run)
        if (
            self.problems < 2
            or not self.ks
            or not 1 <= min(self.ks) <= max(self.ks) <= self.samples
        ):
            raise ValueError(
                f"evaluator PassAtK: ks={self.ks} must be from 1 to samples={self.samples} and "
                f"problems={self.problems} at least 2"
            )

    def make(self, scene):
        sampler = Sampler(scene, self.samples, "valid", scene.run.seed)

        def evaluate(params, step):
            # The same keys at every evaluation: what changes is the policy.
            key = jax.random.fold_in(jax.random.key(scene.run.seed), 2)
            correct = sampler(params, range(self.problems), key).correct
            curve = np.asarray(rl.pass_at_k_curve(jnp.asarray(correct), self.ks), np.float64)
            mean, error = curve.mean(0), curve.std(0, ddof=1) / self.problems**0.5
            found = {}
            for k, m, e in zip(self.ks, mean, error, strict=True):
                found |= {f"valid/pass@{k}": float(m), f"valid/pass@{k}_ci95": float(1.96 * e)}
            some = correct.any(1) & ~correct.all(1)
            found["valid/informative"] = float(some.mean())
            tasks = [sampler.task_of(i) for i in range(self.problems)]
            for task in dict.fromkeys(tasks):
                here = [t == task for t in tasks]
                found[f"valid/pass@1/{task}"] = float(correct[here].mean())
            return found

        return evaluate


@dataclasses.dataclass(frozen=True)
class Interference:
    """Whether training on pass@k would lower pass@1 now, from gradients of held-out problems.

    The kernel of problems has unbiased entries: different problems are sampled independently, and the
    diagonal takes two halves of a problem's answers. Besides `interference_report` there is the
    inner product of the two objectives' gradients, across halves of the problems (note on pass@k
    interference, section 4), and the same from all samples at once, which is biased upward, as it would
    be across halves of the answers to the same problems. Gradients are kept whole, two a problem and
    objective, or as random projections, whose inner products are right on average.
    """

    problems: Annotated[int, "held-out problems, an even number"] = 16
    samples: Annotated[int, "answers a problem, an even number"] = 16
    k: Annotated[int, "of pass@k, at most half the samples"] = 8
    sketch: Annotated[int, "random projections that stand for a gradient; 0: the whole of it"] = 0

    def check(self, run) -> None:
        _check_reason(self, run)
        half = self.samples // 2
        if (
            self.samples % 2
            or self.problems % 2
            or self.problems < 2
            or not 1 <= self.k <= half
            or half < 2
        ):
            raise ValueError(
                f"evaluator Interference: k={self.k} must be from 1 to half of an even "
                f"samples={self.samples}, at least 4, and problems={self.problems} even, at least 2"
            )
        if self.sketch < 0:
            raise ValueError(f"evaluator Interference: sketch={self.sketch} must be at least 0")

    def make(self, scene):
        self._check_room(scene)
        sampler = Sampler(scene, self.samples, "valid", scene.run.seed + 1)
        temperature = getattr(scene.run.source, "temperature", 1.0)
        report = jax.jit(functools.partial(self._report, scene.apply, temperature))

        def evaluate(params, step):
            # Other problems at every evaluation, so that estimates may be averaged over time.
            key = jax.random.fold_in(jax.random.key(scene.run.seed), 3)
            first = step * self.problems
            got = sampler(params, range(first, first + self.problems), key)
            split = lambda x: x.reshape(self.problems, 2, self.samples // 2, *x.shape[1:])  # noqa: E731
            names = ("tokens", "positions", "segment_ids", "targets", "mask")
            rows = {name: split(got.rows[name]) for name in names}
            found = report(params, rows, got.correct.reshape(self.problems, 2, -1))
            return {f"interference/{n}": float(x) for n, x in jax.device_get(found).items()}

        return evaluate

    def _check_room(self, scene):
        run = scene.run
        module = run.model.build(scene.mesh.devices.flat[0].platform)
        inputs = run.model.inputs(run.source.spec(run.batch))
        shapes = jax.eval_shape(lambda: init_params(module, jax.random.key(0), inputs))
        size = sum(x.size for x in jax.tree.leaves(shapes))
        if not self.sketch and 4 * self.problems * size > ROOM:
            raise ValueError(
                f"evaluator Interference: sketch=0 keeps 4 gradients of {size} numbers for each of "
                f"problems={self.problems}, more than {ROOM} numbers in all: use sketch=4096, say"
            )

    def _report(self, apply, temperature, params, rows, correct):
        m = self.problems
        weigh = lambda k: rl.pkpo_weights(correct, k, "wrloo", binary=True)  # noqa: E731

        def weighted(params, example):
            """The sum over answers of a problem's half of weight * log-probability."""
            part, weights = example
            logits = apply(params, part["tokens"], part["positions"], part["segment_ids"])
            targets = jnp.maximum(part["targets"], 0)
            logp = rl.logprobs_from_logits(logits, targets, temperature=temperature)
            return jnp.sum(weights[:, None] * part["mask"] * logp)

        flat = lambda x: x.reshape(m * 2, *x.shape[2:])  # noqa: E731
        parts = jax.tree.map(flat, rows)
        # The same projection for both objectives.
        sketch = {"sketch": self.sketch, "key": jax.random.key(0)} if self.sketch else {}
        gradients = lambda k: rl.prompt_gradients(  # noqa: E731
            weighted, params, (parts, flat(weigh(k))), chunk=1, **sketch
        )
        g_1, g_k = (gradients(k).reshape(m, 2, -1) for k in (1, self.k))
        q, p = jnp.full(m, 1 / m), correct.mean((1, 2))
        whole = g_1.mean(1)
        diagonal = jnp.einsum("mi,mi->m", g_1[:, 0], g_1[:, 1])
        kernel = whole @ whole.T
        kernel = kernel.at[jnp.diag_indices(m)].set(diagonal)
        both_1, both_k = (g.reshape(2, m // 2 * 2, -1).mean(1) for g in (g_1, g_k))
        crossed = rl.crossfit_inner_product((both_k[0], both_1[0]), (both_k[1], both_1[1]))
        same = jnp.vdot(both_k.mean(0), both_1.mean(0))
        return rl.interference_report(kernel, q, p, self.k) | {
            "crossfit": crossed, "same_samples": same, "pass@1": p.mean(),
        }  # fmt: skip
