"""Many environments, stepped in processes of their own; one that dies is started anew."""

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from train.envs.environment import Turn, World, act, begin


class Deal:
    """The environments of one process: a list of (slot, seed or action) in, (slot, Turn) out."""

    def __init__(self, world: World):
        self._world, self._environments, self._turns = world, {}, {}

    def do(self, orders: Sequence[tuple[int, int | str]]) -> list[tuple[int, Turn]]:
        """An integer begins the episode of this seed in the slot, a text acts in it."""
        return [(slot, self._one(slot, order)) for slot, order in orders]

    def _one(self, slot: int, order: int | str) -> Turn:
        if slot not in self._environments:
            self._environments[slot] = self._world.make()
        environment = self._environments[slot]
        if isinstance(order, int):
            self._turns[slot] = begin(environment, order)
        else:
            self._turns[slot] = act(environment, order, self._turns[slot])
        return self._turns[slot]


def serve(connection: Connection, world: World) -> None:
    """The main function of a process: orders in, turns or the text of an error out, until the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer decides when to stop
    os.environ["JAX_PLATFORMS"] = "cpu"  # accelerators are the trainer's
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    deal = Deal(world)
    while True:
        try:
            orders = connection.recv()
        except EOFError:
            return
        try:
            answer: Any = deal.do(orders)
        except Exception:  # whatever an environment raises is for the trainer to report
            answer = traceback.format_exc()
        connection.send(answer)


class _Worker(NamedTuple):
    process: Any
    connection: Connection


class Workers:
    """`slots` environments of a world over `processes` processes; 0: in this one.

    Slots with no order are left as they are. A process that dies is started anew and its episodes
    are played again, as they are deterministic; RuntimeError if it dies of the same orders again, and for
    what an environment raises. They end with `close`, with this object or with this process.
    """

    def __init__(self, world: World, slots: int, processes: int):
        self._world, self._count = world, min(processes, slots)
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker | None] = [None] * self._count
        self._here = Deal(world)
        self._history: list[list[int | str]] = [[] for _ in range(slots)]

    def begin(self, seeds: Sequence[int]) -> list[Turn]:
        """Episodes of these seeds, one in each of the first slots."""
        return [turn for turn in self._all(dict(enumerate(seeds))).values()]

    def act(self, actions: dict[int, str]) -> dict[int, Turn]:
        """The turns after an action in some of the slots."""
        return self._all(actions)

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            if worker is not None:
                worker.connection.close()
                worker.process.join(5)
                worker.process.kill()
        self._workers = [None] * self._count

    def _all(self, orders: dict[int, Any]) -> dict[int, Turn]:
        if not self._count:
            return dict(self._here.do([*orders.items()]))
        parts: list[list[tuple[int, Any]]] = [[] for _ in range(self._count)]
        for slot, order in orders.items():
            parts[slot % self._count].append((slot, order))
        for w, part in enumerate(parts):
            if part:
                self._send(w, part)
        turns: dict[int, Turn] = {}
        for w, part in enumerate(parts):
            turns |= self._answer(w, part) if part else {}
        for slot, order in orders.items():
            if isinstance(order, int):
                self._history[slot].clear()
            self._history[slot].append(order)
        return {slot: turns[slot] for slot in orders}

    def _send(self, w: int, part: list) -> None:
        try:
            self._started(w).connection.send(part)
        except (
            OSError
        ):  # it died while idle; the answer will be missed, and the process started anew
            pass

    def _answer(self, w: int, part: list) -> dict[int, Turn]:
        for attempt in range(2):
            try:
                worker = self._started(w)
                if attempt:
                    # All that its slots have seen so far, one action a message.
                    played = {s: h for s, h in enumerate(self._history) if s % self._count == w}
                    again = {s for s, order in part if isinstance(order, int)}
                    for i in range(max(map(len, played.values()), default=0)):
                        row = [
                            (s, h[i]) for s, h in played.items() if i < len(h) and s not in again
                        ]
                        worker.connection.send(row)
                        _checked(worker.connection.recv())
                    worker.connection.send(part)
                return dict(_checked(worker.connection.recv()))
            except (EOFError, OSError):
                self._workers[w] = None
        raise RuntimeError(f"the process of an environment died twice of {part}")

    def _started(self, w: int) -> _Worker:
        worker = self._workers[w]
        if worker is None:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=serve, args=(theirs, self._world), daemon=True, name=f"environment-{w}"
            )
            process.start()
            theirs.close()
            worker = self._workers[w] = _Worker(process, ours)
        return worker


def _checked(answer: Any) -> list:
    if isinstance(answer, str):
        raise RuntimeError(f"an environment failed:\n{answer}")
    return answer
