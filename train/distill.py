"""Discrete consistency distillation: a student learns to see at a step of time what its teacher sees after it.

Source: Sahoo et al., 2506.10892, section 4; note on Psi-samplers, section 11.
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jaxlab.diffusion.distill import dcd_delta, dcd_loss, dcd_pair
from jaxlab.diffusion.operator import make_operator
from models.distilled import Distilled
from train.diffusion import Diffusion, Window
from train.run import Run


@dataclasses.dataclass(frozen=True)
class Dcd(Window):
    """KL divergence a token between student and frozen teacher, at two noise levels of one Gaussian draw.

    In rounds: the distance of the levels doubles, and the teacher becomes the student as it is. Held
    out, the loss is the evidence bound of the student.
    """

    T: Annotated[int, "the distance of the two times in the first round is 1 / T"] = 512
    every: Annotated[int, "steps a round"] = 10000
    direction: Annotated[
        Literal["kl-bwd", "kl-fwd"], "of the student from the teacher, or back"
    ] = "kl-bwd"
    _: dataclasses.KW_ONLY
    # Gamma from -4 to -1 with 50,257 tokens.
    alpha_max: Annotated[float, "share of tokens that are kept at time 0"] = 0.9987
    alpha_min: Annotated[float, "share of tokens that are kept at time 1"] = 0.0062

    @property
    def prior(self) -> str:
        """What tokens turn into: any other, as the Gaussian pair needs it."""
        return "uniform"

    def prepare(self, batch, key):
        """The times of all rows."""
        return Diffusion("uniform").prepare(batch, key)

    def __call__(self, apply, params, batch, key):
        if "step" not in batch:
            return Diffusion("uniform")(apply, params, batch, key)
        x0, vocab = batch["tokens"], params["student"]["embedding"].shape[0]
        where = {name: batch[name] for name in ("positions", "segment_ids")}
        _, pair_key, dropout_key = jax.random.split(key, 3)
        delta = dcd_delta(batch["step"], self.T, self.every)
        time = batch["time"] if "time" in batch else self.prepare(batch, key)["time"]
        t = jnp.clip(time + delta, 0, 1)
        s = jnp.maximum(t - delta, 0)
        low, high = self.gammas(vocab)
        gamma_t, gamma_s = (low + (high - low) * x[:, None] for x in (t, s))
        operator = make_operator(vocab, low, high)
        z_t, z_s = dcd_pair(pair_key, x0, gamma_t, gamma_s, vocab)
        sigma_t, sigma_s = (-jnp.log(operator(g).alpha[:, 0]) for g in (gamma_t, gamma_s))
        how = where | {"deterministic": False, "rngs": {"dropout": dropout_key}}
        student = apply(params, z_t, sigma_t, **how)
        teacher = jax.lax.stop_gradient(apply(params, z_s, sigma_s, who="teacher", **where))
        valid = (batch["segment_ids"] > 0).astype(jnp.float32)
        total = jnp.sum(dcd_loss(student, teacher, self.direction) * valid)
        return total, {"loss": (total, jnp.sum(valid))}

    def refresh(self, params, step):
        """Parameters at the start of a step: in the first of a round the teacher is the student."""
        begins = step % self.every == 0
        teacher = jax.tree.map(
            lambda s, t: jnp.where(begins, s, t), params["student"], params["teacher"]
        )
        return params | {"teacher": teacher}

    def check(self, model, source) -> None:
        """ValueError when the model is no pair, or a field is out of range."""
        if not isinstance(model, Distilled):
            raise ValueError(f"objective dcd needs model Distilled, got {model}")
        Diffusion("uniform").check(model, source)
        for name in ("T", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"objective.{name}={getattr(self, name)} must be at least 1")
        self.check_window("objective")


def rounds(steps: int, objective: Dcd) -> int:
    """Number of rounds of a run."""
    return math.ceil(steps / objective.every)


def start_distillation(teacher: Path, preset: Run, folder: Path, assignments: list[str]) -> str:
    """A run directory whose step 0 holds the run `teacher` twice; says what it made.

    `preset` gives the objective and the optimiser, the teacher's run model and source; `assignments`
    override. ValueError before anything is written for a teacher that is no uniform diffusion.
    """
    from models.hf import refuse_occupied
    from train.checkpoint import Checkpoints, check_space, state_bytes
    from train.folders import parameters
    from train.overrides import override
    from train.processes import all_or_none
    from train.run import described, load_run
    from train.rundir import whole, write_description
    from train.trainer import build

    with all_or_none():
        refuse_occupied(folder)
        old = dataclasses.replace(load_run(teacher), evaluators=(), mesh=preset.mesh)
        if getattr(old.objective, "prior", None) != "uniform" or not hasattr(
            old.source, "tokenizer"
        ):
            raise ValueError(
                f"{teacher} cannot teach: dcd needs uniform diffusion of text (udlm, duo, duo_pp), "
                f"got {old.objective}"
            )
        old = old.check(jax.device_count())
        base = old.model.base if isinstance(old.model, Distilled) else old.model
        run = dataclasses.replace(
            preset, model=Distilled(base), source=old.source, origin=str(teacher.absolute())
        )
        wanted = override(run, assignments)
        program = build(wanted.check(jax.device_count()))
        check_space(folder, state_bytes(program.state.params))
    _, params, _ = parameters(old, teacher, None)
    params = params["student"] if isinstance(old.model, Distilled) else params
    both = {"student": params, "teacher": params}
    with whole(folder) as new:
        checkpoints = Checkpoints(new / "checkpoints", wanted.keep)
        checkpoints.save(
            0, {"params": both}, {"config": described(wanted, folder), "parts": ["params"]}
        )
        checkpoints.close()
        if jax.process_index() == 0:
            write_description(wanted, new)
    n = rounds(wanted.steps, wanted.objective)
    return f"{folder}: {teacher} twice, {n} rounds\n  jaxlab train {folder}"
