"""Text-houses against a second form of the rules, written in words and walked exhaustively."""

import collections
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlab import envs
from jaxlab.envs.house import CONDITIONS, RECEPTACLES, ROOMS, VERBS, WITH_DOOR, HouseConfig

TINY = [HouseConfig(2, 2, 1, 2)]
TINY += [
    pytest.param(HouseConfig(*sizes), marks=pytest.mark.slow)
    for sizes in ((1, 2, 2, 0), (2, 3, 1, 3), (2, 2, 2, 1), (1, 3, 1, 3))
]
tiny = pytest.mark.parametrize("config", TINY, ids=str)
LIMIT = 11  # steps of the longest shortest way: room, go, open, take; room, go, heat; room, go, open, put


def compiled(name):
    """A function of a configuration and arrays, over batches of houses."""
    f = getattr(envs, name)
    return functools.lru_cache(
        lambda config: jax.jit(jax.vmap(functools.partial(f, config)))
    )  # fmt: skip


reset, step, oracle, observe, admissible = (
    compiled(f"house_{n}") for n in ("reset", "step", "oracle", "observe", "admissible")
)


def world_of(config, s):
    """The same state in words; what never changes is left to the caller."""
    names, c = config.nouns, config.receptacles
    places, objects = names[config.rooms : config.rooms + c], names[config.rooms + c :]
    return {
        "room": ROOMS[s.room],
        "at": places[s.at] if s.at < c else None,
        "open": {p for p, o in zip(places, s.open, strict=True) if o},
        "where": {o: places[i] if i < c else "hand" for o, i in zip(objects, s.place, strict=True)},
        "clean": {o for o, x in zip(objects, s.clean, strict=True) if x},
        "heat": {o: ("", "hot", "cold")[h] for o, h in zip(objects, s.heat, strict=True)},
        "searched": {p for p, x in zip(places, s.searched, strict=True) if x},
    }


def in_words(config, s, verb, noun):
    """Whether an action is possible and the world after it, by rules written in words."""
    places = config.nouns[config.rooms : config.rooms + config.receptacles]
    rooms_of = {p: ROOMS[r] for p, r in zip(places, s.room_of, strict=True)}
    wanted, target = config.nouns[-config.objects :][s.goal[0]], places[s.goal[1]]
    w = world_of(config, s)

    def won():
        fits = {"": True, "clean": wanted in w["clean"]}
        fits |= {x: w["heat"][wanted] == x for x in ("hot", "cold")}
        return w["where"][wanted] == target and fits[CONDITIONS[s.goal[2]]]

    before = won()
    held = [o for o, p in w["where"].items() if p == "hand"]
    can_reach = w["at"] is not None and w["at"] in w["open"]
    tools = dict(zip(("clean", "heat", "cool"), RECEPTACLES, strict=False))
    doors = {p for p, d in zip(RECEPTACLES, WITH_DOOR, strict=True) if d}
    possible = not before and {
        "look": noun == w["room"],
        "go": (noun in ROOMS and noun != w["room"])
        or (rooms_of.get(noun) == w["room"] and noun != w["at"]),
        "open": noun == w["at"] and noun in doors and noun not in w["open"],
        "close": noun == w["at"] and noun in doors and noun in w["open"],
        "take": can_reach and not held and w["where"].get(noun) == w["at"],
        "put": can_reach and noun in held,
    }.get(
        verb,
        noun in held and tools.get(verb) == w["at"] and list(tools).index(verb) < config.conditions
        if verb in tools
        else False,
    )
    if possible:
        match verb:
            case "go":
                w |= {"room": noun, "at": None} if noun in ROOMS else {"at": noun}
            case "open":
                w["open"].add(noun)
            case "close":
                w["open"].discard(noun)
            case "take":
                w["where"][noun] = "hand"
            case "put":
                w["where"][noun] = w["at"]
            case "clean":
                w["clean"].add(noun)
            case "heat" | "cool":
                w["heat"][noun] = "hot" if verb == "heat" else "cold"
    if w["at"] in w["open"]:
        w["searched"].add(w["at"])
    return bool(possible), w, 10.0 * (won() and not before), won()


def unstack(tree):
    """A list of NumPy trees from one with a leading axis."""
    leaves, structure = jax.tree.flatten(jax.device_get(tree))
    return [jax.tree.unflatten(structure, row) for row in zip(*leaves, strict=True)]


def stack(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def everything(config, start):
    """{state: shortest distance to a goal, or None} of all that can be reached; checks every step."""
    verbs, nouns = np.divmod(np.arange(len(VERBS) * len(config.nouns)), len(config.nouns))
    size = len(verbs)
    every = jax.jit(jax.vmap(jax.vmap(functools.partial(envs.house_step, config), (None, 0, 0)),
                             (0, None, None)))  # fmt: skip
    name = lambda s: tuple(np.asarray(x).tobytes() for x in s)  # noqa: E731
    states, back, wave = {name(start): start}, collections.defaultdict(set), [start]
    goals = set()
    while wave:
        padded = wave + [wave[0]] * (-len(wave) % 64)  # few shapes, few compilations
        after, out = every(stack(padded), verbs, nouns)
        can = np.asarray(admissible(config)(stack(padded))).reshape(len(padded), size)
        after = unstack(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), after))
        out = jax.device_get(out)
        new = []
        for i, s in enumerate(wave):
            for j in range(size):
                t = after[i * size + j]
                possible, world, reward, done = in_words(
                    config, s, VERBS[verbs[j]], config.nouns[nouns[j]]
                )
                assert bool(out.valid[i, j]) == bool(can[i, j]) == possible
                assert world_of(config, t) == world
                assert (out.reward[i, j], bool(out.done[i, j])) == (reward, done)
                if done:
                    goals.add(name(t))
                back[name(t)].add(name(s))
                if name(t) not in states:
                    states[name(t)] = t
                    new.append(t)
        wave = new
    distance, wave = dict.fromkeys(goals, 0), collections.deque(goals)
    while wave:
        here = wave.popleft()
        for there in back[here] - set(distance):
            distance[there] = distance[here] + 1
            wave.append(there)
    return states, distance, name


