"""Text-house: find an object, perhaps clean, heat or cool it, and put it where it belongs.

Rooms hold receptacles, receptacles hold objects, some behind a door. The goals are those of ALFWorld
(arXiv 2010.03768) in small; an action is a verb and a noun, so a policy makes it in two tokens. Letters:
R rooms, C receptacles, O objects, V verbs, M = R + C + O nouns in this order. All is exact and
deterministic but `house_reset`, which draws a house from a key.
"""

import dataclasses
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxlab.arguments import check_count

ROOMS = ("kitchen", "hall", "bedroom", "study")
# The first three are the tools that clean, heat and cool.
RECEPTACLES = ("sink", "microwave", "fridge", "drawer", "table", "cabinet", "shelf", "safe")
WITH_DOOR = np.array([False, True, True, True, False, True, False, True])
OBJECTS = ("apple", "mug", "plate", "egg", "knife", "pan", "spoon", "bread")
VERBS = ("look", "go", "open", "close", "take", "put", "clean", "heat", "cool")
LOOK, GO, OPEN, CLOSE, TAKE, PUT, CLEAN, HEAT, COOL = range(len(VERBS))
CONDITIONS = ("", "clean", "hot", "cold")  # of a goal; condition i > 0 is made by tool i - 1
SUCCESS = 10.0  # reward of the step that reaches the goal; every other step earns 0


@dataclasses.dataclass(frozen=True)
class HouseConfig:
    """Sizes of houses; ValueError on construction for those that cannot be."""

    rooms: Annotated[int, "1 to 4"] = 2
    receptacles: Annotated[int, "2 to 8; every second one or so has a door"] = 6
    objects: Annotated[int, "1 to 8"] = 4
    conditions: Annotated[int, "0: only carry; 1 to 3: also goals of clean, hot, cold"] = 3

    def __post_init__(self):
        check_count("rooms", self.rooms, 1, len(ROOMS))
        check_count("receptacles", self.receptacles, 2, len(RECEPTACLES))
        check_count("objects", self.objects, 1, len(OBJECTS))
        check_count("conditions", self.conditions, 0, min(3, self.receptacles))

    @property
    def nouns(self) -> tuple[str, ...]:
        """Names of rooms, receptacles and objects, in the order of an action's second number."""
        names = (ROOMS, self.rooms), (RECEPTACLES, self.receptacles), (OBJECTS, self.objects)
        return tuple(name for some, number in names for name in some[:number])


class HouseState(NamedTuple):
    """A house and where everything in it is; the first two never change."""

    room_of: Int[Array, "C"]
    goal: Int[Array, "3"]  # object, receptacle, condition
    room: Int[Array, ""]  # where the agent is
    at: Int[Array, ""]  # receptacle that it stands at, C: none
    open: Bool[Array, "C"]  # what has no door is always open
    place: Int[Array, "O"]  # receptacle, C: in the agent's hand, which holds one object
    clean: Bool[Array, "O"]
    heat: Int[Array, "O"]  # 0 as it was, 1 hot, 2 cold
    searched: Bool[Array, "C"]  # whether the agent has seen what is in it


class HouseStep(NamedTuple):
    """What an action brought."""

    reward: Float[Array, ""]
    done: Bool[Array, ""]  # the goal is reached; nothing happens any more
    valid: Bool[Array, ""]  # the action was admissible; others change nothing


def house_reset(config: HouseConfig, key: Key[Array, ""]) -> HouseState:
    """A random house: rooms, places, start and goal uniform, the object not yet in its receptacle."""
    c, o = config.receptacles, config.objects
    keys = jax.random.split(key, 6)
    draw = lambda i, shape, high: jax.random.randint(keys[i], shape, 0, high)  # noqa: E731
    place, wanted, target = draw(0, (o,), c), draw(1, (), o), draw(2, (), c - 1)
    target += target >= place[wanted]
    return HouseState(
        room_of=draw(4, (c,), config.rooms),
        goal=jnp.stack([wanted, target, draw(5, (), config.conditions + 1)]),
        room=draw(3, (), config.rooms),
        at=jnp.int32(c),
        open=~jnp.asarray(WITH_DOOR[:c]),
        place=place,
        clean=jnp.zeros(o, bool),
        heat=jnp.zeros(o, jnp.int32),
        searched=jnp.zeros(c, bool),
    )


def _fits(state: HouseState) -> Bool[Array, ""]:
    """Whether the object of the goal is in the condition of the goal."""
    wanted, _, condition = state.goal
    heat = state.heat[wanted]
    return jnp.stack([True, state.clean[wanted], heat == 1, heat == 2])[condition]


