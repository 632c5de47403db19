"""The exact studies of `passk.py`: Gaussian features, and prompts that look alike.

Source: note on pass@k interference (arXiv 2602.21189), sections 3.3, 6.1 and 6.2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab import rl

N, HARD, THETA = 2000, 600, (2.0, 0.5)
KS = (1, 2, 3, 4, 8, 16, 32, 64)
TRAINED = (1, 2, 4, 8, 16)


def draw(key):
    """Features [1, s] times +1 (easy, wants 1) or -1 (hard, wants 0), and which prompts are hard."""
    hard = jnp.arange(N) < HARD
    s = jnp.where(hard, -0.5, 0.5) + 0.5 * jax.random.normal(key, (N,))
    return jnp.where(hard, -1, 1)[:, None] * jnp.stack([jnp.ones(N), s], 1), hard


def passed(theta, x):
    """pass@1 of prompts of signed features x [..., 2]."""
    return jax.nn.sigmoid(x @ theta)


def objective(theta, x, q, k):
    """J_k."""
    return jnp.sum(q * -jnp.expm1(k * jax.nn.log_sigmoid(-x @ theta)))


def kernel(theta, x):
    """(K, pass@1)."""
    G = rl.prompt_gradients(passed, theta, x)
    return G @ G.T, passed(theta, x)


def ascend(x, q, k, theta, protect=False):
    """theta after 300 steps of ascent on J_k; `protect`: each gradient under surgery against grad J_1."""

    def step(theta, _):
        g = jax.grad(objective)(theta, x, q, k)
        if protect:
            g = rl.gradient_surgery(g, jax.grad(objective)(theta, x, q, 1))
        return theta + 0.5 * g, None

    return jax.lax.scan(step, theta, length=300)[0]


def one_step(x, q, theta, k):
    """(dJ_k, dJ_1) of the step that the bound of section 3.2 allows."""
    square = jnp.sum(q * jnp.sum(x**2, -1))
    smooth_1 = square / (6 * np.sqrt(3))
    smooth_k = k * smooth_1 + k * (k - 1) * square / 16
    g, g_1 = (jax.grad(objective)(theta, x, q, j) for j in (k, 1))
    eta = jnp.minimum(1 / smooth_k, -g @ g_1 / (smooth_1 * g @ g))
    return [objective(theta + eta * g, x, q, j) - objective(theta, x, q, j) for j in (k, 1)]


def gaussian(key) -> dict:
    """Everything section 6.1 prints, of one draw."""
    x, hard = draw(key)
    theta, q = jnp.array(THETA), jnp.full(N, 1 / N)
    K, p = kernel(theta, x)
    reports = {k: rl.interference_report(K, q, p, k, k_max=64) for k in KS}
    out = {
        "easy": jnp.mean(p, where=~hard),
        "hard": jnp.mean(p, where=hard),
        "J_1": jnp.mean(p),
        "grad_j1_sq": reports[1]["grad_j1_sq"],
        "negative_fraction": reports[1]["negative_fraction"],
        "critical_k": reports[1]["critical_k"],
        "cosine": {f"k={k}": r["cosine"] for k, r in reports.items()},
        "weight_decades": {f"k={k}": r["weight_decades"] for k, r in reports.items()},
        "trained": {},
    }
    for k, protect in (*((k, False) for k in TRAINED), (8, True)):
        end = ascend(x, q, k, theta, protect)
        out["trained"][f"k={k}, surgery" if protect else f"k={k}"] = {
            **{f"J_{j}": objective(end, x, q, j) for j in (1, 8)},
            **{f"start J_{j}": objective(theta, x, q, j) for j in (1, 8)},
        }
    out["step"] = dict(zip(("dJ_16", "dJ_1"), one_step(x, q, theta, 16), strict=True))
    return out


def gaussians(draws: int) -> dict:
    """`gaussian` in float64 with a leading axis of draws on every leaf."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), draws)
        return jax.tree.map(np.asarray, jax.jit(lambda keys: jax.lax.map(gaussian, keys))(keys))


def aliased(ks=(2, 4, 8, 16), share=0.3) -> dict:
    """{k: where descent on 1 - J_k ends, and the closed form} for prompts that look alike, float64.

    A share of them wants answer B, the others A; pi is the probability of A.
    """
    out = {}
    with jax.enable_x64(True):
        x, q = jnp.array([1.0, -1.0])[:, None], jnp.array([1 - share, share])
        for k in ks:
            # The chance that k answers all fail has its least where J_k is largest, and no flat top.
            failed = lambda theta, k=k: jax.nn.logsumexp(  # noqa: E731
                jnp.log(q) + k * jax.nn.log_sigmoid(-x @ theta)
            )
            step = lambda _, theta, k=k, failed=failed: theta - 2 / k**2 * jax.grad(failed)(theta)  # noqa: E731
            theta = jax.lax.fori_loop(0, 1000, step, jnp.array([1.0]))
            pi = 1 / (1 + (share / (1 - share)) ** (1 / (k - 1)))
            K, p = kernel(jnp.array([1.0]), x)
            out[k] = {
                "pi": float(jax.nn.sigmoid(theta[0])),
                "closed pi": pi,
                "J_1": float(objective(theta, x, q, 1)),
                "closed J_1": (1 - share) * pi + share * (1 - pi),
                "J_k": float(objective(theta, x, q, k)),
                "critical_k": int(rl.critical_k(K, q, p, 64)),
            }
    return out