@tiny
def test_every_step_of_tiny_houses_and_the_oracle_takes_a_shortest_way(config):
    starts = unstack(reset(config)(jax.random.split(jax.random.key(1), 2)))
    for start in starts:
        states, distance, name = everything(config, start)
        assert set(states) == set(distance)  # no state is a trap
        assert distance[name(start)] <= LIMIT
        free = [s for s in states.values() if not np.any(s.place == config.receptacles)
                and distance[name(s)]]  # fmt: skip
        after, _ = step(config)(stack(free), *oracle(config)(stack(free)))
        for s, t in zip(free, unstack(after), strict=True):
            assert distance[name(t)] == distance[name(s)] - 1


@pytest.mark.parametrize("config", [HouseConfig(4, 8, 8, 3), HouseConfig(1, 2, 1, 0)])
def test_the_oracle_solves_every_house(config):
    def walk(state):
        def body(state, _):
            action = envs.house_oracle(config, state)
            possible = envs.house_admissible(config, state)[action] | envs.house_won(state)
            after, out = envs.house_step(config, state, *action)
            return after, (out, possible)

        return jax.lax.scan(body, state, length=LIMIT)[1]

    start = reset(config)(jax.random.split(jax.random.key(2), 300))
    out, possible = jax.jit(jax.vmap(walk))(start)
    assert out.done[:, -1].all() and possible.all()
    assert np.array_equal(out.reward.sum(1), np.full(300, 10.0, np.float32))
    assert not out.done[:, 0].all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 10**6), min_size=30, max_size=30))
def test_what_holds_along_every_way(seed, moves):
    """Of admissible actions: one object in the hand at most, doors, the goal stays reachable."""
    config = HouseConfig(2, 5, 3, 3)
    c = config.receptacles
    one = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731
    state = reset(config)(jax.random.split(jax.random.key(seed), 1))
    room_of, goal = state.room_of, state.goal
    for move in moves:
        verbs, nouns = np.nonzero(np.asarray(admissible(config)(state))[0])
        if not len(verbs):
            break
        i = move % len(verbs)
        before = state
        state, out = step(config)(state, *one((jnp.int32(verbs[i]), jnp.int32(nouns[i]))))
        assert out.valid.all()
        assert np.array_equal(state.room_of, room_of) and np.array_equal(state.goal, goal)
        assert np.sum(state.place == c) <= 1 and np.sum(state.place != before.place) <= 1
        assert np.all(state.open | WITH_DOOR[:c])
        assert np.all(state.searched >= before.searched)
        assert state.at[0] == c or room_of[0, state.at[0]] == state.room[0]
    for _ in range(15):  # also with something else in the hand
        state, out = step(config)(state, *oracle(config)(state))
    assert out.done.all()


def test_observations_are_words_and_texts_differ_where_they_do():
    config = HouseConfig()
    words = envs.house_words(config)
    assert words[0] == "" and len(set(words)) == len(words)
    fields = envs.house_fields(config)

    def walk(key):
        def body(state, key):
            possible = envs.house_admissible(config, state).ravel()
            verb = jax.random.categorical(key, jnp.where(possible, 0.0, -1e9))
            after = envs.house_step(config, state, *jnp.divmod(verb, len(config.nouns)))[0]
            return after, envs.house_observe(config, state)

        return jax.lax.scan(body, envs.house_reset(config, key), jax.random.split(key, 30))[1]

    tokens = np.asarray(jax.jit(jax.vmap(walk))(jax.random.split(jax.random.key(3), 40)))
    tokens = tokens.reshape(-1, tokens.shape[-1])
    assert tokens.shape[1] == len(fields) and tokens.max() < len(words)
    texts = [" ".join(words[i] for i in row if i) for row in tokens]
    assert len(set(texts)) == len({row.tobytes() for row in tokens}) > 500


def test_one_trace_serves_every_house_and_a_whole_rollout_is_one_program():
    config = HouseConfig()

    def rollout(key):
        def body(state, key):
            action = jax.random.randint(key, (2,), 0, jnp.array([len(VERBS), len(config.nouns)]))
            return envs.house_step(config, state, *action)

        return jax.lax.scan(body, envs.house_reset(config, key), jax.random.split(key, 8))

    traced = jax.jit(chex.assert_max_traces(lambda keys: jax.vmap(rollout)(keys), n=1))
    _, out = traced(jax.random.split(jax.random.key(4), 16))
    traced(jax.random.split(jax.random.key(5), 16))
    chex.clear_trace_counter()
    assert out.valid.shape == (16, 8) and out.valid.any() and not out.valid.all()


@pytest.mark.parametrize(
    "sizes, message",
    [((0, 6, 4, 3), "rooms=0"), ((2, 1, 4, 3), "receptacles=1"), ((2, 6, 9, 3), "objects=9"),
     ((2, 2, 1, 3), "conditions=3"), ((True, 6, 4, 3), "rooms=True")],
)  # fmt: skip
def test_houses_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        HouseConfig(*sizes)
