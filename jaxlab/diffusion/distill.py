"""Discrete consistency distillation: two noisy tokens from one Gaussian draw, and its loss.

Source: Sahoo et al., 2025 (arXiv 2506.10892), section 4; note on Psi-samplers, section 11.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxlab.arguments import check_choice, wide_type
from jaxlab.diffusion.arguments import check_count, floats, tokens
from jaxlab.diffusion.curriculum import noisy_one_hot

Number = float | Float[Array, "#*b"]
DIRECTIONS = ("kl-bwd", "kl-fwd")


def dcd_pair_from_noise(
    noise: Float[Array, "b t v"], x0: Int[Array, "b t"], gamma_t: Number, gamma_s: Number
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """(z_t, z_s) int32: argmax of x0's noisy one-hot vector at two levels, with the same noise.

    gamma = log(noise variance / signal variance), broadcasts against x0. ValueError unless shapes
    fit, TypeError unless x0 holds integers.
    """
    noise = floats("noise", noise)
    x0 = tokens("x0", x0, noise.shape[:-1])

    def at_level(gamma):
        gamma = jnp.asarray(gamma, noise.dtype)
        alpha, sigma = (jnp.sqrt(jax.nn.sigmoid(x)) for x in (-gamma, gamma))
        return jnp.argmax(noisy_one_hot(noise, x0, alpha, sigma), -1).astype(jnp.int32)

    return at_level(gamma_t), at_level(gamma_s)


def dcd_pair(
    key: Key[Array, ""], x0: Int[Array, "b t"], gamma_t: Number, gamma_s: Number, K: int
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """`dcd_pair_from_noise` of K normal draws a token from `key`. ValueError for K below 2."""
    check_count("K", K, 2)
    x0 = tokens("x0", x0)
    noise = jax.random.normal(key, (*x0.shape, K), wide_type(gamma_t, gamma_s, 1.0))
    return dcd_pair_from_noise(noise, x0, gamma_t, gamma_s)


def dcd_delta(
    step: int | Int[Array, "*b"], T: int = 512, every: int = 10000
) -> float | Float[Array, "*b"]:
    """Distance of the two times at a step: 2^floor(step / every) / T.

    A float for a Python step. ValueError for T or every below 1.
    """
    check_count("T", T, 1)
    check_count("every", every, 1)
    if isinstance(step, int):
        return 2.0 ** (step // every) / T
    return jnp.ldexp(jnp.ones((), wide_type(1.0)), tokens("step", step) // every) / T


def dcd_loss(
    student_logits: Float[Array, "b t v"],
    teacher_logits: Float[Array, "b t v"],
    direction: str = "kl-bwd",
) -> Float[Array, "b t"]:
    """KL divergence a token in nats: of the student from the teacher ("kl-bwd"), or the reverse.

    float32 (float64 if the student's logits are). No gradient is stopped. ValueError for different
    shapes or an unknown direction.
    """
    check_choice("direction", direction, *DIRECTIONS)
    student, teacher = (
        floats("student_logits", student_logits),
        floats("teacher_logits", teacher_logits),
    )
    if teacher.shape != student.shape:
        raise ValueError(f"teacher_logits has shape {teacher.shape}; expected {student.shape}")
    first, second = (jax.nn.log_softmax(x, -1) for x in (student, teacher))
    if direction == "kl-fwd":
        first, second = second, first
    some = first > -jnp.inf
    difference = jnp.where(some, first, 0) - jnp.where(some, second, 0)
    return jnp.sum(jnp.exp(first) * difference, -1)