def house_won(state: HouseState) -> Bool[Array, ""]:
    """Whether the goal is reached."""
    return (state.place[state.goal[0]] == state.goal[1]) & _fits(state)


def _open_here(config: HouseConfig, state: HouseState) -> Bool[Array, ""]:
    return jnp.any((jnp.arange(config.receptacles) == state.at) & state.open)


def house_admissible(config: HouseConfig, state: HouseState) -> Bool[Array, "V M"]:
    """Which pairs of verb and noun are possible; none when the goal is reached.

    look: the own room; go: other rooms, and receptacles of the own; open, close: where one stands; take:
    with an empty hand, put: what it holds, both where one stands and it is open; clean, heat, cool: what
    the hand holds, at sink, microwave and fridge, as far as `config.conditions` goes.
    """
    c, o = config.receptacles, config.objects
    rooms, places = jnp.arange(config.rooms), jnp.arange(c)
    here, held, no_rooms = places == state.at, state.place == c, jnp.zeros(config.rooms, bool)
    reach = _open_here(config, state)
    none = {"rooms": no_rooms, "places": jnp.zeros(c, bool), "objects": jnp.zeros(o, bool)}
    row = lambda **some: jnp.concatenate([*(none | some).values()])  # noqa: E731
    door = here & jnp.asarray(WITH_DOOR[:c])
    near = (state.room_of == state.room) & ~here
    takes = (state.place == state.at) & reach & ~jnp.any(held)
    tools = [
        row(objects=held & (state.at == tool)) if tool < config.conditions else row()
        for tool in range(3)
    ]
    rows = [
        row(rooms=rooms == state.room),
        row(rooms=rooms != state.room, places=near),
        row(places=door & ~state.open),
        row(places=door & state.open),
        row(objects=takes),
        row(objects=held & reach),
        *tools,
    ]
    return jnp.stack(rows) & ~house_won(state)


def house_step(
    config: HouseConfig, state: HouseState, verb: Int[Array, ""], noun: Int[Array, ""]
) -> tuple[HouseState, HouseStep]:
    """One action; verb in [0, V), noun in [0, M). What is not admissible changes nothing."""
    c = config.receptacles
    valid = house_admissible(config, state)[verb, noun]
    does = lambda *verbs: valid & jnp.isin(verb, jnp.array(verbs))  # noqa: E731
    to_room = noun < config.rooms
    receptacle = noun - config.rooms
    this = jnp.arange(config.objects) == receptacle - c
    room = jnp.where(does(GO) & to_room, noun, state.room)
    at = jnp.where(does(GO), jnp.where(to_room, c, receptacle), state.at)
    door = jnp.arange(c) == receptacle
    opened = (state.open | (door & does(OPEN))) & ~(door & does(CLOSE))
    place = jnp.where(this & does(TAKE), c, jnp.where(this & does(PUT), state.at, state.place))
    after = state._replace(
        room=room,
        at=at,
        open=opened,
        place=place,
        clean=state.clean | (this & does(CLEAN)),
        heat=jnp.where(this & does(HEAT), 1, jnp.where(this & does(COOL), 2, state.heat)),
        searched=state.searched | ((jnp.arange(c) == at) & opened),
    )
    won = house_won(after)
    reward = jnp.where(won & ~house_won(state), SUCCESS, 0.0).astype(jnp.float32)
    return after, HouseStep(reward, won, valid)


def house_oracle(config: HouseConfig, state: HouseState) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """(verb, noun) of a shortest way to the goal for an agent that sees all of the house.

    From a state with something else in the hand it is a way, not always a shortest one.
    """
    c = config.receptacles
    wanted, target, condition = state.goal
    in_hand = state.place == c
    has, free = in_hand[wanted], ~jnp.any(in_hand)
    other = jnp.argmax(in_hand)
    fetch = jnp.where(free, state.place[wanted], jnp.where(state.at < c, state.at, target))
    treat = has & ~_fits(state)
    goes = jnp.where(treat, condition - 1, jnp.where(has, target, fetch))
    room = state.room_of[jnp.clip(goes, 0, c - 1)]
    act = jnp.where(treat, CLEAN + condition - 1, jnp.where(free, TAKE, PUT))
    thing = config.rooms + c + jnp.where(has | free, wanted, other)
    closed = ~_open_here(config, state) & ~treat
    arrived = state.at == goes
    verb = jnp.where(arrived, jnp.where(closed, OPEN, act), GO)
    door = config.rooms + goes
    way = jnp.where(room == state.room, door, room)
    return verb, jnp.where(arrived, jnp.where(closed, door, thing), way)
