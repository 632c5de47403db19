"""The sampled study of `passk.py`: a small network on sums and differences, trained by sampled answers.

1200 prompts (a, b, flag): most want (a + b) mod 10, three in ten (a - b) mod 10, which only a noisy
flag tells. Supervised steps make a base policy; then 400 steps of Adam on 128 prompts x 16 samples.
With ten answers pass@1, its gradient and the kernel are exact. Source: note on pass@k interference
(arXiv 2602.21189), section 6.3.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from jaxlab import rl
from train.optim import protect_reference

ANSWERS, HARD = 10, 0.3


@dataclasses.dataclass(frozen=True)
class Study:
    """Sizes; the defaults are the study's, tests take less."""

    prompts: int = 1200
    width: int = 96
    supervised: int = 60
    steps: int = 400
    batch: int = 128
    samples: int = 16
    blocks: int = 20  # points of a learning curve


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is optimised and how pass@1 is protected.

    mode: "gradient" and "update" of `protect_reference`; "mixing": the gradient of J_1 is mixed in, as much
    as `safe_mixing` of the exact gradients asks for.
    reference: which gradient of J_1 protects: "exact"; "same" samples as the step; "average", a moving
    average over steps of sampled ones. schedule: k for the first half of the steps, then 1.
    """

    k: int
    mode: Literal["none", "gradient", "update", "mixing"] = "none"
    reference: Literal["exact", "same", "average"] = "exact"
    schedule: bool = False


ARMS = {
    "k=1": Arm(1),
    "k=2": Arm(2),
    "k=4": Arm(4),
    "k=8": Arm(8),
    "k=8, same samples, before Adam": Arm(8, "gradient", "same"),
    "k=8, exact, before Adam": Arm(8, "gradient"),
    "k=8, exact, after Adam": Arm(8, "update"),
    "k=8, average, after Adam": Arm(8, "update", "average"),
    "k=8, mixed": Arm(8, "mixing"),
    "k=8, then k=1": Arm(8, schedule=True),
    "k=4, exact, after Adam": Arm(4, "update"),
}
DECAY = 0.95  # of the moving average


def prompts(key, study: Study) -> dict:
    """One-hot a and b with the flag [M, 21], the right answer [M] and which prompts are hard [M]."""
    a_key, b_key, s_key = jax.random.split(key, 3)
    m = study.prompts
    a = jax.random.randint(a_key, (m,), 0, 10)
    b = jax.random.randint(b_key, (m,), 1, 10)
    b = jnp.where(b == 5, 6, b)  # a + 5 and a - 5 are the same
    hard = jnp.arange(m) < round(HARD * m)
    flag = jnp.where(hard, -0.25, 0.25) + 0.5 * jax.random.normal(s_key, (m,))
    x = jnp.concatenate([jax.nn.one_hot(a, 10), jax.nn.one_hot(b, 10), flag[:, None]], 1)
    return {"x": x, "right": jnp.where(hard, a - b, a + b) % 10, "hard": hard}


def network(params, x):
    """Log-probabilities of the answers [..., 10]."""
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    w, b = params[-1]
    return jax.nn.log_softmax(x @ w + b)


def passed(params, prompt):
    """pass@1 of prompts, exact."""
    logp = network(params, prompt["x"])
    return jnp.exp(jnp.take_along_axis(logp, prompt["right"][..., None], -1)[..., 0])


def base_policy(key, data: dict, study: Study):
    """A policy after supervised steps in which a hard example counts a quarter."""
    widths = [data["x"].shape[-1], study.width, study.width, ANSWERS]
    init = jax.nn.initializers.he_normal()
    params = [
        (init(k, (i, o)), jnp.zeros(o))
        for k, i, o in zip(jax.random.split(key, 3), widths[:-1], widths[1:], strict=True)
    ]
    adam = optax.adam(3e-3)
    weight = jnp.where(data["hard"], 0.25, 1.0)

    def step(carry, _):
        params, state = carry
        loss = lambda params: -jnp.mean(weight * jnp.log(passed(params, data)))  # noqa: E731
        updates, state = adam.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, adam.init(params)), length=study.supervised)[0][0]


def sampled_gradients(params, batch, key, n: int, k: int):
    """Ascent gradients (J_k, J_1) of the same n answers a prompt, without bias."""
    logits = network(params, batch["x"])
    answers = jax.random.categorical(key, logits[:, None], shape=(len(logits), n))
    correct = answers == batch["right"][:, None]
    return tuple(weighted(params, batch, answers, pkpo(correct, j)) for j in (k, 1))


def pkpo(correct, k: int):
    """The weights of the study: leave-one-out of k - 1, and RLOO (1/n inside) for k = 1."""
    return rl.pkpo_weights(correct, k, "loo1" if k > 1 else "wrloo", binary=True)


def weighted(params, batch, answers, weights):
    """Gradient of the mean over prompts of the weighted log-probabilities of answers."""

    def objective(params):
        logp = jnp.take_along_axis(network(params, batch["x"]), answers, -1)
        return jnp.mean(jnp.sum(weights * logp, -1))

    return jax.grad(objective)(params)


def exact_gradient(params, data, k: int = 1):
    """Gradient of J_k."""
    return jax.grad(lambda params: jnp.mean(1 - (1 - passed(params, data)) ** k))(params)


def evaluate(params, data) -> dict:
    """J_1, J_8, and pass@1 on easy and hard prompts."""
    p, hard = passed(params, data), data["hard"]
    return {
        "J_1": jnp.mean(p),
        "J_8": jnp.mean(1 - (1 - p) ** 8),
        "easy": jnp.mean(p, where=~hard),
        "hard": jnp.mean(p, where=hard),
    }


def train(arm: Arm, params, data, key, study: Study):
    """(parameters, learning curve {name: [blocks]}) of one arm from a base policy."""
    adam = optax.adam(2e-3)
    protected = arm.mode in ("gradient", "update")
    tx = protect_reference(adam, arm.mode) if protected else adam

    def step(carry, inputs, k):
        params, state, average = carry
        i, key = inputs
        pick, draw = jax.random.split(key)
        rows = jax.random.choice(pick, study.prompts, (study.batch,), replace=False)
        batch = jax.tree.map(lambda x: x[rows], data)
        g_k, g_1 = sampled_gradients(params, batch, draw, study.samples, k)
        average = jax.tree.map(lambda m, g: DECAY * m + (1 - DECAY) * g, average, g_1)
        similar = cosine(g_k, g_1)
        if arm.mode == "mixing":
            share = rl.safe_mixing(exact_gradient(params, data, k), exact_gradient(params, data))
            g_k = jax.tree.map(lambda a, b: share * a + (1 - share) * b, g_k, g_1)
        extra = {}
        if protected:
            exact = lambda: exact_gradient(params, data)  # noqa: E731
            sources = {"exact": exact, "same": lambda: g_1, "average": lambda: average}
            extra = {"reference_grads": sources[arm.reference]()}
        updates, state = tx.update(jax.tree.map(jnp.negative, g_k), state, params, **extra)
        return (optax.apply_updates(params, updates), state, average), similar

    def block(carry, inputs, k):
        carry, cosines = jax.lax.scan(lambda c, x: step(c, x, k), carry, inputs)
        return carry, evaluate(carry[0], data) | {"same_sample_cosine": jnp.mean(cosines)}

    carry = (params, tx.init(params), jax.tree.map(jnp.zeros_like, params))
    inputs = (jnp.arange(study.steps), jax.random.split(key, study.steps))
    inputs = jax.tree.map(lambda x: x.reshape(study.blocks, -1, *x.shape[1:]), inputs)
    half = study.blocks // 2 if arm.schedule else study.blocks
    curves = []
    for k, part in ((arm.k, slice(None, half)), (1, slice(half, None))):
        now = jax.tree.map(lambda x, part=part: x[part], inputs)
        if len(now[0]):
            carry, curve = jax.lax.scan(lambda c, x, k=k: block(c, x, k), carry, now)
            curves.append(curve)
    return carry[0], jax.tree.map(lambda *x: jnp.concatenate(x), *curves)


def cosine(a, b):
    """Of two trees."""
    inner = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))  # noqa: E731
    return inner(a, b) / jnp.sqrt(inner(a, a) * inner(b, b) + 1e-30)


def at_start(params, data, key, study: Study, ks=(2, 4, 8), batches: int = 400) -> dict:
    """Interference of a base policy: exact, from the kernel, and estimated from samples.

    Estimates of <grad J_k, grad J_1>, [batches] each: "crossfit" from two independent batches of prompts,
    which alone is unbiased; "halves" from two halves of the samples of the same prompts, which are few
    enough that each counts for itself; "same" from the same samples.
    """
    m = study.prompts
    G = rl.prompt_gradients(passed, params, data, chunk=100)
    K, q, p = G @ G.T, jnp.full(m, 1 / m), passed(params, data)
    out = {"critical_k": rl.critical_k(K, q, p, 64)}
    for k in ks:
        out[f"k={k}"] = rl.interference_report(K, q, p, k, k_max=64)

        def estimate(key, k=k):
            def pair(pick, draw, n):
                rows = jax.random.choice(pick, m, (study.batch,), replace=False)
                batch = jax.tree.map(lambda x: x[rows], data)
                return sampled_gradients(params, batch, draw, n, k)

            one, other, a, b = jax.random.split(key, 4)
            halves = [pair(one, x, study.samples // 2) for x in (a, b)]
            same, apart = pair(one, a, study.samples), pair(other, b, study.samples)
            return {
                "crossfit": rl.crossfit_inner_product(same, apart),
                "halves": rl.crossfit_inner_product(*halves),
                "same": rl.crossfit_inner_product(same, same),
            }

        out[f"k={k}"] |= jax.lax.map(estimate, jax.random.split(key, batches))
    return out


def run(seeds: int, study: Study = Study(), arms: dict[str, Arm] = ARMS, batches: int = 400):
    """{"base", "start", "arms"}; every leaf has a leading axis of seeds, all in one program each."""
    keys = jax.random.split(jax.random.key(0), (seeds, 4))

    def base(keys):
        data = prompts(keys[0], study)
        params = base_policy(keys[1], data, study)
        return data, params, evaluate(params, data)

    data, params, scores = jax.jit(jax.vmap(base))(keys)
    start = jax.jit(lambda *x: jax.lax.map(lambda x: at_start(*x, study, batches=batches), x))
    record = {"base": scores, "start": start(params, data, keys[:, 2]), "arms": {}}
    for name, arm in arms.items():
        fit = jax.vmap(lambda p, d, k, arm=arm: train(arm, p, d, k, study)[1])
        record["arms"][name] = jax.jit(fit)(params, data, keys[:, 3])
    return record
