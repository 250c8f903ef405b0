"""Torch files are data: what is allowed is read, anything that runs code is not."""

import os

import numpy as np
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron.base.errors import CheckpointError
from megatron.checkpoint.safe_torch import read_torch_file


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return (os.system, (self.command,))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy pickle"])
def test_what_deepspeed_and_numpy_put_into_checkpoints_is_read(tmp_path, zipped):
    scaler = DynamicLossScaler(2**12, 1000, 1.0, 2, False)
    content = {
        "tensor": torch.arange(6.0).view(2, 3),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "np_rng_state": np.random.RandomState(3).get_state(),
        "names": {"a", "b"},
        "shape": torch.Size([2, 3]),
        "scaler": scaler,
        "stage": ZeroStageEnum.optimizer_states,
        "slice": fragment_address(numel=4, start=2),
    }
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    read = read_torch_file(tmp_path / "file.pt")
    assert torch.equal(read["tensor"], content["tensor"])
    assert torch.equal(read["bf16"], content["bf16"])
    np.testing.assert_array_equal(read["np_rng_state"][1], content["np_rng_state"][1])
    assert read["names"] == {"a", "b"}
    assert vars(read["scaler"]) == vars(scaler)
    assert read["stage"] is ZeroStageEnum.optimizer_states
    assert (read["slice"].numel, read["slice"].start) == (4, 2)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy pickle"])
def test_code_is_not_run(tmp_path, zipped):
    proof = tmp_path / "proof"
    torch.save(
        {"w": Payload(f"touch {proof}")},
        tmp_path / "file.pt",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match=r"file\.pt is refused: it names posix\.system,"):
        read_torch_file(tmp_path / "file.pt")
    assert not proof.exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file_is_named_with_its_size(tmp_path, kept):
    path = tmp_path / "file.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    size = int(kept * path.stat().st_size) if isinstance(kept, float) else kept
    os.truncate(path, size)
    with pytest.raises(CheckpointError, match=rf"file\.pt \({size} bytes\) cannot be read; it is"):
        read_torch_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pt is missing"):
        read_torch_file(tmp_path / "gone.pt")


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_a_tensor_is_found(tmp_path, seed):
    path = tmp_path / "file.pt"
    values = torch.arange(10_000.0)
    torch.save({"exp_avg": values}, path)
    data = bytearray(path.read_bytes())
    start = bytes(data).index(values.numpy().tobytes())
    place = start + int(np.random.default_rng(seed).integers(values.numel() * 4))
    data[place] ^= 1 << seed % 8
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"file\.pt .*checksum of its part file/data/0"):
        read_torch_file(path)
