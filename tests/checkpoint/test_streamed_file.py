"""A file written tensor by tensor is the one torch.save writes."""

import zipfile
from collections import OrderedDict

import pytest
import torch

from megatron.base.errors import CheckpointError
from megatron.base.file_digests import digest_file
from megatron.base.torch_metadata import read_torch_metadata
from megatron.checkpoint.reshape.streamed_file import StreamedTensor, write_streamed_file
from megatron.checkpoint.safe_torch import read_torch_file

WHOLE = torch.arange(35, dtype=torch.float32).view(5, 7)
HALF = torch.randn(301).bfloat16()


def content():
    return {
        "streamed": StreamedTensor((5, 7), torch.float32, lambda: [WHOLE[:2], WHOLE[2:]], True),
        "held": [HALF[1:], OrderedDict(numbers=torch.arange(3))],
        "empty": StreamedTensor.of((0,), torch.float32, lambda: torch.zeros(0)),
        "number": StreamedTensor.of((), torch.float32, lambda: torch.tensor(2.5)),
        "plain": (1, None, "text", torch.Size([2, 3])),
    }


@pytest.mark.parametrize("is_mapped", [False, True])
def test_torch_reads_what_was_streamed(tmp_path, is_mapped):
    write_streamed_file(content(), tmp_path / "file.pt")
    read = torch.load(tmp_path / "file.pt", weights_only=True, mmap=is_mapped)
    assert list(read) == ["streamed", "held", "empty", "number", "plain"]
    assert torch.equal(read["streamed"], WHOLE)
    assert read["streamed"].requires_grad
    assert torch.equal(read["held"][0], HALF[1:])
    assert read["held"][1]["numbers"].tolist() == [0, 1, 2]
    assert read["empty"].shape == (0,)
    assert read["number"].item() == 2.5
    assert read["plain"] == (1, None, "text", torch.Size([2, 3]))


def test_readers_without_torch_and_with_checks_accept_it(tmp_path):
    write_streamed_file(content(), tmp_path / "file.pt")
    assert torch.equal(read_torch_file(tmp_path / "file.pt")["streamed"], WHOLE)
    assert read_torch_metadata(tmp_path / "file.pt")["streamed"].shape == (5, 7)


def test_size_and_digest_are_known_without_reading_it_again(tmp_path):
    stored = write_streamed_file(content(), tmp_path / "file.pt")
    assert stored.size == (tmp_path / "file.pt").stat().st_size
    assert stored.digest == digest_file(tmp_path / "file.pt")


def test_mapped_tensors_are_aligned_and_checksums_are_right(tmp_path):
    write_streamed_file(content(), tmp_path / "file.pt")
    read = torch.load(tmp_path / "file.pt", weights_only=True, mmap=True)
    assert read["streamed"].data_ptr() % 64 == read["held"][0].data_ptr() % 64 == 0
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        assert archive.testzip() is None


def test_a_tensor_that_is_given_too_few_elements_is_a_mistake(tmp_path):
    short = StreamedTensor.of((4,), torch.float32, lambda: torch.zeros(3))
    with pytest.raises(ValueError, match=r"shape \(4,\) was given 3 elements"):
        write_streamed_file({"short": short}, tmp_path / "file.pt")


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere/file.pt could not be written: .*No such"):
        write_streamed_file({}, tmp_path / "nowhere" / "file.pt")
