"""From rows to global arrays: who holds which rows, and the three kinds of source."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.mesh import MeshShape, make_mesh
from train.feed import Feed, one_part, row_shard
from train.processes import all_or_none

SPEC = {"tokens": jax.ShapeDtypeStruct((8, 4), np.int32)}
MESH = MeshShape(data=2, fsdp=2, context=2)


def rows(step):
    return {"tokens": np.arange(32, dtype=np.int32).reshape(8, 4) + 100 * step}


class Pure:
    spec = SPEC

    def batch_at(self, step, part):
        return {k: v[part] for k, v in rows(step).items()}


class Stream:
    spec, batch, at = SPEC, 8, 0

    def __next__(self):
        self.at += 1
        return rows(self.at - 1)

    def get_state(self):
        return self.at


class Policy:
    """Looks at the parameters, as reinforcement learning does."""

    spec = SPEC

    def batch_from(self, step, params):
        return {"tokens": jnp.full((8, 4), params + step)}


def test_pure_sources_and_streams_give_the_same_global_arrays():
    mesh = make_mesh(MESH)
    for source, states in ((Pure(), [None] * 3), (Stream(), [1, 2, 3])):
        feed = Feed(source, mesh, 0)
        for step in range(3):
            batch, state = feed.take(None)
            np.testing.assert_array_equal(batch["tokens"], rows(step)["tokens"])
            assert batch["tokens"].sharding.shard_shape((8, 4)) == (2, 2)
            # The state goes on after this batch, however many were prepared ahead.
            assert state == states[step]
        feed.close()


def test_a_source_may_look_at_the_parameters():
    feed = Feed(Policy(), make_mesh(MESH), 5)
    for step in (5, 6):
        batch, state = feed.take(jnp.asarray(10))
        assert state is None and int(batch["tokens"][0, 0]) == 10 + step
    feed.close()


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(0, 8)], (0, 1)),
        ([(4, 6), (6, 8)], (1, 2)),
        ([(0, 2), (4, 6)], (0, 0)),  # a gap
        ([(2, 6)], (0, 0)),  # across two parts
    ],
)
def test_the_part_of_the_rows_that_a_process_holds(ranges, expected):
    assert one_part(ranges, 8) == expected
    assert row_shard(make_mesh(MESH), 8) == (0, 1)


def test_checks_raise_what_is_wrong():
    with pytest.raises(KeyError, match="x"), all_or_none():
        raise KeyError("x")
    with all_or_none():
        pass
