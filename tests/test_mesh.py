"""Mesh sizes and logical-axis rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding.mesh import AXES, MeshShape, make_mesh
from sharding.rules import RULES, check_divisible, constrain, spec_of, use_rules


def test_free_axis_takes_what_is_left():
    assert MeshShape(data=-1, tensor=4).resolve(8) == MeshShape(2, 1, 1, 1, 4)
    assert MeshShape(data=1, fsdp=-1, context=2).resolve(8).fsdp == 4
    mesh = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == AXES and mesh.devices.shape == (2, 2, 1, 1, 2)
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


def test_a_smaller_mesh_uses_the_first_devices():
    assert list(make_mesh(MeshShape(data=2)).devices.flat) == jax.devices()[:2]


@pytest.mark.parametrize(
    "shape, message",
    [
        (MeshShape(data=-1, tensor=3), "multiple of 3 devices, there are 8"),
        (MeshShape(data=16), "needs 16 devices, there are 8"),
        (MeshShape(data=-1, fsdp=-1), "only one mesh axis may be -1"),
        (MeshShape(data=0), "mesh.data=0 must be >= 1"),
    ],
)
def test_impossible_meshes_say_what_would_work(shape, message):
    with pytest.raises(ValueError, match=message):
        shape.resolve(8)


def test_rules_map_names_and_refuse_collisions():
    assert spec_of(("batch", "length", None)) == P(("data", "fsdp"), ("ring", "context"), None)
    free = P.UNCONSTRAINED
    assert spec_of((free, "heads", None)) == P(free, "tensor", None)
    with pytest.raises(ValueError, match="both map to 'tensor'"):
        spec_of(("heads", "mlp"))
    with pytest.raises(ValueError, match="unknown logical axis 'wide'"):
        spec_of(("wide",))
    with use_rules({**RULES, "mlp": None}):
        assert spec_of(("heads", "mlp")) == P("tensor", None)


def test_constrain_is_identity_without_a_mesh_and_shards_with_one():
    x = jnp.arange(64.0).reshape(8, 8)
    assert constrain(x, "batch", "length") is x
    with jax.set_mesh(make_mesh(MeshShape(data=4, context=2))):
        y = jax.jit(lambda x: constrain(x * 2, "batch", "length"))(x)
    assert len({str(s.index) for s in y.addressable_shards}) == 8
    np.testing.assert_array_equal(y, x * 2)


def test_indivisible_arrays_are_all_listed():
    shapes = {"a": jax.ShapeDtypeStruct((6, 8), "float32"), "b": jax.ShapeDtypeStruct((3,), "int8")}
    axes = {"a": ("heads", None), "b": ("mlp",)}
    with pytest.raises(ValueError) as error:
        check_divisible(shapes, axes, {"tensor": 4})
    assert "a: heads=6 is not divisible by tensor=4" in str(error.value)
    assert "4, 8" in str(error.value) and "b: mlp=3" in str(error.value)
