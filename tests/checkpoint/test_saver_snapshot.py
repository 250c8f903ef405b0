"""A snapshot is what torch.save would have written then, in memory of its own."""

import io
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from megatron.checkpoint.snapshot import SnapshotBuffers, _Copier


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def content() -> dict[str, Any]:
    flat = torch.arange(40, dtype=torch.float32)
    weight = torch.nn.Parameter(torch.randn(3, 4))
    names = ["a", "b"]
    state = OrderedDict(first=flat[:10].view(2, 5), second=flat[10:30], whole=flat)
    state._metadata = {"": {"version": 1}}
    return {
        "module": state,
        "transposed": torch.randn(4, 6).t(),
        "parameter": weight,
        "again": weight,
        "leaf": torch.ones(2, requires_grad=True),
        "half": torch.randn(5).bfloat16(),
        "empty": torch.empty(0),
        "scalar": torch.tensor(3),
        "rng": torch.get_rng_state(),
        "numpy": np.random.default_rng(1).integers(0, 9, 4),
        "scaler": DynamicLossScaler(16.0, 2.0, 100, 1, 1, False, dtype=torch.float32),
        "shape": torch.Size([3, 4]),
        "names": names,
        "same names": names,
        "plain": (1, 2.5, None, True, "text", {1, 2}),
    }


@pytest.mark.parametrize("buffers", [None, SnapshotBuffers()])
def test_a_copy_is_saved_as_the_original(buffers):
    original = content()
    copied = _Copier(buffers, shares=True).copy(original)
    assert saved(copied) == saved(original)


def test_a_copy_does_not_see_what_happens_later():
    original = content()
    before = saved(original)
    copied = _Copier(SnapshotBuffers(), shares=True).copy(original)
    with torch.no_grad():
        original["module"]["whole"].zero_()
        original["parameter"].add_(1)
    original["half"].zero_()
    original["names"].append("c")
    original["numpy"][:] = 0
    original["scaler"].cur_scale = 1.0
    original["module"]._metadata[""]["version"] = 2
    assert saved(copied) == before


@pytest.mark.parametrize("buffers", [None, SnapshotBuffers()])
def test_weights_of_a_layer_leave_the_buffer_they_are_views_of(buffers):
    flat = torch.arange(10_000, dtype=torch.float32)
    layer = OrderedDict(weight=flat[:6].view(2, 3), bias=flat[6:8])
    copied = _Copier(buffers, shares=False).copy(layer)
    assert len(saved(copied)) < 4096
    assert all(torch.equal(copied[name], layer[name]) for name in layer)


def test_memory_is_used_again_and_given_back_when_no_longer_wanted():
    buffers = SnapshotBuffers()

    def snapshot(*sizes: int) -> list[int]:
        with buffers.reused():
            taken = [buffers.take(size) for size in sizes]
        return [one.data_ptr() for one in taken]

    first = snapshot(100, 100, 300)
    assert sorted(snapshot(300, 100, 100)) == sorted(first)
    assert buffers.num_bytes == 500
    snapshot(300)
    assert buffers.num_bytes == 300


def test_what_cannot_be_copied_is_written_while_training_waits():
    source = torch.ones(3, requires_grad=True)
    sparse = torch.eye(3).to_sparse()
    copier = _Copier(SnapshotBuffers(), shares=True)
    assert copier.copy({"sparse": sparse})["sparse"] is sparse
    assert not copier.is_private

    class Holder:
        def __init__(self) -> None:
            self.derived = source * 2  # torch refuses to copy what a gradient flows through

    copier = _Copier(SnapshotBuffers(), shares=True)
    holder = Holder()
    assert copier.copy([holder])[0] is holder
    assert not copier.is_private
