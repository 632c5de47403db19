"""The study of `agents.py`: a small network in text-houses, by GRPO, GiGPO and SELAUR.

The policy reads which words stand in which part of an observation and says a verb, then a noun. It is
warm-started on a few steps of the oracle's choices, then trained by PPO-clip on 16 houses x 8 rollouts an
iteration with the losses and advantages of `jaxlab.rl`. Rollouts, advantages and updates of all seeds are
one program. Protocol: note on SELAUR (arXiv 2602.21158), sections 5 and 8.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlab import envs, rl
from jaxlab.envs.house import VERBS
from jaxlab.rl import AgentConfig

PENALTY = 0.1  # of an action that is not admissible


@dataclasses.dataclass(frozen=True)
class Study:
    """Sizes; the defaults are the study's, tests take less."""

    house: envs.HouseConfig = envs.HouseConfig(rooms=2, receptacles=5, objects=3, conditions=1)
    horizon: int = 16
    width: int = 64
    warm: int = 350  # supervised steps
    tasks: int = 16
    samples: int = 8
    iterations: int = 300
    epochs: int = 2
    lr: float = 3e-3
    eval_every: int = 10
    eval_tasks: int = 128
    eval_temperature: float = 0.4


ARMS = {
    "GRPO": AgentConfig(transform="none", omega=0.0),
    "GiGPO": AgentConfig(transform="none"),
    "SELAUR": AgentConfig(gate=0.5),
    "SELAUR, gate 0": AgentConfig(gate=0.0),
    "SELAUR, gate 0, scale 1": AgentConfig(gate=0.0, scale=1.0),
    "SELAUR-neg, gate 0, scale 1": AgentConfig(transform="neg", gate=0.0, scale=1.0),
}
LOSS = rl.RLConfig(kl_coef=0.01)


class Steps(NamedTuple):
    """Steps of rollouts; leaves [horizon, ...]."""

    seen: jax.Array  # features of the observation
    anchor: jax.Array  # its hash
    action: jax.Array  # [2] verb, noun
    logp: jax.Array  # [2] at temperature 1
    logp2: jax.Array  # [2] of the token of rank 2
    expert: jax.Array  # [2] what the oracle would do
    live: jax.Array  # whether the episode was still going on
    reward: jax.Array
    valid: jax.Array
    done: jax.Array


def features(study: Study, tokens):
    """Which words stand in which part of an observation, [parts * words] of 0 and 1."""
    fields = envs.house_fields(study.house)
    size = len(envs.house_words(study.house))
    found = jnp.zeros((fields.max() + 1, size)).at[fields, tokens].set(1.0)
    return found.at[:, 0].set(0.0).reshape(-1)


def hashed(tokens):
    """An integer of an observation; two differ by chance with 2^-32."""
    factors = jax.random.bits(jax.random.key(0), tokens.shape, jnp.uint32) | 1
    return jax.lax.bitcast_convert_type(jnp.sum(tokens.astype(jnp.uint32) * factors), jnp.int32)


