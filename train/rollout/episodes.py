"""Episodes of agents: turns of generation and of environments, each episode one row of tokens.

A row is observation, action, observation, action...; only the tokens of actions, ends included, have
targets. `turns` says to which action a target belongs, so that steps can be told apart later.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlab.rl import logprobs_from_logits, second_logprobs
from jaxlab.sampling import Sampling
from models.generate import decode, prefill, read
from train.data.problems import HELD_OUT
from train.data.tokenizers import Tokenizer
from train.envs.environment import Turn
from train.envs.workers import Workers
from train.evaluate import Scene


class Step(NamedTuple):
    """An action of an episode: what was seen before it, its text, what it brought."""

    seen: str
    action: str
    turn: Turn


class Played(NamedTuple):
    """Episodes on the host, n of each of p tasks."""

    rows: dict[str, np.ndarray]  # [p * n, t]: columns of `Row`, and of `Player.score`
    steps: list[list[Step]]  # of each row


class Row:
    """The tokens of one episode as they come; a target stands where the token before it is."""

    def __init__(self, length: int):
        self.ids: list[int] = []
        self.length = length
        self._columns = {
            "tokens": np.zeros(length, np.int32),
            "targets": np.full(length, -1, np.int32),
            "turns": np.full(length, -1, np.int32),
            "logp_sampler": np.zeros(length, np.float32),
        }

    def see(self, ids: Sequence[int]) -> None:
        """Tokens that the environment says."""
        self._columns["tokens"][len(self.ids) : len(self.ids) + len(ids)] = ids
        self.ids += ids

    def say(self, ids: Sequence[int], turn: int, logps: Sequence[float] | float = 0.0) -> None:
        """Tokens that the agent says, with their log-probabilities; turn -1: shown, not to be learnt."""
        if turn >= 0:
            at = slice(len(self.ids) - 1, len(self.ids) - 1 + len(ids))
            for name, values in (("targets", ids), ("turns", turn), ("logp_sampler", logps)):
                self._columns[name][at] = values
        self.see(ids)

    def columns(self) -> dict[str, np.ndarray]:
        """tokens, targets, turns, positions, segment_ids, mask and logp_sampler, each [length]."""
        at = np.arange(self.length)
        real = at < len(self.ids)
        return self._columns | {
            "positions": np.where(real, at, 0).astype(np.int32),
            "segment_ids": real.astype(np.int32),
            "mask": (self._columns["targets"] >= 0).astype(np.float32),
        }


def observation_ids(tokenizer: Tokenizer, text: str, room: int, *, first: bool) -> list[int]:
    """The tokens of an observation, the last `room` of them: what is said first is cut off."""
    bos = [tokenizer.bos] if first and tokenizer.bos is not None else []
    ids = [*map(int, tokenizer.encode(f"{text.strip()}\n"))]
    return [*bos, *ids[-(room - len(bos)) :]]


class Player:
    """Plays episodes with sharded parameters; compiled once for a number of tasks, `samples` of each.

    The first observation of a task is read once for its samples; later ones are read into the state of
    decoding as they come, so no token is read twice. Token j of turn i of sample s of a task comes from
    the keys of task, s and i * new + j: it depends neither on the batch nor on the mesh. What was played is
    scored in one pass over whole rows: log-probabilities under the parameters at the temperature of sampling
    (`logp_old`), under `reference`, if there is one (`logp_ref`); and at temperature 1, of the token and of
    that of rank 2 (`raw_logp`, `raw_logp2`).
    """

    def __init__(self, scene: Scene, tasks: int, samples: int, split: str, temperature: float):
        run, source = scene.run, scene.run.source
        self._source, self._samples = source, samples
        self._first = 1_000_003 * run.seed + (HELD_OUT if split == "valid" else 0)
        self._tokenizer = source.make_tokenizer()
        self._workers = Workers(source.world, tasks * samples, source.workers)
        stop = () if self._tokenizer.eos is None else (self._tokenizer.eos,)
        module = run.model.build(scene.mesh.devices.flat[0].platform)
        room = source.observation + source.turns * (source.new + source.observation)
        everywhere = NamedSharding(scene.mesh, P())
        say = functools.partial(
            decode, module, steps=source.new, stop=stop, sampling=Sampling(temperature),
            leave_no_trace=True,
        )  # fmt: skip
        told = lambda made: tuple(  # noqa: E731
            jax.lax.with_sharding_constraint(x, everywhere)
            for x in (made.tokens, made.lengths, made.sampling_logprobs)
        )

        def begin(params, prompts, lengths, keys):
            progress = prefill(module, params, prompts, lengths, keys, room=room, samples=samples)
            progress, made = say(params, progress)
            return progress, told(made)

        def go_on(params, progress, seen, lengths, made):
            progress = read(module, params, progress, seen, lengths, made=made)
            progress, made = say(params, progress)
            return progress, told(made)

        def score(params, reference, rows):
            inputs = rows["tokens"], rows["positions"], rows["segment_ids"]
            targets = jnp.maximum(rows["targets"], 0)

            def logp(params):
                logits = scene.apply(params, *inputs)
                found = logprobs_from_logits(logits, targets, temperature=temperature)
                return rows["mask"] * found, logits

            logp_old, logits = logp(params)
            # Uncertainty is that of the model, whatever the temperature of sampling.
            raw = jnp.minimum(logprobs_from_logits(logits, targets), 0)
            scored = {"logp_old": logp_old, "raw_logp": raw, "raw_logp2": second_logprobs(logits)}
            return scored if reference is None else scored | {"logp_ref": logp(reference)[0]}

        self._begin, self._score = jax.jit(begin), jax.jit(score, out_shardings=everywhere)
        self._go_on = jax.jit(go_on, donate_argnums=1)

    def play(self, params: Any, tasks: range, key: jax.Array) -> Played:
        """One batch of episodes, of the tasks of these numbers, not scored."""
        c, n = self._source, self._samples
        turns = self._workers.begin([self._first + i for i in tasks for _ in range(n)])
        rows, steps = [Row(c.length) for _ in turns], [[] for _ in turns]
        live = list(range(len(rows)))
        numbers = np.asarray([i % 2**31 for i in tasks], np.int32)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        progress: Any = None
        for number in range(c.turns):
            seen = np.zeros((len(rows), c.observation), np.int32)
            lengths = np.zeros(len(rows), np.int32)
            for i in live:
                ids = observation_ids(
                    self._tokenizer, turns[i].text, c.observation, first=number == 0
                )
                rows[i].see(ids)
                seen[i, : len(ids)], lengths[i] = ids, len(ids)
            if number == 0:
                progress, made = self._begin(params, seen[::n], lengths[::n], keys)
            else:
                progress, made = self._go_on(params, progress, seen, lengths, number * c.new)
            tokens, sizes, logps = (x.reshape(len(rows), -1) for x in jax.device_get(made))
            actions = {}
            for i in live:
                ids = tokens[i, : sizes[i, 0]].tolist()
                rows[i].say(ids, number, logps[i, : len(ids)])
                actions[i] = self._tokenizer.decode([t for t in ids if t != self._tokenizer.eos])
            after = self._workers.act(actions)
            for i in live:
                steps[i].append(Step(turns[i].text, actions[i], after[i]))
                turns[i] = after[i]
            # An episode that has no room for another turn is cut short.
            space = c.observation + c.new
            live = [i for i in live if not turns[i].done and len(rows[i].ids) + space <= c.length]
            if not live:
                break
        columns = [row.columns() for row in rows]
        return Played(
            {name: np.stack([row[name] for row in columns]) for name in columns[0]}, steps
        )

    def score(self, params: Any, played: Played, reference=None) -> Played:
        """The same with logp_old, raw_logp, raw_logp2 and, given `reference`, logp_ref."""
        scored = jax.device_get(self._score(params, reference, played.rows))
        return played._replace(rows=played.rows | scored)
