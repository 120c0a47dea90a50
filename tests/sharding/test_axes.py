"""Meshes that users make: other axis names, other axis types, and what is not a mesh."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from support.on_devices import call

from paligemma_jax.model.config import PaliGemmaConfig
from paligemma_jax.sharding.arrays import distribute, local_rows, shard_batch
from paligemma_jax.sharding.axes import rename_axes
from paligemma_jax.sharding.compiled import use_mesh
from paligemma_jax.sharding.mesh import resolve_mesh
from paligemma_jax.sharding.rules import shardings

CONFIG = PaliGemmaConfig.preset("3b-224")


def one_device(*names, axis_type=AxisType.Auto):
    devices = np.array(jax.devices()[:1]).reshape((1,) * len(names))
    return Mesh(devices, names, axis_types=(axis_type,) * len(names))


def test_logits_on_own_meshes_are_those_of_one_device():
    errors = call(8, "support.own_meshes.logits_on_own_meshes")
    assert errors.keys() == {"explicit", "own names"}
    assert all(0 < error < 1e-5 for error in errors.values()), errors


def test_gradients_keep_the_sharding_of_their_parameters():
    """As does a step of optax, so that the second step does not compile another program."""
    meshes = ["data=2,fsdp=2,tensor=2", "own"]
    for name, result in call(8, "support.own_meshes.gradient_shardings", meshes).items():
        assert result["moved"] == [] and result["split"] > 10, (name, result)
        assert result["programs"] == 1, (name, result)


def test_explicit_axes_become_auto_axes_of_the_same_devices():
    explicit = one_device("data", "tensor", axis_type=AxisType.Explicit)
    mesh = resolve_mesh(explicit, CONFIG)
    assert mesh == one_device("data", "tensor")
    tree = {"projector": {"kernel": np.ones((4, 4))}}
    assert shardings(tree, explicit)["projector"]["kernel"].mesh == mesh
    assert shard_batch(tree, explicit)["projector"]["kernel"].sharding.mesh == mesh
    assert local_rows(3, explicit) == [0, 1, 2]
    message = r"must be AxisType.Auto .*distribute\(model, mesh\)"
    with pytest.raises(ValueError, match=message), use_mesh(explicit):
        pass


class FakeDevice:
    def __init__(self, index):
        self.id, self.platform, self.process_index, self.device_kind = index, "cpu", 0, "cpu"


def test_axes_of_one_new_name_are_merged_in_their_order():
    devices = np.array([FakeDevice(i) for i in range(12)]).reshape(2, 3, 2)
    mesh = rename_axes(
        Mesh(devices, ("slice", "model", "batch")),
        {"slice": "data", "batch": "data", "model": "tensor"},
    )
    assert mesh.axis_names == ("data", "tensor") and {*mesh.axis_types} == {AxisType.Auto}
    rows = [[device.id for device in row] for row in mesh.devices]
    assert rows == [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]


def test_axes_of_other_names_are_refused_with_the_call_that_renames_them():
    mesh = one_device("batch", "model")
    for use in (
        lambda: resolve_mesh(mesh, CONFIG),
        lambda: distribute({}, mesh),
        lambda: shard_batch(np.ones(2), mesh),
        lambda: shardings({}, mesh),
    ):
        with pytest.raises(ValueError) as error:
            use()
        message = str(error.value)
        assert message.startswith("mesh axes must be among data, fsdp, tensor, got batch, model: ")
        call_to_write = message.partition("rename them with ")[2]
        names = {"rename_axes": rename_axes, "mesh": mesh}
        renamed = eval(call_to_write.removeprefix("paligemma_jax.sharding.axes."), names)
        assert renamed == one_device("data", "tensor")


@pytest.mark.parametrize(
    "axes, message",
    [
        ({}, "one of data, fsdp, tensor, got {'batch': 'batch', 'tensor': 'tensor'}"),
        ({"batch": "model"}, "got {'batch': 'model', 'tensor': 'tensor'}"),
        ({"row": "data"}, r"axes of the mesh \(batch, tensor\), got 'row'"),
    ],
)
def test_new_names_that_cannot_be_used_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        rename_axes(one_device("batch", "tensor"), axes)


def test_what_is_no_mesh_is_refused_in_one_sentence():
    meshes = [2, ["data"], {"data": 1}, "auto", "data=1"]
    for mesh, errors in zip(meshes, call(1, "support.own_meshes.refusals", meshes), strict=True):
        resolved, *others = errors
        if isinstance(mesh, str):
            assert resolved.startswith("Mesh(")
        else:
            assert resolved.startswith("mesh must be auto, sizes like data=2,fsdp=4 ")
            assert resolved.endswith(f"a jax.sharding.Mesh or None, got {mesh!r}")
        assert len(others) == 3
        for error in others:
            assert error.startswith(f"mesh must be a jax.sharding.Mesh, got {mesh!r}: ")
            assert "resolve_mesh(text, model.config)" in error
