"""Discrete consistency distillation. Source: Duo 2506.10892, section 5; note, section 11."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxlab.diffusion.checks import check_tokens, wide
from jaxlab.diffusion.curriculum import relaxed_noise


def dcd_pair_from_noise(
    noise: Float[Array, "b t v"], x0: Int[Array, "b t"], gamma_t: Any, gamma_s: Any
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """Noisy tokens (z_t, z_s) of two levels gamma = log(noise/signal) from the same Gaussian noise."""
    check_tokens(x0=x0)
    dtype = wide(noise, gamma_t, gamma_s)

    def token(gamma):
        gamma = jnp.asarray(gamma, dtype)
        signal, spread = (jnp.sqrt(jax.nn.sigmoid(s * gamma)) for s in (-1, 1))
        w = relaxed_noise(noise.astype(dtype), x0, signal, spread)
        return jnp.argmax(w, -1).astype(jnp.int32)

    return token(gamma_t), token(gamma_s)


def dcd_pair(
    key: Key[Array, ""], x0: Int[Array, "b t"], gamma_t: Any, gamma_s: Any, K: int
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """`dcd_pair_from_noise` of random noise over K tokens."""
    if K < 2:
        raise ValueError(f"K={K} must be at least 2")
    noise = jax.random.normal(key, (*x0.shape, K), wide(gamma_t, gamma_s))
    return dcd_pair_from_noise(noise, x0, gamma_t, gamma_s)


def dcd_delta(step: Any, T: int = 512, every: int = 10000) -> Any:
    """Distance in time of the pair: 2^floor(step / every) / T, doubled every round."""
    if T < 1 or every < 1:
        raise ValueError(f"T={T} and every={every} must be at least 1")
    return 2.0 ** (step // every) / T


def dcd_loss(
    student_logits: Float[Array, "b t v"],
    teacher_logits: Float[Array, "b t v"],
    direction: str = "kl-bwd",
) -> Float[Array, "b t"]:
    """KL divergence of student and teacher, nats: of the student from the teacher for "kl-bwd".

    "kl-fwd" is that of the teacher from the student. ValueError for other names or unequal shapes.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits {student_logits.shape} must have the shape of teacher_logits "
            f"{teacher_logits.shape}"
        )
    if direction not in ("kl-bwd", "kl-fwd"):
        raise ValueError(f"direction={direction!r} must be 'kl-bwd' or 'kl-fwd'")
    dtype = wide(student_logits, teacher_logits)
    logs = [jax.nn.log_softmax(x.astype(dtype)) for x in (student_logits, teacher_logits)]
    p, q = logs if direction == "kl-bwd" else logs[::-1]
    some = p > -jnp.inf
    return jnp.sum(jnp.exp(p) * jnp.where(some, jnp.where(some, p, 0) - q, 0), -1)
