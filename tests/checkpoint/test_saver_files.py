"""A file that is hashed while it is written."""

import os
import resource
import signal

import pytest
import torch

from megatron.base.errors import CheckpointError
from megatron.base.file_digests import digest_file
from megatron.checkpoint.hashed_file import SaveCancelled, write_torch_file

CONTENT = {"weight": torch.randn(1024, 1300), "small": torch.arange(3), "step": 7}


def test_size_and_digest_are_those_of_the_file_and_it_loads(tmp_path):
    path = tmp_path / "a.pt"
    stored = write_torch_file(CONTENT, path)
    assert stored.size == path.stat().st_size
    assert stored.digest == digest_file(path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["step"] == 7
    assert torch.equal(loaded["weight"], CONTENT["weight"])


def test_nothing_is_read(tmp_path):
    def bytes_read() -> int:
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])  # rchar: also what the page cache answers

    reading_itself = -bytes_read() + bytes_read()
    before = bytes_read()
    write_torch_file(CONTENT, tmp_path / "a.pt")
    assert bytes_read() - before == reading_itself


@pytest.mark.parametrize("limit", [100, 70_000, 4_000_000])
def test_a_full_disk_is_told_as_such(tmp_path, limit):
    """A limit on the size of files, which the system enforces where a full disk would be told."""
    path = tmp_path / "a.pt"
    usual = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"a\.pt could not be written: .*File too large"):
            write_torch_file(CONTENT, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, usual)


def test_a_cancelled_file_is_left_at_once(tmp_path):
    with pytest.raises(SaveCancelled):
        write_torch_file(CONTENT, tmp_path / "a.pt", is_cancelled=lambda: True)
    assert os.path.getsize(tmp_path / "a.pt") == 0


def test_an_existing_file_is_not_overwritten(tmp_path):
    (tmp_path / "a.pt").write_text("somebody's")
    with pytest.raises(CheckpointError, match="File exists"):
        write_torch_file(CONTENT, tmp_path / "a.pt")
