"""Stopping in order: signals are noted and acted on between two steps."""

import os
import signal

import jax


class Stop:
    """Notes SIGTERM and SIGINT and says so; a second SIGINT interrupts at once.

    With several processes SIGTERM belongs to JAX's preemption service, which makes all processes
    stop at one step; every SIGINT is passed on to it.
    """

    wanted = False

    def __enter__(self):
        self._old = {}
        alone = jax.process_count() == 1
        for number in (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,):
            try:
                self._old[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: the caller handles signals
                break
        return self

    def _note(self, number, frame):
        if number == signal.SIGINT:
            if self.wanted:
                raise KeyboardInterrupt
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)
        self.wanted = jax.process_count() == 1
        again = "; once more: end at once" if number == signal.SIGINT and self.wanted else ""
        os.write(2, f"\njaxlab: stopping after this step, saving{again}\n".encode())

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)
