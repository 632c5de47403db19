"""What an agent reads in a text-house: words at fixed places, 0 where there is none.

Reading the words that are there gives a text in which no two observations look alike.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxlab.envs.house import CONDITIONS, VERBS, WITH_DOOR, HouseConfig, HouseState

# Each begins a part of an observation, in this order.
MARKS = ("goal", "at", "there", "see", "carry", "searched")
FILLERS = ("in", "open", "closed", "nothing", "clean", "hot", "cold")


def house_words(config: HouseConfig) -> tuple[str, ...]:
    """All words of observations and actions; a token is a place in it, and token 0 is no word."""
    return ("", *dict.fromkeys((*MARKS, *FILLERS, *VERBS, *config.nouns)))


def house_fields(config: HouseConfig) -> np.ndarray:
    """Which part of an observation each of its L places belongs to: numbers of MARKS."""
    c, o = config.receptacles, config.objects
    return np.repeat(np.arange(len(MARKS)), [5, 4, 1 + c, 1 + o, 4, 1 + c])


def house_observe(config: HouseConfig, state: HouseState) -> Int[Array, "L"]:
    """The observation: goal; where one is; receptacles of the room; objects in sight; what the hand
    holds and in what condition; receptacles that one has looked into.
    """
    words = {word: i for i, word in enumerate(house_words(config))}
    c, r = config.receptacles, config.rooms
    nouns = jnp.array([words[name] for name in config.nouns])
    rooms, places, objects = nouns[:r], nouns[r : r + c], nouns[r + c :]
    conditions = jnp.array([words[name] for name in CONDITIONS])
    some = lambda which, tokens: jnp.where(which, tokens, 0)  # noqa: E731
    wanted, target, condition = state.goal
    here = jnp.arange(c) == state.at
    opened = jnp.any(here & state.open)
    stands = state.at < c
    door = jnp.any(here & jnp.asarray(WITH_DOOR[:c]))
    held = state.place == c
    holds = lambda x: jnp.any(held & x)  # noqa: E731
    warm = some(holds(state.heat == 1), words["hot"]) + some(holds(state.heat == 2), words["cold"])
    where = some(stands, places[jnp.clip(state.at, 0, c - 1)])
    state_of_door = some(door, jnp.where(opened, words["open"], words["closed"]))
    thing = jnp.where(jnp.any(held), objects[jnp.argmax(held)], words["nothing"])
    parts = {
        "goal": [conditions[condition], objects[wanted], words["in"], places[target]],
        "at": [rooms[state.room], where, state_of_door],
        "there": some(state.room_of == state.room, places),
        "see": some((state.place == state.at) & opened, objects),
        "carry": [some(holds(state.clean), words["clean"]), warm, thing],
        "searched": some(state.searched, places),
    }
    rows = [jnp.concatenate([jnp.array([words[m]]), jnp.stack([*parts[m]])]) for m in MARKS]
    return jnp.concatenate(rows).astype(jnp.int32)
