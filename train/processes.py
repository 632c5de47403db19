"""Agreement between the processes of a run."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


def all_agree(ok: bool) -> bool:
    """Whether `ok` holds on every process; all of them must ask."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.asarray(ok))))


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """A block of checks without communication: where it fails on one process it fails on all.

    The others raise ValueError instead of waiting for a process that is gone.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not all_agree(error is None):
        raise error or ValueError(
            "another process of this run found something wrong: see its output"
        )