def new_policy(key, study: Study):
    """Parameters of the network."""
    seen = len(envs.house_words(study.house)) * (int(envs.house_fields(study.house).max()) + 1)
    w, verbs, nouns = study.width, len(VERBS), len(study.house.nouns)
    shapes = {"a": (seen, w), "b": (w, w), "verb": (w, verbs), "said": (verbs, w), "c": (w, w),
              "noun": (w, nouns)}  # fmt: skip
    init, keys = jax.nn.initializers.lecun_normal(), jax.random.split(key, len(shapes))
    return {name: init(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def verb_logits(params, seen):
    """(logits of verbs, hidden activations) of observations [..., parts * words]."""
    hidden = jnp.tanh(jnp.tanh(seen @ params["a"]) @ params["b"])
    return hidden @ params["verb"], hidden


def noun_logits(params, hidden, verb):
    """Logits of nouns after a verb."""
    return jnp.tanh(hidden @ params["c"] + params["said"][verb]) @ params["noun"]


def scores(params, seen, action):
    """Log-probabilities [..., 2] of verb and noun, and those of the tokens of rank 2."""
    verbs, hidden = verb_logits(params, seen)
    nouns = noun_logits(params, hidden, action[..., 0])
    both = [jax.nn.log_softmax(logits) for logits in (verbs, nouns)]
    of = [jnp.take_along_axis(x, action[..., i, None], -1)[..., 0] for i, x in enumerate(both)]
    return jnp.stack(of, -1), jnp.stack([jax.lax.top_k(x, 2)[0][..., 1] for x in both], -1)


def rollout(params, study: Study, house_key, key, temperature=1.0, teacher=0.0) -> Steps:
    """One episode. A share `teacher` of the steps follows the oracle, as much again is admissible noise."""
    config = study.house

    def step(carry, key):
        state, live = carry
        tokens = envs.house_observe(config, state)
        seen = features(study, tokens)
        keys = jax.random.split(key, 4)
        verbs, hidden = verb_logits(params, seen)
        verb = jax.random.categorical(keys[0], verbs / temperature)
        noun = jax.random.categorical(keys[1], noun_logits(params, hidden, verb) / temperature)
        expert = jnp.stack(envs.house_oracle(config, state))
        action = jnp.stack([verb, noun])
        if teacher:
            possible = envs.house_admissible(config, state)
            noise = jax.random.categorical(keys[2], jnp.where(possible.ravel(), 0.0, -1e9))
            noise = jnp.stack(jnp.unravel_index(noise, possible.shape))
            which = jax.random.uniform(keys[3])
            action = jnp.where(which < teacher, expert, action)
            action = jnp.where(which > 1 - teacher, noise, action)
        logp, logp2 = scores(params, seen, action)
        after, out = envs.house_step(config, state, *action)
        made = Steps(
            seen, hashed(tokens), action, logp, logp2, expert, live, out.reward * live, out.valid,
            out.done,
        )  # fmt: skip
        return (after, live & ~out.done), made

    state = envs.house_reset(config, house_key)
    return jax.lax.scan(step, (state, jnp.bool_(True)), jax.random.split(key, study.horizon))[1]


def many(params, study: Study, key, tasks: int, samples: int, **how) -> Steps:
    """Rollouts [tasks * samples, horizon]; those of a task share the house."""
    first, second = jax.random.split(key)
    houses = jnp.repeat(jax.random.split(first, tasks), samples)
    keys = jax.random.split(second, tasks * samples)
    return jax.vmap(lambda h, k: rollout(params, study, h, k, **how))(houses, keys)


def warm_start(key, study: Study):
    """A policy after `study.warm` supervised steps on the oracle's choices along noisy ways."""
    first, key = jax.random.split(key)
    params, adam = new_policy(first, study), optax.adam(3e-3)

    def step(carry, key):
        params, opt = carry
        steps = many(params, study, key, 64, 1, teacher=0.4)

        def loss(params):
            logp = scores(params, steps.seen, steps.expert)[0]
            return -jnp.mean(logp, where=steps.live[..., None])

        updates, opt = adam.update(jax.grad(loss)(params), opt)
        return (optax.apply_updates(params, updates), opt), None

    keys = jax.random.split(key, study.warm)
    return jax.lax.scan(step, (params, adam.init(params)), keys)[0][0]


def rows_of(steps: Steps, study: Study) -> dict:
    """The flat rows that `selaur_advantage` wants, from rollouts [N, horizon]."""
    n, t = steps.live.shape
    flat = lambda x: x.reshape(n * t, *x.shape[2:])  # noqa: E731
    won = jnp.any(steps.done & steps.live, 1)
    wide = lambda x: jnp.broadcast_to(x, (n, t))  # noqa: E731
    penalty = PENALTY * ~steps.valid
    columns = {
        "group": wide((jnp.arange(n) // study.samples)[:, None]),
        "traj": wide(jnp.arange(n)[:, None]),
        "t": wide(jnp.arange(t)),
        "anchor": steps.anchor,
        "success": wide(won[:, None]),
        "reward": steps.reward,
        "score": jnp.sum(steps.reward, 1, keepdims=True) - penalty,
        "step_penalty": penalty,
        "valid": steps.live,
        "logp": steps.logp,
        "logp2": steps.logp2,
        "mask": jnp.broadcast_to(steps.live[..., None], steps.logp.shape),
    }
    return {name: flat(x) for name, x in columns.items()}


def watched(rows: dict, got: rl.AgentAdvantage, study: Study) -> dict:
    """What an iteration looked like."""
    won, valid, first = rows["success"], rows["valid"], rows["t"] == 0
    order = jnp.lexsort((rows["anchor"], rows["group"], ~valid))
    same = lambda x: x[order][1:] == x[order][:-1]  # noqa: E731
    again = same(rows["anchor"]) & same(rows["group"]) & valid[order][1:]
    tasks = won.reshape(study.tasks, study.samples, study.horizon)[..., 0]
    return {
        "success": jnp.mean(tasks),
        "steps": jnp.sum(valid) / jnp.sum(first),
        "invalid": jnp.mean(rows["step_penalty"] > 0, where=valid),
        "u_failed": jnp.mean(got.u_traj, where=first & ~won),
        "u_won": jnp.mean(got.u_traj, where=first & won),
        "gate": got.gate.astype(jnp.float32),
        "anchor_group": jnp.sum(valid) / (jnp.sum(valid) - jnp.sum(again)),
        "all_failed": jnp.mean(~jnp.any(tasks, 1)),
    }


def advantage(rows: dict, arm, arms: tuple[AgentConfig, ...]) -> rl.AgentAdvantage:
    """That of arm number `arm`, traced: all are worked out and one is taken, so that arms can be a batch."""
    every = [rl.selaur_advantage(rows, config) for config in arms]
    return jax.tree.map(lambda *x: jnp.stack(x)[arm], *every)


def block(carry, arm, key, study: Study, arms: tuple[AgentConfig, ...]):
    """`study.eval_every` iterations of one arm: (carry, curves of iterations, held-out success).

    carry: parameters, state of Adam, parameters that the KL looks back to.
    """
    adam = optax.adam(study.lr)

    def iteration(carry, key):
        params, opt, reference = carry
        steps = many(params, study, key, study.tasks, study.samples)
        rows = rows_of(steps, study)
        got = advantage(rows, arm, arms)
        flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
        seen, action = flat(steps.seen), flat(steps.action)
        batch = {
            "logp_old": rows["logp"], "mask": rows["mask"], "adv": got.adv,
            "logp_ref": scores(reference, seen, action)[0],
        }  # fmt: skip

        def update(carry, _):
            params, opt = carry
            loss = lambda params: rl.rl_loss(scores(params, seen, action)[0], batch, LOSS)[0]  # noqa: E731
            updates, opt = adam.update(jax.grad(loss)(params), opt)
            return (optax.apply_updates(params, updates), opt), None

        (params, opt), _ = jax.lax.scan(update, (params, opt), length=study.epochs)
        return (params, opt, reference), watched(rows, got, study)

    carry, curves = jax.lax.scan(iteration, carry, jax.random.split(key, study.eval_every))
    return carry, curves | {"held_out": held_out(carry[0], study)[None]}


def held_out(params, study: Study):
    """Success on houses that are the same for every policy, at the temperature of evaluation."""
    steps = many(
        params, study, jax.random.key(2**31), study.eval_tasks, 1,
        temperature=study.eval_temperature,
    )  # fmt: skip
    return jnp.mean(jnp.any(steps.done, 1))


def run(seeds: int, study: Study = Study(), arms: dict[str, AgentConfig] = ARMS) -> Iterator[dict]:
    """{"start": held-out success [seeds], "arms": {name: curves [seeds, ...]}}, longer each time.

    All arms and seeds are one program; arms have the same warm starts, houses and keys.
    """
    keys = jax.random.split(jax.random.key(0), (seeds, 2))
    params = jax.jit(jax.vmap(lambda key: warm_start(key, study)))(keys[:, 0])
    start = jax.jit(jax.vmap(lambda params: held_out(params, study)))(params)
    each = functools.partial(block, study=study, arms=tuple(arms.values()))
    step = jax.jit(jax.vmap(jax.vmap(each, (0, None, 0)), (0, 0, None)), donate_argnums=0)
    carry = (params, jax.vmap(optax.adam(study.lr).init)(params), params)
    repeat = lambda x: jnp.repeat(x[None], len(arms), 0)  # noqa: E731
    carry, curves = jax.tree.map(repeat, carry), []
    for i in range(study.iterations // study.eval_every):
        now = jax.vmap(jax.random.fold_in, (0, None))(keys[:, 1], i)
        carry, found = step(carry, jnp.arange(len(arms)), now)
        curves.append(jax.device_get(found))
        whole = {name: np.concatenate([c[name] for c in curves], 2) for name in curves[0]}
        named = {name: {n: x[j] for n, x in whole.items()} for j, name in enumerate(arms)}
        yield {"start": np.asarray(start), "arms": named}
