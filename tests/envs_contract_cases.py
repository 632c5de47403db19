"""Rows of `jaxlab.envs` for test_contract.py: which house and which action come from the numbers drawn."""

import jax
import jax.numpy as jnp
from contract_cases import Case, _normal

from jaxlab import envs
from jaxlab.envs.house import VERBS

HOUSE = envs.HouseConfig(2, 4, 2, 3)


def chosen(key, dtype):
    return _normal(key, dtype, (3,))


def below(x, number):
    """An integer in [0, number) of a number drawn."""
    return jnp.int32(jnp.abs(x.astype(jnp.float32)) * 1000) % number


def house(x):
    return envs.house_reset(HOUSE, jax.random.key(below(x[0], 1000)))


def case(f):
    return Case(lambda x: f(HOUSE, house(x)), chosen, "wide", grad=False)


def step(x):
    verb, noun = below(x[1], len(VERBS)), below(x[2], len(HOUSE.nouns))
    return envs.house_step(HOUSE, house(x), verb, noun)


CALLS = {
    "house_reset": Case(house, chosen, "wide", grad=False),
    "house_step": Case(step, chosen, "wide", grad=False),
    "house_won": Case(lambda x: envs.house_won(house(x)), chosen, "wide", grad=False),
} | {
    name: case(getattr(envs, name))
    for name in ("house_admissible", "house_oracle", "house_observe")
}
CASES = {f"jaxlab.envs.{name}": row for name, row in CALLS.items()}
EXEMPT = {
    "jaxlab.envs.house_fields": "names of places, tested in test_text_house.py",
    "jaxlab.envs.house_words": "texts, tested in test_text_house.py",
}
